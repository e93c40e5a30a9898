"""The reference of the KL term: what it is a copy of, when it changes, where it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import even_tokens, run_steps, tiny_config
from torch import Tensor, nn

from rlkit import models, rewards, runs
from rlkit.config import RunConfig
from rlkit.models import Policy
from rlkit.reference import ADAPTER, FILE, Reference
from rlkit.trainer import train_rl

REWARD: list[tuple[str, rewards.RewardFn, float]] = [("even", even_tokens, 1.0)]


def loaded(model: Path, rank: int) -> Policy:
    torch.manual_seed(0)
    return models.load_policy(tiny_config(model, lora_rank=rank).model)[0]


def stir(policy: nn.Module, seed: int = 1) -> None:
    """Move every trained weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


IDS = torch.arange(5, 25).reshape(2, 10)


def logits(policy: nn.Module) -> Tensor:
    with torch.no_grad():
        return policy(IDS).logits


def reference_logits(policy: Policy, reference: Reference) -> Tensor:
    """What the reference predicts, as the KL term asks for it."""
    if reference.model is not None:
        return logits(reference.model)
    assert isinstance(policy, PeftModel)
    if ADAPTER not in policy.peft_config:
        with policy.disable_adapter():
            return logits(policy)
    policy.set_adapter(ADAPTER)
    try:
        return logits(policy)
    finally:
        policy.set_adapter("default")


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("resets", [True, False])
def test_the_reference_is_the_start_until_it_is_replaced(
    model: Path, rank: int, resets: bool
) -> None:
    policy = loaded(model, rank)
    start = logits(policy)
    reference = Reference(policy, resets=resets)
    assert torch.equal(logits(policy), start)  # making one changes no prediction
    assert torch.equal(reference_logits(policy, reference), start)
    stir(policy)
    moved = logits(policy)
    assert not torch.allclose(moved, start, atol=1e-2)
    assert torch.equal(reference_logits(policy, reference), start)
    if not resets:
        return
    reference.reset()
    assert torch.equal(reference_logits(policy, reference), moved)
    assert torch.equal(logits(policy), moved)
    stir(policy, seed=2)  # a copy, not the policy itself
    assert torch.equal(reference_logits(policy, reference), moved)


@pytest.mark.parametrize("rank", [0, 2])
def test_what_was_saved_is_what_is_read(model: Path, tmp_path: Path, rank: int) -> None:
    policy = loaded(model, rank)
    reference = Reference(policy, resets=True)
    stir(policy)
    reference.reset()
    kept = logits(policy)
    stir(policy, seed=2)
    reference.save(tmp_path)
    stored = load_file(tmp_path / FILE)
    if rank:
        assert stored and all("lora_" in name for name in stored)
    else:
        assert policy.config.tie_word_embeddings
        assert "lm_head.weight" not in stored  # tied: stored once
    other = loaded(model, rank)
    fresh = Reference(other, resets=True)
    before = logits(other)
    fresh.load(tmp_path)
    assert torch.equal(reference_logits(other, fresh), kept)
    assert torch.equal(logits(other), before)  # reading it leaves the policy alone


def test_a_reference_that_never_changes_is_not_stored(model: Path, tmp_path: Path) -> None:
    for rank in (0, 2):
        reference = Reference(loaded(model, rank), resets=False)
        reference.save(tmp_path)
        reference.load(tmp_path)  # it follows from the start
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, 2])
def test_neither_kind_of_reference_is_trained(model: Path, rank: int) -> None:
    policy = loaded(model, rank)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    reference = Reference(policy, resets=True)
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == trained
    if reference.model is not None:
        assert not any(p.requires_grad for p in reference.model.parameters())
        assert not reference.model.training
    # Asking for the reference's predictions and going back must not thaw it.
    reference_logits(policy, reference)
    policy(IDS).logits.square().sum().backward()
    graded = {n for n, p in policy.named_parameters() if p.grad is not None}
    assert not any(f".{ADAPTER}." in name for name in graded)


def period_config(model: Path, **params: Any) -> RunConfig:
    return tiny_config(
        model, **{"steps": 6, "beta": 0.1, "learning_rate": 1e-2, "lr_schedule": "constant",
                  "reference_reset": 2, **params}
    )  # fmt: skip


@pytest.mark.parametrize("rank", [0, 2])
def test_kl_starts_again_from_zero_after_a_reset(model: Path, tmp_path: Path, rank: int) -> None:
    config = period_config(model, lora_rank=rank, steps=5)
    _, numbers, _ = run_steps(config, REWARD, tmp_path)
    kl = [n["kl"] for n in numbers]
    assert kl[0] == kl[2] == kl[4] == 0  # steps 1, 3 and 5 begin a period
    assert min(kl[1], kl[3]) > 1e-6


@pytest.mark.parametrize("rank", [0, 2])
def test_without_resets_the_reference_never_moves(model: Path, tmp_path: Path, rank: int) -> None:
    config = period_config(model, lora_rank=rank, reference_reset=0, steps=3)
    _, numbers, made = run_steps(config, REWARD, tmp_path)
    start = logits(loaded(model, 0))
    assert made.reference is not None
    assert torch.allclose(reference_logits(made.policy, made.reference), start, atol=1e-6)
    assert all(n["kl"] > 1e-6 for n in numbers[1:])


def test_a_reset_after_the_last_step_of_a_period_copies_that_step(
    model: Path, tmp_path: Path
) -> None:
    """The reference of step 3 is the policy after step 2, not after 1 or 3."""
    whole = period_config(model, steps=3)
    part = period_config(model, steps=2)
    _, _, after_two = run_steps(part, REWARD, tmp_path)
    _, _, after_three = run_steps(whole, REWARD, tmp_path)
    assert after_three.reference is not None and after_three.reference.model is not None
    theirs = dict(after_two.policy.named_parameters())
    for name, value in after_three.reference.model.named_parameters():
        assert torch.equal(value, theirs[name]), name


def test_the_second_adapter_changes_no_rollout_and_gets_no_gradient(
    model: Path, tmp_path: Path
) -> None:
    # Resets that never come: the second adapter stays a copy of the first one's start.
    with_copy, numbers, made = run_steps(
        period_config(model, lora_rank=2, reference_reset=99, steps=3), REWARD, tmp_path
    )
    without, plain, _ = run_steps(
        period_config(model, lora_rank=2, reference_reset=0, steps=3), REWARD, tmp_path
    )
    for ours, theirs in zip(with_copy, without, strict=True):
        assert ours.completions == theirs.completions
    # A LoRA adapter starts as no change at all, so the two references are one policy.
    for ours_row, theirs_row in zip(numbers, plain, strict=True):
        for name in ("loss", "grad_norm", "kl"):
            assert ours_row[name] == pytest.approx(theirs_row[name], rel=1e-4, abs=1e-8)
    copies = {n: p for n, p in made.policy.named_parameters() if f".{ADAPTER}." in n}
    assert copies and not any(p.requires_grad for p in copies.values())
    held = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in copies.values()}
    trained = {n for n, p in made.policy.named_parameters() if id(p) in held}
    assert trained and all(".default." in name for name in trained)
    assert made.policy.active_adapter == "default"


def test_a_checkpoint_holds_the_trained_adapter_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("RLKIT_HEADLESS", "1")
    config = period_config(model, lora_rank=2, steps=3, save_every=2)
    path = train_rl(config)
    metrics = runs.read_metrics(path)
    assert metrics["kl"].iloc[[0, 2]].tolist() == pytest.approx([0, 0], abs=1e-9)
    assert metrics["kl"].iloc[1] > 1e-6
    for folder in sorted((path / "checkpoints").iterdir()):
        assert not list(folder.rglob(f"*{ADAPTER}*/*"))
        names = [name for file in folder.rglob("*.safetensors") for name in load_file(file)]
        assert names and not any(f".{ADAPTER}." in name for name in names)
        assert len(list(folder.rglob("*.safetensors"))) == 1
    again = tiny_config(runs.final_checkpoint(path), steps=1, name="unit-next", beta=0.1)
    assert runs.read_metrics(train_rl(again))["kl"].iloc[0] == pytest.approx(0, abs=1e-9)
