"""Generation for training, evaluation and notebooks alike: one engine, one set of random streams.

Each unique prompt is read once and its cache repeated over the rollouts; finished rows leave the
batch. Draw t of sample j of a problem is a counter-based function of (key, j, t) instead of a
global random state, so rollouts do not change when evaluation is switched on and any one of them
can be made again alone. Bit-identity holds for the same machine, versions, threads and batch;
between batch shapes floats differ, so a token may differ where two are almost equally likely.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlkit.completion import Completion
from rlkit.decode import make_decoder

Keys = NDArray[np.uint64]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
COMPACT_BELOW = 0.8
"""Finished rows are dropped once fewer than this share still runs: dropping copies the cache."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int
    """Token budget of one response; >= 1."""
    temperature: float = 1.0
    """Softmax temperature; > 0. Ignored when greedy."""
    top_p: float = 1.0
    """Nucleus mass in (0, 1]."""
    greedy: bool = False
    """Take the most likely token; the lower id wins an exact tie."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: expected an integer >= 1")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}: expected a number > 0; for greedy decoding set "
                "greedy=True"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a number in (0, 1]")


def stable_key(run_seed: int, purpose: str, step: int, problem_id: str) -> int:
    """64-bit key of a problem's random stream, the same on every machine and Python version."""
    text = f"{run_seed}|{purpose}|{step}|{problem_id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _mix(x: Keys) -> Keys:
    """splitmix64's output function (Steele et al. 2014): a bijection that spreads every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def row_streams(keys: Sequence[int], n: int, first_sample: int) -> Keys:
    """Stream of each row [len(keys) * n]: rows of a prompt next to each other."""
    samples = np.arange(first_sample, first_sample + n, dtype=np.uint64)
    per_key = np.asarray(keys, dtype=np.uint64)[:, None]
    return _mix(per_key + _mix((samples[None, :] + np.uint64(1)) * GOLDEN)).reshape(-1)


def uniforms(streams: Keys, draw: int) -> NDArray[np.float64]:
    """Draw number ``draw`` of each stream, uniform in [0, 1) with 53 bits."""
    # An array of one: numpy wraps arrays in silence, as wanted here, but warns about scalars.
    counter = np.array([draw + 1], dtype=np.uint64)
    bits = _mix(streams + counter * GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def pick_tokens(
    logits: Tensor, sampling: Sampling, uniform: NDArray[np.float64]
) -> tuple[Tensor, Tensor]:
    """Choose a token per row: ``logits [rows, V]`` -> (tokens [rows], log-probabilities [rows]).

    Log-probabilities are of the temperature-scaled policy, before the nucleus cut (what the trainer
    scores). Sampling inverts the cumulative distribution in float64.
    """
    logits = logits.float()
    if not sampling.greedy and sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    logprobs = logits.log_softmax(-1)
    if sampling.greedy:
        tokens = logprobs.argmax(-1)
    else:
        weights = logprobs.double().exp()
        if sampling.top_p < 1:
            weights = _nucleus(weights, sampling.top_p)
        cumulative = weights.cumsum(-1)
        target = torch.as_tensor(uniform, device=logits.device)[:, None] * cumulative[:, -1:]
        # right=True skips tokens of weight zero even when the draw is exactly 0.
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of tokens whose mass reaches ``top_p``."""
    ordered, index = weights.sort(dim=-1, descending=True, stable=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return weights.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), 0.0)


class Engine:
    """Generates responses of one model.

    Args:
        model: a causal model; it is read at each call, so training may go on between calls.
        tokenizer: its tokenizer; must have a pad and an end token.
        max_rows: responses decoded at once; bounds the memory of the cache.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_rows: int = 512,
    ) -> None:
        if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
            raise ValueError(
                f"The tokenizer has eos_token_id={tokenizer.eos_token_id} and "
                f"pad_token_id={tokenizer.pad_token_id}: generation needs both; set "
                "tokenizer.eos_token and tokenizer.pad_token"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        self.end_ids = end_token_ids(model, tokenizer)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        n: int,
        keys: Sequence[int],
        first_sample: int = 0,
        prefill: str = "",
    ) -> list[list[Completion]]:
        """Draw ``n`` responses to each prompt.

        Args:
            prompts: token ids per prompt, templated (``rlkit.templates.encode``).
            sampling: how tokens are drawn.
            n: responses per prompt; >= 1.
            keys: one 64-bit stream key per prompt (``stable_key``).
            first_sample: number of the first sample, to extend an earlier call by more samples.
            prefill: start of the response that the prompts already end with (``<think>``); it is
                shown in each completion's text and nowhere else.

        Returns:
            Completions ``[prompts][n]``.

        Raises:
            ValueError: empty input, lengths that differ, or a prompt and budget beyond the model's
                positions.
        """
        self._check(prompts, sampling, n, keys)
        full = [list(prompt) for prompt in prompts]
        per_pass = max(1, self.max_rows // n)
        done: list[list[Completion]] = []
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                for at in range(0, len(full), per_pass):
                    streams = row_streams(keys[at : at + per_pass], n, first_sample)
                    done += self._decode(full[at : at + per_pass], sampling, n, streams, prefill)
        finally:
            self.model.train(was_training)
        return done

    def _check(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, keys: Sequence[int]
    ) -> None:
        if not prompts:
            raise ValueError("prompts is empty: generation needs at least one prompt")
        if n < 1:
            raise ValueError(f"n={n}: expected at least one sample per prompt")
        if len(keys) != len(prompts):
            raise ValueError(f"{len(keys)} keys for {len(prompts)} prompts: expected one each")
        shortest, longest = min(map(len, prompts)), max(map(len, prompts))
        if shortest == 0:
            raise ValueError("a prompt has no tokens: encode it with rlkit.templates.encode")
        limit = self.model.config.max_position_embeddings
        if longest + sampling.max_new_tokens > limit:
            raise ValueError(
                f"a prompt of {longest} tokens and max_completion_length="
                f"{sampling.max_new_tokens} exceed the model's {limit} positions; lower "
                f"max_completion_length to {max(1, limit - longest)}"
            )

    def _decode(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        n: int,
        streams: Keys,
        prefill: str,
    ) -> list[list[Completion]]:
        device = self.model.device
        longest = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        padded = [[pad] * (longest - len(p)) + list(p) for p in prompts]
        valid = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        decoder = make_decoder(self.model)
        ids = torch.tensor(padded, device=device)
        logits = decoder.prefill(ids, torch.tensor(valid, device=device))
        if n > 1:
            decoder.repeat(n)
            logits = logits.repeat_interleave(n, dim=0)
        rows = len(prompts) * n
        budget = sampling.max_new_tokens
        tokens = torch.full((rows, budget), pad)
        logprobs = torch.zeros(rows, budget)
        length = torch.full((rows,), budget)
        ended = torch.zeros(rows, dtype=torch.bool)
        ends = torch.tensor(self.end_ids)
        batch = torch.arange(rows)  # rows still in the decoder
        running = torch.ones(rows, dtype=torch.bool)  # of the batch, not yet finished
        for draw in range(budget):
            chosen, scores = pick_tokens(logits, sampling, uniforms(streams[batch.numpy()], draw))
            chosen_cpu = chosen.cpu()
            alive = batch[running]
            tokens[alive, draw] = chosen_cpu[running]
            logprobs[alive, draw] = scores.cpu()[running]
            finished = running & torch.isin(chosen_cpu, ends)
            length[batch[finished]] = draw + 1
            ended[batch[finished]] = True
            running &= ~finished
            left = int(running.sum())
            if left == 0 or draw == budget - 1:
                break
            if left < COMPACT_BELOW * len(batch):
                keep = running.nonzero()[:, 0]
                decoder.keep(keep.to(device))
                chosen = chosen[keep.to(device)]
                batch, running = batch[keep], running[keep]
            logits = decoder.step(chosen)
        flat = [
            Completion.from_ids(
                tokens[row, : length[row]].tolist(),
                self.tokenizer,
                stop="eos" if ended[row] else "length",
                prefill=prefill,
                end_ids=self.end_ids,
                logprobs=logprobs[row, : length[row]].tolist(),
            )
            for row in range(rows)
        ]
        return [flat[i : i + n] for i in range(0, rows, n)]


def end_token_ids(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Every id that ends a response: the tokenizer's and those of the model's generation config."""
    listed = model.generation_config.eos_token_id if model.generation_config else None
    more = [] if listed is None else listed if isinstance(listed, list) else [listed]
    return tuple(sorted({tokenizer.eos_token_id, *more}))
