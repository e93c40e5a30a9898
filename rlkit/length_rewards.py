"""The length-encouraging rewards of the study (arXiv 2503.04548, section 4.2): RRL and RRA.

Both add a bonus to wrong answers too, so a long wrong answer beats a short wrong one. That is what
the study examines; a run needs ``allow_exploitable=True``. Its three other rules choose what is
trained on: see ``rlkit.filters``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rlkit.completion import Completion
from rlkit.correct import Problem, Values, all_correct, without_infra

ACTIONS = ("however", "but", "wait", "verify", "alternatively")
_ACTION = re.compile(r"\b(?:" + "|".join(ACTIONS) + r")\b", re.IGNORECASE)


def relative_length(
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    /,
    *,
    max_length: int = 0,
    **info: Any,
) -> Values:
    """RRL: ``R_i = L_i / L_max + R_corr``, ``R_corr`` = +1 right, -1 wrong.

    arXiv 2503.04548, section 4.2. ``L_i`` is the number of tokens that the policy wrote, end token
    included and tool output not; ``L_max`` = ``max_length``, the token budget of a response. A
    truncated response is wrong and has the longest length: -1 + 1 = 0.

    Raises:
        ValueError: ``max_length`` below 1.
    """
    if max_length < 1:
        raise ValueError(
            f"max_length={max_length}: expected the token budget of a response, an integer >= 1. "
            "score(..., max_length=n) passes it on."
        )
    return without_infra(
        completions,
        [
            sum(c.loss_mask) / max_length + sign
            for c, sign in zip(completions, _signs(completions, problems), strict=True)
        ],
    )


def reflection_actions(
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    /,
    *,
    cap: int = 20,
    **info: Any,
) -> Values:
    """RRA: ``R_i = min(A_i, A_max) / A_max + R_corr``, ``R_corr`` = +1 right, -1 wrong.

    arXiv 2503.04548, section 4.2, with ``A_max`` = ``cap`` = 20. ``A_i`` counts the words however,
    but, wait, verify, alternatively in the response: whole words, any case, and not in a tool's
    output, which a line of code fills with them. The cap is the study's own guard against a
    response of nothing but such words.

    Raises:
        ValueError: ``cap`` below 1.
    """
    if cap < 1:
        raise ValueError(f"cap={cap}: expected the largest count that is paid, an integer >= 1")
    return without_infra(
        completions,
        [
            min(count_actions(c.own_text), cap) / cap + sign
            for c, sign in zip(completions, _signs(completions, problems), strict=True)
        ],
    )


def count_actions(text: str) -> int:
    """Number of reflection words in ``text``, ``A_i`` of RRA."""
    return sum(1 for _ in _ACTION.finditer(text))


def _signs(completions: Sequence[Completion], problems: Sequence[Problem]) -> list[int]:
    return [1 if right else -1 for right in all_correct(completions, problems)]
