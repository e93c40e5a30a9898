r"""Where a response states its final answer. What the answer is worth is decided in ``verify``.

One of three forms, the first one that occurs in the final part counts:

1. ``\boxed{...}``: the last closed one. A box wins over tags, inside or outside of them.
2. ``<answer>...</answer>``: the last closed pair.
3. GSM8K's ``#### 42``: only as the last line that is not blank.

Nothing is ever searched in free text, so listing numbers cannot hit the gold answer. ``\fbox{}`` is
no box: no prompt asks for it. ``\boxed 5`` is none either: TeX frames the next token only, the 1 of
``\boxed 12``, so any reading of it would be a guess.

Text in code fences is no answer, whatever its form: code and its output are not what the policy
states. An output block (```` ```output ````) also ends what came before it: an answer follows the
last output. Otherwise a tool's output, real or forged, could be paid.
"""

from __future__ import annotations

import re

from rlkit.literals import MAX_ANSWER_CHARS

_BOX = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_NESTED_BOX = re.compile(r"\s*\\boxed\s*\{")
_ANSWER_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_HASH_LINE = re.compile(r"\s*####[ \t]+(\S.*)")
# Possessive: a long run of backticks must not be tried again from each of its characters.
_FENCE = re.compile(r"`{3,}+[ \t]*+([A-Za-z]*+)")
_FENCE_CLOSED = re.compile(r"(?<!`)`{3,}+[ \t]*+(?=\r?\n|\Z)")

Span = tuple[int, int]


def boxes(text: str) -> list[str]:
    r"""Contents of every closed ``\boxed{}``, stripped, in order of opening; nested ones count.

    Boxes in code blocks and before the last output block do not. Contents longer than
    ``MAX_ANSWER_CHARS`` are cut one behind it, which no comparison accepts: those of n nested boxes
    would take memory in n squared.
    """
    return [_content(part, span) for part in _own_parts(text) for span in _box_spans(part)]


def extract_answer(final: str) -> str | None:
    r"""The answer of a final part by the rules of this module.

    Braces are matched, escaped ones skipped. A box that holds nothing but a box counts as the inner
    one; any other nested box stays part of the answer.

    Args:
        final: the response after its reasoning (``Completion.final``).

    Returns:
        The stripped answer, None if there is none or the one that counts is blank.
    """
    answers = _stated(final)
    return (answers[-1] or None) if answers else None


def other_answers(final: str) -> list[str]:
    r"""The answers that ``extract_answer`` passed over: same form, earlier, not blank, in order.

    Empty for a response that commits itself once. ``\boxed{3} \boxed{5}`` gives ``["3"]``.
    """
    return [answer for answer in _stated(final)[:-1] if answer]


def _stated(final: str) -> list[str]:
    """Every answer in the form that counts, stripped, blank ones included; the last one counts."""
    parts = _own_parts(final)
    boxed = [content for part in parts for content in _outer_boxes(part)]
    if boxed:
        return boxed
    tagged = [content.strip() for part in parts for content in _ANSWER_TAG.findall(part)]
    if tagged:
        return tagged
    lines = [line for part in parts for line in part.splitlines() if line.strip()]
    hashed = [_HASH_LINE.fullmatch(line) for line in lines]
    if not hashed or hashed[-1] is None:
        return []
    return [match[1].strip() for match in hashed if match is not None]


def _own_parts(text: str) -> list[str]:
    """The stretches of ``text`` outside code blocks and after the last output block.

    A fence opens anywhere, since models open one in the middle of a line. It closes at the end of a
    line, since tools glue it to their output; an unclosed one runs to the end (as in CommonMark).
    """
    parts, position = [], 0
    while (opened := _FENCE.search(text, position)) is not None:
        parts.append(text[position : opened.start()])
        if opened[1].casefold() == "output":
            parts.clear()
        closed = _FENCE_CLOSED.search(text, opened.end())
        if closed is None:
            return parts
        position = closed.end()
    parts.append(text[position:])
    return parts


def _box_spans(text: str) -> list[Span]:
    r"""Half-open content spans of all closed ``\boxed{}``, ordered by opening; linear time."""
    open_braces: list[int | None] = []  # start of the content for a box, None for a plain brace
    spans = []
    for match in _BOX.finditer(text):
        token = match.group()
        if token == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None:
                spans.append((start, match.start()))
        elif token.startswith(r"\boxed"):
            open_braces.append(match.end())
        elif token == "{":
            open_braces.append(None)
    return sorted(spans)


def _outer_boxes(text: str) -> list[str]:
    """Contents of the boxes that lie in no other box; a box around one box alone is skipped."""
    found: list[Span] = []
    outer_end = -1
    wrapped: Span | None = None  # the box of the current content, while it may hold one box alone
    for start, end in _box_spans(text):
        if start > outer_end:
            outer_end = end
        elif wrapped is None or not _holds_only(text, wrapped, (start, end)):
            wrapped = None
            continue
        else:
            found.pop()
        wrapped = (start, end)
        found.append(wrapped)
    return [text[start:end].strip() for start, end in found]


def _content(text: str, span: Span) -> str:
    """The stripped content, up to ``MAX_ANSWER_CHARS`` and one; never a copy of all of it."""
    start, end = span
    while start < end and text[start].isspace():
        start += 1
    return text[start : min(end, start + MAX_ANSWER_CHARS + 1)].rstrip()


def _holds_only(text: str, outer: Span, inner: Span) -> bool:
    r"""Whether the content at ``outer`` is the box whose content is at ``inner``, and no more."""
    opened = _NESTED_BOX.match(text, outer[0])
    alone = opened is not None and opened.end() == inner[0]
    return alone and not text[inner[1] + 1 : outer[1]].strip()
