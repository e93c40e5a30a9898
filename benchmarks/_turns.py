"""The usual loop for code in responses: turn by turn, everything read again, runs in between."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from _clock import patched
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from rlkit import engine
from rlkit.engine import Engine, Sampling
from rlkit.sandbox import Result
from rlkit.stop_texts import StopTexts
from rlkit.streams import Keys, pick_tokens, uniforms
from rlkit.tools import Tools

Turn = Callable[[list[list[int]], int], list[list[int]]]
"""From the texts so far and the most tokens to write to what each row writes until it ends or
closes a block."""
Run = Callable[[Sequence[str]], list[Result]]
"""Runs the programs of one turn."""


@dataclass
class Draws:
    """Makes each token depend on row and place in the response alone, for all sides alike.

    Attributes:
        streams: of each row.
        scripts: what each row writes [rows, longest], outputs included; None lets the policy write.
        active: rows that are being written, in order.
        offset: tokens that each row held when this turn began [rows].
    """

    streams: Keys
    scripts: NDArray[np.int64] | None = None
    active: list[int] = field(default_factory=list)
    offset: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        self._row = {int(stream): row for row, stream in enumerate(self.streams)}
        self._drawn: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        self.begin(list(range(len(self.streams))), [0] * len(self.streams))

    def begin(self, rows: list[int], held: Sequence[int]) -> None:
        """A turn of these rows, which hold so many tokens of a response already."""
        self.active = rows
        self.offset = np.zeros(len(self.streams), np.int64)
        self.offset[rows] = held

    def uniforms(self, streams: Keys, place: NDArray[np.int64]) -> NDArray[np.float64]:
        """As ``streams.uniforms``, with places counted from the start of the turn."""
        rows = np.array([self._row[int(stream)] for stream in streams])
        places = self.offset[rows] + place
        self._drawn = rows, places
        return uniforms(streams, places)

    def pick(
        self, logits: Tensor, sampling: Sampling, uniform: NDArray[np.float64]
    ) -> tuple[Tensor, Tensor]:
        """As ``streams.pick_tokens``, which runs in any case; then the script is followed."""
        tokens, logprobs = pick_tokens(logits, sampling, uniform)
        if self.scripts is not None:
            assert self._drawn is not None
            rows, places = self._drawn
            places = np.minimum(places, self.scripts.shape[1] - 1)  # rows that generate pads
            tokens = torch.from_numpy(self.scripts[rows, places])
        return tokens, logprobs

    def row_streams(self, keys: Sequence[int], n: int, first_sample: int) -> Keys:
        """The streams of the active rows, whatever their keys."""
        return self.streams[self.active]

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """``rlkit.engine`` draws like this."""
        with (
            patched(engine, "uniforms", self.uniforms),
            patched(engine, "pick_tokens", self.pick),
            patched(engine, "row_streams", self.row_streams),
        ):
            yield


@dataclass(frozen=True)
class Written:
    """All responses of a side: their tokens, and which of them the policy wrote."""

    ids: list[list[int]]
    policy_tokens: int
    calls: int


def by_turns(
    prompts: Sequence[list[int]], tools: Tools, draws: Draws, budget: int, turn: Turn, run: Run
) -> Written:
    """Write, run, append, and begin again with all texts so far, as TRL's ``_tool_call_loop``.

    Unlike there a turn ends at the closing fence, and no turn gets more than the largest rest of
    a budget: both spare the usual loop tokens that it would throw away.

    Args:
        prompts: one per row.
        tools: finds blocks, makes output blocks.
        draws: told which rows a turn writes.
        budget: tokens of a response, outputs included.
        turn: writes one turn.
        run: runs its programs.
    """
    ends = {int(tools.tokenizer.eos_token_id)}
    ids: list[list[int]] = [[] for _ in prompts]
    calls, policy_tokens = [0] * len(prompts), 0
    active = list(range(len(prompts)))
    while active:
        held = [len(ids[row]) for row in active]
        draws.begin(active, held)
        texts = [prompts[row] + ids[row] for row in active]
        called = []
        for row, new in zip(active, turn(texts, budget - min(held)), strict=True):
            new = new[: budget - len(ids[row])]
            ids[row] += new
            policy_tokens += len(new)
            if new[-1] in ends or len(ids[row]) == budget:
                continue
            block = tools.search()(str(tools.tokenizer.decode(new)))
            if block is None:
                raise RuntimeError(f"row {row} stopped without a block, an end or its budget")
            if calls[row] < tools.config.max_calls:
                called.append((row, block))
        results = run([block.code for _, block in called])
        for (row, block), result in zip(called, results, strict=True):
            calls[row] += 1
            output = tools.encode(tools.block(result, block))
            ids[row] += output[: budget - len(ids[row])]
        active = [row for row, _ in called if len(ids[row]) < budget]
    return Written(ids, policy_tokens, sum(calls))


class _Fences(StopTexts):
    """Ends a row of the engine where a block is closed."""

    def __init__(self, tools: Tools, vocabulary: int, window: int) -> None:
        self.stop, self.tokenizer, self.tools = (), tools.tokenizer, tools
        self.window = window
        self.may_end = np.array([tools.may_close([i]) for i in range(vocabulary)])

    def found(self, tail: Sequence[int]) -> bool:
        return self.tools.search()(str(self.tokenizer.decode(list(tail)))) is not None


class TurnEngine(Engine):
    """``rlkit.engine`` for one turn at a time.

    Args:
        model: the policy.
        tools: finds blocks.
        budget: tokens of a response.
    """

    def __init__(self, model: PreTrainedModel, tools: Tools, budget: int) -> None:
        super().__init__(model, tools.tokenizer)
        self._fences = _Fences(tools, model.config.vocab_size, budget)

    def _stop_texts(self, sampling: Sampling, vocabulary: int) -> StopTexts:
        return self._fences

    def turn(self, texts: list[list[int]], room: int) -> list[list[int]]:
        """See ``Turn``; the random numbers are those of ``Draws.used``."""
        found = self.generate(texts, Sampling(room), n=1, keys=range(len(texts)))
        return [list(completion.token_ids) for (completion,) in found]


class _Drawn(LogitsProcessor):
    """Leaves one token possible: the one that ``Draws`` picks."""

    def __init__(self, draws: Draws, start: int) -> None:
        self.draws, self.start = draws, start
        self.streams = draws.streams[draws.active]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = np.full(len(self.streams), input_ids.shape[1] - self.start)
        uniform = self.draws.uniforms(self.streams, place)
        chosen, _ = self.draws.pick(scores, Sampling(1), uniform)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


class _AtFence(StoppingCriteria):
    """Ends the rows that close a block; ``length`` holds the tokens they had then."""

    def __init__(self, tools: Tools, start: int) -> None:
        self.tools, self.start = tools, start
        self.length: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        ended = torch.zeros(len(input_ids), dtype=torch.bool)
        for row, newest in enumerate(input_ids[:, -1].tolist()):
            if row in self.length or not self.tools.may_close([newest]):
                continue
            new = input_ids[row, self.start :].tolist()
            if self.tools.search()(str(self.tools.tokenizer.decode(new))) is not None:
                self.length[row] = len(new)
                ended[row] = True
        return ended


def generate_turn(
    model: PreTrainedModel, tools: Tools, draws: Draws, texts: list[list[int]], room: int
) -> list[list[int]]:
    """See ``Turn``: a padded batch for ``generate`` of transformers."""
    tokenizer: PreTrainedTokenizerBase = tools.tokenizer
    longest = max(map(len, texts))
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    fences = _AtFence(tools, longest)
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=room,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=end,
            logits_processor=LogitsProcessorList([_Drawn(draws, longest)]),
            stopping_criteria=StoppingCriteriaList([fences]),
        )
    turns = []
    for row, new in enumerate(output[:, longest:].tolist()):
        length = fences.length.get(row, new.index(end) + 1 if end in new else len(new))
        turns.append(new[:length])
    return turns


def by_subprocess(codes: Sequence[str], seconds: float) -> list[Result]:
    """Each program as ``python -c``, one after the other: nothing is kept inside."""
    return [_one_subprocess(code, seconds) for code in codes]


def _one_subprocess(code: str, seconds: float) -> Result:
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return Result("timeout", wall_seconds=seconds)
    if not done.returncode:
        return Result("ok", done.stdout, done.stderr)
    trace = done.stderr.rstrip("\n")
    return Result("error", done.stdout, error=trace.rpartition("\n")[2], traceback=trace)


def generating(model: PreTrainedModel, tools: Tools, draws: Draws) -> Turn:
    """``generate_turn`` of this model."""
    return functools.partial(generate_turn, model, tools, draws)
