r"""Watching a response while it is written: tokens as they come, as text, on some screen."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, TextIO

from IPython.display import DisplayHandle
from transformers import PreTrainedTokenizerBase

from rlkit.completion import Completion, ToolCall
from rlkit.toolloop import Rejoin, Resume, ToolLoop
from rlkit.trace_view import Trace, paint, visible

UPDATES = 20.0
"""Updates of a display per second, at most."""

OnTokens = Callable[[int, Sequence[int], ToolCall | None], None]


class NoTools:
    """A loop that never finds code."""

    rejoin: Rejoin = "barrier"

    def feed(self, row: int, new_ids: Sequence[int]) -> str | None:
        return None

    def submit(self, row: int, code: str) -> None:
        raise RuntimeError(f"row {row}: code was submitted, which this loop never asks for")

    def collect(self, wait: bool) -> list[Resume]:
        return []

    def end(self, row: int) -> None:
        pass


class Watched:
    """A tool loop that tells what passes through it; see ``toolloop.ToolLoop``.

    Args:
        loop: does the work.
        on_tokens: called with (row, ids, None) for tokens that the policy sampled and with (row,
            ids, call) for a tool's output. As with ``feed``, the token that ends a row is not
            among them; outputs may be longer than what the row's budget leaves of them.
        on_wait: called with the row when code starts to run.
    """

    def __init__(
        self,
        loop: ToolLoop,
        on_tokens: OnTokens,
        on_wait: Callable[[int], None] = lambda row: None,
    ) -> None:
        self.loop, self.on_tokens, self.on_wait = loop, on_tokens, on_wait
        self.rejoin: Rejoin = loop.rejoin

    def feed(self, row: int, new_ids: Sequence[int]) -> str | None:
        """Tell of the tokens, then feed them."""
        self.on_tokens(row, new_ids, None)
        return self.loop.feed(row, new_ids)

    def submit(self, row: int, code: str) -> None:
        """Start the code, then tell."""
        self.loop.submit(row, code)
        self.on_wait(row)

    def collect(self, wait: bool) -> Sequence[Resume]:
        """Collect, then tell of the outputs."""
        results = self.loop.collect(wait)
        for result in results:
            self.on_tokens(result.row, result.ids, result.call)
        return results

    def end(self, row: int) -> None:
        """Hand on."""
        self.loop.end(row)


class Screen(Protocol):
    """Where a response appears while it is being written."""

    def update(self, so_far: Trace, now: bool) -> None:
        """The response has grown; ``now``: show it at once, as nothing more comes for a while."""
        ...

    def end(self, final: Trace) -> None:
        """It is complete."""
        ...


class Written:
    """The text of one response, token by token.

    Bytes of a character that is not complete yet are held back, so the text only ever grows.

    Args:
        prefill: start of the text that the prompt holds already.
        budget: most tokens, forced ones included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, budget: int, prefill: str = "") -> None:
        self.tokenizer, self.budget, self.text = tokenizer, budget, prefill
        self.calls: list[ToolCall] = []
        self.ids: list[int] = []
        self._context = self._shown = 0  # ids up to which text was decoded: one step ago, now

    def add(self, ids: Sequence[int], call: ToolCall | None = None, *, last: bool = False) -> None:
        """Append tokens, with ``call`` the output of a tool; ``last``: hold nothing back."""
        start = len(self.text)
        self.ids += [int(i) for i in ids][: self.budget - len(self.ids)]
        # With the tokens of the step before: some decoders treat the first token in another way.
        before = self._decode(self.ids[self._context : self._shown])
        after = self._decode(self.ids[self._context :])
        if last or not after.endswith("\ufffd"):
            self.text += after[len(before) :]
            self._context, self._shown = self._shown, len(self.ids)
        if call is not None:
            self.calls.append(replace(call, characters=(start, len(self.text))))

    def finish(self, completion: Completion, end_ids: Sequence[int]) -> None:
        """Append what never passed the loop: the last token, unless it ends the response."""
        ids = completion.token_ids
        ended = completion.stop == "eos" and ids and ids[-1] in end_ids
        self.add(ids[len(self.ids) : len(ids) - bool(ended)], last=True)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))


class Terminal:
    """Prints a response as it comes; outputs of tools in colour on a terminal."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file or sys.stdout
        self._printed = 0

    def update(self, so_far: Trace, now: bool) -> None:
        new, colour = so_far.text[self._printed :], self.file.isatty()
        forced = any(start <= self._printed < end for start, end in _spans(so_far))
        self._printed = len(so_far.text)
        print(paint(visible(new), "35" if colour and forced else ""), end="", file=self.file)
        self.file.flush()

    def end(self, final: Trace) -> None:
        self.update(final, now=True)
        print(f"\n[{final.facts(colour=self.file.isatty())}]", file=self.file)


class Display:
    """One output of a notebook, updated in place.

    Args:
        publish: shows a text in place of the one before; default one output of the cell.
        clock: seconds, for the pace of the updates.
    """

    def __init__(
        self,
        publish: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.publish, self.clock = publish or _one_output(), clock
        self._last = float("-inf")

    def update(self, so_far: Trace, now: bool) -> None:
        if now or self.clock() - self._last >= 1 / UPDATES:
            self.publish(so_far.render())
            self._last = self.clock()

    def end(self, final: Trace) -> None:
        self.publish(final.render())


def _one_output() -> Callable[[str], None]:
    """Publishes texts (with ANSI colours) to one output of the cell that runs now."""
    handle = DisplayHandle()
    handle.display({"text/plain": ""}, raw=True)
    return lambda text: handle.update({"text/plain": text}, raw=True)


def _spans(shown: Trace) -> list[tuple[int, int]]:
    return [call.characters for call in shown.calls]
