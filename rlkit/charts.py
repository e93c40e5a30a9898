"""Charts of evaluations: bars and curves of estimates with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from rlkit import metrics
from rlkit.stats import Estimate
from rlkit.theme import GRID, INK, LABELS, MUTED, PALETTE, colors_of, numbers, styled, tint

Summary = Mapping[str, Estimate]


def bars(
    groups: Mapping[str, Mapping[str, Estimate]],
    *,
    title: str,
    y: str,
    subtitle: str = "bars: 95 % intervals over problems",
    colors: Mapping[str, str] | None = None,
    fraction: bool = True,
    height: int = 400,
) -> go.Figure:
    """Grouped bars with intervals and their values: ``groups[on the x axis][series]``.

    For before and after: ``{"greedy": {"base": e0, "after RL": e1}, ...}``. An undefined estimate
    leaves a gap marked "none".
    """
    series = list(dict.fromkeys(s for group in groups.values() for s in group))
    if not series:
        raise ValueError("no estimates to draw: groups is empty")
    colors = dict(colors) if colors is not None else colors_of(series)
    width = 0.8 / len(series)
    fig = go.Figure()
    for j, name in enumerate(series):
        at = [i - 0.4 + width * (j + 0.5) for i, g in enumerate(groups.values()) if name in g]
        found = [g[name] for g in groups.values() if name in g]
        text = ["none" if np.isnan(e.value) else _short(e.value) for e in found]
        tops = [0.0 if np.isnan(e.high) else e.high for e in found]
        fig.add_trace(
            go.Bar(
                x=numbers(at),
                y=numbers([e.value for e in found]),
                name=name,
                width=width * 0.88,
                marker={"color": colors[name]},
                error_y=_error(found),
                hovertemplate="%{y:.3g}",
            )
        )
        fig.add_trace(
            go.Scatter(
                x=numbers(at),
                y=numbers(tops),
                text=text,
                mode="text",
                textposition="top center",
                textfont={"size": 12, "color": INK},
                showlegend=False,
                hoverinfo="skip",
                cliponaxis=False,
            )
        )
    fig.update_xaxes(tickvals=list(range(len(groups))), ticktext=list(groups), ticks="")
    fig.update_xaxes(range=[-0.55, len(groups) - 0.45])
    fig.update_yaxes(title_text=y, rangemode="tozero")
    if fraction:
        fig.update_yaxes(range=[0, 1.1], tickvals=[0, 0.2, 0.4, 0.6, 0.8, 1.0])
    return styled(fig, title, subtitle, height=height, legend=len(series) > 1)


def _short(value: float) -> str:
    return (
        f"{value:.0f}"
        if abs(value) >= 100
        else f"{value:.1f}"
        if abs(value) >= 10
        else f"{value:.2f}"
    )


def _error(found: Sequence[Estimate]) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": numbers([e.high - e.value for e in found]),
        "arrayminus": numbers([e.value - e.low for e in found]),
        "color": "#444444",
        "thickness": 1.4,
        "width": 4,
    }


def length_bars(
    results: Mapping[str, Summary], *, title: str = "Length of right and wrong answers"
) -> go.Figure:
    """Mean length of right and of wrong answers of each model (counterpart of Table 4)."""
    groups = {
        n: {"right": s["length_right"], "wrong": s["length_wrong"]} for n, s in results.items()
    }
    return bars(
        groups,
        title=title,
        y=LABELS["length"],
        colors={"right": PALETTE[0], "wrong": PALETTE[1]},
        fraction=False,
    )


def keyword_bars(
    results: Mapping[str, Summary], *, title: str = "Reflection keywords"
) -> go.Figure:
    """Share of responses with a word of each category, per model."""
    groups = {
        f"{c}<br><i>{', '.join(words)}</i>": {n: s[f"keywords_{c}"] for n, s in results.items()}
        for c, words in metrics.KEYWORDS.items()
    }
    subtitle = "share of responses with such a word, 95 % intervals; the words are in the corpus"
    fig = bars(groups, title=title, y="share of responses", subtitle=subtitle, fraction=False)
    top = max([e.high for g in groups.values() for e in g.values() if np.isfinite(e.high)] + [0.05])
    return fig.update_yaxes(range=[0, top * 1.15])


def passk_curves(
    results: Mapping[str, Summary],
    *,
    title: str = "pass@k",
    subtitle: str = "unbiased estimate, bands: 95 % intervals over problems",
    tokens: Mapping[str, float] | None = None,
) -> go.Figure:
    """pass@k of each model against k on a log axis: does training sharpen or widen?

    Args:
        results: label to the summary of an evaluation.
        tokens: label to mean tokens per answer; the axis is then the tokens of k answers.
    """
    fig = go.Figure()
    colors, budgets = colors_of(list(results)), set()
    for name, summary in results.items():
        ks = sorted(int(key.partition("@")[2]) for key in summary if key.startswith("pass@"))
        if not ks:
            raise ValueError(f"{name!r} holds no pass@k: evaluate with n >= 1 samples")
        budgets |= set(ks)
        found = [summary[f"pass@{k}"] for k in ks]
        x = np.array(ks, dtype=float) * (tokens[name] if tokens else 1)
        fig.add_trace(
            go.Scatter(
                x=numbers(np.concatenate([x, x[::-1]])),
                y=numbers([e.high for e in found] + [e.low for e in found[::-1]]),
                mode="lines",
                fill="toself",
                fillcolor=tint(colors[name], 0.15),
                line={"width": 0},
                name=name,
                legendgroup=name,
                showlegend=False,
                hoverinfo="skip",
            )
        )
        fig.add_trace(
            go.Scatter(
                x=numbers(x),
                y=numbers([e.value for e in found]),
                name=name,
                legendgroup=name,
                mode="lines+markers",
                line={"color": colors[name], "width": 2.4},
                marker={"size": 7},
                hovertemplate="k=%{x}: %{y:.3f}",
            )
        )
    ticks = sorted(budgets)
    if tokens:
        fig.update_xaxes(type="log", title_text="tokens of k attempts")
    else:
        fig.update_xaxes(
            type="log", tickvals=ticks, ticktext=[str(k) for k in ticks], title_text="attempts k"
        )
    fig.update_yaxes(title_text="pass@k", range=[0, 1.03])
    return styled(fig, title, subtitle, height=430)


def baseline_panel(
    rows: Mapping[str, Estimate],
    *,
    highlight: Sequence[str] = (),
    reference: str | None = None,
    paper: Mapping[str, float] | None = None,
    title: str = "What does RL add beyond no-RL baselines?",
    x: str = "accuracy",
    subtitle: str = "95 % intervals over problems",
    fraction: bool = True,
) -> go.Figure:
    """Horizontal bars with intervals, in the order given from the top.

    Args:
        rows: label to estimate. highlight: labels drawn in colour, the others grey.
        reference: label whose value is drawn as a dashed line (the best no-RL baseline).
        paper: values of the study, drawn hatched below and named as another model's.
    """
    if not rows:
        raise ValueError("no rows to draw")
    unknown = [n for n in (*highlight, *([reference] if reference else [])) if n not in rows]
    if unknown:
        raise ValueError(f"{unknown} not among the rows {list(rows)}")
    fig = go.Figure()
    names, found = list(rows), list(rows.values())
    fig.add_trace(
        go.Bar(
            y=names,
            x=numbers([e.value for e in found]),
            orientation="h",
            marker={"color": [PALETTE[0] if n in highlight else "#B8B8B8" for n in names]},
            error_x=_error(found),
            showlegend=False,
            hovertemplate="%{x:.3g}",
            width=0.66,
        )
    )
    _beside(fig, names, [e.high for e in found], [_short(e.value) for e in found])
    if paper:
        hatch = {"color": "white", "line": {"color": MUTED, "width": 1}}
        pattern = {"shape": "/", "fgcolor": MUTED, "size": 6, "solidity": 0.25}
        theirs = [f"{n} <i>(paper)</i>" for n in paper]
        fig.add_trace(
            go.Bar(
                y=theirs,
                x=numbers(list(paper.values())),
                orientation="h",
                marker={**hatch, "pattern": pattern},
                showlegend=False,
                hovertemplate="%{x:.3g}",
                width=0.66,
            )
        )
        _beside(fig, theirs, list(paper.values()), [_short(v) for v in paper.values()])
        names = names + theirs
        add = "hatched: the paper's values, another model and other problems"
        subtitle = f"{subtitle}; {add}" if subtitle else add
    if reference is not None:
        fig.add_vline(
            x=rows[reference].value,
            line={"color": INK, "dash": "dash", "width": 1.2},
            layer="below",
        )
    fig.update_yaxes(
        categoryorder="array",
        categoryarray=names[::-1],
        tickvals=names,
        ticktext=names,
        showgrid=False,
        ticks="",
        title_text=None,
    )
    fig.update_xaxes(title_text=x, showgrid=True, gridcolor=GRID, rangemode="tozero")
    if fraction:
        fig.update_xaxes(range=[0, 1.08], tickvals=[0, 0.2, 0.4, 0.6, 0.8, 1.0])
    styled(fig, title, subtitle, height=150 + 34 * len(names), legend=False)
    return _room_for(fig, names)


def _beside(fig: go.Figure, y: Sequence[str], x: Sequence[float], text: Sequence[str]) -> None:
    fig.add_trace(
        go.Scatter(
            x=numbers(x),
            y=list(y),
            text=[f"  {t}" for t in text],
            mode="text",
            textposition="middle right",
            textfont={"size": 12, "color": INK},
            showlegend=False,
            hoverinfo="skip",
            cliponaxis=False,
        )
    )


def _room_for(fig: go.Figure, names: Sequence[str]) -> go.Figure:
    """Left margin for row labels; plotly's automatic one lets them touch the edge."""
    longest = max(len(n.replace("<i>", "").replace("</i>", "")) for n in names)
    fig.update_yaxes(automargin=False)
    return fig.update_layout(margin={"l": 28 + int(7.2 * longest)})


def forest(
    rows: Mapping[str, Estimate],
    *,
    points: Mapping[str, Sequence[float]] | None = None,
    margin: float | None = None,
    title: str = "Differences",
    x: str = "difference in accuracy",
    subtitle: str = "",
) -> go.Figure:
    """Differences with intervals around a zero line; recipe claims over seeds.

    Args:
        rows: label to the difference. points: per-seed differences, drawn as faint dots.
        margin: equivalence margin, drawn as a grey band around 0.
    """
    if not rows:
        raise ValueError("no rows to draw")
    names = list(rows)
    height = 160 + 40 * len(names)
    fig = go.Figure()
    if margin is not None:
        fig.add_vrect(-margin, margin, fillcolor="#EFEFEF", line_width=0, layer="below")
        band = f"grey: equivalence margin ±{margin:g}"
        subtitle = f"{subtitle}; {band}" if subtitle else band
    fig.add_vline(0, line={"color": MUTED, "width": 1.2}, layer="below")
    for i, name in enumerate(names):
        level = len(names) - 1 - i
        for value in (points or {}).get(name, ()):
            fig.add_trace(
                go.Scatter(
                    x=numbers([value]),
                    y=[level - 0.22],
                    mode="markers",
                    showlegend=False,
                    marker={"color": tint(PALETTE[0], 0.4), "size": 6},
                    hovertemplate="seed: %{x:.3g}",
                )
            )
        e = rows[name]
        clear = e.low > 0 or e.high < 0
        fig.add_trace(
            go.Scatter(
                x=numbers([e.value]),
                y=[level],
                mode="markers+text",
                showlegend=False,
                marker={"color": PALETTE[0] if clear else MUTED, "size": 10, "symbol": "square"},
                error_x={**_error([e]), "color": PALETTE[0] if clear else MUTED, "thickness": 2},
                text=[f"{e.value:+.3f}"],
                textposition="top center",
                textfont={"size": 12},
                hovertemplate="%{x:.3g}",
            )
        )
    fig.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=names[::-1],
        showgrid=False,
        ticks="",
        range=[-0.6, len(names) - 0.4],
    )
    fig.update_xaxes(title_text=x, showgrid=True, gridcolor=GRID)
    styled(fig, title, subtitle, height=height, legend=False)
    return _room_for(fig, names)
