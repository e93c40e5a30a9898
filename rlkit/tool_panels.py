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

    As ``call_failures`` of an evaluation: responses that ``infra`` ended are left out. Undefined
    (NaN) without a call.
    """
    sums = _sums(entry.rows()).to_numpy()
    return stats.rate(sums[:, 0], sums[:, 1])


def failure_fall(new: Entry, old: Entry, margin: float, *, name: str = "") -> Contrast:
    """Failure rate of ``old`` minus that of ``new``: larger is better.

    One seed: bootstrap over problems, the same resamples on both sides. Several: their mean, with
    the wider of that bootstrap and a t interval over seeds; fewer than six allow no verdict. A seed
    without a call has no failure rate: the difference is then undefined. Where resampling shows no
    spread (no call fails on either side), Wilson's bound with one trial per problem.

    Args:
        new, old: entries measured with the tool on the same problems; ``old`` with one seed, or as
            many as ``new``.
        margin: the difference too small to matter.
    """
    name = name or f"fall of the failure rate, {new.label} − {old.label}"
    tables = [[_sums(_sampled(r.rows)) for r in e.results] for e in (old, new)]
    ids = tables[0][0].index
    if different := [t for each in tables for t in each if not t.index.equals(ids)]:
        raise ValueError(
            f"{new.label!r} and {old.label!r} were measured on different problems "
            f"({len(ids)} and {len(different[0])}); a paired difference needs the same ones"
        )
    befores, afters = [[t.to_numpy() for t in each] for each in tables]
    if len(befores) not in (1, len(afters)):
        raise ValueError(
            f"{old.label!r} has {len(befores)} seeds and {new.label!r} {len(afters)}: expected as "
            "many, or one"
        )
    befores = befores * (len(afters) // len(befores))
    pairs = list(zip(befores, afters, strict=True))
    per_seed = [_rate(before) - _rate(after) for before, after in pairs]
    weights = stats.resample_weights(len(ids))
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = [_rates(weights @ before) - _rates(weights @ after) for before, after in pairs]
    value = float(np.mean(per_seed))
    estimate = stats.percentile_interval(value, np.mean(draws, axis=0), len(ids))
    if estimate.high - estimate.low < 1e-12:
        called = min(int((sums[:, 1] > 0).sum()) for pair in pairs for sums in pair)
        bound = stats.wilson(0, called).high
        low, high = max(-1.0, value - bound), min(1.0, value + bound)
        estimate = Estimate(value, low, high, len(ids), method="Wilson, no spread")
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


def _sums(rows: pd.DataFrame) -> pd.DataFrame:
    """Failed calls and calls of each problem [problems, 2], in order of id."""
    if "calls" not in rows:
        raise ValueError("no calls were recorded: measure with mode='run'")
    # Counted as 0, not dropped: a problem whose responses all failed in the machinery stays one.
    counts = rows[["failed_calls", "calls"]].where(rows["stop"] != "infra", 0).astype(float)
    return counts.groupby(rows["problem_id"], sort=True).sum()


def _rates(sums: Floats) -> Floats:
    rates: Floats = sums[:, 0] / sums[:, 1]
    return rates


def _rate(sums: Floats) -> float:
    failed, calls = sums.sum(axis=0)
    return float(failed / calls) if calls else float("nan")
