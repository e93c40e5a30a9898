"""Figures, drawn from run folders and evaluation summaries only, never from live objects.

Each function returns a plotly figure; :func:`show` writes and displays it. This module is the way
in: the charts of evaluations live in :mod:`rlkit.charts` and the look in :mod:`rlkit.theme`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rlkit import metrics, runs
from rlkit.charts import bars, baseline_panel, forest, keyword_bars, length_bars, passk_curves
from rlkit.display import regenerate, show
from rlkit.theme import (
    INK,
    LABELS,
    OVERRIDE_NOTE,
    PALETTE,
    add_note,
    colors_of,
    is_fraction,
    label,
    numbers,
    overridden,
    styled,
    tint,
)

__all__ = [
    "add_note",
    "bars",
    "baseline_panel",
    "forest",
    "keyword_bars",
    "keyword_curves",
    "length_bars",
    "over_runs",
    "passk_curves",
    "price_stack",
    "regenerate",
    "show",
    "training_curves",
]
Run = Path | str
Arms = Mapping[str, Sequence[Run]]
"""Label of an arm to the run folders of its seeds."""


def _curve(run: Run, metric: str, x: str) -> pd.DataFrame:
    """Columns x and y of one run. Raises ValueError naming what the run has instead."""
    rows = runs.read_metrics(run)
    if rows.empty:
        raise ValueError(f"run {runs.folder(run).name!r} has no metrics yet")
    if metric.startswith("eval:"):
        name = metric.removeprefix("eval:")
        points = metrics.curve(run)
        found = points[points["metric"] == name]
        if found.empty:
            have = sorted(points["metric"].unique()) or "none (set eval_every)"
            raise ValueError(
                f"run {runs.folder(run).name!r} has no validation metric {name!r}; it has {have}"
            )
        where = found["step"]
        if x != "step":
            done = pd.concat([pd.Series({0: 0.0}), rows.set_index("step")[x]])
            where = where.map(done[~done.index.duplicated(keep="last")])
        return pd.DataFrame({"x": where, "y": found["value"]}).dropna()
    missing = {metric, x} - set(rows.columns)
    if missing:
        raise ValueError(
            f"run {runs.folder(run).name!r} has no {sorted(missing)}; it has {sorted(rows.columns)}"
        )
    return pd.DataFrame({"x": rows[x], "y": pd.to_numeric(rows[metric])}).dropna()


def over_runs(
    folders: Sequence[Run], metric: str, x: str = "step", smooth: int = 1
) -> pd.DataFrame:
    """Mean and range over the seeds of an arm: columns x, mean, low, high, n.

    Seeds are put on the x values of the first one by linear interpolation (a no-op for steps) and
    cut where the shortest ends. ``smooth``: centred moving average over this many points, per seed.
    """
    curves = []
    for run in folders:
        curve = _curve(run, metric, x)
        if smooth > 1:
            curve["y"] = curve["y"].rolling(smooth, center=True, min_periods=1).mean()
        curves.append(curve)
    if any(c.empty for c in curves):
        return pd.DataFrame(columns=["x", "mean", "low", "high", "n"])
    low, high = max(c["x"].min() for c in curves), min(c["x"].max() for c in curves)
    grid = curves[0]["x"][(curves[0]["x"] >= low) & (curves[0]["x"] <= high)].to_numpy(float)
    y = np.array([np.interp(grid, c["x"].to_numpy(float), c["y"].to_numpy(float)) for c in curves])
    return pd.DataFrame(
        {"x": grid, "mean": y.mean(0), "low": y.min(0), "high": y.max(0), "n": len(curves)}
    )


def training_curves(
    arms: Arms,
    panels: Sequence[str] = ("accuracy", "length_mean", "entropy"),
    *,
    x: str = "step",
    smooth: int = 5,
    title: str = "Training",
    subtitle: str | None = None,
    note: str = "",
    columns: int = 3,
) -> go.Figure:
    """One panel per metric; per arm the mean over seeds with the range over seeds as band.

    Args:
        arms: label to run folders. panels: keys of metrics.jsonl, or ``eval:<metric>`` for the
            evaluations during training (drawn with markers, never smoothed).
        x: "step", "completions" or "tokens": compare arms at equal cost.
        smooth: width in steps of the centred moving average; with one seed the raw points stay
            visible behind it.
        subtitle: default says what line and band are. note: one line below the panels.
    """
    if not arms or not all(arms.values()):
        raise ValueError("no runs to draw: every arm needs at least one run folder")
    seeds = {len(folders) for folders in arms.values()}
    if subtitle is None:
        many = max(seeds) > 1
        count = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
        line = f"mean over {count} seeds, band: their range" if many else "one seed, faint: raw"
        subtitle = line + (f"; moving average over {smooth} steps" if smooth > 1 else "")
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    fig = make_subplots(
        rows=lines,
        cols=columns,
        horizontal_spacing=0.1 if columns > 1 else 0.0,
        vertical_spacing=0.32 / lines,
    )
    colors = colors_of(list(arms))
    for i, metric in enumerate(panels):
        row, col = i // columns + 1, i % columns + 1
        evaluated = metric.startswith("eval:")
        for name, folders in arms.items():
            band = over_runs(folders, metric, x, 1 if evaluated else smooth)
            if len(folders) == 1 and smooth > 1 and not evaluated:
                raw = over_runs(folders, metric, x)
                _line(fig, raw["x"], raw["mean"], name, tint(colors[name], 0.4), 1, row, col)
            _band(fig, band, name, colors[name], row, col)
            _line(
                fig, band["x"], band["mean"], name, colors[name], 2.4, row, col,
                legend=i == 0, markers=evaluated,
            )  # fmt: skip
        fig.update_yaxes(title_text=label(metric), row=row, col=col)
        if is_fraction(metric):
            fig.update_yaxes(range=[-0.02, 1.03], row=row, col=col)
        elif metric not in ("loss", "reward", "learning_rate"):
            fig.update_yaxes(rangemode="tozero", row=row, col=col)
        fig.update_xaxes(title_text=label(x) if row == lines else None, row=row, col=col)
    styled(fig, title, subtitle, height=110 + 290 * lines, legend=len(arms) > 1)
    return _notes(fig, arms, note)


def _notes(fig: go.Figure, arms: Arms, note: str) -> go.Figure:
    if note:
        add_note(fig, note)
    if overridden([run for folders in arms.values() for run in folders]):
        add_note(fig, OVERRIDE_NOTE, color=PALETTE[1])
    return fig


def _line(
    fig: go.Figure, x: Any, y: Any, name: str, color: str, width: float, row: int, col: int,
    *, legend: bool = False, markers: bool = False,
) -> None:  # fmt: skip
    fig.add_trace(
        go.Scatter(
            x=numbers(x),
            y=numbers(y),
            name=name,
            legendgroup=name,
            showlegend=legend,
            mode="lines+markers" if markers else "lines",
            line={"color": color, "width": width},
            marker={"size": 6},
            hovertemplate="%{y:.3g}",
        ),
        row=row,
        col=col,
    )


def _band(fig: go.Figure, band: pd.DataFrame, name: str, color: str, row: int, col: int) -> None:
    if np.allclose(band["low"].astype(float), band["high"].astype(float)):
        return
    fig.add_trace(
        go.Scatter(
            x=numbers(np.concatenate([band["x"], band["x"][::-1]])),
            y=numbers(np.concatenate([band["high"], band["low"][::-1]])),
            name=name,
            legendgroup=name,
            showlegend=False,
            mode="lines",
            fill="toself",
            fillcolor=tint(color, 0.16),
            line={"width": 0},
            hoverinfo="skip",
        ),
        row=row,
        col=col,
    )


def keyword_curves(
    arms: Arms, *, window: int = 5, title: str = "Reflection keywords over training", note: str = ""
) -> go.Figure:
    """Share of rollouts with a word of each category over training (counterpart of Figure 4)."""
    fig = make_subplots(rows=1, cols=3, horizontal_spacing=0.1)
    colors, top = colors_of(list(arms)), 0.05
    for name, folders in arms.items():
        curves = []
        for run in folders:
            rollouts = runs.read_rollouts(run)
            hits = metrics.keyword_hits(rollouts["text"]).groupby(rollouts["step"]).mean()
            curves.append(hits.rolling(window, center=True, min_periods=1).mean())
        for col, category in enumerate(metrics.KEYWORDS, start=1):
            y = pd.concat([c[category] for c in curves], axis=1).dropna()
            frame = pd.DataFrame({"x": y.index, "low": y.min(axis=1), "high": y.max(axis=1)})
            top = max(top, float(frame["high"].max()))
            _band(fig, frame, name, colors[name], 1, col)
            _line(fig, y.index, y.mean(axis=1), name, colors[name], 2.4, 1, col, legend=col == 1)
            words = ", ".join(metrics.KEYWORDS[category])
            fig.update_xaxes(title_text=f"training step<br><i>{words}</i>", row=1, col=col)
            fig.update_yaxes(title_text=f"share with {category} word", row=1, col=col)
    fig.update_yaxes(range=[0, 1.1 * top])
    subtitle = f"share of rollouts, moving average over {window} steps; the words are in the corpus"
    styled(fig, title, subtitle, height=410, legend=len(arms) > 1)
    fig.update_layout(margin={"b": 74})
    return _notes(fig, arms, note)


def price_stack(
    frames: Mapping[str, pd.DataFrame],
    *,
    title: str = "Between modes or within them?",
    modes: str = "direct against reasoning",
) -> go.Figure:
    """Price decomposition over training: stacked parts and their total (see rlkit.price.series).

    Args:
        frames: name of the quantity with its unit to the result of ``price.series``.
        title: heading. modes: what the labels told apart, for the subtitle.
    """
    fig = make_subplots(rows=1, cols=len(frames), horizontal_spacing=0.12)
    parts = {"between": ("between modes", PALETTE[0]), "within": ("within modes", PALETTE[4])}
    for col, (axis, frame) in enumerate(frames.items(), start=1):
        later = frame.iloc[1:]
        for part, (name, color) in parts.items():
            fig.add_trace(
                go.Bar(
                    x=numbers(later["step"]),
                    y=numbers(later[part]),
                    name=name,
                    legendgroup=part,
                    showlegend=col == 1,
                    marker={"color": color},
                    hovertemplate="%{y:.3g}",
                ),
                row=1,
                col=col,
            )
        fig.add_trace(
            go.Scatter(
                x=numbers(later["step"]),
                y=numbers(later["total"]),
                name="total change",
                legendgroup="total",
                showlegend=col == 1,
                mode="lines+markers",
                line={"color": INK, "width": 1.6},
                marker={"size": 6},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": numbers(later["total_high"] - later["total"]),
                    "arrayminus": numbers(later["total"] - later["total_low"]),
                    "thickness": 1.2,
                    "width": 3,
                    "color": INK,
                },
                hovertemplate="%{y:.3g}",
            ),
            row=1,
            col=col,
        )
        fig.update_yaxes(
            title_text=f"change in {axis}", zeroline=True, zerolinecolor="#9A9A9A", row=1, col=col
        )
        fig.update_xaxes(title_text=LABELS["step"], row=1, col=col)
    fig.update_layout(barmode="relative", bargap=0.15)
    subtitle = f"change since the first steps ({modes}); bars: 95 % intervals over problems"
    return styled(fig, title, subtitle, height=420)
