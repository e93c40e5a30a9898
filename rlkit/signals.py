r"""What the rollouts of a run show, step by step: pure functions over rollout and metric rows.

``truth`` is always ``correct``: answer equal to the gold answer, end reached. ``reward`` is the
total that was trained on. Rows whose machinery failed (``stop == "infra"``) say nothing about the
policy and are left out everywhere; rows without a finite reward count for truth only.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rlkit.completion import Completion
from rlkit.formats import FormatName, well_formed

Floats = NDArray[np.float64]

REFERENCE = 5
"""First steps of a run that gains and the usual pay of wrong answers are measured in."""
NGRAM = 4
NEEDED = ("step", "group", "text", "correct", "stop", "reward")
TINY = 1e-9

_WORDS = re.compile(r"\w+|[^\w\s]")
_PART = "reward_"


def prepare(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that count, with ``trained`` (whether the gradient saw the row's group).

    Raises:
        ValueError: a needed column is missing.
    """
    if rows.empty:
        return pd.DataFrame({name: pd.Series(dtype=float) for name in (*NEEDED, "trained")})
    missing = sorted(set(NEEDED) - set(rows.columns))
    if missing:
        raise ValueError(f"the rollouts lack {missing}; they have {sorted(rows.columns)}")
    rows = rows[rows["stop"] != "infra"]
    trained = np.ones(len(rows), dtype=bool)
    for name in ("used", "kept"):  # a part written before the column existed leaves gaps
        if name in rows:
            trained &= rows[name].astype("boolean").fillna(True).to_numpy(bool)
    rows = rows.assign(
        trained=trained,
        correct=rows["correct"].astype(bool),
        reward=_finite(rows["reward"]),
        text=rows["text"].fillna("").astype(str),
    )
    order = [name for name in ("step", "group", "sample") if name in rows]
    return rows.sort_values(order, kind="stable").reset_index(drop=True)


def _finite(values: pd.Series) -> Floats:
    numbers = pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    return np.where(np.isfinite(numbers), numbers, np.nan)


# --- pay ------------------------------------------------------------------------------------------


def unearned(rows: pd.DataFrame) -> Floats:
    """Unearned reward of each row of ``prepare``; nan without a reward, 0 for right answers.

    For a wrong answer: its reward less the usual pay of wrong answers, their mean reward in the
    first ``REFERENCE`` steps. Without a wrong answer there, the lowest reward of those steps.
    """
    reward, right = rows["reward"].to_numpy(float), rows["correct"].to_numpy(bool)
    known = np.isfinite(reward)
    if not known.any():
        return np.full(len(rows), np.nan)
    step = rows["step"].to_numpy()
    early = known & np.isin(step, np.unique(step[known])[:REFERENCE])
    wrong = early & ~right
    usual = reward[wrong].mean() if wrong.any() else reward[early].min()
    return np.where(known, np.where(right, 0.0, reward - usual), np.nan)


def paid(rows: pd.DataFrame) -> NDArray[np.bool_]:
    """Whether each row got more than half way from the lowest to the highest reward of the run.

    If all rewards are equal: whether they are above 0. Rows without a reward are not paid.
    """
    reward = rows["reward"].to_numpy(float)
    known = reward[np.isfinite(reward)]
    if not len(known):
        return np.zeros(len(rows), dtype=bool)
    low, high = float(known.min()), float(known.max())
    above: NDArray[np.bool_] = reward > ((low + high) / 2 if high > low else 0.0)
    return above


def reinforced(rows: pd.DataFrame) -> NDArray[np.bool_]:
    """Whether the gradient raises the row: trained on, and paid above the mean of its group."""
    mean = rows.groupby(["step", "group"])["reward"].transform("mean")
    above = (rows["reward"] - mean > TINY).to_numpy(bool)
    return above & rows["trained"].to_numpy(bool)


def pay_scale(rows: pd.DataFrame) -> float:
    """What unearned pay is compared with, from the first ``REFERENCE`` steps alone.

    The gap between the mean pay of right and of wrong answers, but at least the standard deviation
    of the rewards, since a reward that ignores correctness has no gap. Without right or without
    wrong answers: the range of the rewards. 0 if all rewards there are equal.
    """
    reward, right = rows["reward"].to_numpy(float), rows["correct"].to_numpy(bool)
    known = np.isfinite(reward)
    step = rows["step"].to_numpy()
    early = known & np.isin(step, np.unique(step[known])[:REFERENCE])
    if not early.any():
        return 0.0
    if not (early & right).any() or not (early & ~right).any():
        return float(np.ptp(reward[early]))
    gap = reward[early & right].mean() - reward[early & ~right].mean()
    return float(max(gap, reward[early].std()))


def obeys(rows: pd.DataFrame, format: FormatName) -> NDArray[np.bool_]:
    """Whether each completion follows the format rule."""
    keys = list(zip(rows["text"], rows["stop"], strict=True))
    rule = {
        key: well_formed(Completion.from_text(key[0], stop=key[1]), format) for key in set(keys)
    }
    return np.array([rule[key] for key in keys], dtype=bool)


def format_only(rows: pd.DataFrame, good: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Wrong, well formed (``good``), and paid above a wrong, ill-formed answer of the group."""
    wrong = ~rows["correct"].to_numpy(bool)
    low = rows["reward"].where(wrong & ~good)
    lowest = low.groupby([rows["step"], rows["group"]]).transform("min")
    above: NDArray[np.bool_] = (rows["reward"] - lowest > TINY).to_numpy(bool)
    return wrong & good & above


def group_means(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per group, over its rows with a reward.

    Columns step, n and wrong (rows), and per row reward, unearned and truth.
    """
    right = rows["correct"].astype(float)
    known = rows.assign(unearned=unearned(rows), truth=right, wrong=1 - right, n=1)
    known = known[np.isfinite(known["reward"].to_numpy(float))]
    groups = known.groupby(["step", "group"])
    means = groups[["reward", "unearned", "truth"]].mean()
    return groups[["n", "wrong"]].sum().join(means).reset_index().drop(columns="group")


def within_group_sums(rows: pd.DataFrame) -> pd.DataFrame:
    """What each group trained on teaches: sums of products about the group's mean, a row per group.

    Columns step, rr (reward), cc (correct), rc, and ``r_<part>``: reward times each part of it,
    the part weighted by its share in the total (see :func:`part_weights`).

    Where advantages were logged they take the place of the reward in the first factor, since the
    gradient sees them: group-standardised ones weigh a group of small spread as much as one of
    large spread. ``cc`` is then weighted by the slope of advantage on reward in the group, so that
    a reward that is correctness still has an agreement of 1.
    """
    known = rows[rows["trained"] & np.isfinite(rows["reward"].to_numpy(float))]
    keys = [known["step"], known["group"]]
    weights = part_weights(known)
    columns: dict[str, Any] = {
        "r": known["reward"].astype(float), "c": known["correct"].astype(float),
    }  # fmt: skip
    columns |= {f"p_{k}": w * known[_PART + k].astype(float).fillna(0) for k, w in weights.items()}
    values = pd.DataFrame(columns, index=known.index)
    centred = values - values.groupby(keys).transform("mean")
    centred = centred.where(centred.abs() > TINY, 0.0)  # equal rewards have no variance
    seen, slope = centred["r"], pd.Series(1.0, index=known.index)
    if "advantage" in known:
        logged = pd.Series(np.nan_to_num(_finite(known["advantage"])), index=known.index)
        if (logged.abs() > TINY).any():
            own = (centred["r"] ** 2).groupby(keys).transform("sum")
            slope = (logged * centred["r"]).groupby(keys).transform("sum") / own.where(own > 0)
            seen, slope = logged, slope.fillna(0.0).clip(lower=0.0)
    products = {"rr": seen * centred["r"], "cc": slope * centred["c"] ** 2}
    products |= {"rc": seen * centred["c"]}
    products |= {f"r_{k}": seen * centred[f"p_{k}"] for k in weights}
    sums = pd.DataFrame(products, index=known.index).groupby(keys).sum()
    return sums.reset_index().drop(columns="group")


def part_weights(rows: pd.DataFrame) -> dict[str, float]:
    """Weight of each reward part in the total, by least squares over all rows.

    The folder holds unweighted parts and the total, not the weights. The total is their weighted
    sum, so least squares gives the weights back exactly; of parts that are multiples of each other
    only the sum is known, and it is split evenly (the smallest weights that fit).
    """
    names = [str(c).removeprefix(_PART) for c in rows.columns if str(c).startswith(_PART)]
    if not names or rows.empty:
        return {}
    parts = np.nan_to_num(rows[[_PART + n for n in names]].to_numpy(float))
    found = np.linalg.lstsq(parts, rows["reward"].to_numpy(float), rcond=None)[0]
    return dict(zip(names, found.tolist(), strict=True))


def agreement(sums: pd.DataFrame) -> float:
    """Correlation of reward and correctness within groups, pooled over the groups of ``sums``.

    0 if rewards vary and correctness does not; nan if no group has rewards that differ.
    """
    rr, cc, rc = (float(sums[name].sum()) for name in ("rr", "cc", "rc"))
    if rr <= 0:
        return float("nan")
    return float(np.clip(rc / np.sqrt(rr * cc), -1, 1)) if cc > 0 else 0.0


# --- texts ----------------------------------------------------------------------------------------


def repetition(text: str) -> float:
    """Share of the text's runs of four words or signs that occurred in it before; 0 for short."""
    words = _WORDS.findall(text)
    runs = list(zip(*(words[i:] for i in range(NGRAM)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def compression(texts: Iterable[str]) -> float:
    """Compressed over raw bytes of the texts together; low if they repeat themselves, each other.

    It falls a little with the amount of text, so compare steps of one run. nan without text.
    """
    raw = "\n".join(texts).encode("utf-8", errors="replace")
    return len(zlib.compress(raw)) / len(raw) if raw else float("nan")


# --- all of it, per row ---------------------------------------------------------------------------


def by_row(rows: pd.DataFrame, format: FormatName) -> pd.DataFrame:
    """The rows of ``prepare`` with the measures of each row beside them."""
    wrong, pay = ~rows["correct"].to_numpy(bool), paid(rows)
    good = obeys(rows, format)
    repeated = {text: repetition(text) for text in set(rows["text"])}
    return rows.assign(
        unearned=unearned(rows),
        ended=rows["stop"] == "eos",
        repetition=[repeated[text] for text in rows["text"]],
        well=good,
        format_only=format_only(rows, good),
        paid_wrong=wrong & pay,
        unpaid_right=~wrong & ~pay & np.isfinite(rows["reward"].to_numpy(float)),
        reinforced_wrong=wrong & reinforced(rows),
    )
