r"""A response as a reader sees it: who wrote what, what ran, what came of it.

Colours alone would not do. GitHub takes inline styles out of HTML outputs (pandas issues 33076 and
37936), and shows ANSI text without highlighting in some outputs (nbpreview issue 6). So every line
has a label in its margin, and colours come on top: the 16 ANSI colours that terminals, JupyterLab
(in both themes) and nbconvert map to their own. A trace is printed, as one text output.

    show(trace(completion, question="Calculate 322*511.", gold="164542", correct=True))
    show(examples(result.rows, problems=problems))
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

import pandas as pd
from IPython.core.getipython import get_ipython

from rlkit.completion import Completion, ToolCall
from rlkit.tool_metrics import read_calls
from rlkit.trace_parts import Part as Part
from rlkit.trace_parts import parts as parts

WIDTH = 96
"""Characters of a line, margin not counted; longer lines are wrapped."""

_BLOCKS = ("question", "code", "output", "failed", "invented")  # on lines of their own
_STYLES: dict[str, tuple[str, str, str]] = {  # label, ANSI codes, meaning
    "question": ("question", "1", "the problem"),
    "reasoning": ("thinks", "", "the policy's reasoning"),
    "text": ("writes", "", "the policy, outside its reasoning"),
    "code": ("code", "36", "code that the policy wrote"),
    "output": ("output", "35", "what the tool returned: the code ran"),
    "failed": ("failed", "33", "what the tool returned: the code failed"),
    "invented": ("INVENTED", "1;31", "output that the policy wrote itself; nothing ran"),
    "answer": ("answer", "1;34", "the answer that counts"),
}
_STOPS = {
    "eos": "ended by itself",
    "length": "token budget used up",
    "calls": "tool calls used up",
    "infra": "the tool's machinery failed",
}
# Control characters would act on the terminal, bidirectional ones reorder what is read.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


# --- text with colours ----------------------------------------------------------------------------


def paint(text: str, codes: str) -> str:
    """``text`` in ANSI colours (``"1;31"``: bold red)."""
    return f"\x1b[{codes}m{text}\x1b[0m" if codes and text else text


def visible(text: str) -> str:
    r"""``text`` with characters that act on a terminal or reorder text written out (``\x1b``)."""
    return _UNSAFE.sub(lambda found: ascii(found.group())[1:-1], text)


def ansi(parts: Iterable[Part], *, colour: bool = True, width: int = WIDTH) -> str:
    """Parts as lines with labels in the margin; nothing of their text can act on a terminal."""
    if width < 8:
        raise ValueError(f"width={width}: expected at least 8 characters for a line")
    shown, before = [], ""
    for line in _lines(parts):
        plain = "".join(text for _, text in line)
        kind = next((kind for kind, text in line if text.strip()), line[0][0])
        label, codes, _ = _STYLES[kind]
        for start, end in _rows(plain, width):
            margin = paint(f"{label if kind != before else '':>9}", codes if colour else "")
            before = kind
            cells, at = [], 0
            for each, text in line:
                piece = text[max(start - at, 0) : max(end - at, 0)]
                cells.append(paint(piece, _STYLES[each][1] if colour else ""))
                at += len(text)
            shown.append(f"{margin} │ {''.join(cells)}".rstrip())
    return "\n".join(shown)


def _lines(parts: Iterable[Part]) -> list[list[tuple[str, str]]]:
    """Non-blank lines, each as (kind, text) pieces."""
    lines: list[list[tuple[str, str]]] = [[]]
    before = ""
    for part in parts:
        if before and (part.kind in _BLOCKS or before in (*_BLOCKS, "reasoning")):
            lines.append([])
        first, *more = visible(part.text).expandtabs(4).split("\n")
        lines[-1].append((part.kind, first))
        lines += [[(part.kind, text)] for text in more]
        before = part.kind
    return [line for line in lines if any(text.strip() for _, text in line)]


def _rows(text: str, width: int) -> list[tuple[int, int]]:
    """Where to cut a long line: behind a space if there is one."""
    rows, at = [], 0
    while len(text) - at > width:
        space = text.rfind(" ", at + 1, at + width)
        end = space + 1 if text[at:space].strip() and space > 0 else at + width
        rows.append((at, end))
        at = end
    return [*rows, (at, len(text))]


def legend(*, colour: bool = True) -> str:
    """The labels and what they mean."""
    return "\n".join(
        f"{paint(f'{label:>9}', codes if colour else '')}   {meaning}"
        for label, codes, meaning in _STYLES.values()
    )


# --- one response, some responses -----------------------------------------------------------------


class Shown(Protocol):
    """What ``show`` takes."""

    def render(self, *, colour: bool = True) -> str:
        """As text, with ANSI colours or without."""
        ...


@dataclass(frozen=True)
class Trace:
    """A response with what is known about it.

    Attributes:
        text, calls: as in ``Completion``.
        question: ``""`` if unknown.
        correct: None if it was not judged.
        gold: expected answer, None if there is none.
        stop, n_tokens: as in ``Completion``; "" while it is being written.
        name: problem, sample.
    """

    text: str
    calls: tuple[ToolCall, ...] = ()
    question: str = ""
    answer: str | None = None
    correct: bool | None = None
    gold: str | None = None
    stop: str = ""
    n_tokens: int | None = None
    name: str = ""

    def facts(self, *, colour: bool = True) -> str:
        """Verdict, answers, calls, end and length in one line."""
        words = []
        if self.correct is not None:
            verdict, codes = ("✓ right", "1;32") if self.correct else ("✗ wrong", "1;31")
            words.append(paint(verdict, codes if colour else ""))
        if self.stop or self.answer:
            words.append(f"answer {visible(self.answer)}" if self.answer else "no answer")
        if self.gold is not None:
            words.append(f"gold {visible(self.gold)}")
        ran = [call.status for call in self.calls if call.status != "infra"]
        failed = len(ran) - ran.count("ok")
        calls = f"{len(ran) or 'no'} call{'s' * (len(ran) != 1)}"
        words.append(calls + (f" ({failed} failed)" if failed else ""))
        words.append(_STOPS[self.stop] if self.stop else "writing …")
        if self.n_tokens is not None:
            words.append(f"{self.n_tokens} tokens")
        return " · ".join([*([visible(self.name)] if self.name else []), *words])

    def render(self, *, colour: bool = True) -> str:
        """Facts, question and response as text."""
        asked = [Part("question", self.question)] if self.question else []
        body = ansi([*asked, *parts(self.text, self.calls)], colour=colour)
        return f"{self.facts(colour=colour)}\n{body}"

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        return {"text/plain": self.render(colour=_wants_colour())}


def trace(
    completion: Completion,
    *,
    question: str = "",
    gold: str | None = None,
    correct: bool | None = None,
    name: str = "",
) -> Trace:
    """The trace of a completion."""
    return Trace(
        text=completion.text,
        calls=completion.tool_calls,
        question=question,
        answer=completion.answer,
        correct=correct,
        gold=gold,
        stop=completion.stop,
        n_tokens=len(completion.token_ids),
        name=name,
    )


def row_calls(row: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    """The calls of an evaluation row; none if it was measured without tools."""
    if not isinstance(row.get("tool_calls"), str):
        return ()
    return tuple(
        ToolCall(**{**call, "span": tuple(call["span"]), "characters": tuple(call["characters"])})
        for call in read_calls(row["tool_calls"])
    )


def row_trace(row: Mapping[str, Any], question: str = "") -> Trace:
    """The trace of an evaluation row (``evaluate.EvalResult.rows``)."""
    answer = row["answer"]
    drawn = "greedy" if row["decoding"] == "greedy" else f"sample {row['sample']}"
    return Trace(
        text=row["text"],
        calls=row_calls(row),
        question=question,
        answer=answer if isinstance(answer, str) else None,
        correct=bool(row["correct"]),
        gold=row["gold"],
        stop=row["stop"],
        n_tokens=int(row["n_tokens"]),
        name=f"{row['problem_id']} ({drawn})",
    )


@dataclass(frozen=True)
class Group:
    """Examples of one class.

    Attributes:
        title: the class.
        count, of: rows of the class, of all rows.
    """

    title: str
    count: int
    of: int
    traces: tuple[Trace, ...] = field(default=())


@dataclass(frozen=True)
class Examples:
    """Examples by class, classes without rows among them."""

    groups: tuple[Group, ...]

    def render(self, *, colour: bool = True) -> str:
        """All of them as text."""
        blocks = []
        for group in self.groups:
            some = f"{group.count} of {group.of} responses" if group.count else "no response"
            title = paint(f"── {group.title}: {some} ", "1" if colour else "")
            blocks += [title, *(each.render(colour=colour) + "\n" for each in group.traces)]
        return "\n".join(blocks).rstrip("\n")

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        return {"text/plain": self.render(colour=_wants_colour())}


def examples(
    rows: pd.DataFrame, *, n: int = 1, seed: int = 0, problems: Sequence[Mapping[str, Any]] = ()
) -> Examples:
    """Right and wrong responses of an evaluation, at most ``n`` of each class.

    Which ones depends on ``seed`` and the rows' ids alone, never on the rows' order or content:
    nobody chose them. Responses that the machinery ended are left out.

    Args:
        rows: ``EvalResult.rows``.
        problems: their problem rows, to show the questions.

    Raises:
        ValueError: a column is missing, or ``n`` < 1.
    """
    needed = {"problem_id", "decoding", "sample", "text", "answer", "gold", "correct", "stop"}
    if missing := sorted((needed | {"n_tokens"}) - set(rows.columns)):
        raise ValueError(f"rows have no column {', '.join(missing)}: pass EvalResult.rows")
    if n < 1:
        raise ValueError(f"n={n}: expected at least one example of each class")
    asked = {str(p["problem_id"]): p["prompt"][-1]["content"] for p in problems}
    rows = rows[rows["stop"] != "infra"]
    groups = []
    for title, chosen in _classes(rows).items():
        picked = sorted(rows[chosen].to_dict("records"), key=lambda row: _lot(row, seed))[:n]
        traces = tuple(row_trace(row, asked.get(row["problem_id"], "")) for row in picked)
        groups.append(Group(title, int(chosen.sum()), len(rows), traces))
    return Examples(tuple(groups))


def _classes(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """Which rows are in which class; each is in one."""
    zero = pd.Series(0, index=rows.index)
    called = rows.get("calls", zero).fillna(0) > 0
    failed = rows.get("failed_calls", zero).fillna(0) > 0
    limit, right = rows["stop"].isin(["length", "calls"]), rows["correct"].astype(bool)
    return {
        "right, after a failed call": ~limit & right & failed,
        "right, code at the first try": ~limit & right & called & ~failed,
        "right, no code ran": ~limit & right & ~called,
        "wrong, code ran": ~limit & ~right & called,
        "wrong, no code ran": ~limit & ~right & ~called,
        "ended by a limit": limit,
    }


def _lot(row: Mapping[Any, Any], seed: int) -> bytes:
    text = f"{seed}|{row['problem_id']}|{row['decoding']}|{row['sample']}"
    return hashlib.blake2b(text.encode()).digest()


def show(thing: Shown, file: TextIO | None = None) -> None:
    """Print a trace or examples: in colour in notebooks and terminals (``NO_COLOR`` is heeded)."""
    print(thing.render(colour=_wants_colour(file)), file=file)


def _wants_colour(file: TextIO | None = None) -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    if file is None and get_ipython() is not None:
        return True
    return (file or sys.stdout).isatty()
