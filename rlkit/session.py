"""What every kind of training does around its steps: records, display, commands, saving."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rlkit.callbacks import Progress, progress
from rlkit.config import RunConfig
from rlkit.models import Policy, quiet
from rlkit.recorder import Recorder

PAUSE_SECONDS = 0.5


class TrainingError(RuntimeError):
    """Training broke down; the text says at which step and what to change."""


class Session:
    """The steps of one run as its folder and its user see them.

    Args:
        steps: planned steps.
    """

    def __init__(self, config: RunConfig, recorder: Recorder, steps: int) -> None:
        self.config = config
        self.recorder = recorder
        self.steps = steps
        self.display: Progress = progress(config.name, steps)
        self.step = recorder.status.step
        self.stopped = False

    def record(self, row: Mapping[str, Any]) -> None:
        """Write and show one finished step.

        Raises:
            TrainingError: loss or gradient norm is not finite (after the row was written).
        """
        self.step = int(row["step"])
        self.recorder.metrics(row)
        self.recorder.update(step=self.step)
        self.display.update(row)
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise TrainingError(
                f"step {self.step}: loss {row['loss']}, gradient norm {row['grad_norm']}. Likely "
                "cause: the policy diverged. Lower learning_rate or max_grad_norm, or use "
                "dtype='float32'."
            )

    def warn(self, code: str, message: str) -> None:
        """Record and show a warning, once per ``code``."""
        if self.recorder.warn(code, message):
            self.display.note(f"{self.config.name}  warning: {message}")

    def obey(self) -> bool:
        """Take the command of control.json: True means stop; waits while paused."""
        while True:
            command, number = self.recorder.command()
            if number > self.recorder.status.control_id:
                paused = command == "pause"
                self.recorder.update(control_id=number, state="paused" if paused else "running")
            if command == "stop":
                # Asked for in the last step, it changes nothing: the run is done.
                self.stopped = self.step < self.steps
                return True
            if command != "pause":
                return False
            time.sleep(PAUSE_SECONDS)

    def save(self, model: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write checkpoints/step-NNNNNN of the present step."""
        with self.recorder.checkpoint(self.step) as folder:
            save_weights(model, tokenizer, folder)

    def finish(self, model: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
        """Save the final weights and write the last status."""
        self.save(model, tokenizer)
        if self.stopped:
            self.recorder.close("interrupted", f"stopped on request after step {self.step}")
        else:
            self.recorder.close("done")


@contextlib.contextmanager
def gradients() -> Iterator[None]:
    """Gradients are on inside, and afterwards.

    Ctrl-C may arrive at the very end of a ``torch.no_grad`` block, before it switches them on
    again. They would then stay off until the notebook's kernel is restarted.
    """
    torch.set_grad_enabled(True)
    try:
        yield
    finally:
        torch.set_grad_enabled(True)


def save_weights(model: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save model (LoRA: the adapter) and tokenizer so that ``models.load_policy`` reads them."""
    with quiet():
        if isinstance(model, PeftModel):
            # A second adapter can be there as the reference of the KL term; it is no result.
            model.save_pretrained(str(folder), selected_adapters=["default"])
        else:
            model.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card


def data_hash(data: object) -> str:
    """Short hash of anything JSON can hold, to tell runs on different data apart."""
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
