"""The one look of all figures: template, colours, labels and notes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from rlkit.runs import read_config

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
"""Okabe and Ito's colours, told apart with every common colour-vision deficiency."""
INK, MUTED, GRID = "#222222", "#6B6B6B", "#E6E6E6"
OVERRIDE_NOTE = "reward self-check overridden (allow_exploitable)"
WIDTH, HEIGHT = 920, 400

LABELS = {
    "reward": "reward",
    "reward_std": "reward SD in group",
    "accuracy": "accuracy (training)",
    "length_mean": "response length (tokens)",
    "length_right": "length of right answers (tokens)",
    "length_wrong": "length of wrong answers (tokens)",
    "completion_ratio": "completion ratio",
    "several_answers_ratio": "share with several answers",
    "reasoning_rate": "share with reasoning",
    "entropy": "entropy (nats per token)",
    "kl": "KL to reference (nats per token)",
    "grad_norm": "gradient norm",
    "loss": "loss",
    "learning_rate": "learning rate",
    "clip_ratio": "clipped token share",
    "groups_mixed": "groups with right and wrong",
    "groups_all_right": "groups all right",
    "groups_all_wrong": "groups all wrong",
    "seconds_step": "time per step (s)",
    "step": "training step",
    "completions": "completions (cumulative)",
    "tokens": "generated tokens (cumulative)",
    "call_rate": "share with a call",
    "calls_mean": "calls per response",
    "call_failures": "share of calls that fail",
    "calls_ended": "share out of calls",
    "tool_tokens_mean": "tool output (tokens)",
    "greedy": "greedy accuracy",
    "length": "response length (tokens)",
    "accuracy_reasoning": "accuracy when reasoning",
    "accuracy_direct": "accuracy when direct",
}
"""Axis titles with units. Shares and accuracies are fractions."""
_FRACTIONS = {
    "accuracy",
    "completion_ratio",
    "several_answers_ratio",
    "reasoning_rate",
    "call_rate",
    "call_failures",
    "calls_ended",
    "groups_mixed",
    "groups_all_right",
    "groups_all_wrong",
    "clip_ratio",
    "greedy",
    "accuracy_reasoning",
    "accuracy_direct",
}


def template() -> go.layout.Template:
    """The package's look: white ground, light horizontal grid, colour-blind safe colours."""
    axis = {
        "showline": True,
        "linecolor": "#9A9A9A",
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": "#9A9A9A",
        "zeroline": False,
        "automargin": True,
        "title": {"standoff": 8, "font": {"size": 13}},
    }
    return go.layout.Template(
        layout={
            "font": {
                "family": "Inter, Helvetica Neue, Arial, DejaVu Sans, sans-serif",
                "size": 13,
                "color": INK,
            },
            "colorway": list(PALETTE),
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "xaxis": {**axis, "showgrid": False},
            "yaxis": {**axis, "showgrid": True, "gridcolor": GRID},
            "legend": {"orientation": "h", "bgcolor": "rgba(0,0,0,0)", "font": {"size": 13}},
            "hoverlabel": {"bgcolor": "white", "font": {"size": 12}},
            "margin": {"l": 64, "r": 24, "t": 84, "b": 56},
        }
    )


def styled(
    fig: go.Figure, title: str, subtitle: str = "", *, height: int = HEIGHT, legend: bool = True
) -> go.Figure:
    """Apply template, title block and size. The legend gets its own row above the panels."""
    top = 52 + (20 if subtitle else 0) + (26 if legend else 0)
    fig.update_layout(
        template=template(),
        width=WIDTH,
        height=height,
        title={
            "text": f"<b>{title}</b>",
            "subtitle": {"text": subtitle, "font": {"size": 13, "color": MUTED}},
            "x": 0,
            "xref": "container",
            "pad": {"l": 14},
            "y": 1 - 16 / height,
            "yref": "container",
            "yanchor": "top",
            "font": {"size": 16},
        },
        showlegend=legend,
        margin={"l": 64, "r": 24, "t": top, "b": 56},
    )
    if legend:
        fig.update_layout(
            legend={
                "yref": "container",
                "y": 1 - (top - 6) / height,
                "yanchor": "bottom",
                "xref": "container",
                "x": 12 / WIDTH,
                "xanchor": "left",
            }
        )
    return fig


def add_note(fig: go.Figure, text: str, *, color: str = MUTED) -> go.Figure:
    """Put one line under the axes, in room of its own; a second call with the same text is free."""
    layout = fig.layout
    if any(a.text == text for a in layout.annotations):
        return fig
    old_height, bottom = int(layout.height or HEIGHT), int(layout.margin.b or 56)
    height = old_height + 22
    fig.add_annotation(
        text=text,
        xref="paper",
        yref="paper",
        x=0,
        y=0,
        xanchor="left",
        yanchor="top",
        xshift=14 - int(layout.margin.l or 64),
        yshift=-bottom + 2,
        showarrow=False,
        font={"size": 12, "color": color},
    )
    # Title and legend are placed as fractions of the height: keep their distance from the top.
    for part in (layout.title, layout.legend):
        if part.yref == "container" and part.y is not None:
            part.y = 1 - (1 - part.y) * old_height / height
    fig.update_layout(height=height, margin={"b": bottom + 22})
    return fig


def overridden(runs: Sequence[Path | str]) -> bool:
    """Whether any of the run folders was trained with ``allow_exploitable``."""
    return any(read_config(run).reward.allow_exploitable for run in runs)


def label(metric: str) -> str:
    """Axis title of a metric; ``eval:`` marks values from evaluations during training."""
    name = metric.removeprefix("eval:")
    name, _, task = name.partition("/")
    text = LABELS.get(name, name) + (f", {task}" if task else "")
    return f"{text} (validation)" if metric.startswith("eval:") else text


def is_fraction(metric: str) -> bool:
    """Whether a metric lives in [0, 1], so that its axis shows all of it."""
    name = metric.removeprefix("eval:").partition("/")[0]
    return name in _FRACTIONS or name.partition("@")[0] in ("avg", "pass", "maj")


def numbers(values: Any) -> list[float | None]:
    """Plain numbers with six digits: readable figure files without meaningless differences."""
    return [
        None if not np.isfinite(v) else float(f"{float(v):.6g}")
        for v in np.asarray(values, dtype=float)
    ]


def tint(color: str, alpha: float) -> str:
    """``#rrggbb`` with transparency."""
    r, g, b = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{alpha})"


def colors_of(labels: Sequence[str]) -> dict[str, str]:
    """A colour per label, in the palette's order."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(labels)}
