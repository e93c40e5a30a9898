r"""Code blocks in a response that is still being written: has one just been closed?

A pattern, not one stop string, decides: models close a fence with one line break or two or none,
indent it, forget it and start the next block, and tokenizers cut it anywhere. What counts:

* A python block opens with three or more backticks or tildes and ``python``, ``python3`` or ``py``
  in any case, at the start of a line or behind other text (``<think>```python``). Code may begin on
  that line; behind other text only if it also ends there and is Python, or else the line speaks
  about fences ("between ```python and ```").
* It closes with as many of the same character or more: at the start of a line, indented or not,
  whatever follows (also the next block's fence, where the closing one was forgotten); or behind
  code on a line, unless a string literal is open there. Nothing or "..." between two fences on a
  line is no block.
* All other blocks, self-written output among them, are passed over. So is an untagged one.

``still3_block`` is the rule of the study's published code, with its errors.
"""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass

_FENCE = re.compile(r"(?P<indent>^[ \t]*)?(?P<marks>`{3,}|~{3,})", re.MULTILINE)
_TAG = re.compile(
    r"[ \t]*(?P<python>(?:python3?|py)(?=[\s`~]))?[a-z0-9]*", re.IGNORECASE | re.ASCII
)
_LINE = {mark: re.compile(rf"[\n{mark}]") for mark in "`~"}
_HEAD = re.compile(r"\A[ \t]*\n?")
_LITERAL = re.compile(r"""\#|\"{3}|'{3}|["']""")
"""What begins a string literal or a comment of Python."""
_LITERAL_ENDS = {
    "#": re.compile(r"\n"),
    **{mark: re.compile(rf"\\.|{mark}|\n", re.DOTALL) for mark in ("'", '"')},
    **{mark: re.compile(rf"\\.|{mark}", re.DOTALL) for mark in ("'''", '"""')},
}
"""What ends each, or an escape, which does not."""
_STILL3_STOP = "```\n\n"


@dataclass(frozen=True)
class Block:
    """A closed python block.

    Attributes:
        code: its text, common indentation removed.
        rest: what stands behind the closing fence already; some tokens hold more than a fence.
    """

    code: str
    rest: str


FindBlock = Callable[[str], Block | None]
"""From what the policy wrote since the last output to the block to run, if one is closed."""


def closed_block(text: str) -> Block | None:
    """The first python block of ``text`` that is closed; None while there is none.

    Args:
        text: what the policy wrote since the response's start or the last tool output.
    """
    return Search().find(text)


@dataclass
class Search:
    """``closed_block`` of a text that grows: each call of ``find`` goes on where the last ended.

    Searched anew at each token, a response of little but fences would take minutes.
    """

    _at: int = 0  # all before is dealt with, whatever follows
    _marks: str = ""  # that opened the block we are in, "" between blocks
    _code: int | None = None  # where its code begins, if it is a python block
    _behind: bool = False  # it was opened behind other text, and its line has not ended
    _read: int = 0  # up to where its literals were looked for
    _literal: str = ""  # what began the string or comment that is open there

    def find(self, text: str) -> Block | None:
        """As ``closed_block``; ``text`` begins with the one given before, which had no block."""
        while fence := _FENCE.search(text, self._at):
            if self._code is not None:
                decided = self._in_python(text, self._code, fence)
                if isinstance(decided, Block):
                    return decided
            elif self._marks:
                decided = self._in_other(text, fence)
            else:
                decided = self._between(text, fence)
            if not decided:  # what comes next decides
                return None
        return None

    def _between(self, text: str, fence: re.Match[str]) -> bool:
        tag = _TAG.match(text, fence.end())
        if tag is None or tag.end() == len(text):
            return False
        if tag["python"]:
            self._at = self._code = tag.end("python")
            self._marks, self._behind = fence["marks"], fence["indent"] is None
            self._read, self._literal = self._at, ""
            return True
        stop = _LINE[fence["marks"][0]].search(text, fence.end())
        if stop is None:
            return False
        if stop[0] == "\n":
            self._at, self._marks = stop.start(), fence["marks"]
        else:  # code inside a line
            self._at = fence.end()
        return True

    def _in_other(self, text: str, fence: re.Match[str]) -> bool:
        tag = _TAG.match(text, fence.end())
        if tag is None or tag.end() == len(text):
            return False
        alone = fence["indent"] is not None
        if alone and tag["python"]:  # the block before it was never closed
            self._at, self._marks = fence.start(), ""
            return True
        self._at = fence.end()
        if alone and _closes(fence["marks"], self._marks):
            self._marks = ""
        return True

    def _in_python(self, text: str, start: int, fence: re.Match[str]) -> Block | bool:
        alone = fence["indent"] is not None
        line = text.find("\n", start, fence.start()) if self._behind else -1
        if line >= 0:
            self._behind = False
            if text[start:line].strip():  # words about a fence
                self._at, self._marks, self._code = start, "", None
                return True
        closes = _closes(fence["marks"], self._marks) and (
            alone or not self._in_string(text, fence.start())
        )
        if closes:
            code = text[start : fence.start()]
            if alone or not _words(code, self._behind):
                return Block(_clean(code), text[fence.end() :])
        if fence.end() == len(text):
            return False
        self._at = fence.end()
        if closes:
            self._marks, self._code = "", None
        return True

    def _in_string(self, text: str, at: int) -> bool:
        """Whether a string literal of the python block is open at ``at``, where a fence begins."""
        while self._read < at:
            pattern = _LITERAL_ENDS[self._literal] if self._literal else _LITERAL
            found = pattern.search(text, self._read, at)
            if found is None:
                self._read = at
            else:
                self._read = found.end()
                if not self._literal:
                    self._literal = found[0]
                elif found[0][0] != "\\":
                    self._literal = ""
        return self._literal not in ("", "#")


def _closes(fence: str, opened: str) -> bool:
    return fence[0] == opened[0] and len(fence) >= len(opened)


def _words(code: str, behind: bool) -> bool:
    """Whether what stands between two fences on a line speaks about fences and is no code."""
    if not code.strip(" \t.…"):
        return True
    if not behind:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ``1is 2``
            compile(code.strip(), "<code>", "exec", dont_inherit=True)
    except SyntaxError:
        return True
    except (ValueError, MemoryError, RecursionError):  # NUL bytes; nested too deep
        return False
    return False


def _clean(code: str) -> str:
    code = _HEAD.sub("", code.replace("\r\n", "\n"), count=1)
    if code.lstrip("\n").startswith((" ", "\t")):  # else lines inside of strings could change
        code = textwrap.dedent(code)
    return code.rstrip(" \t").removesuffix("\n")


def still3_block(text: str) -> Block | None:
    r"""The study's rule: generation stops at "```\n\n" alone.

    The code is what stands behind the last "```python" since the last output, stripped. Without one
    it is the whole text (a self-written output block is run as code). A fence closed by a single
    line break stops nothing, so the code may hold later fences.

    Source: STILL-3-TOOL/evaluation/run_eval_tool.py in
    https://github.com/RUCAIBox/Slow_Thinking_with_LLMs
    """
    before, stop, rest = text.partition(_STILL3_STOP)
    if not stop:
        return None
    return Block(before.rpartition("```python")[2].strip(), rest)
