"""RRL and RRA against values computed by hand from the study's formulas."""

import dataclasses

import pytest

from rlkit.completion import Completion, ToolCall
from rlkit.length_rewards import count_actions, reflection_actions, relative_length

PROBLEM = {"problem_id": "p", "answer": "7", "answer_type": "integer"}


def rrl(text, tokens, stop="eos", max_length=20):
    rows = [Completion.from_text(text, token_ids=range(tokens), stop=stop)]
    return relative_length(rows, [PROBLEM], max_length=max_length)[0]


# text, tokens, stop, L / 20 + R_corr
RRL = [
    (r"\boxed{7}", 5, "eos", 1.25),
    (r"\boxed{7}", 20, "eos", 2.0),
    (r"\boxed{8}", 5, "eos", -0.75),
    (r"\boxed{8}", 19, "eos", -0.05),
    ("7", 5, "eos", -0.75),  # unboxed
    ("", 0, "eos", -1.0),
    (r"<think>\boxed{7}</think>", 10, "eos", -0.5),
    (r"\boxed{7}", 20, "length", 0.0),  # truncated: wrong, and as long as can be
    (r"\boxed{7}", 10, "calls", -0.5),
    (r"\boxed{7}", 5, "infra", None),
]


@pytest.mark.parametrize(("text", "tokens", "stop", "value"), RRL)
def test_relative_length_table(text, tokens, stop, value):
    assert rrl(text, tokens, stop) == (None if value is None else pytest.approx(value, abs=1e-12))


def test_a_long_wrong_answer_beats_a_short_one_but_never_a_right_one():
    wrong = [rrl(r"\boxed{8}", n) for n in range(1, 21)]
    assert wrong == sorted(wrong) and len(set(wrong)) == 20
    assert max(wrong) < rrl(r"\boxed{7}", 1)


def test_tool_output_is_not_the_policys_length():
    row = Completion.from_text(r"\boxed{7}", token_ids=range(10))
    row = dataclasses.replace(row, loss_mask=(1,) * 4 + (0,) * 6)
    assert relative_length([row], [PROBLEM], max_length=20) == [1.2]


@pytest.mark.parametrize("bad", [0, -3])
def test_a_missing_budget_is_told(bad):
    with pytest.raises(ValueError, match=f"max_length={bad}: expected the token budget"):
        relative_length([], [], max_length=bad)
    with pytest.raises(ValueError, match="max_length=0"):
        relative_length([], [])


WORDS = [
    ("However, but WAIT verify Alternatively", 5),
    ("howevers, button, waiting, verified, rebut", 0),  # whole words only
    ("wait wait\nwait", 3),
    ("Wait:but-but", 3),
    ("", 0),
    ("however" * 3, 0),
    ("<think>wait</think> but", 2),
]


@pytest.mark.parametrize(("text", "count"), WORDS)
def test_count_actions(text, count):
    assert count_actions(text) == count


# number of words, right, stop, min(A, 20) / 20 + R_corr
RRA = [
    (0, True, "eos", 1.0),
    (3, True, "eos", 1.15),
    (20, True, "eos", 2.0),
    (21, True, "eos", 2.0),  # the cap
    (500, True, "eos", 2.0),
    (0, False, "eos", -1.0),
    (20, False, "eos", 0.0),
    (500, False, "eos", 0.0),
    (4, True, "length", -0.8),  # truncated
    (4, True, "infra", None),
]


@pytest.mark.parametrize(("words", "right", "stop", "value"), RRA)
def test_reflection_actions_table(words, right, stop, value):
    text = "<think>" + "wait " * words + r"</think>\boxed{" + ("7}" if right else "8}")
    [found] = reflection_actions([Completion.from_text(text, stop=stop)], [PROBLEM])
    assert found == (None if value is None else pytest.approx(value, abs=1e-12))


def test_another_cap():
    row = Completion.from_text(r"but but but \boxed{7}")
    assert reflection_actions([row], [PROBLEM], cap=2) == [2.0]
    assert reflection_actions([row], [PROBLEM], cap=6) == [1.5]
    with pytest.raises(ValueError, match="cap=0: expected"):
        reflection_actions([row], [PROBLEM], cap=0)


def test_words_that_a_tool_printed_are_not_the_policys():
    code, printed = "print('but wait ' * 9)", "but wait " * 9
    head, tail = f"wait\n```python\n{code}\n```", r"however \boxed{7}"
    shown = f"\n```output\n{printed}\n```\n"
    place = (len(head), len(head + shown))
    call = ToolCall(code, printed, "ok", 0.1, 0.1, (0, 0), place)
    row = Completion.from_text(head + shown + tail)
    assert reflection_actions([row], [PROBLEM], cap=40) == [1 + 22 / 40]
    row = dataclasses.replace(row, tool_calls=(call,))
    assert row.own_text == f"{head}\n{tail}"
    assert reflection_actions([row], [PROBLEM], cap=40) == [1 + 4 / 40]
    unplaced = dataclasses.replace(call, characters=(0, 0))
    assert dataclasses.replace(row, tool_calls=(unplaced,)).own_text == row.text
