"""Plain-text tables and the style figure of the notebooks: what a reader checks a claim against.

Text, not HTML: it reads the same on GitHub, in a terminal and in a diff, and a completion that
holds markup stays text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rlkit import config as configuration
from rlkit import metrics, runs, stats
from rlkit.config import RunConfig
from rlkit.corpus import style_of
from rlkit.price import Price
from rlkit.stats import Estimate
from rlkit.theme import LABELS, PALETTE, numbers, styled, tint

if TYPE_CHECKING:
    from rlkit.panels import Contrast, Panel  # imports the trainers, which tables do not need

STYLES = {
    "direct": PALETTE[6],
    "coarse": PALETTE[1],
    "mid": PALETTE[4],
    "fine": PALETTE[0],
    "check": PALETTE[2],
    "padded": PALETTE[3],
    "code": PALETTE[5],
    "other": PALETTE[7],
}
"""Styles of ``corpus.style_of`` and the colour each has in every figure."""


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns; numbers to the right."""
    body = [[str(cell) for cell in row] for row in rows]
    lines = [list(header), *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    right = [bool(body) and all(_is_number(row[i]) for row in body) for i in range(len(header))]
    out = [
        "  ".join(
            cell.rjust(w) if r else cell.ljust(w)
            for cell, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([out[0], "-" * max(map(len, out)), *out[1:]])


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return True


def config_table(*configs: RunConfig) -> str:
    """Parameters of runs side by side; a value that all runs share stands in the first column."""
    values = [configuration.flat(c) for c in configs]
    rows = []
    for key in values[0]:
        column = [str(v[key]) or "-" for v in values]
        if len(set(column)) == 1:
            column[1:] = [""] * (len(column) - 1)
        if key != "name":
            rows.append([key, *column])
    return table(["parameter", *(c.name for c in configs)], rows)


def config_changes(old: RunConfig, new: RunConfig) -> str:
    """One line: the parameters in which ``new`` differs from ``old``."""
    before, after = configuration.flat(old), configuration.flat(new)
    changes = [f"{k} {before[k]} → {after[k]}" for k in after if before[k] != after[k]]
    return f"{new.name}, against {old.name}: {'; '.join(changes[1:]) or 'no change'}"


def panel_table(panel: Panel) -> str:
    """Every entry with accuracy, interval, cost of an answer and completions trained on."""
    mark = {panel.best.label: "best without RL", panel.rl.label: "RL"}
    rows = []
    for e in panel.entries:
        accuracy = e.estimate()
        rows.append(
            [e.label, f"{accuracy:.3f}", f"{e.tokens():.0f}", e.trained_on, mark.get(e.label, "")]
        )
    header = ["policy", "accuracy [95 % interval]", "tokens/answer", "completions used", ""]
    return table(header, rows)


def verdict_table(contrasts: Sequence[Contrast]) -> str:
    """Differences with intervals, what they are about and the verdict that follows."""
    rows = [[c.name, f"{c.difference:+.3f}", c.scope, c.verdict.conclusion] for c in contrasts]
    reasons = [f"{c.name}: {c.verdict}" for c in contrasts]
    head = table(["difference", "value [95 % interval]", "about", "verdict"], rows)
    return "\n".join([head, "", *reasons])


def prediction_table(
    predicted: Mapping[str, tuple[float, float]], measured: Mapping[str, Estimate]
) -> str:
    """Each prediction beside what was measured.

    ``held``: the whole interval lies in the predicted range; ``missed``: none of it does;
    ``unclear``: the interval crosses an end of the range.
    """
    missing = set(predicted) ^ set(measured)
    if missing:
        raise ValueError(f"predictions and measurements do not match: {sorted(missing)}")
    rows = []
    for name, (low, high) in predicted.items():
        e = measured[name]
        if math.isnan(e.value):
            outcome = "undefined"
        elif low <= e.low and e.high <= high:
            outcome = "held"
        elif e.high < low or e.low > high:
            outcome = "missed"
        else:
            outcome = "unclear"
        rows.append([name, f"{low:g} to {high:g}", str(e), outcome])
    return table(["quantity", "predicted", "measured [95 % interval]", "outcome"], rows)


def by_style(rows: pd.DataFrame) -> list[str]:
    """Style of each response: the modes of the Price decomposition."""
    return [style_of(text) for text in rows["text"]]


def style_summary(rows: pd.DataFrame) -> dict[str, dict[str, Estimate]]:
    """Per style: share of the responses, accuracy and mean length, over the rows given.

    Bootstrap over problems. Styles in the order of ``STYLES``, absent ones left out.
    """
    labels = np.array(by_style(rows))
    found = {}
    for style in STYLES:
        inside = labels == style
        if not inside.any():
            continue
        sums = pd.DataFrame(
            {
                "share": inside,
                "accuracy": inside & rows["correct"].to_numpy(bool),
                "length": inside * rows["n_tokens"].to_numpy(float),
                "all": np.ones(len(rows)),
            }
        ).astype(float)
        sums = sums.groupby(rows["problem_id"].to_numpy()).sum()
        found[style] = {
            "share": stats.rate(sums["share"], sums["all"]),
            "accuracy": stats.rate(sums["accuracy"], sums["share"]),
            "length": stats.bootstrap(sums["length"], sums["share"]),
        }
    return found


def style_table(rows: pd.DataFrame) -> str:
    """``style_summary`` as text."""
    lines = [
        [style, f"{s['share']:.3f}", f"{s['accuracy']:.3f}", f"{s['length'].value:.1f}"]
        for style, s in style_summary(rows).items()
    ]
    return table(["style", "share of responses", "accuracy", "tokens"], lines)


def price_table(price: Price) -> str:
    """A Price decomposition by mode, its sums and its check."""
    rows: list[list[Any]] = [
        [
            line.mode,
            f"{line.share_a:.3f} → {line.share_b:.3f}",
            f"{line.mean_a:.3g} → {line.mean_b:.3g}",
            f"{line.between:+.3f}",
            f"{line.within:+.3f}",
        ]
        for line in price.by_mode.itertuples()
    ]
    parts = f"between modes {price.between:+.3f}; within modes {price.within:+.3f}"
    header = ["mode", "share", "mean", "between", "within"]
    return "\n".join([table(header, rows), f"total {price.total:+.3f}: {parts}"])


def between_share(price: Price) -> Estimate:
    """Share of a change that lies between modes; bounds: the part's interval over the point total.

    1 says that only the mix of modes changed. Undefined if the mean did not change.
    """
    total = price.total.value
    if total == 0:
        return stats.undefined("bootstrap over problems")
    low, high = sorted((price.between.low / total, price.between.high / total))
    return Estimate(price.between.value / total, low, high, price.between.n)


def style_stack(
    arms: Mapping[str, Sequence[Path | str]],
    *,
    window: int = 5,
    title: str = "How the policy answers, over training",
) -> go.Figure:
    """Stacked shares of the styles among the rollouts of each step, one panel per arm.

    Args:
        arms: label to run folders; shares are averaged over seeds.
        window: centred moving average in steps.
    """
    fig = make_subplots(rows=1, cols=len(arms), subplot_titles=list(arms), horizontal_spacing=0.08)
    shown: set[str] = set()
    for col, folders in enumerate(arms.values(), start=1):
        shares = [_shares(run) for run in folders]
        steps = shares[0].index
        mean = sum(s.reindex(steps, fill_value=0.0) for s in shares) / len(shares)
        mean = mean.rolling(window, center=True, min_periods=1).mean()
        for style, color in STYLES.items():
            if not mean[style].any():
                continue
            fig.add_trace(
                go.Scatter(
                    x=numbers(steps),
                    y=numbers(mean[style]),
                    name=style,
                    legendgroup=style,
                    showlegend=style not in shown,
                    stackgroup=f"arm{col}",
                    mode="lines",
                    line={"width": 0.6, "color": color},
                    fillcolor=tint(color, 0.75),
                    hovertemplate="%{y:.2f}",
                ),
                row=1,
                col=col,
            )
            shown.add(style)
        fig.update_xaxes(title_text=LABELS["step"], row=1, col=col)
        fig.update_yaxes(range=[0, 1], row=1, col=col)
    fig.update_yaxes(title_text="share of rollouts", col=1)
    fig.update_annotations(font={"size": 14})
    subtitle = f"training rollouts, moving average over {window} steps, mean over seeds"
    styled(fig, title, subtitle, height=430)
    return fig.update_layout(margin={"t": 128})


def _shares(run: Path | str) -> pd.DataFrame:
    rollouts = runs.read_rollouts(run)
    shares = pd.crosstab(rollouts["step"], np.array(by_style(rollouts)), normalize="index")
    return shares.reindex(columns=list(STYLES), fill_value=0.0)


def samples_text(rows: pd.DataFrame, *, per_style: int = 1, seed: int = 0, width: int = 96) -> str:
    """Responses to read: for each style up to ``per_style`` right and as many wrong ones.

    Drawn at random with a fixed seed, so that nobody picks the pretty ones.
    """
    rows = rows.assign(style=by_style(rows))
    blocks = []
    for style in STYLES:
        for right in (True, False):
            found = rows[(rows["style"] == style) & (rows["correct"] == right)]
            for line in found.sample(min(per_style, len(found)), random_state=seed).itertuples():
                question = str(line.problem_id).partition(":")[2]
                head = f"[{style}, {'right' if right else 'wrong'}] {question} = {line.gold}"
                text = "\n".join(
                    f"    {part[:width]}{'…' if len(part) > width else ''}"
                    for part in str(line.text).split("\n")
                )
                blocks.append(f"{head}, {line.n_tokens} tokens, stop: {line.stop}\n{text}")
    return "\n\n".join(blocks)


def keyword_table(results: Mapping[str, metrics.EvalResult]) -> str:
    """Share of responses with a word of each category of the study's Figure 4."""
    names = [*metrics.KEYWORDS, "any"]
    rows = [
        [label, *(f"{result[f'keywords_{name}']:.3f}" for name in names)]
        for label, result in results.items()
    ]
    return table(["policy", *names], rows)
