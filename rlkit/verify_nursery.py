"""The nursery of ``verify_pool``, seen from its host: it forks workers and ends them.

The program on the other side is ``_verify_worker.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_STARTUP_SECONDS = 120.0
_CONTROL_SECONDS = 30.0
_GRACE_SECONDS = 1.0  # the kernel's alarm comes first; a stopped process does not feel it

Pair = tuple[str, str]
"""Gold and answer; the gold with itself asks whether it can be parsed."""


class ForkError(RuntimeError):
    """The machine has no process left for a worker; the nursery itself is well."""


@dataclass(eq=False)
class Worker:
    """One forked process; ``cpu`` seconds are as of its last reply."""

    nursery: Nursery
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


class Nursery:
    """The process that forks workers. Its owner holds a lock around every call.

    Raises:
        OSError: no socket or process is left on this machine.
        RuntimeError: the process ended before it was ready; the text has its last words.
    """

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
            self._kill_group()
            _, error = self.process.communicate()
            self.control.close()
            lines = error.decode(errors="replace").strip().splitlines() or ["no message"]
            raise RuntimeError(
                f"The process that compares expressions did not start: {lines[-1]}. It needs the "
                "package math-verify (pip install math-verify[antlr4_13_2])."
            )
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.control.settimeout(_CONTROL_SECONDS)

    def fork(self, ours: socket.socket, theirs: socket.socket) -> Worker:
        """A new worker that serves ``theirs``; both sockets stay the caller's to close.

        Raises:
            ForkError: the machine has no process left; a later call may succeed.
            OSError, ValueError: the nursery is gone or does not answer; kill it.
        """
        socket.send_fds(self.control, [b"fork\n"], [theirs.fileno()])
        pid = int(self.control.recv(64))
        if pid < 0:
            raise ForkError(os.strerror(-pid))
        return Worker(self, ours, pid)

    def end(self, worker: Worker) -> float:
        """Kill ``worker``; CPU seconds since its last reply.

        Raises:
            OSError, ValueError: the nursery is gone or does not answer. Kill it: a reply that comes
                late would be taken for that of the next call.
        """
        self.control.sendall(b"end %d\n" % worker.pid)
        return float(self.control.recv(64)) - worker.cpu

    def kill(self) -> None:
        """End the nursery and all its workers."""
        self._kill_group()
        self.process.wait()
        self.control.close()
        self._wait_for_workers()

    def _wait_for_workers(self) -> None:
        """Return when the last worker has gone: killed is not yet ended, and it holds memory."""
        deadline = time.monotonic() + 2.0  # a first process that reaps nobody leaves zombies
        while time.monotonic() < deadline:
            try:
                os.killpg(self.process.pid, 0)
            except (ProcessLookupError, PermissionError):
                return
            time.sleep(0.002)

    def _kill_group(self) -> None:
        # Before it is waited for: until then its number, which names the group, is not given away.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
