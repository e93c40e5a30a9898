from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import trl.trainer.utils as trl_utils
from tiny import coin, even_tokens, run_steps, tiny_config
from trl.trainer.grpo_trainer import GRPOTrainer

from rlkit import (
    advantages,
    arms,
    models,
    runs,
    tasks,
    templates,
    trainer,
)  # fmt: skip
from rlkit.compat import completion_only_head
from rlkit.config import ConfigError
from rlkit.grpo import RolloutTrainer
from rlkit.models import ModelError
from rlkit.preflight import PreflightError
from rlkit.rollouts import step_metrics
from rlkit.runs import RunError
from rlkit.session import TrainingError
from rlkit.trainer import train_rl

CLOCKS = ["seconds_generate", "seconds_reward", "seconds_score", "seconds_train", "seconds_step"]


@pytest.fixture(autouse=True)
def runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("RLKIT_HEADLESS", "1")
    return tmp_path / "runs"


def test_a_run_fills_its_folder(model: Path) -> None:
    path = train_rl(tiny_config(model, steps=2))
    status = runs.read_status(path)
    assert (status.state, status.step, status.checkpoint) == ("done", 2, "step-000002")
    assert any("pays what it should not" in w.message for w in status.warnings)  # recorded
    metrics = runs.read_metrics(path)
    assert metrics["step"].tolist() == [1, 2]
    for key in ("loss", "grad_norm", "learning_rate", "reward", "reward_std", "accuracy",
                "rows_trained", "logp_difference", "groups_extra", "rewards/random/mean",
                "completion_ratio", "length_mean", "length_wrong", "reasoning_rate",
                "entropy", "beta", "clip_ratio", *CLOCKS):  # fmt: skip
        assert metrics[key].notna().all(), key
    assert metrics["kl"].isna().all()  # not measured without a reference
    assert (metrics["logp_difference"] < 1e-5).all()
    assert metrics["completions"].tolist() == [16, 32]
    assert (
        metrics[["groups_all_right", "groups_all_wrong", "groups_mixed"]].sum(axis=1) == 4
    ).all()
    rollouts = runs.read_rollouts(path)
    assert len(rollouts) == 32
    assert rollouts.groupby(["step", "group"])["problem_id"].nunique().eq(1).all()
    for _, group in rollouts.groupby(["step", "group"]):
        assert group["advantage"].sum() == pytest.approx(0)
    assert metrics["tokens"].iloc[-1] == rollouts["n_tokens"].sum()
    assert (rollouts["reward"] == rollouts["reward_random"]).all()
    policy, _ = models.load_policy(tiny_config(runs.final_checkpoint(path)).model)
    start, _ = models.load_policy(tiny_config(model).model)
    moved = [
        not torch.equal(a, b) for a, b in zip(policy.parameters(), start.parameters(), strict=True)
    ]
    assert any(moved)
    assert train_rl(tiny_config(model, steps=2)) == path  # reused, not trained again


def test_same_seed_is_bit_identical_and_evaluation_does_not_disturb(model: Path) -> None:
    config = tiny_config(model, steps=4, updates_per_batch=2, beta=0.05, micro_batch_size=8)
    with_eval = tiny_config(
        model, steps=4, updates_per_batch=2, beta=0.05, micro_batch_size=8,
        eval_every=2, eval_problems=3, eval_samples=2,
    )  # fmt: skip
    found = []
    for cfg in (config, config, with_eval):
        path = train_rl(cfg, fresh=True)
        weights = (runs.final_checkpoint(path) / "model.safetensors").read_bytes()
        found.append(
            (runs.read_metrics(path).drop(columns=CLOCKS), runs.read_rollouts(path), weights)
        )
    for metrics, rollouts, weights in found[1:]:
        pd.testing.assert_frame_equal(metrics, found[0][0], check_exact=True)
        pd.testing.assert_frame_equal(rollouts, found[0][1], check_exact=True)
        assert weights == found[0][2]
    evaluations = sorted(p.name for p in (path / "eval").glob("*.json"))
    assert evaluations == [f"validation-{step:06d}.json" for step in (0, 2, 4)]
    other = train_rl(tiny_config(model, steps=4, seed=1, name="unit-s1"))
    assert not runs.read_rollouts(other)["text"].equals(found[0][1]["text"])


def test_on_policy_ratio_is_exactly_one(model: Path, tmp_path: Path) -> None:
    on = tiny_config(model, steps=3, learning_rate=3e-2, epsilon=1e-6, epsilon_high=1e-6)
    _, numbers, _ = run_steps(on, [("coin", coin, 1.0)], tmp_path)
    # With a clip range of a millionth, any ratio other than 1 would count as clipped.
    assert [n["clip_ratio"] for n in numbers] == [0, 0, 0]
    off = tiny_config(
        model,
        steps=3,
        learning_rate=3e-2,
        epsilon=1e-6,
        epsilon_high=1e-6,
        updates_per_batch=2,
        micro_batch_size=8,
    )
    _, numbers, _ = run_steps(off, [("coin", coin, 1.0)], tmp_path)
    assert all(n["clip_ratio"] > 0.05 for n in numbers)


@pytest.mark.parametrize(
    ("loss_type", "advantage"),
    [("dapo", name) for name in sorted(advantages.METHODS)]
    + [("grpo", "rloo"), ("dr_grpo", "rloo"), ("grpo", "group_std"), ("dr_grpo", "group_mean")],
)
def test_gradient_equals_the_written_formula(
    model: Path, tmp_path: Path, loss_type: str, advantage: str
) -> None:
    """One step of TRL's path against autograd on the definition; micro-batches and masks too."""
    config = tiny_config(
        model, steps=1, loss_type=loss_type, advantage=advantage, micro_batch_size=4,
        mask_truncated=advantage == "rloo", max_grad_norm=1e9, beta=0.0, temperature=1.3,
    )  # fmt: skip
    reward_fns = [("coin", coin, 1.0), ("even", even_tokens, 0.5)]
    windows, numbers, _ = run_steps(config, reward_fns, tmp_path)
    (window,) = windows
    policy, tokenizer = models.load_policy(config.model)
    rows = []
    prompts = templates.encode(window.problems, tokenizer, "question")
    expected = advantages.compute(window.rewards, advantage)
    for prompt, group, weights in zip(prompts, window.completions, expected, strict=True):
        for completion, weight in zip(group, weights, strict=True):
            ids = torch.tensor([[*prompt, *completion.token_ids]])
            logits = policy(ids).logits[0, len(prompt) - 1 : -1] / 1.3
            logp = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
            kept = completion.reached_end or not config.train.mask_truncated
            ratio = torch.exp(logp - logp.detach())
            rows.append(-ratio * float(weight) * float(kept) if kept else ratio * 0)
            rows[-1].kept = len(logp) if kept else 0
    tokens = sum(row.kept for row in rows)
    if loss_type == "dapo":
        loss = sum(row.sum() for row in rows) / max(tokens, 1)
    elif loss_type == "grpo":
        loss = sum(row.sum() / max(row.kept, 1) for row in rows) / len(rows)
    else:
        loss = sum(row.sum() for row in rows) / (len(rows) * 12)
    loss.backward()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in policy.parameters()))
    assert numbers[0]["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert numbers[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_kl_is_the_k3_estimate_against_the_starting_weights(model: Path, tmp_path: Path) -> None:
    config = tiny_config(model, steps=3, beta=0.5, learning_rate=1e-2)
    _, numbers, made = run_steps(config, [("coin", coin, 1.0)], tmp_path)
    assert numbers[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert 0 < numbers[1]["kl"] < numbers[2]["kl"]
    assert made.ref_model is not None
    start, _ = models.load_policy(config.model)
    for name, value in start.state_dict().items():
        assert torch.equal(made.ref_model.state_dict()[name], value), name
    assert made.args.use_bias_correction_kl is False


def test_the_reference_is_the_model_in_memory_not_the_one_on_disk(
    model: Path, tmp_path: Path
) -> None:
    config = tiny_config(model, beta=0.5)
    policy, tokenizer = models.load_policy(config.model)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    changed = copy.deepcopy(policy.state_dict())
    problems = tasks.load_problems("chain", "train", 12)
    made = RolloutTrainer(
        config, policy, tokenizer, problems, [("coin", coin, 1.0)], lambda w, n: False, tmp_path
    )
    assert made.ref_model is not None
    for name, value in made.ref_model.state_dict().items():
        assert torch.equal(value, changed[name]), name


def test_lora_trains_and_its_reference_is_the_base(model: Path) -> None:
    config = tiny_config(model, steps=2, lora_rank=2, beta=0.1, learning_rate=1e-2)
    path = train_rl(config)
    metrics = runs.read_metrics(path)
    assert metrics["kl"].iloc[0] == pytest.approx(0, abs=1e-9)
    assert metrics["kl"].iloc[1] > 0
    again = tiny_config(runs.final_checkpoint(path), steps=1, name="unit-next", beta=0.1)
    assert runs.read_metrics(train_rl(again))["kl"].iloc[0] == pytest.approx(0, abs=1e-9)


def test_a_policy_learns_what_is_rewarded(model: Path, tmp_path: Path) -> None:
    config = tiny_config(
        model, steps=25, batch_size=64, rollouts=8, micro_batch_size=64, learning_rate=1e-2,
        advantage="group_std", lr_schedule="constant",
    )  # fmt: skip
    windows, _, _ = run_steps(config, [("even", even_tokens, 1.0)], tmp_path)
    curve = [float(w.rewards.mean()) for w in windows]
    assert np.mean(curve[:2]) < 0.6
    assert np.mean(curve[-2:]) > 0.9


def test_rows_without_reward_are_left_out(model: Path, tmp_path: Path) -> None:
    def sometimes(completions: Any, problems: Any, /, **info: Any) -> list[float | None]:
        return [None if i % 4 == 0 else float(i % 2) for i in range(len(completions))]

    windows, numbers, _ = run_steps(
        tiny_config(model, steps=1), [("sometimes", sometimes, 1.0)], tmp_path
    )
    assert np.isnan(windows[0].rewards[:, 0]).all()
    assert (windows[0].advantages[:, 0] == 0).all()
    assert step_metrics(windows[0])["reward"] == pytest.approx(2 / 3)
    assert math.isfinite(numbers[0]["loss"])


def test_completion_only_head_changes_no_value(model: Path, tmp_path: Path) -> None:
    config = tiny_config(model)
    _, _, made = run_steps(config, [("coin", coin, 1.0)], tmp_path, untrained=True)
    made._packed = False
    ids = torch.randint(5, 100, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[2, 16:] = 0
    before = trl_utils._use_triton
    everywhere = made._get_per_token_logps_and_entropies(
        made.model, ids, mask, 8, compute_entropy=True
    )
    with completion_only_head():
        assert trl_utils._use_triton is not before
        only = made._get_per_token_logps_and_entropies(
            made.model, ids, mask, 8, compute_entropy=True
        )
    assert trl_utils._use_triton is before
    for a, b in zip(everywhere[:2], only[:2], strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_scoring_rollouts_in_windows_changes_no_value(model: Path, tmp_path: Path) -> None:
    config = tiny_config(model)
    _, _, made = run_steps(config, [("coin", coin, 1.0)], tmp_path, untrained=True)
    made._packed = False
    ids = torch.randint(5, 100, (6, 20), generator=torch.Generator().manual_seed(0))
    prompt, completion = torch.tensor([3, 5, 8, 2, 12, 1]), torch.tensor([1, 8, 2, 3, 7, 5])
    columns = torch.arange(20)
    mask = ((columns >= 12 - prompt[:, None]) & (columns < 12 + completion[:, None])).long()
    with torch.no_grad():
        whole, _, _ = made._get_per_token_logps_and_entropies(made.model, ids, mask, 8)
        cut, _, _ = made._get_per_token_logps_and_entropies(made.model, ids, mask, 8, batch_size=2)
    kept = mask[:, 12:].bool()
    assert torch.allclose(whole[kept], cut[kept], atol=1e-6)
    assert kept.sum() == completion.sum()


def test_stop_command_ends_the_run_with_its_weights(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(model, steps=50)
    record = trainer.RlSession.record

    def then_stop(self: trainer.RlSession, row: Mapping[str, Any]) -> None:
        record(self, row)
        if row["step"] == 2:
            runs.send(self.recorder.path, "stop")

    monkeypatch.setattr(trainer.RlSession, "record", then_stop)
    path = train_rl(config)
    status = runs.read_status(path)
    assert (status.state, status.step, status.control_id) == ("interrupted", 2, 1)
    assert (path / "checkpoints" / status.checkpoint / "model.safetensors").exists()
    assert len(runs.read_metrics(path)) == 2


def test_ctrl_c_leaves_a_readable_folder_and_a_second_call_goes_on_cleanly(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(model, steps=3, micro_batch_size=4)
    whole = runs.read_rollouts(train_rl(config))
    compute = GRPOTrainer._compute_loss
    calls = 0

    def interrupted(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:  # in the middle of step 2's accumulation
            raise KeyboardInterrupt
        return compute(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "_compute_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_rl(config, fresh=True)
    status = runs.read_status(config.name)
    assert (status.state, status.step) == ("interrupted", 1)
    assert set(runs.read_rollouts(config.name)["step"]) == {1}
    again = runs.read_rollouts(train_rl(config))
    pd.testing.assert_frame_equal(again, whole)


def test_ctrl_c_at_the_end_of_no_grad_does_not_switch_gradients_off(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave = torch.no_grad.__exit__
    config = tiny_config(model, steps=3, resume_every=1)
    folder = runs.runs_dir() / config.name

    def interrupted(self: torch.no_grad, *error: Any) -> None:
        if len(runs.read_metrics_rows(folder)) == 2:
            raise KeyboardInterrupt
        leave(self, *error)

    with monkeypatch.context() as patch:
        patch.setattr(torch.no_grad, "__exit__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_rl(config)
    assert torch.is_grad_enabled()
    torch.set_grad_enabled(False)  # as another library may leave it
    path = train_rl(config)
    assert runs.read_status(path).resumed == (2,)
    assert torch.is_grad_enabled()


def test_problems_are_part_of_what_a_run_is(model: Path, tmp_path: Path) -> None:
    """A file that was edited is another task, under whatever name."""
    rows = [dict(row) for row in tasks.load_problems("chain", "train", 24)]
    file = tmp_path / "mine.jsonl"

    def write(chosen: list[dict[str, Any]]) -> None:
        file.write_text("".join(json.dumps(row) + "\n" for row in chosen))

    write(rows[:12])
    config = tiny_config(model, task=str(file))
    path = train_rl(config)
    assert train_rl(config) == path
    write(rows[12:])
    with pytest.raises(RunError, match="other weights, problems, rewards or documents"):
        train_rl(config)
    with pytest.raises(RunError, match="other weights, problems, rewards or documents"):
        train_rl(config, problems=rows[12:])
    write(rows[:12])
    assert train_rl(config) == path
    evaluated = tiny_config(model, name="evaluated-s0", eval_every=1, eval_problems=2)
    train_rl(evaluated, validation=rows[:3])
    train_rl(evaluated, validation=rows[:2])  # the third was not used
    with pytest.raises(RunError, match="other weights, problems, rewards or documents"):
        train_rl(evaluated, validation=rows[1:3])


def test_a_resumed_run_keeps_the_commit_it_started_from(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branch has moved on; weights and reference are those of the first start all the same."""
    asked: list[str] = []
    commits = iter(("a1", "b2"))
    load = models.load_policy

    def from_hub(source: Any, **options: Any) -> Any:
        asked.append(source.model_revision)
        policy, tokenizer = load(source, **options)
        policy.config._commit_hash = next(commits)
        return policy, tokenizer

    monkeypatch.setattr(models, "load_policy", from_hub)
    config = tiny_config(model, steps=3, resume_every=1)
    on_step = trainer.RlSession.on_step

    def broken(self: Any, window: Any, numbers: Any) -> bool:
        stop = on_step(self, window, numbers)
        if window.step == 2:
            raise ZeroDivisionError
        return stop

    with monkeypatch.context() as patch:
        patch.setattr(trainer.RlSession, "on_step", broken)
        with pytest.raises(ZeroDivisionError):
            train_rl(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        path = train_rl(config)
    finally:
        torch.set_num_threads(threads)
    assert asked == ["main", "a1"]
    env = runs.read_environment(path)
    assert env["model_commit"] == env["before_resume"]["model_commit"] == "a1"
    assert env["torch_threads"] == threads + 1
    assert env["before_resume"]["torch_threads"] == threads


def test_a_nan_loss_fails_loudly(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = GRPOTrainer._compute_loss
    monkeypatch.setattr(
        GRPOTrainer, "_compute_loss", lambda self, *args: compute(self, *args) * float("nan")
    )
    with pytest.raises(TrainingError, match=r"step 1: loss nan.*learning_rate"):
        train_rl(tiny_config(model))
    assert runs.read_status("unit-s0").state == "failed"
    assert len(runs.read_metrics("unit-s0")) == 1


def test_bad_starts_are_refused_before_training(model: Path) -> None:
    config = tiny_config(model)
    problems = tasks.load_problems("chain", "train", 12)
    with pytest.raises(ConfigError, match="training problems are empty"):
        train_rl(config, problems=[])
    with pytest.raises(ConfigError, match=r"3 training problems, but each step needs .* = 4"):
        train_rl(config, problems=problems[:3])
    with pytest.raises(ConfigError, match="1 training problems repeat a problem_id"):
        train_rl(config, problems=[*problems, problems[0]])
    with pytest.raises(ModelError, match="neither a shipped model"):
        train_rl(tiny_config(Path("nowhere")))
    with pytest.raises(PreflightError, match="max_completion_length=2 cannot hold"):
        train_rl(tiny_config(model, max_completion_length=2))
    assert runs.read_status(config.name).state == "failed"
    train_rl(config)  # the name is not blocked by refused attempts


def test_a_run_starts_from_the_result_of_another(model: Path, tmp_path: Path) -> None:
    first = tiny_config(model, steps=1, name="first")
    second = tiny_config(Path("run:first"), steps=1, name="second", learning_rate=1e-9)
    with pytest.raises(RunError, match="no run 'first'"):
        train_rl(second)
    path = train_rl(first)
    (policy, _), (source, _) = (
        models.load_policy(tiny_config(Path(f"run:{p.name}")).model)
        for p in (train_rl(second), path)
    )
    for a, b in zip(policy.parameters(), source.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)
    train_rl(tiny_config(model, steps=2, name="first"), fresh=True)
    with pytest.raises(RunError, match="other weights"):  # not what it was trained from any more
        train_rl(second)


def test_env_json_names_nothing_of_the_user(model: Path) -> None:
    text = (train_rl(tiny_config(model, steps=1)) / "env.json").read_text()
    env = json.loads(text)
    assert env["seed"] == 0
    assert env["packages"]["trl"].startswith("1.16")
    assert str(Path.home()) not in text


def test_rewards_of_ones_own_train_and_belong_to_the_run(model: Path) -> None:
    config = tiny_config(model, steps=2, name="unit-own")
    path = train_rl(config, reward_fns=[("even", even_tokens, 1.0), ("coin", coin, 0.5)])
    drawn = runs.read_rollouts(path)
    assert np.allclose(drawn["reward"], drawn["reward_even"] + 0.5 * drawn["reward_coin"])
    done = runs.read_status(path)
    assert train_rl(config, reward_fns=[("even", even_tokens, 1.0), ("coin", coin, 0.5)]) == path
    assert runs.read_status(path) == done  # found finished
    for other in (None, [("even", even_tokens, 1.0), ("coin", coin, 0.4)], [("even", coin, 1.0)]):
        with pytest.raises(RunError, match="other weights, problems, rewards or documents"):
            train_rl(config, reward_fns=other)


def test_exploitable_rewards_of_ones_own_are_refused(model: Path) -> None:
    config = tiny_config(model, reward="accuracy", allow_exploitable=False)
    with pytest.raises(PreflightError, match="pays what it should not"):
        train_rl(config, reward_fns=[("even", even_tokens, 1.0)])


def test_filters_configured_and_of_ones_own(model: Path) -> None:
    path = train_rl(tiny_config(model, steps=1, group_filter="orm", name="unit-orm"))
    drawn = runs.read_rollouts(path)
    assert (drawn["kept"] == (drawn["stop"] != "length")).all() and not drawn["kept"].all()
    assert (drawn.loc[~drawn["kept"], "advantage"] == 0).all()
    assert runs.read_metrics(path)["kept_ratio"].iloc[0] == drawn["kept"].mean()

    def best_half(values: Any, completions: Any, problems: Any) -> Any:
        return values >= np.median(values, axis=1, keepdims=True)

    config = tiny_config(model, steps=1, name="unit-half")
    path = train_rl(config, reward_fns=[("even", even_tokens, 1.0)], group_filter=best_half)
    drawn = runs.read_rollouts(path)
    middle = drawn.groupby("group")["reward"].transform("median")
    assert (drawn["kept"] == (drawn["reward"] >= middle)).all()


def test_obtaining_a_run_with_other_rewards_moves_the_old_one_aside(model: Path) -> None:
    config = tiny_config(model, steps=1, name="unit-obtain")
    first = arms.obtain(config, reward_fns=[("even", even_tokens, 1.0)])
    assert arms.obtain(config, reward_fns=[("even", even_tokens, 1.0)]) == first
    assert "reward_even" in runs.read_rollouts(first)
    again = arms.obtain(config, reward_fns=[("coin", coin, 1.0)])
    assert again == first and "reward_coin" in runs.read_rollouts(again)
    assert "reward_even" in runs.read_rollouts(first.with_name("unit-obtain.old-1"))
