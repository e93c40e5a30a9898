r"""Made-up answers in the proportions of training, for ``benchmarks/verify.py``.

How a mix is drawn (``random.Random(seed)``, nothing else): of every ten problems nine have an
integer gold, 0 to 999 with a few of four to six digits, and one an expression: a fraction, root,
multiple of pi, polynomial, interval, pair, set or matrix with small random numbers, no gold twice.
A problem has a chance of success uniform in [0, 1], and each of its rollouts is

- right with this chance: in the words of the gold four times in five, else in another form;
- wrong otherwise: with weights 1, 1/2, 1/3, ... one of eight near misses of the gold, among them
  the habits of models (``x=12``, ``12 \text{ cm}``, ``3 or 5``, ``12\%``, no answer).

``distinct`` instead gives every rollout of a problem another text, so that no pair ever repeats.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

Item = tuple[str | None, str, str]
"""Answer, gold, answer type, as ``rlkit.verify`` takes them."""
INTEGERS_OF_TEN = 9
RIGHT_IN_OTHER_WORDS = 0.2
WRONG_ANSWERS = 8


def steps_of(
    seed: int, steps: int, problems: int, rollouts: int, distinct: bool
) -> list[list[Item]]:
    """``steps`` batches of ``problems`` groups of ``rollouts`` items."""
    draw = random.Random(seed)
    kinds = [
        "integer" if number % 10 < INTEGERS_OF_TEN else "expression"
        for number in range(steps * problems)
    ]
    draw.shuffle(kinds)
    seen: set[str] = set()
    groups = [_group(draw, kind, rollouts, distinct, seen) for kind in kinds]
    return [
        [item for group in groups[at : at + problems] for item in group]
        for at in range(0, len(groups), problems)
    ]


def bombs(seed: int, count: int) -> list[Item]:
    """Expressions that no machine can finish, all different, for the gold ``x^7+1``."""
    draw = random.Random(seed)
    forms: list[Callable[[int], str]] = [
        lambda n: rf"{n}^{{{n}^{{10}}}}",
        lambda n: f"{n}9999999!",
        lambda n: rf"9^{{9^{{9^{{{n}}}}}}}",
        lambda n: rf"\frac{{1}}{{{n}^{{{n}^{{11}}}}}}",
    ]
    numbers = draw.sample(range(11, 99), count)
    return [(forms[at % len(forms)](n), "x^7+1", "expression") for at, n in enumerate(numbers)]


def _group(
    draw: random.Random, kind: str, rollouts: int, distinct: bool, seen: set[str]
) -> list[Item]:
    gold, other_words, near = _integer(draw) if kind == "integer" else _expression(draw)
    while kind == "expression" and gold in seen:
        gold, other_words, near = _expression(draw)
    seen.add(gold)
    if distinct:
        texts = dict.fromkeys([gold, other_words])
        for number in itertools.count():
            if len(texts) >= rollouts:
                break
            texts[near(number)] = None
        answers: list[str | None] = [*texts][:rollouts]
        draw.shuffle(answers)
        return [(answer, gold, kind) for answer in answers]
    wrong = [None if at == WRONG_ANSWERS - 1 else near(at) for at in range(WRONG_ANSWERS)]
    weights = [1 / (at + 1) for at in range(WRONG_ANSWERS)]
    chance = draw.random()
    answers = []
    for _ in range(rollouts):
        if draw.random() < chance:
            answers.append(other_words if draw.random() < RIGHT_IN_OTHER_WORDS else gold)
        else:
            answers.append(draw.choices(wrong, weights)[0])
    return [(answer, gold, kind) for answer in answers]


Drawn = tuple[str, str, Callable[[int], str]]
"""A gold, the same in other words, near misses by number."""


def _integer(draw: random.Random) -> Drawn:
    value = draw.randrange(1000) if draw.random() < 0.9 else draw.randrange(1000, 10**6)

    def near(at: int) -> str:
        miss = value + draw.choice((-1, 1)) * draw.randint(1, 9 + 10 * at)
        habits = {2: f"x={value}", 4: rf"{value} \text{{ cm}}", 5: f"{value} or {miss}"}
        habits[6] = rf"{value}\%"
        return habits.get(at, str(miss))

    return str(value), f"{value:,}.0", near


def _expression(draw: random.Random) -> Drawn:
    a, b, c = draw.randint(2, 40), draw.randint(2, 40), draw.randint(2, 40)
    form = draw.choice(FORMS)

    def near(at: int) -> str:
        moved = [a, b, c]
        moved[at % 3] += draw.choice((-1, 1)) * draw.randint(1, 1 + at)
        text = form(*moved)[0]
        habits = {4: rf"{text} \text{{ cm}}", 5: f"{text} or {a}", 6: f"y={text}"}
        return habits.get(at, text)

    gold, other_words = form(a, b, c)
    return gold, other_words, near


FORMS: list[Callable[[int, int, int], tuple[str, str]]] = [
    lambda a, b, c: (rf"\frac{{{a}}}{{{b * c + 1}}}", f"{a}/{b * c + 1}"),
    lambda a, b, c: (rf"-\frac{{{a}}}{{{b * c + 1}}}", rf"\frac{{-{a}}}{{{b * c + 1}}}"),
    lambda a, b, c: (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b}}}"),
    lambda a, b, c: (rf"{a}+{b}\sqrt{{{c}}}", rf"{b}\sqrt{{{c}}}+{a}"),
    lambda a, b, c: (rf"\frac{{{a}\pi}}{{{b}}}", rf"\frac{{{a}}}{{{b}}}\pi"),
    lambda a, b, c: (f"{a}x^2+{b}x-{c}", f"-{c}+{b}x+{a}x^2"),
    lambda a, b, c: (f"({a},{a + b * c}]", f"({a}, {a + b * c}]"),
    lambda a, b, c: (f"({a},{a + b * c})", rf"\left({a},{a + b * c}\right)"),
    lambda a, b, c: (rf"\{{{a},{b},{c}\}}", rf"\{{{c},{b},{a}\}}"),
    lambda a, b, c: (
        rf"\begin{{pmatrix}}{a}\\{b}\end{{pmatrix}}",
        rf"\begin{{bmatrix}}{a}\\{b}\end{{bmatrix}}",
    ),
]
