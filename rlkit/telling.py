"""The completions of a run that tell the most about its reward."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import pandas as pd

from rlkit import signals

EXAMPLES = 3

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Example:
    """A completion that should not have been paid or raised.

    Attributes:
        excess: reward above that of the lowest-paid wrong answer of the run.
        advantage: as logged; nan if it was not.
    """

    step: int
    problem_id: str
    text: str
    answer: str
    gold: str
    stop: str
    reward: float
    excess: float
    advantage: float = math.nan


def telling(rows: pd.DataFrame, since: int = 0) -> tuple[Example, ...]:
    """Three completions of different kinds, late ones first among equals.

    Args:
        rows: rows of ``signals.by_row`` with a reward.
        since: first step to look at; never before the middle of the run, unless there is nothing
            after it.

    The wrong completions that were paid most. If no wrong answer was paid: the wrong or truncated
    ones that the gradient raised most (advantage above 0); if it raised none, truncated ones.

    At most one of a group. Texts are of one kind if they differ in digits and in repeated lines
    only. A wrong answer counts as paid if its reward is above the lowest of the run.
    """
    if rows.empty:
        return ()
    wrong = ~rows["correct"].astype(bool)
    floor = float(rows["reward"][wrong].min()) if wrong.any() else float(rows["reward"].min())
    chosen = _chosen(rows, wrong)
    middle = float(rows["step"].max() + rows["step"].min()) / 2
    late = chosen[chosen["step"] >= max(middle, since)]
    return _different(chosen if late.empty else late, floor)


def _chosen(rows: pd.DataFrame, wrong: pd.Series) -> pd.DataFrame:
    """The first of the three sorts that has any, with ``rank``: high ones tell more."""
    lowest = float(rows["reward"].min())
    paid = wrong & (rows["reward"] > lowest + signals.TINY)
    if rows["reward"].max() == lowest and lowest > 0:  # everything is paid the same
        paid = wrong
    if paid.any():
        return rows[paid].assign(rank=rows["reward"][paid])
    truncated = ~rows["ended"].astype(bool)
    if "advantage" in rows:
        gained = pd.to_numeric(rows["advantage"], errors="coerce").astype(float)
        raised = (wrong | truncated) & (gained > signals.TINY) & rows["trained"].astype(bool)
        if raised.any():
            return rows[raised].assign(rank=gained[raised])
    return rows[truncated].assign(rank=0.0)


def _different(chosen: pd.DataFrame, floor: float) -> tuple[Example, ...]:
    order = [name for name in ("rank", "step", "group", "sample") if name in chosen]
    chosen = chosen.sort_values(order, ascending=[False, False, True, True][: len(order)])
    out: list[Example] = []
    seen: set[object] = set()
    for row in chosen.to_dict("records"):
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
                excess=float(row["reward"]) - floor,
                advantage=float(row.get("advantage", math.nan)),
            )
        )
        if len(out) == EXAMPLES:
            break
    return tuple(out)


def kind_of(text: str) -> str:
    """The text with numbers made equal and every line once: what makes two texts one kind."""
    return "\n".join(dict.fromkeys(_NUMBER.sub("0", text).split("\n")))
