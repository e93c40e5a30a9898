"""The shape of a reward, and what it means for a completion to be right.

A leaf below every reward module. Right means: the answer equals the gold answer and the policy
ended the response itself. No format rule and no reward takes part, so accuracy, gates and
acceptance numbers mean the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rlkit.completion import Completion
from rlkit.verify import Verdict, verify_all

Problem = Mapping[str, Any]
Values = list[float | None]


class RewardFn(Protocol):
    """The shape of every reward."""

    def __call__(
        self, completions: Sequence[Completion], problems: Sequence[Problem], /, **info: Any
    ) -> Values:
        """One value per completion, in order; None where there is no reward."""
        ...


def is_correct(completion: Completion, problem: Problem) -> bool:
    """Whether the answer equals the gold answer and the policy ended the response itself."""
    return all_correct([completion], [problem])[0]


def all_correct(completions: Sequence[Completion], problems: Sequence[Problem]) -> list[bool]:
    """``is_correct`` of N completions, each with its problem; expressions are judged in parallel.

    Raises:
        ValueError: the counts differ, or an unknown answer type.
        GoldError: a gold answer cannot be parsed.
    """
    # What did not end is not right whatever it says, so it costs nothing to judge.
    verdicts = verify_all(
        [
            (c.answer if c.reached_end else None, problem["answer"], problem["answer_type"])
            for c, problem in zip(completions, problems, strict=True)
        ]
    )
    return [verdict is Verdict.RIGHT for verdict in verdicts]


def without_infra(completions: Sequence[Completion], values: Sequence[float]) -> Values:
    """``values`` with None where the machinery failed, which says nothing about the policy."""
    return [
        None if completion.stop == "infra" else float(value)
        for completion, value in zip(completions, values, strict=True)
    ]
