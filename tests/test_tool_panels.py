"""Failure rates per call, their differences, and pass@k against tokens."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from rlkit import figures
from rlkit.metrics import EvalResult, summarise
from rlkit.panels import Entry
from rlkit.tool_panels import failure_fall, failures


def result(calls: list[list[int]], failed: list[list[int]], stop: str = "eos") -> EvalResult:
    """Problem by sample: how many calls, how many of them failed."""
    rows = [
        {
            "problem_id": f"large:{p}",
            "decoding": "sampled",
            "sample": s,
            "text": "",
            "answer": "1",
            "gold": "1",
            "correct": bool((p + s) % 2),
            "stop": stop,
            "n_tokens": 10,
            "reasoning": True,
            "calls": n,
            "failed_calls": failed[p][s],
            "tool_tokens": 5 * n,
        }
        for p, line in enumerate(calls)
        for s, n in enumerate(line)
    ]
    greedy = [{**row, "decoding": "greedy", "calls": 9, "failed_calls": 9} for row in rows[:1]]
    frame = pd.DataFrame(rows + greedy)
    return EvalResult(frame, summarise(frame))


def entry(label: str, *results: EvalResult) -> Entry:
    return Entry(label, results)


BEFORE = result([[2, 1], [1, 0], [2, 2]], [[1, 0], [1, 0], [1, 1]])  # 4 of 8
AFTER = result([[1, 1], [1, 1], [1, 1]], [[0, 0], [1, 0], [0, 0]])  # 1 of 6


def test_a_rate_is_per_call_and_greedy_rows_do_not_count():
    assert failures(entry("a", BEFORE)).value == pytest.approx(4 / 8)
    assert failures(entry("a", BEFORE, AFTER)).value == pytest.approx(5 / 14)
    assert BEFORE["call_failures"].value == pytest.approx(4 / 8)
    assert BEFORE["call_rate"].value == pytest.approx(5 / 6)
    assert BEFORE["calls"].value == pytest.approx(8 / 6)


def test_without_a_call_the_rate_is_undefined():
    none = entry("none", result([[0, 0]], [[0, 0]]))
    assert np.isnan(failures(none).value)
    fall = failure_fall(entry("b", AFTER), entry("none", result([[0, 0]] * 3, [[0, 0]] * 3)), 0.03)
    assert np.isnan(fall.difference.value) and fall.verdict.conclusion == "INCONCLUSIVE"


def test_the_fall_of_one_seed_is_old_minus_new_with_a_bootstrap_over_problems():
    fall = failure_fall(entry("new", AFTER), entry("old", BEFORE), 0.03)
    assert fall.difference.value == pytest.approx(4 / 8 - 1 / 6)
    assert fall.per_seed == (pytest.approx(1 / 3),)
    assert fall.difference.low < fall.difference.value < fall.difference.high
    back = failure_fall(entry("old", BEFORE), entry("new", AFTER), 0.03)
    assert back.difference.value == pytest.approx(-fall.difference.value)
    same = failure_fall(entry("old", BEFORE), entry("old", BEFORE), 0.03)
    assert same.difference.value == same.difference.low == same.difference.high == 0


def test_over_seeds_the_wider_interval_counts_and_few_seeds_allow_no_verdict():
    old = entry("old", BEFORE)
    worse = result([[1, 1], [1, 1], [1, 1]], [[1, 1], [1, 1], [0, 1]])  # 5 of 6
    two = failure_fall(entry("new", AFTER, worse), old, 0.03)
    assert two.per_seed == (pytest.approx(1 / 3), pytest.approx(1 / 2 - 5 / 6))
    assert two.difference.method.startswith("t over 2 seeds")
    assert two.verdict.conclusion == "INCONCLUSIVE" and "2 seed(s)" in two.verdict.reason
    good = result([[1, 1]] * 3, [[0, 0]] * 3)
    six = failure_fall(entry("new", *[good] * 6), old, 0.03)
    assert six.difference.value == pytest.approx(0.5) and six.scope == "recipe, 6 seeds"
    assert six.verdict.conclusion == "BETTER"


def test_seeds_must_pair_and_calls_must_be_known():
    with pytest.raises(ValueError, match="'old' has 2 seeds and 'new' 3"):
        failure_fall(entry("new", *[AFTER] * 3), entry("old", *[BEFORE] * 2), 0.03)
    plain = EvalResult(BEFORE.rows.drop(columns=["calls", "failed_calls"]), {})
    with pytest.raises(ValueError, match="mode='run'"):
        failures(entry("plain", plain))


def test_passk_curves_can_be_drawn_against_the_tokens_of_k_answers():
    summary = BEFORE.summary
    plain = figures.passk_curves({"a": summary})
    priced = figures.passk_curves({"a": summary}, tokens={"a": 50.0})
    assert list(plain.data[1].x) == [1, 2] and list(priced.data[1].x) == [50, 100]
    assert list(plain.data[1].y) == list(priced.data[1].y)
    assert priced.layout.xaxis.title.text == "tokens of k attempts"
