"""Rates of calls in an evaluation, and pass@k against tokens."""

from __future__ import annotations

import pandas as pd
import pytest

from rlkit import figures
from rlkit.metrics import EvalResult, summarise
from rlkit.panels import Entry
from rlkit.tool_panels import failures


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


def test_passk_curves_can_be_drawn_against_the_tokens_of_k_answers():
    summary = BEFORE.summary
    plain = figures.passk_curves({"a": summary})
    priced = figures.passk_curves({"a": summary}, tokens={"a": 50.0})
    assert list(plain.data[1].x) == [1, 2] and list(priced.data[1].x) == [50, 100]
    assert list(plain.data[1].y) == list(priced.data[1].y)
    assert priced.layout.xaxis.title.text == "tokens of k attempts"
