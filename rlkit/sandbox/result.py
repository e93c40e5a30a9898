"""What one run of model-written code gave."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Status = Literal["ok", "error", "timeout", "memory", "output", "refused", "infra"]
Variables = Literal["kept", "restored", "lost", ""]
LEFT_OUT = "... [{} characters left out] ..."
"""Stands where the middle of a text was cut out."""


@dataclass(frozen=True)
class Result:
    """Outcome of one run. All texts were written by the code that ran: never trust them.

    Attributes:
        status: ``ok``; ``error``: it raised or ended with a code other than 0; ``timeout``,
            ``memory``, ``output``: it was stopped at that limit; ``refused``: it asked for what the
            sandbox forbids; ``infra``: the machinery failed, which says nothing about the code.
        stdout: what it printed; of much output the head and the tail, see ``cut``.
        stderr: warnings and the like; not shown to the model.
        error: last line of the traceback (``"ZeroDivisionError: division by zero"``), ``""`` if
            there was none; for ``infra`` what failed.
        traceback: the whole traceback, ``""`` if there was none.
        echo: repr of the last expression, ``""`` if there is none.
        cpu_seconds: CPU time used, >= 0.
        wall_seconds: time from its start to its end, >= 0.
        cut: characters of ``stdout`` left out between its head and its tail, >= 0.
        variables: in a session, what became of the earlier cells' variables; ``""`` elsewhere.
    """

    status: Status
    stdout: str = ""
    stderr: str = ""
    error: str = ""
    traceback: str = ""
    echo: str = ""
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    cut: int = 0
    variables: Variables = ""

    def __post_init__(self) -> None:
        for name, kind in (("status", Status), ("variables", Variables)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: expected one of {get_args(kind)}"
                )
        for name in ("cpu_seconds", "wall_seconds", "cut"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a finite number >= 0")

    @property
    def ok(self) -> bool:
        """Whether the code ran to its end without an error."""
        return self.status == "ok"
