"""Responses that are written down beforehand, played by the engine through a decoder of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Self

import torch
from torch import Tensor

from rlkit.completion import Completion
from rlkit.engine import Engine, Sampling
from rlkit.sandbox import Limits, PythonExecutor, Result
from rlkit.tools import Tools

Ids = tuple[int, ...]
CERTAIN = 20.0
"""Logit of the next scripted token; all others are 0."""


class Script:
    """A decoder whose rows draw the tokens of their prompt's script, then ``end``.

    Args:
        scripts: prompt to the tokens that are drawn, forced ones not among them.
        end: the end token.
        vocabulary: number of logits.
        on_step: called with the number of steps taken so far.
    """

    def __init__(
        self,
        scripts: dict[Ids, Sequence[int]],
        end: int,
        vocabulary: int,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.scripts, self.end, self.vocabulary, self.on_step = scripts, end, vocabulary, on_step
        self.rows: list[tuple[Ids, int, Ids]] = []  # prompt, tokens drawn, all that was read
        self.read_by: dict[Ids, Ids] = {}
        self.steps = 0

    def casting(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def read(self, chunks: Sequence[Sequence[int]]) -> Tensor:
        if not self.rows:
            self.rows = [(tuple(c), 0, tuple(c)) for c in chunks]
        else:  # a drawn token and what was forced behind it
            self.rows = [
                (p, n + 1, (*ids, *c)) for (p, n, ids), c in zip(self.rows, chunks, strict=True)
            ]
        return self._logits()

    def step(self, tokens: Tensor) -> Tensor:
        self.steps += 1
        self.on_step(self.steps)
        drawn = tokens.tolist()
        self.rows = [(p, n + 1, (*i, t)) for (p, n, i), t in zip(self.rows, drawn, strict=True)]
        return self._logits()

    def select(self, rows: Tensor) -> None:
        self.rows = [self.rows[i] for i in rows.tolist()]

    def split(self, rows: Tensor) -> Self:
        part = type(self)(self.scripts, self.end, self.vocabulary, self.on_step)
        part.rows, part.read_by = [self.rows[i] for i in rows.tolist()], self.read_by
        return part

    def join(self, other: Self) -> None:
        self.rows += other.rows

    def _logits(self) -> Tensor:
        logits = torch.zeros(len(self.rows), self.vocabulary)
        for place, (prompt, drawn, ids) in enumerate(self.rows):
            script = self.scripts[prompt]
            logits[place, script[drawn] if drawn < len(script) else self.end] = CERTAIN
            self.read_by[prompt] = ids
        return logits


class Player:
    """Plays scripts through ``Engine.generate``.

    Args:
        engine: of any model; its tokenizer gives the end token.
        monkeypatch: puts the scripts in place of the model.
    """

    def __init__(self, engine: Engine, monkeypatch: Any) -> None:
        self.engine, self.monkeypatch = engine, monkeypatch
        self.decoder: Script | None = None

    def prompts(self, scripts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        """A prompt for each script, which is played when the engine reads it."""
        tokenizer = self.engine.tokenizer
        prompts = [[10 + i // 50, 10 + i % 50] for i in range(len(scripts))]
        by_prompt = {tuple(p): list(s) for p, s in zip(prompts, scripts, strict=True)}
        assert isinstance(tokenizer.eos_token_id, int)
        end = tokenizer.eos_token_id

        def make(*_: Any) -> Script:
            self.decoder = Script(by_prompt, end, len(tokenizer), **options)
            return self.decoder

        self.monkeypatch.setattr("rlkit.engine.make_decoder", make)
        return prompts

    def play(
        self,
        scripts: Sequence[Sequence[int]],
        tools: Tools | None,
        *,
        budget: int = 600,
        prefill: str = "",
        max_calls: int | None = None,
        n: int = 1,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> list[Completion]:
        """The completions, prompt after prompt."""
        prompts = self.prompts(scripts, on_step=on_step)
        keys = list(range(len(prompts)))
        with contextlib.ExitStack() as stack:
            loop = None
            if tools is not None:
                loop = stack.enter_context(tools.loop(prefill=prefill, max_calls=max_calls))
            groups = self.engine.generate(
                prompts, Sampling(budget), n=n, keys=keys, prefill=prefill, tools=loop
            )
        return [c for group in groups for c in group]


class Around:
    """An executor around another one that remembers what was asked of it.

    Args:
        inner: runs the code.
        change: what to hand on in place of a run's future.
    """

    def __init__(
        self,
        inner: PythonExecutor,
        change: Callable[[Future[Result]], Future[Result]] = lambda future: future,
    ) -> None:
        self.inner, self.change = inner, change
        self.futures: list[Future[Result]] = []
        self.codes: list[str] = []
        self.cells: list[Any] = []

    @property
    def limits(self) -> Limits:
        return self.inner.limits

    def submit(self, code: str) -> Future[Result]:
        return self._kept(code, self.inner.submit(code))

    def session(self, state: Any) -> Cell:
        cell = Cell(self, self.inner.session(state))
        self.cells.append(cell)
        return cell

    def _kept(self, code: str, future: Future[Result]) -> Future[Result]:
        self.codes.append(code)
        self.futures.append(future)
        return self.change(future)


class Cell:
    """A session of ``Around``."""

    def __init__(self, around: Around, trace: Any) -> None:
        self.around, self.trace, self.closed = around, trace, False

    def submit(self, code: str) -> Future[Result]:
        return self.around._kept(code, self.trace.submit(code))

    def close(self) -> None:
        self.closed = True
        self.trace.close()
