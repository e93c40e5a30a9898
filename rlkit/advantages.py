"""Advantage estimators: pure functions from rewards [P, G] to advantages [P, G].

P prompts, G completions each. NaN marks a completion without a reward (the machinery failed, or no
reward function applied): it leaves every mean and standard deviation and its advantage is 0. A
group whose rewards differ by less than ``SPREAD`` carries no signal; its advantages are exactly 0,
not rounding noise blown up by a small standard deviation. All in float64, Bessel-corrected.

Sources: GRPO (2402.03300), Dr. GRPO (2503.20783), group mean with batch deviation (2508.08221),
RLOO (2402.14740), REINFORCE++ with group baseline (2501.03262).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

SPREAD = 1e-6
"""Rewards closer than this are equal."""
EPSILON = 1e-6
"""Added to a standard deviation before dividing, as in the study's code."""


def compute(rewards: npt.ArrayLike, method: str) -> Floats:
    """Advantages [P, G] of rewards [P, G]; every NaN becomes 0.

    Args:
        rewards: one row per prompt; NaN for a completion without a reward.
        method: a key of ``METHODS``.

    Raises:
        ValueError: unknown method, or rewards that are not a matrix.
    """
    if method not in METHODS:
        raise ValueError(f"advantage={method!r}: expected one of {sorted(METHODS)}")
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"rewards have shape {values.shape}: expected [prompts, completions]")
    with warnings.catch_warnings():  # numpy warns about groups without any reward; they become 0
        warnings.simplefilter("ignore", RuntimeWarning)
        result = METHODS[method](values)
    return np.where(np.isfinite(result) & ~flat_groups(values)[:, None], result, 0.0)


def flat_groups(rewards: Floats) -> npt.NDArray[np.bool_]:
    """[P] True where all rewards of the group are equal (or at most one exists)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        spread = np.nanmax(rewards, axis=1) - np.nanmin(rewards, axis=1)
    return ~(spread >= SPREAD)  # NaN (no reward at all) counts as flat


def _centred(rewards: Floats) -> Floats:
    return rewards - np.nanmean(rewards, axis=1, keepdims=True)


def _group_std(rewards: Floats) -> Floats:
    return _centred(rewards) / (np.nanstd(rewards, axis=1, ddof=1, keepdims=True) + EPSILON)


def _batch_std(rewards: Floats) -> Floats:
    return _centred(rewards) / (np.nanstd(rewards, ddof=1) + EPSILON)


def _rloo(rewards: Floats) -> Floats:
    # r_i - mean of the others = (r_i - mean) * n / (n - 1)
    count = np.sum(~np.isnan(rewards), axis=1, keepdims=True)
    return _centred(rewards) * (count / (count - 1.0))


def _reinforce_pp(rewards: Floats) -> Floats:
    centred = _centred(rewards)
    return (centred - np.nanmean(centred)) / (np.nanstd(centred, ddof=1) + EPSILON)


METHODS: dict[str, Callable[[Floats], Floats]] = {
    "group_std": _group_std,
    "group_mean": _centred,
    "batch_std": _batch_std,
    "rloo": _rloo,
    "reinforce_pp": _reinforce_pp,
}
"""Method name (``TrainConfig.advantage``) to estimator."""
