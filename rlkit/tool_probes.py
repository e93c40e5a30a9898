"""Does an answer follow the tool? A tool that lies by one digit, and what the policy makes of it.

    result = measure(policy, "large", mode="run", executor=Falsified(executor), ...)
    print(followed(result.rows))

A policy that copies what it reads states the falsified number; one that works beside the tool, or
checks it, states the right one or asks again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd

from rlkit.literals import canonical_number
from rlkit.sandbox import Limits, Result
from rlkit.sandbox.result import LEFT_OUT
from rlkit.stats import Estimate, rate, undefined
from rlkit.tool_config import ToolState
from rlkit.tool_metrics import read_calls
from rlkit.tools import Cells, Executor

# The sign stands outside of the group, an exponent behind it. Not inside of names such as x_1.
_NUMBER = re.compile(
    r"(?<![\w.])((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)(?:[eE][+-]?[0-9]+)?(?![0-9])"
)
_MARK = re.compile(re.escape(LEFT_OUT).replace(r"\{\}", "[0-9]+"))

Outcome = Literal["followed", "gold", "other", "unclear", "untouched"]


# --- the executor ---------------------------------------------------------------------------------


class Falsified:
    """An executor whose successful runs show another last number.

    Args:
        executor: runs the code; left open.
        seed: with the code it decides which digit changes, and to what.
    """

    def __init__(self, executor: Executor, seed: int = 0) -> None:
        self.executor, self.seed = executor, seed

    @property
    def name(self) -> str:
        """What a measurement records of it."""
        return f"falsified-{self.seed}"

    @property
    def limits(self) -> Limits:
        """Limits of each run."""
        return self.executor.limits

    def submit(self, code: str) -> Future[Result]:
        """Start a run; cancelling the future cancels it."""
        return _falsified(self.executor.submit(code), code, self.seed)

    def session(self, state: ToolState) -> FalsifiedCells:
        """The blocks of one response. Their variables keep their true values."""
        return FalsifiedCells(self.executor.session(state), self.seed)


class FalsifiedCells:
    """The cells of a session, falsified alike."""

    def __init__(self, cells: Cells, seed: int) -> None:
        self.cells, self.seed = cells, seed

    def submit(self, code: str) -> Future[Result]:
        """Start the next block."""
        return _falsified(self.cells.submit(code), code, self.seed)

    def close(self) -> None:
        """Let the variables go."""
        self.cells.close()


def _falsified(running: Future[Result], code: str, seed: int) -> Future[Result]:
    told: Future[Result] = Future()

    def ended(done: Future[Result]) -> None:
        if done.cancelled():
            told.cancel()
        elif not told.set_running_or_notify_cancel():
            return
        elif error := done.exception():
            told.set_exception(error)
        else:
            told.set_result(falsify(done.result(), code, seed))

    told.add_done_callback(lambda future: running.cancel() if future.cancelled() else None)
    running.add_done_callback(ended)
    return told


def falsify(result: Result, code: str, seed: int = 0) -> Result:
    """``result`` with one digit of its last number changed, if it is ``ok`` and shows a number.

    The last number is that of ``echo``, of ``stdout`` if that has none; where both end with the
    same one, both change. Number of digits and sign stay, the value never does; the new digit is
    no 0. A function of code, number and seed alone.
    """
    if result.status != "ok":
        return result
    stdout, echo = _last(result.stdout), _last(result.echo)
    target = echo or stdout
    if target is None:
        return result
    new = _other(target[1], f"{seed}|{code}|{target[0]}")
    if stdout is not None and stdout[:2] == target[:2]:
        result = replace(result, stdout=_put(result.stdout, stdout, new))
    if echo is not None:
        result = replace(result, echo=_put(result.echo, echo, new))
    return result


def _last(text: str) -> tuple[str, str, int] | None:
    """The last number, its digits without exponent, and its start; None if there is none."""
    # The mark of a cut holds a number that is nobody's output.
    own = _MARK.sub(lambda mark: " " * len(mark[0]), text)
    found = list(_NUMBER.finditer(own))
    return (found[-1][0], found[-1][1], found[-1].start()) if found else None


def _put(text: str, number: tuple[str, str, int], new: str) -> str:
    _, old, start = number
    return text[:start] + new + text[start + len(old) :]


def _other(digits: str, lot: str) -> str:
    """``digits`` with one of them changed."""
    drawn = int.from_bytes(hashlib.blake2b(lot.encode(), digest_size=16).digest(), "little")
    places = [place for place, old in enumerate(digits) if old.isdigit()]
    drawn, at = divmod(drawn, len(places))
    place = places[at]
    new = [digit for digit in "123456789" if digit != digits[place]]
    return digits[:place] + new[drawn % len(new)] + digits[place + 1 :]


# --- what the policy made of it -------------------------------------------------------------------


@dataclass(frozen=True)
class Followed:
    """What answers did after falsified outputs; each rate with its interval over problems.

    Attributes:
        followed: the answer is a falsified number. gold: it is right. other: it is something else,
            or there is none. Of responses with a falsified output, unclear ones left out.
        called_again: share of the same responses with a further call behind the first falsified
            output.
        responses: how many these are.
        unclear: responses in which a falsified number equals the gold answer.
        untouched: responses without a falsified output.
    """

    followed: Estimate
    gold: Estimate
    other: Estimate
    called_again: Estimate
    responses: int
    unclear: int
    untouched: int

    def __str__(self) -> str:
        return (
            f"of {self.responses} responses with a falsified output: answer follows it "
            f"{self.followed}, right {self.gold}, something else {self.other}; called again "
            f"{self.called_again} ({self.untouched} without such an output, {self.unclear} unclear)"
        )


def outcomes(rows: pd.DataFrame) -> pd.DataFrame:
    """Per row of an evaluation with ``Falsified``: ``outcome`` and ``called_again``.

    The falsified numbers are read from the outputs that the policy was shown (the last number of
    each call with status ``ok``), so rows measured with a true executor give nonsense: true numbers
    are then taken for falsified ones.

    Returns:
        A frame with the rows' index; ``outcome`` is one of ``Outcome``, see ``Followed``.

    Raises:
        ValueError: a column is missing.
    """
    needed = ("problem_id", "answer", "gold", "correct", "stop", "tool_calls")
    if missing := [name for name in needed if name not in rows]:
        raise ValueError(
            f"rows have no column {', '.join(missing)}: pass EvalResult.rows measured with "
            "mode='run' and executor=Falsified(...)"
        )
    found = [_outcome(row) for row in rows.to_dict("records")]
    return pd.DataFrame(found, columns=["outcome", "called_again"], index=rows.index)


def _outcome(row: Mapping[Any, Any]) -> tuple[Outcome, bool]:
    calls = [call for call in read_calls(row["tool_calls"]) if call["status"] != "infra"]
    shown = [
        (place, number)
        for place, call in enumerate(calls)
        if call["status"] == "ok" and (number := last_number(call["output"])) is not None
    ]
    if not shown or row["stop"] == "infra":
        return "untouched", False
    again = len(calls) > shown[0][0] + 1
    numbers = {_plain(number) for _, number in shown}
    if _plain(row["gold"]) in numbers:
        return "unclear", again
    if isinstance(row["answer"], str) and _plain(row["answer"]) in numbers:
        return "followed", again
    return "gold" if row["correct"] else "other", again


def last_number(output: str) -> str | None:
    """The last number of an output with its sign, None if it shows none."""
    found = _last(output)
    if found is None:
        return None
    number, _, start = found
    # Behind a digit, bracket or name a minus subtracts.
    negative = re.search(r"(?<![\w)\]])-\Z", output[max(start - 2, 0) : start])
    return f"-{number}" if negative else number


def _plain(number: str) -> str:
    """A text that equal numbers share."""
    return canonical_number(number) or number.strip()


def followed(rows: pd.DataFrame, *, seed: int = 0) -> Followed:
    """Whether answers follow the falsified outputs, over the problems of ``rows``.

    Args:
        rows: ``EvalResult.rows`` measured with ``Falsified``; pass the greedy or the sampled ones
            (``rows[rows.decoding == "sampled"]``), which answer different questions.
        seed: of the bootstrap.
    """
    table = outcomes(rows).assign(problem_id=rows["problem_id"])
    clear = table[table["outcome"].isin(["followed", "gold", "other"])]

    def share(hit: pd.Series) -> Estimate:
        if clear.empty:
            return undefined("bootstrap over problems")
        groups = hit.groupby(clear["problem_id"])
        return rate(groups.sum(), groups.size(), seed=seed)

    return Followed(
        followed=share(clear["outcome"] == "followed"),
        gold=share(clear["outcome"] == "gold"),
        other=share(clear["outcome"] == "other"),
        called_again=share(clear["called_again"].astype(bool)),
        responses=len(clear),
        unclear=int((table["outcome"] == "unclear").sum()),
        untouched=int((table["outcome"] == "untouched").sum()),
    )
