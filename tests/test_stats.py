from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from rlkit import stats
from rlkit.stats import Estimate


def test_estimate_formats() -> None:
    e = Estimate(0.5123, 0.478, 0.5511, 100)
    assert str(e) == "0.512 [0.48, 0.55]"
    assert f"{e:.1%}" == "51.2% [47.8%, 55.1%]"
    assert str(Estimate(41.26, 40.0, 43.04, 9)) == "41.3 [40.0, 43.0]"
    assert str(stats.undefined("x")) == "undefined"


@pytest.mark.parametrize(("low", "high", "level"), [(0.6, 0.5, 0.95), (0.1, 0.2, 1.0)])
def test_estimate_rejects_nonsense(low: float, high: float, level: float) -> None:
    with pytest.raises(ValueError, match=r"low|level"):
        Estimate(0.1, low, high, 3, level)


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (7, 0), (7, 3), (7, 7), (12, 5)])
def test_pass_at_k_is_the_binomial_formula(n: int, c: int) -> None:
    for k in range(1, n + 1):
        exact = 1 - math.comb(n - c, k) / math.comb(n, k)
        assert stats.pass_at_k(n, c, k) == pytest.approx(exact, abs=1e-14)


def test_pass_at_k_is_the_mean_over_subsets() -> None:
    right = [1, 0, 0, 1, 0, 0]
    subsets = list(itertools.combinations(right, 3))
    assert stats.pass_at_k(6, 2, 3) == pytest.approx(np.mean([any(s) for s in subsets]), abs=1e-14)


def test_pass_at_k_is_stable_for_large_n() -> None:
    exact = 1 - math.comb(100_000 - 3, 5_000) / math.comb(100_000, 5_000)
    assert stats.pass_at_k(100_000, 3, 5_000) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_errors(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=r"expected|needs"):
        stats.pass_at_k(n, c, k)


def brute_majority(answers: list[str | None], gold: set[str], k: int) -> float:
    won = 0.0
    subsets = list(itertools.combinations(answers, k))
    for votes in subsets:
        counts = Counter(v for v in votes if v is not None)
        top = max(counts.values(), default=0)
        leaders = [a for a, c in counts.items() if c == top]
        won += sum(a in gold for a in leaders) / len(leaders) if leaders else 0.0
    return won / len(subsets)


@pytest.mark.parametrize("seed", range(8))
def test_majority_equals_brute_force_over_subsets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    answers = [None if a == 4 else str(a) for a in rng.integers(0, 5, size=9)]
    gold = {"0", "3"}  # two spellings of the right answer may split the vote
    for k in range(1, 10):
        got = stats.majority_at_k(answers, [a in gold for a in answers], k)
        assert got == pytest.approx(brute_majority(answers, gold, k), abs=1e-12)


def test_majority_rules() -> None:
    assert stats.majority_at_k(["7", "7", "8"], [True, True, False]) == 1.0
    assert stats.majority_at_k(["7", "8"], [True, False]) == 0.5  # a tie is shared
    assert stats.majority_at_k(["7", None, None], [True, False, False]) == 1.0  # None never wins
    assert stats.majority_at_k([None, None], [False, False]) == 0.0
    with pytest.raises(ValueError, match="both right and wrong"):
        stats.majority_at_k(["7", "7"], [True, False])
    with pytest.raises(ValueError, match="k=3"):
        stats.majority_at_k(["7", "7"], [True, True], 3)


def test_wilson_reproduces_the_audit_of_the_study() -> None:
    e = stats.wilson(26, 30)
    assert (round(100 * e.low, 1), round(100 * e.high, 1)) == (70.3, 94.7)
    e = stats.wilson(24, 30)
    assert (round(100 * e.low, 1), round(100 * e.high, 1)) == (62.7, 90.5)
    assert stats.wilson(0, 10).low == 0.0
    assert stats.wilson(10, 10).high == 1.0
    assert stats.wilson(10, 10).low == pytest.approx(0.7225, abs=1e-4)


def test_bootstrap_is_seeded_and_near_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, size=400)
    e = stats.bootstrap(values, seed=1)
    assert e == stats.bootstrap(values, seed=1)
    assert e != stats.bootstrap(values, seed=2)
    assert e.value == pytest.approx(values.mean(), abs=1e-12)
    half = 1.96 * values.std(ddof=1) / 20
    assert e.low == pytest.approx(e.value - half, abs=0.1 * half)
    assert e.high == pytest.approx(e.value + half, abs=0.1 * half)


def test_bootstrap_covers_at_the_nominal_rate() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        e = stats.bootstrap(rng.random(60), resamples=400)
        hits += e.low <= 0.5 <= e.high
    assert 180 <= hits <= 199  # 95 % of 200 is 190, binomial SD 3


def test_bootstrap_ratio() -> None:
    e = stats.bootstrap([10, 0, 30], [1, 0, 2])
    assert e.value == pytest.approx(40 / 3)
    assert (e.low, e.high) == (10.0, 15.0)  # the two possible pure resamples
    assert math.isnan(stats.bootstrap([0, 0], [0, 0]).value)
    with pytest.raises(ValueError, match="no problems"):
        stats.bootstrap([])
    with pytest.raises(ValueError, match="expected two"):
        stats.bootstrap([1, 2], [1, 2, 3])


def test_rate_has_width_at_the_ends() -> None:
    e = stats.rate([1.0] * 20)
    assert e.method == "Wilson"
    assert (e.value, e.high) == (1.0, 1.0)
    assert e.low == stats.wilson(20, 20).low < 0.9
    assert stats.rate([0.0, 0.0, 0.0]).high == stats.wilson(0, 3).high
    assert stats.rate([0, 0, 0], [1, 0, 1]).n == 2  # problems without such samples do not count
    assert stats.rate([0.0, 1.0, 0.5, 0.5]).method == "bootstrap over problems"


def test_sign_flip_exact() -> None:
    p, test = stats.sign_flip([1.0, 2.0, 3.0])
    assert (p, test) == (0.25, "exact sign-flip")  # only +++ and --- of 8 reach |6|
    assert stats.sign_flip([0.0, 0.0]) == (1.0, "exact sign-flip")
    assert stats.sign_flip([0.0, 1.0, 2.0, 3.0])[0] == 0.25  # zeros carry no information
    # sums that tie in exact arithmetic must tie here: 0.1 + 0.2 against 0.3
    assert stats.sign_flip([0.1, 0.2, -0.3])[0] == 1.0


def test_sign_flip_sampled_agrees_with_exact() -> None:
    d = np.random.default_rng(0).normal(0.4, 1.0, size=16)
    exact, _ = stats.sign_flip(d)
    sampled, test = stats.sign_flip(np.concatenate([d, [1e-12]]))
    assert test == "sampled sign-flip"
    assert sampled == pytest.approx(exact, abs=0.02)


def test_sign_flip_is_calibrated_under_the_null() -> None:
    rng = np.random.default_rng(1)
    small = [stats.sign_flip(rng.normal(size=8))[0] <= 0.05 for _ in range(300)]
    assert 3 <= sum(small) <= 28  # 15 expected


def test_paired_uses_the_pairing() -> None:
    rng = np.random.default_rng(0)
    a = rng.random(80)
    b = a + 0.05
    result = stats.paired(a, b)
    assert result.difference.value == pytest.approx(0.05)
    assert result.difference.low == pytest.approx(0.05)  # no spread: difficulty cancels
    assert result.p < 0.001
    assert str(result).startswith("+0.050 [+0.050, +0.050], p = 0.0001")
    with pytest.raises(ValueError, match="same"):
        stats.paired(a, b[:-1])
