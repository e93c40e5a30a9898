"""Progress of a run: reward, accuracy, length and time left, wherever it is watched.

In a terminal a bar; in a notebook one line of plain text that is replaced in place (no widget
state is left in the saved notebook); elsewhere, as in a log file or under papermill, a line every
few steps. ``RLKIT_HEADLESS=1`` forces the last.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

from tqdm import tqdm

LINES = 12
"""About how many lines a run prints into a log."""


class Progress(Protocol):
    """Where the progress of a run is shown."""

    def update(self, row: Mapping[str, Any]) -> None:
        """Show one finished step (a row of metrics with ``step``)."""
        ...

    def note(self, message: str) -> None:
        """Show a message, for example a warning."""
        ...

    def close(self) -> None:
        """Leave the last state on screen."""
        ...


def progress(name: str, steps: int) -> Progress:
    """The display that fits where this process runs.

    Args:
        name: shown first.
        steps: planned steps.
    """
    if os.environ.get("RLKIT_HEADLESS", "") not in ("", "0"):
        return LogProgress(name, steps)
    if _in_notebook():
        return NotebookProgress(name, steps)
    if sys.stderr.isatty():
        return BarProgress(name, steps)
    return LogProgress(name, steps)


def describe(row: Mapping[str, Any]) -> str:
    """The figures of one step in one line; absent ones are left out."""
    shown: tuple[tuple[str, str, str], ...] = (
        ("reward", "reward", "{:.3f}"),
        ("accuracy", "accuracy", "{:.3f}"),
        ("length", "length_mean", "{:.1f}"),
        ("loss", "loss", "{:.4f}"),
    )
    if row.get("reward") is not None:  # a policy loss says nothing (0 on-policy by construction)
        shown = shown[:-1]
    parts = [
        f"{label} {form.format(row[key])}" for label, key, form in shown if row.get(key) is not None
    ]
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Timer:
    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps = name, steps
        self.begun = time.monotonic()

    def line(self, row: Mapping[str, Any]) -> str:
        step, spent = int(row["step"]), time.monotonic() - self.begun
        left = spent / max(step, 1) * (self.steps - step)
        return f"{self.name}  step {step}/{self.steps}  {describe(row)}  {clock(left)} left"


class LogProgress:
    """A line every few steps, for logs."""

    def __init__(self, name: str, steps: int) -> None:
        self._timer = _Timer(name, steps)
        self._every = max(1, round(steps / LINES))

    def update(self, row: Mapping[str, Any]) -> None:
        """Print every few steps, the first and the last."""
        step = int(row["step"])
        if step == 1 or step % self._every == 0 or step == self._timer.steps:
            print(self._timer.line(row), flush=True)

    def note(self, message: str) -> None:
        """Print a message."""
        print(message, flush=True)

    def close(self) -> None:
        """Nothing to do: every line is complete."""


class BarProgress:
    """A bar in a terminal."""

    def __init__(self, name: str, steps: int) -> None:
        self._bar = tqdm(total=steps, desc=name, unit="step", dynamic_ncols=True)

    def update(self, row: Mapping[str, Any]) -> None:
        """Advance the bar."""
        self._bar.set_postfix_str(describe(row), refresh=False)
        self._bar.update(int(row["step"]) - self._bar.n)

    def note(self, message: str) -> None:
        """Print a message above the bar."""
        self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is and end its line."""
        self._bar.close()


class NotebookProgress:
    """One line of text below the cell, replaced at each step; notes stay above it."""

    def __init__(self, name: str, steps: int) -> None:
        from IPython.display import display

        self._timer = _Timer(name, steps)
        self._handle = display(_Text(f"{name}  starting"), display_id=True)

    def update(self, row: Mapping[str, Any]) -> None:
        """Replace the line."""
        text = self._timer.line(row)
        if int(row["step"]) == self._timer.steps:
            spent = clock(time.monotonic() - self._timer.begun)
            text = f"{self._timer.name}  {self._timer.steps} steps  {describe(row)}  in {spent}"
        if self._handle is not None:
            self._handle.update(_Text(text))

    def note(self, message: str) -> None:
        """Print a message."""
        print(message, flush=True)

    def close(self) -> None:
        """Nothing to do: the last text stays."""


class _Text:
    """Text that a notebook shows as it is, without quotes."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _in_notebook() -> bool:
    # Not an import: asking must not start IPython in a plain process.
    ipython = sys.modules.get("IPython")
    if ipython is None:
        return False
    shell = ipython.get_ipython()
    return shell is not None and "zmq" in type(shell).__module__
