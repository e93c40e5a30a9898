"""Rewards that are wrong on purpose: exact tables, error rates, and what the errors depend on."""

import pytest

from rlkit.completion import Completion
from rlkit.spurious import any_box, format_reward, inverted, majority, noisy_accuracy


def problem(name="p", answer="7"):
    return {"problem_id": name, "answer": answer, "answer_type": "integer"}


def row(text, stop="eos"):
    return Completion.from_text(text, stop=stop)


def box(value):
    return row(rf"\boxed{{{value}}}")


def values(reward, *rows, **settings):
    return reward(list(rows), [problem()] * len(rows), **settings)


def test_inverted_pays_wrong_answers_in_good_form():
    rows = [
        box(8),
        box(7),
        row(r"\boxed{8}", "length"),
        row("8"),
        row(r"\boxed{8}\boxed{9}"),
        row(r"\boxed{}"),
        row(r"\boxed{8}", "infra"),
        box("no number"),
    ]
    assert values(inverted, *rows) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, None, 1.0]
    assert values(inverted, row("<answer>8</answer>"), format="none") == [1.0]


def test_majority_pays_the_most_frequent_answer_right_or_wrong():
    rows = [box(8), box(7), box(8), box("08"), row(r"\boxed{7}", "length"), row("7"), box(7)]
    assert values(majority, *rows) == [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def test_majority_votes_inside_each_problem():
    rows = [box(1), box(2), box(2), box(2), box(1), box(1)]
    problems = [problem(name) for name in "ababab"]
    # a: 1, 2, 1 -> 1; b: 2, 2, 1 -> 2
    assert majority(rows, problems) == [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]


def test_majority_without_any_vote_pays_nobody_and_ties_go_to_the_first():
    assert values(majority, row("7"), row("", "length")) == [0.0, 0.0]
    assert values(majority, box(9), box(7), box(7), box(9)) == [1.0, 0.0, 0.0, 1.0]
    assert values(majority, box(7), row(r"\boxed{7}", "infra")) == [1.0, None]


def test_a_verifier_without_errors_is_accuracy():
    rows = [box(7), box(8), row("7"), row(r"\boxed{7}", "length"), row(r"\boxed{7}", "infra")]
    for noise in ("independent", "structured"):
        assert values(noisy_accuracy, *rows, noise=noise) == [1.0, 0.0, 0.0, 0.0, None]


def test_a_verifier_that_always_errs_still_pays_nothing_malformed():
    rows = [box(7), box(8), row("8"), row(r"\boxed{8}", "length"), row(r"\boxed{8}", "infra")]
    paid = values(noisy_accuracy, *rows, false_positive=1.0, false_negative=1.0)
    assert paid == [0.0, 1.0, 0.0, 0.0, None]


@pytest.mark.parametrize("noise", ["independent", "structured"])
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
def test_error_rates(noise, rate):
    count = 20_000
    wrong = [box(1000 + i) for i in range(count)]
    problems = [problem(str(i), str(10**6 + i)) for i in range(count)]
    right = [box(10**6 + i) for i in range(count)]
    error = 4 * (rate * (1 - rate) / count) ** 0.5
    for seed in (0, 1):
        settings = {"noise": noise, "seed": seed, "step": 3}
        accepted = noisy_accuracy(wrong, problems, false_positive=rate, **settings)
        rejected = noisy_accuracy(right, problems, false_negative=rate, **settings)
        assert abs(sum(accepted) / count - rate) < error
        assert abs(1 - sum(rejected) / count - rate) < error


def test_structured_errors_are_a_function_of_the_answer_and_independent_ones_are_not():
    rows = [box(i % 50) for i in range(2000)]
    problems = [problem(str(i), "999") for i in range(2000)]
    settings = {"false_positive": 0.2, "seed": 4}
    fixed = noisy_accuracy(rows, problems, noise="structured", step=1, **settings)
    assert fixed == noisy_accuracy(rows, problems, noise="structured", step=2, **settings)
    assert all(fixed[i] == fixed[i % 50] for i in range(2000))
    assert 0 < sum(fixed[:50]) < 25
    loose = noisy_accuracy(rows, problems, noise="independent", step=1, **settings)
    assert loose == noisy_accuracy(rows, problems, noise="independent", step=1, **settings)
    assert loose != noisy_accuracy(rows, problems, noise="independent", step=2, **settings)
    spread = {sum(loose[i::50]) for i in range(50)}
    assert len(spread) > 3  # every answer is accepted now and then
    # Equal numbers are equal answers.
    assert values(noisy_accuracy, box("05"), noise="structured", **settings) == values(
        noisy_accuracy, box("5"), noise="structured", **settings
    )


def test_any_box_pays_many_boxes_and_reads_the_reasoning():
    rows = [
        box(7),
        row(r"\boxed{1}\boxed{7}\boxed{2}"),
        row(r"<think>\boxed{7}</think>\boxed{8}"),
        row(r"\boxed{7}", "length"),
        row("7"),
        box(8),
        row(r"\boxed{7}", "infra"),
    ]
    assert values(any_box, *rows) == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, None]


def test_form_is_paid_only_to_what_ended():
    zero = "<think> a </think> <answer> 5 </answer>"
    rows = [row(zero), row(zero, "length"), row(r"\boxed{5}"), row(zero, "infra")]
    assert values(format_reward, *rows, format="zero") == [1.0, 0.0, 0.0, None]
