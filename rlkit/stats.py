"""Estimators and intervals: pure functions over arrays, no files, no models.

An interval over problems says how well a *checkpoint* is known; a claim about a *recipe* needs
training seeds and is the business of :mod:`rlkit.seeds`. Only numpy and the standard library are
used, so every number here can be recomputed by hand.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
RESAMPLES = 2000
EXACT_FLIPS = 16
"""Up to this many non-zero differences the sign-flip test lists all 2^n sign patterns."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: point estimate; nan where it is undefined (for example no wrong answers).
        low, high: ends of the interval, same unit as value.
        n: number of independent units behind the interval (problems or seeds, see ``method``).
        level: nominal coverage.
        method: how the interval was made, for captions and tables.
    """

    value: float
    low: float
    high: float
    n: int
    level: float = 0.95
    method: str = "bootstrap over problems"

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ValueError(f"level={self.level!r}: expected a number in (0, 1), for example 0.95")
        if self.low > self.high:
            raise ValueError(f"low={self.low!r} is above high={self.high!r}")

    def __format__(self, spec: str) -> str:
        """``spec`` formats all three numbers; without one: ``0.512 [0.48, 0.55]``."""
        if math.isnan(self.value):
            return "undefined"
        if spec:
            value, bound = spec, spec
        else:
            value, bound = (".1f", ".1f") if abs(self.value) >= 10 else (".3f", ".2f")
        return f"{self.value:{value}} [{self.low:{bound}}, {self.high:{bound}}]"

    def __str__(self) -> str:
        return format(self, "")


def undefined(method: str, level: float = 0.95) -> Estimate:
    """The estimate of a quantity with no observation behind it."""
    return Estimate(math.nan, math.nan, math.nan, 0, level, method)


# --- estimators per problem -----------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased pass@k of one problem, 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, 2107.03374).

    Args:
        n: samples drawn. c: right samples among them. k: attempts allowed, 1 <= k <= n.

    Evaluated as a product of ratios, so large n neither overflow nor cancel.
    """
    if not 0 <= c <= n:
        raise ValueError(f"c={c!r}: expected 0 <= c <= n={n}")
    if not 1 <= k <= n:
        raise ValueError(
            f"k={k!r}: pass@k needs 1 <= k <= n={n} samples per problem. Draw more samples "
            "or ask for a smaller k."
        )
    if n - c < k:
        return 1.0
    i = np.arange(n - c + 1, n + 1, dtype=np.float64)
    return float(1.0 - np.prod(1.0 - k / i))


def majority_at_k(
    answers: Sequence[Hashable | None], correct: Sequence[bool], k: int | None = None
) -> float:
    """Chance that the majority answer of k samples is right, exact over all k-subsets.

    Args:
        answers: one answer per sample, None if there is none. None never wins a vote.
        correct: whether that answer is right; equal answers must be judged equally.
        k: votes, 1 <= k <= len(answers); default all.

    A tie between m answers gives each 1/m: the expectation of drawing lots, which does not depend
    on the order of the samples. Without any answer the vote is wrong.
    """
    n = len(answers)
    k = n if k is None else k
    if len(correct) != n:
        raise ValueError(f"{len(correct)} judgements for {n} answers")
    if not 1 <= k <= n:
        raise ValueError(f"k={k!r}: maj@k needs 1 <= k <= {n} samples per problem")
    if n > 1000:
        raise ValueError(f"{n} samples per problem: maj@k is exact up to 1000; pass fewer")
    counts: dict[Hashable, int] = {}
    right: dict[Hashable, bool] = {}
    for answer, ok in zip(answers, correct, strict=True):
        if answer is None:
            continue
        counts[answer] = counts.get(answer, 0) + 1
        if right.setdefault(answer, bool(ok)) != bool(ok):
            raise ValueError(f"answer {answer!r} is judged both right and wrong")
    good = tuple(sorted(counts[a] for a in counts if right[a]))
    bad = tuple(sorted(counts[a] for a in counts if not right[a]))
    return _majority(good, bad, n, k)


@lru_cache(maxsize=65536)
def _majority(good: tuple[int, ...], bad: tuple[int, ...], n: int, k: int) -> float:
    """maj@k from the vote counts of right and wrong answers (the rest of n are None)."""
    chance = 0.0
    blank = n - sum(good) - sum(bad)
    for i, votes in enumerate(good):
        others = good[:i] + good[i + 1 :] + bad
        for t in range(1, min(votes, k) + 1):
            # ways[j, m]: subsets of j samples of the others where nobody exceeds t votes and m
            # answers have exactly t, multiplied out answer by answer.
            room = k - t
            ways = np.zeros((room + 1, room // t + 2))
            ways[0, 0] = 1.0
            for other in others:
                new = np.zeros_like(ways)
                for take in range(min(other, t - 1, room) + 1):
                    new[take:] += math.comb(other, take) * ways[: room + 1 - take]
                if other >= t and t <= room:
                    new[t:, 1:] += math.comb(other, t) * ways[: room + 1 - t, :-1]
                ways = new
            fill = np.array([float(math.comb(blank, room - j)) for j in range(room + 1)])
            share = 1.0 / np.arange(1, ways.shape[1] + 1)
            chance += math.comb(votes, t) * float(fill @ ways @ share)
    return chance / math.comb(n, k)


# --- intervals over problems ----------------------------------------------------------------------


def wilson(successes: int, n: int, level: float = 0.95) -> Estimate:
    """Wilson score interval of a proportion; sound at 0 and 1, where a bootstrap has width 0."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes={successes!r}, n={n!r}: expected 0 <= successes <= n, n >= 1")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Estimate(p, low, high, n, level, "Wilson")


@lru_cache(maxsize=4)
def _weights(n: int, resamples: int, seed: int) -> Floats:
    rng = np.random.default_rng([seed, n])
    weights = rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    weights.flags.writeable = False
    return weights


def resample_weights(n: int, *, seed: int = 0, resamples: int = RESAMPLES) -> Floats:
    """How often each of n units is drawn in each bootstrap resample; [resamples, n], seeded.

    The same (n, seed) always gives the same resamples, so quantities of one problem set share them.
    """
    if n < 1:
        raise ValueError("no units to resample: the list is empty")
    return _weights(n, resamples, seed)


def percentile_interval(
    value: float,
    draws: ArrayLike,
    n: int,
    *,
    level: float = 0.95,
    method: str = "bootstrap over problems",
) -> Estimate:
    """Estimate with the percentile interval of bootstrap ``draws``, undefined draws left out."""
    finite = np.asarray(draws, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if math.isnan(value) or not len(finite):
        return undefined(method, level)
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    # A statistic can be biased under resampling; the interval must still hold the point.
    return Estimate(value, min(float(low), value), max(float(high), value), n, level, method)


def bootstrap(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """Mean over problems, or ratio of sums, with a seeded percentile bootstrap over problems.

    Args:
        values: one number per problem, shape [P].
        weights: denominators [P] (for example wrong samples per problem); the estimate is then
            sum(values) / sum(weights). Problems with weight 0 stay in the resampling.
    """
    top = np.asarray(values, dtype=np.float64)
    bottom = np.ones_like(top) if weights is None else np.asarray(weights, dtype=np.float64)
    if top.ndim != 1 or top.shape != bottom.shape:
        raise ValueError(f"values {top.shape} and weights {bottom.shape}: expected two [P] arrays")
    if not len(top):
        raise ValueError("no problems: a bootstrap needs at least one value")
    if bottom.sum() == 0:
        return undefined("bootstrap over problems", level)
    counts = resample_weights(len(top), seed=seed, resamples=resamples)
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = (counts @ top) / (counts @ bottom)
    return percentile_interval(float(top.sum() / bottom.sum()), draws, len(top), level=level)


def rate(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """:func:`bootstrap` for quantities in [0, 1], with an honest interval at the ends.

    If every problem is at 0, or every problem at 1, resampling sees no spread at all; then the
    Wilson interval with one trial per contributing problem is given instead.
    """
    top = np.asarray(values, dtype=np.float64)
    bottom = np.ones_like(top) if weights is None else np.asarray(weights, dtype=np.float64)
    estimate = bootstrap(top, bottom, seed=seed, resamples=resamples, level=level)
    if estimate.value in (0.0, 1.0):
        units = int((bottom > 0).sum())
        return wilson(round(estimate.value) * units, units, level)
    return estimate


# --- two runs on the same problems ----------------------------------------------------------------


@dataclass(frozen=True)
class Paired:
    """Difference b - a on the same units: interval, and the p-value of "no difference"."""

    difference: Estimate
    p: float
    test: Literal["exact sign-flip", "sampled sign-flip"]

    def __str__(self) -> str:
        d = self.difference
        return f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}], p = {self.p:.2g} ({self.test})"


def sign_flip(
    differences: ArrayLike, *, seed: int = 0, flips: int = 10_000
) -> tuple[float, Literal["exact sign-flip", "sampled sign-flip"]]:
    """Two-sided permutation p-value of mean difference 0, by flipping signs of paired differences.

    Exact up to ``EXACT_FLIPS`` non-zero differences, sampled with the +1 correction beyond.
    """
    d = np.asarray(differences, dtype=np.float64)
    d = d[d != 0]
    if not len(d):
        return 1.0, "exact sign-flip"
    observed = abs(d.sum())
    slack = 1e-9 * np.abs(d).sum()  # sums of the same numbers in another order must count as ties
    if len(d) <= EXACT_FLIPS:
        bits = (np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1
        return float(np.mean(np.abs((1 - 2 * bits) @ d) >= observed - slack)), "exact sign-flip"
    rng = np.random.default_rng([seed, len(d)])
    hits = 0
    for start in range(0, flips, 1000):
        signs = 1.0 - 2.0 * rng.integers(0, 2, size=(min(1000, flips - start), len(d)))
        hits += int((np.abs(signs @ d) >= observed - slack).sum())
    return (hits + 1) / (flips + 1), "sampled sign-flip"


def paired(
    a: ArrayLike,
    b: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Paired:
    """Paired comparison over problems: values of run a and run b in the same problem order."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"a {first.shape} and b {second.shape}: expected one value per problem, the same "
            "problems in the same order"
        )
    difference = bootstrap(second - first, seed=seed, resamples=resamples, level=level)
    p, test = sign_flip(second - first, seed=seed)
    return Paired(difference, p, test)
