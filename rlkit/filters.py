"""Group filters: which completions of a step are trained on, after they were rewarded.

A filter is a callable ``(rewards [P, G], completions [P][G], problems [P]) -> keep [P, G] bool``.
What it drops leaves the group's baseline and the loss; it stays in the rollout log.

Three of the study's five length-encouraging rules are filters (arXiv 2503.04548, section 4.2).
Lengths are in tokens written by the policy, end token included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from rlkit.completion import Completion
from rlkit.correct import Problem, all_correct

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Groups = Sequence[Sequence[Completion]]
GroupFilter = Callable[[Floats, Groups, Sequence[Problem]], Bools]


class FilterError(ValueError):
    """A group filter broke its contract."""


def question_selection(rewards: Floats, completions: Groups, problems: Sequence[Problem]) -> Bools:
    """QS: keep a question only if its right answers are longer on average than its wrong ones.

    ``L_c > L_w``, means over the group. A group without a right or without a wrong answer has no
    such means and is dropped; it carries no accuracy signal anyway.
    """
    keep = np.zeros(rewards.shape, dtype=bool)
    for group, (right, wrong, lengths) in enumerate(_facts(completions, problems)):
        if right.any() and wrong.any():
            keep[group] = lengths[right].mean() > lengths[wrong].mean()
    return keep


def response_selection(rewards: Floats, completions: Groups, problems: Sequence[Problem]) -> Bools:
    """RS: if the longest right answer is longer than the shortest wrong one, keep just these two.

    Otherwise the group is dropped: the rule names nothing to train on then. Of equally long ones
    the first sample counts.
    """
    keep = np.zeros(rewards.shape, dtype=bool)
    for group, (right, wrong, lengths) in enumerate(_facts(completions, problems)):
        if right.any() and wrong.any():
            longest = int(np.where(right, lengths, -np.inf).argmax())
            shortest = int(np.where(wrong, lengths, np.inf).argmin())
            if lengths[longest] > lengths[shortest]:
                keep[group, [longest, shortest]] = True
    return keep


def overlong_masking(rewards: Floats, completions: Groups, problems: Sequence[Problem]) -> Bools:
    """ORM: drop truncated responses instead of scoring them wrong.

    As a filter they leave the baseline too. ``TrainConfig.mask_truncated`` (DAPO's overlong
    filtering) only takes them out of the loss and leaves their 0 in the group's mean.
    """
    return np.array([[c.stop != "length" for c in group] for group in completions], dtype=bool)


FILTERS: dict[str, GroupFilter] = {
    "qs": question_selection,
    "rs": response_selection,
    "orm": overlong_masking,
}
"""Filter by its name in ``RewardConfig.group_filter``."""


def apply(
    group_filter: GroupFilter | None,
    rewards: Floats,
    completions: Groups,
    problems: Sequence[Problem],
) -> Bools:
    """What the filter keeps [P, G]; all without a filter.

    Raises:
        FilterError: the filter returned something else than booleans of the rewards' shape.
    """
    if group_filter is None:
        return np.ones(rewards.shape, dtype=bool)
    keep = group_filter(rewards.copy(), completions, problems)
    if not isinstance(keep, np.ndarray) or keep.dtype != np.bool_ or keep.shape != rewards.shape:
        found = f"{keep.dtype} {keep.shape}" if isinstance(keep, np.ndarray) else type(keep)
        raise FilterError(
            f"The group filter returned {found}: expected a bool array of shape {rewards.shape} "
            "(prompts, rollouts), True where the completion is kept"
        )
    return keep


def _facts(completions: Groups, problems: Sequence[Problem]) -> list[tuple[Bools, Bools, Floats]]:
    """(right [G], wrong [G], length [G]) of every group; what ``infra`` ended is neither."""
    flat = [c for group in completions for c in group]
    asked = [row for row, group in zip(problems, completions, strict=True) for _ in group]
    right = np.array(all_correct(flat, asked), dtype=bool)
    wrong = ~right & np.array([c.stop != "infra" for c in flat], dtype=bool)
    lengths = np.array([sum(c.loss_mask) for c in flat], dtype=np.float64)
    ends = np.cumsum([len(group) for group in completions])[:-1]
    return list(zip(*(np.split(values, ends) for values in (right, wrong, lengths)), strict=True))
