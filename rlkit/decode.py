"""Key-value cached decoding: the two ways in which the engine runs a model forward.

``Qwen2Decoder`` (``rlkit.qwen2_decoder``) walks the weights of a plain Qwen2 model itself.
``ModuleDecoder`` calls the module's own forward and serves every other causal model (adapters
included). Both have the same methods.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel, Qwen2ForCausalLM
from transformers.cache_utils import DynamicLayer

from rlkit.models import is_plain_qwen2
from rlkit.qwen2_decoder import Qwen2Decoder


class Decoder(Protocol):
    """Cached forward passes over a set of rows; a row is one response being written."""

    def casting(self) -> contextlib.AbstractContextManager[object]:
        """What all calls of a generation run in; inside, weights are cast once."""
        ...

    def read(self, chunks: Sequence[Sequence[int]]) -> Tensor:
        """Append its chunk (>= 1 token) to each row; logits after the last token [rows, V].

        The first call makes the rows and reads their prompts.
        """
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each row, ``tokens [rows]``; its logits [rows, V]."""
        ...

    def select(self, rows: Tensor) -> None:
        """Replace the rows by ``rows`` (indices on the CPU) in that order, repeated ones too."""
        ...

    def split(self, rows: Tensor) -> Self:
        """A copy of ``rows`` as a decoder of its own, which shares the weights."""
        ...

    def join(self, other: Self) -> None:
        """Append the rows of ``other``, which must not be used any more."""
        ...


def make_decoder(model: PreTrainedModel | PeftModel, dtype: torch.dtype | None = None) -> Decoder:
    """The fastest decoder that is exact for ``model``; computes in ``dtype``, if given."""
    if isinstance(model, Qwen2ForCausalLM) and is_plain_qwen2(model):
        return Qwen2Decoder(model, dtype)
    return ModuleDecoder(model, dtype)


class ModuleDecoder:
    """Decodes any causal ``transformers`` model through its own forward.

    Tokens keep their order in the cache; ``valid`` says which slots hold tokens, not padding.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, dtype: torch.dtype | None) -> None:
        self.model = model
        self.dtype = dtype
        self.cache = _growing_cache(model)
        self.valid = torch.zeros(0, 0, dtype=torch.long, device=model.device)

    def casting(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, self.dtype)

    def read(self, chunks: Sequence[Sequence[int]]) -> Tensor:
        ids, fresh = (
            pad_sequence(rows, batch_first=True, padding_side="left").to(self.model.device)
            for rows in (
                [torch.tensor(chunk) for chunk in chunks],
                [torch.ones(len(chunk), dtype=torch.long) for chunk in chunks],
            )
        )
        before = self.valid.sum(-1, keepdim=True) if len(self.valid) else 0
        self.valid = torch.cat([self.valid, fresh], dim=-1) if len(self.valid) else fresh
        return self._forward(ids, (before + fresh.cumsum(-1) - 1).clamp(min=0))

    def step(self, tokens: Tensor) -> Tensor:
        positions = self.valid.sum(-1, keepdim=True)
        self.valid = F.pad(self.valid, (0, 1), value=1)
        return self._forward(tokens[:, None], positions)

    def select(self, rows: Tensor) -> None:
        rows = rows.to(self.valid.device)
        self.cache.batch_select_indices(rows)
        self.valid = self.valid[rows]

    def split(self, rows: Tensor) -> Self:
        rows = rows.to(self.valid.device)
        valid = self.valid[rows]
        width = int(valid.sum(-1).max())
        # A stable sort of 0 and 1 moves the padding to the front and keeps the tokens' order.
        order = valid.argsort(dim=-1, stable=True)[:, -width:]
        part = copy.copy(self)
        part.valid = valid.gather(1, order)
        part.cache = _growing_cache(self.model)
        for index, (keys, values) in enumerate(self._tensors()):
            at = order[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
            part.cache.update(keys[rows].gather(2, at), values[rows].gather(2, at), index)
        return part

    def join(self, other: Self) -> None:
        width = max(self.valid.shape[1], other.valid.shape[1])
        mine, theirs = width - self.valid.shape[1], width - other.valid.shape[1]
        joined = _growing_cache(self.model)
        for index, (a, b) in enumerate(zip(self._tensors(), other._tensors(), strict=True)):
            keys, values = (
                torch.cat([F.pad(x, (0, 0, mine, 0)), F.pad(y, (0, 0, theirs, 0))])
                for x, y in zip(a, b, strict=True)
            )
            joined.update(keys, values, index)
        self.cache = joined
        self.valid = torch.cat([F.pad(self.valid, (mine, 0)), F.pad(other.valid, (theirs, 0))])

    def _tensors(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [rows, heads, slots, size] of each layer."""
        tensors = []
        for layer in self.cache.layers:
            if type(layer) is not GrowingLayer or layer.keys is None or layer.values is None:
                raise ValueError(
                    f"the model's cache has a {type(layer).__name__}: rows can only leave and "
                    "re-enter (tools) where every layer attends to all earlier tokens"
                )
            tensors.append((layer.keys, layer.values))
        return tensors

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=self.valid,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


class GrowingLayer(DynamicLayer):
    """Keys and values in buffers that grow by doubling.

    ``DynamicLayer`` copies all that it holds at every token, which adds up to the square of the
    length. What it inherits replaces ``keys`` and ``values`` (selecting rows); they are then moved
    to new buffers at the next token.
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffers: dict[str, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [rows, heads, new slots, size]; all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        self.keys = self._append("keys", self.keys, key_states, start)
        self.values = self._append("values", self.values, value_states, start)
        return self.keys, self.values

    def _append(self, name: str, held: Tensor | None, new: Tensor, start: int) -> Tensor:
        end = start + new.shape[-2]
        buffer = self.buffers.get(name)
        if not start:
            held = buffer = None
        mine = held is not None and buffer is not None and held.data_ptr() == buffer.data_ptr()
        if buffer is None or not mine or len(new) != len(buffer) or end > buffer.shape[-2]:
            buffer = new.new_empty((*new.shape[:-2], 2 * end, new.shape[-1]))
            if held is not None:
                buffer[..., :start, :] = held
            self.buffers[name] = buffer
        buffer[..., start:end, :] = new
        return buffer[..., :end, :]


def _growing_cache(model: PreTrainedModel | PeftModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    # A layer with a window holds no more than that; others keep what their class needs.
    cache.layers = [GrowingLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache
