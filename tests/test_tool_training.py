"""Training on responses that hold tool output: what is learned from, recorded, and made again."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scripted import Faulty, Scripted
from tiny import coin, tiny_config
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from rlkit import models, rewards, runs, tasks, templates
from rlkit.config import RunConfig
from rlkit.grpo import RolloutTrainer
from rlkit.rollouts import Window, rollout_columns, step_metrics
from rlkit.sandbox import InfraError, Limits, PythonExecutor
from rlkit.tokenizer import END, build_tokenizer
from rlkit.tools import Executor, Tools
from rlkit.trainer import train_rl

BUDGET = 110


def block(code: str) -> str:
    return f"```python\n{code}\n```\n"


# One call and an answer; a failure and a second try; none; a call too many; output and text beyond
# the budget; a call whose result is the end of the row.
TEXTS = (
    block("print(6*7)") + r"so \boxed{42}" + END,
    block("1/0") + "Wait\n" + block("print(2)") + "ok" + END,
    r"\boxed{42}" + END,
    block("print(1)") + block("print(2)") + block("print(3)") + r"\boxed{42}" + END,
    block("print('ab'*70)") + "never read",
    "is " + block("x=1") + "7",
)
TOOL: dict[str, Any] = {
    "tool": "python", "max_calls": 2, "max_completion_length": BUDGET, "steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture(scope="module")
def executor() -> Iterator[PythonExecutor]:
    with PythonExecutor(Limits(cpu_seconds=5, wall_seconds=30)) as opened:
        yield opened


@pytest.fixture(autouse=True)
def runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("RLKIT_HEADLESS", "1")


def follow(
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] = TEXTS,
) -> None:
    """Each response is one of ``texts``, a function of its random stream."""
    ids = [tokenizer(text)["input_ids"] for text in texts]
    Scripted(lambda number, stream: ids[stream % len(ids)]).patch(monkeypatch)


def answers_42(count: int = 12) -> list[dict[str, Any]]:
    rows = tasks.load_problems("chain", "train", count)
    return [{**row, "answer": "42"} for row in rows]


class Updates(TrainerCallback):
    """Gradients and weights before each update of the optimizer."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **have: Any) -> None:
        model = have["model"]
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.gradients.append({n: p.grad.detach().clone() for n, p in named})
        self.weights.append(copy.deepcopy(model.state_dict()))


def seeded_policy(config: RunConfig) -> Any:
    set_seed(config.seed)
    return models.load_policy(config.model)[0]


def make_trainer(
    config: RunConfig, executor: Executor, folder: Path, windows: list[Window]
) -> tuple[RolloutTrainer, list[dict[str, float]]]:
    set_seed(config.seed)
    policy, tokenizer = models.load_policy(config.model)
    numbers: list[dict[str, float]] = []

    def on_step(window: Window, row: dict[str, float]) -> bool:
        windows.append(window)
        numbers.append(row)
        return False

    made = RolloutTrainer(
        config, policy, tokenizer, answers_42(), [("coin", coin, 1.0)], on_step, folder,
        tools=Tools(executor, tokenizer, config.tools),
    )  # fmt: skip
    return made, numbers


def train(
    config: RunConfig, executor: Executor, folder: Path
) -> tuple[list[Window], list[dict[str, float]]]:
    windows: list[Window] = []
    made, numbers = make_trainer(config, executor, folder, windows)
    made.run()
    return windows, numbers


def own_scores(model: Any, prompt: Sequence[int], completion: Any, t: float) -> tuple[Tensor, ...]:
    """Log-probability and entropy of the policy's tokens alone, from a plain forward pass."""
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    logps = (model(ids).logits[0, len(prompt) - 1 : -1] / t).log_softmax(-1)
    own = torch.tensor(completion.loss_mask).bool()
    chosen = logps.gather(-1, ids[0, len(prompt) :, None])[:, 0]
    return chosen[own], -(logps.exp() * logps).sum(-1)[own]


def written_loss(
    config: RunConfig, window: Window, update: int, policy: Any, before: Any, start: Any
) -> Tensor:
    """The loss of one update as the papers write it, over the policy's tokens only.

    ``before``: the policy that the step began with; ``start``: the reference.
    """
    train = config.train
    tokenizer = build_tokenizer()
    prompts = templates.encode(window.problems, tokenizer, config.task.template)
    rows = [
        (prompt, completion, float(advantage))
        for prompt, group, weights in zip(
            prompts, window.completions, window.advantages, strict=True
        )
        for completion, advantage in zip(group, weights, strict=True)
    ]
    size = len(rows) // train.updates_per_batch
    tokens = sum(sum(c.loss_mask) for _, c, _ in rows) / train.updates_per_batch
    t = config.sampling.temperature
    loss, entropy, own = torch.zeros(()), torch.zeros(()), 0
    for prompt, completion, advantage in rows[update * size : (update + 1) * size]:
        logps, entropies = own_scores(policy, prompt, completion, t)
        with torch.no_grad():
            old, _ = own_scores(before, prompt, completion, t)
            reference, _ = own_scores(start, prompt, completion, t)
        ratio = (logps - old).exp()
        clipped = ratio.clamp(1 - train.epsilon, 1 + train.epsilon_high)
        terms = -torch.min(ratio * advantage, clipped * advantage)
        gap = reference - logps
        terms = terms + train.beta * (gap.exp() - gap - 1)
        divisor = {
            "dapo": tokens,
            "grpo": len(terms) * size,
            "dr_grpo": size * config.sampling.max_completion_length,
        }[train.loss_type]
        loss = loss + terms.sum() / divisor
        entropy, own = entropy + entropies.sum(), own + len(terms)
    return loss - train.entropy_coef * entropy / own


CASES: dict[str, dict[str, Any]] = {
    **{loss: {"loss_type": loss} for loss in ("dapo", "grpo", "dr_grpo")},
    **{
        f"{loss}, KL, two updates": {"loss_type": loss, "beta": 0.5, "updates_per_batch": 2}
        for loss in ("dapo", "grpo", "dr_grpo")
    },
    "KL": {"beta": 0.5},
    "entropy": {"entropy_coef": 0.1, "loss_type": "grpo"},
    "hot": {"temperature": 1.4, "advantage": "group_std"},
    "checkpointed": {"gradient_checkpointing": True, "beta": 0.5},
    "checkpointed, two updates": {"gradient_checkpointing": True, "updates_per_batch": 2},
    "LoRA": {"lora_rank": 4, "beta": 0.5, "loss_type": "grpo"},
}


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_policys_tokens_alone(
    model, tokenizer, executor, tmp_path, monkeypatch, name
) -> None:
    """Two steps, so that ratio and KL have left 1 and 0 where they can."""
    follow(monkeypatch, tokenizer)
    config = tiny_config(
        model, **{**TOOL, "micro_batch_size": 4, "max_grad_norm": 1e9, "learning_rate": 1e-2,
                  **CASES[name]},
    )  # fmt: skip
    windows: list[Window] = []
    made, numbers = make_trainer(config, executor, tmp_path, windows)
    assert made._packed == (name.split(",")[0] not in ("checkpointed", "LoRA"))
    updates = Updates()
    made.add_callback(updates)
    # Fresh ones: the trainer's forward pass is bound to its own model.
    start, before, policy = (seeded_policy(config) for _ in range(3))
    scored: list[tuple[Tensor, Mapping[str, Tensor]]] = []
    score = RolloutTrainer._score

    def kept(self: RolloutTrainer, *args: Any, **options: Any) -> Any:
        found = score(self, *args, **options)
        if found[0].requires_grad:
            found[0].retain_grad()
            scored.append((found[0], self._part))
        return found

    monkeypatch.setattr(RolloutTrainer, "_score", kept)
    made.run()
    assert all(n["logp_difference"] < 1e-3 for n in numbers)
    per_step = config.train.updates_per_batch
    assert len(updates.gradients) == 2 * per_step
    for number, found in enumerate(updates.gradients):
        step, update = divmod(number, per_step)
        before.load_state_dict(updates.weights[step * per_step])
        policy.load_state_dict(updates.weights[number])
        policy.zero_grad()
        written_loss(config, windows[step], update, policy, before, start).backward()
        expected = {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}
        assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=2e-6, msg=key)
    # The same, read off the log-probabilities themselves.
    forced = 0
    for logps, part in scored:
        written, own = part["completion_mask"].bool(), part["tool_mask"].bool()
        assert logps.grad is not None
        assert (logps.grad[written & ~own] == 0).all()
        forced += int((written & ~own).sum())
        if per_step == 1 and not config.train.beta:  # else a ratio may be clipped, a sum be 0
            pays = (part["advantages"] != 0)[:, None]
            assert (logps.grad[written & own & pays] != 0).all()
    assert forced > 100


@pytest.mark.parametrize("packed", [True, False])
def test_output_is_context_of_what_follows(
    model, tokenizer, executor, tmp_path, monkeypatch, packed
) -> None:
    follow(monkeypatch, tokenizer, TEXTS[:1])
    config = tiny_config(model, **TOOL)
    windows: list[Window] = []
    made, _ = make_trainer(config, executor, tmp_path, windows)
    made._packed = packed
    completion = made.sample(answers_42(1), "train", 1)[0][0]
    prompt = templates.encode(answers_42(1), tokenizer)[0]
    start, end = completion.tool_calls[0].span
    ids = torch.tensor([prompt + list(completion.token_ids)] * 2)
    ids[1, len(prompt) + start + 3] = tokenizer("9")["input_ids"][0]
    with torch.no_grad():
        logps, _, _ = made._get_per_token_logps_and_entropies(
            made.model, ids, torch.ones_like(ids), len(completion.token_ids)
        )
    own = torch.tensor(completion.loss_mask).bool()
    after = own & (torch.arange(len(own)) >= end)
    torch.testing.assert_close(logps[0, :start], logps[1, :start], rtol=0, atol=1e-6)
    assert (logps[0, after] - logps[1, after]).abs().min() > 1e-7
    np.testing.assert_allclose(
        logps[0][own], np.array(completion.logprobs)[own.numpy()], rtol=0, atol=1e-5
    )
