from __future__ import annotations

import math

import numpy as np
import pytest

from rlkit import seeds
from rlkit.stats import Estimate


@pytest.mark.parametrize(
    ("p", "df", "expected"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 5, 2.57058), (0.975, 9, 2.26216),
     (0.95, 5, 2.01505), (0.975, 30, 2.04227), (0.025, 9, -2.26216), (0.5, 4, 0.0)],
)  # fmt: skip
def test_t_quantile_against_tables(p: float, df: int, expected: float) -> None:
    assert seeds.t_quantile(p, df) == pytest.approx(expected, abs=1e-5)


def test_over_seeds() -> None:
    e = seeds.over_seeds([1.0, 2.0, 3.0])
    assert e.value == 2.0
    assert e.high - e.value == pytest.approx(4.30265 / math.sqrt(3), abs=1e-5)
    assert e.n == 3
    one = seeds.over_seeds([0.3])
    assert (one.low, one.high) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="one number per seed"):
        seeds.over_seeds([])


def test_hierarchical_shares_problems_over_seeds() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.random(50)
    same = np.repeat(np.repeat(difficulty[None, :, None], 8, axis=0), 4, axis=2)
    e = seeds.hierarchical(same)
    # All seeds and samples agree, so only problems matter: the width of a plain bootstrap of 50,
    # not of 8 * 50 independent ones.
    half = 1.96 * difficulty.std() / math.sqrt(50)
    assert e.high - e.low == pytest.approx(2 * half, rel=0.1)
    assert e.value == pytest.approx(difficulty.mean())
    assert e == seeds.hierarchical(same)


def test_hierarchical_sees_seeds_and_groups() -> None:
    effect = np.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    values = np.broadcast_to(effect[:, None, None], (6, 40, 2))
    by_seed = seeds.hierarchical(values)
    by_model = seeds.hierarchical(values, groups=["a"] * 3 + ["b"] * 3)
    assert 0.0 < by_seed.low < 0.5 < by_seed.high < 1.0
    assert (by_model.low, by_model.high) == (0.0, 1.0)  # two models are two units, not six
    assert by_model.method == "bootstrap over base model > seed > problem > sample"
    with pytest.raises(ValueError, match="one per seed"):
        seeds.hierarchical(values, groups=["a"])
    with pytest.raises(ValueError, match="expected"):
        seeds.hierarchical(np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.10, 0.12, 0.11, 0.13, 0.12, 0.10], "BETTER"),
        ([-0.10, -0.12, -0.11, -0.13, -0.12, -0.10], "WORSE"),
        ([0.001, -0.002, 0.001, 0.0, 0.002, -0.001], "EQUIVALENT"),
        ([0.010, 0.011, 0.009, 0.010, 0.011, 0.009], "EQUIVALENT"),  # real but negligible
        ([0.30, -0.20, 0.10, -0.25, 0.20, -0.10], "INCONCLUSIVE"),
        ([0.10, 0.12, 0.11], "INCONCLUSIVE"),  # three seeds, whatever they show
    ],
)
def test_verdicts(differences: list[float], expected: str) -> None:
    assert seeds.verdict(differences, 0.02).conclusion == expected


def test_verdict_reasons_and_estimates() -> None:
    few = seeds.verdict([0.1, 0.12, 0.11], 0.02)
    assert "needs at least 6" in few.reason
    assert "excludes 0" in seeds.verdict([0.010, 0.011, 0.009, 0.010, 0.011, 0.009], 0.02).reason
    assert seeds.verdict(Estimate(0.2, 0.1, 0.3, 100), 0.05).conclusion == "BETTER"
    assert seeds.verdict(Estimate(0.0, -0.01, 0.02, 100), 0.05).conclusion == "EQUIVALENT"
    assert seeds.verdict(Estimate(0.05, -0.01, 0.1, 100), 0.05).conclusion == "INCONCLUSIVE"
    with pytest.raises(ValueError, match="margin"):
        seeds.verdict([0.1] * 6, 0)


def test_tost_uses_the_90_percent_interval() -> None:
    d = [0.0, 0.03, -0.01, 0.02, 0.01, -0.02]
    wide, narrow = seeds.over_seeds(d), seeds.over_seeds(d, level=0.9)
    margin = (wide.high + narrow.high) / 2  # inside by the one, not by the other
    assert seeds.verdict(d, margin).conclusion == "EQUIVALENT"


@pytest.mark.parametrize(("n", "expected"), [(3, 3.07), (6, 1.80), (10, 1.32)])
def test_detectable_effect_two_arms(n: int, expected: float) -> None:
    """Textbook values of the two-sample t test at 80 % power."""
    assert seeds.detectable_effect(n) == pytest.approx(expected, abs=0.01)
    assert seeds.detectable_effect(n, sd=2.0) == pytest.approx(2 * expected, abs=0.02)


def test_detectable_effect_by_simulation() -> None:
    n, effect = 6, seeds.detectable_effect(6, paired=True)
    d = np.random.default_rng(0).normal(effect, 1.0, size=(4000, n))
    t = d.mean(1) / (d.std(1, ddof=1) / math.sqrt(n))
    assert np.mean(np.abs(t) > seeds.t_quantile(0.975, n - 1)) == pytest.approx(0.8, abs=0.025)
    with pytest.raises(ValueError, match="n >= 2"):
        seeds.detectable_effect(1)
