"""What tells rewards apart: equal for the same code and settings in any process, else not."""

import dataclasses
import functools
import json
import subprocess
import sys

import numpy as np
import pytest

from rlkit import filters, rewards, shaping
from rlkit.checks import ConfigError
from rlkit.identity import described
from rlkit.paths import root


def one(completions, problems, /, **info):
    return [1.0] * len(completions)


def two(completions, problems, /, **info):
    return [2.0] * len(completions)


two.__qualname__ = two.__name__ = "one"


def make(weight):
    def weighted(completions, problems, /, **info):
        return [weight] * len(completions)

    return weighted


class Scorer:
    def __init__(self, weight):
        self.weight = weight

    def score(self, completions, problems, /, **info):
        return [self.weight] * len(completions)

    __call__ = score


@dataclasses.dataclass(frozen=True)
class Frozen:
    weight: float

    def __call__(self, completions, problems, /, **info):
        return [self.weight] * len(completions)


def defaulted(scale):
    def reward(completions, problems, /, scale=scale, **info):
        return [scale] * len(completions)

    return reward


TABLE = np.arange(5000.0)
OTHER = np.where(np.arange(5000) == 2000, -1.0, TABLE)
DIFFERENT = {
    "function": lambda: one,
    "another body, same name": lambda: two,
    "closure 1": lambda: make(1.0),
    "closure 2": lambda: make(2.0),
    "object 1": lambda: Scorer(1),
    "object 2": lambda: Scorer(2),
    "method 1": lambda: Scorer(1).score,
    "method 2": lambda: Scorer(2).score,
    "frozen 1": lambda: Frozen(0.1),
    "frozen 2": lambda: Frozen(0.1 + 1e-17 + 1e-16),
    "default 1": lambda: defaulted(1),
    "default 2": lambda: defaulted(2),
    "partial 1": lambda: functools.partial(rewards.accuracy, format="boxed"),
    "partial 2": lambda: functools.partial(rewards.accuracy, format="zero"),
    "array 1": lambda: functools.partial(one, table=TABLE),
    "array 2": lambda: functools.partial(one, table=OTHER),
    "set": lambda: functools.partial(one, words={"but", "wait", "so"}),
    "gated 1": lambda: shaping.on_right(one),
    "gated 2": lambda: shaping.on_right(rewards.accuracy),
    "filter": lambda: filters.overlong_masking,
    "weights 1": lambda: [("a", one, 1.0)],
    "weights 2": lambda: [("a", one, 0.5)],
}


def test_the_same_is_equal_and_the_different_is_not():
    texts = {name: json.dumps(described(made())) for name, made in DIFFERENT.items()}
    assert texts == {name: json.dumps(described(made())) for name, made in DIFFERENT.items()}
    assert len(set(texts.values())) == len(texts)
    assert not any(" at 0x" in text for text in texts.values())


def test_another_process_describes_it_the_same():
    here = json.dumps({name: described(made()) for name, made in DIFFERENT.items()})
    code = (
        "import sys, json; sys.path.insert(0, 'tests'); import test_identity as t\n"
        "print(json.dumps({n: t.described(m()) for n, m in t.DIFFERENT.items()}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root()
    )
    assert done.stdout.strip() == here


def test_what_cannot_be_told_apart_is_refused():
    class Slotted:
        __slots__ = ("weight",)

        def __call__(self, completions, problems, /, **info):
            return []

    circle = Scorer(1)
    circle.weight = circle
    for bad, words in (
        (functools.partial(one, thing=object()), "keywords.thing is a object"),
        (Slotted(), "is a Slotted"),
        (circle, "holds itself"),
        (np.array([object()]), "ndarray"),
    ):
        with pytest.raises(ConfigError, match=words):
            described(bad, "reward_fns")


def test_code_without_source_counts_by_its_instructions():
    made = []
    for number in (1.0, 2.0, 1.0):
        space = {}
        exec(f"def f(c, p, /, **info): return [{number}] * len(c)", space)
        made.append(json.dumps(described(space["f"])))
    assert made[0] == made[2] != made[1]
