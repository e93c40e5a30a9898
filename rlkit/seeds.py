"""Claims about a recipe: intervals over training seeds, equivalence tests, what n can detect.

One checkpoint, however well measured, is one draw from a recipe. The functions here take one number
(or one block of samples) per training seed. Larger is better throughout.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from rlkit.stats import RESAMPLES, Estimate, percentile_interval


def t_cdf(t: float, df: int) -> float:
    """Student's t distribution function for integer df (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    theta = math.atan2(t, math.sqrt(df))
    cos2, term, total = math.cos(theta) ** 2, 1.0, 1.0
    if df % 2 == 0:
        for j in range(1, df // 2):
            term *= (2 * j - 1) / (2 * j) * cos2
            total += term
        return 0.5 + 0.5 * math.sin(theta) * total
    if df == 1:
        return 0.5 + theta / math.pi
    for j in range(1, (df - 1) // 2):
        term *= 2 * j / (2 * j + 1) * cos2
        total += term
    return 0.5 + (theta + math.sin(theta) * math.cos(theta) * total) / math.pi


def t_quantile(p: float, df: int) -> float:
    """Inverse of :func:`t_cdf` by bisection; p in (0, 1), df >= 1."""
    if not 0 < p < 1 or df < 1:
        raise ValueError(f"p={p!r}, df={df!r}: expected 0 < p < 1 and df >= 1")
    low, high = -1.0, 1.0
    while t_cdf(low, df) > p:
        low *= 2
    while t_cdf(high, df) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def over_seeds(differences: ArrayLike, *, level: float = 0.95) -> Estimate:
    """Mean of one number per (paired) seed with its t interval; the interval of a recipe claim.

    Pass per-seed differences (same seed, same problems in both arms) for a paired comparison.
    One seed gives an infinite interval, which is the truth.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or not len(d):
        raise ValueError(f"shape {d.shape}: expected one number per seed, at least one")
    n, mean = len(d), float(d.mean())
    method = f"t over {n} seed{'s' if n > 1 else ''}"
    if n == 1:
        return Estimate(mean, -math.inf, math.inf, 1, level, method)
    half = t_quantile(0.5 + level / 2, n - 1) * float(d.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n, level, method)


def hierarchical(
    values: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """Mean with a bootstrap over (base model >) seed > problem > sample.

    Args:
        values: [seeds, problems, samples], the same problems for every seed. For a comparison of
            two arms pass the difference of two such arrays of paired seeds.
        groups: base model of each seed, length [seeds]; then models are resampled first.

    Seeds are drawn first; problems are drawn once per resample and shared by all drawn seeds,
    because every seed saw the same test set (crossed, not nested); samples are drawn within each
    cell. Bootstrapping few seeds is too narrow by about sqrt((S-1)/S): with fewer than about ten,
    quote :func:`over_seeds` beside it.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 3 or not data.size:
        raise ValueError(f"shape {data.shape}: expected [seeds, problems, samples], none empty")
    if groups is not None and len(groups) != len(data):
        raise ValueError(f"{len(groups)} groups for {len(data)} seeds: expected one per seed")
    seeds, problems, samples = data.shape
    labels = list(groups) if groups is not None else [""] * seeds
    names = list(dict.fromkeys(labels))
    members = [[i for i, g in enumerate(labels) if g == name] for name in names]
    rng = np.random.default_rng([seed, *data.shape])
    draws = np.empty(resamples)
    for b in range(resamples):
        drawn = [members[g] for g in rng.integers(len(names), size=len(names))]
        pick = np.concatenate([np.array(m)[rng.integers(len(m), size=len(m))] for m in drawn])
        which = rng.integers(problems, size=problems)
        cells = data[np.ix_(pick, which)]
        inner = rng.integers(samples, size=cells.shape)
        draws[b] = np.take_along_axis(cells, inner, axis=2).mean()
    levels = "seed > problem > sample" if groups is None else "base model > seed > problem > sample"
    method = f"bootstrap over {levels}"
    return percentile_interval(float(data.mean()), draws, seeds, level=level, method=method)


Conclusion = Literal["BETTER", "WORSE", "EQUIVALENT", "INCONCLUSIVE"]


@dataclass(frozen=True)
class Verdict:
    """What a comparison allows one to say, and why."""

    conclusion: Conclusion
    reason: str
    difference: Estimate

    def __str__(self) -> str:
        return f"{self.conclusion}: {self.reason}"


def verdict(difference: Estimate | ArrayLike, margin: float, *, min_seeds: int = 6) -> Verdict:
    """Conclude from a difference (new - old), larger being better.

    Args:
        difference: paired differences, one per seed; or an Estimate, whose own interval then serves
            both questions (with a 95 % one the equivalence test runs at 2.5 %, on the safe side).
        margin: the difference too small to matter, > 0, same unit. State it before the run.
        min_seeds: with fewer seeds the answer is INCONCLUSIVE whatever they show (three seeds
            cannot reach p < .05 in a permutation test). Not applied to an Estimate.

    EQUIVALENT: two one-sided tests at 5 % (TOST), that is the 90 % interval lies inside
    (-margin, margin); it goes first, so a real but negligible difference is called negligible.
    BETTER / WORSE: else, if the 95 % interval excludes 0.
    """
    if not margin > 0:
        raise ValueError(f"margin={margin!r}: expected a number > 0, the difference that matters")
    if isinstance(difference, Estimate):
        wide = narrow = difference
    else:
        wide, narrow = over_seeds(difference), over_seeds(difference, level=0.90)
        if wide.n < min_seeds:
            reason = f"{wide.n} seed(s); a verdict needs at least {min_seeds} (difference {wide})"
            return Verdict("INCONCLUSIVE", reason, wide)
    if math.isnan(wide.value):
        return Verdict("INCONCLUSIVE", "the difference is undefined (nothing observed)", wide)
    if -margin < narrow.low and narrow.high < margin:
        beside = "" if wide.low <= 0 <= wide.high else "; it excludes 0 but is below what matters"
        reason = f"{narrow.level:.0%} interval {narrow} lies within ±{margin:g}{beside}"
        return Verdict("EQUIVALENT", reason, wide)
    if wide.low > 0 or wide.high < 0:
        side: Conclusion = "BETTER" if wide.low > 0 else "WORSE"
        return Verdict(side, f"{wide.level:.0%} interval {wide} excludes 0", wide)
    reason = f"{wide.level:.0%} interval {wide} holds 0 and reaches beyond ±{margin:g}"
    return Verdict("INCONCLUSIVE", reason, wide)


def _power(effect: float, scale: float, df: int, alpha: float) -> float:
    """Power of a two-sided t test at ``effect`` standard deviations; scale = effect's t per SD."""
    cut = t_quantile(1 - alpha / 2, df)
    delta = effect * scale
    # A non-central t is (Z + delta) / S with S = sqrt(chi2_df / df): integrate over S.
    s = np.linspace(1e-6, 1 + 12 / math.sqrt(2 * df) + 2, 4001)
    log_density = (
        math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)
        + (df - 1) * np.log(s) - df * s * s / 2
    )  # fmt: skip
    normal = np.vectorize(NormalDist().cdf)
    reject = normal(delta - cut * s) + normal(-delta - cut * s)
    return float(np.trapezoid(np.exp(log_density) * reject, s))


def detectable_effect(
    n: int, sd: float = 1.0, *, paired: bool = False, power: float = 0.8, alpha: float = 0.05
) -> float:
    """Smallest true difference found with chance ``power`` by a two-sided t test, in units of sd.

    Args:
        n: seeds per arm, >= 2. sd: standard deviation over seeds of one arm, or of the paired
            differences if ``paired``.
    """
    if n < 2 or not 0 < power < 1:
        raise ValueError(f"n={n!r}, power={power!r}: expected n >= 2 seeds and power in (0, 1)")
    df, scale = (n - 1, math.sqrt(n)) if paired else (2 * n - 2, math.sqrt(n / 2))
    low, high = 0.0, 1.0
    while _power(high, scale, df, alpha) < power:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _power(middle, scale, df, alpha) < power else (low, middle)
    return high * sd
