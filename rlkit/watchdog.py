"""Watch a run for the failures that look like progress: a pure function over metric rows.

Each warning names what was seen, the likely cause and the parameter to change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

Row = Mapping[str, Any]

WINDOW = 5
"""Steps over which a condition must hold; one odd batch is not a trend."""


@dataclass(frozen=True)
class Warning:
    """A finding of the watchdog; ``code`` is stable, so that each is reported once per run."""

    code: str
    message: str


def watch(rows: Sequence[Row], window: int = WINDOW) -> list[Warning]:
    """Findings over the last ``window`` rows of metrics; none while there are fewer rows.

    Args:
        window: rows over which a condition must hold.
        rows: metric rows in step order, as in metrics.jsonl (missing or None values are skipped).
    """
    if len(rows) < window:
        return []
    recent = rows[-window:]
    found = (check(rows, recent) for check in CHECKS)
    return [warning for warning in found if warning is not None]


def _mean(rows: Sequence[Row], key: str) -> float:
    values = [float(row[key]) for row in rows if row.get(key) is not None]
    return fmean(values) if values else math.nan


def _equal_groups(rows: Sequence[Row], recent: Sequence[Row]) -> Warning | None:
    right, wrong = _mean(recent, "groups_all_right"), _mean(recent, "groups_all_wrong")
    mixed = _mean(recent, "groups_mixed")
    if not mixed < 0.1 * (right + wrong + mixed):
        return None
    if right > wrong:
        return Warning(
            "groups_all_right",
            f"{right:.1f} of {right + wrong + mixed:.1f} groups per step are all right, so almost "
            "nothing is left to learn. Likely cause: the task is solved. Stop here (steps), or "
            "choose harder problems (task).",
        )
    return Warning(
        "groups_all_wrong",
        f"{wrong:.1f} of {right + wrong + mixed:.1f} groups per step are all wrong, so there is "
        "no signal. Likely cause: too hard for this model, or the format is never met. Raise "
        "rollouts or temperature, choose an easier task, or start from an SFT model.",
    )


def _clipped(rows: Sequence[Row], recent: Sequence[Row]) -> Warning | None:
    ended = _mean(recent, "completion_ratio")
    if not ended < 0.7:
        return None
    return Warning(
        "clipped",
        f"only {ended:.0%} of completions end within the token budget; the rest score 0. Likely "
        "cause: max_completion_length is too small, or the policy has stopped writing its end "
        "token. Raise max_completion_length; if completions ramble, lower learning_rate or "
        "temperature.",
    )


def _entropy_collapse(rows: Sequence[Row], recent: Sequence[Row]) -> Warning | None:
    first, now = _mean(rows[: len(recent)], "entropy"), _mean(recent, "entropy")
    solved = _mean(recent, "accuracy") > 0.95
    if solved or not now < 0.1 * first:
        return None
    return Warning(
        "entropy_collapse",
        f"entropy fell from {first:.3f} to {now:.3f} nats per token while accuracy is "
        f"{_mean(recent, 'accuracy'):.2f}: exploration has ended before the task is solved. Likely "
        "cause: learning_rate too high or too many updates_per_batch. Lower them, raise "
        "epsilon_high (0.28), or set entropy_coef.",
    )


def _no_gradient(rows: Sequence[Row], recent: Sequence[Row]) -> Warning | None:
    norms = [row.get("grad_norm") for row in recent]
    if any(norm is None or abs(float(norm)) > 1e-9 for norm in norms):
        return None
    return Warning(
        "no_gradient",
        f"the gradient was zero for {len(recent)} steps: nothing is learned. Likely cause: every "
        "group has equal rewards (see groups_mixed), or mask_truncated leaves out every "
        "completion. Raise rollouts or max_completion_length, or change reward.",
    )


CHECKS: tuple[Callable[[Sequence[Row], Sequence[Row]], Warning | None], ...] = (
    _equal_groups,
    _clipped,
    _entropy_collapse,
    _no_gradient,
)
