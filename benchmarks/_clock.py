"""What a training step costs, phase by phase, for any trainer built on TRL's GRPOTrainer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from transformers import TrainerCallback
from trl.trainer.grpo_trainer import GRPOTrainer

Timed = tuple[Any, str, str, Callable[[Any], None] | None]
"""Owner and name of a function, the phase that it belongs to, what to do with its result."""
PHASES = ("generation", "reward", "forward", "backward", "other")
"""``forward`` and ``backward`` are of training; ``other`` is the rest: optimizer, batching."""

Reader = Callable[[], float]
CLOCKS: dict[str, Reader] = {"wall": time.perf_counter, "cpu": time.process_time}
"""What seconds are: elapsed, or spent by all threads of this process. The latter is what a step
costs where others use the machine too; with one thread of torch the two agree on a quiet one."""


@dataclass
class Step:
    """One step of one side; lists have one entry per rollout, groups in order."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    prompts: list[int] = field(default_factory=list)
    completions: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Wall seconds from the end of the step before to the end of this one."""
        return sum(self.seconds.values())


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` inside this context."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


class Clock(TrainerCallback):
    """Measures the steps of a trainer by phase.

    Time spent inside a nested phase counts for that phase alone, and what no phase claims is
    ``other``, so the phases of a step add up to its wall time.

    Args:
        after_step: called with the number of each finished step, its time is not counted;
            returning True ends the run.
        read: what is measured; a count of operations instead of seconds, for example.
        mark: name the phases in a torch.profiler trace, ``MARK`` and the phase.
    """

    MARK = "phase: "

    def __init__(
        self,
        after_step: Callable[[int], bool],
        read: Reader = time.perf_counter,
        mark: bool = False,
    ) -> None:
        self.steps: list[Step] = []
        self._after_step = after_step
        self._read = read
        self._mark = mark
        self._current = Step()
        self._phase = "other"
        self._since = 0.0

    def _enter(self, phase: str) -> str:
        """Book the time since the last change on the phase that ends; return its name."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now, before = self._read(), self._phase
        self._current.seconds[before] += now - self._since
        self._since, self._phase = now, phase
        return before

    def _wrap(
        self, call: Callable[..., Any], phase: str, keep: Callable[[Any], None] | None = None
    ) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            before = self._enter(phase)
            name = record_function(self.MARK + phase) if self._mark else contextlib.nullcontext()
            try:
                with name:
                    result = call(*args, **kwargs)
            finally:
                self._enter(before)
            if keep is not None:
                keep(result)
            return result

        return timed

    def _keep_lengths(self, generated: tuple[Any, ...]) -> None:
        self._current.prompts = [len(ids) for ids in generated[0]]
        self._current.completions = [len(ids) for ids in generated[1]]

    def _keep_rewards(self, values: Tensor) -> None:
        self._current.rewards = values.sum(1).tolist()

    @contextlib.contextmanager
    def watch(self, trainer: GRPOTrainer, phases: Sequence[Timed] = ()) -> Iterator[None]:
        """Time ``trainer`` while it runs inside this context.

        Args:
            trainer: its methods that TRL calls are timed in any case.
            phases: what else is.
        """
        trainer.add_callback(self)
        calls = (
            *phases,
            (trainer, "_generate", "generation", self._keep_lengths),
            (trainer, "_calculate_rewards", "reward", self._keep_rewards),
            (trainer, "compute_loss", "forward", None),
            # Every loss.backward() goes through this function, whoever calls it.
            (torch.autograd, "backward", "backward", None),
        )
        with contextlib.ExitStack() as stack:
            for owner, name, phase, keep in calls:
                timed = self._wrap(getattr(owner, name), phase, keep)
                stack.enter_context(patched(owner, name, timed))
            yield

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._since = self._read()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._enter("other")
        self.steps.append(self._current)
        if self._after_step(state.global_step):
            control.should_training_stop = True
        self._current = Step()
        self._since = self._read()
