"""What the curves of loss, gradient norm and reward alone show: what truth is compared with.

The curves get the test of ``rlkit.parting``: the same betting martingale, starts and alpha, from
the same earliest step on. Loss and gradient norm have one score per step, the reward one per group.
So few scores would leave ranks among ten steps without power; therefore the curves are given more
than the alarm has: all steps before a start as reference, and half of the stake on sudden shifts.
The loss may leave to either side: half of the stake bets on high values, half on low ones. The
gradient norm alarms upwards, the reward downwards: a rising reward is what everybody hopes for.

Each curve has a false alarm with probability at most ``ALPHA`` per run while its values are
exchangeable; all three together with at most three times that. Curves of sound runs often drift,
and a drift is seen as well: being seen says that a curve changed, not that something is wrong.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rlkit.parting import ALPHA, capital, in_blocks

Floats = NDArray[np.float64]

CURVES = ("loss", "grad_norm", "reward")


def caught(metrics: pd.DataFrame, groups: pd.DataFrame, *, alpha: float = ALPHA) -> dict[str, int]:
    """The step at whose end each curve of ``CURVES`` alarms; a curve that never does is left out.

    Args:
        metrics: columns step, loss and grad_norm, one row per step, gaps as nan; may lack any.
        groups: columns step and reward (the mean of a group), in order of steps; may be empty.
    """
    found = {}
    for curve, signs in {"loss": (1.0, -1.0), "grad_norm": (1.0,)}.items():
        if curve in metrics and "step" in metrics:
            known = metrics[["step", curve]].dropna().drop_duplicates("step", keep="last")
            known = known.astype(float).sort_values("step")
            sides = [(known["step"], sign * known[curve]) for sign in signs]
            found[curve] = _first(sides, alpha)
    if len(groups):
        blocks = in_blocks(groups["step"], -groups["reward"])
        found["reward"] = _first([(blocks["step"], blocks["score"])], alpha)
    return {curve: step for curve, step in found.items() if step is not None}


def first(steps: dict[str, int]) -> tuple[int, str] | None:
    """The earliest (step, curve) of :func:`caught`."""
    return min(((step, curve) for curve, step in steps.items()), default=None)


def _first(sides: list[tuple[pd.Series, pd.Series]], alpha: float) -> int | None:
    """First step at which the mean of the sides' mixtures reaches 1 / alpha."""
    mixtures: list[Floats] = []
    for step, score in sides:
        found = capital(step.to_numpy(int), score.to_numpy(np.float64), bag=None, shifts=True)
        if found is None:
            return None
        mixtures.append(found.mixture)
    mean = np.logaddexp.reduce(mixtures, axis=0) - np.log(len(mixtures))
    over = np.flatnonzero(mean >= -np.log(alpha))
    return int(np.unique(sides[0][0])[over[0]]) if len(over) else None
