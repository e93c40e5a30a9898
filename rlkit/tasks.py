"""Problems: the embedded tasks, frozen splits, local files and hub data sets, all as problem rows.

A row is ``problem_id, prompt (messages), answer, answer_type, source, meta (canonical JSON)``.

Embedded tasks:

- ``chain``: 3 to 5 two-digit numbers below 30, added and subtracted. Working line by line solves
  it, answering at once does not. RL here is a switch between two modes.
- ``edge``: 5 to 8 two-digit numbers. How finely the work is divided decides success, so every
  knob of RL has room to show its effect.
- ``chain-long``, ``edge-long``: more numbers than any training document holds.
- ``large``: products and sums out of reach of mental steps; for tools.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from rlkit.paths import data_dir

Row = dict[str, Any]
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class ChainSpec:
    """A family of chain sums; ranges are inclusive."""

    verb: str
    terms: tuple[int, int]
    operand: tuple[int, int]
    total: tuple[int, int]
    """Every running total stays in this range, so no line is harder than the task says."""


CHAINS = {
    "chain": ChainSpec("Compute", (3, 5), (10, 29), (0, 99)),
    "edge": ChainSpec("Evaluate", (5, 8), (10, 99), (0, 199)),
    "chain-long": ChainSpec("Compute", (6, 7), (10, 29), (0, 99)),
    "edge-long": ChainSpec("Evaluate", (9, 11), (10, 99), (0, 199)),
}
EMBEDDED = (*CHAINS, "large")
TEST_ONLY = ("chain-long", "edge-long")


@dataclass(frozen=True)
class Chain:
    """Numbers and the signs between them: ``numbers[0] signs[0] numbers[1] ...``."""

    numbers: tuple[int, ...]
    signs: tuple[str, ...]

    @property
    def expression(self) -> str:
        """Canonical text; two problems are the same if and only if their expressions are."""
        return str(self.numbers[0]) + "".join(
            s + str(n) for s, n in zip(self.signs, self.numbers[1:], strict=True)
        )

    @property
    def totals(self) -> list[int]:
        """Running totals after each number."""
        totals = [self.numbers[0]]
        for sign, number in zip(self.signs, self.numbers[1:], strict=True):
            totals.append(totals[-1] + number if sign == "+" else totals[-1] - number)
        return totals

    def fits(self, spec: ChainSpec) -> bool:
        """Whether the chain belongs to ``spec``: counts, ranges, all numbers different."""
        return (
            spec.terms[0] <= len(self.numbers) <= spec.terms[1]
            and len(set(self.numbers)) == len(self.numbers)
            and all(spec.operand[0] <= n <= spec.operand[1] for n in self.numbers)
            and all(spec.total[0] <= t <= spec.total[1] for t in self.totals)
        )


def draw_chain(rng: random.Random, spec: ChainSpec, terms: int | None = None) -> Chain:
    """Draw one chain of ``spec`` (with exactly ``terms`` numbers if given)."""
    want = terms or rng.randint(*spec.terms)
    low, high = spec.operand
    while True:
        numbers = rng.sample(range(low, high + 1), want)
        total, signs = numbers[0], []
        for number in numbers[1:]:
            sign = rng.choice("+-")
            after = total + number if sign == "+" else total - number
            if not spec.total[0] <= after <= spec.total[1]:
                sign = "-" if sign == "+" else "+"
                after = total + number if sign == "+" else total - number
                if not spec.total[0] <= after <= spec.total[1]:
                    break
            signs.append(sign)
            total = after
        else:
            return Chain(tuple(numbers), tuple(signs))


def draw_large(rng: random.Random) -> tuple[str, int]:
    """Draw (expression, value) of the ``large`` task: a product, or a sum of long numbers."""
    if rng.random() < 0.5:
        a, b = rng.randint(100, 9999), rng.randint(100, 9999)
        return f"{a}*{b}", a * b
    numbers = [rng.randint(10_000, 999_999) for _ in range(rng.randint(3, 4))]
    chain = Chain(tuple(numbers), tuple(rng.choice("+-") for _ in numbers[1:]))
    return chain.expression, chain.totals[-1]


def make_row(task: str, expression: str, value: int, source: str) -> Row:
    """The problem row of an embedded problem."""
    verb = CHAINS[task].verb if task in CHAINS else "Calculate"
    terms = 1 + sum(expression.count(sign) for sign in "+-*")
    return {
        "problem_id": f"{task}:{expression}",
        "prompt": [{"role": "user", "content": f"{verb} {expression}."}],
        "answer": str(value),
        "answer_type": "integer",
        "source": source,
        "meta": json.dumps({"expression": expression, "terms": terms}, sort_keys=True),
    }


@lru_cache(maxsize=1)
def held_out_expressions() -> frozenset[str]:
    """Expressions of all frozen splits; no training problem or document may use one."""
    found = set()
    for path in sorted((data_dir() / "problems").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            found.add(json.loads(json.loads(line)["meta"])["expression"])
    return frozenset(found)


def training_stream(task: str, stream: str = "rl") -> Iterator[Row]:
    """Endless training problems, without duplicates and without any held-out problem.

    Item i depends on (task, stream, i) alone; ``stream`` separates pretraining from RL problems.
    """
    seen: set[str] = set()
    for index in _count():
        rng = random.Random(f"{task}/{stream}/{index}")
        if task == "large":
            expression, value = draw_large(rng)
        else:
            chain = draw_chain(rng, CHAINS[task])
            expression, value = chain.expression, chain.totals[-1]
        if expression not in seen and expression not in held_out_expressions():
            seen.add(expression)
            yield make_row(task, expression, value, f"rlkit:{stream}")


def _count() -> Iterator[int]:
    index = 0
    while True:
        yield index
        index += 1


def task_of(problem_id: str) -> str:
    """The task that a problem belongs to: what its id begins with (``large:``, ``gsm8k/``)."""
    return re.split("[:/]", problem_id, maxsplit=1)[0]


def load_problems(
    task: str, split: Split = "test", n: int | None = None, *, revision: str = "main"
) -> list[Row]:
    """Problem rows of an embedded task, a local .jsonl/.parquet file or a hub data set.

    Args:
        task: a name of ``EMBEDDED``, a file path, or a name of ``rlkit.hub.HUB``; several joined by
            ``+`` (``large+chain``) give equally many of each, in turn. A file may have ``+`` in its
            path if it is asked for alone.
        split: embedded ``validation`` and ``test`` are frozen files of data/problems.
        n: the first n rows; None takes all (for an embedded ``train`` split n is required).
        revision: hub revision; ignored otherwise.

    Raises:
        ValueError: unknown name, empty split, or fewer rows than asked for.
    """
    if n is not None and n < 1:
        raise ValueError(f"n={n}: expected at least one problem, or None for all")
    file = task.endswith((".jsonl", ".parquet"))
    if "+" in task and not (file and Path(task).is_file()):
        rows = _mixed(task.split("+"), split, n, revision)
    elif task in EMBEDDED:
        rows = _embedded(task, split, n)
    elif file:
        from rlkit.hub import load_file

        rows = load_file(Path(task))
    else:
        from rlkit.hub import HUB, load_hub

        if task not in HUB:
            raise ValueError(
                f"task={task!r} is unknown: expected one of {', '.join((*EMBEDDED, *HUB))}, or the "
                "path of a .jsonl or .parquet file"
            )
        rows = load_hub(task, revision=revision, split=split, n=n)
    if not rows:
        raise ValueError(
            f"The {split} split of {task!r} is empty; a run needs at least one problem"
        )
    if n is not None and len(rows) < n:
        raise ValueError(f"{task!r} has {len(rows)} {split} problems, fewer than the {n} asked for")
    return rows[:n]


def _mixed(names: list[str], split: Split, n: int | None, revision: str) -> list[Row]:
    """Rows of several tasks in turn; without ``n``, as many of each as the smallest has."""
    if len(set(names)) < len(names):
        raise ValueError(f"task={'+'.join(names)!r} names a task twice: expected each once")
    each = None if n is None else -(-n // len(names))
    if "" in names:
        raise ValueError(f"task={'+'.join(names)!r}: expected a task on each side of '+'")
    parts = [load_problems(name, split, each, revision=revision) for name in names]
    return [row for rows in zip(*parts, strict=False) for row in rows]


def _embedded(task: str, split: Split, n: int | None) -> list[Row]:
    if split == "train":
        if task in TEST_ONLY:
            raise ValueError(f"{task!r} is for testing only: expected split 'test'")
        if n is None:
            raise ValueError(f"The train split of {task!r} is endless: say how many with n")
        stream = training_stream(task)
        return [next(stream) for _ in range(n)]
    path = data_dir() / "problems" / f"{task}-{split}.jsonl"
    if not path.exists():
        raise ValueError(
            f"{task!r} has no {split} split: expected the file data/problems/{path.name}"
        )
    return [json.loads(line) for line in path.read_text().splitlines()]
