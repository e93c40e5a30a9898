r"""Shaping rewards: graded outcomes, length, repetition, and gates around any of them.

All follow the contract of ``rlkit.rewards`` and are meant to be bound with ``functools.partial``.
Settings are checked at each call and raise ConfigError (a ValueError) before anything is scored.

Length means ``len(completion.token_ids)``, in tokens: all that counts against the budget of
``max_completion_length``, so the end token and tool output too, prompt and prefill not. Only
``repetition_penalty`` reads the policy's own tokens (loss mask 1), since nobody should pay for what
a tool printed twice.

A shaping term moves right and wrong answers alike. In a group in which all are wrong it is the only
difference left, and dividing by the group's standard deviation (arXiv 2503.20783) makes it as loud
as a right answer. ``on_right`` keeps a term out of wrong answers; ``docs/rewards.md`` says for each
reward whether one wrong answer can beat another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlkit.checks import require
from rlkit.completion import Completion
from rlkit.correct import Problem, RewardFn, Values, all_correct

__all__ = [
    "Gate",
    "Gated",
    "cosine_length",
    "graded",
    "on_right",
    "repetition_penalty",
    "soft_overlong",
]

Gate = Callable[[Sequence[Completion], Sequence[Problem]], Sequence[bool] | Values]
"""Where a reward counts: one truth value per completion, judged together. Another reward serves
too, open where it pays (``accuracy`` with a format rule)."""

RIGHT, WRONG, UNBOXED = 1.0, -1.0, -2.0
"""The values of ``graded``."""


def graded(
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    /,
    *,
    released_sum: bool = False,
    **info: Any,
) -> Values:
    r"""Outcome in three grades: right +1, wrong -1, no box -2.

    The reward of STILL-3-1.5B (arXiv 2503.04548, ``server_dpsk_tuple`` of the released code).

    - Right means what it means everywhere here (``is_correct``): equal to the gold answer and ended
      by the policy. The released code looks at the text alone, so there a response that was cut off
      after the right box earns +1. Here it is wrong: -1.
    - No box means, as released, that the word "boxed" stands nowhere in the response, reasoning and
      unclosed boxes included. A truncated response that mentions it gets -1, any other -2.
    - A right answer in ``<answer>`` tags (Zero format) is right, box or not.

    The released code adds a second component, meant as a length term: +1 if "boxed" occurs neither
    in the prompt nor in the response. With the paper's question-only prompt an unboxed response so
    totals -2 + 1 = -1, the same as a wrong one: two grades, not three.

    Args:
        completions: N completions.
        problems: N problem rows; with ``released_sum`` their ``prompt`` is searched for "boxed".
            A template's words are not part of the row: leave ``released_sum`` off with templates
            that ask for a box, where the released code gives -2 too.
        released_sum: give unboxed responses -1 where the released sum does.
        info: ignored.
    """
    return [
        None
        if completion.stop == "infra"
        else RIGHT
        if ok
        else WRONG
        if "boxed" in completion.text
        else UNBOXED + float(released_sum and not _asks_for_box(problem))
        for completion, problem, ok in zip(
            completions, problems, all_correct(completions, problems), strict=True
        )
    ]


def _asks_for_box(problem: Problem) -> bool:
    return any("boxed" in message["content"] for message in problem["prompt"])


def soft_overlong(
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    /,
    *,
    max_length: int = 0,
    cache: int,
    **info: Any,
) -> Values:
    r"""Soft overlong punishment, in [-1, 0] (DAPO, arXiv 2503.14476, equation 13).

    With length n, ``max_length`` L and ``cache`` C::

        0                  n <= L - C
        ((L - C) - n) / C  L - C < n <= L
        -1                 n > L

    A response that used up a budget of L tokens has n = L and gets -1, whether it ended with its
    last token or was cut off. It never falls below -1, so next to accuracy (0 or 1) a weight below
    1 keeps every right answer above 0.

    Args:
        completions: N completions; the length counts tool output, as the budget does.
        problems: N problem rows, not read.
        max_length: L in tokens; normally the run's ``max_completion_length``.
        cache: C in tokens, from 1 to L; the last C tokens before L are punished linearly.
        info: ignored.
    """
    _require_count("max_length", max_length)
    _require_count("cache", cache)
    require(
        cache <= max_length,
        "cache",
        cache,
        f"at most max_length={max_length}",
        "The punished stretch cannot be longer than the budget: lower cache or raise max_length.",
    )
    free = max_length - cache

    def value(length: int) -> float:
        if length <= free:
            return 0.0
        return (free - length) / cache if length <= max_length else -1.0

    return [None if c.stop == "infra" else value(len(c.token_ids)) for c in completions]


def cosine_length(
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    /,
    *,
    max_length: int = 0,
    right_short: float = 2.0,
    right_long: float = 1.0,
    wrong_short: float = -10.0,
    wrong_long: float = 0.0,
    exceed: float = -10.0,
    **info: Any,
) -> Values:
    r"""Outcome reward that moves with length along a half cosine (arXiv 2502.03373, section 4).

    With length n and ``max_length`` L::

        exceed                                                n >= L, or cut off by the budget
        right_long + (right_short - right_long) * c(n)        right (``is_correct``)
        wrong_long + (wrong_short - wrong_long) * c(n)        otherwise
        c(n) = (1 + cos(pi * n / L)) / 2                      from 1 at n = 0 down to 0 at n = L

    The defaults are the paper's main setting, read from its released run scripts. With them short
    right answers earn more than long ones, and long wrong answers more than short wrong ones (a
    policy that fails should think longer). So an all-wrong group teaches length alone, up to L - 1;
    the paper reports that this was exploited by repetition and adds a penalty for it. ``on_right``
    removes the wrong branch.

    The released code applies ``exceed`` from 16 tokens before L on; there is no such margin here.
    A right answer of L tokens or more gets ``exceed`` as well, as in the paper.

    Args:
        completions: N completions; the length counts tool output, as the budget does.
        problems: N problem rows.
        max_length: L in tokens; normally the run's ``max_completion_length``.
        right_short: value of a right answer towards length 0; >= 0.
        right_long: value of a right answer towards length L; >= 0. Above ``right_short`` long right
            answers are preferred, which the paper tries too.
        wrong_short: value of a wrong answer towards length 0; <= 0.
        wrong_long: value of a wrong answer towards length L; <= 0.
        exceed: value of a response that ran out of length; <= 0.
        info: ignored.
    """
    _require_count("max_length", max_length)
    for name, number in (("right_short", right_short), ("right_long", right_long)):
        require(
            _is_number(number) and number >= 0,
            name,
            number,
            "a finite number >= 0",
            "Below 0 a right answer could earn less than a wrong one.",
        )
    for name, number in (
        ("wrong_short", wrong_short),
        ("wrong_long", wrong_long),
        ("exceed", exceed),
    ):
        _require_penalty(name, number)

    def value(completion: Completion, right: bool) -> float:
        length = len(completion.token_ids)
        if length >= max_length or completion.stop == "length":
            return float(exceed)
        short, long = (right_short, right_long) if right else (wrong_short, wrong_long)
        return long + (short - long) * (1.0 + math.cos(math.pi * length / max_length)) / 2

    return [
        None if completion.stop == "infra" else value(completion, ok)
        for completion, ok in zip(completions, all_correct(completions, problems), strict=True)
    ]


def repetition_penalty(
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    /,
    *,
    ngram: int = 20,
    max_penalty: float = -1.0,
    **info: Any,
) -> Values:
    r"""Share of repeated n-grams times ``max_penalty``, in (max_penalty, 0].

    ``R = max_penalty * (1 - distinct / total)`` over the n-grams of token ids. The per-response
    form of arXiv 2502.03373 as open-r1 and TRL use it (``get_repetition_penalty_reward``); the
    paper's main runs put a penalty on each repeated token instead (n = 40). TRL's default is n = 3.
    At one token per digit so short an n-gram punishes steps that echo their operands.

    Only tokens that the policy wrote count, joined across tool output: a policy that writes the
    same call again and again is repeating itself, however much output stands between.

    Args:
        completions: N completions. Fewer than ``ngram`` own tokens, or none, give 0.
        problems: N problem rows, not read.
        ngram: n in tokens; >= 1.
        max_penalty: limit for a response that repeats one n-gram for ever; <= 0.
        info: ignored.
    """
    _require_count("ngram", ngram)
    _require_penalty("max_penalty", max_penalty)

    def value(completion: Completion) -> float:
        pairs = zip(completion.token_ids, completion.loss_mask, strict=True)
        own = [token for token, mask in pairs if mask]
        grams = list(zip(*(own[start:] for start in range(ngram)), strict=False))
        repeats = len(grams) - len(set(grams))
        return max_penalty * repeats / len(grams) if repeats else 0.0  # no -0.0, no 0 / 0

    return [None if c.stop == "infra" else value(c) for c in completions]


@dataclass(frozen=True)
class Gated:
    """A reward that counts only where ``gate`` is open; itself one, picklable if its parts are.

    Rows without a value stay without one (None). Reward and gate are called on all rows at once.

    Attributes:
        reward: what an open row earns.
        gate: where it counts, for example ``correct.all_correct``.
        otherwise: value of a closed row; finite.
    """

    reward: RewardFn
    gate: Gate
    otherwise: float = 0.0

    def __post_init__(self) -> None:
        require(_is_number(self.otherwise), "otherwise", self.otherwise, "a finite number")

    def __call__(
        self, completions: Sequence[Completion], problems: Sequence[Problem], /, **info: Any
    ) -> Values:
        """One value per completion; ``info`` goes on to the inner reward."""
        values = self.reward(completions, problems, **info)
        return [
            value if value is None or opened else float(self.otherwise)
            for value, opened in zip(values, self.gate(completions, problems), strict=True)
        ]


def on_right(reward: RewardFn) -> Gated:
    """``reward`` on right answers (``all_correct``), 0 on all others.

    So a shaping term ranks right answers among themselves and a wrong answer cannot win a group in
    which all are wrong, as it does when a bonus for form or length is added (open-instruct's GRPO
    documentation). Keep the term's range below the gap between right and wrong, or a right answer
    can fall to the level of a wrong one.
    """
    return Gated(reward, all_correct)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _require_count(name: str, value: int) -> None:
    require(type(value) is int and value >= 1, name, value, "an integer >= 1", "Count tokens.")


def _require_penalty(name: str, value: float) -> None:
    require(
        _is_number(value) and value <= 0,
        name,
        value,
        "a finite number <= 0",
        "Give a penalty as a negative number, 0 for none.",
    )
