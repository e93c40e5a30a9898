"""One caged process as the host sees it. Nothing that it says about itself is believed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import time

from rlkit.sandbox.limits import Limits
from rlkit.sandbox.result import LEFT_OUT, Result, Status

_REPORT_BYTES = 1 << 18
_STARVED = 10.0  # times wall_seconds, however busy the machine is
_CONTINUATION = bytes(range(0x80, 0xC0))  # of a character in UTF-8, after its first byte
_KINDS: dict[str, Status] = {"": "ok", "exit": "ok", "memory": "memory", "refused": "refused"}


class Output:
    """Head and tail of a stream, with bounded memory."""

    def __init__(self, keep: int) -> None:
        self.half, self.total, self.characters = keep // 2, 0, 0
        self.head, self.tail = bytearray(), bytearray()

    def add(self, data: bytes) -> None:
        """Take the next piece."""
        self.total += len(data)
        self.characters += len(data.translate(None, _CONTINUATION))
        room = self.half - len(self.head)
        self.head += data[:room]
        self.tail += data[room:]
        if len(self.tail) > 2 * self.half:
            del self.tail[: -self.half]

    def text(self) -> tuple[str, int]:
        """What is shown, and the number of characters left out of it."""
        tail = self.tail[-self.half :]
        if self.total == len(self.head) + len(tail):
            return (self.head + tail).decode("utf-8", "replace"), 0
        start = next((i for i in range(4) if tail[i] & 0xC0 != 0x80), 0)  # a character cut in two
        head = self.head.decode("utf-8", "replace").rstrip("\ufffd")
        shown = tail[start:].decode("utf-8", "replace")
        cut = max(1, self.characters - len(head) - len(shown))
        return head + LEFT_OUT.format(cut) + shown, cut


class Child:
    """A process that was asked for; it runs one cell, or those of a session.

    Attributes:
        ready: resolves to "" once its cage is shut, to the reason if that failed.
        over: resolves when the cell is over: to wait status and CPU seconds if the process ended,
            to None if it lives on (a session) or its fork server was lost.
    """

    def __init__(self, limits: Limits, session: bool) -> None:
        self.limits, self.session = limits, session
        self.loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[str] = self.loop.create_future()
        self.over: asyncio.Future[tuple[int, float] | None] = self.loop.create_future()
        self.lost = self.killed = self.gone = self._shut = False
        self.verdict: Status | None = None
        self.timer: asyncio.TimerHandle
        self.pid, self.pidfd, self.killed_at = 0, -1, 0.0
        with contextlib.ExitStack() as undo:
            self.channel, theirs = map(undo.enter_context, socket.socketpair())
            out, out_end = _pipe(undo)
            err, err_end = _pipe(undo)
            undo.pop_all()
        self.outputs = (out, err)
        self.ends = (theirs.detach(), out_end, err_end)  # the child's, until it has them
        self._clear()
        self.channel.setblocking(False)
        self.loop.add_reader(self.channel, self._heard)
        for index, fd in enumerate(self.outputs):
            os.set_blocking(fd, False)
            self.loop.add_reader(fd, self._read, index)

    def born(self, pidfd: int) -> None:
        """The fork server has made it."""
        self.pidfd = pidfd
        about = _slurp(f"/proc/self/fdinfo/{pidfd}")
        self.pid = int(about.partition(b"Pid:")[2].split()[0])  # its number as seen from here
        if self.killed:
            self.signal(signal.SIGKILL)
        self._now_ready()

    def ended(self, how: tuple[int, float] | None, why: str = "") -> None:
        """It is gone (``how``), or nobody knows (None: its fork server was lost)."""
        self._drain()
        while self._heard():
            pass
        self.gone, self.lost = True, how is None
        for fd in (self.channel, *self.outputs):
            self.loop.remove_reader(fd)
        self.loop.remove_writer(self.channel)  # of a cell half sent; the number is soon another's
        self.channel.close()
        for fd in (*self.outputs, self.pidfd):
            if fd >= 0:
                os.close(fd)
        self.pidfd = -1
        if not self.ready.done():
            words = self._texts[1].text()[0].strip().splitlines() or ["it ended before its cell"]
            self.ready.set_result(why or words[-1])
        if not self.over.done():
            self.over.set_result(how)

    def signal(self, number: int) -> None:
        """Send a signal by pidfd: never to another process that got the same number."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def kill(self, why: Status | None = None) -> None:
        """End it at once; the fork server tells when it has gone."""
        self.verdict = self.verdict or why
        if not self.killed:
            self.killed, self.killed_at = True, time.monotonic()
        self.signal(signal.SIGKILL)

    def begin(self) -> None:
        """Start the clocks of a cell."""
        if self.session:  # it was stopped; what a background thread left behind is dropped
            self._drain()
            with contextlib.suppress(OSError):
                while self.channel.recv(1 << 16):
                    pass
            self._clear()
            self.over = self.loop.create_future()
            self.signal(signal.SIGCONT)
        self._cpu, self._started = self.cpu(), time.monotonic()

    def send(self, data: bytes) -> bytes:
        """Send a cell; what its channel has no room for yet is left to the caller."""
        try:
            return data[self.channel.send(data) :]
        except BlockingIOError:
            return data
        except OSError:  # it is dying; its end is told by the fork server
            return b""

    def left(self) -> float:
        """Seconds until the first limit can be reached; 0 or less: it is over one."""
        elapsed = time.monotonic() - self._started
        if elapsed > _STARVED * self.limits.wall_seconds:
            return 0.0
        blocked = elapsed - self.waited()  # in a session with what earlier cells waited
        used = self.cpu() - self._cpu
        return min(self.limits.cpu_seconds - used, self.limits.wall_seconds - blocked)

    def cpu(self) -> float:
        """CPU seconds of all its threads; 0 once it is gone."""
        if self.pid <= 0:  # reaped before we saw it; these would be clocks of our own
            return 0.0
        try:  # https://man7.org/linux/man-pages/man3/clock_getcpuclockid.3.html
            return time.clock_gettime((~self.pid << 3) | 2)
        except OSError:
            return 0.0

    def waited(self) -> float:
        """Seconds for which it could have run, but no core was free (schedstat).

        Of the thread that waited longest: the sum would let threads that compete for the cores
        earn time to sleep in. Of the first 64, as the host reads a file for each.
        """
        try:
            tasks = f"/proc/{self.pid}/task"
            stats = [_slurp(f"{tasks}/{task}/schedstat") for task in os.listdir(tasks)[:64]]  # noqa: PTH208
            return max(int(stat.split()[1]) for stat in stats) / 1e9
        except (OSError, IndexError, ValueError):  # a thread has ended, or a kernel without it
            return 0.0

    def result(self) -> Result:
        """What became of the cell; only after ``over``."""
        how, report, status = self.over.result(), self._told or _parse(self._report), self.verdict
        used, error = self.cpu(), ""
        if how is not None:
            code, used = os.waitstatus_to_exitcode(how[0]), how[1]
        if status is None and used - self._cpu > self.limits.cpu_seconds:
            status = "timeout"  # its threads passed the limit between two looks
        if how is not None:
            if status is None and code < 0:
                spent = used - self._cpu >= self.limits.cpu_seconds
                status, error = _crash(-code, spent)
            elif status is None and report is None:
                status = "error"
                error = f"SystemExit: the code ended its own process (exit status {code})"
        report = report or {}
        status = status or _KINDS.get(report.get("kind", ""), "error")
        told = status in ("error", "memory", "refused")
        out, cut = self._texts[0].text()
        return Result(
            status=status,
            stdout=out,
            stderr=self._texts[1].text()[0],
            error=error or (report.get("error", "") if told else ""),
            traceback=report.get("traceback", "") if told else "",
            echo=report.get("echo", "") if status == "ok" else "",
            cpu_seconds=max(0.0, used - self._cpu),
            wall_seconds=time.monotonic() - self._started,
            cut=cut,
        )

    def _clear(self) -> None:
        self._told: dict[str, str] | None
        self._report, self._told = bytearray(), None
        self._texts = [Output(self.limits.output_kib << 10) for _ in self.outputs]

    def _now_ready(self) -> None:
        if self._shut and self.pidfd >= 0 and not self.ready.done():
            self.ready.set_result("")

    def _heard(self) -> bool:
        """Take one piece of its report; False if there is none."""
        try:
            data = b"" if self.gone else self.channel.recv(1 << 16)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            if not self.gone:
                self.loop.remove_reader(self.channel)
            return False
        if not self._shut:
            self._shut = True
            self._now_ready()
            return True
        self._report += data
        if len(self._report) > _REPORT_BYTES:
            self.kill("output")
            return False
        if self.session and not self.over.done():
            self._told = _parse(self._report)
            if self._told is not None:
                self._drain()
                self.signal(signal.SIGSTOP)  # nothing of it runs on while nobody counts
                self.over.set_result(None)
        return True

    def _read(self, index: int) -> bool:
        """Take one piece of output; False if there is none."""
        try:
            data = b"" if self.gone else os.read(self.outputs[index], 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            if not self.gone:
                self.loop.remove_reader(self.outputs[index])
            return False
        self._texts[index].add(data)
        if self._texts[index].total > self.limits.output_stop_kib << 10:
            self.kill("output")
            return False
        return True

    def _drain(self) -> None:
        for index in range(len(self.outputs)):
            while self._read(index):
                pass


def _slurp(path: str) -> bytes:
    """A small file of /proc; pathlib would take five times as long, and this is in every cell."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def _pipe(undo: contextlib.ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for fd in ends:
        undo.callback(os.close, fd)
    return ends


def _parse(report: bytes | bytearray) -> dict[str, str] | None:
    """What a child says about its cell; None if that is not whole yet."""
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
    return {k: t.encode("utf-8", "replace").decode() for k, t in texts.items() if type(t) is str}


def _crash(number: int, spent: bool) -> tuple[Status, str]:
    """Status and words for the end by a signal that the host did not send."""
    if number == signal.SIGXCPU or (number == signal.SIGKILL and spent):
        return "timeout", ""
    if number == signal.SIGKILL:
        return "memory", "the process was killed; most likely the machine ran out of memory"
    if number == signal.SIGSYS:
        return "refused", "a system call that is not allowed here"
    return "error", f"the process crashed: {signal.strsignal(number) or f'signal {number}'}"
