r"""Final answers: find them in a response, and decide whether they equal the gold answer.

Rules for numbers (``answer_type="integer"``, and expressions whose two sides are plain numbers):

- accepted: surrounding space, one sign (``-5``, ``+5``, also U+2212), leading zeros (``025`` is 25,
  as AIME writes it), thousands separators in groups of three (``1,234``, ``1{,}234``, ``1\,234``),
  a final point or zeros behind it (``12.``, ``12.0``), math delimiters (``$12$``), ``\text{12}``
  and a leading dollar sign (``\$12``, ``$12``);
- compared by exact value, no tolerance, no percent rule: 2.04 is not 204, 9 is not 900;
- anything else is *unparsable* for an integer problem: ``3 or 5``, ``x=3``, ``12 cm``, ``1e3``,
  ``12,34``, digits of other scripts. Such an answer is never right.

Gold answers that are words (``\text{Evelyn}``) are compared as words, without case. Other
expressions go to math-verify in child processes with a wall-clock limit (``verify_pool``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum

from rlkit import verify_pool

ANSWER_TYPES = ("integer", "expression")
MAX_ANSWER_CHARS = 1000
"""Longer answers are unparsable: no gold comes near, and parsers are superlinear."""

_BOX = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_ANSWER_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_NUMBER = re.compile(r"([+-]?)\s*([0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.([0-9]*))?")
_THOUSANDS = re.compile(r"\{,\}|,\\!\s*|\\,")
_WRAPPED = re.compile(
    r"\$\$(.*)\$\$|\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]|\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}",
    re.DOTALL,
)
_SPACED_FRACTION = re.compile(r"(\\[dt]?frac\s*[0-9])\s+([0-9])")
_MIXED_NUMBER = re.compile(r"(-?[0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{.*\}", re.DOTALL)
_WORDS = re.compile(r"\(?([A-Za-z][A-Za-z ]*)\)?")
_NUMBER_LIST = re.compile(r"[0-9]\s+[0-9]")


class Verdict(StrEnum):
    """Outcome of a comparison; only ``RIGHT`` earns a reward."""

    RIGHT = "right"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"
    TIMEOUT = "timeout"


class GoldError(ValueError):
    """A gold answer that cannot be parsed; no response could ever be right."""


def _box_spans(text: str) -> list[tuple[int, int]]:
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


def boxes(text: str) -> list[str]:
    r"""Contents of every closed ``\boxed{}``, stripped, in order of opening; nested ones count."""
    return [text[start:end].strip() for start, end in _box_spans(text)]


def extract_answer(final: str) -> str | None:
    r"""The answer of a final part: its last ``\boxed{}``, else the content of ``<answer>`` tags.

    Braces are matched, escaped ones skipped. Several boxes: the last one counts. Nothing is ever
    searched in free text, so listing numbers cannot hit the gold answer.

    Args:
        final: the response after its reasoning (``Completion.final``).

    Returns:
        The stripped answer, None if there is none or it is blank.
    """
    spans = _box_spans(final)
    if spans:
        start, end = spans[-1]
        return final[start:end].strip() or None
    tagged = _ANSWER_TAG.findall(final)
    return (tagged[-1].strip() or None) if tagged else None


def canonical_number(text: str) -> str | None:
    """Canonical decimal text of a plain number, None if ``text`` is anything else.

    Two plain numbers are equal if and only if their canonical texts are: ``"1{,}234.50"`` gives
    ``"1234.5"``, ``"-0"`` gives ``"0"``. The module docstring lists what is accepted.
    """
    if len(text) > MAX_ANSWER_CHARS:
        return None
    plain = _unwrap(text).removeprefix(r"\$").removeprefix("$").strip()
    plain = _THOUSANDS.sub(",", plain).replace("\u2212", "-")
    match = _NUMBER.fullmatch(plain)
    if match is None or not (match[2] or match[3]):
        return None
    whole = match[2].replace(",", "").lstrip("0") or "0"
    decimals = (match[3] or "").rstrip("0")
    value = f"{whole}.{decimals}" if decimals else whole
    return f"-{value}" if match[1] == "-" and value != "0" else value


def verify(answer: str | None, gold: str, answer_type: str) -> Verdict:
    """Decide whether ``answer`` equals ``gold``. Never raises on model text.

    Args:
        answer: extracted answer, None if the response has none.
        gold: gold answer of the problem row.
        answer_type: ``integer`` (exact, at once) or ``expression`` (plain numbers exactly and at
            once, the rest by math-verify within ``verify_pool.SECONDS_PER_EXPRESSION``).

    Raises:
        GoldError: the gold answer cannot be parsed.
        ValueError: unknown answer type.
        RuntimeError: the processes that run math-verify cannot start.
    """
    return verify_all([(answer, gold, answer_type)])[0]


def verify_all(items: Sequence[tuple[str | None, str, str]]) -> list[Verdict]:
    """Decide many items at once: (answer, gold, answer type) as ``verify`` takes them.

    Expressions are compared in parallel, each distinct pair once. A time-out holds for all items of
    the call; later calls ask again unless the expression had its share of CPU time
    (``verify_pool.FAIR_SHARE``), so that a busy moment is not remembered as a wrong answer.

    Returns:
        One verdict per item, in order.

    Raises:
        As ``verify``, for the first item that has a fault.
    """
    decided = [_decide(*item) for item in items]
    found = verify_pool.compare(pair for pair in decided if not isinstance(pair, Verdict))
    verdicts = []
    for pair, (_, gold, _) in zip(decided, items, strict=True):
        if isinstance(pair, Verdict):
            verdicts.append(pair)
        elif found[pair] == "gold":
            raise _unreadable(f"Gold answer {gold!r}")
        else:
            verdicts.append(Verdict(found[pair]))
    return verdicts


def _decide(answer: str | None, gold: str, answer_type: str) -> Verdict | verify_pool.Pair:
    """The verdict where it takes no mathematics, else the pair of texts to compare."""
    if answer_type not in ANSWER_TYPES:
        raise ValueError(f"answer_type={answer_type!r}: expected one of {', '.join(ANSWER_TYPES)}")
    gold_number = canonical_number(gold)
    if answer_type == "integer" and (gold_number is None or "." in gold_number):
        check_gold(gold, answer_type)
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return Verdict.UNPARSABLE
    answer_number = canonical_number(answer)
    if gold_number is not None and answer_number is not None:
        return Verdict.RIGHT if answer_number == gold_number else Verdict.WRONG
    if answer_type == "integer":
        return Verdict.UNPARSABLE
    expression = _clean_expression(answer)
    if expression is None:
        return Verdict.UNPARSABLE
    if (gold_words := _gold_words(gold)) is not None and (words := _words(expression)) is not None:
        return Verdict.RIGHT if words == gold_words else Verdict.WRONG
    return _expression(gold), expression


def check_gold(gold: str, answer_type: str, problem_id: str = "") -> None:
    """Raise GoldError, with the problem's id and the fix, if ``gold`` cannot be parsed."""
    where = f"Problem {problem_id!r}: g" if problem_id else "G"
    if answer_type not in ANSWER_TYPES:
        raise ValueError(
            f"{where}old answer {gold!r} has answer_type={answer_type!r}: expected one of "
            f"{', '.join(ANSWER_TYPES)}"
        )
    number = canonical_number(gold)
    if answer_type == "integer":
        if number is None or "." in number:
            raise GoldError(
                f"{where}old answer {gold!r} is not an integer. Correct it, or set the row's "
                "answer_type to 'expression'."
            )
    elif number is None:
        pair = (_expression(gold), _expression(gold))
        if verify_pool.compare([pair])[pair] != Verdict.RIGHT:
            raise _unreadable(f"{where}old answer {gold!r}")


def _unreadable(gold: str) -> GoldError:
    return GoldError(
        f"{gold} cannot be parsed as a mathematical expression. Write it as LaTeX without text "
        "around it, or remove the problem."
    )


def _unwrap(text: str) -> str:
    r"""Strip space, math delimiters and one-argument text commands from around ``text``."""
    text = text.strip()
    while (match := _WRAPPED.fullmatch(text)) is not None:
        inner = next(group for group in match.groups() if group is not None)
        if "$" in inner.replace(r"\$", ""):
            break
        text = inner.strip()
    return text


def _expression(text: str) -> str:
    """``text`` without wrapping, spaced fractions in the form that math-verify reads."""
    text = _SPACED_FRACTION.sub(r"\1\2", _unwrap(text))
    mixed = _MIXED_NUMBER.fullmatch(text)
    return rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}" if mixed else text


def _words(text: str) -> str | None:
    """Folded words of a text without any mathematics, None otherwise; ``(C)`` gives ``c``."""
    match = _WORDS.fullmatch(text)
    return " ".join(match[1].casefold().split()) if match else None


def _gold_words(gold: str) -> str | None:
    r"""Words of a gold answer that is a word: ``\text{}``, or five letters and more.

    math-verify reads letters as a product of symbols, so an anagram would be equal.
    """
    words = _words(_unwrap(gold))
    if words is None or not (_TEXT.fullmatch(gold.strip()) or len(words) >= 5):
        return None
    return words


def _clean_expression(text: str) -> str | None:
    """The text to hand to math-verify, None if it is surely no single expression."""
    text = _expression(text)
    depth = 0
    for token in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += (token == "{") - (token == "}")
        if depth < 0:
            return None
    strange = any(c.isdecimal() and not c.isascii() for c in text)
    single = "$" not in text.replace(r"\$", "") and r"\boxed" not in text
    # math-verify adds up numbers that stand side by side: it would take "1 2 3" for 6.
    if not text or depth or strange or not single or _NUMBER_LIST.search(text):
        return None
    return text
