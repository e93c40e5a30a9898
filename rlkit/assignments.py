r"""Answers that name their values, such as ``x=3, y=4``, next to those that do not.

math-verify drops the names and then takes the values for a list without order, so ``(4,3)`` would
be ``x=3, y=4``.
"""

from __future__ import annotations

import re

_NAME = r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_(?:\{[A-Za-z0-9]+\}|[A-Za-z0-9]))?"
_NAMED = re.compile(rf"\s*({_NAME})\s*=([^=]*)", re.DOTALL)
_NAMES = re.compile(rf"\s*(\(\s*{_NAME}(?:\s*,\s*{_NAME})+\s*\))\s*=([^=]*)", re.DOTALL)
_AND = re.compile(r"\\text\s*\{\s*,?\s*and\s*\}|\band\b|\\quad(?![A-Za-z])|\\land(?![A-Za-z])")
_TOKEN = re.compile(r"\\[{}]|\\.|[,;()\[\]{}]", re.DOTALL)


def align(gold: str, answer: str) -> tuple[str, str] | None:
    """Both texts as points, in the order of their names, where at least one names two values.

    A side without names is taken for the values in the alphabetical order of the names, if the
    other side lists them in that order too.

    Args:
        gold: gold answer, unwrapped.
        answer: a single expression, unwrapped.

    Returns:
        The texts to compare, unchanged where neither side names two values; None if they differ.
    """
    gold_named, named = _named(gold), _named(answer)
    if gold_named is None and named is None:
        return gold, answer
    if gold_named is not None and named is not None:
        if sorted(gold_named) != sorted(named):
            return None
        order = sorted(named)
        return _point([gold_named[name] for name in order]), _point([named[name] for name in order])
    known = gold_named or named or {}
    if list(known) != sorted(known):
        return None
    other = answer if named is None else gold
    values = None if other.startswith(r"\{") else _values(other)  # a set has no order
    if values is None or len(values) != len(known):
        return None
    points = _point(list(known.values())), _point(values)
    return points if gold_named is not None else (points[1], points[0])


def _named(text: str) -> dict[str, str] | None:
    """Values by name if ``text`` is a list of them with two different names, None otherwise."""
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text)
    match = _NAMES.fullmatch(text)
    if match is not None:
        names, values = _values(match[1]), _values(match[2])
        if names is None or values is None or len(names) != len(values):
            return None
        return dict(zip(names, values, strict=True))
    parts = [_NAMED.fullmatch(part) for part in _values(text) or []]
    found = [(part[1], part[2].strip()) for part in parts if part is not None]
    named = dict(found)
    if len(named) < 2 or len(found) < len(parts):
        return None
    # Two values for one name: no point. No value is named twice by the order alone.
    return named if len(named) == len(found) else None


def _values(text: str) -> list[str] | None:
    r"""The parts of a list, a point or a set of two or more; commas in brackets part nothing."""
    text = _AND.sub(",", re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text)).strip()
    for opened, closed in (("(", ")"), (r"\{", r"\}")):
        if text.startswith(opened) and text.endswith(closed) and text.count(opened) == 1:
            text = text[len(opened) : -len(closed)]
            break
    parts, depth, start = [], 0, 0
    for token in _TOKEN.finditer(text):
        if token[0] in {"(", "[", "{", r"\{"}:
            depth += 1
        elif token[0] in {")", "]", "}", r"\}"}:
            depth -= 1
        elif token[0] in {",", ";"} and depth == 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    parts.append(text[start:].strip())
    parts = [part for part in parts if part]
    return parts if len(parts) > 1 else None


def _point(values: list[str]) -> str:
    return f"({', '.join(values)})"
