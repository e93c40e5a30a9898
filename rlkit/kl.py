"""How strongly a run is held to its reference: the KL coefficient as a function of step or KL.

The coefficient multiplies one KL term in the loss. (The study's script adds its term a second time
after the schedule, so its effective coefficient is another one; the paper describes this one.)
"""

from __future__ import annotations

import math

MAX_ERROR = 0.2
"""Largest relative deviation of the KL that the adaptive controller reacts to (1909.08593)."""


def scheduled(schedule: str, start: float, step: int, steps: int) -> float:
    """KL coefficient of ``step`` (1-based) out of ``steps``.

    ``fixed`` stays at ``start``. ``linear`` and ``cosine`` reach exactly 0 at the last step; cosine
    is the study's annealing (2503.04548, section 3.1.1): start, start / 2 and 0 at the beginning,
    the middle and the end.

    Raises:
        ValueError: unknown schedule, or a step outside [1, steps].
    """
    if not 1 <= step <= steps:
        raise ValueError(f"step={step}: expected a step in [1, {steps}]")
    done = (step - 1) / (steps - 1) if steps > 1 else 0.0
    if schedule == "fixed":
        return start
    if schedule == "linear":
        return start * (1 - done)
    if schedule == "cosine":
        # At the end cos(pi) is exactly -1, so the coefficient is exactly 0.
        return start * 0.5 * (1 + math.cos(math.pi * done))
    raise ValueError(f"schedule={schedule!r}: expected 'fixed', 'linear' or 'cosine'")


def adapted(beta: float, kl: float, target: float, gain: float) -> float:
    """KL coefficient after a step with divergence ``kl``: up when it is too large, else down.

    ``beta * (1 + gain * clip(kl / target - 1, -0.2, 0.2))``, the controller of Ziegler et al.
    (1909.08593, section 2.2). A step without a measured KL (NaN) changes nothing.
    """
    if math.isnan(kl):
        return beta
    error = min(MAX_ERROR, max(-MAX_ERROR, kl / target - 1))
    return beta * (1 + gain * error)
