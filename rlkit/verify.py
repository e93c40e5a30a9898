r"""Whether an answer equals the gold answer.

- ``answer_type="integer"``: both sides are plain numbers (``literals.canonical_number`` lists the
  forms) and equal by exact value. No tolerance, no percent rule: 2.04 is not 204, 9 is not 900.
  Anything else is *unparsable* and never right: ``3 or 5``, ``x=3``, ``2+3``, ``12 cm``, ``1e3``,
  ``12,34``, digits of other scripts.
- ``answer_type="expression"``: numbers, words and forms that the text decides are compared by
  ``literals``, exactly and at once. The rest goes to math-verify in a child process with a
  wall-clock limit. math-verify's own limit uses ``signal.alarm``, which works on the main thread
  only.

``docs/verification.md`` has the rules in full, and what they decide differently from math-verify.
Where a response states its answer is found by ``extract``.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

from rlkit.literals import (
    MAX_ANSWER_CHARS,
    canonical_number,
    for_parser,
    is_one_expression,
    pair_for_parser,
    settle,
    words_of_gold,
)

ANSWER_TYPES = ("integer", "expression")
SECONDS_PER_EXPRESSION = 3.0
CACHE_PAIRS = 65_536

_WORKER_FILE = Path(__file__).with_name("_verify_worker.py")
_STARTUP_SECONDS = 120.0


class Verdict(StrEnum):
    """Outcome of a comparison; only ``RIGHT`` earns a reward."""

    RIGHT = "right"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"
    TIMEOUT = "timeout"


class GoldError(ValueError):
    """A gold answer that cannot be parsed; no response could ever be right."""


def verify(answer: str | None, gold: str, answer_type: str) -> Verdict:
    """Decide whether ``answer`` equals ``gold``. Never raises on model text.

    Args:
        answer: extracted answer, None if the response has none.
        gold: gold answer of the problem row.
        answer_type: ``integer`` (exact, at once) or ``expression`` (what the texts settle at once,
            the rest by math-verify within ``SECONDS_PER_EXPRESSION``).

    Raises:
        GoldError: the gold answer cannot be parsed.
        ValueError: unknown answer type.
    """
    if answer_type not in ANSWER_TYPES:
        raise ValueError(f"answer_type={answer_type!r}: expected one of {', '.join(ANSWER_TYPES)}")
    gold_number = canonical_number(gold)
    if answer_type == "integer" and (gold_number is None or "." in gold_number):
        check_gold(gold, answer_type)
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return Verdict.UNPARSABLE
    answer_number = canonical_number(answer)
    if gold_number is not None and answer_number is not None:
        return Verdict.RIGHT if answer_number == gold_number else Verdict.WRONG
    if answer_type == "integer":
        return Verdict.UNPARSABLE
    if not is_one_expression(answer):
        return Verdict.UNPARSABLE
    settled = settle(gold, answer)
    if settled is not None:
        return Verdict.RIGHT if settled else Verdict.WRONG
    verdict = _compare(*pair_for_parser(gold, answer))
    if verdict == "gold":
        check_gold(gold, answer_type)
        return Verdict.UNPARSABLE  # sound by itself, not as it was worded next to this answer
    return Verdict(verdict)


def check_gold(gold: str, answer_type: str, problem_id: str = "") -> None:
    """Raise GoldError, with the problem's id and the fix, if ``gold`` cannot be parsed."""
    where = f"Problem {problem_id!r}: g" if problem_id else "G"
    if answer_type not in ANSWER_TYPES:
        raise ValueError(
            f"{where}old answer {gold!r} has answer_type={answer_type!r}: expected one of "
            f"{', '.join(ANSWER_TYPES)}"
        )
    number = canonical_number(gold)
    if answer_type == "integer":
        if number is None or "." in number:
            raise GoldError(
                f"{where}old answer {gold!r} is not an integer. Correct it, or set the row's "
                "answer_type to 'expression'."
            )
    elif number is not None or words_of_gold(gold) is not None:
        return
    elif _compare(for_parser(gold), None) != "right":
        raise GoldError(
            f"{where}old answer {gold!r} cannot be parsed as a mathematical expression. Write it "
            "as LaTeX without text around it, or remove the problem."
        )


@lru_cache(maxsize=CACHE_PAIRS)
def _compare(gold: str, answer: str | None) -> str:
    return _WORKER.ask(gold, answer)


class _Worker:
    """One lazily started child process; replaced when an item runs over its limit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, gold: str, answer: str | None) -> str:
        """Verdict of one pair, ``gold`` if the gold cannot be parsed."""
        with self._lock:
            for _ in range(2):
                try:
                    verdict = self._ask_once(gold, answer)
                except BaseException:
                    self.close()  # an interrupted exchange would shift every later reply by one
                    raise
                if verdict is not None:
                    return verdict
            return Verdict.UNPARSABLE  # the pair crashed two processes in a row

    def _ask_once(self, gold: str, answer: str | None) -> str | None:
        """One exchange; None if the process died for another reason than its time limit."""
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            self.close()
            return None
        reply = _read_line(process, SECONDS_PER_EXPRESSION + 1.0)
        if reply:
            return reply
        # After an end of file the exit code is due at once; it tells an alarm from a crash.
        code = self.close(grace=0.0 if reply is None else 5.0)
        return Verdict.TIMEOUT if reply is None or code == -signal.SIGALRM else None

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: the package folder must not shadow top-level modules in the child. An own session
        # keeps Ctrl-C in a notebook away from it.
        command = [sys.executable, "-P", str(_WORKER_FILE), str(SECONDS_PER_EXPRESSION)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True
        )
        self._process = process
        if _read_line(process, _STARTUP_SECONDS) != "ready":
            process.kill()
            _, error = process.communicate()
            self._process = None
            lines = error.decode(errors="replace").strip().splitlines() or ["no message"]
            raise RuntimeError(
                f"The process that compares expressions did not start: {lines[-1]}. It needs the "
                "package math-verify (pip install math-verify[antlr4_13_2])."
            )
        return process

    def close(self, grace: float = 0.0) -> int | None:
        """End the child process, if any, after at most ``grace`` seconds; returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        try:
            code = process.wait(timeout=grace)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        return code

    def forget(self) -> None:
        """Drop the parent's process after a fork; two readers on one pipe would mix replies."""
        self._lock = threading.Lock()
        self._process = None


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> str | None:
    """A reply, ``""`` if the process ended, None if ``seconds`` passed without one."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        ready = selector.select(seconds)
    return process.stdout.readline().decode().strip() if ready else None


_WORKER = _Worker()
atexit.register(_WORKER.close)
os.register_at_fork(after_in_child=_WORKER.forget)
