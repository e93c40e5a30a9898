"""The host's one selector loop: children, their pipes, deadlines and ends, on one thread.

It never runs a signal handler, unpickles nothing and believes nothing that a child says about its
own status. The fork server (``zygote``) is its only process; if that dies, runs are tried again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rlkit.sandbox.limits import Limits
from rlkit.sandbox.result import Result, Status, Variables
from rlkit.sandbox.runner import HEAD

State = Literal["fresh", "session", "replay"]
_START_SECONDS = 120.0
_ANSWER_SECONDS = 30.0  # the fork server answers in milliseconds; a silent one is given up
_INTERRUPT_SECONDS = 0.5  # for a cell to end by KeyboardInterrupt, so that variables survive
_REPORT_BYTES = 1 << 18
_ATTEMPTS = 3
_FAULTS = 10
_SPARES = 8
_FORKS = 64  # asked for and not yet made
_STARVED = 10.0  # times wall_seconds, however busy the machine is


class InfraError(RuntimeError):
    """The machinery fails, not the code that it runs: nothing of it is evidence about a model."""


class Output:
    """Head and tail of a stream, with bounded memory."""

    def __init__(self, keep: int) -> None:
        self.half, self.total = max(1, keep // 2), 0
        self.head, self.tail = bytearray(), bytearray()

    def add(self, data: bytes) -> None:
        """Take the next piece."""
        self.total += len(data)
        room = self.half - len(self.head)
        self.head += data[:room]
        self.tail += data[room:]
        if len(self.tail) > 2 * self.half:
            del self.tail[: -self.half]

    def text(self) -> tuple[str, int]:
        """What is shown, and the number of bytes left out of it."""
        tail = self.tail[-self.half :]
        cut = self.total - len(self.head) - len(tail)
        if not cut:
            return (self.head + tail).decode("utf-8", "replace"), 0
        start = next((i for i in range(min(4, len(tail))) if tail[i] & 0xC0 != 0x80), 0)
        head = self.head.decode("utf-8", "replace").rstrip("\ufffd")
        shown = tail[start:].decode("utf-8", "replace")
        return f"{head}\n... [{cut} bytes left out] ...\n{shown}", cut


@dataclass(eq=False)
class Session:
    """What the loop knows of a trace whose cells share their variables."""

    mode: State = "session"
    child: Child | None = None
    history: list[str] = field(default_factory=list)
    """Cells that succeeded, in order: run again in a new child when the old one is lost."""
    closed: bool = False


@dataclass(eq=False)
class Job:
    """One run, from its place in the queue to its result."""

    code: str
    seed: int
    echo: bool
    session: Session | None = None
    future: Future[Result] = field(default_factory=Future)
    steps: deque[tuple[bool, str]] = field(default_factory=deque)
    """Still to run: (is it the cell itself, code); the others rebuild variables."""
    result: Result | None = None
    variables: Variables = ""
    attempts: int = 0


@dataclass(eq=False)
class Child:
    """One caged process, ready for a cell once it has said so."""

    number: int
    channel: socket.socket
    outputs: tuple[int, int]
    session: Session | None
    asked: float
    pid: int = 0
    pidfd: int = -1
    said_ready: bool = False
    ready: bool = False
    job: Job | None = None
    own: bool = True  # the step that runs is the cell itself
    started: float = 0.0
    cpu_start: float = 0.0
    waited_start: float = 0.0
    check: float = 0.0
    """When to look at it next (monotonic seconds)."""
    verdict: Status | None = None
    killed: bool = False
    unsent: bytes = b""
    report: bytearray = field(default_factory=bytearray)
    texts: list[Output] = field(default_factory=list)

    @property
    def pending(self) -> bool:
        """True if something is expected of it."""
        return self.job is not None or self.killed or not self.ready

    def cpu(self) -> float:
        """CPU seconds of all its threads; 0 once it is gone."""
        try:  # the clock id of a process: https://man7.org/linux/man-pages/man3/clock_getcpuclockid.3.html
            return time.clock_gettime((~self.pid << 3) | 2)
        except OSError:
            return 0.0

    def waited(self) -> float:
        """Seconds for which it could have run, but no core was free (Linux schedstat)."""
        try:
            return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[1]) / 1e9
        except (OSError, IndexError, ValueError):
            return 0.0

    def signal(self, number: int) -> None:
        """Send a signal by pidfd: never to another process that got the same number."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self, why: Status | None = None) -> None:
        """End it at once; the fork server tells when it has gone."""
        self.verdict = self.verdict or why
        if not self.killed:
            self.killed, self.check = True, time.monotonic() + _ANSWER_SECONDS
        if self.pidfd >= 0:
            self.signal(signal.SIGKILL)


class Zygote:
    """The fork server as its host sees it.

    Raises:
        OSError: it could not start; the text has its own words.
    """

    def __init__(self, command: list[str], config: dict[str, Any]) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        names = ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "VECLIB_MAXIMUM", "BLIS")
        environment = {f"{name}_NUM_THREADS": "1" for name in names}  # also what makes fork safe
        environment |= {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "TZ": "UTC", "HOME": "/"}
        environment |= {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"}
        if "LD_LIBRARY_PATH" in os.environ:  # some interpreters need it to find their own library
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        file = Path(__file__).with_name("zygote.py")
        interpreter = [sys.executable, "-P", "-s", "-S", "-B", str(file)]
        host = os.pidfd_open(os.getpid())
        try:
            with theirs:  # an own session: Ctrl-C in a notebook is not for it
                self.process = subprocess.Popen(
                    [*command, *interpreter],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    env=environment,
                    cwd="/",
                    start_new_session=True,
                )
            with contextlib.suppress(OSError):  # it has ended already: its last words follow
                socket.send_fds(self.control, [json.dumps(config).encode()], [host])
            self.control.settimeout(_START_SECONDS)
            reply = b""
            with contextlib.suppress(OSError):
                reply = self.control.recv(1 << 16)
            self.about: dict[str, Any] = json.loads(reply) if reply else {}
            if "error" in self.about or not reply:
                self.kill()
                assert self.process.stderr is not None
                lines = self.process.stderr.read().decode(errors="replace").strip().splitlines()
                raise OSError(self.about.get("error") or (lines or ["it said nothing"])[-1])
            self.control.setblocking(False)
        except BaseException:
            self.control.close()
            raise
        finally:
            os.close(host)
            if self.process.stderr is not None:
                self.process.stderr.close()

    def kill(self) -> None:
        """End it; the kernel ends its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(
                self.process.pid, signal.SIGKILL
            )  # not waited for: the number is still its own
        self.process.wait()


class Loop:
    """Runs jobs on at most ``running`` children at once, the rest waits in order.

    Args:
        start: makes a fork server; called again when one dies.
        limits: of each run.
        running: children that may execute at the same time.
    """

    def __init__(self, start: Callable[[], Zygote], limits: Limits, running: int) -> None:
        self.start, self.limits, self.running = start, limits, running
        self.zygote = start()
        self.counts: Counter[Status] = Counter()
        self.recent: deque[bool] = deque(maxlen=200)  # was it a fault of the machinery?
        self.faults = 0  # forks that failed since the last that worked
        self.last_fault = ""
        self.pid = os.getpid()
        self._numbers = itertools.count()
        self._children: dict[int, Child] = {}
        self._spares: deque[Child] = deque()
        self._queue: deque[Job] = deque()
        self._active: set[Job] = set()
        self._calls: deque[Callable[[], None]] = deque()
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self.broken = ""
        self._selector.register(self._wake, selectors.EVENT_READ, self._woken)
        self._selector.register(self.zygote.control, selectors.EVENT_READ, self._told)
        self.thread = threading.Thread(target=self._main, name="rlkit-sandbox", daemon=True)
        self._pump()
        self.thread.start()

    # From other threads -----------------------------------------------------------------------

    def call(self, action: Callable[[], None]) -> None:
        """Have the loop's thread do ``action``."""
        self._calls.append(action)
        with contextlib.suppress(OSError):  # closed
            os.eventfd_write(self._wake, 1)

    def submit(self, job: Job) -> None:
        """Queue a job; cancelling its future kills the run."""

        def done(future: Future[Result]) -> None:
            if future.cancelled():
                self.call(lambda: self._cancel(job))

        job.future.add_done_callback(done)
        self.call(lambda: self._enqueue(job))

    def end_session(self, session: Session) -> None:
        """Let a session's child go."""

        def end() -> None:
            session.closed = True
            if session.child is not None and session.child.job is None:
                session.child.kill()

        self.call(end)

    def stop(self) -> None:
        """End every child, the fork server and the thread; futures still open are cancelled."""
        if os.getpid() != self.pid:  # a forked copy of the host does not own the processes
            return

        def end() -> None:
            self._stopping = True

        self.call(end)
        if threading.current_thread() is not self.thread:
            self.thread.join()

    # The loop ---------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while not self._stopping:
                for key, _ in self._selector.select(self._timeout()):
                    key.data()
                self._check_deadlines()
                self._pump()
        except BaseException as error:
            self.last_fault = f"the executor's loop failed: {type(error).__name__}: {error}"
            for job in [*self._active, *self._queue]:
                if not job.future.done():
                    job.future.set_exception(InfraError(self.last_fault))
            raise
        finally:
            self._stopping = True
            self.zygote.kill()
            for child in list(self._children.values()):
                self._forget(child)
            for job in [*self._active, *self._queue]:
                job.future.cancel()
            self.zygote.control.close()
            self._selector.close()
            os.close(self._wake)

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._calls:
            self._calls.popleft()()

    def _timeout(self) -> float | None:
        now = time.monotonic()
        times = [child.check for child in self._children.values() if child.pending]
        return max(0.0, min(times) - now) if times else None

    def _enqueue(self, job: Job) -> None:
        if not job.future.cancelled():
            self._queue.append(job)

    def _cancel(self, job: Job) -> None:
        with contextlib.suppress(ValueError):
            self._queue.remove(job)
        running = [child for child in self._children.values() if child.job is job]
        for child in running:
            child.kill("infra")
        if not running:
            self._active.discard(job)

    def _pump(self) -> None:
        """Give cells to ready children, and ask for the children that will be needed."""
        while self._queue and len(self._active) < self.running:
            job = self._queue.popleft()
            self._prepare(job)
            self._active.add(job)
        served = {c.job for c in self._children.values()}
        wanted = 0
        for job in [job for job in self._active if job not in served]:
            session = job.session
            if session is None and self._spares:
                self._send(self._spares.popleft(), job)
            elif session is None:
                wanted += 1
            elif session.child is None:
                session.child = self._fork(session)
            elif session.child.ready:
                self._send(session.child, job)
        idle = sum(c.session is None and not (c.job or c.killed) for c in self._children.values())
        asked = sum(not c.ready for c in self._children.values())
        wanted += min(self.running, _SPARES) - idle
        for _ in range(min(wanted, _FORKS - asked)):
            self._fork(None)

    def _prepare(self, job: Job) -> None:
        """List what has to run: a session without a child first rebuilds its variables."""
        job.steps = deque([(True, job.code)] if job.result is None else [])
        if job.session is not None and job.session.child is None:
            job.steps.extendleft((False, code) for code in reversed(job.session.history))

    def _fork(self, session: Session | None) -> Child:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        child = Child(next(self._numbers), ours, (out, err), session, time.monotonic())
        child.check = child.asked + _ANSWER_SECONDS
        self._fresh_outputs(child)
        self._children[child.number] = child
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._heard(child))
        for index, fd in enumerate(child.outputs):
            os.set_blocking(fd, False)
            self._selector.register(fd, selectors.EVENT_READ, partial(self._read, child, index))
        try:
            message = b"%d %d" % (child.number, session is not None)
            ends = [theirs.fileno(), out_end, err_end]
            socket.send_fds(self.zygote.control, [message], ends)
        except OSError:  # it is gone: its closed socket is about to be seen
            child.check = 0.0
        finally:
            theirs.close()
            os.close(out_end)
            os.close(err_end)
        return child

    def _fresh_outputs(self, child: Child) -> None:
        child.texts = [Output(self.limits.output_kib << 10) for _ in child.outputs]

    # What the fork server and the children say ------------------------------------------------

    def _told(self) -> None:
        while True:
            try:
                message, fds, _, _ = socket.recv_fds(self.zygote.control, 256, 1)
            except BlockingIOError:
                return
            except OSError:
                message, fds = b"", []
            if not message:
                self._lost("the fork server ended")
                return
            kind, number, *rest = message.split()
            child = self._children[int(number)]
            if kind == b"born":
                child.pidfd = fds[0]
                about = Path(f"/proc/self/fdinfo/{child.pidfd}").read_text()
                child.pid = int(about.partition("Pid:")[2].split()[0])  # its number seen from here
                self._now_ready(child)
                if child.killed:
                    child.kill()
            elif kind == b"dead":
                self._ended(child, int(rest[0]), float(rest[1]))
            else:
                self._stillborn(child, os.strerror(int(rest[0])))

    def _heard(self, child: Child) -> None:
        if child.number not in self._children:  # it ended within this round of events
            return
        try:
            data = child.channel.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._ignore(child.channel)
        elif not child.said_ready:
            child.said_ready = True
            self._now_ready(child)
        else:
            child.report += data
            if len(child.report) > _REPORT_BYTES:
                child.kill("output")
            elif child.session is not None and child.job is not None:
                report = _parse(child.report)
                if report is not None:
                    self._drain(child)
                    status = child.verdict or _KINDS.get(report.get("kind", ""), "error")
                    used = child.cpu() - child.cpu_start
                    self._stepped(child, self._result(child, status, report, used), alive=True)

    def _now_ready(self, child: Child) -> None:
        if child.said_ready and child.pidfd >= 0:
            child.ready, self.faults = True, 0
            if child.session is None:
                self._spares.append(child)

    def _read(self, child: Child, index: int) -> bool:
        """Take one piece of output; False if there is none."""
        if child.number not in self._children:  # it ended within this round of events
            return False
        fd = child.outputs[index]
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            self._ignore(fd)
            return False
        child.texts[index].add(data)
        if child.texts[index].total > self.limits.output_stop_kib << 10:
            child.kill("output")
            return False
        return True

    def _ignore(self, part: socket.socket | int) -> None:
        with contextlib.suppress(KeyError):  # registered no longer
            self._selector.unregister(part)

    def _drain(self, child: Child) -> None:
        for index in range(len(child.outputs)):
            while self._read(child, index):
                pass

    # One cell ---------------------------------------------------------------------------------

    def _send(self, child: Child, job: Job) -> None:
        own, code = job.steps.popleft()
        if child.session is not None:  # what a background thread left since the last cell
            self._drain(child)
            with contextlib.suppress(OSError):
                while child.channel.recv(1 << 16):
                    pass
            self._fresh_outputs(child)
            child.report.clear()
            child.signal(signal.SIGCONT)
        data = code.encode("utf-8", "surrogatepass")
        last = child.session is None
        child.unsent = HEAD.pack(len(data), job.seed, own and job.echo, last) + data
        child.job, child.own = job, own
        child.cpu_start, child.waited_start = child.cpu(), child.waited()
        child.started = time.monotonic()
        child.check = child.started + min(self.limits.cpu_seconds, self.limits.wall_seconds)
        self._write(child)

    def _write(self, child: Child) -> None:
        events = selectors.EVENT_READ
        try:
            child.unsent = child.unsent[child.channel.send(child.unsent) :]
        except BlockingIOError:
            events |= selectors.EVENT_WRITE
        except OSError:  # it is dying; its end is told by the fork server
            child.unsent = b""
        if child.unsent:
            events |= selectors.EVENT_WRITE

        def both() -> None:
            if child.unsent:
                self._write(child)
            self._heard(child)

        with contextlib.suppress(KeyError):
            self._selector.modify(child.channel, events, both)

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        for child in list(self._children.values()):
            if not child.pending or now < child.check:
                continue
            if child.killed or not child.ready:
                self._lost("the fork server does not answer")
                return
            if child.verdict is not None:  # it was interrupted and did not stop
                child.kill()
                continue
            used, elapsed = child.cpu() - child.cpu_start, now - child.started
            blocked = elapsed - (child.waited() - child.waited_start)
            left = min(self.limits.cpu_seconds - used, self.limits.wall_seconds - blocked)
            if left > 0 and elapsed < _STARVED * self.limits.wall_seconds:
                child.check = now + max(0.002, left)
            elif child.session is None:
                child.kill("timeout")
            else:
                child.verdict = "timeout"
                child.signal(signal.SIGINT)
                child.check = now + _INTERRUPT_SECONDS

    def _ended(self, child: Child, wait_status: int, cpu: float) -> None:
        """The fork server has reaped a child."""
        self._drain(child)
        if child.ready:
            self._heard(child)
        self._forget(child)
        if child.job is None or child.job.future.cancelled():
            if not child.ready and not child.killed:
                self._stillborn(child, child.texts[1].text()[0].strip() or "no message")
            self._active.discard(child.job) if child.job else None
            return
        used, code = cpu - child.cpu_start, os.waitstatus_to_exitcode(wait_status)
        report, status = _parse(child.report), child.verdict
        if status is None and code < 0:
            status, words = _crash(-code, used >= self.limits.cpu_seconds)
            report = {"error": words}
        elif status is None and report is None:
            status = "error"
            report = {"error": f"SystemExit: the code ended its own process (exit status {code})"}
        elif status is None:
            status = _KINDS.get((report or {}).get("kind", ""), "error")
        self._stepped(child, self._result(child, status, report or {}, used), alive=False)

    def _result(self, child: Child, status: Status, report: dict[str, str], cpu: float) -> Result:
        out, cut = child.texts[0].text()
        failed = status in ("error", "memory", "refused")
        return Result(
            status=status,
            stdout=out,
            stderr=child.texts[1].text()[0],
            error=report.get("error", "") if failed else "",
            traceback=report.get("traceback", "") if failed else "",
            echo=report.get("echo", "") if status == "ok" else "",
            cpu_seconds=max(0.0, cpu),
            wall_seconds=time.monotonic() - child.started,
            cut=cut,
        )

    def _stepped(self, child: Child, result: Result, *, alive: bool) -> None:
        """One step of a job is done; decide what follows."""
        job, session = child.job, child.session
        assert job is not None
        child.job, child.verdict = None, None
        if session is None:
            job.result = result
            self._resolve(job)
            return
        if alive:
            child.signal(signal.SIGSTOP)  # nothing of it runs on while nobody counts
        if child.own:
            job.result = result
            job.variables = job.variables or ("kept" if alive else "restored")
            if result.status == "ok":
                session.history.append(job.code)
            if not alive and session.mode == "session" and not session.closed:
                self._prepare(job)
        elif result.status == "ok":
            job.variables = "restored" if session.mode == "session" else "kept"
        else:  # what worked once does not work again, so nothing is promised about variables
            session.history.clear()
            job.variables = "lost"
            job.steps = deque([(True, job.code)] if job.result is None else [])
            child.kill()
        if child.killed or not alive:
            session.child = None
        if not job.steps:
            if session.child is not None and (session.mode == "replay" or session.closed):
                session.child.kill()
                session.child = None
            self._resolve(job)

    def _resolve(self, job: Job) -> None:
        """Hand the result over."""
        assert job.result is not None
        self._active.discard(job)
        result = replace(job.result, variables=job.variables if job.session else "")
        self.counts[result.status] += 1
        self.recent.append(result.status == "infra")
        if job.future.set_running_or_notify_cancel():
            job.future.set_result(result)
        if self.recent.count(True) > max(_FAULTS, 0.1 * len(self.recent)):
            self._give_up(
                f"{self.recent.count(True)} of the last {len(self.recent)} runs failed in the "
                f"machinery, not in their code (last: {self.last_fault}). Results would be biased, "
                "so no more are given. `python -m rlkit doctor` says what this host lacks."
            )

    # Faults of the machinery ------------------------------------------------------------------

    def _stillborn(self, child: Child, why: str) -> None:
        """A child was not made, or could not shut its cage."""
        self.last_fault = f"no child process: {why}"
        if child.number in self._children:
            self._forget(child)
        if child.session is not None and child.session.child is child:
            child.session.child = None
        self.faults += 1
        if self.faults >= _ATTEMPTS * 4:
            self._give_up(f"children cannot be started: {why}")
        else:
            time.sleep(0.01 * self.faults)  # no process left: let others end

    def _lost(self, why: str) -> None:
        """The fork server is dead or mute: end it, start another, run what ran again."""
        self.last_fault = why
        self._selector.unregister(self.zygote.control)
        self.zygote.kill()
        self.zygote.control.close()
        jobs = [child.job for child in self._children.values() if child.job is not None]
        for child in list(self._children.values()):
            self._forget(child)
            if child.session is not None:
                child.session.child = None
        self._spares.clear()
        for job in jobs:
            job.attempts += 1
            if job.attempts >= _ATTEMPTS:
                job.result = job.result or Result(status="infra", error=why)
                self._resolve(job)
            else:
                self._prepare(job)
        for job in self._active - set(jobs):
            self._prepare(job)
        try:
            self.zygote = self.start()
        except OSError as error:
            self._give_up(f"the fork server does not start again: {error}")
        else:
            self._selector.register(self.zygote.control, selectors.EVENT_READ, self._told)

    def _give_up(self, why: str) -> None:
        self.broken = why
        for job in [*self._active, *self._queue]:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(InfraError(why))
        self._active.clear()
        self._queue.clear()
        self._stopping = True

    def _forget(self, child: Child) -> None:
        """Close everything that belongs to a child."""
        self._children.pop(child.number, None)
        if child in self._spares:
            self._spares.remove(child)
        for part in (child.channel, *child.outputs):
            self._ignore(part)
        child.channel.close()
        for fd in (*child.outputs, child.pidfd):
            if fd >= 0:
                os.close(fd)
        child.pidfd = -1


_KINDS: dict[str, Status] = {"": "ok", "exit": "ok", "memory": "memory", "refused": "refused"}


def _parse(report: bytes | bytearray) -> dict[str, str] | None:
    """What a child says about its cell; None if that is not whole, or not what we speak."""
    if len(report) < 4:
        return None
    (length,) = struct.unpack("!I", report[:4])
    if len(report) < 4 + length:
        return None
    try:
        fields = json.loads(report[4 : 4 + length])
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        return {"kind": "error", "error": "the code wrote into its own report"}
    texts = {key: fields.get(key) for key in ("kind", "error", "traceback", "echo")}
    return {
        key: text.encode("utf-8", "replace").decode()
        for key, text in texts.items()
        if isinstance(text, str)
    }


def _crash(number: int, used_up: bool) -> tuple[Status, str]:
    """Status and words for the end by a signal that the host did not send."""
    if number == signal.SIGXCPU or (number == signal.SIGKILL and used_up):
        return "timeout", ""
    if number == signal.SIGKILL:
        return "memory", "the process was killed; most likely the machine ran out of memory"
    if number == signal.SIGSYS:
        return "refused", "a system call that is not allowed here"
    return "error", f"the process crashed: {signal.strsignal(number) or f'signal {number}'}"
