"""``PythonExecutor``: runs model-written Python where it can do no harm, and fast."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from rlkit.sandbox.host import Host, InfraError, Session, State, Zygote
from rlkit.sandbox.levels import Attempt, Level, attack, attempts, shell
from rlkit.sandbox.limits import Limits
from rlkit.sandbox.result import Result, Status

PACKAGES = ("numpy", "sympy", "mpmath")


class IsolationError(RuntimeError):
    """The host cannot give the isolation that was asked for; the text says why, per level."""


@dataclass(frozen=True)
class Info:
    """What an executor runs on.

    Attributes:
        level: isolation that the self-test proved, ``A`` (strongest) to ``D``.
        layers: what stands around a child.
        hides_names: False if code can still learn names and sizes of files by ``stat``.
        landlock: version of landlock in the kernel, 0 if none.
        python: version of the interpreter.
        packages: what code can import besides the standard library.
        rejected: why each stronger combination of layers was not taken.
    """

    level: Level
    layers: tuple[str, ...]
    hides_names: bool
    landlock: int
    python: str
    packages: tuple[str, ...]
    rejected: tuple[str, ...]


class PythonExecutor:
    """Runs Python in caged children of a warm fork server.

    Any thread may call any method; any number of runs may be in flight. Use it as a (synchronous or
    asynchronous) context manager.

    Args:
        limits: of each run.
        isolation: weakest level to accept; the strongest that works here is taken.
        allow_degraded: with ``isolation="D"``, also accept that code reads the caller's files and
            the memory of the caller's processes.
        running: runs that execute at once, the others wait; default all usable cores, at least 2.
        packages: importable besides the standard library, and preloaded; from this environment.
        seed: of ``random`` and ``numpy.random`` in every run, 0 to 2**32 - 1.
        echo: give the value of a last line that is an expression, as notebooks do.

    Raises:
        IsolationError: no level at least ``isolation`` holds on this host.
        ModuleNotFoundError: one of ``packages`` is not installed.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        isolation: Level = "C",
        allow_degraded: bool = False,
        running: int | None = None,
        packages: Sequence[str] = PACKAGES,
        seed: int = 0,
        echo: bool = True,
        _without: Sequence[str] = (),
    ) -> None:
        if not isinstance(limits, Limits | None):
            raise TypeError(f"limits={limits!r}: expected Limits(...)")
        if isinstance(packages, str) or not all(isinstance(name, str) for name in packages):
            raise TypeError(f"packages={packages!r}: expected a sequence of names")
        for name, flag in (("allow_degraded", allow_degraded), ("echo", echo)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name}={flag!r}: expected True or False")
        if isolation not in get_args(Level):
            raise ValueError(f"isolation={isolation!r}: expected one of {get_args(Level)}")
        if running is not None and (type(running) is not int or not 1 <= running <= 1024):
            raise ValueError(f"running={running!r}: expected 1 to 1024 runs at once")
        self.limits = limits or Limits()
        self.seed, self.echo = _checked_seed(seed), echo
        self._running = running or max(2, len(os.sched_getaffinity(0)))
        self._packages = tuple(name for name in packages if name not in sys.stdlib_module_names)
        self._roots = _roots(self._packages)
        self._host, self.info = self._best(isolation, allow_degraded, frozenset(_without))
        self._finalizer = weakref.finalize(self, self._host.stop)

    def _best(self, least: Level, degraded: bool, without: frozenset[str]) -> tuple[Host, Info]:
        """The strongest combination that a real child could not break."""
        config = {"limits": vars(self.limits), "packages": self._packages, "roots": self._roots}
        rejected: list[str] = []
        for attempt in attempts(os.geteuid() == 0):
            if attempt.level > least or (attempt.degraded and not degraded):
                continue
            layers = tuple(layer for layer in attempt.layers if layer not in without)
            attempt = Attempt(layers, attempt.degraded)
            name = f"{attempt.level} ({', '.join(layers)})"
            try:
                start = partial(_start, config | {"layers": layers})
                host = Host(start, self.limits, self._running)
            except OSError as error:
                rejected.append(f"{name}: {error}")
                continue
            try:
                problems, sees = attack(partial(_in_session, host), attempt)
            except BaseException:
                host.stop()
                raise
            if problems and not without:
                host.stop()
                rejected.append(f"{name}: {'; '.join(problems)}")
                continue
            host.counts.clear()  # the self-test is nobody's run
            abi, python = host.zygote.about["abi"], host.zygote.about["python"]
            facts = (not sees, abi, python, self._packages, tuple(rejected))
            return host, Info(attempt.level, layers, *facts)
        raise IsolationError(
            f"No isolation of level {least} or better holds on this host:\n  "
            + "\n  ".join(rejected)
            + "\nInstall bubblewrap, or use a kernel with landlock (Linux 5.13 or newer), or ask "
            'for less: isolation="D", and allow_degraded=True if model-written code may read your '
            "files. `python -m rlkit doctor` shows what each level needs."
        )

    @property
    def counts(self) -> Counter[Status]:
        """How many runs ended with each status."""
        return Counter(self._host.counts)

    def submit(self, code: str, *, seed: int | None = None) -> Future[Result]:
        """Start a run with fresh variables; cancelling the future kills it.

        Callbacks of the future run on the executor's own thread: all runs wait for them.

        Raises:
            InfraError: the machinery failed too often, or the executor is closed.
        """
        return self._submit(code, seed, None)

    def _submit(self, code: str, seed: int | None, session: Session | None) -> Future[Result]:
        if not isinstance(code, str):
            raise TypeError(f"code is {type(code).__name__}: expected the text of a Python program")
        seed = self.seed if seed is None else _checked_seed(seed)
        return self._host.submit(code, seed, self.echo, session)

    def run(self, code: str, *, seed: int | None = None) -> Result:
        """Run ``code`` with fresh variables and wait for its result."""
        return _wait(self._host, self.submit(code, seed=seed))

    def run_all(self, codes: Iterable[str]) -> list[Result]:
        """Run all ``codes``, each with fresh variables; results in order."""
        if isinstance(codes, str):
            raise TypeError("codes is one text: expected several; run() takes one")
        futures: list[Future[Result]] = []
        try:
            for code in codes:
                futures.append(self.submit(code))
            return [_wait(self._host, future) for future in futures]
        finally:
            for future in futures:  # does nothing to finished ones
                future.cancel()

    async def arun(self, code: str, *, seed: int | None = None) -> Result:
        """``run`` for asyncio; cancelling the task kills the run."""
        return await asyncio.wrap_future(self.submit(code, seed=seed))

    def session(self, state: State = "session") -> Trace:
        """Cells that follow each other, as in one trace of a model.

        Args:
            state: ``fresh``: each cell starts with nothing, as in STILL-3; ``session``: one live
                child keeps the variables, and if it has to be killed, the cells that succeeded are
                run again in a new one; ``replay``: a new child for each cell, which first runs the
                earlier successful ones again.
        """
        if state not in get_args(State):
            raise ValueError(f"state={state!r}: expected one of {get_args(State)}")
        return Trace(self, state)

    def close(self) -> None:
        """End all processes; who still waits for a run gets an InfraError."""
        self._finalizer()

    def __enter__(self) -> PythonExecutor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aenter__(self) -> PythonExecutor:
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self.close)


class Trace:
    """Cells of one trace; made by ``PythonExecutor.session``. Cells run one after the other."""

    def __init__(self, executor: PythonExecutor, state: State) -> None:
        self._executor, self._session, self.state = executor, Session(state), state
        self._finalizer = weakref.finalize(self, executor._host.end_session, self._session)

    def submit(self, code: str) -> Future[Result]:
        """Start the next cell.

        Raises:
            RuntimeError: the cell before it still runs, or the session is closed.
        """
        return self._executor._submit(code, None, self._session)

    def run(self, code: str) -> Result:
        """Run the next cell and wait for its result."""
        return _wait(self._executor._host, self.submit(code))

    async def arun(self, code: str) -> Result:
        """``run`` for asyncio."""
        return await asyncio.wrap_future(self.submit(code))

    def close(self) -> None:
        """Let the variables go; a cell that still runs is cancelled."""
        self._finalizer()

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aenter__(self) -> Trace:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()


def _wait(host: Host, future: Future[Result]) -> Result:
    try:
        if threading.current_thread() is host.thread:
            raise RuntimeError("a future's callback would wait for itself here: use submit()")
        return future.result()
    finally:
        future.cancel()  # does nothing unless we are interrupted


def _start(config: dict[str, Any]) -> Zygote:
    return Zygote(shell(config["layers"], config["roots"]), config)


def _in_session(host: Host, code: str) -> tuple[str, str]:
    """Output and error of code in a child of its own, with time enough whatever the limits."""
    session, limits = Session("replay"), host.limits
    host.limits = Limits()
    try:
        result = _wait(host, host.submit(code, 0, False, session))
    except InfraError as error:
        return "", str(error)
    finally:
        host.limits = limits
    return result.stdout, result.error or result.status


def _checked_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 32:
        raise ValueError(f"seed={seed!r}: expected a whole number from 0 to 2**32 - 1")
    return seed


def _roots(packages: Iterable[str]) -> list[str]:
    """Folders from which ``packages`` are imported here."""
    roots = []
    for name in packages:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                f"packages: {name!r} is not an importable package of this environment; install it, "
                "or leave it out of the executor's packages"
            )
        folder = Path(spec.origin).parent
        roots.append(str(folder.parent if spec.submodule_search_locations else folder))
    return list(dict.fromkeys(roots))
