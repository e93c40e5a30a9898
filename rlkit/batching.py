"""Which prompts a step uses and how its rollouts become forward passes: pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rlkit.completion import Completion

Tensors = dict[str, torch.Tensor]

_PROMPT_KEYS = ("prompt_ids", "prompt_mask")


def window_indices(seed: int, step: int, pool: int, prompts: int) -> list[int]:
    """Which problems step ``step`` (1-based) uses: a function of the arguments alone.

    Each pass over the pool has its own random order; a pass stops before it would need problems of
    the next one, so the prompts of a step are always different.
    """
    steps_per_pass = pool // prompts
    number, position = divmod(step - 1, steps_per_pass)
    order = np.random.default_rng([seed, number]).permutation(pool)
    return [int(i) for i in order[position * prompts : (position + 1) * prompts]]


def refill_indices(
    seed: int, step: int, number: int, pool: int, taken: Sequence[int], count: int
) -> list[int]:
    """At most ``count`` problems not in ``taken`` for round ``number`` of refilling step ``step``.

    A function of the arguments alone, so that resuming or evaluating cannot shift it.
    """
    order = np.random.default_rng([seed, step, number]).permutation(pool)
    free = set(range(pool)) - set(taken)
    return [int(i) for i in order if int(i) in free][:count]


def loss_mask(completion: Completion, mask_truncated: bool) -> list[int]:
    """1 for each token that is trained on; all 0 for a row that is left out."""
    left_out = completion.stop == "infra" or (mask_truncated and not completion.reached_end)
    return [0] * len(completion.token_ids) if left_out else list(completion.loss_mask)


def trained_tokens(batch: Tensors) -> torch.Tensor:
    """1 for each completion token in the loss [rows, completion width]."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def micro_batches(
    batch: Tensors, updates: int, size: int, *, drop_no_signal: bool = False
) -> list[Tensors]:
    """Split a generation batch into the parts of each update, with little padding.

    Updates keep whole groups together where they divide the prompts. Inside an update rows are
    sorted by completion length, which changes no sum, and each part is cut to its longest row.

    Args:
        batch: tensors with a leading row dimension (0-dimensional ones are shared). ``kept``
            [rows], if there, is False for rows without a reward or taken out by a group filter.
        updates: optimizer updates per generation batch.
        size: rows per part at most.
        drop_no_signal: leave out rows that add nothing to the gradient: advantage 0 or no token in
            the loss. Exact as long as the loss is a sum over rows of terms proportional to the
            advantage, so not with a KL term or an entropy bonus.

    Returns:
        The parts in order, equally many per update. Each carries ``loss_scale`` for losses that
        divide by the rows of a part: with it rows that were left out for lack of signal count, and
        rows not ``kept`` do not (a loss that divides by the tokens of the whole batch,
        ``num_items_in_batch``, has no use for it). And ``token_share``: its tokens in the loss,
        relative to an equal share of those of its update.
    """
    lengths = batch["completion_mask"].sum(1)
    tokens = trained_tokens(batch).sum(1)
    rows = lengths.shape[0]
    per_update = rows // updates
    count = per_update // size
    signal = torch.ones(rows, dtype=torch.bool, device=lengths.device)
    kept = batch.get("kept", signal)
    if drop_no_signal:
        signal = (batch["advantages"] != 0) & (tokens > 0)
    parts = []
    for start in range(0, rows, per_update):
        order = torch.arange(start, start + per_update, device=lengths.device)
        # A part needs a row; without signal one that adds 0 will do.
        order = order[torch.argsort(~signal[order], stable=True)]
        order = order[: max(count, int(signal[order].sum()))]
        if count > 1:
            order = order[torch.argsort(lengths[order], stable=True)]
        else:
            order = order.sort().values
        total = max(1, int(tokens[order].sum()))
        counted = max(1, int(kept[start : start + per_update].sum()))
        for chunk in order.tensor_split(count):
            part = _trim(batch, chunk)
            part["loss_scale"] = torch.tensor(len(chunk) * count / counted)
            part["token_share"] = torch.tensor(int(tokens[chunk].sum()) * count / total)
            parts.append(part)
    return parts


def score_windows(
    attention_mask: torch.Tensor, completion_width: int, size: int
) -> list[tuple[torch.Tensor, slice]]:
    """Parts of at most ``size`` rows of like length, each with the columns that hold tokens.

    Args:
        attention_mask: [rows, prompt width + completion width], prompts padded on the left.
        completion_width: columns of the completions.
        size: rows per part.
    """
    border = attention_mask.shape[1] - completion_width
    prompts, completions = attention_mask[:, :border].sum(1), attention_mask[:, border:].sum(1)
    order = torch.argsort(completions, stable=True)
    return [
        (
            rows,
            slice(
                border - max(1, int(prompts[rows].max())),
                border + max(1, int(completions[rows].max())),
            ),
        )
        for rows in order.split(size)
    ]


def _trim(batch: Tensors, rows: torch.Tensor) -> Tensors:
    width = batch["completion_mask"].shape[1]
    prompt = max(1, int(batch["prompt_mask"][rows].sum(1).max()))
    completion = max(1, int(batch["completion_mask"][rows].sum(1).max()))
    part = {}
    for key, value in batch.items():
        if value.dim() == 0:
            part[key] = value
        elif key in _PROMPT_KEYS:
            part[key] = value[rows, -prompt:]
        elif value.dim() == 2 and value.shape[1] == width:
            part[key] = value[rows, :completion]
        else:
            part[key] = value[rows]
    return part
