"""Rewards on tool calls: use of the tool, its price, and code that fails.

All read ``ToolCall.status``: ``ok`` is a run that ended by itself without an error, ``infra`` a
failure of the machinery, which says nothing about the policy and never counts. Every other status
(error, timeout, too much output) is a failure of the code. A program can hide its own errors, so a
status shows that code ran, not that it helped: none of them replaces a right answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from rlkit.checks import require
from rlkit.completion import Completion
from rlkit.correct import Problem, Values

__all__ = ["call_cost", "failing_code", "tool_use"]

OK, INFRA = "ok", "infra"
FailurePer = Literal["response", "call"]


def tool_use(
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    /,
    *,
    cap: int = 1,
    **info: Any,
) -> Values:
    """``R = min(calls, cap) / cap``, in [0, 1]; calls that ran well (status ``ok``) count.

    To start tool use in a policy that hardly ever calls. The form is that of the study's bounded
    action reward (arXiv 2503.04548, section 4.2, RRA: ``min(A, 20) / 20``), calls as actions.

    Known exploit: ``cap`` trivial calls such as ``print(1)`` earn all of it, right or wrong. A cap
    bounds the damage to 1: more calls earn nothing. Wrap it in ``shaping.on_right``, so that
    calls pay only together with a right answer, and take it away once the policy calls.

    Args:
        completions: N completions.
        problems: N problem rows, not read.
        cap: calls that earn the full reward; >= 1.
        info: ignored.
    """
    require(type(cap) is int and cap >= 1, "cap", cap, "an integer >= 1", "Count tool calls.")
    return [
        None if c.stop == "infra" else min(_statuses(c).count(OK), cap) / cap for c in completions
    ]


def call_cost(
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    /,
    *,
    cap: int = 4,
    **info: Any,
) -> Values:
    """``R = -min(calls, cap) / cap``, in [-1, 0]; calls of every status count but ``infra``.

    So that code is written where it helps and not everywhere: next to accuracy a call costs little
    where no answer is right without one, and is what separates right answers where many are. Pay it
    on right answers only (``shaping.on_right``), as the tool-efficient reward of OTC (arXiv
    2504.14870) does, or a wrong answer without a call beats a wrong one with an honest attempt.

    Known exploit: calling less, which is its purpose. A long program costs as much as a short one.

    Args:
        completions: N completions.
        problems: N problem rows, not read.
        cap: calls that cost all of it; >= 1.
        info: ignored.
    """
    require(type(cap) is int and cap >= 1, "cap", cap, "an integer >= 1", "Count tool calls.")
    return [None if c.stop == "infra" else -min(len(_statuses(c)), cap) / cap for c in completions]


def failing_code(
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    /,
    *,
    penalty: float = -0.5,
    per: FailurePer = "response",
    **info: Any,
) -> Values:
    """Penalty for code that does not run, in [penalty, 0].

    ``per="response"``: ``penalty`` if any call failed. ToRL (arXiv 2503.23383, reward design) takes
    0.5 off a response that contains code which does not execute, next to +1 and -1 for the answer.

    ``per="call"``: ``penalty * failed / (failed + ok)``, milder on long sessions. Known exploit: a
    failure is diluted by trivial calls that work, so nine of ``print(1)`` buy off nine tenths.

    Both pay a policy that stops calling as much as one whose code runs. A call that ``infra`` ended
    is no call; a response with no other has none.

    Args:
        completions: N completions.
        problems: N problem rows, not read.
        penalty: value if every call failed; <= 0.
        per: what is counted, ``response`` or ``call``.
        info: ignored.
    """
    number = type(penalty) in (int, float) and math.isfinite(penalty)
    require(
        number and penalty <= 0,
        "penalty",
        penalty,
        "a finite number <= 0",
        "Give a penalty as a negative number, 0 for none.",
    )
    require(per in get_args(FailurePer), "per", per, f"one of {get_args(FailurePer)}")

    def value(statuses: list[str]) -> float:
        failed = len(statuses) - statuses.count(OK)
        if not failed:
            return 0.0
        return penalty * (failed / len(statuses) if per == "call" else 1.0)

    return [None if c.stop == "infra" else value(_statuses(c)) for c in completions]


def _statuses(completion: Completion) -> list[str]:
    return [call.status for call in completion.tool_calls if call.status != INFRA]
