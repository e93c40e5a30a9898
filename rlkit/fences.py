r"""Code blocks in a response that is still being written: has one just been closed?

A pattern, not one stop string, decides: models close a fence with one line break or two or none,
indent it, forget it and start the next block, and tokenizers cut it anywhere. What counts:

* A python block opens with three or more backticks or tildes and ``python``, ``python3`` or ``py``
  in any case, at the start of a line or behind other text (``<think>```python``).
* It closes with as many of the same character or more: at the start of a line, indented or not,
  whatever follows (also the next block's fence, where the closing one was forgotten); or behind
  code on a line, unless a string literal is open there.
* All other blocks, self-written output among them, are passed over. So is an untagged one.

``still3_block`` is the rule of the study's published code, with its errors.
"""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_FENCE = re.compile(r"`{3,}|~{3,}")
_PYTHON = re.compile(r"[ \t]*(?:python3?|py)(?=[\s`~]|$)[ \t]*", re.IGNORECASE)
_WORD = re.compile(r"[ \t]*(\w+)")
_OUTPUT = re.compile(r"[ \t]*output[ \t]*$", re.IGNORECASE | re.MULTILINE)
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
    at = 0
    while opened := _FENCE.search(text, at):
        tag = _PYTHON.match(text, opened.end())
        if tag is None:
            at = _after_other(text, opened)
            continue
        start = tag.end() + text.startswith("\n", tag.end())
        closed = _closing(text, start, opened.group())
        if closed is None:
            return None
        code = textwrap.dedent(text[start : closed.start()]).rstrip(" \t")
        return Block(code.removesuffix("\n"), text[closed.end() :])
    return None


@dataclass(frozen=True)
class Fenced:
    """Where a fenced block stands in a text, fences included: ``text[start:end]``.

    Attributes:
        tag: ``python``, or the first word behind another block's fence in lower case, ``""``
            without one.
    """

    start: int
    end: int
    tag: str


def fenced_blocks(text: str) -> Iterator[Fenced]:
    """All fenced blocks of ``text`` in order, by the rules above; an open one runs to the end.

    A fence that closes one block and opens the next belongs to the next.
    """
    at = 0
    while opened := _FENCE.search(text, at):
        tag = _PYTHON.match(text, opened.end())
        if tag is None:
            word = _WORD.match(text, opened.end())
            end = _after_other(text, opened)
            yield Fenced(opened.start(), end, word[1].lower() if word else "")
        elif (closed := _closing(text, tag.end(), opened.group())) is None:
            end = len(text)
            yield Fenced(opened.start(), end, "python")
        else:
            shared = _PYTHON.match(text, closed.end()) or _OUTPUT.match(text, closed.end())
            end = closed.start() if shared else closed.end()
            yield Fenced(opened.start(), end, "python")
        at = end


def _after_other(text: str, opened: re.Match[str]) -> int:
    """Where to look on behind a fence that opens no python block."""
    line, newline, _ = text[opened.end() :].partition("\n")
    if not newline or opened.group()[0] in line:  # not complete, or code inside a line
        return opened.end()
    at = opened.end() + len(line)
    while closed := _FENCE.search(text, at):
        alone = _line_start(text, closed.start())
        if alone and _PYTHON.match(text, closed.end()):
            return closed.start()  # the block before it was never closed
        if alone and _closes(closed.group(), opened.group()):
            return closed.end()
        at = closed.end()
    return len(text)


def _closing(text: str, start: int, opened: str) -> re.Match[str] | None:
    for closed in _FENCE.finditer(text, start):
        if not _closes(closed.group(), opened):
            continue
        if _line_start(text, closed.start()) or not _in_string(text[start : closed.start()]):
            return closed
    return None


def _closes(fence: str, opened: str) -> bool:
    return fence[0] == opened[0] and len(fence) >= len(opened)


def _line_start(text: str, at: int) -> bool:
    return not text[text.rfind("\n", 0, at) + 1 : at].strip(" \t")


def _in_string(code: str) -> bool:
    """Whether ``code`` ends inside a string literal."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes, ``1is 2``
            compile(textwrap.dedent(code), "<code>", "exec", flags=0, dont_inherit=True)
    except SyntaxError as error:
        last = code.count("\n") + 1
        message = error.msg or ""
        return "unterminated triple-quoted" in message or (
            message.startswith(("unterminated string", "unterminated f-string"))
            and error.lineno == last
        )
    except (ValueError, MemoryError, RecursionError):  # NUL bytes; nested too deep
        return False
    return False


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
