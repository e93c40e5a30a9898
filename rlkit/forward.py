"""Log-probabilities of rollouts for training, without padding and with each prompt read once.

A group shares its prompt, and most of a padded batch is padding: on short tasks more than half of
the positions that ``transformers`` computes are copies of prompts or empty. Here the tokens of all
rows lie in one packed sequence. Every unique prompt is in it once, each completion without its last
token, which predicts nothing. Linear layers see only these tokens; attention runs over buckets of
rows of like length. Values and gradients equal those of a padded forward pass up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2ForCausalLM
from trl.kernels import ChunkedLogProbFunction

from rlkit.models import is_plain_qwen2

SHORTEST = 0.5
"""A bucket's rows are at least this share of its longest row: bounds the padding in attention."""
CHUNK = 8192
"""Vocabulary entries that the LM head scores at once; bounds the memory of logits."""


@dataclass(frozen=True)
class Bucket:
    """Rows that attend together.

    Attributes:
        queries: packed index of each query [rows, query length]; padding points anywhere.
        keys: packed index of each key [rows, key length].
        mask: additive mask [rows, 1, query length, key length].
        valid: indices of real queries among the flattened ``queries``, in packed order.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Layout:
    """Where everything lies in the packed sequence of T tokens.

    Attributes:
        ids, positions: [T].
        buckets: together they cover the T tokens in order.
        sources: packed index of the token that predicts each of the N scored tokens.
        targets: [N] the scored tokens.
        places: index of each scored token in the flattened [rows, completion width] result.
        shape: (rows, completion width).
    """

    ids: Tensor
    positions: Tensor
    buckets: tuple[Bucket, ...]
    sources: Tensor
    targets: Tensor
    places: Tensor
    shape: tuple[int, int]


def supports(model: object) -> bool:
    """Whether ``score`` computes what the model's own forward pass does."""
    return is_plain_qwen2(model)


def layout(ids: Tensor, mask: Tensor, completion_width: int, dtype: torch.dtype) -> Layout:
    """Plan the packed pass over ``ids, mask [rows, prompt width + completion width]``.

    Prompts are padded on the left, completions on the right; a row without completion tokens is
    scored nowhere.
    """
    border = ids.shape[1] - completion_width
    prompt_lengths = mask[:, :border].sum(1).tolist()
    lengths = mask[:, border:].sum(1).tolist()
    table = ids.tolist()
    prompts: dict[tuple[int, ...], int] = {}
    owner = []
    for row, length in zip(table, prompt_lengths, strict=True):
        owner.append(prompts.setdefault(tuple(row[border - length : border]), len(prompts)))
    packed: list[int] = []
    positions: list[int] = []
    where = []  # packed index of each prompt's tokens
    for prompt in prompts:
        where.append(range(len(packed), len(packed) + len(prompt)))
        packed += prompt
        positions += range(len(prompt))
    buckets = [_bucket([(r, r) for r in where], dtype)]
    sources: list[int] = []
    targets: list[int] = []
    places: list[int] = []
    waiting: list[tuple[range, range]] = []
    for row in sorted((r for r, n in enumerate(lengths) if n), key=lambda r: -lengths[r]):
        before, length = where[owner[row]], lengths[row]
        own = range(len(packed), len(packed) + length - 1)
        packed += table[row][border : border + length - 1]
        positions += range(len(before), len(before) + length - 1)
        sources += [before[-1], *own]
        targets += table[row][border : border + length]
        places += range(row * completion_width, row * completion_width + length)
        if own and waiting and len(own) < SHORTEST * len(waiting[0][1]):
            buckets.append(_bucket(waiting, dtype))
            waiting = []
        if own:
            waiting.append((before, own))
    if waiting:
        buckets.append(_bucket(waiting, dtype))
    device = ids.device
    return Layout(
        ids=torch.tensor(packed, device=device),
        positions=torch.tensor(positions, device=device),
        buckets=tuple(
            Bucket(*(t.to(device) for t in (b.queries, b.keys, b.mask, b.valid))) for b in buckets
        ),
        sources=torch.tensor(sources, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
        places=torch.tensor(places, dtype=torch.long, device=device),
        shape=(ids.shape[0], completion_width),
    )


def _bucket(rows: Sequence[tuple[range, range]], dtype: torch.dtype) -> Bucket:
    """Rows as (prompt, own tokens); equal ranges mean a prompt that attends to itself."""
    starts = [0 if before == own else len(before) for before, own in rows]
    keys = [list(own) if before == own else [*before, *own] for before, own in rows]
    width, length = max(len(own) for _, own in rows), max(map(len, keys))
    query_index = torch.zeros(len(rows), width, dtype=torch.long)
    key_index = torch.zeros(len(rows), length, dtype=torch.long)
    for i, (_, own) in enumerate(rows):
        query_index[i, : len(own)] = torch.tensor(own, dtype=torch.long)
        key_index[i, : len(keys[i])] = torch.tensor(keys[i], dtype=torch.long)
    query = torch.arange(width)
    # Padding queries see key 0 and later ones too: finite, and never read.
    seen = torch.arange(length) <= (torch.tensor(starts)[:, None] + query)[:, :, None]
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)
    counts = torch.tensor([len(own) for _, own in rows])
    valid = (query < counts[:, None]).flatten().nonzero()[:, 0]
    return Bucket(query_index, key_index, mask[:, None], valid)


def score(model: Qwen2ForCausalLM, plan: Layout, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [rows, completion width] of the completions; 0 elsewhere.

    Args:
        model: a plain Qwen2 (``models.is_plain_qwen2``).
        plan: of ``layout``.
        temperature: logits are divided by it.
    """
    hidden = _hidden(model, plan)
    head = model.lm_head
    logps, entropies, *_ = ChunkedLogProbFunction.apply(
        hidden[plan.sources], head.weight, head.bias, plan.targets, temperature,
        min(CHUNK, len(head.weight)), None, 1.0, ("log_probs", "entropy"),
    )  # fmt: skip
    rows, width = plan.shape
    empty = logps.new_zeros(rows * width)
    return (
        empty.index_copy(0, plan.places, logps).view(rows, width),
        empty.index_copy(0, plan.places, entropies).view(rows, width),
    )


def _hidden(model: Qwen2ForCausalLM, plan: Layout) -> Tensor:
    """Last hidden states of the packed tokens [T, hidden]."""
    config, body = model.config, model.model
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    angles = plan.positions[:, None, None].float() * body.rotary_emb.inv_freq.float()
    x = body.embed_tokens(plan.ids)  # the module: it gives the pad token no gradient
    cos = torch.cat([angles.cos()] * 2, dim=-1).to(x.dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).to(x.dtype)
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        h = layer.input_layernorm(x)
        q = _rotate(attention.q_proj(h).unflatten(-1, (heads, -1)), cos, sin)
        k = _rotate(attention.k_proj(h).unflatten(-1, (kv_heads, -1)), cos, sin)
        v = attention.v_proj(h).unflatten(-1, (kv_heads, -1))
        if kv_heads != heads:
            k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        attended = torch.cat([_attend(q, k, v, bucket) for bucket in plan.buckets])
        x = x + attention.o_proj(attended)
        x = x + mlp(layer.post_attention_layernorm(x))
    return body.norm(x)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x [T, heads, head dim]``; the sign of the rotation is in ``sin``."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def _attend(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket) -> Tensor:
    """Attention outputs [real queries, heads * head dim] of one bucket."""
    out = F.scaled_dot_product_attention(
        _gather(q, bucket.queries),
        _gather(k, bucket.keys),
        _gather(v, bucket.keys),
        attn_mask=bucket.mask,
    )
    return out.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, bucket.valid)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """``x [T, heads, head dim]`` at ``index [rows, length]`` -> [rows, heads, length, head dim]."""
    rows, length = index.shape
    picked = x.flatten(1).index_select(0, index.flatten())
    return picked.view(rows, length, *x.shape[1:]).transpose(1, 2)
