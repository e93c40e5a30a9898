"""Where the fenced blocks of a finished text stand, to show them.

A reader's view: what was run is known from the tool calls, and ``rlkit.fences`` decides that while
the text is being written. Rules as there, without its finer cases (words about fences).
"""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

_FENCE = re.compile(r"`{3,}|~{3,}")
_PYTHON = re.compile(r"[ \t]*(?:python3?|py)(?=[\s`~]|$)[ \t]*", re.IGNORECASE)
_WORD = re.compile(r"[ \t]*(\w+)")
_OUTPUT = re.compile(r"[ \t]*output[ \t]*$", re.IGNORECASE | re.MULTILINE)


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
