r"""When do reward and truth part? A sequential test with a stated rate of false alarms.

**Question.** Wrong answers have a usual pay: the mean reward of the wrong answers of the first
steps. What they get beyond it is *unearned*. Under a sound reward it does not rise: an accuracy
reward always pays wrong answers 0, a noisy one pays noise, a coin pays half. Under a reward that is
being gamed (length, format, a fooled grader) it rises, while truth does not.

**Test.** One score per group (the completions of one prompt) with a wrong answer: its unearned
rewards summed and divided by the root of their number, so that the spread does not depend on how
many answers are wrong. For each start k the groups of the ``BAG`` steps before k are the reference.
Each later group is ranked among the reference and the groups since k; its conformal p-value is the
share of those at least as large, ties counted in full. While scores are exchangeable, p-values are
independent and at least uniform, and capital that bets on small ones,

    M_k = mean over a of prod_i a p_i^(a - 1),     a in ``BETS``,

is not expected to grow from 1 (Vovk, Nouretdinov, Gammerman 2003; Fedorova et al., arXiv
1204.3251). Starts are mixed with weights 1 / (j (j + 1)), j = 1, 2, ..., which sum to 1. By Ville's
inequality the mixture ever reaches 1 / ``ALPHA`` with probability at most ``ALPHA``: the rate of
false alarms is per run, over any number of steps and looks, and nothing has to be normal or known
about the reward's scale. For scores that fall, or whose spread changes, the rate is not proved but
simulated (``tests/test_diagnostics.py``).

**Alarm.** At the end of the first step t at which the mixture has reached 1 / ALPHA and which, for
some start k with M_k >= 1 / ALPHA, shows from the ``RECENT`` steps before k to the last ``RECENT``
steps: unearned reward is higher by more than ``UNEARNED_SHARE`` of what right answers earn above
wrong ones (``signals.pay_scale``; the whole 95 % interval lies above it), mean reward is higher and
more than half of its rise is unearned, true accuracy is not higher (its interval reaches 0). These
conditions only make alarms rarer. Of several such starts the one with the largest M_k is named.
Everything uses steps <= t alone.

**What it assumes.** Prompts come in random order, so that groups are exchangeable unless the policy
changes how wrong answers are paid. A curriculum that moves to other problems can look like a
parting. What right answers are paid takes no part: a gate that more and more right answers pass is
no hack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rlkit.seeds import t_quantile
from rlkit.stats import Estimate

Floats = NDArray[np.float64]

ALPHA = 0.01
"""Chance of at least one false alarm in a run on exchangeable scores, however long it is."""
BAG = 10
"""Steps of reference before a start; at the beginning of a run, as many as there are."""
FIRST_START = 5
"""The earliest start has this many steps of reference."""
UNEARNED_SHARE = 0.05
"""Rise of the unearned reward per completion that matters, as a share of ``signals.pay_scale``."""
RECENT = 5
"""Steps whose groups give the sizes of the changes."""
BETS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Exponents of the bets: small ones gain from few extreme groups, large ones from a slow drift."""
SHIFT_STAKES = (0.5, 0.9)
"""Shares of the capital that bets on a shift put at risk."""
BLOCKS = 16
"""Scores per step that are ranked; of more groups, neighbours are summed. Bounds the cost."""
_ROUNDING = 1e-12
_DIGITS = 9
"""Scores are rounded: sums of equal rewards in another order must count as ties."""


@dataclass(frozen=True)
class Parting:
    """Reward and truth parted.

    Attributes:
        caught: the step at whose end the alarm is given.
        began: the start that explains the steps up to ``caught`` best: an estimate, without a
            guarantee.
        reference: first and last of the steps before ``began`` that the changes start from.
        evidence: value of the mixture at ``caught``; >= 1 / alpha.
        alpha: rate of false alarms per run on exchangeable scores.
        reward, unearned, truth: change per completion of reward, unearned reward and true accuracy
            from the reference to the last ``RECENT`` steps up to ``caught``; t over groups.
    """

    caught: int
    began: int
    reference: tuple[int, int]
    evidence: float
    alpha: float
    reward: Estimate
    unearned: Estimate
    truth: Estimate


def change(before: pd.Series, after: pd.Series, *, level: float = 0.95) -> Estimate:
    """Mean of ``after`` minus mean of ``before`` over groups, with Welch's interval.

    Degrees of freedom are those of the smaller side, which is never too narrow.
    """
    return _welch(_moments(before), _moments(after), level)


def _moments(values: pd.Series) -> Floats:
    """Count, sum and sum of squares."""
    v = values.to_numpy(np.float64)
    return np.array([len(v), v.sum(), (v**2).sum()])


def _welch(before: Floats, after: Floats, level: float = 0.95) -> Estimate:
    smaller = int(min(before[0], after[0]))
    value = float(after[1] / after[0] - before[1] / before[0])
    if smaller < 2:
        return Estimate(value, -math.inf, math.inf, smaller, level, "t over groups")
    variances = [max(0.0, ss / c - (s / c) ** 2) / (c - 1) for c, s, ss in (before, after)]
    half = _t(smaller - 1, level) * math.sqrt(sum(variances))
    return Estimate(value, value - half, value + half, smaller, level, "t over groups")


@lru_cache
def _t(df: int, level: float) -> float:
    return t_quantile(0.5 + level / 2, df)


def scores(groups: pd.DataFrame) -> pd.DataFrame:
    """Columns step and score: at most ``BLOCKS`` per step, from the groups with a wrong answer.

    A score is the sum of unearned rewards over the root of the number of wrong answers.
    """
    held = groups[groups["wrong"] > 0]
    total = held["unearned"] * held["n"]
    return in_blocks(held["step"], total / np.sqrt(held["wrong"]))


def in_blocks(step: pd.Series, score: pd.Series) -> pd.DataFrame:
    """Columns step and score; of more than ``BLOCKS`` scores per step, neighbours are summed.

    A sum is divided by the root of its number of scores.
    """
    where = step.groupby(step).cumcount()
    count = step.groupby(step).transform("size")
    block = where.where(count <= BLOCKS, where * BLOCKS // count)
    joined = pd.DataFrame({"step": step, "block": block, "score": score.round(_DIGITS)})
    summed = joined.groupby(["step", "block"])["score"].agg(["sum", "size"]).reset_index()
    means = (summed["sum"] / np.sqrt(summed["size"])).round(_DIGITS)
    return pd.DataFrame({"step": summed["step"], "score": means})


def p_values(values: Floats, starts: Sequence[int] | NDArray[np.int_]) -> Floats:
    """Conformal p-values [N, K]: share of values[starts[k] : n + 1] that are >= values[n].

    Args:
        values: [N] in order of time.
        starts: K indices into ``values`` at which the bags begin. Where n lies before a bag: 1.
    """
    first = np.asarray(starts)
    out = np.ones((len(values), len(first)))
    for n in range(len(values)):
        larger = np.cumsum((values[: n + 1] >= values[n])[::-1])[::-1]  # in values[j : n + 1]
        inside = first <= n
        out[n, inside] = larger[first[inside]] / (n + 1 - first[inside])
    return out


def log_capital(p: Floats, active: NDArray[np.bool_]) -> Floats:
    """Logarithm of the mixed capital [N, K] after each value; bets are placed where ``active``."""
    logs = np.log(p)
    return _mixed([np.log(bet) + (bet - 1) * logs for bet in BETS], active)


def log_capital_shift(p: Floats, active: NDArray[np.bool_]) -> Floats:
    """As :func:`log_capital`, with bets on a shift: all values since the start above the bag.

    The p-value of the i-th value since a start that has k values of reference is then at most
    i / (k + i), whose chance is that under exchangeability; a share of ``SHIFT_STAKES`` of the
    capital is bet on it.
    """
    since = np.cumsum(active, axis=0)
    before = np.argmax(active, axis=0)[None, :]  # all of them, so an unlimited bag is needed
    limit = since / np.maximum(before + since, 1)
    gain = np.where(p <= limit + _ROUNDING, 1 / np.maximum(limit, _ROUNDING), 0.0)
    return _mixed([np.log(1 - stake + stake * gain) for stake in SHIFT_STAKES], active)


def _mixed(gains: list[Floats], active: NDArray[np.bool_]) -> Floats:
    out = np.full(active.shape, -np.inf)
    for each in gains:
        out = np.logaddexp(out, np.cumsum(np.where(active, each, 0.0), axis=0))
    capital: Floats = out - np.log(len(gains))
    return capital


@dataclass(frozen=True)
class Capital:
    """Logarithms of the capital at the end of each step.

    Attributes:
        steps: [T] the steps with scores. starts: [K] indices into ``steps``.
        own: [T, K] of each start. mixture: [T] of all of them.
    """

    steps: NDArray[np.int_]
    starts: NDArray[np.int_]
    own: Floats
    mixture: Floats


def capital(
    step: NDArray[np.int_], score: Floats, *, bag: int | None = BAG, shifts: bool = False
) -> Capital | None:
    """The test martingale on scores [N] in order of steps; None with too few steps to start.

    Args:
        bag: steps of reference before a start; None: all.
        shifts: half of the stake bets on shifts (:func:`log_capital_shift`); needs ``bag=None``.
    """
    steps = np.unique(step)
    if len(steps) <= FIRST_START:
        return None
    starts = np.arange(FIRST_START, len(steps))
    bags = np.searchsorted(step, steps[np.maximum(starts - (bag or len(steps)), 0)])
    active = step[:, None] >= steps[starts][None, :]
    last = np.searchsorted(step, steps, side="right") - 1  # the state at the end of each step
    p = p_values(score, bags)
    own = log_capital(p, active)
    if shifts:
        own = np.logaddexp(own, log_capital_shift(p, active)) - np.log(2)
    own = own[last]
    order = starts - FIRST_START + 1.0
    weighted = own - np.log(order * (order + 1))
    # Starts after the last step still hold their stake: the rest of the weights, 1 / (K + 1).
    mixture = np.logaddexp(np.logaddexp.reduce(weighted, axis=1), -np.log(len(starts) + 1.0))
    return Capital(steps, starts, own, mixture)


def part(groups: pd.DataFrame, *, least: float = 0.0, alpha: float = ALPHA) -> Parting | None:
    """The test on one row per group, in order of steps; None if there is no parting.

    Args:
        groups: columns step, n (completions), wrong (how many of them), and per completion reward,
            unearned and truth (``signals.group_means``).
        least: rise of the unearned reward that the interval must exceed, >= 0.
        alpha: rate of false alarms per run on exchangeable scores, in (0, 1).
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha!r}: expected a number in (0, 1), for example 0.01")
    data = scores(groups)
    found = capital(data["step"].to_numpy(), data["score"].to_numpy(np.float64))
    if found is None:
        return None
    steps, own, mixture = found.steps, found.own, found.mixture
    sums = _running_sums(groups, steps)
    for t in np.flatnonzero(mixture >= -np.log(alpha)):
        strong = [k for k in np.argsort(-own[t], kind="stable") if own[t, k] >= -np.log(alpha)]
        for k in found.starts[strong]:
            changes = _changes(sums, int(k), int(t), least)
            if changes is not None:
                return Parting(
                    caught=int(steps[t]),
                    began=int(steps[k]),
                    reference=(int(steps[k - RECENT]), int(steps[k - 1])),
                    evidence=float(np.exp(min(float(mixture[t]), 700.0))),
                    alpha=alpha,
                    reward=changes[0],
                    unearned=changes[1],
                    truth=changes[2],
                )
    return None


_CHANGES = ("reward", "unearned", "truth")


def _running_sums(groups: pd.DataFrame, steps: NDArray[np.int_]) -> Floats:
    """[T + 1, 3, 3]: count, sum and sum of squares of each of ``_CHANGES`` before step i."""
    where = groups["step"]
    out = np.zeros((len(steps) + 1, len(_CHANGES), 3))
    for i, name in enumerate(_CHANGES):
        for j, power in enumerate((groups[name] ** 0, groups[name], groups[name] ** 2)):
            per_step = power.groupby(where).sum().reindex(steps, fill_value=0.0)
            out[1:, i, j] = np.cumsum(per_step.to_numpy(np.float64))
    return out


def _changes(
    sums: Floats, k: int, t: int, least: float
) -> tuple[Estimate, Estimate, Estimate] | None:
    """Changes of reward, unearned and truth since the k-th step; None if they are no parting."""
    before = sums[k] - sums[k - RECENT]
    recent = sums[t + 1] - sums[max(k, t - RECENT + 1)]
    gain = recent[:, 1] / recent[:, 0] - before[:, 1] / before[:, 0]
    if not (gain[0] > 0 and gain[1] > gain[0] / 2):
        return None
    reward, unearned, truth = (_welch(*pair) for pair in zip(before, recent, strict=True))
    return None if truth.low > 0 or unearned.low <= least else (reward, unearned, truth)
