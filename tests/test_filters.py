"""Group filters: the study's QS, RS and ORM on hand-made groups, and what a filter may return."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rlkit import filters
from rlkit.completion import Completion
from rlkit.filters import (
    FilterError,
    apply,
    overlong_masking,
    question_selection,
    response_selection,
)

PROBLEM = {"problem_id": "p", "prompt": [], "answer": "7", "answer_type": "integer"}


def group(*rows):
    """Completions from (right, length) or (right, length, stop)."""
    made = []
    for right, length, *stop in rows:
        text = r"\boxed{7}" if right else r"\boxed{8}"
        made.append(Completion.from_text(text, token_ids=range(length), stop=(*stop, "eos")[0]))
    return made


def keep(rule, *groups):
    rewards = np.zeros((len(groups), len(groups[0])))
    return rule(rewards, list(groups), [PROBLEM] * len(groups)).tolist()


R, W = True, False
# group, QS keeps it, indices that RS keeps
TABLE = [
    ([(R, 9), (R, 5), (W, 6), (W, 4)], True, [0, 3]),  # means 7 > 5
    ([(R, 9), (R, 3), (W, 6), (W, 6)], False, [0, 2]),  # means 6 = 6, but 9 > 6
    ([(R, 4), (R, 5), (W, 6), (W, 5)], False, []),  # 5 = 5: longer is asked, not as long
    ([(R, 4), (R, 5), (W, 9), (W, 8)], False, []),
    ([(R, 9), (W, 1), (W, 30), (W, 2)], False, [0, 1]),  # one long wrong answer moves the mean
    ([(W, 1), (R, 9), (R, 9), (R, 9)], True, [1, 0]),  # equally long: the first
    ([(R, 9), (R, 5), (R, 6), (R, 4)], False, []),  # no wrong answer
    ([(W, 9), (W, 5), (W, 6), (W, 4)], False, []),  # no right answer
    ([(R, 9, "length"), (R, 5), (W, 6), (W, 4)], False, [1, 3]),  # cut off: wrong, so 5 < 19/3
]


@pytest.mark.parametrize(("rows", "question", "pair"), TABLE)
def test_selection_tables(rows, question, pair):
    assert keep(question_selection, group(*rows)) == [[question] * 4]
    assert keep(response_selection, group(*rows)) == [[i in pair for i in range(4)]]


def test_groups_are_judged_one_by_one():
    groups = [group(*rows) for rows, _, _ in TABLE]
    assert keep(question_selection, *groups) == [[question] * 4 for _, question, _ in TABLE]
    assert keep(response_selection, *groups) == [
        [i in pair for i in range(4)] for _, _, pair in TABLE
    ]


def test_tool_output_does_not_make_a_response_long():
    rows = group((R, 9), (W, 6))
    assert keep(question_selection, rows) == [[True, True]]
    rows[0] = dataclasses.replace(rows[0], loss_mask=(1,) * 5 + (0,) * 4)
    assert keep(question_selection, rows) == [[False, False]]
    assert keep(response_selection, rows) == [[False, False]]


def test_overlong_masking_drops_truncated_responses_only():
    rows = group((R, 3), (W, 4, "length"), (W, 4, "calls"), (W, 4, "infra"), (R, 4, "length"))
    assert keep(overlong_masking, rows) == [[True, False, True, True, False]]


def test_no_filter_keeps_all_and_the_rewards_are_a_copy():
    rewards = np.array([[1.0, 0.0]])
    rows = [group((R, 1), (W, 1))]
    assert apply(None, rewards, rows, [PROBLEM]).all()

    def spoil(values, completions, problems):
        values[:] = 9
        return values > 0

    assert apply(spoil, rewards, rows, [PROBLEM]).tolist() == [[True, True]]
    assert rewards.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([[True, True]], "list"),
        (np.array([True, True]), r"bool \(2,\)"),
        (np.array([[1.0, 0.0]]), r"float64 \(1, 2\)"),
        (None, "NoneType"),
    ],
)
def test_a_filter_that_breaks_its_contract_is_told(returned, words):
    with pytest.raises(FilterError, match=words + r".*shape \(1, 2\)"):
        apply(lambda *_: returned, np.zeros((1, 2)), [group((R, 1), (W, 1))], [PROBLEM])


def test_every_configured_filter_exists():
    assert set(filters.FILTERS) == {"qs", "rs", "orm"}


def test_what_the_machinery_ended_is_neither_right_nor_wrong():
    rows = group((R, 9), (W, 5), (W, 1, "infra"), (W, 6))
    assert keep(question_selection, rows) == [[True] * 4]  # 9 > 5.5; with the 1 it would be 4
    assert keep(response_selection, rows) == [[True, True, False, False]]
    only = group((R, 9), (W, 1, "infra"), (R, 9), (R, 9))
    assert keep(question_selection, only) == keep(response_selection, only) == [[False] * 4]
    longer = group((R, 9), (W, 12), (W, 1, "infra"), (W, 12))
    assert keep(question_selection, longer) == [[False] * 4]  # 9 < 12
