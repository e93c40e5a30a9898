"""Price decomposition: is a change of the mean a change of *modes* or a change *within* them?

Let p_m be the share of mode m (direct answer, reasoning, ...) and y_m the mean of a quantity within
it. From set A to set B, with the averaged (symmetric) weights of the Price equation,

    mean_B - mean_A  =  sum_m (p'_m - p_m) (y_m + y'_m) / 2      between: modes are selected
                      + sum_m (p_m + p'_m) / 2 (y'_m - y_m)      within: a mode itself changes

is an exact identity, and swapping A and B only flips the signs. A mode that occurs in one set only
has no mean in the other; the mean it has is used for both, so its appearance counts as between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rlkit.completion import split_reasoning
from rlkit.stats import RESAMPLES, Estimate, percentile_interval, resample_weights

Floats = NDArray[np.float64]
Labels = Callable[[pd.DataFrame], Sequence[str]]


def by_reasoning(rows: pd.DataFrame) -> list[str]:
    """The label ``reasoning`` for responses with non-empty reasoning, else ``direct``.

    Reads a boolean column ``reasoning`` where there is one (evaluations), else the column ``text``.
    """
    if "reasoning" in rows and rows["reasoning"].dtype == bool:
        flags = list(rows["reasoning"])
    else:
        flags = [bool(split_reasoning(text)[0]) for text in rows["text"]]
    return ["reasoning" if flag else "direct" for flag in flags]


@dataclass(frozen=True)
class Price:
    """Change of a mean from set A to set B, in the unit of the quantity.

    ``by_mode``: one row per mode: mode, share_a, share_b, mean_a, mean_b (nan if absent), between
    (centred at the mean of both sets, which leaves the sum as it is) and within.
    """

    total: Estimate
    between: Estimate
    within: Estimate
    by_mode: pd.DataFrame

    def __str__(self) -> str:
        return f"total {self.total} = between modes {self.between} + within modes {self.within}"


@dataclass(frozen=True)
class _Cells:
    """Samples and their sums per (problem, mode): both [P, M]."""

    problems: list[str]
    counts: Floats
    sums: Floats


def _cells(rows: pd.DataFrame, value: str, labels: Sequence[str], modes: list[str]) -> _Cells:
    key = [rows["problem_id"].astype(str).to_numpy(), np.asarray(labels, dtype=object)]
    grouped = rows[value].astype(float).groupby(key)
    counts = grouped.size().unstack(fill_value=0).reindex(columns=modes, fill_value=0).sort_index()
    sums = grouped.sum().unstack(fill_value=0).reindex(columns=modes, fill_value=0).sort_index()
    return _Cells(list(counts.index), counts.to_numpy(float), sums.to_numpy(float))


def _means(counts: Floats, sums: Floats) -> tuple[Floats, Floats]:
    """Shares and means per mode, [..., M]; a mean without samples is nan."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts / counts.sum(axis=-1, keepdims=True), sums / counts


def _parts(p: Floats, y: Floats, p2: Floats, y2: Floats) -> tuple[Floats, Floats]:
    """Between and within part of each mode, [..., M]."""
    before = np.where(np.isnan(y), np.nan_to_num(y2), y)
    after = np.where(np.isnan(y2), np.nan_to_num(y), y2)
    middle = np.sum((p * before + p2 * after) / 2, axis=-1, keepdims=True)
    # sum_m (p' - p) = 0, so subtracting `middle` moves mass between rows but not the sum: a mode
    # that grows counts as a gain only if it is above the average.
    between = (p2 - p) * ((before + after) / 2 - middle)
    return between, (p + p2) / 2 * (after - before)


def decompose(
    a: pd.DataFrame,
    b: pd.DataFrame,
    value: str = "n_tokens",
    *,
    labels: Labels = by_reasoning,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Price:
    """Decompose the change of the mean of column ``value`` from rows ``a`` to rows ``b``.

    Args:
        a, b: sample rows (evaluation or rollouts) with ``problem_id`` and ``value``.
        value: ``n_tokens`` for length, ``correct`` for accuracy, any numeric or boolean column.
        labels: mode of each row; default direct against reasoning.

    Means are over samples. Intervals: bootstrap over problems, the same resample on both sides if
    both hold the same problems (an evaluation before and after), else independent ones (rollouts of
    different steps). Raises ValueError for an empty side or a missing column.
    """
    for name, rows in (("a", a), ("b", b)):
        if not len(rows):
            raise ValueError(f"set {name} has no rows: nothing to decompose")
        missing = {"problem_id", value} - set(rows.columns)
        if missing:
            raise ValueError(f"set {name} lacks the column(s) {sorted(missing)}")
    label_a, label_b = list(labels(a)), list(labels(b))
    modes = sorted(set(label_a) | set(label_b))
    first, second = _cells(a, value, label_a, modes), _cells(b, value, label_b, modes)
    p, y = _means(first.counts.sum(axis=0), first.sums.sum(axis=0))
    p2, y2 = _means(second.counts.sum(axis=0), second.sums.sum(axis=0))
    between, within = _parts(p, y, p2, y2)

    same = first.problems == second.problems
    w = resample_weights(len(first.problems), seed=seed, resamples=resamples)
    w2 = w if same else resample_weights(len(second.problems), seed=seed + 1, resamples=resamples)
    draws = _parts(
        *_means(w @ first.counts, w @ first.sums), *_means(w2 @ second.counts, w2 @ second.sums)
    )
    drawn_between, drawn_within = draws[0].sum(axis=-1), draws[1].sum(axis=-1)
    n = min(len(first.problems), len(second.problems))
    method = f"bootstrap over problems ({'paired' if same else 'independent'})"

    def estimate(point: float, drawn: Floats) -> Estimate:
        return percentile_interval(point, drawn, n, level=level, method=method)

    return Price(
        total=estimate(
            float(b[value].astype(float).mean() - a[value].astype(float).mean()),
            drawn_between + drawn_within,
        ),
        between=estimate(float(between.sum()), drawn_between),
        within=estimate(float(within.sum()), drawn_within),
        by_mode=pd.DataFrame(
            {
                "mode": modes,
                "share_a": p,
                "share_b": p2,
                "mean_a": y,
                "mean_b": y2,
                "between": between,
                "within": within,
            }
        ),
    )


def series(
    rollouts: pd.DataFrame,
    value: str = "n_tokens",
    *,
    window: int = 5,
    labels: Labels = by_reasoning,
    seed: int = 0,
    resamples: int = 500,
) -> pd.DataFrame:
    """Decomposition over training, each window of steps against the first window.

    Args:
        rollouts: rollout rows with ``step``, ``problem_id`` and ``value`` (runs.read_rollouts).
        window: steps per bin, >= 1. Every step draws new problems, so single steps are noisy.

    Returns one row per bin: step (mean step of the bin), mean, total, between, within, each of the
    last three with ``_low`` and ``_high``. In each row total = between + within. A last bin of less
    than half the window joins the one before.
    """
    if window < 1:
        raise ValueError(f"window={window!r}: expected an integer >= 1 (steps per bin)")
    if not len(rollouts):
        raise ValueError("no rollouts: nothing to decompose")
    steps = np.sort(rollouts["step"].unique())
    bins = np.arange(len(steps)) // window
    if len(steps) > window and (bins == bins[-1]).sum() * 2 < window:
        bins[bins == bins[-1]] -= 1
    rollouts = rollouts.assign(_mode=list(labels(rollouts)))
    where = rollouts["step"].map(dict(zip(steps, bins, strict=True)))
    start = rollouts[where == 0]

    def known(rows: pd.DataFrame) -> list[str]:
        return list(rows["_mode"])

    out = []
    for i in range(int(bins[-1]) + 1):
        rows = rollouts[where == i]
        price = decompose(start, rows, value, labels=known, seed=seed, resamples=resamples)
        record = {
            "step": float(steps[bins == i].mean()),
            "mean": float(rows[value].astype(float).mean()),
        }
        for name in ("total", "between", "within"):
            part: Estimate = getattr(price, name)
            record |= {name: part.value, f"{name}_low": part.low, f"{name}_high": part.high}
        out.append(record)
    return pd.DataFrame(out)
