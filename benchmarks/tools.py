r"""Responses that call a tool: ``rlkit.tools`` and the usual loop, in turn in one process.

    python benchmarks/tools.py --markdown
    python benchmarks/tools.py --case long --markdown

The usual loop (TRL's, for one) writes until every row has ended or closed a block, runs the
programs one after the other, appends what they print, and reads all texts again from their first
token. Here rows keep their cache, and programs run beside each other and beside rows that go on.

All sides draw the same random number for the same place of the same row, so they write the same
texts, which is checked; a draw next to the border between two tokens may fall to the other side, as
batches of other shapes differ in their last digits. Such rows are counted.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from _cases import parse, print_origin, print_table, random_model
from _stock import Model
from _turns import Draws, Run, Turn, TurnEngine, Written, by_subprocess, by_turns, generating

from rlkit import models, tasks, templates
from rlkit.config import ModelConfig
from rlkit.engine import Engine, Sampling, row_streams, stable_key
from rlkit.sandbox import Limits, PythonExecutor
from rlkit.tool_config import Rejoin, ToolConfig
from rlkit.tools import Block, Tools

READY, BARRIER = "rlkit, ready", "rlkit, barrier"
PARALLEL, SERIAL = "engine by turns, programs at once", "engine by turns, one by one"
TRL, COMMON = "generate by turns, one by one", "generate by turns, python -c one by one"
SIDES = (READY, BARRIER, PARALLEL, SERIAL, TRL, COMMON)
BAR = 3.0
"""Completed responses per second, ours over the usual loop's."""
LONG_SHAPE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip
"""Of the model of the long case; weights are drawn at random."""
LONG_CALLS = 4
PROGRAMS = {
    "sleep": "import time\ntime.sleep({seconds})\nprint({a} * {b})",
    "cpu": """import time
start = time.process_time()
while time.process_time() - start < {seconds}:
    pass
print({a} * {b})""",
}
SAME = 15 / 16
"""Share of rows that have to be the same as ours on every side."""


@dataclass(frozen=True)
class Case:
    """What all sides share.

    Attributes:
        name: ``large`` or ``long``.
        model: policy and tokenizer.
        problems: rows of a task.
        template: of the prompts.
        n: responses to each problem.
        budget: tokens of a response, outputs included.
        programs: work and bounds of the seconds of a scripted program; None where the policy
            writes itself.
    """

    name: str
    model: Model
    problems: list[dict[str, Any]]
    template: str
    n: int
    budget: int
    programs: tuple[str, float, float] | None = None


@dataclass(frozen=True)
class Measured:
    """One side in one round; ``same``: rows that are exactly as ours."""

    seconds: float
    written: Written
    same: int


def make_case(arguments: argparse.Namespace) -> Case:
    """From the command line."""
    model, tokenizer = models.load_policy(ModelConfig(model=arguments.model))
    problems = tasks.load_problems("large", "validation", arguments.prompts)
    if arguments.case == "large":
        return Case(
            "large", (model.eval(), tokenizer), problems, "question", arguments.rollouts, 200
        )
    made = random_model(LONG_SHAPE, tokenizer, len(tokenizer))
    programs = (arguments.work, *arguments.seconds)
    return Case("long", made, problems, "code", arguments.rollouts, 900, programs)


def script(case: Case, tools: Tools, seed: int) -> np.ndarray | None:
    """What each row writes [rows, longest], outputs included and padded with the end token.

    Each response is ``LONG_CALLS`` times a few lines with a program, its output, and an answer.
    """
    if case.programs is None:
        return None
    work, low, high = case.programs
    rng = random.Random(seed)
    rows = []
    for _ in range(len(case.problems) * case.n):
        ids: list[int] = []
        for call in range(LONG_CALLS):
            a, b = rng.randrange(1000, 10_000), rng.randrange(1000, 10_000)
            seconds = round(rng.uniform(low, high), 3)
            code = PROGRAMS[work].format(seconds=seconds, a=a, b=b)
            words = "I compute this part and check it. " * rng.randrange(1, 4)
            ids += tools.encode(f"Step {call + 1}: {words}\n```python\n{code}\n```")
            # The same product at once: what it prints does not depend on how long it takes.
            result = tools.executor.submit(f"print({a} * {b})").result()
            ids += tools.encode(tools.block(result, Block(code, "")))
        rows.append([*ids, *tools.encode(f"\\boxed{{{a * b}}}")])
    longest = max(map(len, rows)) + 1
    if longest > case.budget:
        raise RuntimeError(f"a scripted response has {longest} tokens, the budget {case.budget}")
    end = tools.tokenizer.eos_token_id
    return np.array([row + [end] * (longest - len(row)) for row in rows])


def ours(case: Case, tools: Tools, draws: Draws, rejoin: Rejoin) -> Written:
    """Responses by the tool loop."""
    prompts = templates.encode(case.problems, case.model[1], case.template)
    engine = Engine(*case.model)
    draws.begin(list(range(len(draws.streams))), [0] * len(draws.streams))
    with draws.used(), tools.loop(rejoin=rejoin) as loop:
        groups = engine.generate(
            prompts, Sampling(case.budget), n=case.n, keys=range(len(prompts)), tools=loop
        )
    flat = [completion for group in groups for completion in group]
    return Written(
        [list(c.token_ids) for c in flat],
        sum(sum(c.loss_mask) for c in flat),
        sum(len(c.tool_calls) for c in flat),
    )


def usual(case: Case, tools: Tools, draws: Draws, turn: Turn, run: Run) -> Written:
    """Responses by turns."""
    prompts = templates.encode(case.problems, case.model[1], case.template)
    rows = [prompt for prompt in prompts for _ in range(case.n)]
    with draws.used():
        return by_turns(rows, tools, draws, case.budget, turn, run)


def sides_of(
    case: Case, tools: Tools, executor: PythonExecutor, draws: Draws
) -> dict[str, Callable[[], Written]]:
    """Every side, ready to run once."""
    model, _ = case.model
    by_engine = TurnEngine(model, tools, case.budget).turn
    by_generate = generating(model, tools, draws)

    def one_by_one(codes: Sequence[str]) -> list[Any]:
        return [executor.run(code) for code in codes]

    subprocesses = functools.partial(by_subprocess, seconds=executor.limits.wall_seconds)
    by_turn: dict[str, tuple[Turn, Run]] = {
        PARALLEL: (by_engine, executor.run_all),
        SERIAL: (by_engine, one_by_one),
        TRL: (by_generate, one_by_one),
        COMMON: (by_generate, subprocesses),
    }
    return {
        READY: functools.partial(ours, case, tools, draws, "ready"),
        BARRIER: functools.partial(ours, case, tools, draws, "barrier"),
    } | {
        name: functools.partial(usual, case, tools, draws, turn, run)
        for name, (turn, run) in by_turn.items()
    }


def measure(case: Case, rounds: int, names: Sequence[str]) -> list[dict[str, Measured]]:
    """One value for each side and round, after a round to warm up; the order turns.

    Raises:
        RuntimeError: a side's texts are not ours in more than one row of sixteen, or not the
            script's in a single one.
    """
    found = []
    config = ToolConfig(tool="python", rejoin="ready")
    seconds = config.tool_seconds
    with PythonExecutor(Limits(cpu_seconds=seconds, wall_seconds=3 * seconds)) as executor:
        tools = Tools(executor, case.model[1], config)
        for at in range(-1, rounds):
            keys = [stable_key(at + 1, "benchmark", 0, p["problem_id"]) for p in case.problems]
            scripts = script(case, tools, at + 1)
            draws = Draws(row_streams(keys, case.n, 0), scripts)
            runs = sides_of(case, tools, executor, draws)
            turn = at % len(names)
            # Long responses warm up with ours alone: a whole round would double the time.
            order = (*names[turn:], *names[:turn]) if at >= 0 or scripts is None else (READY,)
            timed = {}
            for name in order:
                start = time.perf_counter()
                written = runs[name]()
                timed[name] = (time.perf_counter() - start, written)
            right = timed[READY][1].ids
            if scripts is not None:
                check_script(right, scripts, case.model[1].eos_token_id)
            round_ = {n: Measured(s, w, same_rows(n, w.ids, right)) for n, (s, w) in timed.items()}
            if at >= 0:
                found.append(round_)
                spent = ", ".join(f"{n}: {round_[n].seconds:.2f} s" for n in names)
                print(f"round {at + 1}, {spent}", file=sys.stderr, flush=True)
    return found


def check_script(ids: Sequence[Sequence[int]], scripts: np.ndarray, end: int) -> None:
    """Stop unless every row is the script up to its end token."""
    for row, (mine, line) in enumerate(zip(ids, scripts.tolist(), strict=True)):
        if list(mine) != line[: line.index(end) + 1]:
            raise RuntimeError(f"row {row} is not the scripted one")


def same_rows(name: str, ids: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> int:
    """How many rows are the same as ours; stops if too few are."""
    same = sum(a == b for a, b in zip(ids, right, strict=True))
    if same < SAME * len(right):
        raise RuntimeError(
            f"{name}: {len(right) - same} of {len(right)} texts differ from ours; expected near "
            "ties alone"
        )
    return same


@dataclass(frozen=True)
class Ratio:
    """Seconds of a side over ours, neighbours in one round."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(found: Sequence[dict[str, Measured]], name: str) -> Ratio:
    """Median and range over the rounds of how often ``READY`` goes into a side's time."""
    each = [one[name].seconds / one[READY].seconds for one in found]
    return Ratio(statistics.median(each), min(each), max(each))


def table(found: Sequence[dict[str, Measured]]) -> list[tuple[str, ...]]:
    """(side, responses/s, policy tokens/s, side's time / ours, texts that differ)."""
    rows = []
    for name in found[0]:
        done = [one[name] for one in found]
        rates = [len(m.written.ids) / m.seconds for m in done]
        tokens = [m.written.policy_tokens / m.seconds for m in done]
        differ = sum(len(m.written.ids) - m.same for m in done)
        total = sum(len(m.written.ids) for m in done)
        rows.append((
            name, f"{statistics.median(rates):.2f}", f"{statistics.median(tokens):.0f}",
            str(ratio(found, name)), f"{differ} of {total}",
        ))  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print; returns what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=("large", "long"), default="large")
    parser.add_argument("--model", default="tiny-tool", help="a model of data/models or a folder")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=4)
    parser.add_argument("--work", choices=PROGRAMS, default="sleep", help="of the long case")
    parser.add_argument(
        "--seconds", type=float, nargs=2, default=(0.05, 0.3), help="bounds, of the long case"
    )
    parser.add_argument("--sides", type=int, nargs="+", help=f"numbers of {SIDES}, 0 among them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch; default all cores")
    parser.add_argument("--markdown", action="store_true")
    arguments = parse(parser, argv)
    names = tuple(SIDES[i] for i in sorted({0, *(arguments.sides or range(len(SIDES)))}))
    print_origin()
    case = make_case(arguments)
    found = measure(case, arguments.rounds, names)
    last = found[-1][READY].written
    rows = len(last.ids)
    print(
        f"{rows} rows, in the last round {sum(map(len, last.ids)) / rows:.0f} tokens a row, of "
        f"them {last.policy_tokens / rows:.0f} by the policy, and {last.calls} calls.\n"
    )
    head = (f"{case.name}, median", "responses/s", "policy tokens/s", "time / ready", "differ")
    ordered = [{name: one[name] for name in names} for one in found]
    print_table(table(ordered), head, arguments.markdown)
    if TRL in names:
        least = ratio(found, TRL)
        print(f"\nBar, {TRL} / {READY}: at least {BAR:g}: {least}", end=", ")
        print("met" if least.median >= BAR else "NOT MET")
    return {"case": case, "rounds": ordered}


if __name__ == "__main__":
    main()
