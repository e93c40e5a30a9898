"""A panel: RL beside everything that needs no RL, and honest differences between the two.

A notebook that says "RL works" owes its reader one: the same problems answered by the starting
policy, by that policy with a forced ``<think>``, by its majority vote at the same token cost, by
one round of rejection-sampling fine-tuning on as many completions as RL drew, by an SFT model, and
by RL on a random reward. RL may be credited only with what exceeds the best of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rlkit import metrics, seeds, stats
from rlkit.arms import Arm, drawn
from rlkit.measure import measure
from rlkit.metrics import EvalResult
from rlkit.seeds import Verdict
from rlkit.stats import Estimate

Floats = NDArray[np.float64]
BLOCKS = 16
"""Samples of a problem are averaged into at most so many blocks, which are then resampled: as wide
an interval at a fraction of the time."""


@dataclass(frozen=True)
class Entry:
    """One way of answering the problems, measured.

    Attributes:
        label: what tables and figures call it.
        results: one evaluation per training seed (one in all for an untrained policy).
        metric: ``avg``, ``greedy``, ``pass@k`` or ``maj@k``, see ``metrics.per_problem``.
        trained_on: completions that the policy drew and trained on, or drew and filtered.
    """

    label: str
    results: tuple[EvalResult, ...]
    metric: str = "avg"
    trained_on: int = 0

    def by(self, metric: str) -> Entry:
        """The same policy under another metric."""
        return replace(self, metric=metric)

    def values(self) -> Floats:
        """Scores [seeds, problems, samples]; one sample where the metric is one per problem."""
        return np.stack([_scores(result.rows, self.metric) for result in self.results])

    def estimate(self) -> Estimate:
        """Mean score: bootstrap over problems, with several seeds over seeds as well.

        Where every score is 0, or every one 1, Wilson's interval with one trial per problem.
        """
        values = self.values()
        bounded = values.min() >= 0 and values.max() <= 1
        if len(values) == 1 or (bounded and values.mean() in (0.0, 1.0)):
            return (stats.rate if bounded else stats.bootstrap)(values.mean(axis=(0, 2)))
        return seeds.hierarchical(_blocks(values, math.gcd(values.shape[2], BLOCKS)))

    def tokens(self) -> float:
        """Mean tokens per answer, tool output included; all voters of ``maj@k`` count."""
        name, _, k = self.metric.partition("@")
        length = float(self.by("length").values().mean())
        return length * int(k) if k and name in ("maj", "pass") else length

    def rows(self) -> pd.DataFrame:
        """The sampled rows of all seeds together."""
        frames = [r.rows[r.rows["decoding"] == "sampled"] for r in self.results]
        return pd.concat(frames, ignore_index=True)


def _scores(rows: pd.DataFrame, metric: str) -> Floats:
    if metric not in ("avg", "length"):
        return metrics.per_problem(rows, metric).sort_index().to_numpy(float)[:, None]
    column = "correct" if metric == "avg" else "n_tokens"
    sampled = rows[rows["decoding"] == "sampled"]
    table = sampled.pivot(index="problem_id", columns="sample", values=column).sort_index()
    values: Floats = table.to_numpy(dtype=float)
    return values


def entry(
    label: str,
    policies: Sequence[str | Path],
    task: str,
    *,
    problems: int,
    samples: int,
    budget: int,
    metric: str = "avg",
    trained_on: int = 0,
    force_reasoning: bool = False,
    **how: Any,
) -> Entry:
    """Measure policies (run folders of several seeds, or one model) on the frozen test problems.

    ``how``: further arguments of ``measure`` (``mode``, ``tools``, ``force``, ``executor``, ...).
    """
    results = tuple(
        measure(
            policy,
            task,
            problems=problems,
            samples=samples,
            max_completion_length=budget,
            force_reasoning=force_reasoning,
            **how,
        )
        for policy in policies
    )
    return Entry(label, results, metric, trained_on)


# --- differences ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contrast:
    """What separates two entries, and what that allows one to say.

    ``scope`` says what the verdict is about: these checkpoints, or the recipe (several seeds).
    """

    name: str
    difference: Estimate
    per_seed: tuple[float, ...]
    verdict: Verdict
    scope: str


def contrast(
    new: Entry, old: Entry, margin: float, *, name: str = "", min_seeds: int = 6
) -> Contrast:
    """Difference new - old on the same problems, larger being better.

    One seed: paired bootstrap over problems; the verdict is about that checkpoint. Several: the
    wider of a bootstrap over seed > problem > sample and a t interval over seeds; below
    ``min_seeds`` the verdict is INCONCLUSIVE whatever they show.

    Args:
        new, old: entries; one with one seed is compared with every seed of the other.
        margin: the difference too small to matter, in the unit of the metric.
    """
    name = name or f"{new.label} − {old.label}"
    difference = _difference(new, old)
    per_seed = difference.mean(axis=(1, 2))
    if len(per_seed) == 1:
        estimate = _over_problems(difference[0].mean(axis=-1))
        verdict = seeds.verdict(estimate, margin)
        return Contrast(name, estimate, (float(per_seed[0]),), verdict, "this checkpoint")
    nested, over = seeds.hierarchical(difference), seeds.over_seeds(per_seed)
    estimate = nested if nested.high - nested.low > over.high - over.low else over
    if not difference.any():
        estimate = _over_problems(difference.mean(axis=(0, 2)))
    if len(per_seed) < min_seeds:
        verdict = seeds.verdict(per_seed, margin, min_seeds=min_seeds)
    else:
        verdict = seeds.verdict(estimate, margin)
    scope = f"recipe, {len(per_seed)} seeds"
    return Contrast(name, estimate, tuple(map(float, per_seed)), verdict, scope)


def _over_problems(differences: Floats) -> Estimate:
    """Mean of one difference per problem; bootstrap, or where all are 0, Wilson's bound.

    A bootstrap of zeros has width 0. That n problems showed no difference allows for a share of
    up to Wilson's bound of problems that differ, each by at most 1.
    """
    if differences.any():
        return stats.bootstrap(differences)
    bound = stats.wilson(0, len(differences)).high
    return Estimate(0.0, -bound, bound, len(differences), method="Wilson, no problem differs")


def observed(name: str, estimate: Estimate, margin: float) -> Contrast:
    """A contrast from an estimate of another kind, such as ``conditional_gap``."""
    verdict = seeds.verdict(estimate, margin)
    return Contrast(name, estimate, (estimate.value,), verdict, "this checkpoint")


def _difference(new: Entry, old: Entry) -> Floats:
    """Paired differences [seeds, problems, samples]."""
    ids = [tuple(sorted(set(e.results[0].rows["problem_id"]))) for e in (new, old)]
    if ids[0] != ids[1]:
        raise ValueError(
            f"{new.label!r} and {old.label!r} were measured on different problems "
            f"({len(ids[0])} and {len(ids[1])}); a paired difference needs the same ones"
        )
    a, b = new.values(), old.values()
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        raise ValueError(
            f"{new.label!r} has {len(a)} seeds and {old.label!r} {len(b)}: expected as many, or one"
        )
    samples = math.gcd(a.shape[2], b.shape[2], BLOCKS)
    return _blocks(a, samples) - _blocks(b, samples)


def _blocks(values: Floats, samples: int) -> Floats:
    """Means of equal blocks of samples, so that unequal sample counts can be paired."""
    means: Floats = values.reshape(*values.shape[:2], samples, -1).mean(axis=-1)
    return means


def conditional_gap(rows: pd.DataFrame, value: str, where: Sequence[bool]) -> Estimate:
    """Mean of column ``value`` over the rows in ``where`` minus its mean over the others.

    Bootstrap over problems. Undefined if one side has no rows, or if resampling shows no spread at
    all (every value equal), which would be an interval of width 0.
    """
    inside = np.asarray(where, dtype=bool)
    sums = pd.DataFrame(
        {
            "a": rows[value].to_numpy(float) * inside,
            "n": inside.astype(float),
            "b": rows[value].to_numpy(float) * ~inside,
            "m": (~inside).astype(float),
        }
    )
    sums = sums.groupby(rows["problem_id"].to_numpy()).sum()
    weights = stats.resample_weights(len(sums)) @ sums.to_numpy()
    totals = sums.to_numpy().sum(axis=0)
    if totals[1] == 0 or totals[3] == 0:
        return stats.undefined("bootstrap over problems")
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = weights[:, 0] / weights[:, 1] - weights[:, 2] / weights[:, 3]
    if np.nanmax(draws) == np.nanmin(draws):
        return stats.undefined("bootstrap over problems")
    point = float(totals[0] / totals[1] - totals[2] / totals[3])
    return stats.percentile_interval(point, draws, len(sums))


# --- the panel ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """RL and its baselines on one task, from one start.

    ``baselines`` are the no-RL rivals that RL must beat; ``reference`` is shown but not counted,
    because it costs more.
    """

    task: str
    start: Entry
    rl: Entry
    random: Entry
    baselines: tuple[Entry, ...]
    reference: tuple[Entry, ...]

    @property
    def best(self) -> Entry:
        """The strongest no-RL baseline on these very problems: a choice that favours it."""
        return max(self.baselines, key=lambda e: float(e.values().mean()))

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries in the order of tables and figures."""
        return (*self.baselines, *self.reference, self.random, self.rl)


def panel(
    task: str,
    start: tuple[str, str],
    trained: Mapping[Arm, Sequence[Path]],
    *,
    problems: int,
    samples: int,
    baseline_samples: int,
    budget: int,
    others: Mapping[str, str] | None = None,
) -> Panel:
    """Measure RL and every baseline on the first ``problems`` frozen test problems of ``task``.

    Args:
        start: (label, model) of the starting policy.
        trained: run folders per arm, one per seed (see ``configs``).
        samples: per problem for the start and for RL (pass@k reaches that far);
            ``baseline_samples`` for the others. One should divide the other.
        budget: token budget of one response.
        others: label to model: further policies without RL, such as an SFT model.

    The majority baseline that counts has as many votes as RL's answer costs in tokens (rounded up);
    the widest vote that the samples allow is shown for reference.
    """
    name, model = start

    def measured(
        label: str, policies: Sequence[str | Path], n: int, *, used: int = 0, forced: bool = False
    ) -> Entry:
        return entry(
            label, policies, task, problems=problems, samples=n, budget=budget,
            trained_on=used, force_reasoning=forced,
        )  # fmt: skip

    def from_arm(label: str, arm: Arm, n: int) -> Entry:
        return measured(label, trained[arm], n, used=drawn(trained[arm][0]))

    begin = measured(name, [model], samples)
    rl = from_arm(f"{name} + RL", "rl", samples)
    votes = min(samples, max(1, math.ceil(rl.tokens() / begin.tokens())))
    widest = metrics.powers_of_two(samples)[-1]
    baselines = [
        begin,
        measured(f"{name}, forced reasoning", [model], baseline_samples, forced=True),
    ]
    if votes > 1:
        baselines.append(replace(begin.by(f"maj@{votes}"), label=f"{name}, maj@{votes}"))
    baselines.append(from_arm(f"{name} + rejection SFT", "rft", baseline_samples))
    baselines += [measured(label, [m], baseline_samples) for label, m in (others or {}).items()]
    wide = replace(begin.by(f"maj@{widest}"), label=f"{name}, maj@{widest} (reference)")
    return Panel(
        task=task,
        start=begin,
        rl=rl,
        random=from_arm(f"{name} + RL, random reward", "random", baseline_samples),
        baselines=tuple(baselines),
        reference=(wide,) if widest > max(1, votes) else (),
    )
