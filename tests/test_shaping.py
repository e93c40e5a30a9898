"""Shaping rewards: values worked out by hand, TRL's own as a second opinion, bad settings."""

import math
import pickle
import random
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

from rlkit.checks import ConfigError
from rlkit.completion import Completion
from rlkit.correct import all_correct
from rlkit.rewards import accuracy, check_reward, is_correct, random_reward, score
from rlkit.shaping import (
    Gated,
    cosine_length,
    graded,
    on_right,
    repetition_penalty,
    soft_overlong,
)

RIGHT, WRONG = r"\boxed{12}", r"\boxed{13}"


def problem(question="Compute 19+14-21.", system=None):
    turns = [{"role": "system", "content": system}] if system else []
    return {
        "problem_id": "p",
        "prompt": [*turns, {"role": "user", "content": question}],
        "answer": "12",
        "answer_type": "integer",
        "source": "test",
        "meta": "{}",
    }


def completion(text="", length=0, stop="eos"):
    return Completion.from_text(text, token_ids=range(length), stop=stop)


def values(reward, *completions, **settings):
    return reward(list(completions), [problem()] * len(completions), **settings)


# text, stop, value, value of the released sum. Gold is 12, the prompt does not say "boxed".
GRADED = [
    (r"\boxed{12}", "eos", 1.0, 1.0),
    (r"<think>33</think>\boxed{12}", "eos", 1.0, 1.0),
    (r"\boxed{13} \boxed{12}", "eos", 1.0, 1.0),  # the last box counts, no format rule
    ("<think>a</think><answer>12</answer>", "eos", 1.0, 1.0),  # right without a box
    (r"\boxed{13}", "eos", -1.0, -1.0),
    (r"\boxed{12 or 13}", "eos", -1.0, -1.0),
    (r"\boxed{}", "eos", -1.0, -1.0),
    (r"\boxed{12", "eos", -1.0, -1.0),  # never closed
    (r"<think>\boxed{12}</think> done", "eos", -1.0, -1.0),  # only in the reasoning
    (r"\boxed{12}", "length", -1.0, -1.0),  # right but truncated; +1 as released
    (r"\boxed{12}", "calls", -1.0, -1.0),
    (r"<think>I will write \boxed", "length", -1.0, -1.0),
    ("no boxed answer", "eos", -1.0, -1.0),  # the bare word is enough, as released
    ("The answer is 12.", "eos", -2.0, -1.0),
    ("<answer>13</answer>", "eos", -2.0, -1.0),
    ("<think>33", "length", -2.0, -1.0),
    ("12", "calls", -2.0, -1.0),
    ("", "eos", -2.0, -1.0),
    ("", "length", -2.0, -1.0),
    (r"\boxed{12}", "infra", None, None),
    ("", "infra", None, None),
]


@pytest.mark.parametrize(("text", "stop", "plain", "released"), GRADED)
def test_graded_table(text, stop, plain, released):
    assert values(graded, completion(text, stop=stop)) == [plain]
    assert values(graded, completion(text, stop=stop), released_sum=True) == [released]


@pytest.mark.parametrize(
    "asking",
    [problem(r"Compute 1+1. Answer in \boxed{}."), problem(system="Use a boxed answer.")],
    ids=["user turn", "system turn"],
)
def test_the_released_sum_keeps_its_third_grade_when_the_prompt_asks_for_a_box(asking):
    rows = [completion(text) for text in ("12", WRONG, RIGHT)]
    assert graded(rows, [asking] * 3, released_sum=True) == [-2.0, -1.0, 1.0]
    assert graded(rows, [asking] * 3) == [-2.0, -1.0, 1.0]


def test_the_self_check_sees_that_graded_pays_a_box_on_a_wrong_answer():
    found = check_reward(graded, [problem()])
    assert {(e.kind, e.score, e.plain_score) for e in found} == {("format", -1.0, -2.0)}
    assert check_reward(partial(graded, released_sum=True), [problem()]) == []


# L = 100, C = 20: free up to 80 tokens, 5 hundredths per token after that.
@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (0, 0.0),
        (79, 0.0),
        (80, 0.0),
        (81, -0.05),
        (85, -0.25),
        (90, -0.5),
        (99, -0.95),
        (100, -1.0),
        (101, -1.0),
        (10_000, -1.0),
    ],
)
def test_soft_overlong_by_hand(length, expected):
    for text in (RIGHT, WRONG, ""):
        [found] = values(soft_overlong, completion(text, length), max_length=100, cache=20)
        assert found == expected
        assert math.copysign(1.0, found) == (-1.0 if expected else 1.0)  # 0, never -0


def test_soft_overlong_at_its_limits():
    lengths = [completion(length=n) for n in range(5)]
    assert values(soft_overlong, *lengths, max_length=4, cache=4) == [0, -0.25, -0.5, -0.75, -1]
    assert values(soft_overlong, *lengths, max_length=4, cache=1) == [0, 0, 0, 0, -1]
    assert values(soft_overlong, *lengths[:3], max_length=1, cache=1) == [0, -1, -1]


def test_a_response_that_used_up_the_budget_gets_the_whole_punishment():
    cut = completion("<think>33", 64, "length")
    ended = completion(RIGHT, 64)
    assert values(soft_overlong, cut, ended, max_length=64, cache=16) == [-1.0, -1.0]


def test_soft_overlong_equals_trl():
    rng = random.Random(0)
    for _ in range(200):
        limit = rng.randint(1, 60)
        cache = rng.randint(1, limit)
        lengths = [rng.randint(0, 80) for _ in range(8)]
        theirs = get_soft_overlong_punishment(limit, cache)([[0] * n for n in lengths])
        rows = [completion(length=n) for n in lengths]
        assert values(soft_overlong, *rows, max_length=limit, cache=cache) == theirs


# c(n) is 3/4 at a third of L, 1/2 at the half, 1/4 at two thirds.
@pytest.mark.parametrize(
    ("limit", "length", "right", "wrong"),
    [
        (100, 0, 2.0, -10.0),
        (100, 50, 1.5, -5.0),
        (120, 40, 1.75, -7.5),  # c = 3/4
        (120, 80, 1.25, -2.5),  # c = 1/4
        (100, 25, 1.5 + math.sqrt(2) / 4, -5 - 2.5 * math.sqrt(2)),
        (100, 100, -10.0, -10.0),
        (100, 250, -10.0, -10.0),
    ],
)
def test_cosine_by_hand(limit, length, right, wrong):
    rows = [completion(RIGHT, length), completion(WRONG, length)]
    assert values(cosine_length, *rows, max_length=limit) == pytest.approx(
        [right, wrong], abs=1e-12
    )


def test_cosine_of_responses_that_did_not_end():
    rows = [
        completion(RIGHT, 100, "length"),
        completion(RIGHT, 50, "length"),  # a budget below max_length: cut off all the same
        completion(RIGHT, 50, "calls"),  # not ended by the policy: wrong, at its length
        completion("", 50),
        completion(RIGHT, 50, "infra"),
    ]
    found = values(cosine_length, *rows, max_length=100, exceed=-3.0)
    assert found == [-3.0, -3.0, pytest.approx(-5.0), pytest.approx(-5.0), None]


def test_cosine_settings_are_the_values_at_the_two_ends():
    settings = dict(right_short=0.5, right_long=8, wrong_short=-0.5, wrong_long=-0.25)
    rows = [completion(text, n) for text in (RIGHT, WRONG) for n in (0, 50)]
    found = values(cosine_length, *rows, max_length=100, **settings)
    assert found == pytest.approx([0.5, 4.25, -0.5, -0.375], abs=1e-12)


def test_cosine_moves_one_way_and_stays_between_its_ends():
    rights = values(cosine_length, *(completion(RIGHT, n) for n in range(64)), max_length=64)
    wrongs = values(cosine_length, *(completion(WRONG, n) for n in range(64)), max_length=64)
    assert all(a > b for a, b in pairwise(rights))
    assert all(a < b for a, b in pairwise(wrongs))
    assert (rights[0], wrongs[0]) == (2.0, -10.0)
    assert rights[-1] > 1.0
    assert wrongs[-1] < 0.0


def test_the_cosine_lets_a_long_wrong_answer_win_and_on_right_does_not():
    group = [completion(WRONG, n) for n in (5, 20, 60)]
    reward = partial(cosine_length, max_length=64)
    short, middle, long = values(reward, *group)
    assert short < middle < long
    assert values(on_right(reward), *group) == [0.0, 0.0, 0.0]


def written(ids, mask=None):
    return replace(completion(), token_ids=tuple(ids), loss_mask=tuple(mask or [1] * len(ids)))


@pytest.mark.parametrize(
    ("ids", "ngram", "expected"),
    [
        ([], 1, 0.0),
        ([1], 2, 0.0),  # shorter than n
        ([1, 1], 2, 0.0),  # one n-gram
        ([1, 2, 3, 4], 1, 0.0),
        ([1, 1, 1, 1], 1, -0.75),  # 1 of 4 distinct
        ([5, 5, 5, 5, 5], 2, -0.75),  # 1 of 4
        ([1, 2, 1, 2, 1], 2, -0.5),  # 12 21 12 21: 2 of 4
        ([1, 2, 3, 1, 2, 3], 3, -0.25),  # 123 231 312 123: 3 of 4
        ([1, 2, 3, 1, 2, 3], 4, 0.0),
        ([7] * 101, 1, -100 / 101),
    ],
)
def test_repetition_by_hand(ids, ngram, expected):
    [found] = values(repetition_penalty, written(ids), ngram=ngram)
    assert found == expected
    assert math.copysign(1.0, found) == (-1.0 if expected else 1.0)
    assert values(repetition_penalty, written(ids), ngram=ngram, max_penalty=-4) == [4 * expected]


def test_repetition_by_default_looks_at_twenty_tokens():
    block = list(range(20))
    assert values(repetition_penalty, written([9] * 20)) == [0.0]
    assert values(repetition_penalty, written(block * 2)) == [-1 / 21]
    assert values(repetition_penalty, written([9] * 21)) == [-0.5]


def test_repetition_reads_own_tokens_only_and_joins_them_across_tool_output():
    output = [8, 8, 8, 8]
    calm = written([1, 2, *output, 3], [1, 1, 0, 0, 0, 0, 1])
    assert values(repetition_penalty, calm, ngram=1) == [0.0]
    # The same call three times: 1 2 | 1 2 | 1 2 is 12 21 12 21 12, 2 of 5 distinct.
    again = written([1, 2, *output] * 3, [1, 1, 0, 0, 0, 0] * 3)
    assert values(repetition_penalty, again, ngram=2) == [pytest.approx(-0.6)]
    printed = written(output, [0] * 4)
    assert values(repetition_penalty, printed, ngram=1) == [0.0]


def test_repetition_equals_trl():
    rng = random.Random(1)
    for _ in range(200):
        ngram, floor = rng.randint(1, 5), -rng.random()
        rows = [[rng.randint(0, 3) for _ in range(rng.randint(0, 30))] for _ in range(6)]
        theirs = get_repetition_penalty_reward(ngram, floor)(rows)
        ours = values(
            repetition_penalty, *(written(r) for r in rows), ngram=ngram, max_penalty=floor
        )
        assert ours == pytest.approx(theirs, abs=1e-12)
        assert all(floor < value <= 0 for value in ours)


def lengths(completions, problems, /, **info):
    return [None if c.stop == "infra" else float(len(c.token_ids)) for c in completions]


def ended(completions, problems):
    return [completion.reached_end for completion in completions]


def test_a_gate_closes_on_what_it_does_not_like():
    rows = [
        completion(RIGHT, 3),
        completion(WRONG, 4),
        completion(RIGHT, 5, "length"),
        completion(RIGHT, 6, "infra"),
    ]
    assert values(Gated(lengths, ended), *rows) == [3.0, 4.0, 0.0, None]
    assert values(Gated(lengths, ended, otherwise=-1), *rows) == [3.0, 4.0, -1.0, None]
    assert values(on_right(lengths), *rows) == [3.0, 0.0, 0.0, None]
    assert on_right(lengths) == Gated(lengths, all_correct, 0.0)


def test_rows_without_a_value_stay_without():
    nothing = lambda completions, problems, /, **info: [None] * len(completions)  # noqa: E731
    assert values(Gated(nothing, ended), completion(RIGHT)) == [None]


def test_another_reward_can_be_the_gate():
    rows = [completion(RIGHT, 2), completion(RIGHT * 2, 3), completion(WRONG, 4)]
    assert values(on_right(lengths), *rows) == [2.0, 3.0, 0.0]
    assert values(Gated(lengths, accuracy), *rows) == [2.0, 0.0, 0.0]  # two boxes: malformed


def test_a_gate_hands_on_the_facts_of_the_step_and_all_rows():
    rows = [completion(RIGHT)] * 64
    alone = values(random_reward, *rows, seed=3, step=5)
    assert set(alone) == {0.0, 1.0}
    assert values(on_right(random_reward), *rows, seed=3, step=5) == alone


def test_gates_nest():
    inner = Gated(lengths, ended)
    assert values(on_right(inner), completion(RIGHT, 2), completion(WRONG, 2)) == [2.0, 0.0]


def test_a_shaping_term_beside_accuracy_ranks_right_answers_and_cannot_lift_a_wrong_one():
    overlong = on_right(partial(soft_overlong, max_length=100, cache=50))
    fns = [("accuracy", accuracy, 1.0), ("overlong", overlong, 0.5)]
    rows = [completion(RIGHT, 50), completion(RIGHT, 75), completion(RIGHT, 100)]
    rows += [completion(WRONG, n) for n in (1, 50, 100)]
    assert score(fns, rows, [problem()] * 6)[0] == [1.0, 0.75, 0.5, 0.0, 0.0, 0.0]
    assert check_reward(lambda c, p: score(fns, c, p)[0], [problem()]) == []


REWARDS = {
    "graded": graded,
    "released graded": partial(graded, released_sum=True),
    "soft overlong": partial(soft_overlong, max_length=16, cache=8),
    "cosine": partial(cosine_length, max_length=16),
    "repetition": partial(repetition_penalty, ngram=2),
    "gated cosine": on_right(partial(cosine_length, max_length=16)),
    "gated repetition": on_right(partial(repetition_penalty, ngram=2)),
}
RANGES = {
    "graded": (-2, 1),
    "released graded": (-1, 1),
    "soft overlong": (-1, 0),
    "cosine": (-10, 2),
    "repetition": (-1, 0),
    "gated cosine": (-10, 2),
    "gated repetition": (-1, 0),
}


def mixed_rows(seed):
    rng = random.Random(seed)
    rows = []
    for _ in range(60):
        ids = [rng.randint(0, 3) for _ in range(rng.randint(0, 20))]
        text = rng.choice([RIGHT, WRONG, "", "12", "<think>33", r"<think>x</think>\boxed{12}"])
        stop = rng.choice(["eos", "eos", "length", "calls", "infra"])
        mask = [rng.randint(0, 1) for _ in ids]
        rows.append(
            replace(completion(text, stop=stop), token_ids=tuple(ids), loss_mask=tuple(mask))
        )
    return rows


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_keeps_the_contract(name):
    reward = pickle.loads(pickle.dumps(REWARDS[name]))
    rows, problems = mixed_rows(0), [problem()] * 60
    before = pickle.dumps((rows, problems))
    found = reward(rows, problems, seed=1, step=2)
    assert pickle.dumps((rows, problems)) == before
    assert [value is None for value in found] == [c.stop == "infra" for c in rows]
    low, high = RANGES[name]
    known = [value for value in found if value is not None]
    assert all(type(value) is float and low <= value <= high for value in known)
    assert len(set(known)) > 1
    # Each row for itself: alone, and in any order.
    assert [reward([c], problems[:1])[0] for c in rows] == found
    order = random.Random(1).sample(range(60), 60)
    assert reward([rows[i] for i in order], problems) == [found[i] for i in order]
    assert reward([], []) == []


@pytest.mark.parametrize("name", REWARDS)
def test_which_rewards_tell_one_wrong_answer_from_another(name):
    """The last column of docs/rewards.md."""
    wrong = [c for c in mixed_rows(2) if c.stop != "infra" and not is_correct(c, problem())]
    differ = len(set(values(REWARDS[name], *wrong))) > 1
    assert differ == (name in {"graded", "soft overlong", "cosine", "repetition"})


def test_lengths_count_tool_output_as_the_budget_does():
    row = replace(completion(RIGHT), token_ids=(1,) * 10, loss_mask=(1,) * 4 + (0,) * 6)
    assert values(soft_overlong, row, max_length=10, cache=5) == [-1.0]
    assert values(cosine_length, row, max_length=10) == [-10.0]


@pytest.mark.parametrize(
    ("reward", "settings", "name", "words"),
    [
        (soft_overlong, dict(max_length=0, cache=1), "max_length", "0: expected an integer >= 1"),
        (soft_overlong, dict(max_length=8.0, cache=1), "max_length", "an integer >= 1"),
        (soft_overlong, dict(max_length=True, cache=1), "max_length", "an integer >= 1"),
        (soft_overlong, dict(max_length=8, cache=0), "cache", "0: expected an integer >= 1"),
        (soft_overlong, dict(max_length=8, cache=-3), "cache", "-3"),
        (soft_overlong, dict(max_length=8, cache=9), "cache", "9: expected at most max_length=8"),
        (cosine_length, dict(max_length=-1), "max_length", "-1"),
        (cosine_length, dict(max_length=8, right_short=-1.0), "right_short", "finite number >= 0"),
        (cosine_length, dict(max_length=8, right_long=math.inf), "right_long", "inf"),
        (cosine_length, dict(max_length=8, wrong_short=0.5), "wrong_short", "0.5: expected a"),
        (cosine_length, dict(max_length=8, wrong_long=1), "wrong_long", "finite number <= 0"),
        (cosine_length, dict(max_length=8, exceed=math.nan), "exceed", "nan"),
        (cosine_length, dict(max_length=8, exceed="-1"), "exceed", "finite number <= 0"),
        (repetition_penalty, dict(ngram=0), "ngram", "0: expected an integer >= 1"),
        (repetition_penalty, dict(ngram=2.5), "ngram", "2.5"),
        (repetition_penalty, dict(max_penalty=0.1), "max_penalty", "0.1: expected a finite"),
        (repetition_penalty, dict(max_penalty=-math.inf), "max_penalty", "-inf"),
        (repetition_penalty, dict(max_penalty=None), "max_penalty", "None"),
    ],
)
def test_settings_that_cannot_be_meant_are_named(reward, settings, name, words):
    for rows in ([], [completion()]):  # before anything is scored
        with pytest.raises(ConfigError) as caught:
            reward(rows, [problem()] * len(rows), **settings)
        assert isinstance(caught.value, ValueError)
        assert str(caught.value).startswith(f"{name}=")
        assert words in str(caught.value)


@pytest.mark.parametrize("otherwise", [math.nan, math.inf, None, "0", True])
def test_a_closed_gate_gives_a_finite_number(otherwise):
    with pytest.raises(ConfigError, match=r"otherwise=.*a finite number"):
        Gated(lengths, ended, otherwise=otherwise)


def test_zero_penalties_are_allowed_for_sweeps():
    assert values(repetition_penalty, written([1] * 9), ngram=1, max_penalty=0) == [0.0]


def test_counts_that_differ_are_refused_where_problems_are_read():
    for reward in (graded, partial(cosine_length, max_length=8), on_right(lengths)):
        with pytest.raises(ValueError, match="zip"):
            reward([completion()] * 2, [problem()])
