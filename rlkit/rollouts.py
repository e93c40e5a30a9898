"""The rollouts of one step: which groups are drawn, which are trained on, and their figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rlkit import advantages, filters, rewards
from rlkit.batching import refill_indices, window_indices
from rlkit.completion import Completion
from rlkit.config import RunConfig
from rlkit.correct import all_correct
from rlkit.extract import other_answers
from rlkit.tasks import task_of
from rlkit.tool_metrics import call_columns, call_figures

Row = Mapping[str, Any]
Floats = npt.NDArray[np.float64]
Sample = Callable[[Sequence[Row]], list[list[Completion]]]
"""Draws ``rollouts`` completions for each of the given problems."""


@dataclass(frozen=True)
class Window:
    """The rollouts of one step: A groups drawn, of which P are trained on, G completions each.

    Attributes:
        problems: [A].
        completions: [A][G].
        parts: unweighted values [A, G] of each reward.
        rewards, correct: [A, G]; a reward is NaN where there is none.
        kept: [A, G]; False for what the group filter took out of baseline and loss.
        used: the P groups that are trained on, in the order of the batch. All, in order, without
            dynamic sampling.
        advantages: [A, G]; 0 in groups that are not trained on.
        seconds_generate, seconds_reward: wall time of the two phases.
    """

    step: int
    problems: tuple[Row, ...]
    completions: list[list[Completion]]
    parts: dict[str, Floats]
    rewards: Floats
    correct: npt.NDArray[np.bool_]
    kept: npt.NDArray[np.bool_]
    used: tuple[int, ...]
    advantages: Floats
    seconds_generate: float
    seconds_reward: float

    @property
    def counted(self) -> npt.NDArray[np.bool_]:
        """[A, G] True for what is kept and has a reward: the rows of baseline and loss."""
        return self.kept & ~np.isnan(self.rewards)


def roll_out(
    config: RunConfig,
    step: int,
    problems: Sequence[Row],
    sample: Sample,
    reward_fns: rewards.RewardFns,
    group_filter: filters.GroupFilter | None = None,
) -> Window:
    """Draw and score the groups of a step: a function of configuration, step and policy.

    ``group_filter`` takes completions out of the group's baseline and out of the loss.

    With ``refill_rounds``, groups whose rewards are all equal (among those kept) are replaced in
    the batch by groups of other problems (dynamic sampling, DAPO 2503.14476, section 3.2). What was
    drawn and not used stays in the window. Places that no round could fill keep their group without
    signal.
    """
    prompts = config.train.batch_size // config.train.rollouts
    chosen = window_indices(config.seed, step, len(problems), prompts)
    drawn: list[Row] = []
    completions: list[list[Completion]] = []
    totals: list[Floats] = []
    kept: list[filters.Bools] = []
    parts: dict[str, list[Floats]] = {}
    clock = {"generate": 0.0, "reward": 0.0}

    def draw(rows: Sequence[Row]) -> range:
        begun = time.perf_counter()
        groups = sample(rows)
        sampled = time.perf_counter()
        flat = [c for group in groups for c in group]
        asked = [row for row, group in zip(rows, groups, strict=True) for _ in group]
        total, each = rewards.score(reward_fns, flat, asked, **rewards.facts(config, step))
        totals.append(_matrix(total, len(rows)))
        kept.append(filters.apply(group_filter, totals[-1], groups, rows))
        for name, values in each.items():
            parts.setdefault(name, []).append(_matrix(values, len(rows)))
        drawn.extend(rows)
        completions.extend(groups)
        clock["generate"] += sampled - begun
        clock["reward"] += time.perf_counter() - sampled
        return range(len(drawn) - len(rows), len(drawn))

    def without_signal() -> npt.NDArray[np.bool_]:
        return advantages.flat_groups(_counted(totals, kept))

    used = list(draw([problems[i] for i in chosen]))
    for number in range(1, config.train.refill_rounds + 1):
        flat = without_signal()
        empty = [place for place, group in enumerate(used) if flat[group]]
        more = refill_indices(config.seed, step, number, len(problems), chosen, len(empty))
        if not more:
            break
        chosen = [*chosen, *more]
        new = draw([problems[i] for i in more])
        flat = without_signal()
        useful = [group for group in new if not flat[group]]
        for place, group in zip(empty, useful, strict=False):
            used[place] = group
    values = np.concatenate(totals)
    weights = np.zeros_like(values)
    weights[used] = advantages.compute(_counted(totals, kept)[used], config.train.advantage)
    correct = all_correct(
        [c for group in completions for c in group],
        [row for row, group in zip(drawn, completions, strict=True) for _ in group],
    )
    return Window(
        step=step,
        problems=tuple(drawn),
        completions=completions,
        parts={name: np.concatenate(each) for name, each in parts.items()},
        rewards=values,
        correct=np.array(correct).reshape(values.shape),
        kept=np.concatenate(kept),
        used=tuple(used),
        advantages=weights,
        seconds_generate=clock["generate"],
        seconds_reward=clock["reward"],
    )


def step_metrics(window: Window, *, tools: bool = False) -> dict[str, Any]:
    """The figures of one step that follow from its rollouts alone; absent means are None.

    All drawn groups count, used or not. Accuracy is answer equivalence with the end reached, never
    the gated reward. Lengths are in tokens, over all, right and wrong completions. Entropy (nats
    per token) is minus the mean log-probability of the tokens that the policy drew: an unbiased
    estimate of the sampling policy's entropy, whichever rows are trained on.
    ``several_answers_ratio``: share whose final part states more answers than the one that counts.
    ``tools`` adds the figures of ``tool_metrics.call_figures``. Where problems of several tasks are
    mixed, ``<figure>/<task>`` gives accuracy, length and calls of each.
    """
    flat = [c for group in window.completions for c in group]
    correct = window.correct.reshape(-1)
    lengths = np.array([len(c.token_ids) for c in flat], dtype=np.float64)
    known = ~np.isnan(window.rewards)
    row: dict[str, Any] = {
        "step": window.step,
        "reward": _mean(window.rewards[known]),
        "reward_std": float(window.rewards[known].std()) if known.any() else None,
    }
    for name, part in window.parts.items():
        row[f"rewards/{name}/mean"] = _mean(part[~np.isnan(part)])
    groups_right = window.correct.all(axis=1)
    groups_wrong = ~window.correct.any(axis=1)
    logprobs = [
        value
        for c in flat
        for value, own in zip(c.logprobs or (), c.loss_mask, strict=c.logprobs is not None)
        if own
    ]
    row |= {
        "accuracy": _mean(correct.astype(np.float64)),
        "completion_ratio": sum(c.reached_end for c in flat) / len(flat),
        "length_mean": _mean(lengths),
        "length_right": _mean(lengths[correct]),
        "length_wrong": _mean(lengths[~correct]),
        "several_answers_ratio": sum(bool(other_answers(c.final)) for c in flat) / len(flat),
        "reasoning_rate": sum(bool(c.reasoning) for c in flat) / len(flat),
        "entropy": -float(np.mean(logprobs)) if logprobs else None,
        "groups_all_right": int(groups_right.sum()),
        "groups_all_wrong": int(groups_wrong.sum()),
        "groups_mixed": int((~groups_right & ~groups_wrong).sum()),
        "groups_no_signal": int(
            advantages.flat_groups(_counted([window.rewards], [window.kept])).sum()
        ),
        "kept_ratio": float(window.kept.mean()),
        "groups_extra": len(window.problems) - len(window.used),
        "seconds_generate": window.seconds_generate,
        "seconds_reward": window.seconds_reward,
    }
    if tools:
        row |= call_figures(flat)
    tasks = [task_of(p["problem_id"]) for p in window.problems]
    for task in sorted(set(tasks)) if len(set(tasks)) > 1 else ():
        mine = [g for g, name in enumerate(tasks) if name == task]
        theirs = [c for g in mine for c in window.completions[g]]
        row[f"accuracy/{task}"] = float(window.correct[mine].mean())
        row[f"length_mean/{task}"] = sum(len(c.token_ids) for c in theirs) / len(theirs)
        if tools:
            called = call_figures(theirs)
            row |= {f"{k}/{task}": called[k] for k in ("call_rate", "calls_mean", "call_failures")}
    return row


def rollout_columns(window: Window, *, tools: bool = False) -> dict[str, list[Any]]:
    """The rollouts of one step as columns, one row per completion, groups in order.

    ``tools`` adds the columns of ``tool_metrics.call_columns``.
    """
    groups, rollouts = window.rewards.shape
    flat = [c for group in window.completions for c in group]
    rows = [row for row in window.problems for _ in range(rollouts)]
    return {
        "step": [window.step] * len(flat),
        "group": [g for g in range(groups) for _ in range(rollouts)],
        "sample": [s for _ in range(groups) for s in range(rollouts)],
        "problem_id": [row["problem_id"] for row in rows],
        "text": [c.text for c in flat],
        "reasoning": [bool(c.reasoning) for c in flat],
        "answer": [c.answer or "" for c in flat],
        "other_answers": [other_answers(c.final) for c in flat],
        "gold": [str(row["answer"]) for row in rows],
        "correct": window.correct.reshape(-1).tolist(),
        "stop": [c.stop for c in flat],
        "n_tokens": [len(c.token_ids) for c in flat],
        "reward": window.rewards.reshape(-1).tolist(),
        **{f"reward_{k}": part.reshape(-1).tolist() for k, part in window.parts.items()},
        "advantage": window.advantages.reshape(-1).tolist(),
        "kept": window.kept.reshape(-1).tolist(),
        "used": [g in window.used for g in range(groups) for _ in range(rollouts)],
        **(call_columns(flat) if tools else {}),
    }


def _counted(totals: Sequence[Floats], kept: Sequence[filters.Bools]) -> Floats:
    """Rewards [A, G] that count: NaN, which leaves every mean, where the filter dropped one."""
    return np.where(np.concatenate(kept), np.concatenate(totals), np.nan)


def _matrix(values: Sequence[float | None], groups: int) -> Floats:
    known = [np.nan if value is None else value for value in values]
    return np.array(known, dtype=np.float64).reshape(groups, -1)


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if values.size else None
