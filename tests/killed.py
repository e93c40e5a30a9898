"""Trainings that break off at a chosen moment, in this process or by SIGKILL in one of their own.

python killed.py '{"at": "loss", "step": 3, "name": "demo-s0", ...parameters of tiny_config}'
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from tiny import tiny_config

from rlkit.grpo import RolloutTrainer
from rlkit.trainer import RlSession, train_rl

Moment = Literal["rollouts", "loss", "optimizer", "recorded", "saving", "saved"]
"""While completions are drawn; before the last backward pass of a step; between the updates of a
step; when its row is written; in the middle of writing a resume point; right after it."""


def arm(at: Moment, step: int, die: Callable[[], None], patch: Callable[..., None]) -> None:
    """Call ``die`` at that moment of that step; ``patch(target, name, value)`` as setattr."""

    def before(owner: Any, name: str, now: Callable[..., bool]) -> None:
        original = getattr(owner, name)

        def changed(self: Any, *args: Any, **options: Any) -> Any:
            if now(self, *args):
                die()
            return original(self, *args, **options)

        patch(owner, name, changed)

    if at == "rollouts":
        before(
            RolloutTrainer,
            "sample",
            lambda self, rows, purpose, number: purpose == "train" and number == step,
        )
    elif at == "loss":
        before(
            RolloutTrainer,
            "_compute_loss",
            lambda self, _, part: self.window.step == step and part is self._parts[-1],
        )
    elif at == "optimizer":
        before(
            RolloutTrainer,
            "_compute_loss",
            lambda self, _, part: (
                self.window.step == step
                and part is self._parts[self._passes // self.run_config.train.updates_per_batch]
            ),
        )
    elif at == "recorded":
        original = RlSession.record

        def then_die(self: RlSession, row: Mapping[str, Any]) -> None:
            original(self, row)
            if row["step"] == step:
                die()

        patch(RlSession, "record", then_die)
    elif at == "saving":
        save = RolloutTrainer.save_state

        def half(self: RolloutTrainer, folder: Path) -> None:
            save(self, folder)
            if self.window is not None and self.window.step >= step:
                (folder / "optimizer.pt").write_bytes(b"torn")
                die()

        patch(RolloutTrainer, "save_state", half)
    else:
        point = RlSession.on_step

        def after(self: RlSession, window: Any, numbers: Any) -> bool:
            stop = point(self, window, numbers)
            if window.step == step:
                die()
            return stop

        patch(RlSession, "on_step", after)


def main() -> None:
    """Train until killed."""
    options = json.loads(sys.argv[1])
    model = options.pop("model")
    arm(
        options.pop("at"),
        options.pop("step"),
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        setattr,
    )
    train_rl(tiny_config(model, **options))


if __name__ == "__main__":
    main()
