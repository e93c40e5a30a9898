"""Values of the study (arXiv 2503.04548) as tables, and our counterparts of its figures.

Its numbers belong to other models and other problems: a figure shows them beside ours, labelled so,
and only where the study gives them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from rlkit.charts import Summary, baseline_panel
from rlkit.figures import Arms, keyword_curves, training_curves
from rlkit.paths import data_dir
from rlkit.stats import Estimate

COLUMNS = (
    "figure_or_table",
    "model",
    "condition",
    "benchmark",
    "step",
    "metric",
    "value",
    "unit",
    "tag",
    "approx",
    "note",
)


def tables() -> list[str]:
    """Names that :func:`load` knows."""
    return sorted(p.stem for p in (data_dir() / "paper").glob("*.csv"))


def load(name: str) -> pd.DataFrame:
    """A table of data/paper; columns and tags are explained in data/paper/README.md.

    ``approx`` is boolean (read by eye, ±3 %), ``value`` a float, nan where nothing was published.
    ``table1`` holds text and has columns of its own.
    """
    if name not in tables():
        raise ValueError(f"no table {name!r} of the study; there are {', '.join(tables())}")
    frame = pd.read_csv(data_dir() / "paper" / f"{name}.csv", dtype=str, keep_default_na=False)
    if "value" in frame:
        frame["value"] = [float(text) if text else float("nan") for text in frame["value"]]
        frame["approx"] = frame["approx"] == "yes"
    return frame


def value(name: str, **where: str) -> float:
    """The one value of a table whose row matches, for example ``value("table6", condition=...)``.

    Raises ValueError unless exactly one published row matches.
    """
    frame = load(name)
    for column, wanted in where.items():
        frame = frame[frame[column] == wanted]
    if len(frame) != 1 or frame["value"].isna().any():
        raise ValueError(f"{name} has {len(frame)} rows with {where}: expected one with a value")
    return float(frame["value"].iloc[0])


@dataclass(frozen=True)
class Counterpart:
    """Which panels answer a figure of the study, and what it reported, in one line."""

    title: str
    panels: tuple[str, ...]
    reported: str


COUNTERPARTS = {
    "fig1": Counterpart(
        "Training factor: length and accuracy",
        ("length_mean", "eval:pass@1"),
        "Paper Fig. 1, Qwen2.5-7B on AIME24",
    ),
    "fig2": Counterpart(
        "Prompt: accuracy and length",
        ("accuracy", "eval:pass@1", "length_mean"),
        "Paper Fig. 2, Qwen2.5-7B and 1.5B: numbers not published",
    ),
    "fig3": Counterpart(
        "RL from the base model",
        ("accuracy", "eval:pass@1", "length_mean"),
        "Paper Fig. 3, Qwen2.5-32B: training accuracy 58 → 75 %, AIME24 2.1 → 37.1 % (best raw "
        "point), length 500 → 1600 tokens",
    ),
    "fig5": Counterpart(
        "RL after different starts",
        ("accuracy", "length_mean", "completion_ratio"),
        "Paper Fig. 5, Qwen2.5-7B after two kinds of SFT: numbers not published",
    ),
    "fig6": Counterpart(
        "Length rewards",
        ("accuracy", "length_mean", "completion_ratio"),
        "Paper Fig. 6, five length rewards: numbers not published",
    ),
    "fig7": Counterpart(
        "RL from a model that reasons already",
        ("accuracy", "eval:pass@1", "length_mean"),
        "Paper Fig. 7, R1-Distill-Qwen-1.5B: training accuracy 48 → 57 %, mean of 4 benchmarks "
        "41.5 → 48.7 %",
    ),
    "fig9": Counterpart(
        "Entropy coefficient",
        ("entropy", "accuracy", "length_mean"),
        "Paper Fig. 9: coefficients and numbers not published",
    ),
}


def counterpart(
    figure: str,
    arms: Arms,
    *,
    panels: Sequence[str] | None = None,
    x: str = "step",
    smooth: int = 5,
) -> go.Figure:
    """Our runs in the panels of a figure of the study, whose values stand in a note below.

    Args:
        figure: a key of ``COUNTERPARTS``, or ``fig4`` (reflection keywords).
        arms: label to run folders, as for ``figures.training_curves``.
        panels: instead of the figure's own, for runs without evaluations during training.
        x: x axis. smooth: moving average in steps.
    """
    if figure == "fig4":
        return keyword_curves(
            arms,
            window=smooth,
            note="Paper Fig. 4, Qwen2.5-32B on AIME24: about 0.1 at step 0. Another model.",
        )
    if figure not in COUNTERPARTS:
        known = ", ".join(sorted([*COUNTERPARTS, "fig4"]))
        raise ValueError(f"figure={figure!r}: expected one of {known}")
    plan = COUNTERPARTS[figure]
    return training_curves(
        arms,
        panels or plan.panels,
        x=x,
        smooth=smooth,
        title=plan.title,
        note=f"{plan.reported}. Another model.",
    )


def length_ratio(results: Mapping[str, Summary]) -> go.Figure:
    """How many times longer wrong answers are than right ones: ours beside Table 4.

    The interval is the ratio of interval ends (length wrong over right), hence wider than 95 %.
    """
    ours = {}
    for name, summary in results.items():
        right, wrong = summary["length_right"], summary["length_wrong"]
        ours[name] = Estimate(
            wrong.value / right.value, wrong.low / right.high, wrong.high / right.low, right.n
        )
    table = load("table4").pivot(index=["model", "benchmark"], columns="metric", values="value")
    theirs = {
        f"{model.removeprefix('DeepSeek-')}, {benchmark}": row["length_wrong"] / row["length_right"]
        for (model, benchmark), row in table.iterrows()
    }
    return baseline_panel(
        ours,
        highlight=list(ours),
        paper=theirs,
        title="Wrong answers are longer: ours beside Table 4",
        x="mean length of wrong answers / of right answers",
        subtitle="bounds from the 95 % intervals of both lengths",
        fraction=False,
    )
