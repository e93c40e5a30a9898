"""How a row leaves generation for a tool and comes back: the protocol, and the rows that wait.

A loop watches the tokens of each row. When it finds code to run, that row alone is paused; its
cache is kept. Later it comes back with forced tokens (the tool's output), which are read in one
chunk, so nothing is ever read twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from rlkit.completion import ToolCall
from rlkit.decode import Decoder
from rlkit.tool_config import Rejoin as Rejoin

Code = str


@dataclass(frozen=True)
class Resume:
    """What happens to a row that waited.

    Attributes:
        row: its number.
        ids: forced tokens, appended with loss mask 0; those beyond the token budget are cut. Runs
            of three backticks in a tool's output have to be replaced before it is encoded: they
            could close its own fence, and a text cannot tell who wrote it (docs/verification.md).
        call: the execution to record, None if nothing ran. The engine fills in its ``span``.
        stop: None to go on; otherwise the row ends after ``ids``: ``calls`` when its tool calls are
            used up, ``infra`` when the machinery failed.
    """

    row: int
    ids: tuple[int, ...] = ()
    call: ToolCall | None = None
    stop: Literal["calls", "infra"] | None = None

    def __post_init__(self) -> None:
        if self.stop not in (None, "calls", "infra"):
            raise ValueError(f"stop={self.stop!r}: expected None, 'calls' or 'infra'")


class ToolLoop(Protocol):
    """Runs the code that rows write. One object serves one call of ``Engine.generate``.

    Rows are numbered over the whole call: prompt * n + sample. ``rejoin`` says when they go on:
    ``barrier``: once every row is finished or waiting and all results are there (the same batches
    whatever the tools' speed); ``ready``: each as soon as its result is there, while others keep
    generating. Both use the same random draws; tokens differ only where a different batch shape
    moves the last digits of a probability across a draw.
    """

    rejoin: Rejoin

    def feed(self, row: int, new_ids: Sequence[int]) -> Code | None:
        """See the tokens that ``row`` sampled since the last call; code to run pauses the row.

        Forced tokens are not fed, nor is a token that ends its row (end, stop text, budget).
        """
        ...

    def submit(self, row: int, code: Code) -> None:
        """Start running ``code``; called once for each code that ``feed`` returns."""
        ...

    def collect(self, wait: bool) -> Sequence[Resume]:
        """Results that are there and not yet collected; ``wait``: at least one, blocking."""
        ...

    def end(self, row: int) -> None:
        """``row`` has ended: nothing of it is needed any more."""
        ...


class Waiting:
    """Rows that wait for a tool, with their caches.

    Args:
        loop: runs the code.
        offset: number of this pass's first row; inside a pass rows are counted from 0.
    """

    def __init__(self, loop: ToolLoop, offset: int) -> None:
        if loop.rejoin not in get_args(Rejoin):
            raise ValueError(f"rejoin={loop.rejoin!r}: expected one of {get_args(Rejoin)}")
        self.loop = loop
        self.offset = offset
        self.rows: list[int] = []
        self.decoder: Decoder | None = None  # of these rows, in this order

    def feed(
        self,
        decoder: Decoder,
        batch: NDArray[np.int64],
        ids: NDArray[np.int64],
        done: NDArray[np.bool_],
    ) -> NDArray[np.bool_]:
        """Show the new ``ids`` of all rows that are not ``done``; which of them now wait [batch].

        Their caches are copied from ``decoder``, which is left unchanged.
        """
        for row in batch[done].tolist():
            self.loop.end(self.offset + row)
        paused = np.zeros(len(batch), dtype=np.bool_)
        for i in np.flatnonzero(~done):
            number = self.offset + int(batch[i])
            code = self.loop.feed(number, [int(ids[i])])
            if code is not None:
                self.loop.submit(number, code)
                paused[i] = True
        if paused.any():
            part = decoder.split(torch.from_numpy(np.flatnonzero(paused)))
            if self.decoder is None:
                self.decoder = part
            else:
                self.decoder.join(part)
            self.rows += batch[paused].tolist()
        return paused

    def results(self, idle: bool) -> list[tuple[int, Resume]]:
        """Collected results by row of this pass, in row order; waits if nothing else can run."""
        found: dict[int, Resume] = {}
        while idle or self.loop.rejoin == "ready":
            collected = self.loop.collect(idle)
            if idle and not collected:
                raise RuntimeError(
                    f"collect(wait=True) returned nothing while {len(self.rows) - len(found)} rows "
                    "wait: return a Resume for each of them, with stop='infra' if its tool failed"
                )
            for result in collected:
                row = result.row - self.offset
                if row not in self.rows or row in found:
                    raise ValueError(f"collect returned row {result.row}, which does not wait")
                found[row] = result
            if self.loop.rejoin == "ready" or len(found) == len(self.rows):
                break
        return sorted(found.items())

    def leave(self, answered: Sequence[int], going_on: Sequence[int]) -> Decoder | None:
        """Drop the ``answered`` rows; a decoder of those ``going_on`` among them, in that order."""
        for row in sorted(set(answered).difference(going_on)):
            self.loop.end(self.offset + row)
        place: Mapping[int, int] = {row: i for i, row in enumerate(self.rows)}
        left = sorted(set(self.rows).difference(answered), key=place.__getitem__)
        taken = torch.tensor([place[row] for row in going_on], dtype=torch.long)
        part, self.rows = self.decoder, left
        if part is None or not going_on:
            part = None
        elif left:
            part = part.split(taken)
        else:
            part.select(taken)
        if not left:
            self.decoder = None
        elif self.decoder is not None:
            self.decoder.select(torch.tensor([place[row] for row in left]))
        return part
