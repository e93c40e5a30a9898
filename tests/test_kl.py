"""The KL coefficient over a run, and the one KL term that it multiplies."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import coin, even_tokens, run_steps, tiny_config
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from rlkit import advantages, models, runs, tasks, templates
from rlkit.config import ConfigError, RunConfig
from rlkit.grpo import RolloutTrainer
from rlkit.kl import adapted, scheduled
from rlkit.rollouts import Window
from rlkit.trainer import train_rl


def test_schedules_have_their_written_values() -> None:
    # 5 steps: beginning, quarters, end.
    assert [scheduled("fixed", 0.4, s, 5) for s in range(1, 6)] == [0.4] * 5
    linear = [scheduled("linear", 0.4, s, 5) for s in range(1, 6)]
    assert linear == pytest.approx([0.4, 0.3, 0.2, 0.1, 0])
    cosine = [scheduled("cosine", 0.4, s, 5) for s in range(1, 6)]
    root = math.sqrt(0.5)
    assert cosine == pytest.approx([0.4, 0.2 * (1 + root), 0.2, 0.2 * (1 - root), 0])
    for steps in (2, 3, 60, 101, 4096):
        for schedule in ("linear", "cosine"):
            assert scheduled(schedule, 0.3, 1, steps) == 0.3
            assert scheduled(schedule, 0.3, steps, steps) == 0  # exactly: no KL term is left
            path = [scheduled(schedule, 0.3, s, steps) for s in range(1, steps + 1)]
            assert path == sorted(path, reverse=True)
    assert scheduled("cosine", 0.3, 51, 101) == pytest.approx(0.15)


def test_a_run_of_one_step_keeps_its_coefficient() -> None:
    for schedule in ("fixed", "linear", "cosine"):
        assert scheduled(schedule, 0.3, 1, 1) == 0.3


def test_schedules_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValueError, match=r"schedule='cosin': expected 'fixed', 'linear'"):
        scheduled("cosin", 0.1, 1, 2)
    for step in (0, 3, -1):
        with pytest.raises(ValueError, match=rf"step={step}: expected a step in \[1, 2\]"):
            scheduled("fixed", 0.1, step, 2)


def test_the_controller_rests_at_its_target_and_moves_by_its_formula() -> None:
    assert adapted(0.05, 0.01, target=0.01, gain=0.5) == 0.05
    assert adapted(0.05, 0.011, 0.01, 0.5) == pytest.approx(0.05 * (1 + 0.5 * 0.1))
    assert adapted(0.05, 0.009, 0.01, 0.5) == pytest.approx(0.05 * (1 - 0.5 * 0.1))
    for far in (0.0121, 5.0, math.inf):
        assert adapted(0.05, far, 0.01, 0.5) == pytest.approx(0.05 * 1.1)
    for far in (0.0079, 0.0, -3.0):  # a k3 mean cannot be negative; the controller need not know
        assert adapted(0.05, far, 0.01, 0.5) == pytest.approx(0.05 * 0.9)
    assert adapted(0.05, math.nan, 0.01, 0.5) == 0.05


@pytest.mark.parametrize("start", [1e-3, 0.02, 5.0])
def test_the_controller_brings_a_plant_to_its_target(start: float) -> None:
    """A KL that falls with the coefficient: kl = 1e-3 / beta, so beta ends at 0.1."""
    beta = start
    for _ in range(800):
        beta = adapted(beta, 1e-3 / beta, target=0.01, gain=0.1)
    assert beta == pytest.approx(0.1, rel=1e-3)


def test_a_schedule_without_a_term_is_refused_with_the_fix(model: Path) -> None:
    for schedule in ("linear", "cosine", "adaptive"):
        with pytest.raises(ConfigError, match=rf"kl_schedule='{schedule}'.*set beta > 0"):
            tiny_config(model, beta=0.0, kl_schedule=schedule)
        assert tiny_config(model, beta=0.1, kl_schedule=schedule).train.kl_schedule == schedule
    with pytest.raises(ConfigError, match=r"reference_reset=5.*set beta > 0"):
        tiny_config(model, beta=0.0, reference_reset=5)
    with pytest.raises(ConfigError, match=r"kl_target=0\.0: expected a number > 0"):
        tiny_config(model, beta=0.1, kl_target=0.0)
    for gain in (0.0, 5.0):  # with 5 a step without divergence would bring beta to 0 for good
        with pytest.raises(ConfigError, match=rf"kl_gain={gain}: expected a number in \(0, 5\)"):
            tiny_config(model, beta=0.1, kl_gain=gain)
    assert adapted(0.1, 0.0, target=0.01, gain=4.99) > 0
    with pytest.raises(ConfigError, match="kl_estimator='k1'"):
        tiny_config(model, beta=0.1, kl_estimator="k1")


@pytest.mark.parametrize("schedule", ["fixed", "linear", "cosine"])
def test_the_logged_coefficient_is_the_schedule(model: Path, tmp_path: Path, schedule: str) -> None:
    config = tiny_config(
        model, steps=5, beta=0.2, kl_schedule=schedule, learning_rate=1e-2,
        updates_per_batch=2, micro_batch_size=8,
    )  # fmt: skip
    _, numbers, _ = run_steps(config, [("coin", coin, 1.0)], tmp_path)
    expected = [scheduled(schedule, 0.2, step, 5) for step in range(1, 6)]
    assert [n["beta"] for n in numbers] == expected
    measured = [math.isfinite(n["kl"]) for n in numbers]
    assert measured == [beta > 0 for beta in expected]
    assert all(math.isfinite(n["loss"]) for n in numbers)


def test_annealing_reaches_zero_in_the_run_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("RLKIT_HEADLESS", "1")
    path = train_rl(tiny_config(model, steps=3, beta=0.2, kl_schedule="cosine"))
    metrics = runs.read_metrics(path)
    assert metrics["beta"].tolist() == pytest.approx([0.2, 0.1, 0.0])
    assert metrics["beta"].iloc[2] == 0
    assert metrics["kl"].isna().tolist() == [False, False, True]
    assert '"kl": null' in (path / "metrics.jsonl").read_text().splitlines()[2]
    assert runs.read_status(path).state == "done"


def test_a_last_step_without_a_term_is_a_plain_step(model: Path, tmp_path: Path) -> None:
    """With the coefficient at 0, rows without signal can be dropped and nothing else differs."""
    config = tiny_config(
        model, steps=1, beta=0.2, kl_schedule="fixed", max_grad_norm=1e9, learning_rate=1e-9
    )
    made = prepared(config, tmp_path)
    made.run_config = tiny_config(model, steps=2, beta=0.2, kl_schedule="linear")
    annealed = made._collect(2)  # the last of two steps
    assert made.beta == 0
    plain = prepared(tiny_config(model, steps=2), tmp_path)._collect(2)
    assert [sorted(part) for part in annealed] == [sorted(part) for part in plain]
    for ours, theirs in zip(annealed, plain, strict=True):
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), key


def test_a_step_without_tokens_in_the_loss_moves_no_coefficient(
    model: Path, tmp_path: Path
) -> None:
    """All completions are cut, and left out: the divergence is unknown, not 0."""
    config = tiny_config(
        model, steps=3, beta=0.3, kl_schedule="adaptive", mask_truncated=True,
        max_completion_length=1,
    )  # fmt: skip
    windows, numbers, _ = run_steps(config, [("coin", coin, 1.0)], tmp_path)
    ended = [any(c.reached_end for g in w.completions for c in g) for w in windows]
    assert not any(ended)
    assert all(math.isnan(n["kl"]) and math.isnan(n["clip_ratio"]) for n in numbers)
    assert [n["beta"] for n in numbers] == [0.3] * 3


def test_the_adaptive_coefficient_follows_the_measured_kl(model: Path, tmp_path: Path) -> None:
    config = tiny_config(
        model, steps=8, beta=0.3, kl_schedule="adaptive", kl_target=2e-3, kl_gain=0.5,
        learning_rate=5e-3, lr_schedule="constant", batch_size=32, rollouts=8,
        micro_batch_size=32,
    )  # fmt: skip
    _, numbers, _ = run_steps(config, [("even", even_tokens, 1.0)], tmp_path)
    assert numbers[0]["beta"] == 0.3
    for now, after in itertools.pairwise(numbers):
        assert after["beta"] == adapted(now["beta"], now["kl"], target=2e-3, gain=0.5)
    betas = [n["beta"] for n in numbers]
    assert min(betas) < betas[0]  # down while the policy is still at its reference
    assert betas[-1] > min(betas)  # and up once it has moved away


def prepared(config: RunConfig, folder: Path) -> RolloutTrainer:
    _, _, made = run_steps(config, [("coin", coin, 1.0)], folder, untrained=True)
    return made


class Gradient(TrainerCallback):  # type: ignore[misc]
    """Keeps the gradient of the last update as one vector."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **info: Any) -> None:
        self.value = flat_gradient(info["model"])


def flat_gradient(policy: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def half_without_signal(completions: Any, problems: Any, /, **info: Any) -> list[float | None]:
    """Every other group has equal rewards: only the KL term acts on it."""
    values = even_tokens(completions, problems)
    return [value if row // 4 % 2 else 0.5 for row, value in enumerate(values)]


def one_step(
    config: RunConfig, folder: Path
) -> tuple[Window, dict[str, float], Tensor, PreTrainedModel, PreTrainedModel, Any]:
    """One update of a policy that has left its reference; all that its gradient follows from."""
    policy, tokenizer = models.load_policy(config.model)
    windows, numbers = [], []

    def on_step(window: Window, row: dict[str, float]) -> bool:
        windows.append(window)
        numbers.append(row)
        return False

    made = RolloutTrainer(
        config, policy, tokenizer, tasks.load_problems("chain", "train", 12),
        [("half", half_without_signal, 1.0)], on_step, folder,
    )  # fmt: skip
    assert made.reference is not None and made.reference.model is not None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # after the reference was copied
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    # Plain models for the formula: the trainer's own have a head of TRL.
    reference, before = (models.load_policy(config.model)[0] for _ in range(2))
    before.load_state_dict(policy.state_dict())
    for name, value in made.reference.model.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name
    kept = Gradient()
    made.add_callback(kept)
    made.run()
    return windows[0], numbers[0], kept.value, before, reference, tokenizer


@pytest.mark.parametrize("estimator", ["k3", "k3_corrected"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_the_term_is_added_once_as_written(
    model: Path, tmp_path: Path, estimator: str, loss_type: str
) -> None:
    """Gradient of TRL's path = policy gradient + beta * gradient of the term, with masks.

    Per token, with x = log reference - log policy, k3 = exp(x) - x - 1 (its gradient is
    (1 - exp(x)) grad log policy); corrected, it is ratio * k3 (on-policy -x grad log policy).
    """
    beta = 0.7
    config = tiny_config(
        model, steps=1, beta=beta, kl_estimator=estimator, loss_type=loss_type,
        micro_batch_size=4, mask_truncated=True, max_grad_norm=1e9, temperature=1.3,
        max_completion_length=24,
    )  # fmt: skip
    window, numbers, found, policy, reference, tokenizer = one_step(config, tmp_path)
    weights = advantages.compute(window.rewards, config.train.advantage)
    prompts = templates.encode(window.problems, tokenizer, "question")
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for prompt, group, values in zip(prompts, window.completions, weights, strict=True):
        for completion, weight in zip(group, values, strict=True):
            if not completion.reached_end:
                continue
            ids = torch.tensor([[*prompt, *completion.token_ids]])

            def logps(net: PreTrainedModel, ids: Tensor = ids, start: int = len(prompt)) -> Tensor:
                logits = net(ids).logits[0, start - 1 : -1] / 1.3
                return logits.log_softmax(-1).gather(-1, ids[0, start:, None])[:, 0]

            logp = logps(policy)
            with torch.no_grad():
                x = logps(reference) - logp
            surrogate = -float(weight) * torch.exp(logp - logp.detach())
            slope = (1 - torch.exp(x)) if estimator == "k3" else -x
            rows.append((surrogate, slope * logp, torch.exp(x) - x - 1, x))
    total = len(window.completions) * 4
    # Some completions are masked out, and the KL term acts on rows without an advantage too.
    assert 0 < len(rows) < total
    assert any(not r[0].any() for r in rows) and any(r[0].any() for r in rows)

    def reduced(parts: list[Tensor]) -> Tensor:
        if loss_type == "grpo":
            return sum(p.mean() for p in parts) / total
        tokens = sum(len(p) for p in parts) if loss_type == "dapo" else total * 24
        return sum(p.sum() for p in parts) / tokens

    def gradient(loss: Tensor) -> Tensor:
        policy.zero_grad()
        loss.backward(retain_graph=True)
        return flat_gradient(policy)

    pull = gradient(reduced([r[0] for r in rows]))
    hold = gradient(reduced([r[1] for r in rows]))
    assert hold.norm() > 0.05 * pull.norm()  # both terms are seen
    assert torch.allclose(found, pull + beta * hold, atol=2e-6, rtol=1e-3)
    assert float((found - pull) @ hold / (hold @ hold)) == pytest.approx(beta, rel=1e-4)
    k3 = reduced([r[2] for r in rows])
    policy_loss = reduced([r[0] for r in rows])
    assert numbers["loss"] == pytest.approx((policy_loss + beta * k3).item(), rel=1e-4, abs=1e-6)
    per_token = torch.cat([r[2] for r in rows]).mean().item()
    assert numbers["kl"] == pytest.approx(per_token, rel=1e-4)


def test_expected_gradients_of_the_two_estimators() -> None:
    """Over all tokens of a softmax: k3 pulls as KL(ref || p), the corrected one as KL(p || ref)."""
    generator = np.random.default_rng(0)
    z = torch.tensor(generator.normal(size=7), requires_grad=True)
    reference = torch.tensor(generator.normal(size=7)).log_softmax(-1)

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, z, retain_graph=True)[0]

    logp = z.log_softmax(-1)
    p = logp.exp().detach()  # on-policy: tokens come from p, which is no part of the graph
    k3 = torch.exp(reference - logp) - (reference - logp) - 1
    ratio = torch.exp(logp - logp.detach())
    forward = (reference.exp() * (reference - logp)).sum()
    reverse = (logp.exp() * (logp - reference)).sum()
    assert torch.allclose(gradient((p * k3).sum()), gradient(forward))
    assert torch.allclose(gradient((p * ratio * k3).sum()), gradient(reverse))
    assert not torch.allclose(gradient(forward), gradient(reverse), rtol=0.1)
