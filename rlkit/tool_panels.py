"""How policies use a tool: rates per call, beside the rates per answer of ``panels``."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rlkit import seeds, stats
from rlkit.panels import Contrast, Entry
from rlkit.stats import Estimate

Floats = NDArray[np.float64]


def failures(entry: Entry) -> Estimate:
    """Share of the tool calls that failed, over all samples and seeds; bootstrap over problems.

    Undefined (NaN) without a call.
    """
    sums = _sums(entry.rows())
    return stats.rate(sums[:, 0], sums[:, 1])


def failure_fall(new: Entry, old: Entry, margin: float, *, name: str = "") -> Contrast:
    """Failure rate of ``old`` minus that of ``new``: larger is better.

    One seed: bootstrap over problems, the same resamples on both sides. Several: the wider of that,
    over all seeds together, and a t interval over seeds; fewer than six allow no verdict.

    Args:
        new, old: entries measured with the tool; ``old`` with one seed, or as many as ``new``.
        margin: the difference too small to matter.
    """
    name = name or f"fall of the failure rate, {new.label} − {old.label}"
    befores = [_sums(_sampled(r.rows)) for r in old.results]
    afters = [_sums(_sampled(r.rows)) for r in new.results]
    if len(befores) not in (1, len(afters)):
        raise ValueError(
            f"{old.label!r} has {len(befores)} seeds and {new.label!r} {len(afters)}: expected as "
            "many, or one"
        )
    befores = befores * (len(afters) // len(befores))
    per_seed = [_rate(b) - _rate(a) for a, b in zip(afters, befores, strict=True)]
    before, after = np.sum(befores, axis=0), np.sum(afters, axis=0)
    weights = stats.resample_weights(len(before))
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = _rates(weights @ before) - _rates(weights @ after)
    estimate = stats.percentile_interval(_rate(before) - _rate(after), draws, len(before))
    if len(per_seed) == 1:
        verdict = seeds.verdict(estimate, margin)
        return Contrast(name, estimate, tuple(per_seed), verdict, "this checkpoint")
    over = seeds.over_seeds(per_seed)
    wider = over if over.high - over.low > estimate.high - estimate.low else estimate
    enough = len(per_seed) >= 6
    verdict = seeds.verdict(wider if enough else np.array(per_seed), margin)
    return Contrast(name, wider, tuple(per_seed), verdict, f"recipe, {len(per_seed)} seeds")


def _sampled(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["decoding"] == "sampled"]


def _sums(rows: pd.DataFrame) -> Floats:
    """Failed calls and calls of each problem [problems, 2], in order of id."""
    if "calls" not in rows:
        raise ValueError("no calls were recorded: measure with mode='run'")
    table = rows.groupby("problem_id", sort=True)[["failed_calls", "calls"]].sum()
    values: Floats = table.to_numpy(dtype=float)
    return values


def _rates(sums: Floats) -> Floats:
    rates: Floats = sums[:, 0] / sums[:, 1]
    return rates


def _rate(sums: Floats) -> float:
    failed, calls = sums.sum(axis=0)
    return float(failed / calls) if calls else float("nan")
