"""A random-weight model with the embedded tokenizer, small enough to train in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlkit.config import RunConfig, resolve
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
