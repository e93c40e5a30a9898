"""A pool of processes that compare expressions with math-verify, each item within a hard limit.

math-verify's own limit uses ``signal.alarm``: it works on the main thread only and does not stop C
code. Here every item runs in a worker process that the kernel ends when its time is over, and the
next worker is forked in milliseconds from a *nursery* that imported math-verify once
(``verify_nursery``,
``_verify_worker.py``). Nothing starts before the first item.

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
import math
import os
import socket
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rlkit.verify_nursery import ForkError, Nursery, Pair, Worker

SECONDS_PER_EXPRESSION = 3.0
CACHE_PAIRS = 65_536
UNDECIDED_SECONDS = 60.0
"""How long a verdict that is not lasting is kept, in seconds of wall time.

Reward, filter and logged columns of one training step ask one after another: they get the same
verdict, and the time is spent once. A busy moment is not remembered for longer.
"""
RETRY_FACTOR = 3.0
"""How many times the limit a second attempt gets, where the caller asks for one."""
FAIR_SHARE = 0.5
"""A time-out is a fact about the expression if it had this share of its limit in CPU time."""

_NURSERY_FILE = Path(__file__).with_name("_verify_worker.py")
_RETIRE_KIB = 2**20


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
        self._nursery: Nursery | None = None
        self._all: set[Worker] = set()
        self._idle: list[Worker] = []
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="rlkit-verify")

    def judge(self, pairs: Sequence[Pair], seconds: float | None = None) -> list[Judged]:
        """Verdicts of ``pairs``, in order; equal pairs are not merged here.

        Args:
            pairs: what to compare.
            seconds: limit of an item in this call; default that of the pool.

        Raises:
            RuntimeError: the processes cannot start, or ``close`` was called meanwhile.
        """
        with self._lock:
            threads, epoch = self._threads, self._epoch
        futures = []
        limit = self.seconds if seconds is None else seconds
        try:
            for pair in pairs:
                futures.append(threads.submit(self._ask, pair, epoch, limit))
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
            threads = self._threads
            self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="rlkit-verify")
            self._end_nursery()
        threads.shutdown(cancel_futures=True)  # those that were waiting for a reply see its end

    def _ask(self, pair: Pair, epoch: int, limit: float) -> Judged:
        """Judge one pair; runs on a thread of the pool."""
        spent = 0.0
        for fresh in (False, True):
            worker = self._take(epoch, fresh)
            start = time.monotonic()  # starting processes is not the item's time
            reply = worker.ask(pair, max(0.001, limit - spent))
            spent += time.monotonic() - start
            if reply is not None:
                verdict, largest = reply
                self._give(worker, keep=largest < _RETIRE_KIB)
                return Judged(verdict)
            cpu = self._give(worker, keep=False)
            # The alarm was set after ``start``: an end before the limit was none of its doing.
            if spent >= limit:
                return Judged("timeout", lasting=cpu >= FAIR_SHARE * limit)
        return Judged("unparsable", lasting=False)

    def _take(self, epoch: int, fresh: bool) -> Worker:
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

    def _fork(self) -> Worker:
        """A new worker, from a new nursery if there is none or it does not answer."""
        try:
            # Here, so that a lack of sockets in this process is not blamed on the nursery.
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise _no_worker(error) from error
        try:
            with theirs:
                if self._nursery is not None:
                    try:
                        return self._nursery.fork(ours, theirs)
                    except (OSError, ValueError):
                        self._end_nursery()  # somebody killed it
                self._nursery = Nursery(self._file)
                try:
                    return self._nursery.fork(ours, theirs)
                except (OSError, ValueError):
                    self._end_nursery()
                    raise
        except BaseException as error:
            ours.close()
            if isinstance(error, (OSError, ValueError, ForkError)):
                raise _no_worker(error) from error
            raise

    def _give(self, worker: Worker, keep: bool) -> float:
        """Take ``worker`` back; CPU seconds since its last reply if it is not kept.

        0 if the nursery is gone, or is given up because it does not answer.
        """
        with self._lock:
            current = worker.nursery is self._nursery
            if keep and current:
                self._idle.append(worker)
                return 0.0
            worker.channel.close()
            self._all.discard(worker)
            try:
                return worker.nursery.end(worker)
            except (OSError, ValueError):
                if current:
                    self._end_nursery()
                return 0.0

    def _end_nursery(self) -> None:
        """Kill the nursery, if any, and its workers; items under way are tried again.

        The caller holds the lock.
        """
        if self._nursery is not None:
            self._nursery.kill()
        for worker in self._idle:
            worker.channel.close()
        self._all.difference_update(self._idle)
        self._idle, self._nursery = [], None

    def _forget(self) -> None:
        """In a forked copy: close what belongs to the original, which goes on using it."""
        for worker in self._all:
            worker.channel.close()
        if self._nursery is not None:
            self._nursery.control.close()
            self._nursery.process.returncode = 0  # not a child of this copy: nothing to wait for
        self._reset()


def _no_worker(error: Exception) -> RuntimeError:
    return RuntimeError(
        f"No process to compare expressions could be started: {error}. The machine or the account "
        "is out of processes or open files: end other programs, or raise the limits (ulimit -u, "
        "ulimit -n)."
    )


def _closed() -> RuntimeError:
    return RuntimeError("The pool was closed while expressions were being compared. Ask again.")


_pool = Pool()
_cache: OrderedDict[Pair, tuple[Judged, float]] = OrderedDict()  # until when, on _now's clock
_cache_lock = threading.Lock()
_now = time.monotonic


def compare(pairs: Iterable[Pair]) -> dict[Pair, Judged]:
    """Verdict of each distinct pair; what is not known from earlier calls is asked in parallel.

    The last ``CACHE_PAIRS`` verdicts are kept: lasting ones for good, the others for
    ``UNDECIDED_SECONDS`` (``Judged.lasting``). Equal pairs of one call are asked once.

    Raises:
        RuntimeError: as ``Pool.judge``.
    """
    found = {}
    missing = []
    now = _now()
    with _cache_lock:
        for pair in dict.fromkeys(pairs):
            known = _cache.get(pair)
            if known is not None and now < known[1]:
                _cache.move_to_end(pair)
                found[pair] = known[0]
            else:
                missing.append(pair)
    if missing:
        found |= _remember(dict(zip(missing, _pool.judge(missing), strict=True)))
    return found


def compare_again(pair: Pair) -> Judged:
    """``pair`` asked anew, whatever is known, with ``RETRY_FACTOR`` times the limit.

    Raises:
        RuntimeError: as ``Pool.judge``.
    """
    (judged,) = _pool.judge([pair], RETRY_FACTOR * _pool.seconds)
    return _remember({pair: judged})[pair]


def _remember(judged: dict[Pair, Judged]) -> dict[Pair, Judged]:
    """Keep new verdicts, those of a time-out from the moment that it is known."""
    until = _now() + UNDECIDED_SECONDS
    with _cache_lock:
        for pair, result in judged.items():
            _cache[pair] = (result, math.inf if result.lasting else until)
            _cache.move_to_end(pair)
        while len(_cache) > CACHE_PAIRS:
            _cache.popitem(last=False)
    return judged


def close() -> None:
    """End the processes of ``compare``, if any; the next call that needs them starts new ones."""
    _pool.close()


def _forget_lock() -> None:
    global _cache_lock
    _cache_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)
