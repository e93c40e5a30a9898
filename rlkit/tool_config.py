"""The tool stage of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlkit.checks import check_types, require

Rejoin = Literal["barrier", "ready"]
ToolState = Literal["fresh", "replay", "session"]


@dataclass(frozen=True)
class ToolConfig:
    """Whether code that responses write is run, and what a response may use of it."""

    tool: Literal["none", "python"] = "none"
    """``python``: a python block is executed when its fence closes, and generation goes on behind
    its output. ``none``: code is text like any other."""
    tool_format: Literal["pattern", "still3"] = "pattern"
    """How code is found and its output shown: by the pattern of ``rlkit.fences``, or exactly as in
    the study's published code, errors included (with ``tool_state='fresh'``)."""
    max_calls: int = 4
    """Calls that a response may make; >= 1. The next block ends it (stop ``calls``). The study has
    no limit; its follow-up (arXiv 2505.24480) ends with 4."""
    first_calls: int = 0
    """RL only: calls that rollouts may make at step 1; grows by one every ``calls_every`` steps up
    to ``max_calls``, which evaluations have from the start. 0: ``max_calls`` throughout. The
    follow-up: 2, then 3, then 4."""
    calls_every: int = 100
    """RL only: steps between two increases; >= 1."""
    tool_state: ToolState = "fresh"
    """Variables between the blocks of one response: ``fresh`` none (the study), ``session`` one
    live process, ``replay`` earlier blocks are run again."""
    rejoin: Rejoin = "barrier"
    """When rows go on: ``barrier``, all together, so that batches do not depend on the tool's
    speed; ``ready``, each as soon as its result is there (fastest)."""
    tool_seconds: float = 5.0
    """CPU seconds of one call, 0.01 to 3600; three times as much wall time."""
    tool_characters: int = 400
    """Characters of output that the model is shown; >= 4. The study: 400."""
    tool_errors: Literal["last_line", "traceback"] = "last_line"
    """What is shown of an exception. The study: the last line."""
    mask_output: bool = True
    """SFT only: tool output carries no loss. The study did not mask. In RL it never has any."""

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in (("max_calls", 1), ("first_calls", 0), ("calls_every", 1)):
            value = getattr(self, name)
            require(value >= least, name, value, f"an integer >= {least}")
        require(
            self.first_calls <= self.max_calls,
            "first_calls",
            self.first_calls,
            f"at most max_calls={self.max_calls}",
        )
        seconds = self.tool_seconds
        require(0.01 <= seconds <= 3600, "tool_seconds", seconds, "0.01 to 3600 seconds")
        require(
            self.tool_characters >= 4, "tool_characters", self.tool_characters, "an integer >= 4"
        )
        require(
            self.tool_format == "pattern" or self.tool_state == "fresh",
            "tool_state",
            self.tool_state,
            "'fresh' with tool_format='still3'",
            "The study's executor keeps nothing between blocks.",
        )

    def calls_at(self, step: int) -> int:
        """Calls that a response may make at training step ``step`` (1-based)."""
        if not self.first_calls:
            return self.max_calls
        return min(self.max_calls, self.first_calls + (step - 1) // self.calls_every)
