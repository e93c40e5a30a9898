"""How many floating-point operations the rollouts of a GRPO step need, counted by hand.

A multiplication and an addition count as two operations, as usual. Only matrix products are
counted: norms, activations, softmax and sampling are a few per cent of them at most, and matrix
products are what a machine's rate is quoted for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only model with grouped-query attention and a gated MLP."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read the sizes of a Qwen2 or Llama configuration of transformers."""
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=config.num_key_value_heads or heads,
            head_dim=config.hidden_size // heads,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
        )

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of the matrices of one layer: q, k, v in one; gate, up in one."""
        width = self.heads * self.head_dim
        return (
            (width + 2 * self.kv_heads * self.head_dim, self.hidden),
            (self.hidden, width),
            (2 * self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        )

    @property
    def per_token(self) -> int:
        """Operations of all layers' matrices on one token."""
        return 2 * self.layers * sum(outputs * inputs for outputs, inputs in self.products)

    @property
    def per_pair(self) -> int:
        """Operations of all layers' attention on one query and one key: a score, and its value."""
        return 2 * 2 * self.layers * self.heads * self.head_dim

    @property
    def per_score(self) -> int:
        """Operations of the LM head on one position."""
        return 2 * self.hidden * self.vocabulary


@dataclass(frozen=True)
class Work:
    """What a forward pass has to do: tokens through the layers, query-key pairs, scored places."""

    tokens: int = 0
    pairs: int = 0
    scored: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.tokens + other.tokens, self.pairs + other.pairs, self.scored + other.scored
        )

    def operations(self, shape: Shape) -> int:
        """Of a forward pass; a backward pass takes twice as many."""
        return (
            self.tokens * shape.per_token
            + self.pairs * shape.per_pair
            + self.scored * shape.per_score
        )


def triangle(n: int) -> int:
    """1 + 2 + ... + n."""
    return n * (n + 1) // 2


def prompt_work(length: int) -> Work:
    """Reading a prompt once; its last position is scored."""
    return Work(length, triangle(length), 1)


def completion_work(prompt: int, length: int) -> Work:
    """Every token of a completion but the last, which predicts nothing, attends to all before."""
    own = length - 1
    return Work(own, own * prompt + triangle(own), own)


def rollout_work(prompts: Sequence[int], completions: Sequence[int], group: int) -> Work:
    """The least that generating rollouts takes: each prompt once, no padding, no finished row.

    A forward pass that scores the same rollouts takes exactly as much, if the prompt is shared.

    Args:
        prompts, completions: tokens of each rollout, groups next to each other.
        group: rollouts that share a prompt; 1 where each reads its own.
    """
    total = Work()
    for row, (prompt, length) in enumerate(zip(prompts, completions, strict=True)):
        if row % group == 0:
            total += prompt_work(prompt)
        total += completion_work(prompt, length)
    return total


def padded_work(prompts: Sequence[int], completions: Sequence[int], head_everywhere: bool) -> Work:
    """Scoring all rollouts padded to the longest prompt and completion, attention included.

    Args:
        prompts, completions: tokens of each rollout.
        head_everywhere: the LM head runs on every position but the last (TRL off CUDA), not on
            completions alone.
    """
    rows, width = len(prompts), max(prompts) + max(completions)
    scored = rows * (width - 1) if head_everywhere else sum(completions)
    return Work(rows * width, rows * width * width, scored)


def trained_rows(rewards: Sequence[float], group: int) -> list[bool]:
    """Which rollouts have an advantage that is not zero: those of groups with unequal rewards."""
    kept: list[bool] = []
    for start in range(0, len(rewards), group):
        part = rewards[start : start + group]
        kept += [max(part) - min(part) > 1e-6] * len(part)
    return kept


def decode_passes(prompts: Sequence[int], completions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(rows, query-key pairs) of each decoding pass when finished rows leave at once."""
    for written in range(1, max(completions)):
        alive = [p for p, length in zip(prompts, completions, strict=True) if length > written]
        yield len(alive), sum(alive) + len(alive) * written
