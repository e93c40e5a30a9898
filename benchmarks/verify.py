r"""Judging answers: ``rlkit.verify`` and plain math-verify, and what pathological answers cost.

    python benchmarks/verify.py --markdown

First a mix like that of training (``_answers.py`` says how it is drawn), judged by ``verify_all``
one step of 128 answers at a time, and by a loop of ``parse`` and ``verify`` of math-verify with
their defaults, on the gold and the answer in ``\boxed{}``, in this process. The two run in turn,
each repeat with a mix of its own; the ratio of a repeat is math-verify's time over ours. Then steps
with 1, 2, 4 and 8 expressions that never finish.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from _answers import Item, bombs, steps_of
from _cases import print_origin, print_table
from math_verify import parse
from math_verify import verify as math_verify
from step import Spread

from rlkit import verify_pool
from rlkit.verify import Verdict, canonical_number, verify_all

SLACK = 1.2
"""A step may take this times the limit for each round of pathological expressions."""
SHOWN = 20


def ours(batch: Sequence[Item]) -> list[Verdict]:
    """One step as training judges it."""
    return verify_all(batch)


def plain(batch: Sequence[Item]) -> list[bool]:
    """The same by math-verify as its documentation uses it; no answer is wrong."""
    found = []
    for answer, gold, _ in batch:
        if answer is None:
            found.append(False)
            continue
        right = math_verify(parse(rf"\boxed{{{gold}}}"), parse(rf"\boxed{{{answer}}}"))
        found.append(bool(right))
    return found


def timed(judge: Callable[[Sequence[Item]], list[Any]], steps: Sequence[Sequence[Item]]) -> Any:
    """Wall seconds for all steps, and the verdicts in one list."""
    start = time.perf_counter()
    found = [verdict for batch in steps for verdict in judge(batch)]
    return time.perf_counter() - start, found


@dataclass(frozen=True)
class Difference:
    """An answer that the two judge differently."""

    item: Item
    verdict: Verdict
    plain: bool

    @property
    def reason(self) -> str:
        """The rule of ours behind it."""
        answer, gold, kind = self.item
        if answer is not None and None not in (canonical_number(answer), canonical_number(gold)):
            return "numbers are compared exactly: no percent rule, no rounding"
        if kind == "integer":
            return "an integer problem takes a number and nothing else"
        if self.verdict is Verdict.TIMEOUT:
            return "over our limit, within that of math-verify"
        if self.verdict is Verdict.UNPARSABLE:
            return "the box has to be one expression as a whole"
        return "the box has to parse as a whole: no number is picked out of a text"


@dataclass(frozen=True)
class Repeat:
    """Seconds of both sides on one mix of ``items`` answers, and where they differ."""

    items: int
    ours: float
    plain: float
    differences: list[Difference]


def measure(
    repeats: int, seed: int, steps: int, problems: int, rollouts: int, distinct: bool
) -> list[Repeat]:
    """Both sides in turn on the mixes of seed, seed + 1, ...; the order alternates."""
    results = []
    for repeat in range(repeats):
        mix = steps_of(seed + repeat, steps, problems, rollouts, distinct)
        items = [item for batch in mix for item in batch]
        if repeat % 2:
            theirs, right = timed(plain, mix)
            mine, verdicts = timed(ours, mix)
        else:
            mine, verdicts = timed(ours, mix)
            theirs, right = timed(plain, mix)
        differences = [
            Difference(item, verdict, other)
            for item, verdict, other in zip(items, verdicts, right, strict=True)
            if (verdict is Verdict.RIGHT) != other
        ]
        results.append(Repeat(len(items), mine, theirs, differences))
    return results


def rate_row(name: str, results: Sequence[Repeat]) -> tuple[str, ...]:
    """(mix, answers, ours and math-verify in answers per second, ratio, verdicts that differ)."""
    rates = [
        statistics.median(
            result.items / seconds for result, seconds in zip(results, side, strict=True)
        )
        for side in ([r.ours for r in results], [r.plain for r in results])
    ]
    return (
        name,
        str(sum(result.items for result in results)),
        *(f"{rate:.0f}" for rate in rates),
        str(Spread.of([result.plain / result.ours for result in results])),
        str(sum(len(result.differences) for result in results)),
    )


def processes() -> list[int]:
    """Ids of the processes that compare expressions for this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended meanwhile
        if str(os.getpid()).encode() in words and any(b"_verify_worker" in w for w in words):
            found.append(int(folder.name))
    return found


def expressions(batch: Sequence[Item]) -> int:
    """Items of a step that are no integer problem."""
    return sum(kind == "expression" for _, _, kind in batch)


def bomb_row(count: int, seed: int, problems: int, rollouts: int) -> tuple[Any, ...]:
    """(bombs, seconds of a clean step, with bombs, bound, time-outs, processes after close)."""
    mixes = (steps_of(seed + at, 10, problems, rollouts, distinct=True) for at in range(2))
    clean, dirty = (max(mix, key=expressions) for mix in mixes)
    ours([(f"x+{count}", f"x-{count}", "expression")])  # starts the processes
    wait = timed(ours, [clean])[0]
    # Bombs take the places of integers, so that both steps hold much the same mathematics.
    dirty = sorted(dirty, key=lambda item: item[2], reverse=True)[count:]
    took, verdicts = timed(ours, [[*dirty, *bombs(seed, count)]])
    rounds = ceil(count / verify_pool.usable_cores())
    bound = wait + SLACK * rounds * verify_pool.SECONDS_PER_EXPRESSION
    verify_pool.close()
    return count, wait, took, bound, verdicts.count(Verdict.TIMEOUT), len(processes())


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print; returns what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="of a mix")
    parser.add_argument("--problems", type=int, default=8, help="of a step")
    parser.add_argument("--rollouts", type=int, default=16, help="of a problem")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bombs", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args(argv)
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    print_origin()
    shape = (arguments.steps, arguments.problems, arguments.rollouts)
    # Both sides import and cache on their first expressions; the pool starts its processes.
    measure(1, arguments.seed + 1_000_000, *shape, distinct=True)
    mixes = {
        "answers repeat as in training": False,
        "no pair repeats": True,
    }
    found = {
        name: measure(arguments.repeats, arguments.seed + 1000 * at, *shape, distinct)
        for at, (name, distinct) in enumerate(mixes.items(), start=1)
    }
    head = ("answers per second", "answers", "rlkit", "math-verify", "ratio", "differ")
    print_table([rate_row(*row) for row in found.items()], head, arguments.markdown)
    differences = [d for results in found.values() for r in results for d in r.differences]
    print_differences(differences)

    rows = [
        bomb_row(count, arguments.seed + 2_000_000 + 10 * at, *shape[1:])
        for at, count in enumerate(arguments.bombs)
    ]
    head = ("bombs in a step", "clean, s", "seconds", "bound, s", "time-outs", "processes left")
    shown = [
        (str(n), f"{c:.2f}", f"{s:.2f}", f"{b:.2f}", str(t), str(p)) for n, c, s, b, t, p in rows
    ]
    print_table(shown, head, arguments.markdown)
    return {"mixes": found, "bombs": rows}


def print_differences(differences: Sequence[Difference]) -> None:
    """Counts by reason, with the first few of each."""
    by_reason: dict[str, list[Difference]] = {}
    for difference in differences:
        by_reason.setdefault(difference.reason, []).append(difference)
    print()
    for reason, found in by_reason.items():
        print(f"{len(found)} verdicts differ: {reason}")
        for item in dict.fromkeys((d.item, d.verdict, d.plain) for d in found[:SHOWN]):
            (answer, gold, _), verdict, other = item
            theirs = "right" if other else "wrong"
            print(f"    gold {gold}, answer {answer}: {verdict}, math-verify {theirs}")
    print()


if __name__ == "__main__":
    main()
