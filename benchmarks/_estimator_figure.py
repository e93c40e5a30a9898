"""The table and the figure of ``benchmarks/estimators.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from _frozen import BATCH, Setting
from plotly.subplots import make_subplots

from rlkit.stats import Estimate
from rlkit.theme import INK, PALETTE, numbers, styled

SHOWN = ("RLOO", "REINFORCE", "GRPO, constant", "RLOO, sequence mean", "GRPO", "pass@4")
"""Estimators drawn and stepped along: inside a batch the others share the direction of one."""
GAIN_GROUP, GAIN_STEP = 16, 0.02
"""Group size, and length of the one step whose gain is measured."""

Table = list[dict[str, Any]]


def row_of(
    setting: Setting, name: str, group: int, quantity: str, estimate: Estimate
) -> dict[str, Any]:
    """One line of the table."""
    # Differences that are 0 in theory come out as 1e-18 or so, with a sign of no meaning.
    ends = np.round([estimate.value, estimate.low, estimate.high], 9) + 0.0
    value, low, high = numbers(ends)
    return {
        **setting.label,
        "estimator": name,
        "P": BATCH // group if group else 0,
        "G": group,
        "quantity": quantity,
        "value": value,
        "low": low,
        "high": high,
        "n": estimate.n,
        "of": estimate.method.rpartition(" ")[2],
    }


def update(path: Path, setting: Setting, rows: Table) -> pd.DataFrame:
    """Put the rows of a setting into the table, in place of its older ones."""
    new = pd.DataFrame(rows)
    if path.exists():
        old = pd.read_csv(path)
        same = np.logical_and.reduce([old[k] == v for k, v in setting.label.items()])
        new = pd.concat([old[~same], new], ignore_index=True)
    new = new.sort_values(list(setting.label), kind="stable", ignore_index=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    new.to_csv(path, index=False, lineterminator="\n")
    return new


def markdown(table: pd.DataFrame, setting: Setting, group: int) -> str:
    """The estimators of one setting at one group size, as a table for the documentation."""
    same = [table[k] == v for k, v in setting.label.items()]
    here = table[np.logical_and.reduce([*same, table["G"] == group])]
    columns = ("cosine", "scale", "snr", "batch_cosine", "batch_cosine minus RLOO", "gain")
    lines = ["| estimator | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(here["estimator"]):
        cells = [str(name)]
        for column in columns:
            found = here[(here["estimator"] == name) & (here["quantity"] == column)]
            cells += [f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in found.itertuples()] or [
                ""
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shipped(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that the figure shows: shipped checkpoints at temperature 1."""
    return table[(table["temperature"] == 1.0) & (table["drift"] == 0)]


def draw(table: pd.DataFrame) -> go.Figure:
    """A line of panels per checkpoint: expectation, one batch, one step.

    Raises:
        ValueError: no rows of a shipped checkpoint at temperature 1.
    """
    plain = shipped(table)
    if plain.empty:
        raise ValueError("nothing to draw: run a shipped checkpoint at temperature 1 first")
    checkpoints = list(dict.fromkeys(zip(plain["model"], plain["task"], strict=True)))
    fig = make_subplots(
        rows=len(checkpoints), cols=3, column_widths=[0.32, 0.32, 0.36],
        horizontal_spacing=0.09, vertical_spacing=0.22 / len(checkpoints),
    )  # fmt: skip
    for row, (model, task) in enumerate(checkpoints, start=1):
        here = plain[(plain["model"] == model) & (plain["task"] == task)]
        accuracy = here.loc[here["quantity"] == "accuracy", "value"].iloc[0]
        for i, name in enumerate(SHOWN):
            mine = here[here["estimator"] == name]
            style = {"name": name, "legendgroup": name}
            for col, quantity in enumerate(("cosine", "batch_cosine"), start=1):
                found = mine[mine["quantity"] == quantity].sort_values("G")
                nudge = 1.03 ** (i - len(SHOWN) / 2)  # so that the intervals do not hide each other
                fig.add_trace(
                    go.Scatter(
                        x=numbers(found["G"] * nudge), y=numbers(found["value"]),
                        error_y=_bars(found), mode="lines+markers",
                        line={"color": PALETTE[i], "width": 1.8}, marker={"size": 6},
                        showlegend=row == 1 and col == 1, **style,
                    ),
                    row=row, col=col,
                )  # fmt: skip
            gain = mine[mine["quantity"] == "gain"]
            at = mine[(mine["quantity"] == "batch_cosine") & (mine["G"] == GAIN_GROUP)]
            if len(gain):
                fig.add_trace(
                    go.Scatter(
                        x=numbers(at["value"]), y=numbers(gain["value"]), error_y=_bars(gain),
                        mode="markers", marker={"color": PALETTE[i], "size": 8},
                        showlegend=False, **style,
                    ),
                    row=row, col=3,
                )  # fmt: skip
        best = here[(here["estimator"] == "best") & (here["quantity"] == "gain")]
        if len(best):
            norm = here.loc[here["quantity"] == "reference_norm", "value"].iloc[0]
            fig.add_trace(
                go.Scatter(
                    x=numbers([0, 1]), y=numbers([0, norm * GAIN_STEP]), mode="lines",
                    line={"color": INK, "width": 1, "dash": "dot"}, showlegend=False,
                    name="first order", hoverinfo="skip",
                ),
                row=row, col=3,
            )  # fmt: skip
            fig.add_trace(
                go.Scatter(
                    x=[1], y=numbers(best["value"]), error_y=_bars(best), mode="markers",
                    marker={"color": INK, "size": 8}, name="reference", showlegend=row == 1,
                    legendgroup="reference",
                ),
                row=row, col=3,
            )  # fmt: skip
            fig.update_xaxes(range=[0, 1.06], row=row, col=3)
        titles = (
            f"<b>{model}, {task}</b> (accuracy {accuracy:.2f})<br>cosine of the expectation",
            "cosine of one batch",
            f"gain of one step, G = {GAIN_GROUP}",
        )
        for col, title in enumerate(titles, start=1):
            fig.update_yaxes(title_text=title, row=row, col=col)
            if col < 3:
                ticks = sorted(set(here["G"]) - {0})
                fig.update_xaxes(
                    type="log", tickvals=ticks, ticktext=[str(t) for t in ticks], row=row, col=col
                )
        last = row == len(checkpoints)
        fig.update_xaxes(title_text="rollouts per problem G" if last else None, row=row, col=1)
        fig.update_xaxes(title_text="rollouts per problem G" if last else None, row=row, col=2)
        fig.update_xaxes(title_text="cosine of one batch" if last else None, row=row, col=3)
    for col, quantity in enumerate(("cosine", "batch_cosine"), start=1):
        drawn = plain[(plain["quantity"] == quantity) & plain["estimator"].isin(SHOWN)]
        low, high = float(drawn["low"].min()), float(drawn["high"].max())
        room = 0.05 * (high - low)
        fig.update_yaxes(range=[low - room, high + room], col=col)  # one scale for all checkpoints
    subtitle = (
        f"against the gradient of expected accuracy, batches of {BATCH} rollouts; bars: 95 % "
        "intervals; dotted: first-order prediction"
    )
    return styled(
        fig, "What an advantage estimator does to the gradient", subtitle,
        height=140 + 270 * len(checkpoints),
    )  # fmt: skip


def _bars(found: pd.DataFrame) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": numbers(found["high"] - found["value"]),
        "arrayminus": numbers(found["value"] - found["low"]),
        "thickness": 1.2,
        "width": 2,
    }
