"""The host's side: one event loop on a thread of its own, and the fork server that it owns.

It never runs a signal handler and unpickles nothing. If the fork server dies, it is started again
and what ran is run again; a machinery that fails too often stops everything with an explanation.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rlkit.sandbox.child import Child
from rlkit.sandbox.limits import Limits
from rlkit.sandbox.result import Result, Status, Variables
from rlkit.sandbox.runner import HEAD

State = Literal["fresh", "session", "replay"]
_START_SECONDS = 120.0
_ANSWER_SECONDS = 30.0  # the fork server answers in milliseconds; a mute one is given up
_INTERRUPT_SECONDS = 0.5  # for a cell to end by KeyboardInterrupt, so that variables survive
_ATTEMPTS = 3
_SPARES = 8
_CLOSED = "this executor is closed"


class InfraError(RuntimeError):
    """The machinery fails, not the code that it runs: nothing of it is evidence about a model."""


class _LostError(Exception):
    """A run came to no end of its own; it may be tried again."""


@dataclass(eq=False)
class Session:
    """A trace of cells; unless ``fresh``, they share their variables."""

    mode: State
    child: Child | None = None
    cell: Future[Result] | None = None
    closed: bool = False
    history: list[str] = field(default_factory=list)
    """Cells that succeeded, in order: run again in a new child when the old one is lost."""
    stained: bool = False
    """A cell that is not in ``history`` has left variables in the child."""


class Zygote:
    """The fork server as its host sees it.

    Raises:
        OSError: it could not start; the text has its own words.
    """

    def __init__(self, command: list[str], config: dict[str, Any]) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        names = ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "BLIS")
        environment = {f"{name}_NUM_THREADS": "1" for name in names}  # also what makes fork safe
        environment |= {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "TZ": "UTC", "HOME": "/"}
        environment |= {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"}
        environment["MALLOC_ARENA_MAX"] = "1"  # else threads reserve 64 MiB each of RLIMIT_AS
        if "LD_LIBRARY_PATH" in os.environ:  # some interpreters need it to find their own library
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        file = Path(__file__).with_name("zygote.py")
        host = os.pidfd_open(os.getpid())
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [*command, sys.executable, "-P", "-s", "-S", "-B", str(file)],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    env=environment,
                    cwd="/",
                    start_new_session=True,  # Ctrl-C in a notebook is not for it
                )
            assert self.process.stderr is not None  # a pipe
            with self.process.stderr as stderr:
                with contextlib.suppress(OSError):  # it has ended already: its last words follow
                    socket.send_fds(self.control, [json.dumps(config).encode()], [host])
                self.control.settimeout(_START_SECONDS)
                reply = b""
                with contextlib.suppress(OSError):
                    reply = self.control.recv(1 << 16)
                self.about: dict[str, Any] = json.loads(reply) if reply else {}
                if "error" in self.about or not reply:
                    self.kill()
                    words = stderr.read()
                    lines = words.decode(errors="replace").strip().splitlines() or [
                        "it said nothing"
                    ]
                    raise OSError(self.about.get("error") or lines[-1])
                self.control.setblocking(False)
        except BaseException:
            self.control.close()
            raise
        finally:
            os.close(host)

    def kill(self) -> None:
        """End it; it ends and reaps its children, or else the kernel does."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.control.shutdown(socket.SHUT_RDWR)
            self.process.wait(1.0)
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # not waited for: still its own number
        self.process.wait()


class Host:
    """Runs at most ``running`` cells at once, the rest waits in order.

    Args:
        start: makes a fork server; called again when one dies.
        limits: of each run.
        running: cells that may execute at the same time.
    """

    def __init__(self, start: Callable[[], Zygote], limits: Limits, running: int) -> None:
        self.start, self.limits = start, limits
        self.zygote = start()
        self.pid = os.getpid()
        self.counts: Counter[Status] = Counter()
        self.broken = ""
        # Reentrant: the garbage collector may end a session in the midst of ``submit``.
        self._lock = threading.RLock()
        self._slots = asyncio.Semaphore(running)
        self._births = asyncio.Semaphore(64)  # the fork server's socket holds some 250 orders
        self._spare_count = min(running, _SPARES)
        self._spares: deque[Child] = deque()
        self._children: dict[int, Child] = {}
        # From anywhere: else children of several executors, or containers, share users and limits.
        self._numbers = itertools.count(int.from_bytes(os.urandom(2)))
        self._recent: deque[bool] = deque(maxlen=200)  # was it a fault of the machinery?
        self._last_fault = ""
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._failed)
        self.thread = threading.Thread(target=self._main, name="rlkit-sandbox", daemon=True)
        self.thread.start()

    # From other threads -----------------------------------------------------------------------

    def submit(self, code: str, seed: int, echo: bool, session: Session | None) -> Future[Result]:
        """Queue a cell; cancelling the future kills it.

        Raises:
            InfraError: the machinery failed too often, or the executor is closed.
            RuntimeError: the session is closed, or its cell before this one still runs.
        """
        if os.getpid() != self.pid:
            raise InfraError(
                f"this executor belongs to process {self.pid}, and this is a fork of it: make an "
                "executor in each process that runs code"
            )
        with self._lock:  # what is taken here is on the loop before the order to stop
            if self.broken:
                raise InfraError(self.broken)
            if session is not None and session.closed:
                raise RuntimeError("this session is closed: open another one")
            if session is not None and session.cell is not None and not session.cell.done():
                raise RuntimeError("the cell before this one still runs: wait for its result first")
            work = self._work(code, seed, echo, session)
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            if session is not None:
                session.cell = future
            return future

    def end_session(self, session: Session) -> None:
        """Let a session's child go; a cell that still runs is cancelled."""

        def end() -> None:
            if session.child is not None:
                session.child.kill()

        if os.getpid() != self.pid:  # in a fork of the host another thread may hold the lock
            return
        with self._lock, contextlib.suppress(RuntimeError):  # closed, and the child with it
            session.closed = True
            if session.cell is not None:
                session.cell.cancel()  # or it would start another child
            self._loop.call_soon_threadsafe(end)

    def stop(self) -> None:
        """End every child, the fork server and the thread; who waits gets an InfraError."""
        if os.getpid() == self.pid:  # a forked copy of the host does not own the processes
            with self._lock:
                self.broken = self.broken or _CLOSED
            with contextlib.suppress(RuntimeError):  # it is closed
                self._loop.call_soon_threadsafe(self._loop.stop)
            if threading.current_thread() is not self.thread:
                self.thread.join()

    # On the loop's thread ---------------------------------------------------------------------

    def _main(self) -> None:
        self._loop.add_reader(self.zygote.control, self._told)
        try:
            self._loop.run_forever()
        finally:
            with self._lock:  # also if a future's callback has ended the loop by sys.exit
                self.broken = self.broken or _CLOSED
            self._loop.run_until_complete(self._end())
            self._loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        self._give_up(_CLOSED)
        await asyncio.gather(*tasks, return_exceptions=True)
        self._drop(_CLOSED)

    async def _work(self, code: str, seed: int, echo: bool, session: Session | None) -> Result:
        """One run, from its place in the queue to its result."""
        try:
            async with self._slots:
                if self.broken:
                    raise InfraError(self.broken)
                result = await self._attempts(code, seed, echo, session)
        except asyncio.CancelledError:
            if self.broken:
                raise InfraError(self.broken) from None
            raise
        self.counts[result.status] += 1
        self._recent.append(result.status == "infra")
        faults = self._recent.count(True)
        if faults > max(10, 0.1 * len(self._recent)):
            self._give_up(
                f"{faults} of the last {len(self._recent)} runs failed in the machinery, not in "
                f"their code (last: {self._last_fault}). Results would be biased, so no more are "
                "given. `python -m rlkit doctor` says what this host lacks."
            )
        return result

    async def _attempts(self, code: str, seed: int, echo: bool, session: Session | None) -> Result:
        for _ in range(_ATTEMPTS):
            try:
                if session is not None and session.mode != "fresh":
                    return await self._next_cell(session, code, seed, echo)
                result = await self._cell(await self._child(session=False), code, seed, echo)
                # Not while it runs, if nobody waits: the fork server would compete with it.
                self._loop.call_soon(self._refill, self._spare_count)
                return result
            except _LostError as error:
                self._last_fault = str(error)
        return Result(status="infra", error=self._last_fault)

    async def _next_cell(self, session: Session, code: str, seed: int, echo: bool) -> Result:
        variables: Variables = "kept"
        if session.child is None or session.child.killed or session.child.gone:
            variables = await self._rebuild(session, seed)
        assert session.child is not None
        result = await self._cell(session.child, code, seed, echo)
        if result.ok:
            session.history.append(code)
        if session.mode == "replay":
            session.child.kill()
            variables = "kept" if variables == "restored" else variables
        elif session.child.gone:
            try:
                variables = await self._rebuild(session, seed)
            except _LostError:  # the next cell tries again; this one has run, and never runs twice
                variables = "lost"
        elif not result.ok:
            session.stained = True
        return replace(result, variables=variables)

    async def _rebuild(self, session: Session, seed: int) -> Variables:
        """Give a session a new child, and run in it what succeeded before."""
        session.child = await self._child(session=True)
        for code in session.history:
            result = await self._cell(session.child, code, seed, False)
            if not result.ok:  # what worked once does not work again: nothing is promised
                session.history.clear()
                session.stained = True
                session.child.kill()
                return await self._rebuild(session, seed)
        stained, session.stained = session.stained, False
        return "restored" if session.history else "lost" if stained else "kept"

    async def _cell(self, child: Child, code: str, seed: int, echo: bool) -> Result:
        """Run one cell within its limits."""
        data = code.encode("utf-8", "surrogatepass")
        head = HEAD.pack(len(data), seed, echo, not child.session)
        child.begin()
        rest = child.send(head + data)
        sending = (
            asyncio.ensure_future(self._loop.sock_sendall(child.channel, rest)) if rest else None
        )
        first = min(self.limits.cpu_seconds, self.limits.wall_seconds)
        child.timer = self._loop.call_later(first, self._look, child)
        try:
            await child.over
        except asyncio.CancelledError:
            child.kill()
            raise
        finally:
            child.timer.cancel()
            if sending is not None and not sending.cancel():
                sending.exception()  # to a child that died before it read: told otherwise
        if child.lost:
            raise _LostError(self._last_fault or "the fork server was lost")
        result = child.result()
        child.verdict = None
        return result

    def _look(self, child: Child) -> None:
        """See whether a cell is over one of its limits, and when to look again."""
        wait = child.left()
        if child.killed:  # by us, or because it printed too much
            wait = child.killed_at + _ANSWER_SECONDS - time.monotonic()
            if wait <= 0:
                self._lose("the fork server does not answer")
        elif wait > 0:
            wait = max(wait, 0.002)
        elif child.session and child.verdict is None:
            child.verdict, wait = "timeout", _INTERRUPT_SECONDS
            child.signal(signal.SIGINT)
        else:
            child.kill("timeout")
            wait = _ANSWER_SECONDS
        child.timer = self._loop.call_later(wait, self._look, child)

    async def _child(self, *, session: bool) -> Child:
        """A child whose cage is shut."""
        if not session:
            # Those that the kernel killed for memory are no fault of this run.
            self._spares = deque(spare for spare in self._spares if not spare.gone)
            self._refill(self._spare_count if self._slots.locked() else 1)
        async with self._births:
            has_spare = not session and bool(self._spares)
            child = self._spares.popleft() if has_spare else self._fork(session=session)
            try:
                if not child.ready.done():
                    await asyncio.wait([child.ready], timeout=_ANSWER_SECONDS)
            except asyncio.CancelledError:
                child.kill()
                raise
        if not child.ready.done():
            self._lose("the fork server does not answer")  # resolves it
        why = child.ready.result() or ("it ended before its cell" if child.gone else "")
        if why:
            await asyncio.sleep(0.05)  # no process left, perhaps: let others end
            raise _LostError(f"no child process: {why}")
        return child

    def _refill(self, count: int) -> None:
        with contextlib.suppress(_LostError):  # told to the run that finds no spare
            while len(self._spares) < count and not self.broken:
                self._spares.append(self._fork(session=False))

    def _fork(self, *, session: bool) -> Child:
        try:
            child, number = Child(self.limits, session), next(self._numbers)
        except OSError as error:
            raise _LostError(f"no descriptor left for a child ({error}): see ulimit -n") from None
        self._children[number] = child
        try:
            socket.send_fds(self.zygote.control, [b"%d %d" % (number, session)], child.ends)
        except OSError as error:
            self._children.pop(number).ended(None, f"the fork server takes no order: {error}")
        finally:
            for fd in child.ends:
                os.close(fd)
        return child

    def _told(self) -> None:
        """Hear the fork server."""
        try:
            message, fds, _, _ = socket.recv_fds(
                self.zygote.control, 256, 1, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            message, fds = b"", []
        if not message:
            self._lose("the fork server ended")
            return
        kind, number, *rest = message.split()
        child = self._children.pop(int(number), None)
        if child is None:  # given up below; it ended as its channel was closed
            return
        if kind == b"born":
            try:
                child.born(fds[0])
                self._children[int(number)] = child
            except (OSError, IndexError):  # the kernel drops descriptors that do not fit
                child.ended(None, "no descriptor left for a child: see ulimit -n")
        elif kind == b"dead":
            child.ended((int(rest[0]), float(rest[1])))
        else:
            child.ended(None, os.strerror(int(rest[0])))

    def _lose(self, why: str) -> None:
        """End a fork server that is dead or mute, and start another."""
        self._last_fault = why
        self._drop(why)
        try:
            self.zygote = self.start()
        except OSError as error:
            self._give_up(f"the fork server does not start again: {error}")
        else:
            self._loop.add_reader(self.zygote.control, self._told)

    def _drop(self, why: str) -> None:
        """End the fork server and its children."""
        if self.zygote.control.fileno() >= 0:  # else it ended before, and no other one started
            self._loop.remove_reader(self.zygote.control)
            self.zygote.kill()
            self.zygote.control.close()
        self._spares.clear()
        for child in self._children.values():
            child.ended(None, why)
        self._children.clear()

    def _give_up(self, why: str) -> None:
        """Stop for good: who waits, and who comes, is told why."""
        self.broken = self.broken or why
        for task in asyncio.all_tasks(self._loop):
            # One that has not begun would end without a word; it finds out by itself.
            begun = inspect.getcoroutinestate(task.get_coro()) != inspect.CORO_CREATED  # type: ignore[arg-type]
            if begun and task is not asyncio.current_task(self._loop):
                task.cancel(why)

    def _failed(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A defect in a callback must not leave a caller waiting."""
        self._loop.default_exception_handler(context)
        if "handle" in context:
            self._give_up(f"the executor's loop failed: {context.get('exception')!r}")
