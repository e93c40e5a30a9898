"""Figures of rewards that are gamed or wrong: reward against truth, dose against response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rlkit import runs
from rlkit.diagnostics import Run, parting, series
from rlkit.parting import Parting
from rlkit.stats import Estimate
from rlkit.theme import (
    INK,
    LABELS,
    MUTED,
    OVERRIDE_NOTE,
    PALETTE,
    add_note,
    colors_of,
    numbers,
    overridden,
    styled,
    tint,
)

BLUE, RED, GREEN, PINK, ORANGE, SKY = PALETTE[:6]
PANELS: tuple[tuple[str, dict[str, tuple[str, str]]], ...] = (
    ("gain since the first steps (SD)", {
        "proxy_gain": ("reward", RED),
        "true_gain": ("true accuracy", BLUE),
    }),
    ("correlation, share of variance", {"agreement": ("reward with correctness", INK)}),
    ("share of completions, ratio", {
        "completion_ratio": ("ended", GREEN),
        "repetition": ("repeated", PINK),
        "compression": ("compressed", ORANGE),
    }),
    ("share of completions", {
        "paid_wrong": ("wrong, paid", RED),
        "reinforced_wrong": ("wrong, raised", SKY),
        "format_only": ("format only", PINK),
    }),
    (LABELS["length"], {
        "length_right": ("right answers", BLUE),
        "length_wrong": ("wrong answers", RED),
    }),
    (LABELS["entropy"], {"entropy": ("entropy", GREEN)}),
)  # fmt: skip
"""Axis title and curves (column of ``diagnostics.series`` to name and colour) of each panel; the
second also shows the share of each reward part. ``wrong, raised``: raised by the gradient; ``format
only``: wrong, well formed and paid above a wrong, ill-formed answer of the group."""
ROWS = len(PANELS) // 2
DASHED = "true_gain"
"""Drawn last and dashed: under an accuracy reward it lies on the reward."""


def over_series(frames: Sequence[pd.DataFrame], column: str) -> pd.DataFrame:
    """Mean and range of a column over seeds, at the steps that all have: x, mean, low, high."""
    curves = [frame.set_index("step")[column] for frame in frames if column in frame and len(frame)]
    joined = pd.concat(curves, axis=1, join="inner").dropna() if curves else pd.DataFrame()
    if joined.empty:
        return pd.DataFrame(columns=["x", "mean", "low", "high"], dtype=float)
    return pd.DataFrame(
        {
            "x": joined.index.to_numpy(float),
            "mean": joined.mean(axis=1).to_numpy(),
            "low": joined.min(axis=1).to_numpy(),
            "high": joined.max(axis=1).to_numpy(),
        }
    )


def hacking_figure(
    folders: Sequence[Run], *, window: int = 5, title: str = "Reward against truth"
) -> go.Figure:
    """Six panels for the seeds of one arm: mean over seeds, band: their range.

    Reward and true accuracy as gains in standard deviations, with the step at which they parted
    (dotted) and at which that could be said (dashed; ``rlkit.parting``, one pair per seed); share
    of each reward part in the variance that the gradient sees, and how far the reward agrees with
    correctness; completion ratio, repetition and compression; wrong answers that are paid, raised
    by the gradient, or paid above ill-formed ones; length of right and wrong answers; entropy.
    Truth is dashed, so that the reward stays visible where both are equal.

    Args:
        folders: run folders or names of one arm. window: moving average over this many steps, the
            step itself and those before, so that no curve moves before its cause.

    Raises:
        ValueError: no runs, or a run without rollouts and metrics. RunError: no such run.
    """
    if not folders:
        raise ValueError("no runs to draw: give at least one run folder")
    frames = [series(run, window) for run in folders]
    for run, frame in zip(folders, frames, strict=True):
        if frame.empty:
            raise ValueError(f"run {runs.folder(run).name!r} has no rollouts or metrics yet")
    parts = list(dict.fromkeys(c for f in frames for c in f.columns if c.startswith("share_")))
    colors = colors_of(parts)
    shares = {p: (f"share of {p.removeprefix('share_')}", colors[p]) for p in parts}
    fig = make_subplots(rows=ROWS, cols=2, horizontal_spacing=0.1, vertical_spacing=0.11)
    for i, (axis, curves) in enumerate(PANELS):
        row, col = i // 2 + 1, i % 2 + 1
        for column, (name, color) in ({**curves, **shares} if i == 1 else curves).items():
            _draw(fig, over_series(frames, column), name, color, row, col, column == DASHED)
        fig.update_yaxes(title_text=axis, row=row, col=col)
        fig.update_xaxes(title_text=LABELS["step"] if row == ROWS else None, row=row, col=col)
    for row in range(2, ROWS + 1):
        fig.update_yaxes(rangemode="tozero", row=row)
    fig.update_yaxes(rangemode="tozero", row=1, col=2)
    fig.update_xaxes(matches="x")
    found = [mark for mark in map(parting, folders) if mark is not None]
    for mark in found:
        for step, dash in ((mark.began, "dot"), (mark.caught, "dash")):
            fig.add_vline(step, line={"color": MUTED, "dash": dash, "width": 1.4}, row=1, col=1)
    many = len(folders) > 1
    subtitle = f"mean over {len(folders)} seeds, band: their range" if many else "one seed"
    subtitle += f"; mean of the last {window} steps" if window > 1 else ""
    styled(fig, title, subtitle, height=900)
    _panel_legends(fig)
    add_note(fig, _parting_note(found, len(folders)))
    return add_note(fig, OVERRIDE_NOTE, color=RED) if overridden(folders) else fig


def _panel_legends(fig: go.Figure) -> None:
    """Names above each panel: all curves in one row would not fit."""
    for i in range(len(PANELS)):
        axis = "" if i == 0 else str(i + 1)
        place = {
            "x": fig.layout[f"xaxis{axis}"].domain[0],
            "y": fig.layout[f"yaxis{axis}"].domain[1],
            "xanchor": "left",
            "yanchor": "bottom",
            "xref": "paper",
            "yref": "paper",
            "orientation": "h",
            "font": {"size": 12},
            "bgcolor": "rgba(0,0,0,0)",
        }
        fig.update_layout({f"legend{axis}": place})


def _parting_note(found: Sequence[Parting], count: int) -> str:
    if not found:
        return "reward and truth did not part"
    whose = "" if count == 1 else f" in {len(found)} of {count} seeds"
    return f"reward and truth parted{whose}: dotted, estimated start; dashed, caught"


def _draw(
    fig: go.Figure, band: pd.DataFrame, name: str, color: str, row: int, col: int, dashed: bool
) -> None:
    if band.empty:
        return
    panel = 2 * (row - 1) + col
    legend = "legend" if panel == 1 else f"legend{panel}"
    if (band["high"] - band["low"]).max() > 1e-9:
        fig.add_trace(
            go.Scatter(
                x=numbers([*band["x"], *band["x"][::-1]]),
                y=numbers([*band["high"], *band["low"][::-1]]),
                name=name,
                mode="lines",
                fill="toself",
                fillcolor=tint(color, 0.16),
                line={"width": 0},
                showlegend=False,
                hoverinfo="skip",
            ),
            row=row,
            col=col,
        )
    fig.add_trace(
        go.Scatter(
            x=numbers(band["x"]),
            y=numbers(band["mean"]),
            name=name,
            mode="lines",
            line={"color": color, "width": 2.4, "dash": "dash" if dashed else "solid"},
            legend=legend,
            showlegend=True,
            hovertemplate="%{y:.3g}",
        ),
        row=row,
        col=col,
    )


def dose_curves(
    curves: Mapping[str, Mapping[float, Estimate]],
    *,
    title: str,
    x: str,
    y: str,
    subtitle: str = "",
    reference: tuple[str, Estimate] | None = None,
) -> go.Figure:
    """Response to a dose: one line per condition, an interval at each dose.

    Doses are spaced evenly, since they usually grow by factors; equal doses of several conditions
    stand side by side.

    Args:
        curves: condition to dose to estimate.
        x, y: axis titles. reference: name and estimate of a level to compare with, dashed.

    Raises:
        ValueError: nothing to draw.
    """
    doses = sorted({dose for curve in curves.values() for dose in curve})
    if not doses:
        raise ValueError("no doses to draw: every condition needs at least one estimate")
    colors = colors_of(list(curves))
    fig = go.Figure()
    for i, (name, curve) in enumerate(curves.items()):
        shift = 0.08 * (i - (len(curves) - 1) / 2)
        found = [curve[dose] for dose in sorted(curve)]
        fig.add_trace(
            go.Scatter(
                x=numbers([doses.index(dose) + shift for dose in sorted(curve)]),
                y=numbers([e.value for e in found]),
                name=name,
                mode="lines+markers",
                line={"color": colors[name], "width": 2.4},
                marker={"size": 8},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": numbers([e.high - e.value for e in found]),
                    "arrayminus": numbers([e.value - e.low for e in found]),
                    "thickness": 1.4,
                    "width": 4,
                },
                hovertemplate="%{y:.3g}",
            )
        )
    if reference is not None:
        fig.add_hline(
            reference[1].value,
            line={"color": INK, "dash": "dash", "width": 1.2},
            annotation_text=reference[0],
        )
    fig.update_xaxes(
        title_text=x,
        tickvals=list(range(len(doses))),
        ticktext=[f"{dose:g}" for dose in doses],
        range=[-0.4, len(doses) - 0.6],
    )
    fig.update_yaxes(title_text=y, rangemode="tozero")
    return styled(fig, title, subtitle, height=430)
