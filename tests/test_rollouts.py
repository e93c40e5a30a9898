"""Which groups a step draws, which it trains on, and the figures it reports."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import coin, run_steps, tiny_config

from rlkit import advantages, runs, templates
from rlkit.batching import refill_indices, window_indices
from rlkit.completion import Completion
from rlkit.config import ConfigError, RunConfig
from rlkit.rollouts import Window, roll_out, rollout_columns, step_metrics
from rlkit.trainer import train_rl

POOL = [
    {"problem_id": f"p{i}", "prompt": [], "answer": "1", "answer_type": "integer"}
    for i in range(12)
]
FLAT = [0.0, 0.0, 0.0, 0.0]
MIXED = [1.0, 0.0, 0.0, 0.0]


class Script:
    """A sampler whose completions say which problem they are of, and rewards by problem."""

    def __init__(self, rewards: Mapping[str, Sequence[float | None]]) -> None:
        self.rewards = rewards
        self.calls: list[list[str]] = []

    def sample(self, rows: Sequence[Mapping[str, Any]]) -> list[list[Completion]]:
        self.calls.append([row["problem_id"] for row in rows])
        return [
            [
                Completion.from_text(f"{row['problem_id']}/{j}", token_ids=[5, 6], stop="length")
                for j in range(4)
            ]
            for row in rows
        ]

    def reward(
        self, completions: Sequence[Completion], problems: Sequence[Mapping[str, Any]], /, **_: Any
    ) -> list[float | None]:
        values = []
        for completion, problem in zip(completions, problems, strict=True):
            name, sample = completion.text.split("/")
            assert name == problem["problem_id"]
            values.append(self.rewards[name][int(sample)])
        return values


def scripted(
    rewards: Callable[[int], Sequence[float | None]], pool: int = 12, step: int = 1, **params: Any
) -> tuple[Window, Script, RunConfig]:
    """Roll out four groups of four where problem i of ``pool`` earns ``rewards(i)``."""
    config = tiny_config(Path("unused"), **params)
    script = Script({row["problem_id"]: rewards(i) for i, row in enumerate(POOL[:pool])})
    window = roll_out(config, step, POOL[:pool], script.sample, [("scripted", script.reward, 1.0)])
    return window, script, config


def ids(window: Window, groups: Sequence[int]) -> list[str]:
    return [window.problems[g]["problem_id"] for g in groups]


def test_refilled_problems_are_new_and_depend_on_the_arguments_alone() -> None:
    taken = [3, 1, 4]
    first = refill_indices(0, 1, 1, 12, taken, 5)
    assert first == refill_indices(0, 1, 1, 12, taken, 5)
    assert len(set(first)) == 5 and not set(first) & set(taken)
    assert set(first) <= set(range(12))
    others = [
        refill_indices(1, 1, 1, 12, taken, 5),
        refill_indices(0, 2, 1, 12, taken, 5),
        refill_indices(0, 1, 2, 12, taken, 5),
    ]
    assert all(other != first for other in others)
    # Never more than there are; nothing is asked for, nothing is given.
    assert sorted(refill_indices(0, 1, 1, 6, [0, 2], 50)) == [1, 3, 4, 5]
    assert refill_indices(0, 1, 1, 4, range(4), 2) == []
    assert refill_indices(0, 1, 1, 12, taken, 0) == []


def test_refilling_has_no_favourite_problem() -> None:
    drawn = Counter(i for step in range(1, 1201) for i in refill_indices(0, step, 1, 12, [0], 2))
    # 11 problems share 2400 draws: 218 each, standard deviation below 15.
    assert set(drawn) == set(range(1, 12))
    assert max(abs(n - 2400 / 11) for n in drawn.values()) < 60


def test_without_refilling_every_group_stays() -> None:
    window, script, config = scripted(lambda i: FLAT if i % 2 else MIXED, step=3)
    expected = [f"p{i}" for i in window_indices(config.seed, 3, 12, 4)]
    assert script.calls == [expected]
    assert ids(window, range(4)) == expected
    assert window.used == (0, 1, 2, 3)
    assert np.array_equal(
        window.advantages, advantages.compute(window.rewards, config.train.advantage)
    )
    assert step_metrics(window)["groups_extra"] == 0
    assert rollout_columns(window)["used"] == [True] * 16


def test_refilling_that_finds_nothing_to_replace_is_the_same_step() -> None:
    plain, script, _ = scripted(lambda i: MIXED)
    refilled, other, _ = scripted(lambda i: MIXED, refill_rounds=3)
    assert script.calls == other.calls and len(other.calls) == 1
    for name in ("problems", "completions", "used"):
        assert getattr(plain, name) == getattr(refilled, name)
    assert np.array_equal(plain.advantages, refilled.advantages)


def test_groups_without_variance_are_replaced_at_their_place() -> None:
    start = window_indices(0, 1, 12, 4)
    dull = {start[1], start[3]}
    window, script, config = scripted(lambda i: FLAT if i in dull else MIXED, refill_rounds=2)
    more = refill_indices(0, 1, 1, 12, start, 2)
    assert script.calls == [[f"p{i}" for i in start], [f"p{i}" for i in more]]  # one round enough
    assert window.used == (0, 4, 2, 5)
    assert ids(window, window.used) == [
        f"p{start[0]}",
        f"p{more[0]}",
        f"p{start[2]}",
        f"p{more[1]}",
    ]
    assert ids(window, range(6)) == [f"p{i}" for i in [*start, *more]]  # the replaced ones stay
    assert (window.advantages[[1, 3]] == 0).all()
    assert (window.advantages[[0, 2, 4, 5], 0] == 0.75).all()
    assert step_metrics(window)["groups_extra"] == 2
    assert step_metrics(window)["groups_no_signal"] == 2
    columns = rollout_columns(window)
    assert columns["used"] == [g in (0, 2, 4, 5) for g in range(6) for _ in range(4)]
    assert columns["group"] == [g for g in range(6) for _ in range(4)]
    assert columns["text"][4] == f"p{start[1]}/0" and columns["advantage"][4] == 0
    assert config.train.refill_rounds == 2


def test_later_rounds_draw_only_what_is_missing_and_stop_at_the_limit() -> None:
    start = window_indices(0, 1, 12, 4)
    first = refill_indices(0, 1, 1, 12, start, 4)
    useful = {first[2]}
    for rounds, batches in ((1, [4, 4]), (2, [4, 4, 3])):
        window, script, _ = scripted(lambda i: MIXED if i in useful else FLAT, refill_rounds=rounds)
        assert [len(call) for call in script.calls] == batches
        drawn = [name for call in script.calls for name in call]
        assert len(set(drawn)) == len(drawn)  # no problem twice in a step
        # The first empty place gets the useful group, the others keep what they had.
        assert window.used == (6, 1, 2, 3)
        assert np.count_nonzero(window.advantages) == 4
        assert np.flatnonzero(window.advantages.any(axis=1)).tolist() == [6]


def test_a_used_up_pool_ends_the_refilling() -> None:
    window, script, _ = scripted(lambda i: FLAT, pool=7, refill_rounds=9)
    assert [len(call) for call in script.calls] == [4, 3]
    assert sorted(ids(window, range(7))) == [f"p{i}" for i in range(7)]
    assert window.used == (0, 1, 2, 3)
    assert (window.advantages == 0).all()


def test_rows_without_a_reward_count_as_no_variance() -> None:
    start = window_indices(0, 1, 12, 4)
    broken: list[float | None] = [None, None, None, 1.0]
    window, _, _ = scripted(lambda i: broken if i == start[0] else MIXED, refill_rounds=1)
    assert window.used == (4, 1, 2, 3)
    assert np.isnan(window.rewards[0, :3]).all()
    assert (window.advantages[0] == 0).all()


@pytest.mark.parametrize("method", ["batch_std", "reinforce_pp", "group_std", "rloo"])
def test_advantages_know_only_the_groups_that_are_trained_on(method: str) -> None:
    start = window_indices(0, 1, 12, 4)
    values = np.random.default_rng(0).normal(size=(12, 4))
    # A replaced group far from the others would change a mean or deviation over all drawn ones.
    window, _, _ = scripted(
        lambda i: [100.0] * 4 if i == start[2] else list(values[i]),
        refill_rounds=1,
        advantage=method,
    )
    assert window.used == (0, 1, 4, 3)
    used = window.rewards[[0, 1, 4, 3]]
    assert np.array_equal(window.advantages[[0, 1, 4, 3]], advantages.compute(used, method))
    assert (window.advantages[2] == 0).all()
    if method in ("batch_std", "reinforce_pp"):
        over_all = advantages.compute(window.rewards, method)[[0, 1, 4, 3]]
        assert not np.allclose(over_all, window.advantages[[0, 1, 4, 3]], atol=0.1)


def test_negative_rounds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"refill_rounds=-1: expected a number >= 0"):
        tiny_config(Path("unused"), refill_rounds=-1)


def even_first_token(
    completions: Sequence[Completion], problems: Sequence[Mapping[str, Any]], /, **_: Any
) -> list[float | None]:
    """0 for most problems: their groups have no variance; else whether the first id is even."""
    return [
        float(c.token_ids[0] % 2 == 0) if int(str(p["problem_id"])[-1], 16) % 3 == 0 else 0.0
        for c, p in zip(completions, problems, strict=True)
    ]


def test_training_with_refilling_uses_the_replacements(model: Path, tmp_path: Path) -> None:
    config = tiny_config(model, steps=2, train_problems=40, refill_rounds=2, micro_batch_size=4)
    windows, numbers, made = run_steps(config, [("first", even_first_token, 1.0)], tmp_path)
    assert any(len(w.problems) > 4 for w in windows)
    for window, row in zip(windows, numbers, strict=True):
        assert len(window.used) == 4
        used = window.advantages[list(window.used)]
        # Rows with signal, and one row to keep each of the four parts from being empty.
        assert row["rows_trained"] == max(4, np.count_nonzero(used))
        assert row["logp_difference"] < 1e-5
    again, _, _ = run_steps(config, [("first", even_first_token, 1.0)], tmp_path)
    assert [w.used for w in again] == [w.used for w in windows]
    assert [w.completions for w in again] == [w.completions for w in windows]
    # What is trained on are the replacements, not the first four groups.
    window = windows[-1]
    made.window = window
    prompts, trained, *_ = made._generate([])
    used = [(window.problems[g], c) for g in window.used for c in window.completions[g]]
    assert trained == [list(c.token_ids) for _, c in used]
    assert prompts == templates.encode([row for row, _ in used], made.engine.tokenizer)


def test_the_run_folder_holds_every_drawn_completion(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("RLKIT_HEADLESS", "1")
    # A random-weight model is never right: without variance, every round draws new groups.
    config = tiny_config(
        model, steps=2, reward="accuracy", allow_exploitable=False, train_problems=40,
        refill_rounds=2,
    )  # fmt: skip
    path = train_rl(config)
    rollouts, metrics = runs.read_rollouts(path), runs.read_metrics(path)
    assert metrics["completions"].tolist() == [48, 96]
    assert metrics["groups_extra"].tolist() == [8, 8]
    assert metrics["tokens"].iloc[-1] == rollouts["n_tokens"].sum()
    assert len(rollouts) == 96
    for _, step in rollouts.groupby("step"):
        assert step["problem_id"].nunique() == 12
        assert step["used"].sum() == 16
        assert set(step[step["used"]]["group"]) == {0, 1, 2, 3}
    assert (rollouts["advantage"] == 0).all()


def made(
    logprobs: Sequence[float] | None, mask: Sequence[int], text: str, stop: str = "eos"
) -> Completion:
    completion = Completion.from_text(
        text,
        token_ids=range(len(mask)),
        stop=stop,  # type: ignore[arg-type]
        logprobs=None if logprobs is None else tuple(logprobs),
    )
    return dataclasses.replace(completion, loss_mask=tuple(mask))


def hand_made(completions: list[list[Completion]], correct: list[list[bool]]) -> Window:
    shape = np.array(correct).shape
    values = np.array(correct, dtype=np.float64)
    return Window(
        step=3, problems=tuple(POOL[: shape[0]]), completions=completions, parts={"a": values},
        rewards=values, correct=np.array(correct), kept=np.ones(shape, dtype=bool), used=(0,),
        advantages=np.zeros(shape), seconds_generate=0.5, seconds_reward=0.25,
    )  # fmt: skip


def test_figures_of_a_step_on_a_hand_made_window() -> None:
    window = hand_made(
        [
            [made([-1.0, -2.0], [1, 1], r"\boxed{1}"), made([-4.0], [1], "<think>no", "length")],
            # The tool's output (mask 0) has no probability under the policy: it does not count.
            [made([-3.0, -90.0, -5.0], [1, 0, 1], r"<think>a</think>\boxed{1}"),
             made(None, [1, 1, 1], r"\boxed{1}")],
        ],
        [[True, False], [True, True]],
    )  # fmt: skip
    row = step_metrics(window)
    assert row["entropy"] == pytest.approx((1 + 2 + 4 + 3 + 5) / 5)
    assert row["accuracy"] == 0.75  # over both groups, used or not
    assert (row["reward"], row["rewards/a/mean"]) == (0.75, 0.75)
    assert row["reward_std"] == pytest.approx(math.sqrt(0.75 * 0.25))
    assert row["completion_ratio"] == 0.75
    assert row["length_mean"] == (2 + 1 + 3 + 3) / 4
    assert row["length_right"] == pytest.approx((2 + 3 + 3) / 3)
    assert row["length_wrong"] == 1
    assert row["reasoning_rate"] == 0.5
    assert row["several_answers_ratio"] == 0
    assert (row["groups_all_right"], row["groups_all_wrong"], row["groups_mixed"]) == (1, 0, 1)
    assert (row["groups_no_signal"], row["groups_extra"]) == (1, 1)
    assert (row["seconds_generate"], row["seconds_reward"]) == (0.5, 0.25)


def test_absent_means_are_none() -> None:
    window = hand_made([[made(None, [1], "a"), made(None, [1], "b")]], [[False, False]])
    row = step_metrics(dataclasses.replace(window, rewards=np.full((1, 2), np.nan)))
    assert row["entropy"] is None
    assert row["length_right"] is None
    assert row["reward"] is None and row["reward_std"] is None
    assert (row["groups_all_wrong"], row["groups_no_signal"]) == (1, 1)


def test_reported_entropy_estimates_the_entropy_of_the_policy(model: Path, tmp_path: Path) -> None:
    """Untrained, this model is nearly uniform: log(vocabulary), over many drawn tokens."""
    config = tiny_config(model, steps=1, batch_size=64, rollouts=16, micro_batch_size=64)
    windows, _, trainer = run_steps(config, [("coin", coin, 1.0)], tmp_path)
    vocabulary = trainer.policy.get_output_embeddings().weight.shape[0]
    assert step_metrics(windows[0])["entropy"] == pytest.approx(math.log(vocabulary), abs=0.02)


def first_two(values: Any, completions: Any, problems: Any) -> Any:
    """A filter that keeps the first two samples of every group."""
    return np.broadcast_to(np.arange(values.shape[1]) < 2, values.shape).copy()


def filtered(
    rewards: Callable[[int], Sequence[float | None]], group_filter: Any, **params: Any
) -> Window:
    config = tiny_config(Path("unused"), **params)
    script = Script({row["problem_id"]: rewards(i) for i, row in enumerate(POOL)})
    paid = [("scripted", script.reward, 1.0)]
    return roll_out(config, 1, POOL, script.sample, paid, group_filter)


def test_what_a_filter_drops_leaves_the_baseline() -> None:
    window = filtered(lambda i: [1.0, 0.0, 1.0, 1.0], first_two, advantage="group_mean")
    assert window.rewards.tolist() == [[1.0, 0.0, 1.0, 1.0]] * 4  # as they were given
    assert window.kept.tolist() == [[True, True, False, False]] * 4
    assert window.advantages.tolist() == [[0.5, -0.5, 0.0, 0.0]] * 4  # the mean of two, not of four
    row = step_metrics(window)
    assert (row["reward"], row["kept_ratio"], row["groups_no_signal"]) == (0.75, 0.5, 0)
    assert rollout_columns(window)["kept"] == [True, True, False, False] * 4


def test_groups_that_are_flat_among_the_kept_are_refilled() -> None:
    def rewards(i: int) -> list[float]:
        return [1.0, 0.0, 0.0, 0.0] if i % 2 else [1.0, 1.0, 0.0, 0.0]

    plain = filtered(rewards, None, refill_rounds=3)
    assert len(plain.problems) == 4  # all four samples counted, every group has variance
    window = filtered(rewards, first_two, refill_rounds=3)
    assert len(window.problems) > 4
    assert all(int(name[1:]) % 2 for name in ids(window, window.used))
    assert (np.abs(window.advantages[list(window.used)]).sum(axis=1) > 0).all()


def test_a_filter_sees_each_group_with_its_problem() -> None:
    seen: list[str] = []

    def look(values: Any, completions: Any, problems: Any) -> Any:
        for number, (group, problem) in enumerate(zip(completions, problems, strict=True)):
            texts = [c.text for c in group]
            assert texts == [f"{problem['problem_id']}/{j}" for j in range(4)]
            assert values[number].tolist() == MIXED
            seen.append(problem["problem_id"])
        return np.zeros(values.shape, dtype=bool)

    window = filtered(lambda i: MIXED, look)
    assert seen == ids(window, range(4))
    assert not window.advantages.any()
    assert step_metrics(window)["groups_no_signal"] == 4


def test_answers_that_do_not_count_are_reported() -> None:
    texts = [r"\boxed{1} or \boxed{2}", r"<think>\boxed{3}</think>\boxed{2}", "2", ""]
    group = [made(None, [1], text) for text in texts]
    window = hand_made([group], [[False] * 4])
    assert rollout_columns(window)["answer"] == ["2", "2", "", ""]
    assert rollout_columns(window)["other_answers"] == [["1"], [], [], []]
    assert step_metrics(window)["several_answers_ratio"] == 0.25
