"""Runs code on a SandboxFusion server: the interface of ``PythonExecutor``, over HTTP.

Request and response: sandbox/server/sandbox_api.py in https://github.com/bytedance/SandboxFusion
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import math
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal
from urllib.parse import urlsplit

from rlkit.sandbox.limits import Limits
from rlkit.sandbox.result import Result, Status
from rlkit.tool_text import head_tail

START = "docker run --rm -p 127.0.0.1:8080:8080 volcengine/sandbox-fusion:server-20250609"
"""The documented command (docs/docs/docs/get-started.mdx), but open to this machine only: the
server runs any code of anyone who reaches it."""
MAX_BYTES = 1 << 24
"""Of an answer. The server keeps 1 MiB of each stream, which JSON makes up to six times as long."""


@dataclass(frozen=True)
class RemoteInfo:
    """What holds when code runs on a server.

    Attributes:
        level: always ``remote``.
        layers: layers of isolation that this side has set up: none.
        not_guaranteed: what ``PythonExecutor`` promises and a server does not.
    """

    level: str = "remote"
    layers: tuple[str, ...] = ()
    not_guaranteed: tuple[str, ...] = (
        "isolation: by default code sees the container, its network and the files of other runs",
        "a CPU limit: the time limit is wall-clock time, so results depend on the server's load",
        "the memory limit: with the server's isolation 'lite' it is 4 GB whatever is asked for",
        "all output: above 1 MiB it is cut, and a loaded server may return none",
        "CPU time and the value of the last expression: the server does not report them",
        "fixed seeds, live sessions, and the end of a run that is cancelled",
    )


class SandboxFusionExecutor:
    """Posts code to a SandboxFusion server. Use it in a ``with`` or ``async with`` block.

    What the server says of the code is ``ok``, ``error``, ``timeout`` or ``memory`` (MemoryError,
    or ended by SIGKILL as the kernel does when memory runs out). Whatever else goes wrong (server,
    transport, an answer that makes no sense) is ``infra``. ``counts`` counts the statuses.

    Args:
        url: ``http://host:port``, with the path of ``/run_code`` if it is not the root. The
            environment's proxies are not used and redirects not followed.
        wall_seconds: time limit of a run, 0.01 to 3600.
        memory_mib: address space of a run in MiB, 16 to 1,048,576.
        running: requests in flight at once, >= 1; more wait here, outside of every time limit.
        timeout: seconds for a whole request, the server's queue included; > ``wall_seconds``.
        max_characters: of stdout, stderr and traceback each to keep, head and tail; >= 2.

    Raises:
        ValueError: a value out of range, or ``url`` is none.
        ConnectionError: the server does not run a first program.
    """

    def __init__(
        self,
        url: str,
        *,
        wall_seconds: float = 5.0,
        memory_mib: int = 1024,
        running: int = 64,
        timeout: float = 60.0,
        max_characters: int = 8192,
    ) -> None:
        for name, value, good, expected in (
            ("wall_seconds", wall_seconds, 0.01 <= wall_seconds <= 3600, "0.01 to 3600 seconds"),
            ("memory_mib", memory_mib, 16 <= memory_mib <= 1 << 20, "16 to 1048576 MiB"),
            ("running", running, running >= 1, "a number >= 1"),
            ("timeout", timeout, wall_seconds < timeout < math.inf, f"more than {wall_seconds=}"),
            ("max_characters", max_characters, max_characters >= 2, "a number >= 2"),
        ):
            if not good:
                raise ValueError(f"{name}={value!r}: expected {expected}")
        self._https, self._host, self._port, self._path = _parts(url)
        # Of the server's limits those that a run here has, too; time is wall-clock time alone.
        self.limits = Limits(wall_seconds, wall_seconds, memory_mib)
        self._limits = {"run_timeout": wall_seconds, "memory_limit_MB": memory_mib}
        self._timeout, self._max_characters = timeout, max_characters
        self._lock = threading.Lock()
        self.info = RemoteInfo()
        self.counts: Counter[Status] = Counter()
        for _ in range(3):  # a loaded server may lose the output
            probe = self._post("print(6 * 7)")
            if not probe.ok or probe.stdout:
                break
        if not probe.ok or probe.stdout.strip() != "42":
            raise ConnectionError(
                f"url={url!r}: expected a SandboxFusion server that prints 42, got status "
                f"{probe.status!r}, {probe.stdout[:200]!r}, {probe.error!r}. To start one: {START}"
            )
        self._pool = ThreadPoolExecutor(running, thread_name_prefix="sandbox")

    def submit(self, code: str) -> Future[Result]:
        """Start a run. Cancelling its future helps only as long as it waits here."""
        return self._pool.submit(self._counted, code)

    def run(self, code: str) -> Result:
        """Run code in a fresh state."""
        return self.submit(code).result()

    def run_all(self, codes: Sequence[str]) -> list[Result]:
        """Run many at once; results in order."""
        return [future.result() for future in [self.submit(code) for code in codes]]

    async def arun(self, code: str) -> Result:
        """``run`` for asyncio."""
        return await asyncio.wrap_future(self.submit(code))

    def session(self, state: Literal["fresh", "session", "replay"]) -> RemoteSession:
        """Cells in sequence, each in a ``fresh`` state or after a silent ``replay``.

        Raises:
            ValueError: ``session``, which no server keeps, or another state.
        """
        if state not in ("fresh", "replay"):
            raise ValueError(
                f"state={state!r}: expected 'fresh' or 'replay', as a SandboxFusion server keeps "
                "no process between requests; PythonExecutor has live sessions"
            )
        return RemoteSession(self, replay=state == "replay")

    def close(self) -> None:
        """Drop what waits here, wait for requests in flight (at most ``timeout``)."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> SandboxFusionExecutor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aenter__(self) -> SandboxFusionExecutor:
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self.close)

    def _counted(self, code: str) -> Result:
        result = self._post(code)
        with self._lock:
            self.counts[result.status] += 1
        return result

    def _post(self, code: str) -> Result:
        start = time.monotonic()
        try:
            code.encode()
        except UnicodeEncodeError as error:  # the server would refuse the request: code's fault
            return Result("error", error=f"SyntaxError: {error}")
        try:
            body = json.dumps({"code": code, "language": "python", **self._limits})
            answer = json.loads(self._exchange(body.encode()))
            return _result(answer, self._max_characters, time.monotonic() - start)
        # RuntimeError: JSON nested too deeply, or no thread left.
        except (OSError, http.client.HTTPException, ValueError, RuntimeError) as error:
            what = f"{type(error).__name__}: {error}"[:500]
            return Result("infra", error=what, wall_seconds=time.monotonic() - start)

    def _exchange(self, body: bytes) -> bytes:
        # Not urllib.request, which follows redirects and the environment's proxies.
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        with contextlib.closing(kind(self._host, self._port, timeout=self._timeout)) as connection:
            connection.connect()
            # A socket's own timeout starts anew with each byte; this one ends the exchange.
            watchdog = threading.Timer(self._timeout, _shut, [connection.sock])
            watchdog.daemon = True
            watchdog.start()
            try:
                header = {"Content-Type": "application/json"}
                connection.request("POST", self._path, body, header)
                with connection.getresponse() as response:
                    answer = response.read(MAX_BYTES + 1)
            finally:
                watchdog.cancel()
        # ``length`` is what the header promised and the body does not hold.
        if response.status != 200 or len(answer) > MAX_BYTES or response.length:
            raise ValueError(f"HTTP {response.status}, {len(answer)} bytes: {answer[:200]!r}")
        return answer


@dataclass
class RemoteSession:
    """Cells in sequence; with ``replay`` all that ended well so far run again before each.

    The time limit then holds for all of them together.
    """

    executor: SandboxFusionExecutor
    replay: bool
    cells: tuple[str, ...] = ()

    def submit(self, code: str) -> Future[Result]:
        """Start the next cell; wait for its result before the one after it."""
        if not self.replay:
            return self.executor.submit(code)
        return self.executor._pool.submit(self._replayed, code)

    def run(self, code: str) -> Result:
        """Run one cell."""
        return self.submit(code).result()

    def close(self) -> None:
        """Let the variables go."""
        self.cells = ()

    def _replayed(self, code: str) -> Result:
        result = self.executor._counted(_REPLAY.format(self.cells, code))
        if result.ok:
            self.cells += (code,)
        return replace(result, variables="kept")

    def __enter__(self) -> RemoteSession:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_REPLAY = """\
def replay(cells, cell, names):
    from contextlib import redirect_stderr, redirect_stdout, suppress
    from io import StringIO
    for code in cells:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), suppress(SystemExit):
            exec(compile(code, "<cell>", "exec"), names)
    exec(compile(cell, "<cell>", "exec"), names)
replay({!r}, {!r}, {{"__name__": "__main__"}})
"""


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed in the meantime
        sock.shutdown(socket.SHUT_RDWR)


def _parts(url: str) -> tuple[bool, str, int | None, str]:
    """Of the requests' address: whether https, host, port, path."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # a port or an IPv6 address that is none
        host = None
    if not host or parts.scheme not in ("http", "https") or "@" in url or set("?# \r\n") & set(url):
        raise ValueError(
            f"url={url!r}: expected scheme, host and perhaps port and path, such as "
            "http://127.0.0.1:8080"
        )
    path = parts.path.rstrip("/").removesuffix("/run_code") + "/run_code"
    return parts.scheme == "https", host, port, path


def _result(answer: Any, limit: int, seconds: float) -> Result:
    """An answer of the server as a result; ValueError if it failed or does not keep its schema."""
    run = answer.get("run_result") if isinstance(answer, dict) else None
    if not isinstance(run, dict):
        raise ValueError(f"the server failed: {str(answer)[:300]}")
    outcome, code, spent = run.get("status"), run.get("return_code"), run.get("execution_time")
    out, err = run.get("stdout"), run.get("stderr")
    # The schema allows None for each of these.
    out, err = "" if out is None else out, "" if err is None else err
    spent = seconds if spent is None else spent
    ok, timeout = outcome == "Finished" and code == 0, outcome == "TimeLimitExceeded"
    if (
        answer.get("status") != ("Success" if ok else "Failed")  # also SandboxError
        or not (timeout or (outcome == "Finished" and type(code) is int))
        or not (isinstance(out, str) and isinstance(err, str))
        or type(spent) not in (int, float)  # ``Result`` checks its range
    ):
        raise ValueError(f"the server failed: {str(answer)[:300]}")
    (stdout, cut), (stderr, _) = head_tail(out, limit), head_tail(err, limit)
    if ok or timeout:
        return Result("ok" if ok else "timeout", stdout, stderr, wall_seconds=spent, cut=cut)
    # A traceback begins after the warnings; a SyntaxError has no such line.
    trace = head_tail(err[max(err.find("Traceback (most recent call last):"), 0) :], limit)[0]
    lines = err.rstrip().splitlines() or [f"exit code {code}"]
    error = lines[-1][:limit]
    status: Status = "error"
    if "MemoryError" in error.split(":")[0] or code in (-9, 137):
        status = "memory"
    return Result(status, stdout, stderr, error, trace, wall_seconds=spent, cut=cut)
