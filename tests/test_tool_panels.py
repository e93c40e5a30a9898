"""Failure rates of calls and their differences, by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import pytest

from rlkit import stats
from rlkit.metrics import EvalResult
from rlkit.panels import Entry
from rlkit.tool_panels import failure_fall, failures

IDS = [f"large:{i}" for i in range(10)]


def result(
    calls: Sequence[int], failed: Sequence[int], *, ids: Sequence[str] = IDS, infra: int = 0
) -> EvalResult:
    """One sample per problem, of which the first ``infra`` were lost; a greedy row to ignore."""
    n = len(ids)
    rows = {
        "problem_id": [*ids, ids[0]],
        "decoding": ["sampled"] * n + ["greedy"],
        "stop": ["infra"] * infra + ["eos"] * (n + 1 - infra),
        "calls": [*calls, 50],
        "failed_calls": [*failed, 50],
    }
    return EvalResult(pd.DataFrame(rows), {})


HALF = result([1] * 10, [1] * 5 + [0] * 5)
TENTH = result([1] * 10, [1] + [0] * 9)


def test_rates_by_hand() -> None:
    assert failures(Entry("e", (HALF,))).value == 0.5
    assert failures(Entry("e", (HALF, TENTH))).value == 0.3
    assert math.isnan(failures(Entry("e", (result([0] * 10, [0] * 10),))).value)
    with pytest.raises(ValueError, match="mode='run'"):
        failures(Entry("e", (EvalResult(HALF.rows.drop(columns="calls"), {}),)))


def test_lost_responses_say_nothing_about_the_policy() -> None:
    lost = result([1] * 10, [1] * 5 + [0] * 5, infra=4)
    assert failures(Entry("e", (lost,))).value == pytest.approx(1 / 6)
    fall = failure_fall(Entry("new", (lost,)), Entry("old", (HALF,)), 0.05)
    assert fall.difference.value == pytest.approx(0.5 - 1 / 6)


def test_one_seed_is_paired_over_problems() -> None:
    fall = failure_fall(Entry("new", (TENTH,)), Entry("old", (HALF,)), 0.05)
    assert fall.difference.value == pytest.approx(0.4)
    assert fall.per_seed == (pytest.approx(0.4),) and fall.verdict.conclusion == "BETTER"
    # Each problem has one call on either side, so this is a mean of differences.
    paired = stats.bootstrap([0.0] + [1.0] * 4 + [0.0] * 5)
    assert fall.difference.low == pytest.approx(paired.low)
    assert fall.difference.high == pytest.approx(paired.high)


def test_other_problems_are_refused() -> None:
    others = result([1] * 10, [1] * 10, ids=[f"large:{i}" for i in range(1, 11)])
    with pytest.raises(ValueError, match=r"different problems \(10 and 10\)"):
        failure_fall(Entry("new", (TENTH,)), Entry("old", (others,)), 0.05)
    fewer = result([1] * 9, [1] * 9, ids=IDS[:9])
    with pytest.raises(ValueError, match=r"different problems \(9 and 10\)"):
        failure_fall(Entry("new", (TENTH, fewer)), Entry("old", (fewer,)), 0.05)


def test_a_seed_without_calls_is_not_passed_over() -> None:
    silent = result([0] * 10, [0] * 10)
    fall = failure_fall(Entry("new", (TENTH,) * 5 + (silent,)), Entry("old", (HALF,)), 0.05)
    assert math.isnan(fall.difference.value) and fall.verdict.conclusion == "INCONCLUSIVE"


def test_several_seeds_count_alike_whatever_they_call() -> None:
    busy = result([10] * 10, [2] * 10)
    new = Entry("new", (TENTH, busy) * 3)
    fall = failure_fall(new, Entry("old", (HALF,)), 0.05)
    assert fall.difference.value == pytest.approx(0.35)
    assert fall.per_seed == pytest.approx([0.4, 0.3] * 3)
    assert fall.difference.high - fall.difference.low > 0.05, "problems are not known exactly"
    few = failure_fall(Entry("new", (TENTH,) * 5), Entry("old", (HALF,)), 0.05)
    assert few.verdict.conclusion == "INCONCLUSIVE"
    with pytest.raises(ValueError, match="expected as many, or one"):
        failure_fall(Entry("new", (TENTH,) * 3), Entry("old", (HALF,) * 2), 0.05)


def test_no_spread_is_no_certainty() -> None:
    clean = Entry("e", (result([1] * 10, [0] * 10),))
    fall = failure_fall(clean, clean, 0.05)
    bound = stats.wilson(0, 10).high
    assert (fall.difference.low, fall.difference.value, fall.difference.high) == (-bound, 0, bound)
    assert fall.verdict.conclusion == "INCONCLUSIVE"
