"""A pool of processes that compare expressions with math-verify, each item within a hard limit.

math-verify's own limit uses ``signal.alarm``: it works on the main thread only and does not stop C
code. Here every item runs in a worker process that the kernel ends when its time is over, and the
next worker is forked in milliseconds from a *nursery* that imported math-verify once
(``_verify_worker.py``). Nothing starts before the first item.

- The limit is wall time from the moment an item is handed to a worker; waiting in the queue does
  not count.
- One thread of this process per worker holds the conversation with it. No interrupt can cut an
  exchange short there, and a worker is used again only after a complete reply, so no reply can be
  taken for that of another item.
- The nursery ends with its process group when this process closes its socket, however that comes
  about, SIGKILL included.
- A forked copy of this process drops the sockets and starts processes of its own when it needs any.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SECONDS_PER_EXPRESSION = 3.0
CACHE_PAIRS = 65_536
FAIR_SHARE = 0.5
"""A time-out is a fact about the expression if it had this share of its limit in CPU time."""

_NURSERY_FILE = Path(__file__).with_name("_verify_worker.py")
_STARTUP_SECONDS = 120.0
_CONTROL_SECONDS = 30.0
_GRACE_SECONDS = 1.0  # the kernel's alarm comes first; a stopped process does not feel it
_RETIRE_KIB = 2**20

Pair = tuple[str, str]
"""Gold and answer; the gold with itself asks whether it can be parsed."""


@dataclass(frozen=True)
class Judged:
    """Verdict of one pair, and whether asking again would give the same.

    ``verdict`` is right, wrong, unparsable, timeout, or gold (the gold cannot be parsed).
    ``lasting`` is False where the machine may be to blame: a time-out with little CPU time, or a
    worker that died twice.
    """

    verdict: str
    lasting: bool = True


def usable_cores() -> int:
    """Cores that this process may run on, at least 1."""
    if sys.platform == "linux":
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


@dataclass(eq=False)
class _Worker:
    """One forked process; ``cpu`` seconds are as of its last reply."""

    nursery: _Nursery
    channel: socket.socket
    pid: int
    cpu: float = 0.0

    def ask(self, pair: Pair, seconds: float) -> tuple[str, int] | None:
        """Verdict and largest memory in KiB; None if it died or did not answer in time."""
        deadline = time.monotonic() + seconds + _GRACE_SECONDS
        reply = b""
        try:
            self.channel.settimeout(seconds + _GRACE_SECONDS)
            self.channel.sendall(json.dumps([seconds, *pair]).encode() + b"\n")
            while not reply.endswith(b"\n"):
                self.channel.settimeout(max(0.001, deadline - time.monotonic()))
                part = self.channel.recv(256)
                if not part:
                    return None
                reply += part
        except OSError:
            return None
        verdict, cpu, largest = reply.split()
        self.cpu = float(cpu)
        return verdict.decode(), int(largest)


class _Nursery:
    """The process that forks workers. Its owner holds a lock around every call."""

    def __init__(self, file: Path) -> None:
        self.control, theirs = socket.socketpair()
        # -P: the package folder must not shadow top-level modules in the child. An own session
        # keeps Ctrl-C in a notebook away from it, and makes one group of all workers.
        command = [sys.executable, "-P", str(file), str(os.getpid())]
        try:
            with theirs:
                self.process = subprocess.Popen(
                    command,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
        except BaseException:
            self.control.close()
            raise
        self.control.settimeout(_STARTUP_SECONDS)
        try:
            ready = self.control.recv(64)
        except OSError:
            ready = b""
        if ready != b"ready\n":
            self.process.kill()
            _, error = self.process.communicate()
            self.kill()
            lines = error.decode(errors="replace").strip().splitlines() or ["no message"]
            raise RuntimeError(
                f"The process that compares expressions did not start: {lines[-1]}. It needs the "
                "package math-verify (pip install math-verify[antlr4_13_2])."
            )
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.control.settimeout(_CONTROL_SECONDS)

    def fork(self) -> _Worker:
        """A new worker; OSError or ValueError if the nursery is gone."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self.control, [b"fork\n"], [theirs.fileno()])
                return _Worker(self, ours, int(self.control.recv(64)))
        except BaseException:
            ours.close()
            raise

    def end(self, worker: _Worker) -> float:
        """Kill ``worker``; CPU seconds since its last reply, 0 if the nursery is gone."""
        try:
            self.control.sendall(b"end %d\n" % worker.pid)
            return float(self.control.recv(64)) - worker.cpu
        except (OSError, ValueError):
            return 0.0

    def kill(self) -> None:
        """End the nursery and all its workers."""
        # Before it is waited for: until then its number, which names the group, is not given away.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.control.close()


class Pool:
    """Compares pairs in parallel. Any thread may call any method at any time.

    Args:
        workers: processes at most; default all usable cores. They start as they are needed.
        seconds: wall limit of an item; a second attempt after a crash has what is left of it.
    """

    def __init__(
        self,
        workers: int | None = None,
        seconds: float = SECONDS_PER_EXPRESSION,
        *,
        _file: Path = _NURSERY_FILE,
    ) -> None:
        self.workers = usable_cores() if workers is None else workers
        self.seconds = seconds
        self.forked = 0
        """Workers started so far."""
        self._file = _file
        self._epoch = 0
        self._reset()
        atexit.register(self.close)
        # A fork while a worker is being made would leave an end of its socket in the copy.
        os.register_at_fork(
            before=lambda: self._lock.acquire(),
            after_in_parent=lambda: self._lock.release(),
            after_in_child=self._forget,
        )

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._nursery: _Nursery | None = None
        self._all: set[_Worker] = set()
        self._idle: list[_Worker] = []
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="rlkit-verify")

    def judge(self, pairs: Sequence[Pair]) -> list[Judged]:
        """Verdicts of ``pairs``, in order; equal pairs are not merged here.

        Raises:
            RuntimeError: the processes cannot start, or ``close`` was called meanwhile.
        """
        with self._lock:
            threads, epoch = self._threads, self._epoch
        futures = []
        try:
            for pair in pairs:
                futures.append(threads.submit(self._ask, pair, epoch))
            return [future.result() for future in futures]
        except CancelledError:
            raise _closed() from None
        finally:
            for future in futures:  # does nothing to finished ones
                future.cancel()

    def close(self) -> None:
        """End all processes and threads; the next item starts new ones."""
        with self._lock:
            self._epoch += 1
            threads, nursery, idle = self._threads, self._nursery, self._idle
            self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="rlkit-verify")
            self._nursery, self._idle = None, []
            if nursery is not None:
                nursery.kill()
            for worker in idle:
                worker.channel.close()
                self._all.discard(worker)
        threads.shutdown(cancel_futures=True)  # those that were waiting for a reply see its end

    def _ask(self, pair: Pair, epoch: int) -> Judged:
        """Judge one pair; runs on a thread of the pool."""
        spent = 0.0
        for fresh in (False, True):
            worker = self._take(epoch, fresh)
            start = time.monotonic()  # starting processes is not the item's time
            reply = worker.ask(pair, max(0.001, self.seconds - spent))
            spent += time.monotonic() - start
            if reply is not None:
                verdict, largest = reply
                self._give(worker, keep=largest < _RETIRE_KIB)
                return Judged(verdict)
            cpu = self._give(worker, keep=False)
            # The alarm was set after ``start``: an end before the limit was none of its doing.
            if spent >= self.seconds:
                return Judged("timeout", lasting=cpu >= FAIR_SHARE * self.seconds)
        return Judged("unparsable", lasting=False)

    def _take(self, epoch: int, fresh: bool) -> _Worker:
        """An idle worker or a new one, surely a new one if ``fresh``."""
        with self._lock:
            if epoch != self._epoch:
                raise _closed()
            if self._idle and not fresh:
                return self._idle.pop()
            worker = self._fork()
            self._all.add(worker)
            self.forked += 1
            return worker

    def _fork(self) -> _Worker:
        if self._nursery is not None:
            with contextlib.suppress(OSError, ValueError):
                return self._nursery.fork()
            # Somebody killed it. Its workers end too: an item under way is tried again.
            self._nursery.kill()
            for worker in self._idle:
                worker.channel.close()
            self._all.difference_update(self._idle)
            self._idle, self._nursery = [], None
        self._nursery = _Nursery(self._file)
        return self._nursery.fork()

    def _give(self, worker: _Worker, keep: bool) -> float:
        """Take ``worker`` back; CPU seconds since its last reply if it is not kept."""
        with self._lock:
            if keep and worker.nursery is self._nursery:
                self._idle.append(worker)
                return 0.0
            worker.channel.close()
            self._all.discard(worker)
            return worker.nursery.end(worker)

    def _forget(self) -> None:
        """In a forked copy: close what belongs to the original, which goes on using it."""
        for worker in self._all:
            worker.channel.close()
        if self._nursery is not None:
            self._nursery.control.close()
            self._nursery.process.returncode = 0  # not a child of this copy: nothing to wait for
        self._reset()


def _closed() -> RuntimeError:
    return RuntimeError("The pool was closed while expressions were being compared. Ask again.")


_pool = Pool()
_cache: OrderedDict[Pair, str] = OrderedDict()
_cache_lock = threading.Lock()


def compare(pairs: Iterable[Pair]) -> dict[Pair, str]:
    """Verdict of each distinct pair; what is not known from earlier calls is asked in parallel.

    The last ``CACHE_PAIRS`` lasting verdicts are kept (``Judged.lasting``). Equal pairs of one call
    are asked once in any case, a time-out included.

    Raises:
        RuntimeError: as ``Pool.judge``.
    """
    found = {}
    missing = []
    with _cache_lock:
        for pair in dict.fromkeys(pairs):
            if pair in _cache:
                _cache.move_to_end(pair)
                found[pair] = _cache[pair]
            else:
                missing.append(pair)
    if missing:
        judged = dict(zip(missing, _pool.judge(missing), strict=True))
        with _cache_lock:
            for pair, result in judged.items():
                found[pair] = result.verdict
                if result.lasting:
                    _cache[pair] = result.verdict
            while len(_cache) > CACHE_PAIRS:
                _cache.popitem(last=False)
    return found


def close() -> None:
    """End the processes of ``compare``, if any; the next call that needs them starts new ones."""
    _pool.close()


def _forget_lock() -> None:
    global _cache_lock
    _cache_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)
