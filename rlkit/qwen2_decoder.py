"""The engine's own decode step for plain Qwen2 models.

For small models most of the time of a ``transformers`` step goes into Python and into copying the
cache. This one walks the weights itself, with fused projections and a cache that grows by doubling.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2ForCausalLM


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
        self.same = dtype == self.exact  # spares calls of .to(), which cost even if they do nothing
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
        self.visible, self.masked = self.embed.new_tensor([0.0, -torch.inf])
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

    def casting(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()  # it cast its weights when it was made

    def read(self, chunks: Sequence[Sequence[int]]) -> Tensor:
        texts = [torch.tensor(chunk) for chunk in chunks]
        ids = pad_sequence(texts, batch_first=True).to(self.embed.device)
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

    def select(self, rows: Tensor) -> None:
        if len(rows) > len(self.position):
            self._take(rows.to(self.embed.device))
            return
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
        places = self.starts[:rows] + slots[:, :, None]
        turns = self.turns[slots][:, :, None]
        both, size = self.heads + self.kv_heads, self.head_dim
        attend = self._attend
        if length == 1 and ids.device.type == "cpu" and self.same:
            attend = self._attend_one
            slots = slots.repeat_interleave(self.kv_heads, dim=0)
        bias = torch.where(self.slots[:end] <= slots[:, :, None], self.visible, self.masked)
        keys, values = self.cache[:, :, :rows, :, :end].flatten(2, 3).unbind(1)
        per_layer = zip(self.layers, self.cache.flatten(1, 4), keys, values, strict=True)
        x = F.embedding(ids.flatten(), self.embed)
        for (qkv, qkv_bias, out, gate_up, down), cache, k, v in per_layer:
            h = torch.addmm(qkv_bias, self._unit(x), qkv).view(rows, length, -1, size)
            pairs = h[:, :, :both].view(rows, length, both, size // 2, 2)
            if self.same:
                torch.view_as_complex(pairs).mul_(turns)
            else:
                turned = torch.view_as_complex(pairs.to(self.exact)) * turns
                pairs.copy_(torch.view_as_real(turned))
            cache[places] = h[:, :, self.heads :]
            x = torch.addmm(x, attend(h[:, :, : self.heads], k, v, bias), out)
            gate, up = torch.mm(self._unit(x), gate_up).chunk(2, dim=-1)
            x = torch.addmm(x, F.silu(gate, inplace=True).mul_(up), down)
        return x

    def _unit(self, x: Tensor) -> Tensor:
        """Root mean square norm without its weights, which are part of the next projection."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.exact)
        scaled = x * norm.square_().add_(self.eps).rsqrt_()
        return scaled if self.same else scaled.to(x.dtype)

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
