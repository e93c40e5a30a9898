r"""The tool loop: python blocks are run while the response is being written.

At the closing fence of a block its row stops, alone; the code runs in the executor beside that of
all other waiting rows; the output block is appended as forced tokens (loss mask 0) and the row goes
on from its own cache with what is left of its budget. Ids are only ever appended, never made anew
from text. The same loop serves training, evaluation and notebooks:

    with open_tools(config, tokenizer) as tools, tools.loop() as loop:
        engine.generate(prompts, sampling, n=8, keys=keys, tools=loop)

What ends a call and what ends a response: time, memory and output limits end the call, and the
output block says so. The response ends at the block after its last allowed call (stop ``calls``),
at the token budget (``length``, output counted), or if the machinery failed (``infra``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from typing import Any, Literal, Protocol, Self

from transformers import PreTrainedTokenizerBase

from rlkit.checks import require
from rlkit.completion import ToolCall
from rlkit.fences import Block, FindBlock, Search, still3_block
from rlkit.sandbox import Limits, PythonExecutor, Result
from rlkit.stop_texts import holding
from rlkit.tool_config import ToolConfig, ToolState
from rlkit.tool_text import describe, format_output, output_ids
from rlkit.toolloop import Rejoin, Resume

FENCES = ("`", "~")


class Cells(Protocol):
    """The blocks of one response, run one after the other."""

    def submit(self, code: str) -> Future[Result]:
        """Start the next block."""
        ...

    def close(self) -> None:
        """Let the variables go."""
        ...


class Executor(Protocol):
    """What runs code: ``sandbox.PythonExecutor``, ``remote_executor.SandboxFusionExecutor``, or one
    around them.
    """

    @property
    def limits(self) -> Limits:
        """Limits of each run."""
        ...

    def submit(self, code: str) -> Future[Result]:
        """Start a run without earlier variables."""
        ...

    def session(self, state: ToolState) -> Cells:
        """The blocks of one response."""
        ...


class Tools:
    """An executor with the rules by which responses use it; serves any number of loops.

    Args:
        executor: runs the code.
        tokenizer: of the policy.
        config: the rules.
    """

    def __init__(
        self, executor: Executor, tokenizer: PreTrainedTokenizerBase, config: ToolConfig
    ) -> None:
        self.executor, self.tokenizer, self.config = executor, tokenizer, config
        # Only a token with one of these characters can close a block: others are not decoded.
        marks = ("\n",) if config.tool_format == "still3" else FENCES
        # (U+FFFD: a piece of a character, which may hold another one behind it.)
        self._closers = holding((*marks, "\ufffd"), tokenizer, len(tokenizer))
        self._tokens = [t for t in map(str, tokenizer.all_special_tokens) if len(t) > 1]

    def loop(
        self, *, prefill: str = "", max_calls: int | None = None, rejoin: Rejoin | None = None
    ) -> CodeLoop:
        """A loop for one call of ``Engine.generate``, as a context manager.

        Args:
            prefill: as given to ``generate``; a block may begin in it (not with ``still3``).
            max_calls: calls per response instead of the configured number; 0: the first block
                ends the response.
            rejoin: instead of the configured way.
        """
        calls = self.config.max_calls if max_calls is None else max_calls
        require(type(calls) is int and calls >= 0, "max_calls", calls, "an integer >= 0")
        return CodeLoop(self, prefill, calls, rejoin or self.config.rejoin)

    def search(self) -> FindBlock:
        """Looks for the next block of one response, in its growing text since the last output."""
        return still3_block if self.config.tool_format == "still3" else Search().find

    def may_close(self, ids: Sequence[int]) -> bool:
        """Whether one of the tokens can hold a piece of a closing fence."""
        return any(i >= len(self._closers) or self._closers[i] for i in ids)

    def text(self, result: Result, code: str | None = None) -> str:
        """What the model reads about a run, fence not included.

        ``code``: that ran; needed with ``tool_format='still3'``.
        """
        if self.config.tool_format == "still3":
            shown = format_output(result, compat="still3", code=code, tokens=self._tokens)
            return shown.removeprefix("```Output\n").removesuffix("```\n\n")
        return describe(result, **self._shown())

    def block(self, result: Result, code: Block) -> str:
        r"""The text that follows a block: its output, fenced, on a line of its own.

        Where the policy has begun an output block itself ("```output" in place of the closing
        fence), the output goes into that one.
        """
        if self.config.tool_format == "still3":
            return format_output(result, compat="still3", code=code.code, tokens=self._tokens)
        shown = format_output(result, **self._shown())
        if code.rest.strip(" \t\n").lower() == "output":
            return shown.removeprefix("```output" + "\n" * code.rest.endswith("\n"))
        return shown if code.rest.endswith("\n") else "\n" + shown

    def encode(self, block: str) -> tuple[int, ...]:
        """Token ids of an output block; special tokens in it are text like any other."""
        return output_ids(block, self.tokenizer)

    def _shown(self) -> dict[str, Any]:
        return {
            "errors": self.config.tool_errors,
            "max_characters": self.config.tool_characters,
            "limits": self.executor.limits,
            "tokens": self._tokens,
        }


class Writing:
    """What a row has written since the last output, decoded piece by piece.

    Decoded anew at each token, a response of little but backticks would take minutes.

    Args:
        tools: decode the ids and say how blocks are found.
        text: what stands before the first token.
    """

    def __init__(self, tools: Tools, text: str = "") -> None:
        self.find = tools.search()
        self._tokenizer = tools.tokenizer
        self._text, self._ids = text, list[int]()
        self._seen = (0, 0)  # from where to decode; up to where ``_text`` goes

    def add(self, ids: Sequence[int]) -> None:
        """Append tokens."""
        self._ids += ids

    def text(self) -> str:
        """All of it; a character that is still incomplete is U+FFFD."""
        start, end = self._seen
        # Together with the piece before it: some decoders drop the space in front of a first token.
        before = self._decode(self._ids[start:end])
        now = self._decode(self._ids[start:])
        text = self._text + now[len(before) :]
        if not now.endswith("\ufffd") or len(self._ids) - end > 64:
            self._text, self._seen = text, (end, len(self._ids))
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        # Without the clean-up, for which " ." in a program's string is a slip of the keyboard.
        decoded = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(decoded)


class CodeLoop:
    """Runs the python blocks of the responses of one ``generate``; see ``toolloop.ToolLoop``."""

    def __init__(self, tools: Tools, prefill: str, max_calls: int, rejoin: Rejoin) -> None:
        self.tools, self.max_calls, self.rejoin = tools, max_calls, rejoin
        self._prefill = prefill
        self._written: dict[int, Writing] = {}
        self._blocks: dict[int, Block] = {}
        self._calls: dict[int, int] = {}
        self._cells: dict[int, Cells] = {}
        self._running: dict[int, Future[Result]] = {}
        self._ended: list[int] = []  # rows without a call left

    def feed(self, row: int, new_ids: Sequence[int]) -> str | None:
        """The code of a block that these tokens close."""
        if row not in self._written:
            # The study's code sees what was generated alone.
            seen = "" if self.tools.config.tool_format == "still3" else self._prefill
            self._written[row] = Writing(self.tools, seen)
        written = self._written[row]
        written.add(new_ids)
        if not self.tools.may_close(new_ids):
            return None
        block = written.find(written.text())
        if block is None:
            return None
        self._blocks[row] = block
        return block.code

    def submit(self, row: int, code: str) -> None:
        """Start ``code``, or end the row if it has no call left."""
        if self._calls.get(row, 0) >= self.max_calls:
            self._ended.append(row)
            return
        self._calls[row] = self._calls.get(row, 0) + 1
        executor, state = self.tools.executor, self.tools.config.tool_state
        if state == "fresh":
            self._running[row] = executor.submit(code)
            return
        if row not in self._cells:
            self._cells[row] = executor.session(state)
        self._running[row] = self._cells[row].submit(code)

    def collect(self, wait: bool) -> list[Resume]:
        """Results that are there, in row order; ``wait``: at least one."""
        found = [Resume(row, stop="calls") for row in self._ended]
        self._ended.clear()
        if wait and not found and self._running:
            wait_for(self._running.values(), return_when=FIRST_COMPLETED)
        for row in sorted(row for row, future in self._running.items() if future.done()):
            found.append(self._resume(row, self._running.pop(row).result()))
        return found

    def _resume(self, row: int, result: Result) -> Resume:
        block = self._blocks.pop(row)
        infra = result.status == "infra"
        call = ToolCall(
            code=block.code,
            output=result.error if infra else self.tools.text(result, block.code),
            status=result.status,
            cpu_seconds=result.cpu_seconds,
            wall_seconds=result.wall_seconds,
            span=(0, 0),
        )
        if infra:
            return Resume(row, call=call, stop="infra")
        self._written[row] = Writing(self.tools)
        return Resume(row, self.tools.encode(self.tools.block(result, block)), call)

    def end(self, row: int) -> None:
        """Let the row's variables go: a live process each, they would add up over a call."""
        self._written.pop(row, None)
        if cells := self._cells.pop(row, None):
            cells.close()

    def close(self) -> None:
        """Stop what still runs and let all variables go."""
        for future in self._running.values():
            future.cancel()
        for cells in self._cells.values():
            cells.close()
        self._running.clear()
        self._cells.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@contextlib.contextmanager
def open_tools(
    config: ToolConfig, tokenizer: PreTrainedTokenizerBase, executor: Executor | None = None
) -> Iterator[Tools | None]:
    """The tools of a configuration, None for ``tool='none'``; the executor ends with the block.

    Args:
        executor: use this one, and leave it open.

    Raises:
        IsolationError: this host cannot hold model-written code.
    """
    if config.tool == "none":
        yield None
    elif executor is not None:
        yield Tools(executor, tokenizer, config)
    else:
        with PythonExecutor(run_limits(config)) as own:
            yield Tools(own, tokenizer, config)


def run_limits(config: ToolConfig) -> Limits:
    """Limits of each run in an executor that ``open_tools`` makes."""
    return Limits(cpu_seconds=config.tool_seconds, wall_seconds=3 * config.tool_seconds)


@contextlib.contextmanager
def calling(
    tools: Tools | None, prefill: str = "", max_calls: int | None = None
) -> Iterator[CodeLoop | None]:
    """The loop for one call of ``Engine.generate``; None without tools."""
    if tools is None:
        yield None
        return
    with tools.loop(prefill=prefill, max_calls=max_calls) as loop:
        yield loop


Mode = Literal["none", "written", "run"]
"""The study's three modes (Table 7): no code, code as text, code executed."""


def banned_texts(mode: Mode) -> tuple[str, ...]:
    """What a response may not hold in this mode: without code, no backtick and so no fence."""
    return FENCES if mode == "none" else ()
