"""A random-weight model, small enough to train in a second, and a trainer on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, set_seed

from rlkit import models, rewards, tasks
from rlkit.completion import Completion
from rlkit.config import RunConfig, resolve
from rlkit.grpo import RolloutTrainer
from rlkit.rollouts import Window
from rlkit.tokenizer import build_tokenizer


def save_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Write a two-layer Qwen2 and its tokenizer to ``folder``."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def grouped_model(
    tokenizer: PreTrainedTokenizerBase, *, positions: int, spread: float
) -> Qwen2ForCausalLM:
    """A two-layer Qwen2 with grouped-query attention and random weights of deviation ``spread``."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        initializer_range=spread,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).eval()


def tiny_config(model: Path, **params: Any) -> RunConfig:
    """Four prompts x four completions of at most 12 tokens, rewarded at random."""
    defaults: dict[str, Any] = {
        "model": str(model),
        "name": "unit-s0",
        "steps": 2,
        "batch_size": 16,
        "rollouts": 4,
        "micro_batch_size": 16,
        "train_problems": 12,
        "max_completion_length": 12,
        "reward": "random",
        "allow_exploitable": True,
    }
    return resolve("tiny-smoke", **{**defaults, **params})


def run_steps(
    config: RunConfig,
    reward_fns: Sequence[tuple[str, rewards.RewardFn, float]],
    folder: Path,
    *,
    untrained: bool = False,
) -> tuple[list[Window], list[dict[str, float]], RolloutTrainer]:
    """Train with given rewards, without a run folder around it."""
    set_seed(config.seed)
    policy, tokenizer = models.load_policy(config.model)
    problems = tasks.load_problems("chain", "train", config.task.train_problems)
    windows, numbers = [], []

    def on_step(window: Window, row: dict[str, float]) -> bool:
        windows.append(window)
        numbers.append(row)
        return False

    made = RolloutTrainer(config, policy, tokenizer, problems, reward_fns, on_step, folder)
    if not untrained:
        made.run()
    return windows, numbers, made


def coin(*args: Any, **info: Any) -> list[float | None]:
    return rewards.random_reward(*args, **info)


def even_tokens(
    completions: Sequence[Completion], problems: Sequence[Mapping[str, Any]], /, **info: Any
) -> list[float | None]:
    """Share of even token ids: something a policy can learn at once."""
    return [sum(t % 2 == 0 for t in c.token_ids) / max(1, len(c.token_ids)) for c in completions]
