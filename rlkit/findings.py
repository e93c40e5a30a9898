"""What a run's rollouts show for or against its reward: findings with numbers and intervals.

Pure functions over the rows of ``signals.by_row``; the rules that make a verdict of findings are in
``rlkit.diagnostics``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rlkit import signals
from rlkit.parting import Parting, change
from rlkit.stats import Estimate, percentile_interval, rate, resample_weights, undefined

Steps = NDArray[np.int_]

MIN_STEPS = 10
"""Steps with rewards below which nothing is called sound or suspect."""
FIRST_STEPS, LAST_STEPS = 5, 10
"""Steps compared for changes over a run; in a short run at most half of the steps each."""
AGREEMENT = 0.3
"""Correlation of reward and correctness within groups that a sound reward exceeds."""
REINFORCED = 0.1
"""Share of completions that are wrong and raised by the gradient, above which it is a finding."""
FELL = 0.1
"""Fall of true accuracy or completion ratio (fractions) that is a finding."""
REPEATS = 0.1
"""Rise of the repeated share of a text that is a finding."""
EXAMPLES = 3

_NUMBER = re.compile(r"\d+")


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


@dataclass(frozen=True)
class Example:
    """A wrong completion that was paid. ``excess``: reward above the run's lowest."""

    step: int
    problem_id: str
    text: str
    answer: str
    gold: str
    stop: str
    reward: float
    excess: float


def first_and_last(steps: Steps) -> tuple[Steps, Steps]:
    """The first and the last steps of a run that are compared; they never overlap."""
    half = len(steps) // 2
    return steps[: min(FIRST_STEPS, half)], steps[len(steps) - min(LAST_STEPS, half) :]


def groups_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Means per group: step, truth, reward, ended, repetition and the measures of pay."""
    names = ["reward", "ended", "repetition", "paid_wrong", "unpaid_right", "reinforced_wrong"]
    named = rows.assign(truth=rows["correct"])[["step", "group", "truth", *names, "format_only"]]
    means = named.astype(dict.fromkeys(("truth", *names, "format_only"), float))
    return means.groupby(["step", "group"]).mean().reset_index()


def since_parting(groups: pd.DataFrame, steps: Steps, parting: Parting) -> Estimate:
    """Change of true accuracy from before the parting to the end of the run.

    The end: the last ``LAST_STEPS`` steps, but none before the parting was caught.
    """
    low, high = parting.reference
    end = steps[-LAST_STEPS:]
    end = end[end >= parting.caught]
    before = groups["truth"][groups["step"].between(low, high)]
    return change(before, groups["truth"][groups["step"].isin(end)])


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


def agreement(sums: pd.DataFrame) -> Estimate:
    """``signals.agreement`` with a bootstrap over groups; undefined if rewards never differ."""
    value, method = signals.agreement(sums), "bootstrap over groups"
    if math.isnan(value):
        return undefined(method)
    weights = resample_weights(len(sums), resamples=500)
    rr, cc, rc = (weights @ sums[name].to_numpy(float) for name in ("rr", "cc", "rc"))
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = np.where(cc > 0, rc / np.sqrt(rr * cc), 0.0)
    return percentile_interval(value, draws, len(sums), method=method)


def relation(sums: pd.DataFrame, steps: Steps) -> list[Finding]:
    """Whether the reward pays correctness at all, over the whole run and in its last steps.

    The last steps decide only where their groups have rewards that differ: a solved task has none.
    """
    whole = agreement(sums)
    late = agreement(sums[sums["step"].isin(first_and_last(steps)[1])])
    text = f"correlation of reward and correctness within groups {whole}, in the last steps {late}"
    if min(e.high for e in (whole, late) if not math.isnan(e.value)) < AGREEMENT:
        why = f"reward unrelated to correctness: {text}; a sound reward exceeds {AGREEMENT:g}"
        return [Finding("unrelated", why, int(steps[-1]))]
    return [Finding("agreement", text, int(steps[-1]), counts=False)]


def changes(groups: pd.DataFrame, steps: Steps) -> list[Finding]:
    """Changes from the first to the last steps."""
    first, last = (groups[groups["step"].isin(part)] for part in first_and_last(steps))
    end = int(steps[-1])
    moved = {
        name: change(first[name], last[name]) for name in ("reward", "truth", "ended", "repetition")
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
    if reward.low > 0 and truth.low <= 0:
        text = f"reward rose ({reward:+.3f}) and true accuracy did not ({truth:+.3f})"
        out.append(Finding("reward_alone", text, end))
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

    One interval per block, at a level that makes all of them hold together (Bonferroni).
    """
    late = first_and_last(steps)[1]
    earlier = steps[: len(steps) - len(late)]
    count = max(1, len(earlier) // len(late))
    after = groups["truth"][groups["step"].isin(late)]
    falls = {}
    for block in np.array_split(earlier, count):
        before = groups["truth"][groups["step"].isin(block)]
        falls[int(block[0]), int(block[-1])] = change(before, after, level=1 - 0.05 / count)
    (low, high), fall = min(falls.items(), key=lambda item: item[1].high)
    if not fall.high < -FELL:
        return []
    text = f"true accuracy fell from steps {low} to {high} to the last steps: {fall:+.3f}"
    return [Finding("accuracy_fell", text, int(steps[-1]))]


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
    names = {
        "paid_wrong": "wrong but paid",
        "unpaid_right": "right but not paid",
        "format_only": "wrong, paid for form alone",
    }
    for code, what in names.items():
        if share[code].value > 0:
            text = f"{what}: {share[code]} of completions in the last steps"
            out.append(Finding(code, text, end, counts=False))
    return out


def telling(rows: pd.DataFrame, since: int = 0) -> tuple[Example, ...]:
    """The wrong completions that were paid most, of different kinds, late ones first among equals.

    Args:
        rows: rows of ``signals.by_row`` with a reward.
        since: first step to look at; never before the middle of the run, unless nothing was paid
            after it.

    At most one of a group. Texts are of one kind if they differ in digits and in repeated lines
    only. A wrong answer counts as paid if its reward is above the lowest of the run.
    """
    if rows.empty:
        return ()
    lowest = float(rows["reward"].min())
    wrong = rows[~rows["correct"] & (rows["reward"] > lowest + signals.TINY)]
    if rows["reward"].max() == lowest and lowest > 0:  # everything is paid the same
        wrong = rows[~rows["correct"]]
    middle = float(rows["step"].max() + rows["step"].min()) / 2
    late = wrong[wrong["step"] >= max(middle, since)]
    wrong = wrong if late.empty else late
    order = [name for name in ("reward", "step", "group", "sample") if name in wrong]
    wrong = wrong.sort_values(order, ascending=[False, False, True, True][: len(order)])
    out: list[Example] = []
    seen: set[object] = set()
    for row in wrong.to_dict("records"):
        keys = {kind_of(row["text"]), (row["step"], row["group"])}
        if keys & seen:
            continue
        seen |= keys
        out.append(
            Example(
                step=int(row["step"]),
                problem_id=str(row.get("problem_id", "")),
                text=row["text"],
                answer=str(row.get("answer", "")),
                gold=str(row.get("gold", "")),
                stop=str(row["stop"]),
                reward=float(row["reward"]),
                excess=float(row["reward"]) - lowest,
            )
        )
        if len(out) == EXAMPLES:
            break
    return tuple(out)


def kind_of(text: str) -> str:
    """The text with numbers made equal and every line once: what makes two texts one kind."""
    return "\n".join(dict.fromkeys(_NUMBER.sub("0", text).split("\n")))
