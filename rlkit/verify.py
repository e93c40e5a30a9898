r"""Whether an answer equals the gold answer.

- ``answer_type="integer"``: both sides are plain numbers (``literals.canonical_number`` lists the
  forms) and equal by exact value. No tolerance, no percent rule: 2.04 is not 204, 9 is not 900.
  Anything else is *unparsable* and never right: ``3 or 5``, ``x=3``, ``2+3``, ``12 cm``, ``1e3``,
  ``12,34``, digits of other scripts.
- ``answer_type="expression"``: numbers, words and forms that the text decides are compared by
  ``literals``, exactly and at once. The rest goes to math-verify in child processes with a
  wall-clock limit (``verify_pool``).

``docs/verification.md`` has the rules in full, and what they decide differently from math-verify.
Where a response states its answer is found by ``extract``.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from rlkit import verify_pool
from rlkit.assignments import align
from rlkit.literals import (
    MAX_ANSWER_CHARS,
    canonical_number,
    for_parser,
    is_one_expression,
    pair_for_parser,
    settle,
    unwrap,
    words_of_gold,
)
from rlkit.units import reads_as_units
from rlkit.verify_nursery import Pair

ANSWER_TYPES = ("integer", "expression")


class Verdict(StrEnum):
    """Outcome of a comparison; only ``RIGHT`` earns a reward."""

    RIGHT = "right"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"
    TIMEOUT = "timeout"


class GoldError(ValueError):
    """A gold answer that cannot be parsed, or not in time; no response could ever be right."""


def verify(answer: str | None, gold: str, answer_type: str) -> Verdict:
    """Decide whether ``answer`` equals ``gold``. Never raises on model text.

    Args:
        answer: extracted answer, None if the response has none.
        gold: gold answer of the problem row.
        answer_type: ``integer`` (exact, at once) or ``expression`` (what the texts settle at once,
            the rest by math-verify within ``verify_pool.SECONDS_PER_EXPRESSION``).

    Raises:
        GoldError: the gold answer cannot be parsed.
        ValueError: unknown answer type.
        RuntimeError: the processes that run math-verify cannot start.
    """
    return verify_all([(answer, gold, answer_type)])[0]


def verify_all(items: Sequence[tuple[str | None, str, str]]) -> list[Verdict]:
    """Decide many items at once: (answer, gold, answer type) as ``verify`` takes them.

    Expressions are compared in parallel, each distinct pair once. A time-out holds for all items of
    the call, and for later calls too if the expression had its share of CPU time
    (``verify_pool.FAIR_SHARE``). Otherwise it holds for ``verify_pool.UNDECIDED_SECONDS``: the
    parts of one training step agree, and a busy moment is not remembered for longer.

    A gold answer that is not decided in time raises nothing here: a busy machine is no fault of it.

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
        elif found[pair].verdict == "gold":
            alone = _with_itself(gold)
            if verify_pool.compare([alone])[alone].verdict == "gold":
                raise _not_parsed(gold, "G")
            # Sound by itself or undecided, not as it was worded next to this answer.
            verdicts.append(Verdict.UNPARSABLE)
        else:
            verdicts.append(Verdict(found[pair].verdict))
    return verdicts


def _decide(answer: str | None, gold: str, answer_type: str) -> Verdict | Pair:
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
    if answer_type == "integer" or not is_one_expression(answer):
        return Verdict.UNPARSABLE
    if not reads_as_units(unwrap(answer), unwrap(gold)):
        return Verdict.UNPARSABLE
    aligned = align(unwrap(gold), unwrap(answer))
    if aligned is None:
        return Verdict.WRONG
    if aligned != (unwrap(gold), unwrap(answer)):
        gold, answer = aligned
    settled = settle(gold, answer)
    if settled is not None:
        return Verdict.RIGHT if settled else Verdict.WRONG
    return pair_for_parser(gold, answer)


def check_gold(gold: str, answer_type: str, problem_id: str = "") -> None:
    """Raise GoldError, with the problem's id and the fix, if ``gold`` cannot be parsed.

    What is not decided in time is asked once more, with ``verify_pool.RETRY_FACTOR`` times the
    limit. If that is in vain too, the error says so: then the machine may be to blame.
    """
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
    elif number is None and words_of_gold(gold) is None:
        pair = _with_itself(gold)
        judged = verify_pool.compare([pair])[pair]
        if judged.verdict == Verdict.TIMEOUT or not judged.lasting:
            judged = verify_pool.compare_again(pair)
            if judged.verdict == Verdict.TIMEOUT or not judged.lasting:
                seconds = verify_pool.RETRY_FACTOR * verify_pool.SECONDS_PER_EXPRESSION
                raise GoldError(
                    f"{where}old answer {gold!r} took longer than the limit, or its process was "
                    f"ended, in two attempts (the second with {seconds:g} s). If the machine is "
                    "busy or short of memory, try again later. Otherwise write the answer in a "
                    "simpler form, or remove the problem."
                )
        if judged.verdict != Verdict.RIGHT:
            raise _not_parsed(gold, where)


def _with_itself(gold: str) -> Pair:
    """The pair that asks whether ``gold`` can be parsed."""
    text = for_parser(gold)
    return text, text


def _not_parsed(gold: str, where: str) -> GoldError:
    return GoldError(
        f"{where}old answer {gold!r} cannot be parsed as a mathematical expression. Write "
        "it as LaTeX without text around it, or remove the problem."
    )
