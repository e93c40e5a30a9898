"""Key-value cached decoding: the two ways in which the engine runs a model forward.

``Qwen2Decoder`` walks the weights of a Qwen2 model itself, with fused projections and a cache that
grows by doubling. For small models most of the time of a ``transformers`` step goes into Python and
into copying the cache. ``ModuleDecoder`` calls the module's own forward and serves every other
causal model (adapters included). Both have the same methods.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Protocol, Self

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, Qwen2ForCausalLM
from transformers.cache_utils import DynamicLayer

from rlkit.models import is_plain_qwen2


class Decoder(Protocol):
    """Cached forward passes over a set of rows; a row is one response being written."""

    def read(self, chunks: Sequence[Sequence[int]]) -> Tensor:
        """Append its chunk (>= 1 token) to each row; logits after the last token [rows, V].

        The first call makes the rows and reads their prompts.
        """
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each row, ``tokens [rows]``; its logits [rows, V]."""
        ...

    def repeat(self, times: int) -> None:
        """Repeat every row ``times`` times, copies next to each other."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Keep only ``rows`` (indices on the CPU), in that order."""
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


def _padded(chunks: Sequence[Sequence[int]], left: bool, device: torch.device) -> Tensor:
    longest = max(map(len, chunks))
    gaps = ([0] * (longest - len(chunk)) for chunk in chunks)
    rows = [gap + list(c) if left else list(c) + gap for c, gap in zip(chunks, gaps, strict=True)]
    return torch.tensor(rows, device=device)


class Qwen2Decoder:
    """Decodes a plain ``Qwen2ForCausalLM`` from its weights, which it reads once, when made.

    Token t of a row lies in slot t of its cache, whatever the other rows hold. So rows of any
    length share a batch without padding between tokens, and what lies behind a row's last token is
    hidden by the mask until it is overwritten.
    """

    def __init__(self, model: Qwen2ForCausalLM, dtype: torch.dtype | None) -> None:
        config = model.config
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads or config.num_attention_heads
        weight = model.model.embed_tokens.weight
        dtype = dtype or weight.dtype
        self.exact = torch.promote_types(dtype, torch.float32)  # for norms and rotary embedding
        self.embed = weight.to(dtype)
        self.head = self.embed if model.lm_head.weight is weight else model.lm_head.weight.to(dtype)
        # ``_unit`` leaves out a factor sqrt(size) of the root mean square.
        root = weight.shape[1] ** 0.5
        self.eps = config.rms_norm_eps * weight.shape[1]
        self.norm = (model.model.norm.weight * root).to(dtype)
        self.inv_freq = model.model.rotary_emb.inv_freq.float()
        self.head_dim = 2 * len(self.inv_freq)
        self.layers = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            turned = (self._pairs(attention.q_proj), self._pairs(attention.k_proj))
            value = attention.v_proj
            norm1 = layer.input_layernorm.weight * root
            norm2 = layer.post_attention_layernorm.weight * root
            weights = (
                torch.cat([*(w for w, _ in turned), value.weight]) * norm1,
                torch.cat([*(b for _, b in turned), value.bias]),
                attention.o_proj.weight,
                torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * norm2,
                mlp.down_proj.weight,
            )
            # Transposed views: addmm adds the residual on the way.
            self.layers.append(tuple(w.to(dtype).t() for w in weights))
        self.cache = self.embed.new_zeros(0)
        self.position = torch.zeros(0, dtype=torch.long, device=self.embed.device)
        self.length = 0  # of the longest row

    def _pairs(self, projection: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight and bias in the order in which rotary embedding turns them as complex numbers.

        It turns channel i of a head together with channel i + size / 2; here they become
        neighbours. Queries and keys move alike, so their products stay the same.
        """
        weight, bias = (
            x.unflatten(0, (-1, 2, self.head_dim // 2)).transpose(1, 2).flatten(0, 2)
            for x in (projection.weight, projection.bias)
        )
        return weight, bias

    def read(self, chunks: Sequence[Sequence[int]]) -> Tensor:
        ids = _padded(chunks, left=False, device=self.embed.device)
        counts = torch.tensor([len(chunk) for chunk in chunks], device=ids.device)
        if self.length == 0:
            self.position = torch.zeros_like(counts)
            self._allocate(len(ids), 2 * ids.shape[1])
        slots = self.position[:, None] + torch.arange(ids.shape[1], device=ids.device)
        x = self._forward(ids, slots, self.length + ids.shape[1])
        self.position = self.position + counts
        self.length = int(self.position.max())
        last = torch.arange(len(ids), device=ids.device) * ids.shape[1] + counts - 1
        return self._logits(x[last])

    def step(self, tokens: Tensor) -> Tensor:
        x = self._forward(tokens[:, None], self.position[:, None], self.length + 1)
        self.position = self.position + 1
        self.length += 1
        return self._logits(x)

    def repeat(self, times: int) -> None:
        rows = torch.arange(len(self.position)).repeat_interleave(times)
        self._take(rows.to(self.embed.device))

    def keep(self, rows: Tensor) -> None:
        # In place, and only the rows that change their place: rows leave at most steps.
        moved = (rows != torch.arange(len(rows))).nonzero()[:, 0].to(self.embed.device)
        rows = rows.to(self.embed.device)
        if len(moved):
            used = self.cache[..., : self.length, :]
            used[:, :, moved] = used[:, :, rows[moved]]
        self.position = self.position[rows]
        self.length = int(self.position.max()) if len(rows) else 0

    def split(self, rows: Tensor) -> Self:
        part = copy.copy(self)
        part._take(rows.to(self.embed.device))
        return part

    def join(self, other: Self) -> None:
        mine, total = len(self.position), len(self.position) + len(other.position)
        length = max(self.length, other.length)
        if total > self.cache.shape[2] or length > self.cache.shape[4]:
            self._allocate(max(total, mine * 5 // 4), max(length, self.cache.shape[4]))
        theirs = other.cache[:, :, : len(other.position), :, : other.length]
        self.cache[:, :, mine:total, :, : other.length] = theirs
        self.position = torch.cat([self.position, other.position])
        self.length = length

    def _take(self, rows: Tensor) -> None:
        """Replace the cache by a copy of ``rows``."""
        old = self.cache
        self.position = self.position[rows]
        self.length = int(self.position.max())
        self._allocate(len(rows), 2 * self.length, copied=0)
        self.cache[..., : self.length, :] = old[..., : self.length, :][:, :, rows]

    def _allocate(self, rows: int, slots: int, copied: int | None = None) -> None:
        """A larger cache [layer, key or value, row, head, slot, size] with what was in it.

        Zeros, because even a hidden slot must hold finite numbers: 0 times nan is nan.
        """
        shape = (len(self.layers), 2, rows, self.kv_heads, slots, self.head_dim)
        cache = self.embed.new_zeros(shape)
        copied = len(self.position) if copied is None else copied
        if self.length and copied:
            cache[:, :, :copied, :, : self.length] = self.cache[:, :, :copied, :, : self.length]
        self.cache = cache
        self.slots = torch.arange(slots, device=cache.device)
        # Where slot 0 of [row, key heads then value heads] starts in a layer's cache, in slots.
        starts = torch.arange(2 * rows * self.kv_heads, device=cache.device) * slots
        starts = starts.view(2, rows, self.kv_heads).transpose(0, 1)
        self.starts = starts.reshape(rows, 1, 2 * self.kv_heads)
        angles = self.slots[:, None].float() * self.inv_freq
        self.turns = torch.polar(torch.ones_like(angles), angles)

    def _forward(self, ids: Tensor, slots: Tensor, end: int) -> Tensor:
        """Hidden states [rows * length, size] of ``ids``, written to ``slots`` (below ``end``)."""
        rows, length = ids.shape
        if end > self.cache.shape[4]:
            self._allocate(rows, 2 * end)
        seen = self.slots[:end] <= slots[:, :, None]
        bias = torch.zeros(seen.shape, dtype=self.embed.dtype, device=ids.device)
        bias = bias.masked_fill_(~seen, -torch.inf)
        places = self.starts[:rows] + slots[:, :, None]
        turns = self.turns[slots][:, :, None]
        both, size = self.heads + self.kv_heads, self.head_dim
        attend = self._attend
        if length == 1 and ids.device.type == "cpu" and self.embed.dtype == self.exact:
            attend = self._attend_one
            bias = bias.repeat_interleave(self.kv_heads, dim=0)
        keys, values = self.cache[:, :, :rows, :, :end].flatten(2, 3).unbind(1)
        per_layer = zip(self.layers, self.cache.flatten(1, 4), keys, values, strict=True)
        x = F.embedding(ids.flatten(), self.embed)
        for (qkv, qkv_bias, out, gate_up, down), cache, k, v in per_layer:
            h = torch.addmm(qkv_bias, self._unit(x), qkv).view(rows, length, -1, size)
            pairs = h[:, :, :both].to(self.exact).view(rows, length, both, size // 2, 2)
            turned = torch.view_as_real(torch.view_as_complex(pairs) * turns)
            h[:, :, :both] = turned.view(rows, length, both, size)
            cache[places] = h[:, :, self.heads :]
            x = torch.addmm(x, attend(h[:, :, : self.heads], k, v, bias), out)
            gate, up = torch.mm(self._unit(x), gate_up).chunk(2, dim=-1)
            x = torch.addmm(x, F.silu(gate) * up, down)
        return x

    def _unit(self, x: Tensor) -> Tensor:
        """Root mean square norm without its weights, which are part of the next projection."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.exact)
        return (x * norm.square_().add_(self.eps).rsqrt_()).to(x.dtype)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Attention of ``queries [rows, length, heads, size]`` -> [rows * length, heads * size].

        ``keys, values [rows * kv heads, slots, size]``; ``bias [rows, length, slots]``.
        """
        rows, length = queries.shape[:2]
        keys, values = (x.unflatten(0, (-1, self.kv_heads)) for x in (keys, values))
        if length == 1:  # heads that share keys stand where queries usually do
            grouped = queries.reshape(rows, self.kv_heads, -1, self.head_dim)
            attended = F.scaled_dot_product_attention(grouped, keys, values, bias[:, None])
        else:
            shared = self.heads != self.kv_heads
            attended = F.scaled_dot_product_attention(
                queries.transpose(1, 2), keys, values, bias[:, None], enable_gqa=shared
            ).transpose(1, 2)
        return attended.reshape(rows * length, -1)

    def _attend_one(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """The same for one query per head, where the fused kernel takes twice as long on a CPU.

        ``bias [rows * kv heads, 1, slots]``.
        """
        grouped = queries.reshape(keys.shape[0], -1, self.head_dim)
        scores = torch.baddbmm(bias, grouped, keys.transpose(1, 2), alpha=self.head_dim**-0.5)
        return torch.bmm(scores.softmax(-1), values).view(queries.shape[0], -1)

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(self._unit(x) * self.norm, self.head)


class ModuleDecoder:
    """Decodes any causal ``transformers`` model through its own forward.

    Tokens keep their order in the cache; ``valid`` says which slots hold tokens, not padding.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, dtype: torch.dtype | None) -> None:
        self.model = model
        self.dtype = dtype
        self.cache = DynamicCache(config=model.config)
        self.valid = torch.zeros(0, 0, dtype=torch.long, device=model.device)

    def read(self, chunks: Sequence[Sequence[int]]) -> Tensor:
        ids = _padded(chunks, left=True, device=self.model.device)
        fresh = _padded([[1] * len(chunk) for chunk in chunks], left=True, device=ids.device)
        before = self.valid.sum(-1, keepdim=True) if len(self.valid) else 0
        self.valid = torch.cat([self.valid, fresh], dim=-1) if len(self.valid) else fresh
        return self._forward(ids, (before + fresh.cumsum(-1) - 1).clamp(min=0))

    def step(self, tokens: Tensor) -> Tensor:
        positions = self.valid.sum(-1, keepdim=True)
        self.valid = F.pad(self.valid, (0, 1), value=1)
        return self._forward(tokens[:, None], positions)

    def repeat(self, times: int) -> None:
        self.cache.batch_repeat_interleave(times)
        self.valid = self.valid.repeat_interleave(times, dim=0)

    def keep(self, rows: Tensor) -> None:
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
        part.cache = DynamicCache(config=self.model.config)
        for index, (keys, values) in enumerate(self._tensors()):
            at = order[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
            part.cache.update(keys[rows].gather(2, at), values[rows].gather(2, at), index)
        return part

    def join(self, other: Self) -> None:
        width = max(self.valid.shape[1], other.valid.shape[1])
        mine, theirs = width - self.valid.shape[1], width - other.valid.shape[1]
        joined = DynamicCache(config=self.model.config)
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
            if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
                raise ValueError(
                    f"the model's cache has a {type(layer).__name__}: rows can only leave and "
                    "re-enter (tools) where every layer attends to all earlier tokens"
                )
            tensors.append((layer.keys, layer.values))
        return tensors

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        cast = torch.autocast(self.model.device.type, self.dtype) if self.dtype else nullcontext()
        with cast:
            output = self.model(
                input_ids=ids,
                attention_mask=self.valid,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1]
