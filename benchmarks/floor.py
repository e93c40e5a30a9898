"""How far a GRPO step is from what this machine could do at best.

    python benchmarks/floor.py --task chain

Counts the operations that the rollouts of a step need, measures how fast this machine multiplies
matrices of exactly these shapes, and divides: the floor. Then it measures how long rlkit and stock
TRL take for the same rollouts, how many operations they really execute, and on which kinds of
operators the time goes. docs/benchmarks.md says what each number means.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _cases import add_arguments, build_setup, parse, print_origin, print_table, stock_candidates
from _clock import CLOCKS, Clock, Reader, Step
from _stock import SIDES, Setup, Side, Stock, run
from _work import Shape, Work, decode_passes, padded_work, rollout_work, trained_rows
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

PARTS: dict[str, tuple[str, ...]] = {
    "generation": ("generation",),
    "training": ("forward", "backward"),
}
"""Parts of a step that have a floor, and their phases."""
GRID = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048)
"""Rows of the products that are measured."""
CAP = GRID[-1]
"""The time of more rows is taken in proportion."""
NAMES: dict[Side, str] = {"ours": "rlkit", "stock": "stock TRL"}
KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("scaled_dot_product", "flash_attention"),
    "matrix products": ("::mm", "addmm", "bmm", "linear", "matmul", "chunkedlogprob"),
    "optimizer": ("optimizer", "_foreach", "_fused_adam", "adamw", "lerp"),
    "norms": ("rms_norm", "rsqrt", "layer_norm"),
    "softmax and sampling": (
        "softmax", "logsumexp", "cumsum", "multinomial", "searchsorted", "sort", "argmax", "topk",
    ),
    "copies and indexing": (
        "copy", "cat", "index", "clone", "contiguous", "repeat", "roll", "fill", "embedding",
        "pad", "gather", "scatter", "where", "nonzero", "isin", "stack", "zero",
    ),
}  # fmt: skip
"""Kind of operator -> parts of names; the first that fits counts."""


class Rates:
    """Seconds that this machine takes for the matrix products of a model, measured when asked for.

    Args:
        shape: the model.
        dtype, device: of the weights.
        read: the clock.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, read: Reader) -> None:
        self.shape = shape
        self._read = read
        self._device = device
        self._dtype = dtype
        # All layers have weights of their own: a large model's do not fit any cache.
        self._layers = [self._draw(*size) for _ in range(shape.layers) for size in shape.products]
        self._head = [self._draw(shape.vocabulary, shape.hidden)]
        self._known: dict[tuple[str, bool, int], float] = {}

    def _draw(self, *size: int) -> Tensor:
        return torch.randn(size, dtype=self._dtype, device=self._device)

    def _seconds(self, part: str, backward: bool, rows: int) -> float:
        """Between measured numbers of rows, times are interpolated."""
        if rows >= CAP:
            return self._measured(part, backward, CAP) * rows / CAP
        above = next(i for i, size in enumerate(GRID) if size > rows)
        low, high = GRID[above - 1], GRID[above]
        times = [self._measured(part, backward, size) for size in (low, high)]
        return times[0] + (times[1] - times[0]) * (rows - low) / (high - low)

    def _measured(self, part: str, backward: bool, rows: int) -> float:
        key = (part, backward, rows)
        if key not in self._known:
            weights = self._layers if part == "layers" else self._head
            draw = {n: self._draw(rows, n) for n in {n for w in weights for n in w.shape}}
            # Results go to memory that exists: fresh pages cost more than the product itself.
            room = {n: torch.empty_like(x) for n, x in draw.items()}
            grads = {w.shape: torch.empty_like(w) for w in weights}

            def forward() -> None:
                for w in weights:
                    torch.mm(draw[w.shape[1]], w.t(), out=room[w.shape[0]])

            def gradients() -> None:
                for w in weights:
                    torch.mm(draw[w.shape[0]], w, out=room[w.shape[1]])
                    torch.mm(draw[w.shape[0]].t(), draw[w.shape[1]], out=grads[w.shape])

            self._known[key] = shortest(gradients if backward else forward, self._read)
        return self._known[key]

    def seconds(self, work: Work, rows: int, *, backward: bool = False) -> float:
        """Least time for ``work`` in products of ``rows`` rows, attention at the layers' rate."""
        if work.tokens == 0:
            return 0.0
        layers = self._seconds("layers", backward, rows) * work.tokens / rows
        attention = work.pairs * self.shape.per_pair / (work.tokens * self.shape.per_token)
        head = self._seconds("head", backward, work.scored) if work.scored else 0.0
        return layers * (1 + attention) + head

    def rate(self, rows: int, *, backward: bool = False) -> float:
        """Operations per second of the layers' products at ``rows`` rows."""
        operations = rows * self.shape.per_token * (2 if backward else 1)
        return operations / self._seconds("layers", backward, rows)


def shortest(call: Callable[[], None], read: Reader, budget: float = 0.02) -> float:
    """Shortest seconds of at least 3 calls, repeated for about ``budget`` seconds."""
    found: list[float] = []
    with torch.inference_mode():
        call()
        while len(found) < 3 or sum(found) < budget:
            begun = read()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found.append(read() - begun)
    return min(found)


def generation_floor(step: Step, group: int, rates: Rates) -> float:
    """Least seconds for the step's rollouts: prompts in one pass, then one pass per token."""
    prompts = step.prompts[::group]
    total = rates.seconds(rollout_work(prompts, [1] * len(prompts), 1), sum(prompts))
    for rows, pairs in decode_passes(step.prompts, step.completions):
        total += rates.seconds(Work(rows, pairs, rows), rows)
    return total


def training_floor(step: Step, group: int, rates: Rates) -> float:
    """Least seconds for the gradient of the step's rollouts, in passes of the best size."""
    work = training_work(step, group)
    sizes = [size for size in GRID if size <= work.tokens]
    if not sizes:
        return 0.0
    return sum(
        min(rates.seconds(work, size, backward=back) for size in sizes) for back in (False, True)
    )


def training_work(step: Step, group: int) -> Work:
    """The forward pass over rows with an advantage, prompts shared."""
    kept = trained_rows(step.rewards, group)
    prompts = [p for p, keep in zip(step.prompts, kept, strict=True) if keep]
    completions = [c for c, keep in zip(step.completions, kept, strict=True) if keep]
    return rollout_work(prompts, completions, group)


def needed(step: Step, group: int, shape: Shape) -> dict[str, float]:
    """Operations that each part needs at least."""
    generated = rollout_work(step.prompts, step.completions, group).operations(shape)
    return {"generation": generated, "training": 3 * training_work(step, group).operations(shape)}


def floors(step: Step, group: int, rates: Rates) -> dict[str, float]:
    """Least seconds of each part."""
    return {
        "generation": generation_floor(step, group, rates),
        "training": training_floor(step, group, rates),
    }


def part(values: Mapping[str, float], name: str) -> float:
    """Sum of a measurement by phase over the phases of a part."""
    return sum(values[phase] for phase in PARTS[name])


def counter() -> FlopCounterMode:
    """Counts the operations that run, attention on CPU included."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        },
    )


def _attention(*shapes: Any, **_: Any) -> int:
    return int(sdpa_flop_count(*shapes[:3]))


def _attention_backward(*shapes: Any, **_: Any) -> int:
    return int(sdpa_backward_flop_count(*shapes[:4]))


def executed(side: Side, setup: Setup, stock: Stock, folder: Path) -> list[Step]:
    """The steps of a run with operations in place of seconds."""
    with counter() as mode:
        return run(side, setup, stock, folder, read=mode.get_total_flops)


def kind_of(name: str) -> str:
    """Kind of an operator, ``elementwise`` if its name fits no other."""
    low = name.lower()
    return next((k for k, keys in KINDS.items() if any(key in low for key in keys)), "elementwise")


def time_by_kind(side: Side, setup: Setup, stock: Stock, folder: Path) -> dict[str, Counter[str]]:
    """Microseconds of host time in step 2 by part and kind of operator.

    What a phase spends outside of operators is ``Python``; on a GPU that includes waiting for it.
    """
    trace = profile(activities=[ProfilerActivity.CPU])

    def after(step: int, *_: Any) -> bool:
        if step == 1:
            trace.start()
        else:
            trace.stop()
        return step == 2

    run(side, setup, stock, folder, after, mark=True)
    times: dict[str, Counter[str]] = defaultdict(Counter)
    owners = {phase: name for name, phases in PARTS.items() for phase in phases}
    for event in trace.events():
        owner = event
        while owner is not None and not owner.name.startswith(Clock.MARK):
            owner = owner.cpu_parent
        phase = owner.name.removeprefix(Clock.MARK) if owner is not None else ""
        kind = "Python" if owner is event else kind_of(event.name)
        times[owners.get(phase, "other")][kind] += event.self_cpu_time_total
    return times


def floor_rows(
    steps: Mapping[Side, Sequence[Step]],
    ran: Mapping[Side, Sequence[Step]],
    group: int,
    rates: Rates,
) -> list[tuple[str, ...]]:
    """(side and part, needed, executed / needed, floor, measured, quotient): medians over steps.

    Args:
        steps: what was timed.
        ran: what was counted, ``executed``.
        group: rollouts per prompt.
        rates: of this machine.
    """
    rows: list[tuple[str, ...]] = []
    for side, name in itertools.product(SIDES, PARTS):
        least = [needed(step, group, rates.shape)[name] / 1e9 for step in steps[side]]
        extra = [part(s.seconds, name) / needed(s, group, rates.shape)[name] for s in ran[side]]
        floor = [floors(step, group, rates)[name] for step in steps[side]]
        took = [part(step.seconds, name) for step in steps[side]]
        quotients = [t / f for t, f in zip(took, floor, strict=True)]
        columns = zip((least, extra, floor, took, quotients), (2, 2, 3, 3, 1), strict=True)
        shown = (f"{statistics.median(values):.{digits}f}" for values, digits in columns)
        rows.append((f"{NAMES[side]}, {name}", *shown))
    return rows


def saving_rows(steps: Sequence[Step], group: int, shape: Shape) -> list[tuple[str, ...]]:
    """(way to compute the gradient, operations, times what is needed): medians over steps."""
    ways: dict[str, Callable[[Step], Work]] = {
        "rows with an advantage, prompts shared": lambda s: training_work(s, group),
        "all rows, prompts shared": lambda s: rollout_work(s.prompts, s.completions, group),
        "every row with its prompt": lambda s: rollout_work(s.prompts, s.completions, 1),
        "padded to the longest of the batch": lambda s: padded_work(
            s.prompts, s.completions, False
        ),
        "the same, LM head everywhere": lambda s: padded_work(s.prompts, s.completions, True),
    }
    costs = {
        way: statistics.median(3 * work(step).operations(shape) for step in steps)
        for way, work in ways.items()
    }
    least = next(iter(costs.values()))
    return [(way, f"{cost / 1e9:.2f}", f"{cost / least:.2f}") for way, cost in costs.items()]


def kind_rows(times: Mapping[Side, Mapping[str, Counter[str]]]) -> list[tuple[str, ...]]:
    """(kind, share of the part's profiled time for each side and part)."""
    columns = [times[side][name] for side in SIDES for name in PARTS]
    totals = [sum(column.values()) for column in columns]
    kinds = [*KINDS, "elementwise", "Python"]
    return [
        (
            kind,
            *(f"{100 * c[kind] / total:.0f} %" for c, total in zip(columns, totals, strict=True)),
        )
        for kind in kinds
        if any(c[kind] for c in columns)
    ]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Count, measure and print; returns the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    arguments = parse(parser, argv)
    setup = build_setup(arguments)
    group = setup.config.train.rollouts
    print_origin()
    stock = stock_candidates(setup, arguments)[0]
    read = CLOCKS[arguments.clock]
    steps: dict[Side, list[Step]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for repeat in range(arguments.repeats):
            config = replace(setup.config, seed=setup.config.seed + repeat)
            for side in SIDES:
                steps[side] += run(side, replace(setup, config=config), stock, folder, read=read)[
                    1:
                ]
                gc.collect()
        ran = {side: executed(side, setup, stock, folder)[1:] for side in SIDES}
        kinds = {side: time_by_kind(side, setup, stock, folder) for side in SIDES}
    gc.collect()
    dtype = torch.bfloat16 if arguments.dtype == "bfloat16" else torch.float32
    rates = Rates(Shape.of(setup.make()[0].config), dtype, arguments.device, read)
    table, shares = floor_rows(steps, ran, group, rates), kind_rows(kinds)
    sizes = sorted({1, group, setup.config.train.batch_size, CAP})
    shown = ", ".join(f"{rates.rate(rows) / 1e9:.0f} at {rows} rows" for rows in sizes)
    back = f"{rates.rate(CAP, backward=True) / 1e9:.0f} at {CAP} rows"
    print(f"products of the layers, GFLOP/s: {shown}; backward {back}. Stock runs with {stock}.\n")
    head = ("needed, GFLOP", "executed / needed", "floor, s", "measured, s", "measured / floor")
    print_table(table, ("median of a step", *head), arguments.markdown)
    print()
    savings = saving_rows(steps["stock"], group, rates.shape)
    print_table(savings, ("the stock's rollouts, training", "GFLOP", "times"), arguments.markdown)
    print()
    columns = [f"{NAMES[side]}, {name}" for side in SIDES for name in PARTS]
    print_table(shares, ("share of host time", *columns), arguments.markdown)
    return {"floors": table, "savings": savings, "kinds": kinds}


if __name__ == "__main__":
    main()
