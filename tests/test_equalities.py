"""Ways to compute one and the same update: each must give the gradient of the plain one.

Gradients are those that the optimizer sees, all parameters as one vector, before clipping.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_tiny_model, tiny_config
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from rlkit import grpo, models, rewards, tasks, templates
from rlkit.batching import Tensors
from rlkit.completion import Completion
from rlkit.engine import Engine, Sampling, end_token_ids, stable_key
from rlkit.grpo import RolloutTrainer
from rlkit.rollouts import Row, Window

TOLERANCE = 1e-5  # relative distance of two gradients of the same weights
LATER = 1e-3  # the same after an update: Adam divides rounding errors by small moments
ONE = torch.tensor(1.0)
LOSSES = ("grpo", "dr_grpo", "dapo")

# Rewards of 4 groups of 4; in ONE_ZERO also a row whose advantage is 0 in a group with signal.
SIGNAL = [0, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 1]
ONE_ZERO = [1, 0, 0, 0, 1, 1, 1, 1, 0, 0.5, 1, 0.5, 0, 0, 0, 0]
SECOND_HALF = [1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1]
ONE_GROUP = [0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1]
NOTHING = [1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]


@functools.cache
def loaded(model: Path) -> tuple[models.Policy, PreTrainedTokenizerBase]:
    return models.load_policy(tiny_config(model).model)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that draw different tokens in different contexts and end about every other row."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    policy, tokenizer = models.load_policy(tiny_config(folder).model)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "norm" not in name:
                parameter.mul_(8)
        text = torch.randint(5, 100, (8, 20), generator=torch.Generator().manual_seed(0))
        usual = policy.model(text).last_hidden_state.mean((0, 1))  # type: ignore[operator]
        # A head row along the mean hidden state makes its token likely in any context.
        policy.get_input_embeddings().weight[tokenizer.eos_token_id] = usual / usual.norm()
    policy.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Update:
    """One training run: ``gradients`` [parameters] and ``numbers``, per update and per step."""

    gradients: list[Tensor]
    numbers: list[dict[str, float]]
    windows: list[Window]
    weights: Tensor


class _Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = [p.grad for p in kwargs["model"].parameters()]
        assert all(g is not None for g in found)
        self.seen.append(torch.cat([g.flatten() for g in found]))  # copies


def run(
    model: Path,
    folder: Path,
    values: Sequence[float | None],
    *,
    made_by: type[RolloutTrainer] = RolloutTrainer,
    change: Callable[[RolloutTrainer], None] | None = None,
    **params: Any,
) -> Update:
    """Train ``steps`` (default 1) on given rewards; ``change`` may alter the trainer first."""
    defaults = {"steps": 1, "max_completion_length": 24, "max_grad_norm": 1e9, "beta": 0.0,
                "learning_rate": 1e-2, "lr_schedule": "constant"}  # fmt: skip
    settings = tiny_config(model, **{**defaults, **params})
    set_seed(settings.seed)
    start, tokenizer = loaded(model)
    policy = copy.deepcopy(start)
    problems = tasks.load_problems("chain", "train", 12)
    windows: list[Window] = []
    numbers: list[dict[str, float]] = []

    def on_step(window: Window, row: dict[str, float]) -> bool:
        windows.append(window)
        numbers.append(row)
        return False

    def given(
        completions: Sequence[Completion], problems: Sequence[Mapping[str, Any]], /, **info: Any
    ) -> list[float | None]:
        return [None if v is None else float(v) for v in values]

    reward_fns: list[tuple[str, rewards.RewardFn, float]] = [("given", given, 1.0)]
    made = made_by(settings, policy, tokenizer, problems, reward_fns, on_step, folder)
    gradients = _Gradients()
    made.add_callback(gradients)
    if change is not None:
        change(made)
    made.run()
    weights = torch.cat([p.detach().flatten() for p in policy.parameters()])
    return Update(gradients.seen, numbers, windows, weights)


def unpacked(made: RolloutTrainer) -> None:
    made._packed = False


def assert_same(a: Update, b: Update, names: Sequence[str] = ("loss", "clip_ratio", "kl")) -> None:
    """Equal gradients of every update and equal numbers of every step; ``b`` is the plain one."""
    assert len(a.gradients) == len(b.gradients)
    for i, (one, other) in enumerate(zip(a.gradients, b.gradients, strict=True)):
        apart, norm = float((one - other).norm()), float(other.norm())
        # Exactly 0 where no row carries signal.
        assert apart <= norm * (TOLERANCE if i == 0 else LATER), (
            f"update {i + 1}: {apart:.1e} of {norm:.1e}"
        )
    assert any(g.any() for g in b.gradients)
    for row, plain in zip(a.numbers, b.numbers, strict=True):
        for name in names:
            assert row[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-6, nan_ok=True), name


def whole_rows(
    batch: Tensors, updates: int, size: int, *, drop_no_signal: bool = False
) -> list[Tensors]:
    """What ``micro_batches`` stands for: rows in order, full width, nothing left out."""
    per_row = {k: v for k, v in batch.items() if v.dim()}
    shared = {k: v for k, v in batch.items() if not v.dim()}
    rows = torch.arange(len(batch["advantages"]))
    return [
        {
            **shared,
            **{k: v[part] for k, v in per_row.items()},
            "loss_scale": ONE,
            "token_share": ONE,
        }
        for part in rows.split(size)
    ]


OBJECTIVES = {
    **{f"{loss}, on-policy": {"loss_type": loss} for loss in LOSSES},
    **{f"{loss}, two updates": {"loss_type": loss, "updates_per_batch": 2} for loss in LOSSES},
    "KL": {"beta": 0.3, "updates_per_batch": 2},
    "KL, corrected": {"beta": 0.3, "updates_per_batch": 2, "kl_estimator": "k3_corrected"},
    "entropy bonus": {"entropy_coef": 0.1},
    "KL and entropy bonus": {"beta": 0.1, "entropy_coef": 0.1, "updates_per_batch": 2},
    "masked": {"mask_truncated": True, "temperature": 1.3},
}


@pytest.mark.parametrize("params", OBJECTIVES.values(), ids=OBJECTIVES)
def test_packed_equals_padded(model: Path, tmp_path: Path, params: dict[str, Any]) -> None:
    """``rlkit.forward`` against TRL's own pass, micro-batches of 4 rows."""
    params = {"micro_batch_size": 4, **params}
    ours = run(model, tmp_path, ONE_ZERO, **params)
    trl = run(model, tmp_path, ONE_ZERO, change=unpacked, **params)
    assert_same(ours, trl)
    if params.get("updates_per_batch") == 2:
        assert ours.numbers[0]["clip_ratio"] > 0.01  # the second update was off-policy
    if params.get("beta"):
        assert ours.numbers[0]["kl"] > 0


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_sorted_and_trimmed_equals_whole_rows(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loss: str,
    updates: int,
    packed: bool,
) -> None:
    params: dict[str, Any] = {
        "loss_type": loss, "updates_per_batch": updates, "micro_batch_size": 4,
        "drop_no_signal": False, "change": None if packed else unpacked,
    }  # fmt: skip
    ours = run(model, tmp_path, SIGNAL, **params)
    widths = {len(c.token_ids) for g in ours.windows[0].completions for c in g}
    assert len(widths) > 4
    monkeypatch.setattr(grpo, "micro_batches", whole_rows)
    assert_same(ours, run(model, tmp_path, SIGNAL, **params))


def test_more_padding_changes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns of padding on both sides of whole rows, with everything that has a column."""

    def wider(*args: Any, **options: Any) -> list[Tensors]:
        def widen(key: str, value: Tensor) -> Tensor:
            if value.dim() < 2:
                return value
            return pad(value, (5, 0) if key.startswith("prompt") else (0, 7), value=0)

        return [{k: widen(k, v) for k, v in p.items()} for p in whole_rows(*args, **options)]

    params: dict[str, Any] = {"updates_per_batch": 2, "micro_batch_size": 4, "beta": 0.1}
    for change in (None, unpacked):
        with monkeypatch.context() as patch:
            ours = run(model, tmp_path, SIGNAL, change=change, **params)
            patch.setattr(grpo, "micro_batches", wider)
            assert_same(ours, run(model, tmp_path, SIGNAL, change=change, **params))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("updates", [1, 2])
def test_one_pass_of_all_rows_equals_eight(
    model: Path, tmp_path: Path, loss: str, updates: int
) -> None:
    params: dict[str, Any] = {
        "loss_type": loss, "updates_per_batch": updates, "beta": 0.1, "entropy_coef": 0.1,
    }  # fmt: skip
    one = run(model, tmp_path, SIGNAL, micro_batch_size=16 // updates, **params)
    eight = run(model, tmp_path, SIGNAL, micro_batch_size=2 // updates, **params)
    assert_same(one, eight)


DROPS = {
    # rewards, rows that carry signal in each half of the batch
    "some": (ONE_ZERO, (4, 2)),
    "first update empty": (SECOND_HALF, (0, 8)),
    "one group": (ONE_GROUP, (0, 4)),
}


@pytest.mark.parametrize(("values", "signal"), DROPS.values(), ids=DROPS)
@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_without_signal_can_be_left_out(
    model: Path,
    tmp_path: Path,
    loss: str,
    updates: int,
    values: list[float],
    signal: tuple[int, int],
) -> None:
    params: dict[str, Any] = {"loss_type": loss, "updates_per_batch": updates}
    plain = run(model, tmp_path, values, drop_no_signal=False, micro_batch_size=8, **params)
    assert plain.numbers[0]["rows_trained"] == 16
    if updates == 2 and signal[0] == 0:
        assert not plain.gradients[0].any()
    elif updates == 2:
        assert plain.numbers[0]["clip_ratio"] > 0
    for size in (16 // updates, 2):
        ours = run(model, tmp_path, values, drop_no_signal=True, micro_batch_size=size, **params)
        # A part needs a row: an update without signal keeps one in each of its parts.
        parts = 16 // size // updates
        per_update = [sum(signal)] if updates == 1 else list(signal)
        assert ours.numbers[0]["rows_trained"] == sum(max(parts, rows) for rows in per_update)
        assert_same(ours, plain)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("updates", [1, 2])
def test_a_step_without_any_signal_moves_nothing(
    model: Path, tmp_path: Path, loss: str, updates: int
) -> None:
    for drop, trained in ((True, 4), (False, 16)):
        params: dict[str, Any] = {
            "loss_type": loss, "updates_per_batch": updates, "micro_batch_size": 4,
        }  # fmt: skip
        found = run(model, tmp_path, NOTHING, drop_no_signal=drop, **params)
        assert len(found.gradients) == updates
        assert not any(g.any() for g in found.gradients)
        (row,) = found.numbers
        assert row["rows_trained"] == trained
        assert (row["loss"], row["grad_norm"], row["clip_ratio"]) == (0, 0, 0)
        start, _ = loaded(model)
        assert torch.equal(found.weights, torch.cat([p.flatten() for p in start.parameters()]))


def test_rows_that_a_mask_leaves_out_are_dropped_too(model: Path, tmp_path: Path) -> None:
    params: dict[str, Any] = {"mask_truncated": True, "micro_batch_size": 4}
    ours, plain = (
        run(model, tmp_path, SIGNAL, drop_no_signal=drop, **params) for drop in (True, False)
    )
    ended = sum(c.reached_end for group in ours.windows[0].completions for c in group)
    assert 4 < ended < 16
    assert [u.numbers[0]["rows_trained"] for u in (ours, plain)] == [ended, 16]
    assert_same(ours, plain)


@pytest.mark.parametrize("params", [{"beta": 0.1}, {"entropy_coef": 0.1}], ids=str)
def test_nothing_is_dropped_where_every_row_counts(
    model: Path, tmp_path: Path, params: dict[str, Any]
) -> None:
    found = run(model, tmp_path, ONE_ZERO, micro_batch_size=4, **params)
    assert found.numbers[0]["rows_trained"] == 16


def test_rows_are_dropped_once_the_kl_coefficient_has_reached_zero(
    model: Path, tmp_path: Path
) -> None:
    params: dict[str, Any] = {
        "beta": 0.1, "kl_schedule": "linear", "steps": 3, "micro_batch_size": 4,
    }  # fmt: skip
    ours = run(model, tmp_path, ONE_ZERO, **params)
    plain = run(model, tmp_path, ONE_ZERO, drop_no_signal=False, **params)
    assert [row["rows_trained"] for row in ours.numbers] == [16, 16, 6]
    assert [row["rows_trained"] for row in plain.numbers] == [16, 16, 16]
    assert [row["beta"] for row in ours.numbers] == [0.1, 0.05, 0]
    assert_same(ours, plain)


class Greedy(RolloutTrainer):
    """Draws with our engine; the most likely token each time."""

    def sample(self, rows: Sequence[Row], purpose: str, step: int) -> list[list[Completion]]:
        settings = self.run_config
        return self.engine.generate(
            templates.encode(rows, self._tokenizer, settings.task.template),
            Sampling(settings.sampling.max_completion_length, greedy=True),
            n=settings.train.rollouts,
            keys=[stable_key(settings.seed, purpose, step, row["problem_id"]) for row in rows],
        )


class GreedyByTransformers(RolloutTrainer):
    """The same with ``generate`` of transformers."""

    def sample(self, rows: Sequence[Row], purpose: str, step: int) -> list[list[Completion]]:
        model: Any = self.accelerator.unwrap_model(self.model)
        budget = self.run_config.sampling.max_completion_length
        ends = end_token_ids(model, self._tokenizer)
        groups = []
        model.eval()
        for prompt in templates.encode(rows, self._tokenizer, self.run_config.task.template):
            with torch.no_grad():
                out = model.generate(
                    torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                    do_sample=False,
                    max_new_tokens=budget,
                )
            ids = out[0, len(prompt) :].tolist()
            stop = "eos" if ids[-1] in ends else "length"
            drawn = Completion.from_ids(ids, self._tokenizer, stop=stop, end_ids=ends)
            groups.append([drawn] * self.run_config.train.rollouts)
        model.train()
        return groups


def test_engine_and_generate_train_the_same_weights(model: Path, tmp_path: Path) -> None:
    ours, theirs = (
        run(model, tmp_path, SIGNAL, made_by=kind, steps=3, advantage="group_std")
        for kind in (Greedy, GreedyByTransformers)
    )
    drawn = [
        [c.token_ids for window in found.windows for group in window.completions for c in group]
        for found in (ours, theirs)
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 6  # different problems, different steps
    assert all(g.norm() > 0 for g in ours.gradients)
    assert torch.equal(ours.weights, theirs.weights)


def test_truncated_rows_weigh_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``mask_truncated`` with the token mean equals a batch from which these rows are removed."""
    ours = run(model, tmp_path, SIGNAL, mask_truncated=True)
    kept = torch.tensor([c.reached_end for group in ours.windows[0].completions for c in group])
    assert 4 < kept.sum() < 16

    def removed(batch: Tensors, *args: Any, **options: Any) -> list[Tensors]:
        assert "tool_mask" not in batch  # nothing is masked on this side
        part = {k: v[kept] for k, v in batch.items() if v.dim()}
        tokens = part["completion_mask"].sum()
        return [{**part, "num_items_in_batch": tokens, "loss_scale": ONE, "token_share": ONE}]

    unmasked = run(model, tmp_path, SIGNAL)
    monkeypatch.setattr(grpo, "micro_batches", removed)
    by_hand = run(model, tmp_path, SIGNAL)
    assert_same(ours, by_hand, names=("loss",))
    apart = (unmasked.gradients[0] - ours.gradients[0]).norm() / ours.gradients[0].norm()
    assert apart > 0.1


def shifted(by: float) -> Callable[[RolloutTrainer], None]:
    """An engine that claims other log-probabilities than it drew with."""

    def change(made: RolloutTrainer) -> None:
        generate = made.engine.generate

        def wrong(*args: Any, **options: Any) -> list[list[Completion]]:
            return [
                [replace(c, logprobs=tuple(v + by for v in c.logprobs or ())) for c in group]
                for group in generate(*args, **options)
            ]

        made.engine.generate = wrong  # type: ignore[method-assign]

    return change


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("mask_truncated", [False, True])
def test_the_distance_between_engine_and_trainer_is_measured(
    model: Path, tmp_path: Path, updates: int, mask_truncated: bool
) -> None:
    params: dict[str, Any] = {
        "updates_per_batch": updates, "micro_batch_size": 4, "mask_truncated": mask_truncated,
        "temperature": 1.3, "steps": 2,
    }  # fmt: skip
    for row in run(model, tmp_path, SIGNAL, **params).numbers:
        assert 0 <= row["logp_difference"] < 1e-5
    for row in run(model, tmp_path, SIGNAL, change=shifted(0.1), **params).numbers:
        assert row["logp_difference"] == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize("updates", [1, 2])
def test_an_unknown_distance_is_not_reported_as_none(
    model: Path, tmp_path: Path, updates: int
) -> None:
    """An engine whose log-probabilities are NaN does not agree with the trainer."""
    found = run(
        model, tmp_path, SIGNAL, change=shifted(float("nan")), updates_per_batch=updates,
        micro_batch_size=4,
    )  # fmt: skip
    assert not found.numbers[0]["logp_difference"] < 1e-5


def test_the_engine_reads_the_weights_of_the_moment(model: Path, tmp_path: Path) -> None:
    """Rollouts of step 2 come from the policy that step 1 made, not from the one at the start."""
    seen: list[Any] = []

    def change(made: RolloutTrainer) -> None:
        sample = made.sample

        def watched(rows: Sequence[Row], purpose: str, step: int) -> list[list[Completion]]:
            drawn = sample(rows, purpose, step)
            policy: Any = made.policy
            fresh = Engine(policy, made._tokenizer).generate(
                templates.encode(rows, made._tokenizer, "question"),
                Sampling(24),
                n=4,
                keys=[stable_key(0, purpose, step, row["problem_id"]) for row in rows],
            )
            seen.append((drawn, fresh))
            return drawn

        made.sample = watched  # type: ignore[method-assign]

    run(model, tmp_path, SIGNAL, change=change, steps=2)
    assert len(seen) == 2
    assert all(drawn == fresh for drawn, fresh in seen)


# The first two of each four, and what the dropped ones are paid: it must not matter.
HALVES = ([1, 0, 9, 9, 0, 1, 5, 0, 1, 0, 1, 1, 0, 0, 7, 1], [1, 0, 0, 1, 1, 0, 0, 0])


def keep_two(made: RolloutTrainer) -> None:
    made._group_filter = lambda rewards, completions, problems: np.broadcast_to(
        np.arange(rewards.shape[1]) < 2, rewards.shape
    ).copy()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_row_without_a_reward_might_as_well_not_have_been_drawn(
    model: Path, tmp_path: Path, loss: str
) -> None:
    params: dict[str, Any] = {"loss_type": loss, "beta": 0.1}
    values = [value if i % 4 < 2 else None for i, value in enumerate(HALVES[0])]
    ours = run(model, tmp_path, values, micro_batch_size=16, **params)
    two = {"batch_size": 8, "rollouts": 2, "micro_batch_size": 8}
    assert_same(ours, run(model, tmp_path, HALVES[1], **two, **params))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("more", [{}, {"beta": 0.1, "entropy_coef": 0.1}], ids=["plain", "kl"])
def test_a_filtered_row_might_as_well_not_have_been_drawn(
    model: Path, tmp_path: Path, loss: str, updates: int, more: dict[str, float]
) -> None:
    """Draws are counted, so two rollouts per prompt are the first two of four."""
    params: dict[str, Any] = {"loss_type": loss, "updates_per_batch": updates, **more}
    part = 16 // updates
    ours = run(model, tmp_path, HALVES[0], change=keep_two, micro_batch_size=part, **params)
    parts = run(model, tmp_path, HALVES[0], change=keep_two, micro_batch_size=2, **params)
    plain = run(
        model, tmp_path, HALVES[1], batch_size=8, rollouts=2, micro_batch_size=part // 2, **params
    )
    for a, b in zip(ours.windows[0].completions, plain.windows[0].completions, strict=True):
        assert [c.token_ids for c in a[:2]] == [c.token_ids for c in b]
    assert_same(ours, plain)
    assert_same(parts, plain)
