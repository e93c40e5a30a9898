"""GRPO steps of ``rlkit`` and of stock TRL, in turn in one process: time by phase, and to accuracy.

    python benchmarks/step.py --task chain
    python benchmarks/step.py --task chain --learn --seeds 3
    python benchmarks/step.py --shape 0.5b --prompts 2 --rollouts 8 --budget 48 --steps 1

Both sides start from the same weights, see the same problems in the same order and are paid by the
same reward; that their gradients are equal on the same rollouts is checked first. Machines are
shared and noisy, so ratios of neighbouring blocks are reported, with their spread over the repeats.
docs/benchmarks.md says what each number means.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _cases import add_arguments, build_setup, parse, print_origin, print_table, stock_candidates
from _clock import CLOCKS, PHASES, Reader, Step
from _gradients import Gap, gradient_gap
from _stock import SIDES, Setup, Side, Stock, run
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlkit import rewards, tasks, templates
from rlkit.engine import Engine, Sampling

EXACT = 1e-5
"""Gradients of the two sides on the same rollouts may differ by this share of their norm."""


@dataclass(frozen=True)
class Spread:
    """Median and range of a ratio over repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


Block = dict[Side, list[Step]]
"""The steps of both sides in one repeat."""


def seconds(step: Step, phase: str) -> float:
    """Wall seconds of a phase, or of the whole step."""
    return step.total if phase == "step" else step.seconds[phase]


def ratio(blocks: Sequence[Block], phase: str) -> Spread:
    """Stock's time over ours: one quotient per repeat, of the sums over its steps."""
    sums = [[sum(seconds(step, phase) for step in b[side]) for side in SIDES] for b in blocks]
    return Spread.of([stock / ours for ours, stock in sums])


def tokens_per_second(block: Block, side: Side, phase: str) -> float:
    """Completion tokens of a repeat over the time it spent in a phase."""
    tokens = sum(sum(step.completions) for step in block[side])
    return tokens / sum(seconds(step, phase) for step in block[side])


def phase_rows(blocks: Sequence[Block]) -> list[tuple[str, ...]]:
    """(what, ours, stock, ratio): times by phase, then token rates; medians over all steps."""
    rows = []
    for phase in (*PHASES, "step"):
        times = [
            statistics.median(seconds(step, phase) for block in blocks for step in block[side])
            for side in SIDES
        ]
        rows.append((f"{phase}, s", *(f"{t:.3f}" for t in times), str(ratio(blocks, phase))))
    for phase in ("generation", "step"):
        rates = [[tokens_per_second(block, side, phase) for block in blocks] for side in SIDES]
        quotients = Spread.of([ours / stock for ours, stock in zip(*rates, strict=True)])
        medians = [statistics.median(values) for values in rates]
        shown = (f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}" for rate in medians)
        rows.append((f"tokens/s of {phase}", *shown, str(quotients)))
    return rows


def first_of_two(curve: Sequence[tuple[int, float]], goal: float) -> int | None:
    """Step of the first of two consecutive evaluations at or above ``goal``, None without."""
    for (step, value), (_, after) in itertools.pairwise(curve):
        if value >= goal and after >= goal:
            return step
    return None


def measure(
    setup: Setup, stock: Stock, folder: Path, repeats: int, read: Reader = time.perf_counter
) -> list[Block]:
    """Run both sides in turn; the first step of every block warms up and is left out.

    Repeat r uses seed + r on both sides: other problems, other samples, the same start weights.
    """
    blocks = []
    for repeat in range(repeats):
        config = replace(setup.config, seed=setup.config.seed + repeat)
        block: Block = {}
        for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
            block[side] = run(side, replace(setup, config=config), stock, folder, read=read)[1:]
            gc.collect()  # a trainer is full of cycles, and its model may be large
        blocks.append(block)
    return blocks


def fastest(setup: Setup, candidates: Sequence[Stock], folder: Path, read: Reader) -> Stock:
    """The stock settings with the shortest median step, all on the same one to three steps."""
    steps = min(setup.config.train.steps, 4)
    config = replace(setup.config, train=replace(setup.config.train, steps=steps))
    times = {}
    for stock in candidates:
        block = run("stock", replace(setup, config=config), stock, folder, read=read)[1:]
        times[stock] = statistics.median(step.total for step in block)
        gc.collect()
        print(f"stock with {stock}: {times[stock]:.3f} s per step", flush=True)
    return min(times, key=lambda stock: times[stock])


@dataclass(frozen=True)
class Learned:
    """How long a side took to reach the goal; None if it did not."""

    seconds: float | None
    steps: int | None
    curve: tuple[tuple[int, float], ...]


def learn(
    side: Side,
    setup: Setup,
    stock: Stock,
    folder: Path,
    *,
    goal: float,
    every: int,
    held_out: int,
    read: Reader = time.perf_counter,
) -> Learned:
    """Train until two consecutive greedy evaluations reach ``goal``; evaluation is not timed."""
    config = setup.config
    rows = tasks.load_problems(config.task.task, "validation", held_out)
    curve: list[tuple[int, float]] = []

    def after(step: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
        if step % every:
            return False
        prompts = templates.encode(rows, tokenizer, config.task.template)
        greedy = Sampling(config.sampling.max_completion_length, greedy=True)
        keys = [0] * len(rows)  # greedy decoding draws nothing
        groups = Engine(model, tokenizer).generate(prompts, greedy, n=1, keys=keys)
        right = [rewards.is_correct(c, row) for (c,), row in zip(groups, rows, strict=True)]
        curve.append((step, sum(right) / len(right)))
        return first_of_two(curve, goal) is not None

    steps = run(side, setup, stock, folder, after, read=read)
    reached = first_of_two(curve, goal)
    spent = None if reached is None else sum(step.total for step in steps[:reached])
    return Learned(spent, reached, tuple(curve))


def learn_rows(results: Mapping[int, Mapping[Side, Learned]]) -> list[tuple[str, ...]]:
    """(seed, ours, stock, ratio of seconds, of steps, of seconds per step), last row all seeds.

    The two sides draw different rollouts, so they need different numbers of steps by chance; the
    last two columns, whose product is the one before, tell chance from speed.
    """
    rows: list[tuple[str, ...]] = []
    ratios: list[tuple[float, float, float]] = []
    for seed, sides in results.items():
        shown, spent, steps = [], [], []
        for side in SIDES:
            found = sides[side]
            if found.seconds is None or found.steps is None:
                shown.append(f"not in {found.curve[-1][0]} steps")
            else:
                shown.append(f"{found.seconds:.1f} ({found.steps} steps)")
                spent.append(found.seconds)
                steps.append(found.steps)
        quotients: tuple[str, ...] = ("", "", "")
        if len(spent) == len(SIDES):
            times, counts = spent[1] / spent[0], steps[1] / steps[0]
            ratios.append((times, counts, times / counts))
            quotients = tuple(f"{value:.2f}" for value in ratios[-1])
        rows.append((str(seed), *shown, *quotients))
    if ratios:
        spreads = (str(Spread.of(column)) for column in zip(*ratios, strict=True))
        rows.append(("median", "", "", *spreads))
    return rows


def check_gradients(setup: Setup, stock: Stock, folder: Path) -> Gap:
    """The gap of ``gradient_gap``; SystemExit if it is more than rounding."""
    gap = gradient_gap(setup, stock, folder)
    print(
        f"gradients on the same rollouts: relative difference {gap.whole:.1e}, of one parameter at "
        f"most {gap.worst:.1e} ({gap.name})\n",
        flush=True,
    )
    if not gap.whole < EXACT:
        raise SystemExit(f"the sides compute different gradients: {gap.whole:.1e} >= {EXACT:g}")
    gc.collect()
    return gap


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print; returns what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--learn", action="store_true", help="time to greedy accuracy instead")
    parser.add_argument("--learn-steps", type=int, default=80, help="at most; of the schedule")
    parser.add_argument("--goal", type=float, default=0.95)
    parser.add_argument("--seeds", type=int, default=3, help="with --learn")
    parser.add_argument("--every", type=int, default=5, help="steps between evaluations")
    parser.add_argument("--held-out", type=int, default=64, help="problems of an evaluation")
    arguments = parse(parser, argv)
    if arguments.learn:
        arguments.steps = arguments.learn_steps
    setup = build_setup(arguments)
    print_origin()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        candidates = stock_candidates(setup, arguments)
        read = CLOCKS[arguments.clock]
        gap = check_gradients(setup, candidates[-1], folder)
        stock = fastest(setup, candidates, folder, read) if len(candidates) > 1 else candidates[0]
        print(f"stock runs with {stock}\n", flush=True)
        head = ("rlkit", "stock TRL", "stock / rlkit")
        if not arguments.learn:
            blocks = measure(setup, stock, folder, arguments.repeats, read)
            print_table(phase_rows(blocks), ("median", *head), arguments.markdown)
            return {"gap": gap, "stock": stock, "blocks": blocks}
        results: dict[int, dict[Side, Learned]] = {}
        options = {"goal": arguments.goal, "every": arguments.every, "held_out": arguments.held_out}
        for seed in range(arguments.seed, arguments.seed + arguments.seeds):
            seeded = replace(setup, config=replace(setup.config, seed=seed))
            results[seed] = {
                side: learn(side, seeded, stock, folder, read=read, **options)
                for side in (SIDES if seed % 2 == 0 else SIDES[::-1])
            }
            for side in SIDES:
                print(f"seed {seed}, {side}: {results[seed][side].curve}", flush=True)
        columns = (f"seconds to greedy {arguments.goal:g}, seed", *head, "steps", "per step")
        print_table(learn_rows(results), columns, arguments.markdown)
        return {"gap": gap, "stock": stock, "results": results}


if __name__ == "__main__":
    main()
