"""Rollouts of scripted lengths: a model with random weights never ends a response by itself."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from _clock import patched
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from rlkit import decode, engine

Lengths = Callable[[int, int], NDArray[np.int64]]
"""Seed and step (1-based) -> tokens of each rollout [batch size], at least 2 each."""


def skewed_lengths(
    seed: int, step: int, *, rows: int, mean: float, longest: int
) -> NDArray[np.int64]:
    """Lengths [rows] of a step's rollouts, lognormal (sigma 1) and cut to 2..``longest``.

    ``mean`` is that of the distribution before the cut, which takes a few per cent off it.
    """
    draws = np.random.default_rng([seed, step]).lognormal(np.log(mean) - 0.5, 1.0, size=rows)
    return np.clip(draws.round().astype(np.int64), 2, longest)


@contextlib.contextmanager
def scripted(model: PreTrainedModel, lengths: Lengths | None, seed: int) -> Iterator[None]:
    """Make rollouts of ``model`` end where the script says: the end token is certain there.

    Everywhere else it is barred. Both ways of generating pay for changing the logits: ``generate``
    of transformers in a LogitsProcessor, ``rlkit.engine`` in a decoder around its own. The n-th
    call of either uses the lengths of step n.
    """
    if lengths is None:
        yield
        return
    chosen, end, calls = lengths, model.config.eos_token_id, itertools.count(1)
    generate: Any = model.generate

    def script() -> Tensor:
        return torch.from_numpy(chosen(seed, next(calls)))

    def decoder(*args: Any) -> ScriptedDecoder:
        return ScriptedDecoder(decode.make_decoder(*args), script(), end)

    def forced(*args: Any, **kwargs: Any) -> Any:
        processor = _ScriptedLogits(script(), end, kwargs["input_ids"].shape[1])
        return generate(*args, logits_processor=LogitsProcessorList([processor]), **kwargs)

    with patched(engine, "make_decoder", decoder), patched(model, "generate", forced):
        yield


def _force(logits: Tensor, over: Tensor, end: int) -> Tensor:
    """Logits [rows, V] with the end token certain where ``over`` [rows], impossible elsewhere."""
    logits = logits.clone()
    logits[:, end] = float("-inf")
    over = over.to(logits.device)
    logits[over] = float("-inf")
    logits[over, end] = 0.0
    return logits


class _ScriptedLogits(LogitsProcessor):
    def __init__(self, lengths: Tensor, end: int, prompt: int) -> None:
        self.lengths, self.end, self.prompt = lengths, end, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # A row that ended is padded by generate, whatever its logits.
        return _force(scores, self.lengths <= input_ids.shape[1] - self.prompt + 1, self.end)


class ScriptedDecoder:
    """A decoder of ``rlkit.decode`` with logits that obey the script."""

    def __init__(self, inner: decode.Decoder, lengths: Tensor, end: int) -> None:
        self.inner, self.lengths, self.end = inner, lengths, end
        self.written = 1

    def read(self, chunks: Sequence[Sequence[int]]) -> Tensor:
        # No row ends at its first token, so rows need not be told apart before they are repeated.
        logits = self.inner.read(chunks)
        return _force(logits, torch.zeros(len(logits), dtype=torch.bool), self.end)

    def casting(self) -> contextlib.AbstractContextManager[object]:
        return self.inner.casting()

    def select(self, rows: Tensor) -> None:
        self.inner.select(rows)
        if self.written > 1:  # before, prompts were repeated: one row per length
            self.lengths = self.lengths[rows]

    def step(self, tokens: Tensor) -> Tensor:
        self.written += 1
        return _force(self.inner.step(tokens), self.lengths <= self.written, self.end)
