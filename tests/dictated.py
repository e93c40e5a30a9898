"""A policy that writes what a test tells it to, and executors that fail on request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from rlkit.engine import Sampling, uniforms
from rlkit.sandbox import InfraError, Limits, PythonExecutor, Result
from rlkit.streams import Keys
from rlkit.tool_config import ToolState
from rlkit.tools import Cells


@dataclass
class Scripted:
    """Stands in for the draw of tokens: rows write given ids, scored by the real model.

    ``write(number, stream)`` gives what a row samples, forced tokens not counted; the last id is
    repeated for ever. ``number`` counts rows since the start, ``stream`` is the row's random
    stream, the same whenever the row is drawn.
    """

    write: Callable[[int, int], Sequence[int]]
    rows: int = 0
    left: dict[int, list[int]] = field(default_factory=dict)
    now: list[tuple[int, int]] = field(default_factory=list)

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("rlkit.engine.uniforms", self.uniforms)
        monkeypatch.setattr("rlkit.engine.pick_tokens", self.pick)

    def uniforms(self, streams: Keys, draw: np.ndarray) -> np.ndarray:
        self.now = [(int(s), int(place)) for s, place in zip(streams, draw, strict=True)]
        return uniforms(streams, draw)

    def pick(
        self, logits: Tensor, sampling: Sampling, uniform: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        chosen = []
        for stream, place in self.now:
            if place == 0:
                self.left[stream] = list(self.write(self.rows, stream))
                self.rows += 1
            ids = self.left[stream]
            chosen.append(ids.pop(0) if len(ids) > 1 else ids[0])
        tokens = torch.tensor(chosen)
        scale = 1.0 if sampling.greedy else sampling.temperature
        return tokens, (logits.float() / scale).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


@dataclass
class Faulty:
    """An executor whose machinery fails: for code with ``LOST`` one run, from run number ``last``
    on (1-based; 0: never) all of it, in the call or, with ``late``, in its result.
    """

    inner: PythonExecutor
    last: int = 0
    late: bool = False
    runs: int = 0

    @property
    def limits(self) -> Limits:
        return self.inner.limits

    def submit(self, code: str) -> Future[Result]:
        self.runs += 1
        future: Future[Result] = Future()
        if self.last and self.runs >= self.last:
            error = InfraError("the fork server is gone")
            if not self.late:
                raise error
            future.set_exception(error)
        elif "LOST" in code:
            future.set_result(Result("infra", error="the child was lost"))
        else:
            return self.inner.submit(code)
        return future

    def session(self, state: ToolState) -> Cells:
        raise AssertionError("not used with fresh state")
