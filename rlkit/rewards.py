r"""Rewards: what a completion is worth.

A reward is a callable ``(completions, problems, **info) -> list[float | None]``, one value per
completion and None for rows without a reward (``stop == "infra"``: the machinery failed, which says
nothing about the policy). It keeps no state. ``info`` holds facts of the step, such as ``seed`` and
``step``; a reward takes what it needs and ignores the rest.

Format never adds to a wrong answer, it only gates a right one: with an added bonus, a long wrong
answer in good form wins every group in which all are wrong (open-instruct's GRPO documentation).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any, Literal, Protocol

from rlkit.checks import ConfigError
from rlkit.completion import THINK_CLOSE, THINK_OPEN, Completion
from rlkit.config import RewardConfig
from rlkit.exploits import Exploit, check_reward
from rlkit.extract import boxes
from rlkit.verify import Verdict, verify

__all__ = [
    "Exploit",
    "Problem",
    "RewardError",
    "RewardFn",
    "Values",
    "accuracy",
    "boxed_format",
    "build",
    "check_reward",
    "format_reward",
    "is_correct",
    "random_reward",
    "score",
    "well_formed",
    "zero_format",
]

Problem = Mapping[str, Any]
Values = list[float | None]
FormatName = Literal["boxed", "zero", "none"]

_TAGS = (THINK_OPEN, THINK_CLOSE, "<answer>", "</answer>")
_END_TOKENS = re.compile(r"(?:<\|endoftext\|>|<\|im_end\|>|\s)+\Z")


class RewardFn(Protocol):
    """The shape of every reward."""

    def __call__(
        self, completions: Sequence[Completion], problems: Sequence[Problem], /, **info: Any
    ) -> Values:
        """One value per completion, in order; None where there is no reward."""
        ...


def boxed_format(completion: Completion) -> bool:
    r"""The embedded models' form.

    At most one ``<think>...</think>``, at the start and closed if present; exactly one, non-empty
    ``\boxed{}`` after it; end reached. A direct boxed answer is well formed.
    """
    text = completion.text.strip()
    opened, closed = text.count(THINK_OPEN), text.count(THINK_CLOSE)
    if not completion.reached_end or opened != closed or opened > 1:
        return False
    if opened and not text.startswith(THINK_OPEN):
        return False
    final = text.rpartition(THINK_CLOSE)[2]
    contents = boxes(final)
    return final.count(r"\boxed") == 1 and len(contents) == 1 and bool(contents[0])


def zero_format(completion: Completion) -> bool:
    """The five conditions of the study's Zero runs (arXiv 2503.04548, released ``STILLZero``).

    The response, prefill included, (1) starts with ``<think>``; (2) ends with ``</answer>``, end
    tokens and space aside; (3) holds each of the four tags exactly once, in order; (4) has
    non-empty reasoning and answer; (5) has only space between ``</think>`` and ``<answer>``.
    """
    text = _END_TOKENS.sub("", completion.text).lstrip()
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    starts = [text.index(tag) for tag in _TAGS]
    if starts != sorted(starts) or starts[0] != 0 or not text.endswith(_TAGS[3]):
        return False
    ends = [start + len(tag) for start, tag in zip(starts, _TAGS, strict=True)]
    reasoning, gap, answer = (
        text[end:start] for end, start in zip(ends[:3], starts[1:], strict=True)
    )
    return bool(reasoning.strip()) and not gap.strip() and bool(answer.strip())


def well_formed(completion: Completion, format: FormatName) -> bool:
    """Whether ``completion`` obeys the named format rule; ``none`` accepts everything."""
    if format == "boxed":
        return boxed_format(completion)
    return format == "none" or zero_format(completion)


def is_correct(completion: Completion, problem: Problem) -> bool:
    """Whether the answer equals the gold answer and the policy ended the response itself.

    This is what accuracy, gates and acceptance numbers mean everywhere; no format rule takes part.
    """
    if not completion.reached_end:
        return False
    verdict = verify(completion.answer, problem["answer"], problem["answer_type"])
    return verdict is Verdict.RIGHT


def accuracy(
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    /,
    *,
    format: FormatName = "boxed",
    **info: Any,
) -> Values:
    r"""Outcome reward ``R = 1[answer = gold] * 1[end reached] * 1[well formed]``.

    arXiv 2503.04548 section 2 and its Zero runs (format rule as a gate). A truncated response, an
    answer outside the box and an answer that appears only in the reasoning score 0.
    """
    return [
        None
        if completion.stop == "infra"
        else float(is_correct(completion, problem) and well_formed(completion, format))
        for completion, problem in zip(completions, problems, strict=True)
    ]


def format_reward(
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    /,
    *,
    format: FormatName = "boxed",
    **info: Any,
) -> Values:
    """``R = 1[well formed]``, right or wrong: exploitable on purpose, to study form learning.

    DeepSeek-R1 (arXiv 2501.12948, section 2.2.2) adds such a term; alone it pays any boxed answer.
    """
    return [
        None if completion.stop == "infra" else float(well_formed(completion, format))
        for completion in completions
    ]


def random_reward(
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    /,
    *,
    seed: int = 0,
    step: int = 0,
    **info: Any,
) -> Values:
    """``R ~ Bernoulli(1/2)``, mean 0.5, independent of the text: the null test of an RL pipeline.

    Spurious Rewards (arXiv 2506.10947). The coin of a row is the lowest bit of a hash of (seed,
    step, row number, problem_id): repeatable, and never a function of what the policy wrote.
    Pass ``seed`` and ``step``, or every step tosses the same coins.
    """
    values: Values = []
    for row, (completion, problem) in enumerate(zip(completions, problems, strict=True)):
        key = f"{seed}/{step}/{row}/{problem['problem_id']}".encode()
        coin = blake2b(key, digest_size=1).digest()[0] & 1
        values.append(None if completion.stop == "infra" else float(coin))
    return values


def build(config: RewardConfig) -> list[tuple[str, RewardFn, float]]:
    """The rewards of a run as (unique name, callable, weight)."""
    if config.reward == "random":
        return [("random", random_reward, 1.0)]
    if config.reward == "format":
        if config.format == "none":
            raise ConfigError(
                "format='none': expected 'boxed' or 'zero' with reward='format'. Without a format "
                "rule every completion scores 1 and no group has variance."
            )
        return [("format", partial(format_reward, format=config.format), 1.0)]
    return [("accuracy", partial(accuracy, format=config.format), 1.0)]


def score(
    reward_fns: Sequence[tuple[str, RewardFn, float]],
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    **info: Any,
) -> tuple[Values, dict[str, Values]]:
    """Weighted sum of rewards.

    Args:
        reward_fns: (name, callable, weight) as ``build`` gives them.
        completions: N completions.
        problems: N problem rows, one per completion.
        info: facts of the step, passed on to every reward (``seed``, ``step``).

    Returns:
        total [N]: sum of weight * value over the rewards that have a value, None if none has;
        parts: name -> unweighted values [N].

    Raises:
        ValueError: no reward, a duplicate name, or counts that differ.
        RewardError: a reward returned the wrong number of values, or one that is not finite.
    """
    names = [name for name, _, _ in reward_fns]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"Reward names {names}: expected at least one, each only once")
    if len(completions) != len(problems):
        raise ValueError(f"{len(completions)} completions but {len(problems)} problems")
    parts: dict[str, Values] = {}
    for name, reward_fn, _ in reward_fns:
        values = reward_fn(completions, problems, **info)
        _check_values(name, values, len(completions))
        parts[name] = [None if v is None else float(v) for v in values]
    total: Values = []
    for row in range(len(completions)):
        terms = [(w, parts[name][row]) for name, _, w in reward_fns]
        known = [w * v for w, v in terms if v is not None]
        total.append(math.fsum(known) if known else None)
    return total, parts


class RewardError(ValueError):
    """A reward function broke its contract."""


def _check_values(name: str, values: object, count: int) -> None:
    if not isinstance(values, list):
        raise RewardError(f"Reward {name!r} returned {type(values).__name__}: expected a list")
    if len(values) != count:
        raise RewardError(
            f"Reward {name!r} returned {len(values)} values for {count} completions: expected one "
            "per completion, None where there is no reward"
        )
    for row, value in enumerate(values):
        if value is None:
            continue
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise RewardError(
                f"Reward {name!r} returned {value!r} for completion {row}: expected a finite "
                "number or None"
            )
