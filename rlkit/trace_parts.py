"""Whose text is it: a response split into what the policy wrote and what a tool returned."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from rlkit.completion import THINK_CLOSE, THINK_OPEN, ToolCall, split_reasoning
from rlkit.extract import extract_answer
from rlkit.fenced import fenced_blocks

Kind = Literal["question", "reasoning", "text", "code", "output", "failed", "invented", "answer"]
_BOX = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_ANSWER_TAG = re.compile(r"<answer>(?:(?!</?answer>).)*</answer>", re.DOTALL)
_HASH_LINE = re.compile(r"^[ \t]*####[ \t]+\S.*$", re.MULTILINE)


@dataclass(frozen=True)
class Part:
    """A stretch of a response written by one hand."""

    kind: Kind
    text: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r}: expected one of {get_args(Kind)}")


def parts(text: str, calls: Sequence[ToolCall] = ()) -> list[Part]:
    """Split a response; the parts' texts one after the other are ``text``.

    What ran is taken from ``calls`` alone: a text cannot tell who wrote it. Code is found by the
    rules of ``fences``, reasoning and the answer by those of ``completion`` and ``extract``.

    Args:
        text: ``Completion.text``.
        calls: ``Completion.tool_calls``, for the places of their outputs in the text.

    Raises:
        ValueError: outputs that overlap or lie outside the text.
    """
    placed = sorted((call.characters, call.status) for call in calls)
    found: list[Part] = []
    at, turn = 0, _reasoning(text)
    for (start, end), status in [*placed, ((len(text), len(text)), "ok")]:
        if start == end and start != len(text):
            continue  # no output: the machinery failed, or the budget was used up
        if not at <= start <= end <= len(text):
            raise ValueError(
                f"a tool output at characters {start} to {end} of a text of {len(text)}, where the "
                f"one before ends at {at}: expected ToolCall.characters of this very text"
            )
        for begin, stop, kind in _pieces(at, start, turn):
            found += _written(text[begin:stop], kind, ran=end > start and stop == start)
        found.append(Part("output" if status == "ok" else "failed", text[start:end]))
        at = end
    answer = extract_answer(split_reasoning(text)[1])
    return _merged(_with_answer(found, answer) if answer else found)


def _reasoning(text: str) -> tuple[int, int, int]:
    """Where the reasoning starts, where its closing tag does, and where it ends."""
    if (close := text.rfind(THINK_CLOSE)) >= 0:
        return 0, close, close + len(THINK_CLOSE)
    opened = text.find(THINK_OPEN)
    return (opened, len(text), len(text)) if opened >= 0 else (0, 0, 0)


def _pieces(at: int, end: int, reasoning: tuple[int, int, int]) -> Iterable[tuple[int, int, Kind]]:
    """[at, end) cut at the borders of the reasoning.

    Its closing tag is a piece of its own, so that a code block left open does not swallow it.
    """
    for begin, stop in pairwise([at, *(c for c in reasoning if at < c < end), end]):
        yield begin, stop, "reasoning" if reasoning[0] <= begin < reasoning[2] else "text"


def _written(text: str, kind: Kind, ran: bool) -> list[Part]:
    """The policy's own text; ``ran``: a tool's output follows it."""
    found, at = [], 0
    for block in fenced_blocks(text):
        body: Kind = kind
        if block.tag == "python":
            body = "code"
        elif block.tag == "output":
            # Only its first line: the policy opened the block that the tool then filled.
            opened = ran and not text[block.start : block.end].partition("\n")[2]
            body = "code" if opened else "invented"
        found += [Part(kind, text[at : block.start]), Part(body, text[block.start : block.end])]
        at = block.end
    return [*found, Part(kind, text[at:])]


def _with_answer(found: list[Part], answer: str) -> list[Part]:
    """Mark the answer in the last part of the policy's text that states it."""
    for number in reversed(range(len(found))):
        if found[number].kind == "text":
            text = found[number].text
            if span := _stated(text, answer):
                start, end = span
                pieces = (text[:start], text[start:end], text[end:])
                kinds: tuple[Kind, ...] = ("text", "answer", "text")
                cut = [Part(kind, piece) for kind, piece in zip(kinds, pieces, strict=True)]
                return [*found[:number], *cut, *found[number + 1 :]]
    return found


def _stated(text: str, answer: str) -> tuple[int, int] | None:
    """Where ``answer`` is stated last; None where no form of it is found."""
    last = None
    for start, end in _boxes(text):
        if extract_answer(text[start:end]) == answer:
            last = (start, end)
    if last is None:
        for pattern in (_ANSWER_TAG, _HASH_LINE):
            for match in pattern.finditer(text):
                if extract_answer(match.group()) == answer:
                    last = match.span()
    return last


def _boxes(text: str) -> list[tuple[int, int]]:
    """Closed boxes that lie in no other closed one, in order; linear time."""
    opened: list[int | None] = []  # start of a box, None for a plain brace
    found: list[tuple[int, int]] = []
    for match in _BOX.finditer(text):
        token = match.group()
        if token == "}":
            start = opened.pop() if opened else None
            if start is not None:
                while found and found[-1][0] > start:
                    found.pop()
                found.append((start, match.end()))
        elif token == "{" or token.startswith(r"\boxed"):
            opened.append(None if token == "{" else match.start())
    return found


def _merged(found: Iterable[Part]) -> list[Part]:
    merged: list[Part] = []
    for part in found:
        if merged and part.kind == merged[-1].kind and part.kind not in ("output", "failed"):
            merged[-1] = Part(part.kind, merged[-1].text + part.text)
        elif part.text:
            merged.append(part)
    return merged
