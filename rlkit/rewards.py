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
from collections.abc import Sequence
from functools import partial
from typing import Any

from rlkit import filters, length_rewards, shaping, spurious, tool_rewards
from rlkit.checks import ConfigError
from rlkit.completion import Completion
from rlkit.config import RewardConfig, RunConfig
from rlkit.correct import Problem, RewardFn, Values, all_correct, is_correct, without_infra
from rlkit.exploits import Exploit, RewardError, check_reward
from rlkit.formats import FormatName, boxed_format, well_formed, zero_format
from rlkit.spurious import format_reward, random_reward

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

RewardFns = Sequence[tuple[str, RewardFn, float]]
"""(unique name, callable, weight) of each part of a composed reward."""


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
    right = all_correct(completions, problems)
    formed = (ok and well_formed(c, format) for c, ok in zip(completions, right, strict=True))
    return without_infra(completions, list(formed))


def build(config: RewardConfig) -> list[tuple[str, RewardFn, float]]:
    """The rewards of a run as (unique name, callable, weight).

    ``score`` needs the facts that they use: ``seed``, ``step`` and ``max_length``.
    """
    form = config.format
    rewards: dict[str, RewardFn] = {
        "accuracy": partial(accuracy, format=form),
        "graded": shaping.graded,
        "cosine": shaping.cosine_length,
        "rrl": length_rewards.relative_length,
        "rra": length_rewards.reflection_actions,
        "format": partial(format_reward, format=form),
        "random": random_reward,
        "inverted": partial(spurious.inverted, format=form),
        "majority": partial(spurious.majority, format=form),
        "any_box": spurious.any_box,
    }
    if config.reward == "format" and config.format == "none":
        raise ConfigError(
            "format='none': expected 'boxed' or 'zero' with reward='format'. Without a format "
            "rule every completion scores 1 and no group has variance."
        )
    if config.false_positive or config.false_negative:
        rewards["accuracy"] = partial(
            spurious.noisy_accuracy,
            false_positive=config.false_positive,
            false_negative=config.false_negative,
            noise=config.verifier_noise,
            format=form,
        )
    parts: list[tuple[str, RewardFn, float]] = [(config.reward, rewards[config.reward], 1.0)]
    overlong = partial(shaping.soft_overlong, cache=config.overlong_cache)
    repetition = partial(shaping.repetition_penalty, ngram=config.repetition_ngram)
    # Where accuracy pays: right alone would pay a malformed answer for a call.
    gate = partial(accuracy, format=form)
    failing = partial(tool_rewards.failing_code, penalty=-1.0)
    parts += [
        ("overlong", overlong, config.overlong_weight),
        ("repetition", repetition, config.repetition_weight),
        ("tool_use", shaping.Gated(tool_rewards.tool_use, gate), config.tool_use_weight),
        ("failing_code", failing, config.failing_code_weight),
        ("call_cost", shaping.Gated(tool_rewards.call_cost, gate), config.call_cost_weight),
    ]
    return [part for part in parts if part[2]]


def build_filter(config: RewardConfig) -> filters.GroupFilter | None:
    """The group filter of a run, None if every completion is trained on."""
    return filters.FILTERS.get(config.group_filter)


def facts(config: RunConfig, step: int) -> dict[str, Any]:
    """What a run tells its rewards at ``step``: ``seed``, ``step``, ``max_length`` in tokens."""
    return {
        "seed": config.seed,
        "step": step,
        "max_length": config.sampling.max_completion_length,
    }


def score(
    reward_fns: RewardFns,
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    **info: Any,
) -> tuple[Values, dict[str, Values]]:
    """Weighted sum of rewards.

    Args:
        reward_fns: (name, callable, weight) as ``build`` gives them.
        completions: N completions.
        problems: N problem rows, one per completion.
        info: facts of the step, passed on to every reward (see ``facts``).

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
