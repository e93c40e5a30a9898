"""What the gradient of a run saw: how much, whether it followed correctness, and length.

Pure functions over the rows of ``signals.by_row`` and ``signals.within_group_sums``.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from rlkit import signals
from rlkit.findings import Finding, Steps, first_and_last
from rlkit.stats import Estimate, percentile_interval, rate, resample_weights, undefined

AGREEMENT = 0.3
"""Correlation of reward and correctness within groups that a sound reward exceeds."""
MIN_GROUPS = 20
"""Groups with rewards that differ below which no correlation is reported."""
TRAINED = 0.1
"""Share of completions trained on below which it is a finding."""
_RESAMPLES = 500


def agreement(sums: pd.DataFrame) -> Estimate:
    """``signals.agreement`` with a bootstrap over groups; n: groups with rewards that differ.

    Undefined below ``MIN_GROUPS`` of them.
    """
    method = "bootstrap over groups"
    varied = int((sums["rr"] > 0).sum())
    value = signals.agreement(sums)
    if varied < MIN_GROUPS or math.isnan(value):
        return undefined(method)
    weights = resample_weights(len(sums), resamples=_RESAMPLES)
    rr, cc, rc = (weights @ sums[name].to_numpy(float) for name in ("rr", "cc", "rc"))
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = np.where(cc > 0, np.clip(rc / np.sqrt(rr * cc), -1, 1), 0.0)
    return percentile_interval(value, draws, varied, method=method)


def relation(sums: pd.DataFrame, steps: Steps) -> list[Finding]:
    """Whether the reward pays correctness at all, over the whole run and in its last steps.

    The last steps decide only where enough groups have rewards that differ: a solved task has none.
    """
    ends = sums["step"].isin(first_and_last(steps)[1])
    found = {"the whole run": agreement(sums), "the last steps": agreement(sums[ends])}
    counts = (int((sums["rr"] > 0).sum()), int((sums["rr"][ends] > 0).sum()))
    text = "correlation of reward and correctness within groups: " + ", ".join(
        f"{name} {e} from {n} groups"
        if e.n
        else f"{name} not reported, {n} groups with rewards that differ (needs {MIN_GROUPS})"
        for (name, e), n in zip(found.items(), counts, strict=True)
    )
    if min((e.high for e in found.values() if e.n), default=1.0) < AGREEMENT:
        why = f"reward unrelated to correctness (a sound one exceeds {AGREEMENT:g}); {text}"
        return [Finding("unrelated", why, int(steps[-1]))]
    return [Finding("agreement", text, int(steps[-1]), counts=False)]


def trained_share(rows: pd.DataFrame, steps: Steps) -> list[Finding]:
    """The share of completions that the gradient saw (columns ``used`` and ``kept``)."""
    share = rate(rows.groupby(["step", "group"])["trained"].mean().to_numpy(float))
    if share.value == 1:
        return []
    text = f"trained on {share} of completions; the others were dropped"
    return [Finding("trained_share", text, int(steps[-1]), counts=share.high < TRAINED)]


def length_slope(rows: pd.DataFrame) -> Estimate:
    """Correlation of advantage and length over the rows trained on; bootstrap over groups.

    n: groups. Undefined below ``MIN_GROUPS``, and where either does not vary.
    """
    method = "bootstrap over groups"
    if "advantage" not in rows or "n_tokens" not in rows:
        return undefined(method)
    seen = rows[rows["trained"]]
    a, n = (
        pd.to_numeric(seen[c], errors="coerce").astype(float) for c in ("advantage", "n_tokens")
    )
    values = pd.DataFrame({"one": 1.0, "a": a, "l": n, "aa": a * a, "ll": n * n, "al": a * n})
    sums = values.dropna().groupby([seen["step"], seen["group"]]).sum().to_numpy(float)
    if len(sums) < MIN_GROUPS:
        return undefined(method)

    def correlation(s: np.ndarray) -> np.ndarray:
        one, a, n, aa, nn, an = s.T
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = (aa - a * a / one) * (nn - n * n / one)
            return np.where(spread > signals.TINY, (an - a * n / one) / np.sqrt(spread), np.nan)

    draws = correlation(resample_weights(len(sums), resamples=_RESAMPLES) @ sums)
    value = float(correlation(sums.sum(axis=0)[None])[0])
    return percentile_interval(value, draws, len(sums), method=method)


def length_pull(rows: pd.DataFrame, steps: Steps) -> list[Finding]:
    """Whether the gradient raises longer or shorter responses, at first and at last."""
    first, last = (rows[rows["step"].isin(part)] for part in first_and_last(steps))
    whole = length_slope(rows)
    if math.isnan(whole.value):
        return []
    what = "no length is preferred"
    if whole.low > 0 or whole.high < 0:
        what = f"{'longer' if whole.low > 0 else 'shorter'} responses are raised"
    text = (
        f"{what}: correlation of advantage and length over the {whole.n} groups trained on "
        f"{whole:+.3f}; first steps {length_slope(first):+.3f}, last {length_slope(last):+.3f}"
    )
    return [Finding("length_pull", text, int(steps[-1]), counts=False)]
