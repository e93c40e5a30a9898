"""Generation for training, evaluation, tools and notebooks alike: one engine, one decode loop.

Each unique prompt is read once and its cache repeated over the rollouts; finished rows leave the
batch at once, rows that wait for a tool leave it with their cache and come back (``toolloop``).
Randomness is a function of problem, sample and place (``streams``). Bit-identity holds for the same
machine, versions, threads and batch; between batch shapes floats differ in their last digits, so a
token may differ where a draw falls next to the border between two tokens
(``benchmarks/regenerate.py`` counts them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlkit.completion import Completion, Stop, ToolCall
from rlkit.config import ModelConfig
from rlkit.decode import Decoder, make_decoder
from rlkit.models import load_policy
from rlkit.stop_texts import StopTexts, holding
from rlkit.streams import Keys, Sampling, pick_tokens, row_streams, stable_key, uniforms
from rlkit.toolloop import Resume, ToolLoop, Waiting

__all__ = [
    "Engine",
    "GenerationError",
    "Sampling",
    "check_call",
    "end_token_ids",
    "load_engine",
    "pick_tokens",
    "row_streams",
    "stable_key",
    "uniforms",
]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


class GenerationError(RuntimeError):
    """A model that cannot be sampled; the text says what to change."""


class Engine:
    """Generates responses of one model.

    Args:
        model: a causal model; it is read at each call, so training may go on between calls.
        tokenizer: its tokenizer; must have a pad and an end token.
        max_rows: responses decoded at once, at most; bounds the memory of the cache.
        dtype: what to compute in, None for the model's own. Weights are cast once per call, so a
            model trained in float32 generates in bfloat16 without paying for the cast at each step.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_rows: int = 512,
        dtype: torch.dtype | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
            raise ValueError(
                f"The tokenizer has eos_token_id={tokenizer.eos_token_id} and "
                f"pad_token_id={tokenizer.pad_token_id}: generation needs both; set "
                "tokenizer.eos_token and tokenizer.pad_token"
            )
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: expected an integer >= 1")
        self.model = model
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        self.dtype = dtype
        self.end_ids = end_token_ids(model, tokenizer)
        self._texts: StopTexts | None = None  # of the last call; made anew for other texts
        self._banned: dict[tuple[str, ...], Tensor] = {}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        n: int,
        keys: Sequence[int],
        first_sample: int = 0,
        prefill: str = "",
        tools: ToolLoop | None = None,
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
            tools: runs code that responses write; ``max_new_tokens`` then counts the tools' output
                too, and log-probabilities of its tokens are 0.

        Returns:
            Completions ``[prompts][n]``.

        Raises:
            ValueError: empty input, lengths that differ, or a prompt and budget beyond the model's
                positions.
            GenerationError: the model computes NaN.
        """
        check_call(prompts, n, keys)
        self._check_positions(max(map(len, prompts)), sampling.max_new_tokens)
        streams = row_streams(keys, n, first_sample)
        owners = [tuple(prompt) for prompt in prompts for _ in range(n)]
        # Whole groups where they fit, so that few prompts are read twice.
        size = self.max_rows - self.max_rows % n or self.max_rows
        done: list[Completion] = []
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                for at in range(0, len(owners), size):
                    block = slice(at, at + size)
                    waiting = None if tools is None else Waiting(tools, at)
                    rows = self._decode(owners[block], sampling, streams[block], waiting)
                    done += rows.completions(self.tokenizer, self.end_ids, prefill)
        finally:
            self.model.train(was_training)
        return [done[i : i + n] for i in range(0, len(done), n)]

    def _check_positions(self, longest: int, budget: int) -> None:
        limit = self.model.config.max_position_embeddings
        if longest + budget <= limit:
            return
        raise ValueError(
            f"a prompt of {longest} tokens and max_completion_length={budget} exceed the model's "
            f"{limit} positions; "
            + (
                f"lower max_completion_length to {limit - longest}"
                if longest < limit
                else "leave the prompt out or shorten it"
            )
        )

    def _decode(
        self,
        prompts: Sequence[tuple[int, ...]],
        sampling: Sampling,
        streams: Keys,
        waiting: Waiting | None,
    ) -> Rows:
        """One pass: a response for each row, ``prompts`` and ``streams`` row by row."""
        decoder = make_decoder(self.model, self.dtype)
        with decoder.casting():
            places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
            logits = decoder.read(list(places))
            if len(places) < len(prompts):
                owner = torch.tensor([places[prompt] for prompt in prompts])
                decoder.select(owner)
                logits = logits[owner.to(logits.device)]
            rows = Rows(len(streams), sampling.max_new_tokens)
            self._write(rows, decoder, logits, sampling, streams, waiting)
        if np.isnan(rows.logprobs).any():
            raise GenerationError(
                "the model computes NaN, so its responses mean nothing. Likely cause: training "
                "diverged. Take an earlier checkpoint, or lower learning_rate or max_grad_norm."
            )
        return rows

    def _write(
        self,
        rows: Rows,
        decoder: Decoder,
        logits: Tensor,
        sampling: Sampling,
        streams: Keys,
        waiting: Waiting | None,
    ) -> None:
        """Sample until all rows have ended."""
        ends = np.zeros(logits.shape[-1], dtype=np.bool_)
        ends[[i for i in self.end_ids if i < len(ends)]] = True
        texts = self._stop_texts(sampling, logits.shape[-1])
        banned = self._banned_tokens(sampling.banned, logits)
        batch = np.arange(len(streams))  # rows in the decoder: all of them still run
        while len(batch):
            if banned is not None:
                logits = logits.masked_fill(banned, -torch.inf)
            uniform = uniforms(streams[batch], rows.length[batch])
            chosen, scores = pick_tokens(logits, sampling, uniform)
            ids = chosen.cpu().numpy()
            rows.append(batch, ids, scores.cpu().numpy())
            gone = rows.finish(batch, ids, ends, texts)
            if waiting is not None:
                gone |= waiting.feed(decoder, batch, ids, gone)
            if gone.any():
                order = _close_ranks(gone)
                batch = batch[order]
                chosen = chosen[torch.from_numpy(order).to(chosen.device)]
                if len(batch):
                    decoder.select(torch.from_numpy(order))
            if len(batch):
                logits = decoder.step(chosen)
            while waiting is not None and waiting.rows:
                results = waiting.results(idle=not len(batch))
                if not results:
                    break
                chunks = {row: chunk for row, r in results if (chunk := rows.resume(row, r))}
                back = waiting.leave([row for row, _ in results], list(chunks))
                if back is not None:
                    read = back.read(list(chunks.values()))
                    if len(batch):
                        decoder.join(back)
                        logits = torch.cat([logits, read])
                    else:
                        decoder, logits = back, read
                    batch = np.concatenate([batch, np.array(list(chunks))])
                if len(batch):
                    break

    def _banned_tokens(self, texts: tuple[str, ...], logits: Tensor) -> Tensor | None:
        """Which tokens are never drawn [V]; None for none."""
        if not texts:
            return None
        if texts not in self._banned:
            known = holding(texts, self.tokenizer, len(self.tokenizer))
            found = np.zeros(logits.shape[-1], dtype=np.bool_)  # the head may be padded
            found[: len(known)] = known[: len(found)]
            if found[: len(known)].all():
                raise ValueError(
                    f"banned={texts!r}: every token holds one of these texts, so nothing is left "
                    "to draw; ban fewer"
                )
            self._banned[texts] = torch.from_numpy(found)
        return self._banned[texts].to(logits.device)

    def _stop_texts(self, sampling: Sampling, vocabulary: int) -> StopTexts | None:
        if not sampling.stop:
            return None
        if self._texts is None or self._texts.stop != sampling.stop:
            self._texts = StopTexts(sampling.stop, self.tokenizer, vocabulary)
        return self._texts


class Rows:
    """What the rows of one pass have written so far.

    Args:
        count: number of rows.
        budget: most tokens of each, forced ones included.
    """

    def __init__(self, count: int, budget: int) -> None:
        self.budget = budget
        self.tokens = np.zeros((count, budget), dtype=np.int64)
        self.logprobs = np.zeros((count, budget), dtype=np.float32)
        self.forced = np.zeros((count, budget), dtype=np.bool_)
        self.length = np.zeros(count, dtype=np.int64)
        self.calls: list[list[ToolCall]] = [[] for _ in range(count)]
        self.stop: list[Stop] = ["length"] * count

    def append(self, batch: Ints, ids: Ints, logprobs: NDArray[np.float32]) -> None:
        """Add one sampled token to each row of ``batch``."""
        at = self.length[batch]
        self.tokens[batch, at] = ids
        self.logprobs[batch, at] = logprobs
        self.length[batch] = at + 1

    def finish(self, batch: Ints, ids: Ints, ends: Flags, texts: StopTexts | None) -> Flags:
        """Which rows of ``batch`` end with their newest token [batch]."""
        ended = ends[ids]
        if texts is not None:
            for i in np.flatnonzero(texts.may_end[ids] & ~ended):
                ended[i] = texts.found(self._sampled_tail(int(batch[i]), texts.window))
        for row in batch[ended]:
            self.stop[row] = "eos"
        return ended | (self.length[batch] == self.budget)

    def _sampled_tail(self, row: int, window: int) -> list[int]:
        """Up to ``window`` newest tokens, none from before the last forced one."""
        end = int(self.length[row])
        start = max(0, end - window)
        forced = np.flatnonzero(self.forced[row, start:end])
        return self.tokens[row, start + (forced[-1] + 1 if len(forced) else 0) : end].tolist()

    def resume(self, row: int, result: Resume) -> list[int]:
        """Append forced tokens; what the model has yet to read of the row, empty if it ended."""
        start = int(self.length[row])
        ids = list(result.ids)[: self.budget - start]
        end = start + len(ids)
        self.tokens[row, start:end] = ids
        self.forced[row, start:end] = True
        self.length[row] = end
        if result.call is not None:
            self.calls[row].append(replace(result.call, span=(start, end)))
        if result.stop is not None:
            self.stop[row] = result.stop
        if result.stop is not None or end == self.budget:
            return []
        return self.tokens[row, start - 1 : end].tolist()  # the last sampled one is unread too

    def _placed(
        self, row: int, call: ToolCall, tokenizer: PreTrainedTokenizerBase, prefill: str
    ) -> ToolCall:
        """The call with the place of its output in the completion's text."""
        start, end = (
            len(prefill + str(tokenizer.decode(self.tokens[row, :at].tolist()))) for at in call.span
        )
        return replace(call, characters=(start, end))

    def completions(
        self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], prefill: str
    ) -> list[Completion]:
        """All rows as completions."""
        done = []
        for row, length in enumerate(self.length.tolist()):
            completion = Completion.from_ids(
                self.tokens[row, :length].tolist(),
                tokenizer,
                stop=self.stop[row],
                prefill=prefill,
                end_ids=end_ids,
                logprobs=self.logprobs[row, :length].tolist(),
            )
            if self.forced[row].any() or self.calls[row]:
                mask = tuple((~self.forced[row, :length]).astype(int).tolist())
                calls = [self._placed(row, call, tokenizer, prefill) for call in self.calls[row]]
                completion = replace(completion, loss_mask=mask, tool_calls=tuple(calls))
            done.append(completion)
        return done


def load_engine(config: ModelConfig, *, chat_template: bool = True) -> Engine:
    """The engine of a model to evaluate: on the GPU if there is one, in ``config.dtype`` there.

    Raises:
        ModelError: see ``models.load_policy``.
    """
    model, tokenizer = load_policy(config, chat_template=chat_template)
    if not torch.cuda.is_available():
        return Engine(model, tokenizer)
    torch.nn.Module.to(model, "cuda")
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else None
    return Engine(model, tokenizer, dtype=dtype)


def check_call(prompts: Sequence[Sequence[int]], n: int, keys: Sequence[int]) -> None:
    """Raise ValueError unless there are prompts with tokens, a key for each, and n >= 1."""
    if not prompts:
        raise ValueError("prompts is empty: generation needs at least one prompt")
    if n < 1:
        raise ValueError(f"n={n}: expected at least one sample per prompt")
    if len(keys) != len(prompts):
        raise ValueError(f"{len(keys)} keys for {len(prompts)} prompts: expected one each")
    if not all(prompts):
        raise ValueError("a prompt has no tokens: encode it with rlkit.templates.encode")


def _close_ranks(gone: Flags) -> Ints:
    """Indices of those who stay, moved as little as possible: the last ones fill the gaps."""
    left = int((~gone).sum())
    order = np.arange(left)
    order[gone[:left]] = left + np.flatnonzero(~gone[left:])
    return order


def end_token_ids(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Every id that ends a response: the tokenizer's and those of the model's generation config."""
    listed = model.generation_config.eos_token_id if model.generation_config else None
    more = [] if listed is None else listed if isinstance(listed, list) else [listed]
    return tuple(sorted({tokenizer.eos_token_id, *more}))
