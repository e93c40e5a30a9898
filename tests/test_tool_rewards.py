"""Rewards on tool calls: values by hand, what does not count, and how far they can be farmed."""

import math
import pickle
from dataclasses import replace
from functools import partial

import pytest

from rlkit.checks import ConfigError
from rlkit.completion import Completion, ToolCall
from rlkit.config import RewardConfig
from rlkit.rewards import build, score
from rlkit.shaping import on_right
from rlkit.tool_rewards import call_cost, failing_code, tool_use

PROBLEM = {"problem_id": "p", "prompt": [], "answer": "12", "answer_type": "integer"}


def called(*statuses, text="", stop="eos"):
    calls = tuple(ToolCall("print(1)", "1", status, 0.0, 0.0, (0, 0)) for status in statuses)
    return replace(Completion.from_text(text, stop=stop), tool_calls=calls)


def values(reward, *completions, **settings):
    return reward(list(completions), [PROBLEM] * len(completions), **settings)


@pytest.mark.parametrize(
    ("statuses", "cap", "expected"),
    [
        ((), 1, 0.0),
        (("ok",), 1, 1.0),
        (("ok",) * 50, 1, 1.0),
        (("ok",), 4, 0.25),
        (("ok", "error", "ok"), 4, 0.5),
        (("ok",) * 4, 4, 1.0),
        (("ok",) * 5, 4, 1.0),
        (("error", "timeout", "infra"), 1, 0.0),
        (("infra", "ok"), 2, 0.5),
    ],
)
def test_tool_use_by_hand(statuses, cap, expected):
    assert values(tool_use, called(*statuses), cap=cap) == [expected]


# statuses, ToRL's rule, per call; penalty -0.5
FAILING = [
    ((), 0.0, 0.0),
    (("ok",), 0.0, 0.0),
    (("error",), -0.5, -0.5),
    (("timeout",), -0.5, -0.5),
    (("ok", "error"), -0.5, -0.25),
    (("ok", "ok", "ok", "error"), -0.5, -0.125),
    (("error", "timeout", "memory"), -0.5, -0.5),
    (("infra",), 0.0, 0.0),
    (("infra", "infra", "ok"), 0.0, 0.0),
    (("infra", "error", "ok"), -0.5, -0.25),  # one of the two that count
]


@pytest.mark.parametrize(("statuses", "response", "call"), FAILING)
def test_failing_code_by_hand(statuses, response, call):
    for per, expected in (("response", response), ("call", call)):
        [found] = values(failing_code, called(*statuses), per=per)
        assert found == expected
        assert math.copysign(1.0, found) == (-1.0 if expected else 1.0)
        assert values(failing_code, called(*statuses), per=per, penalty=-2) == [4 * expected]
    assert values(failing_code, called(*statuses)) == [response]


@pytest.mark.parametrize(
    ("statuses", "cap", "expected"),
    [
        ((), 4, 0.0),
        (("ok",), 4, -0.25),
        (("error",), 4, -0.25),  # a call that fails costs the same
        (("ok", "error", "timeout", "memory"), 4, -1.0),
        (("ok",) * 9, 4, -1.0),
        (("ok",) * 9, 1, -1.0),
        (("infra", "ok", "infra"), 2, -0.5),
        (("infra",), 2, 0.0),
    ],
)
def test_call_cost_by_hand(statuses, cap, expected):
    assert values(call_cost, called(*statuses), cap=cap) == [expected]
    if cap == 4:
        assert values(call_cost, called(*statuses)) == [expected]


def test_composed_call_cost_is_paid_on_right_answers_in_good_form_only():
    """A wrong answer without a call must not beat a wrong one with an honest attempt."""
    rows = [
        called(text=r"\boxed{12}"),
        called("ok", text=r"\boxed{12}"),
        called("ok", "error", text=r"\boxed{12}"),
        called(*["ok"] * 7, text=r"\boxed{12}"),
        called(text=r"\boxed{13}"),
        called("ok", text=r"\boxed{13}"),
        called(text="12"),
        called("ok", text="12"),
        called("ok", text=r"\boxed{12}", stop="calls"),
        called("ok", text=r"\boxed{12}", stop="length"),
        called("ok", text=r"\boxed{12}", stop="infra"),
    ]
    paid = build(RewardConfig(call_cost_weight=0.2))
    assert [(name, weight) for name, _, weight in paid] == [("accuracy", 1.0), ("call_cost", 0.2)]
    total, parts = score(paid, rows, [PROBLEM] * len(rows))
    assert parts["call_cost"] == [0, -0.25, -0.5, -1, 0, 0, 0, 0, 0, 0, None]
    assert total == pytest.approx([1, 0.95, 0.9, 0.8, 0, 0, 0, 0, 0, 0, None])
    assert [name for name, _, _ in build(RewardConfig())] == ["accuracy"]


def test_every_price_together_leaves_a_right_answer_above_a_wrong_one():
    config = RewardConfig(call_cost_weight=0.45, failing_code_weight=0.45, tool_use_weight=0.3)
    worst = called(*["error"] * 9, text=r"\boxed{12}")
    best_wrong = called("ok", text=r"\boxed{13}")
    [right, wrong], _ = score(build(config), [worst, best_wrong], [PROBLEM] * 2)
    assert right == pytest.approx(0.1) and wrong == 0


def test_how_a_response_ended_matters_only_if_the_machinery_failed():
    for reward in (tool_use, failing_code, call_cost):
        ended, cut, spent, failed = values(
            reward, *(called("ok", "error", stop=s) for s in ("eos", "length", "calls", "infra"))
        )
        assert ended == cut == spent
        assert failed is None


def test_trivial_calls_pay_no_more_than_the_cap_and_nothing_on_a_wrong_answer():
    farm = [called(*["ok"] * n, text=r"\boxed{13}") for n in (1, 3, 100)]
    assert values(tool_use, *farm, cap=3) == [pytest.approx(1 / 3), 1.0, 1.0]
    gated = on_right(partial(tool_use, cap=3))
    assert values(gated, *farm) == [0.0, 0.0, 0.0]
    assert values(gated, called("ok", "ok", "ok", text=r"\boxed{12}")) == [1.0]


def test_trivial_calls_dilute_a_failure_per_call_but_not_per_response():
    honest, diluted = called("error"), called("error", *["ok"] * 9)
    assert values(failing_code, honest, diluted, per="call") == [-0.5, pytest.approx(-0.05)]
    assert values(failing_code, honest, diluted, per="response") == [-0.5, -0.5]


def test_order_of_calls_and_rows_does_not_matter_and_nothing_changes():
    rows = [called("ok", "error"), called("error", "ok"), called(), called("ok", stop="infra")]
    before = pickle.dumps(rows)
    for reward in (
        partial(tool_use, cap=2),
        partial(failing_code, per="call"),
        partial(call_cost, cap=3),
    ):
        reward = pickle.loads(pickle.dumps(reward))
        found = values(reward, *rows, seed=0, step=1)
        assert found[0] == found[1]
        assert values(reward, *reversed(rows)) == found[::-1]
        assert reward([], []) == []
    assert pickle.dumps(rows) == before


@pytest.mark.parametrize(
    ("reward", "settings", "words"),
    [
        (tool_use, dict(cap=0), "cap=0: expected an integer >= 1"),
        (tool_use, dict(cap=1.5), "cap=1.5: expected an integer"),
        (tool_use, dict(cap=True), "cap=True: expected an integer"),
        (call_cost, dict(cap=0), "cap=0: expected an integer >= 1"),
        (call_cost, dict(cap=2.0), "cap=2.0: expected an integer"),
        (failing_code, dict(penalty=0.5), "penalty=0.5: expected a finite number <= 0"),
        (failing_code, dict(penalty=math.nan), "penalty=nan"),
        (failing_code, dict(penalty=-math.inf), "penalty=-inf"),
        (failing_code, dict(penalty="-1"), "penalty='-1'"),
        (failing_code, dict(per="token"), "per='token': expected one of ('response', 'call')"),
    ],
)
def test_settings_that_cannot_be_meant_are_named(reward, settings, words):
    with pytest.raises(ConfigError) as caught:
        reward([], [], **settings)
    assert words in str(caught.value)
