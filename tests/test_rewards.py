"""Rewards: exact values against tables written by hand, format rules, composition, self-check."""

import pickle

import pytest

from rlkit import extract, rewards, verify
from rlkit.checks import ConfigError
from rlkit.completion import Completion
from rlkit.config import RewardConfig
from rlkit.rewards import boxed_format, check_reward, is_correct, score, zero_format


def problem(answer="12", answer_type="integer", problem_id="p", question="Compute 19+14-21."):
    return {
        "problem_id": problem_id,
        "prompt": [{"role": "user", "content": question}],
        "answer": answer,
        "answer_type": answer_type,
        "source": "test",
        "meta": "{}",
    }


def completion(text, stop="eos"):
    return Completion.from_text(text, stop=stop)


# text, stop, boxed format, correct. Gold is 12. accuracy = correct and well formed.
BOXED = [
    (r"\boxed{12}", "eos", True, True),
    (r"19+14=33 so \boxed{12}", "eos", True, True),
    (r"<think>33</think>\boxed{12}", "eos", True, True),
    (r"<think></think>\boxed{12}", "eos", True, True),
    (r"<think>\boxed{13}</think>\boxed{12}", "eos", True, True),
    (r"\boxed{13}", "eos", True, False),
    (r"<think>\boxed{12}</think>\boxed{13}", "eos", True, False),
    (r"\boxed{12 or 13}", "eos", True, False),
    (r"\boxed{12}", "length", False, False),  # truncated
    (r"\boxed{12}", "calls", False, False),
    (r"<think>33", "length", False, False),
    ("The answer is 12.", "eos", False, False),  # unboxed
    ("", "eos", False, False),
    (r"\boxed{}", "eos", False, False),
    (r"\boxed{12", "eos", False, False),
    (r"\boxed{13} \boxed{12}", "eos", False, True),  # several boxes: the last counts, bad form
    (r"\boxed{12} \boxed{13}", "eos", False, False),
    (r"\boxed{\boxed{12}}", "eos", False, True),
    (r"\boxed{12} \boxed{", "eos", False, True),
    (r"<think>\boxed{12}</think> done", "eos", False, False),  # only inside the reasoning
    (r"<think>\boxed{12}", "eos", False, False),
    (r"so <think>33</think>\boxed{12}", "eos", False, True),  # reasoning not at the start
    (r"33</think>\boxed{12}", "eos", False, True),
    (r"<think>a<think>b</think>\boxed{12}", "eos", False, True),
    (r"<think>a</think><think>b</think>\boxed{12}", "eos", False, True),
    (r"\boxed{12}</think>", "eos", False, False),
    (r"\boxed{12}<think>", "eos", False, False),  # an open tag leaves no final part
    ("<answer>12</answer>", "eos", False, True),
]

# text, stop, zero format, correct.
ZERO = [
    ("<think> a </think> <answer> 12 </answer>", "eos", True, True),
    ("<think>a</think>\n\n<answer>12</answer>\n", "eos", True, True),
    ("<think>a</think><answer>12</answer><|im_end|>", "eos", True, True),
    ("<think>a</think><answer>12</answer><|endoftext|>\n<|im_end|>", "eos", True, True),
    (r"<think>a</think><answer>\boxed{12}</answer>", "eos", True, True),
    ("<think>a</think><answer>13</answer>", "eos", True, False),
    ("<think>12</think><answer>13</answer>", "eos", True, False),
    ("<think>a</think><answer>12</answer>", "length", True, False),  # truncated: format alone
    ("a</think><answer>12</answer>", "eos", False, True),  # does not start with the tag
    ("so <think>a</think><answer>12</answer>", "eos", False, True),
    ("<think>a</think><answer>12</answer> done", "eos", False, True),  # does not end with it
    ("<think>a</think><answer>12", "eos", False, False),
    ("<think>a</think> so <answer>12</answer>", "eos", False, True),  # text between
    ("<think> </think><answer>12</answer>", "eos", False, True),  # empty reasoning
    ("<think>a</think><answer> </answer>", "eos", False, False),  # empty answer
    ("<think>a</think></think><answer>12</answer>", "eos", False, True),  # tag twice
    ("<think>a</think><answer>13</answer><answer>12</answer>", "eos", False, True),
    ("<answer>12</answer><think>a</think>", "eos", False, False),  # order
    ("<think>a<answer>12</answer></think>", "eos", False, False),
    (r"\boxed{12}", "eos", False, True),
    ("", "eos", False, False),
]


@pytest.mark.parametrize(
    ("rule", "table"), [("boxed", BOXED), ("zero", ZERO)], ids=["boxed", "zero"]
)
def test_accuracy_and_format_table(rule, table):
    completions = [completion(text, stop) for text, stop, _, _ in table]
    problems = [problem()] * len(table)
    formed = [float(f) for _, _, f, _ in table]
    correct = [float(c) for _, _, _, c in table]
    check = {"boxed": boxed_format, "zero": zero_format}[rule]
    assert [float(check(c)) for c in completions] == formed
    assert [float(is_correct(c, problems[0])) for c in completions] == correct
    ended = [f * (c.stop == "eos") for f, c in zip(formed, completions, strict=True)]
    assert rewards.format_reward(completions, problems, format=rule) == ended
    assert rewards.accuracy(completions, problems, format="none") == correct
    gated = [f * c for f, c in zip(formed, correct, strict=True)]
    assert rewards.accuracy(completions, problems, format=rule) == gated


def test_infra_rows_have_no_reward():
    rows = [completion(r"\boxed{12}"), completion(r"\boxed{12}", "infra")]
    for reward in (rewards.accuracy, rewards.format_reward, rewards.random_reward):
        first, second = reward(rows, [problem()] * 2)
        assert first is not None
        assert second is None
    assert not is_correct(rows[1], problem())
    total, parts = score(rewards.build(RewardConfig()), rows, [problem()] * 2)
    assert (total, parts) == ([1.0, None], {"accuracy": [1.0, None]})


def test_random_reward_is_a_fair_coin_that_ignores_the_text():
    count = 4000
    right, wrong = [completion(r"\boxed{12}")] * count, [completion("")] * count
    problems = [problem(problem_id=str(i % 50)) for i in range(count)]
    coins = rewards.random_reward(right, problems, seed=1, step=3)
    assert set(coins) == {0.0, 1.0}
    assert abs(sum(coins) / count - 0.5) < 0.03  # 3.8 standard errors
    assert rewards.random_reward(wrong, problems, seed=1, step=3) == coins
    for other in ({"seed": 2, "step": 3}, {"seed": 1, "step": 4}):
        changed = rewards.random_reward(right, problems, **other)
        agree = sum(a == b for a, b in zip(coins, changed, strict=True)) / count
        assert abs(agree - 0.5) < 0.03


def test_build_gives_named_picklable_rewards():
    for config, name in [
        (RewardConfig(), "accuracy"),
        (RewardConfig(reward="random", allow_exploitable=True), "random"),
        (RewardConfig(reward="format", allow_exploitable=True), "format"),
    ]:
        [(found, reward_fn, weight)] = pickle.loads(pickle.dumps(rewards.build(config)))
        assert (found, weight) == (name, 1.0)
        assert reward_fn([completion("")], [problem()], seed=0, step=0)[0] in (0.0, 1.0)


def test_build_uses_the_configured_format():
    rows, problems = [completion(r"\boxed{12}")], [problem()]
    for rule, value in [("boxed", 1.0), ("zero", 0.0), ("none", 1.0)]:
        assert score(rewards.build(RewardConfig(format=rule)), rows, problems)[0] == [value]


def test_a_format_reward_without_format_is_refused():
    with pytest.raises(ConfigError, match="'boxed' or 'zero'"):
        rewards.build(RewardConfig(reward="format", format="none", allow_exploitable=True))


def constant(value):
    return lambda completions, problems, /, **info: [value] * len(completions)


def test_score_is_the_weighted_sum_of_the_known_parts():
    rows, problems = [completion(r"\boxed{12}"), completion("x")], [problem()] * 2
    skips = lambda completions, problems, /, **info: [None, info["step"]]  # noqa: E731
    fns = [("accuracy", rewards.accuracy, 2.0), ("bonus", constant(0.5), -1.0), ("s", skips, 1.0)]
    total, parts = score(fns, rows, problems, step=7)
    assert total == [2.0 - 0.5, 0.0 - 0.5 + 7.0]
    assert parts == {"accuracy": [1.0, 0.0], "bonus": [0.5, 0.5], "s": [None, 7.0]}


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0], "returned 1 values for 2"),
        ([1.0, 2.0, 3.0], "returned 3 values for 2"),
        ((1.0, 2.0), "returned tuple"),
        (None, "returned NoneType"),
        ([1.0, float("nan")], "nan for completion 1"),
        ([float("inf"), 1.0], "inf for completion 0"),
        (["1", 1.0], "'1' for completion 0"),
    ],
)
def test_a_reward_that_breaks_its_contract_is_named(returned, words):
    fns = [("mine", lambda c, p, /, **info: returned, 1.0)]
    with pytest.raises(rewards.RewardError, match=words) as caught:
        score(fns, [completion("")] * 2, [problem()] * 2)
    assert "'mine'" in str(caught.value)


def test_names_are_unique_and_counts_agree():
    one = ("accuracy", rewards.accuracy, 1.0)
    with pytest.raises(ValueError, match="only once"):
        score([one, one], [completion("")], [problem()])
    with pytest.raises(ValueError, match="at least one"):
        score([], [completion("")], [problem()])
    with pytest.raises(ValueError, match="2 completions but 1 problems"):
        score([one], [completion("")] * 2, [problem()])
    with pytest.raises(ValueError, match="zip"):
        rewards.accuracy([completion("")] * 2, [problem()])


PROBLEMS = [
    problem(),
    problem("7", problem_id="one-digit"),
    problem("-40", problem_id="negative"),
    problem("0", problem_id="zero"),
    problem("33", problem_id="twins"),
    problem(r"\frac{1}{2}", "expression", "half", "What is 3/6?"),
    problem("2.5", "expression", "decimal"),
    problem(r"[0,\infty)", "expression", "interval"),
    problem(r"\text{Evelyn}", "expression", "word", "Who is it, Evelyn or Briana?"),
]


@pytest.mark.parametrize("rule", ["boxed", "zero", "none"])
def test_the_shipped_accuracy_cannot_be_fooled(rule):
    fns = rewards.build(RewardConfig(format=rule))
    assert check_reward(lambda c, p: score(fns, c, p)[0], PROBLEMS) == []


def test_expression_problems_that_print_their_own_solution_are_reported():
    printed = problem("12", "expression", "p", "19+14-21")
    fns = rewards.build(RewardConfig())
    found = check_reward(lambda c, p: score(fns, c, p)[0], [printed])
    assert {e.kind for e in found} == {"copied question"}


def in_text(completions, problems, /, **info):
    return [float(p["answer"] in c.text) for c, p in zip(completions, problems, strict=True)]


def any_box(completions, problems, /, **info):
    return [
        float(any(b == p["answer"] for b in extract.boxes(c.text)))
        for c, p in zip(completions, problems, strict=True)
    ]


def percent_rule(completions, problems, /, **info):
    close = []
    for c, p in zip(completions, problems, strict=True):
        number = verify.verify(c.answer, p["answer"], "integer")
        hundred = verify.verify(c.answer, p["answer"] + "00", "integer")
        close.append(float("right" in (number, hundred)))
    return close


@pytest.mark.parametrize(
    ("fns", "kinds"),
    [
        (
            [("substring", in_text, 1.0)],
            {"list of numbers", "two answers", "many boxes", "answer in the reasoning only"},
        ),
        ([("any box", any_box, 1.0)], {"many boxes", "answer in the reasoning only"}),
        ([("percent", percent_rule, 1.0)], {"wrong answer 1200"}),
        ([("constant", constant(1.0), 1.0)], {"empty response", "copied question"}),
        (
            [("accuracy", rewards.accuracy, 1.0), ("format", rewards.format_reward, 0.1)],
            {"wrong answer 13", "wrong answer 11", "wrong answer 21"},
        ),
        ([("zero", constant(0.0), 1.0)], {"gold", "empty response"}),
        ([("none", constant(None), 1.0)], {"gold"}),
    ],
    ids=lambda value: value[0][0] if isinstance(value, list) else "",
)
def test_exploitable_rewards_are_caught(fns, kinds):
    found = check_reward(lambda c, p: score(fns, c, p)[0], PROBLEMS[:1])
    assert kinds <= {e.kind for e in found}
    assert all(e.problem_id == "p" and "p: " in str(e) for e in found)


def test_the_random_reward_is_exploitable():
    config = RewardConfig(reward="random", allow_exploitable=True)
    assert check_reward(lambda c, p: score(rewards.build(config), c, p)[0], PROBLEMS[:1])


def test_wrong_answers_may_cost_more_than_nothing():
    def graded(completions, problems, /, **info):
        return [
            1.0 if is_correct(c, p) and boxed_format(c) else -1.0
            for c, p in zip(completions, problems, strict=True)
        ]

    assert check_reward(lambda c, p: score([("g", graded, 1.0)], c, p)[0], PROBLEMS[:3]) == []
