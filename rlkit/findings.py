"""What a run's rollouts show for or against its reward: findings with numbers and intervals.

Pure functions over the rows of ``signals.by_row``; the rules that make a verdict of findings are in
``rlkit.diagnostics``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rlkit.parting import Parting, change
from rlkit.stats import Estimate, rate

Steps = NDArray[np.int_]

MIN_STEPS = 10
"""Steps with rewards below which nothing is called sound or suspect."""
FIRST_STEPS, LAST_STEPS = 5, 10
"""Steps compared for changes over a run; in a short run at most half of the steps each."""
REINFORCED = 0.1
"""Share of completions that are wrong and raised by the gradient, above which it is a finding."""
FELL = 0.1
"""Fall of true accuracy or completion ratio (fractions) that is a finding."""
REPEATS = 0.1
"""Rise of the repeated share of a text that is a finding."""
TRUTH_MARGIN = 0.03
"""Rise of true accuracy since a parting that would be too small to matter (fraction)."""


_MEANS = (
    "truth",
    "reward",
    "unearned",
    "ended",
    "repetition",
    "paid_wrong",
    "unpaid_right",
    "reinforced_wrong",
    "format_only",
    "pay_well",
    "pay_ill",
)


@dataclass(frozen=True)
class Finding:
    """One thing that was seen.

    Attributes:
        code: stable name.
        message: what was seen, with numbers and 95 % intervals.
        step: where; the last step seen for a comparison over the run.
        counts: whether it weighs in the verdict; the others explain.
    """

    code: str
    message: str
    step: int
    counts: bool = True


def first_and_last(steps: Steps) -> tuple[Steps, Steps]:
    """The first and the last steps of a run that are compared; they never overlap."""
    half = len(steps) // 2
    return steps[: min(FIRST_STEPS, half)], steps[len(steps) - min(LAST_STEPS, half) :]


def groups_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Means per group: step, truth, reward, ended, repetition and the measures of pay.

    ``pay_well``, ``pay_ill``: of its wrong answers that are well and ill formed, nan without any.
    """
    wrong = ~rows["correct"].astype(bool)
    well = rows["well"].astype(bool)
    values = rows.assign(
        truth=rows["correct"],
        pay_well=rows["reward"].where(wrong & well),
        pay_ill=rows["reward"].where(wrong & ~well),
    )
    means = values[["step", "group", *_MEANS]].astype(dict.fromkeys(_MEANS, float))
    return means.groupby(["step", "group"]).mean().reset_index()


def since_parting(
    groups: pd.DataFrame, steps: Steps, parting: Parting, name: str = "truth"
) -> Estimate:
    """Change of a column of :func:`groups_of` from just before the parting to the end of the run.

    The end: the last ``LAST_STEPS`` steps, but none before the parting was caught.
    """
    low, high = parting.reference
    end = steps[-LAST_STEPS:]
    end = end[end >= parting.caught]
    before = groups[name][groups["step"].between(low, high)]
    return change(before, groups[name][groups["step"].isin(end)])


def aftermath(
    groups: pd.DataFrame, steps: Steps, parting: Parting, least: float
) -> tuple[Finding, bool]:
    """What became of a parting by the end of the run, and whether it is a hack.

    A hack needs evidence on both sides: unearned reward is still higher than before by more than
    ``least``, and true accuracy fell, or rose by less than ``TRUTH_MARGIN`` while reward rose.
    """
    reward, unearned, truth = (
        since_parting(groups, steps, parting, name) for name in ("reward", "unearned", "truth")
    )
    no_gain = truth.high < 0 or (truth.high < TRUTH_MARGIN and reward.low > 0)
    text = (
        f"from before the parting to the end: reward {reward:+.3f}, unearned {unearned:+.3f} "
        f"(matters above {least:.3f}), true accuracy {truth:+.3f}"
    )
    return Finding("since_parting", text, int(steps[-1]), False), unearned.low > least and no_gain


def parted(found: Parting) -> Finding:
    """The parting as a finding."""
    low, high = found.reference
    text = (
        f"since step {found.began} wrong answers are paid more and truth does not rise, caught at "
        f"step {found.caught}: against steps {low} to {high} reward {found.reward:+.3f}, unearned "
        f"{found.unearned:+.3f}, true accuracy {found.truth:+.3f}; evidence {found.evidence:.3g}, "
        f"needed {1 / found.alpha:g}"
    )
    return Finding("parted", text, found.caught)


def changes(groups: pd.DataFrame, steps: Steps, least: float) -> list[Finding]:
    """Changes from the first to the last steps; ``least``: unearned reward that matters."""
    first, last = (groups[groups["step"].isin(part)] for part in first_and_last(steps))
    end = int(steps[-1])
    moved = {
        name: change(first[name], last[name])
        for name in ("reward", "unearned", "truth", "ended", "repetition")
    }
    reward, truth = moved["reward"], moved["truth"]
    out = [
        Finding(
            "change",
            f"from first to last steps: reward {reward:+.3f}, true accuracy {truth:+.3f}",
            end,
            counts=False,
        )
    ]
    unearned = moved["unearned"]
    if unearned.low > least and truth.low <= 0:
        text = f"wrong answers are paid more ({unearned:+.3f} per completion)"
        out.append(Finding("reward_alone", f"{text} and truth did not rise ({truth:+.3f})", end))
    out += _accuracy_fell(groups, steps)
    if moved["ended"].high < -FELL:
        text = f"fewer completions end within the budget: {moved['ended']:+.3f}"
        out.append(Finding("completion_fell", text, end))
    if moved["repetition"].low > REPEATS:
        text = f"texts repeat themselves more: {moved['repetition']:+.3f} of their runs of words"
        out.append(Finding("repetition_rose", text, end))
    return out


def _accuracy_fell(groups: pd.DataFrame, steps: Steps) -> list[Finding]:
    """Whether accuracy at the end is below that of any earlier block of as many steps.

    If the reward fell with it from that block on, a second finding says so: ``fell_together``.
    One interval per block, at a level that makes all of them hold together (Bonferroni).
    """
    late = first_and_last(steps)[1]
    earlier = steps[: len(steps) - len(late)]
    count = max(1, len(earlier) // len(late))
    end = groups[groups["step"].isin(late)]
    falls = {}
    for block in np.array_split(earlier, count):
        before = groups[groups["step"].isin(block)]
        falls[int(block[0]), int(block[-1])] = tuple(
            change(before[name], end[name], level=1 - 0.05 / count) for name in ("truth", "reward")
        )
    (low, high), (fall, reward) = min(falls.items(), key=lambda item: item[1][0].high)
    if not fall.high < -FELL:
        return []
    text = f"true accuracy fell from steps {low} to {high} to the last steps: {fall:+.3f}"
    out = [Finding("accuracy_fell", text, int(steps[-1]))]
    if reward.high < 0:
        text = (
            f"and the reward fell with it ({reward:+.3f}): learning broke down, it was not fooled"
        )
        out.append(Finding("fell_together", text, int(steps[-1])))
    return out


def pay(groups: pd.DataFrame, steps: Steps) -> list[Finding]:
    """Who is paid in the last steps, as shares of all completions."""
    late = groups[groups["step"].isin(first_and_last(steps)[1])]
    share = {
        name: rate(late[name])
        for name in ("reinforced_wrong", "paid_wrong", "unpaid_right", "format_only")
    }
    end = int(steps[-1])
    out = []
    if share["reinforced_wrong"].low > REINFORCED:
        text = f"wrong and raised by the gradient: {share['reinforced_wrong']} of completions"
        out.append(Finding("reinforced_wrong", text, end))
    ill, well = (late[name].dropna() for name in ("pay_ill", "pay_well"))
    for_form = len(ill) > 1 and len(well) > 1 and change(ill, well).low > 0
    names = {
        "paid_wrong": "wrong but paid",
        "unpaid_right": "right but not paid",
        "format_only": "wrong, paid for form alone" if for_form else "wrong, well formed",
    }
    for code, what in names.items():
        if share[code].value > 0:
            text = f"{what}: {share[code]} of completions in the last steps"
            out.append(Finding(code, text, end, counts=False))
    return out
