"""Key-value cached decoding: the two ways in which the engine runs a model forward.

``Qwen2Decoder`` walks the weights of a Qwen2 model itself, with fused projections and a cache that
grows by doubling. For small models most of the time of a ``transformers`` step goes into Python and
into copying the cache. ``ModuleDecoder`` calls the module's own forward and serves every other
causal model (adapters included). Both have the same four methods.
"""

from __future__ import annotations

from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, Qwen2ForCausalLM


class Decoder(Protocol):
    """Cached forward passes over a set of rows; a row is one response being written."""

    def prefill(self, ids: Tensor, valid: Tensor) -> Tensor:
        """Read left-padded prompts ``ids, valid [rows, length]``; last logits [rows, V]."""
        ...

    def repeat(self, times: int) -> None:
        """Repeat every row ``times`` times, copies next to each other."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Keep only ``rows`` (indices), in that order."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each row, ``tokens [rows]``; its logits [rows, V]."""
        ...


def make_decoder(model: PreTrainedModel | PeftModel) -> Decoder:
    """The fastest decoder that is exact for ``model``."""
    # An exact type test: subclasses and adapter wrappers may change the forward pass.
    if type(model) is not Qwen2ForCausalLM or _has_adapter(model):
        return ModuleDecoder(model)
    windowed = any(kind != "full_attention" for kind in model.config.layer_types or ())
    if windowed or model.model.rotary_emb.rope_type != "default":
        return ModuleDecoder(model)
    return Qwen2Decoder(model)


def _has_adapter(model: PreTrainedModel) -> bool:
    return any("lora_" in name for name, _ in model.named_parameters())


def _positions(valid: Tensor) -> Tensor:
    return (valid.long().cumsum(-1) - 1).clamp(min=0)


class Qwen2Decoder:
    """Decodes a plain ``Qwen2ForCausalLM`` from its weights, which it reads once, when made."""

    def __init__(self, model: Qwen2ForCausalLM) -> None:
        config = model.config
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads or config.num_attention_heads
        self.eps = config.rms_norm_eps
        self.embed = model.model.embed_tokens.weight
        self.head = model.lm_head.weight
        self.norm = model.model.norm.weight
        self.inv_freq = model.model.rotary_emb.inv_freq.float()
        self.layers = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            self.layers.append(
                (
                    layer.input_layernorm.weight,
                    torch.cat([p.weight for p in projections]),
                    torch.cat([p.bias for p in projections]),
                    attention.o_proj.weight,
                    layer.post_attention_layernorm.weight,
                    torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                    mlp.down_proj.weight,
                )
            )
        self.head_dim = self.layers[0][1].shape[0] // (self.heads + 2 * self.kv_heads)
        self.length = 0

    def prefill(self, ids: Tensor, valid: Tensor) -> Tensor:
        rows, length = ids.shape
        shape = (2, len(self.layers), rows, self.kv_heads, 2 * length, self.head_dim)
        self.cache = self.embed.new_empty(shape)
        self.valid = valid.bool()
        self.next_position = valid.long().sum(-1)
        self.length = 0
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        mask = causal & self.valid[:, None, None, :]
        # A padding query would attend to nothing and turn into nan: let it see itself.
        mask = mask | torch.eye(length, dtype=torch.bool, device=ids.device)
        return self._forward(ids, _positions(valid), mask)

    def repeat(self, times: int) -> None:
        self.cache = self.cache.repeat_interleave(times, dim=2)
        self.valid = self.valid.repeat_interleave(times, dim=0)
        self.next_position = self.next_position.repeat_interleave(times)

    def keep(self, rows: Tensor) -> None:
        self.cache = self.cache.index_select(2, rows)
        self.valid = self.valid[rows]
        self.next_position = self.next_position[rows]

    def step(self, tokens: Tensor) -> Tensor:
        if self.length == self.cache.shape[4]:
            self.cache = torch.cat([self.cache, torch.empty_like(self.cache)], dim=4)
        self.valid = F.pad(self.valid, (0, 1), value=True)
        logits = self._forward(
            tokens[:, None], self.next_position[:, None], self.valid[:, None, None, :]
        )
        self.next_position = self.next_position + 1
        return logits

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        rows, length = ids.shape
        angles = positions[:, None, :, None].float() * self.inv_freq
        cos = torch.cat([angles.cos()] * 2, dim=-1).to(self.embed.dtype)
        sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).to(self.embed.dtype)
        start, end = self.length, self.length + length
        x = F.embedding(ids, self.embed)
        width = (x.shape[-1],)
        both = self.heads + self.kv_heads
        for index, (norm1, qkv, bias, out, norm2, gate_up, down) in enumerate(self.layers):
            h = F.linear(F.rms_norm(x, width, norm1, self.eps), qkv, bias)
            h = h.view(rows, length, both + self.kv_heads, self.head_dim).transpose(1, 2)
            rotated = h[:, :both]
            # Rotating by half the head: (x1, x2) -> (-x2, x1); the sign is in ``sin``.
            rotated = rotated * cos + rotated.roll(self.head_dim // 2, -1) * sin
            keys, values = self.cache[0, index], self.cache[1, index]
            keys[:, :, start:end] = rotated[:, self.heads :]
            values[:, :, start:end] = h[:, both:]
            attended = F.scaled_dot_product_attention(
                rotated[:, : self.heads],
                keys[:, :, :end],
                values[:, :, :end],
                attn_mask=mask,
                enable_gqa=self.heads != self.kv_heads,
            )
            x = x + F.linear(attended.transpose(1, 2).flatten(2), out)
            gate, up = F.linear(F.rms_norm(x, width, norm2, self.eps), gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, down)
        self.length = end
        return F.linear(F.rms_norm(x[:, -1], width, self.norm, self.eps), self.head)


class ModuleDecoder:
    """Decodes any causal ``transformers`` model through its own forward."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model = model

    def prefill(self, ids: Tensor, valid: Tensor) -> Tensor:
        self.cache = DynamicCache(config=self.model.config)
        self.valid = valid.long()
        return self._forward(ids, _positions(valid))

    def repeat(self, times: int) -> None:
        self.cache.batch_repeat_interleave(times)
        self.valid = self.valid.repeat_interleave(times, dim=0)

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.valid = self.valid[rows]

    def step(self, tokens: Tensor) -> Tensor:
        positions = self.valid.sum(-1, keepdim=True)
        self.valid = F.pad(self.valid, (0, 1), value=1)
        return self._forward(tokens[:, None], positions)

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
