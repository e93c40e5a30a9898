r"""Running model-written Python: ``rlkit.sandbox`` and what others use, in turn in one run.

    python benchmarks/executor.py --markdown

*Latency*: one run at a time of two programs and of two cells in a live session. Each round runs
every candidate once, the order turns; a ratio is of one round, a subprocess over the candidate.
*Throughput*: runs per second with so many in flight. *Load*: programs that need less CPU time than
their limit, many more at once than there are cores: how many come to their end.

smolagents and pebble are no dependencies of rlkit; they are measured where they can be imported.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
import io
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.sandbox import Limits, PythonExecutor

# No torch in this process: pools are forked from it, and a large process forks slowly.

SYMPY = "import sympy; x=sympy.symbols('x'); print(sympy.solve(x**2-2))"
PROGRAMS = {"print": ("print(1+1)", "2"), "solve": (SYMPY, "[-sqrt(2), sqrt(2)]")}
"""Name of a program: its text, and what it prints."""
CELLS = {"print": "print(1+1)", "solve": "print(sympy.solve(x**2-2))"}
BURN = """import time
start = time.process_time()
while time.process_time() - start < {seconds}:
    pass
print('done')"""
BURN_SECONDS, LIMIT_SECONDS = 0.4, 1.0
SETTLE_SECONDS = 0.03
"""Rest after each run: what one candidate tears down is not paid for by the next."""

SUBPROCESS, BARE = "subprocess", "subprocess, -I -S"
OURS, SESSION, ROW = "rlkit", "rlkit, session cell", "rlkit, session cell in a row"
ROW_CELLS = 10
"""Cells one after the other, as a median for one value: without the rest after each."""
SMOLAGENTS, JUPYTER, POOL = "smolagents", "Jupyter cell", "pool for each call"
Run = Callable[[str], str]
"""Runs a program by name and gives what it printed."""


def _printed(code: str) -> str:
    """Stdout of ``code``, executed in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    return out.getvalue()


def by_subprocess(name: str) -> str:
    """The program as a process of its own, importing what it needs."""
    return _output([sys.executable, "-c", PROGRAMS[name][0]])


def by_bare_subprocess(name: str) -> str:
    """The same without start-up files: what an environment adds to each start is left out.

    An editable install alone may double the time of a print.
    """
    spec = importlib.util.find_spec("sympy")
    assert spec is not None and spec.origin is not None
    head = f"import sys; sys.path.append({str(Path(spec.origin).parents[1])!r}); "
    return _output([sys.executable, "-I", "-S", "-c", head + PROGRAMS[name][0]])


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def by_pool(codes: Sequence[str]) -> list[str]:
    """A pool of processes made for these programs alone, as STILL-3 and ToRA do.

    https://github.com/RUCAIBox/Slow_Thinking_with_LLMs. With pebble as there, otherwise with the
    standard library. The processes are forked, so they find sympy imported already.
    """
    workers = min(len(codes), os.cpu_count() or 1)
    if importlib.util.find_spec("pebble"):
        from pebble import ProcessPool

        with ProcessPool(max_workers=workers) as pool:
            return list(pool.map(_printed, codes, timeout=60).result())
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(pool.map(_printed, codes))


def by_smolagents(name: str) -> str:
    """A new interpreter of syntax trees in this process."""
    from smolagents.local_python_executor import LocalPythonExecutor

    executor = LocalPythonExecutor(["sympy"])
    executor.send_tools({})
    return executor(PROGRAMS[name][0]).logs


@contextlib.contextmanager
def jupyter() -> Iterator[Run]:
    """Cells of one kernel that has imported sympy."""
    from jupyter_client import KernelManager

    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = manager.blocking_client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=60)

        def run(code: str) -> str:
            texts: list[str] = []

            def keep(message: dict[str, Any]) -> None:
                if message["msg_type"] == "stream":
                    texts.append(message["content"]["text"])

            reply = client.execute_interactive(code, timeout=60, output_hook=keep)
            if reply["content"]["status"] != "ok":
                raise RuntimeError(f"the kernel answered {reply['content']}")
            return "".join(texts)

        run(SYMPY)
        yield lambda name: run(CELLS[name])
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@contextlib.contextmanager
def candidates(executor: PythonExecutor) -> Iterator[dict[str, Run]]:
    """All that can be measured here; a line about each that cannot."""
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(executor.session())
        session.run(SYMPY)
        found: dict[str, Run] = {
            SUBPROCESS: by_subprocess,
            BARE: by_bare_subprocess,
            OURS: lambda name: executor.run(PROGRAMS[name][0]).stdout,
            POOL: lambda name: by_pool([PROGRAMS[name][0]])[0],
            SESSION: lambda name: session.run(CELLS[name]).stdout,
        }
        if importlib.util.find_spec("jupyter_client") and importlib.util.find_spec("ipykernel"):
            found[JUPYTER] = stack.enter_context(jupyter())
        else:
            print("No Jupyter cells: pip install jupyter_client ipykernel to measure them.")
        if importlib.util.find_spec("smolagents"):
            found[SMOLAGENTS] = by_smolagents
        else:
            print("smolagents is left out: pip install smolagents to measure it.")
        if importlib.util.find_spec("pebble"):
            print("The pool for each call is pebble's ProcessPool.")
        else:
            print(
                "The pool for each call is concurrent.futures.ProcessPoolExecutor: "
                "pip install pebble to measure the one that STILL-3 uses."
            )
        yield found


def latencies(runs: dict[str, Run], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds by program and candidate, one a round, after one round to warm up.

    Raises:
        RuntimeError: a candidate printed something else than the program does.
    """
    names = list(runs)
    found: dict[str, dict[str, list[float]]] = {p: {n: [] for n in names} for p in PROGRAMS}

    def timed(name: str, program: str, right: str) -> float:
        start = time.perf_counter()
        printed = runs[name](program)
        took = 1e3 * (time.perf_counter() - start)
        check(name, program, printed, right)
        return took

    for at in range(-1, rounds):
        for program, (_, right) in PROGRAMS.items():
            turn = at % len(names)
            for name in names[turn:] + names[:turn]:
                took = timed(name, program, right)
                if at >= 0:
                    found[program][name].append(took)
                if at >= 0 and name == SESSION:
                    row = [timed(name, program, right) for _ in range(ROW_CELLS)]
                    found[program].setdefault(ROW, []).append(statistics.median(row))
                time.sleep(SETTLE_SECONDS)
    return found


def check(name: str, program: str, printed: str, right: str) -> None:
    """Stop if a run did not do its work."""
    if printed.strip() != right:
        raise RuntimeError(f"{name}, {program}: printed {printed!r}, expected {right!r}")


def in_flight(executor: PythonExecutor, at_once: int, runs: int, program: str) -> float:
    """Runs per second with ``at_once`` of them submitted and not finished."""
    code, right = PROGRAMS[program]
    places = threading.Semaphore(at_once)
    futures: list[Future[Any]] = []
    start = time.perf_counter()
    for _ in range(runs):
        places.acquire()
        futures.append(executor.submit(code))
        futures[-1].add_done_callback(lambda _: places.release())
    results = [future.result() for future in futures]
    rate = runs / (time.perf_counter() - start)
    for result in results:
        check(OURS, program, result.stdout, right)
    return rate


def batch(candidate: str, size: int, program: str) -> float:
    """Runs per second of a batch: threads that wait for subprocesses, or one pool."""
    code, right = PROGRAMS[program]
    start = time.perf_counter()
    if candidate == SUBPROCESS:
        with ThreadPoolExecutor(size) as threads:
            printed = list(threads.map(by_subprocess, [program] * size))
    else:
        printed = by_pool([code] * size)
    rate = size / (time.perf_counter() - start)
    for text in printed:
        check(candidate, program, text, right)
    return rate


def throughputs(
    executor: PythonExecutor, rounds: int, levels: Sequence[int], runs: int, size: int
) -> dict[str, dict[str, list[float]]]:
    """Runs per second by program and way, one a round.

    Args:
        executor: ours.
        rounds: of every way in turn.
        levels: runs of ours in flight.
        runs: of ours for one value; as many as fly if those are more.
        size: of a batch of the others.
    """
    ways: dict[str, Callable[[str], float]] = {
        flying(n): functools.partial(in_flight, executor, n, max(runs, n)) for n in levels
    }
    for name in (SUBPROCESS, POOL):
        ways[f"{name}, batch of {size}"] = functools.partial(batch, name, size)
    found: dict[str, dict[str, list[float]]] = {p: {way: [] for way in ways} for p in PROGRAMS}
    names = list(ways)
    for at in range(rounds):
        for program in PROGRAMS:
            turn = at % len(names)
            for name in names[turn:] + names[:turn]:
                found[program][name].append(ways[name](program))
                time.sleep(SETTLE_SECONDS)
    return found


def flying(count: int) -> str:
    """Name of a throughput of ours."""
    return f"{OURS}, {count} in flight"


def under_load(runs: int) -> dict[str, int]:
    """Of ``runs`` at once, each well below its limit, how many come to their end.

    The limit of ours is CPU time; ``subprocess.run(timeout=...)`` can only limit elapsed time.
    """
    code = BURN.format(seconds=BURN_SECONDS)
    with PythonExecutor(Limits(cpu_seconds=LIMIT_SECONDS)) as executor:
        ours = [
            result.ok and result.stdout == "done\n" for result in executor.run_all([code] * runs)
        ]

    def one(_: int) -> bool:
        try:
            done = subprocess.run(
                [sys.executable, "-c", code],
                capture_output=True,
                text=True,
                check=True,
                timeout=LIMIT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.stdout == "done\n"

    with ThreadPoolExecutor(runs) as threads:
        theirs = list(threads.map(one, range(runs)))
    return {OURS: sum(ours), SUBPROCESS: sum(theirs), "runs": runs}


def ratios(base: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How often ``other`` goes into ``base``: by medians, by minima, and the range over rounds."""
    each = [b / o for b, o in zip(base, other, strict=True)]
    return {
        "medians": statistics.median(base) / statistics.median(other),
        "minima": min(base) / min(other),
        "low": min(each),
        "high": max(each),
    }


@dataclass(frozen=True)
class Bar:
    """What rlkit promises, and what was measured.

    Attributes:
        name: the promise in words, with its number.
        value: what was measured.
        met: whether it holds.
    """

    name: str
    value: float
    met: bool


def bars(
    times: dict[str, dict[str, list[float]]],
    rates: dict[str, dict[str, list[float]]],
    levels: Sequence[int],
    load: dict[str, int],
) -> list[Bar]:
    """Every promise with its measured value."""
    fresh = {p: ratios(times[p][SUBPROCESS], times[p][OURS]) for p in PROGRAMS}
    cell = statistics.median(times["print"][ROW])
    few, most = levels[len(levels) // 2], levels[-1]
    many = ratios(rates["print"][flying(most)], rates["print"][flying(few)])["medians"]
    return [
        Bar(
            "fresh print, subprocess / rlkit by medians: at least 3",
            fresh["print"]["medians"],
            fresh["print"]["medians"] >= 3,
        ),
        Bar(
            "fresh print, subprocess / rlkit by minima: at least 4.5",
            fresh["print"]["minima"],
            fresh["print"]["minima"] >= 4.5,
        ),
        Bar(
            "fresh sympy.solve, subprocess / rlkit by medians: at least 15",
            fresh["solve"]["medians"],
            fresh["solve"]["medians"] >= 15,
        ),
        Bar("session cell of print in a row, median ms: below 1", cell, cell < 1),
        Bar(f"prints per second, {most} in flight / {few}: at least 1", many, many >= 1),
        Bar(f"finished under load, of {load['runs']}: all", load[OURS], load[OURS] == load["runs"]),
    ]


def print_table(rows: Sequence[tuple[str, ...]], head: tuple[str, ...], markdown: bool) -> None:
    """A table for the terminal, or as Markdown."""
    if markdown:
        lines = [head, tuple("---" if i == 0 else "---:" for i in range(len(head))), *rows]
        print("\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    print()
    for line in (head, *rows):
        cells = [line[0].ljust(widths[0])]
        print("  ".join(cells + [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]))


def latency_rows(times: dict[str, list[float]]) -> list[tuple[str, ...]]:
    """(candidate, median and minimum in ms, ratio by medians with its range, by minima)."""
    rows = []
    for name, values in times.items():
        r = ratios(times[SUBPROCESS], values)
        rows.append((
            name,
            f"{statistics.median(values):.2f}",
            f"{min(values):.2f}",
            f"{r['medians']:.1f} ({r['low']:.1f} to {r['high']:.1f})",
            f"{r['minima']:.1f}",
        ))  # fmt: skip
    return rows


def origin(executor: PythonExecutor) -> dict[str, Any]:
    """What a table of numbers needs to be repeated; nothing about the user."""
    names = ("numpy", "sympy", "smolagents", "pebble", "jupyter_client", "ipykernel")
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": versions,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "level": executor.info.level,
        "layers": list(executor.info.layers),
        "command": " ".join(["python", "benchmarks/executor.py", *sys.argv[1:]]),
    }


def print_origin(found: dict[str, Any]) -> None:
    """The same in words."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    print(
        f"{found['date']}, Python {found['python']}, {versions}, {found['cores']} cores, load "
        f"{found['load_average']}, isolation {found['level']} ({', '.join(found['layers'])}).\n\n"
        f"    {found['command']}\n"
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print; returns what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="of latency; a third of throughput")
    parser.add_argument("--runs", type=int, default=256, help="for a throughput, at least")
    parser.add_argument("--burning", type=int, default=64, help="programs at once under load")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--batch", type=int, default=16, help="of the others' throughput")
    parser.add_argument("--quick", action="store_true", help="all of it once and small")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.rounds, arguments.runs, arguments.burning = 2, 4, 4
        arguments.in_flight, arguments.batch = [1, 2, 4], 2
    importlib.import_module("sympy")  # as in a trainer that judges answers; forked pools have it
    with PythonExecutor(Limits()) as executor:
        found = origin(executor)
        print_origin(found)
        with candidates(executor) as runs:
            times = latencies(runs, arguments.rounds)
        levels = arguments.in_flight
        rates = throughputs(
            executor, max(1, arguments.rounds // 3), levels, arguments.runs, arguments.batch
        )
    load = under_load(arguments.burning)

    for program in PROGRAMS:
        head = (f"one {program}", "median, ms", "minimum, ms", "subprocess / it", "by minima")
        print_table(latency_rows(times[program]), head, arguments.markdown)
    rows = [
        (way, *(f"{statistics.median(rates[p][way]):.1f}" for p in PROGRAMS))
        for way in rates["print"]
    ]
    print_table(rows, ("runs per second", *PROGRAMS), arguments.markdown)
    head = (f"{BURN_SECONDS} s of CPU, limit {LIMIT_SECONDS} s", "at once", "finished")
    rows = [(name, str(load["runs"]), str(load[name])) for name in (OURS, SUBPROCESS)]
    print_table(rows, head, arguments.markdown)
    promises = bars(times, rates, levels, load)
    rows = [(bar.name, f"{bar.value:.2f}", "met" if bar.met else "NOT MET") for bar in promises]
    print_table(rows, ("bar", "measured", ""), arguments.markdown)

    found |= {"milliseconds": times, "runs_per_second": rates, "load": load}
    found["bars"] = [vars(bar) for bar in promises]
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
