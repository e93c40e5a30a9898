"""Battery of hostile snippets: runs each in the sandbox and says whether the sandbox held.

``python tests/hostile.py --level A --only w-chmod --json rows.json`` runs it from a shell; others
call ``battery``. Each snippet of ``hostile.jsonl`` is run, then ``print(6 * 7)`` must
still print 42, then the checks follow. A snippet is code (``code``, and ``then`` for a second run)
or the ``cells`` of a session. In both, ``/canary``, ``PORT``, ``HOSTPID`` and ``SENTINELPID`` stand
for what this harness made; ``expand`` names texts to repeat, so that large code stays short here.

Three processes. The *driver* plays the trainer: it holds secrets and the executor, in a process
namespace of its own where there are any, so that a broken sandbox hurts nobody else. The *sentinel*
plays the trainer's other processes: it listens on sockets and counts signals. This process only
reads the driver's rows, and starts a new driver where one died or hung.

Checks of every snippet: the driver lives and comes back in 3 s + 5 s; a second run prints 42 and no
status is ``infra``; the executor's processes are those of before, none more, none less; no signal,
connection or datagram reached driver or sentinel and their rlimits, nice values and cores are
unchanged; nothing in the canary's folder changed; no secret is in any text of a result. The codes
in ``check`` name those a snippet aims at (``host time noleft nosignal noconnect nowrite noleak``)
or add one:

==============  ====================================================================================
``nostat``      ``STAT-LEAK`` is not printed: existence and size of host files stay unknown
``notext:T``    T is in no standard output or echo (a traceback may quote the snippet's own line)
``text:T``      T is in the standard output or echo of the last run
``notok``       the status is not ``ok``
``cellN:S``     the status of cell N (from 1) is S, or is not S with ``cellN:!S``
``late``        the checks again 1.5 s after the run: nothing acts later
``idle``        in the 3 s after the last cell of an open session, its processes use < 2 s CPU
``mem``         the executor's processes grow by < 1000 MiB, the machine's shared memory by
                < 1000 MiB, the driver by < 150 MiB
``disk``        the snippet says that it wrote at most 16 MiB
``out``         all texts of a result together are < 100,000 characters, the driver grows < 150 MiB
``nofds``       the driver has no descriptor more than before
``clean``       the text for the prompt has no control character and no lone surrogate
``tokens``      the text for the prompt has no token of a chat template
``fence``       the text for the prompt has no run of three backticks
==============  ====================================================================================
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import resource
import select
import selectors
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CPU, WALL, MEMORY = 1.0, 3.0, 512
"""Limits of the battery: seconds, seconds, MiB."""
TOKENS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "</think>")
ALONE = {"mem", "out", "disk", "late", "idle", "nofds"}
"""Checks whose measure is of all processes together: nothing else may run at the same time."""
FLIGHT, CHUNK = 6, 30
"""Snippets that run at the same time, and how many run between two looks at the damage."""
Snippet = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One snippet's outcome: whether the sandbox held, why not, and the seconds it took."""

    id: str
    cls: str
    held: bool
    why: str
    seconds: float


def load(only: Iterable[str] = (), path: Path = HERE / "hostile.jsonl") -> list[Snippet]:
    """The snippets; ``only`` names ids or classes. Those in machine code are for x86-64 alone."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    chosen = set(only)
    if unknown := chosen - {row[key] for row in rows for key in ("id", "class")}:
        raise ValueError(f"only={sorted(unknown)}: expected ids or classes of {path.name}")
    rows = [row for row in rows if not chosen or {row["id"], row["class"]} & chosen]
    if platform.machine() != "x86_64":
        rows = [row for row in rows if not re.search(r"l\.syscall\(|prot=7", json.dumps(row))]
    return rows


# ---- the sentinel


def _limits(pid: int) -> list[Any]:
    """What others could change about a process."""
    return [
        *(resource.prlimit(pid, r) for r in (resource.RLIMIT_NOFILE, resource.RLIMIT_CPU)),
        os.getpriority(os.PRIO_PROCESS, pid),
        sorted(os.sched_getaffinity(pid)),
        os.sched_getscheduler(pid),
    ]


def sentinel(folder: str) -> None:
    """Listen, block and count all signals, and answer each line on stdin with what happened."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    tcp = socket.create_server(("127.0.0.1", 0))
    port = tcp.getsockname()[1]
    listeners = [tcp]
    for family, kind, name in (
        (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", port)),
        (socket.AF_INET6, socket.SOCK_STREAM, ("::1", port)),
        (socket.AF_UNIX, socket.SOCK_STREAM, f"\0canary-{port}"),
        (socket.AF_UNIX, socket.SOCK_DGRAM, f"\0canary-dgram-{port}"),
        (socket.AF_UNIX, socket.SOCK_STREAM, f"{folder}/sock"),
    ):
        with contextlib.suppress(OSError):  # no IPv6 in many containers
            one = socket.socket(family, kind)
            one.bind(name)
            if kind == socket.SOCK_STREAM:
                one.listen()
            listeners.append(one)
    Path(folder, "sock").chmod(0o777)
    chooser = selectors.DefaultSelector()
    for each in [*listeners, sys.stdin]:
        chooser.register(each, selectors.EVENT_READ)
    hits, signals = 0, []
    print(json.dumps({"port": port, "pid": os.getpid()}), flush=True)
    while True:
        ready = sorted((key.fileobj for key, _ in chooser.select()), key=lambda f: f is sys.stdin)
        for each in ready:
            if each is not sys.stdin:
                hits += 1
                if each.type == socket.SOCK_DGRAM:
                    each.recv(99)
                else:
                    each.accept()[0].close()
            elif not sys.stdin.readline():
                return
            else:
                while got := signal.sigtimedwait(signal.valid_signals(), 0):
                    signals.append(got.si_signo)
                row = {"hits": hits, "signals": signals, "limits": _limits(0)}
                print(json.dumps(row), flush=True)


# ---- the driver: looks at itself, at its children and at the canary


def _children(skip: int) -> dict[tuple[int, str], tuple[int, int]]:
    """Processes below this one, but ``skip``: (pid, start time) -> (CPU ticks, resident bytes)."""
    found: dict[int, tuple[int, str, str, int, int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                text = (entry / "stat").read_text(errors="replace")
                part = text.rpartition(")")[2].split()
                ticks, size = int(part[11]) + int(part[12]), int(part[21]) * resource.getpagesize()
                found[int(entry.name)] = (int(part[1]), part[19], part[0], ticks, size)
    known, me = {os.getpid()}, os.getpid()
    while more := {p for p, row in found.items() if row[0] in known} - known - {skip}:
        known |= more
    # A zombie whose parent is this process waits for us: as "subreaper" we inherit orphans.
    return {
        (pid, row[1]): (row[3], row[4])
        for pid in known - {me}
        if not ((row := found[pid])[2] == "Z" and row[0] == me)
    }


def _tree(folder: Path) -> dict[str, Any]:
    """All that a write below ``folder`` would change."""
    rows: dict[str, Any] = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        info = path.lstat()
        text = b""
        if stat.S_ISREG(info.st_mode):
            with contextlib.suppress(OSError):
                text = path.read_bytes()
        attributes: list[str] = []
        with contextlib.suppress(OSError):
            attributes = os.listxattr(path, follow_symlinks=False)
        owner = (info.st_mode, info.st_uid, info.st_gid, info.st_nlink)
        content = (info.st_size, info.st_mtime_ns, sha256(text).hexdigest(), attributes)
        rows[str(path)] = owner + content
    return rows


def _memory() -> tuple[int, int]:
    """Bytes: resident in this process, and shared memory of the whole machine."""
    shared = re.search(r"Shmem: +(\d+) kB", Path("/proc/meminfo").read_text())
    resident = Path("/proc/self/statm").read_text().split()[1]
    return int(resident) * resource.getpagesize(), int(shared[1]) * 1024 if shared else 0


def _fill(folder: Path, secrets: Sequence[str]) -> None:
    """Make the canary's files, or make them again after damage."""
    for name in ("w", "cwd"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(exist_ok=True)
    for name, text in (
        ("secret.txt", secrets[0]),
        ("w/victim.txt", "victim\n"),
        ("cwd/neighbour.py", f"TOKEN = {secrets[4]!r}\n"),
    ):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(text)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o666)


class Driver:
    """Runs snippets one after the other or a few at once, and looks for damage."""

    def __init__(self, job: dict[str, Any]) -> None:
        from rlkit.sandbox import Limits, PythonExecutor  # the tested part: only the driver has it
        from rlkit.tool_text import describe

        self.describe, self.secrets = describe, job["secrets"]
        self.folder, self.signals = Path(job["folder"]), []
        quiet = {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGPIPE, signal.SIGABRT}
        quiet |= {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGSYS}
        for number in signal.valid_signals() - quiet:
            signal.signal(number, lambda n, _: self.signals.append(n))
        command = [sys.executable, __file__, "--sentinel", job["folder"], job["argv"]]
        self.sentinel = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        start = self.ask(None)
        self.words = {"/canary": job["folder"], "PORT": str(start["port"])}
        self.words |= {"HOSTPID": str(os.getpid()), "SENTINELPID": str(start["pid"])}
        limits = Limits(cpu_seconds=CPU, wall_seconds=WALL, memory_mib=MEMORY)
        self.executor = PythonExecutor(
            limits, isolation=job["level"], running=FLIGHT, _without=tuple(job["without"])
        )
        self.settle()

    def ask(self, line: str | None = "?\n") -> dict[str, Any]:
        """The sentinel's answer; empty if it is dead or stopped."""
        pipe = self.sentinel
        assert pipe.stdin and pipe.stdout
        with contextlib.suppress(OSError, ValueError):
            if line:
                pipe.stdin.write(line)
                pipe.stdin.flush()
            if select.select([pipe.stdout], [], [], 20 if line is None else 3)[0]:
                return dict(json.loads(pipe.stdout.readline()))
        return {}

    def look(self) -> dict[str, Any]:
        tree, seen = _tree(self.folder), self.ask()
        signals, limits = list(self.signals), _limits(0)
        return {"nowrite": tree, "sentinel": seen, "own": (signals, limits)}

    def settle(self) -> None:
        """Learn which processes the executor keeps through ordinary runs."""
        seen = []
        for _ in range(2):
            for _ in range(2 * FLIGHT):  # an executor may keep spare children, one for each slot
                self.executor.run("print(6 * 7)")
            time.sleep(0.3)
            seen.append(set(_children(self.sentinel.pid)))
        self.stable, self.most = set.intersection(*seen), max(map(len, seen))
        self.known = seen[-1]
        self.before = self.look()

    def repair(self) -> None:
        """After damage: end what is left, restore the canary, learn the processes again."""
        for pid, _ in set(_children(self.sentinel.pid)) - self.known:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        _fill(self.folder, self.secrets)
        os.chdir(self.folder / "cwd")  # the old one was removed
        self.settle()

    def damage(self) -> list[str]:
        """What is different from the last ``settle``; waits 2 s for processes to go."""
        why, now = [], self.look()
        for name, text in (
            ("nowrite", "nowrite: the canary's folder changed"),
            ("own", "nosignal: the driver got a signal or other limits"),
            ("sentinel", "sentinel"),
        ):
            if now[name] != self.before[name]:
                if name == "sentinel":
                    old, new = self.before[name], now[name]
                    keys = [k for k in old if old[k] != new.get(k)] if new else ["dead or stopped"]
                    text = f"noconnect/nosignal: the sentinel's {keys} changed"
                why.append(text)
        end = time.monotonic() + 2
        while len(left := _children(self.sentinel.pid)) > self.most and time.monotonic() < end:
            time.sleep(0.02)
        if len(left) > self.most:
            why.append(f"noleft: {len(left) - self.most} processes more than before")
        if self.stable - set(left):
            why.append("host: a process of the executor ended")
        return why

    def group(self, rows: Sequence[Snippet]) -> list[Row] | None:
        """Run snippets at the same time; None if something is wrong that may be any one's."""
        found: dict[str, tuple[list[str], float]] = {}
        began: dict[str, float] = {}
        todo = list(rows)[::-1]

        def work() -> None:
            while todo:
                row = todo.pop()
                began[row["id"]] = start = time.monotonic()
                why = self.attempt(row)
                found[row["id"]] = (why, time.monotonic() - start)

        for _ in range(min(len(rows), FLIGHT)):
            threading.Thread(target=work, daemon=True).start()
        patience = {row["id"]: 20 + 8 * len(row.get("cells", [])) for row in rows}
        hung: list[str] = []
        while len(found) < len(rows) and not hung:
            time.sleep(0.02)  # not a join: this thread has to handle signals
            now = time.monotonic()
            open_ = began.keys() - found.keys()
            hung = [i for i in open_ if now > began[i] + patience[i]]
        why = [*self.damage(), *([f"time: {hung} did not come back"] if hung else [])]
        if len(rows) == 1 and "late" in rows[0]["check"] and not why:
            time.sleep(1.5)
            why = self.damage()
        if why and len(rows) > 1:
            return None
        if why and not hung:
            self.repair()
        none: tuple[list[str], float] = ([], 0.0)
        return [
            Row(row["id"], row["class"], not both, "; ".join(both), round(seconds, 2))
            for row in rows
            for own, seconds in [found.get(row["id"], none)]
            for both in [[*own, *why]]
        ]

    def attempt(self, row: Snippet) -> list[str]:
        """Run one snippet and check what its own results tell."""
        check, why = row["check"], []
        code = [self.fill(c, row) for c in row.get("cells", [row.get("code", "")])]
        idle, watch = 0.0, _Watch(self.sentinel.pid)
        fds = len(list(Path("/proc/self/fd").iterdir()))
        results, walls = [], []

        def timed(call: Any, text: str) -> Any:
            start = time.monotonic()
            results.append(call(text))
            walls.append(time.monotonic() - start)
            return results[-1]

        try:
            if "cells" in row:
                with self.executor.session(state="session") as session:
                    for cell in code:
                        timed(session.run, cell)
                    if "idle" in check:
                        idle = watch.idle(3.0)
                    closing = time.monotonic()
                walls.append(time.monotonic() - closing)
            else:
                timed(self.executor.run, code[0])
            peak = watch.stop()
            own = list(results)
            if "then" in row:
                timed(self.executor.run, self.fill(row["then"], row))
            if (after := self.executor.run("print(6 * 7)")).stdout != "42\n":
                why.append(f"host: a second run gave {after.status} {after.stdout[:50]!r}")
        except Exception as error:  # the executor never raises because of what code does
            watch.stop()
            return [f"host: {type(error).__name__}: {error}"[:300]]
        if len(list(Path("/proc/self/fd").iterdir())) > fds and "nofds" in check:
            why.append("nofds: descriptors are left open")
        if max(walls) > WALL + 5:
            why.append(f"time: {max(walls):.1f} s")
        why += [f"host: status infra ({r.error[:200]})" for r in results if r.status == "infra"]
        texts = [r.stdout + r.echo for r in results]
        whole = [r.stdout + r.stderr + r.error + r.traceback + r.echo for r in results]
        if any(secret in text for secret in self.secrets for text in whole):
            why.append("noleak: a secret is in the output")
        size = sum(map(len, whole))
        if "out" in check and size > 100_000 * len(results):
            why.append(f"out: {size} characters")
        most = (1000, 1000, 150) if "mem" in check else (1 << 20, 1 << 20, 150)
        if {"mem", "out"} & set(check) and any(p > m for p, m in zip(peak, most, strict=True)):
            why.append(f"mem: processes, shared, driver grew by {peak} MiB")
        if idle >= 2:
            why.append(f"idle: {idle:.1f} s CPU in 3 s")
        for each in check:
            name, _, text = each.partition(":")
            if name == "notext" and any(text in t for t in texts):
                why.append(f"{each}: printed")
            if name == "text" and text not in texts[len(own) - 1]:
                why.append(
                    f"{each}: not printed, but {own[-1].status} {texts[len(own) - 1][:80]!r}"
                )
            if name == "nostat" and any("STAT-LEAK" in t for t in texts):
                why.append("nostat: printed")
            if name == "notok" and own[-1].status == "ok":
                why.append("notok: status ok")
            if name == "disk" and int((re.findall(r"WROTE (\d+)", texts[0]) or [0])[0]) > 16:
                why.append(f"disk: {texts[0][-40:]!r}")
            if name.startswith("cell"):
                status = own[int(name[4:]) - 1].status
                if (status == text.lstrip("!")) == text.startswith("!"):
                    why.append(f"{each}: status {status}")
        if {"clean", "tokens", "fence"} & set(check) and own[-1].status != "infra":
            prompt = self.describe(own[-1])
            if re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", prompt):
                why.append(f"clean: {prompt[:80]!r}")
            if "tokens" in check and any(token in prompt for token in TOKENS):
                why.append(f"tokens: {prompt[:80]!r}")
            if "fence" in check and "```" in prompt:
                why.append(f"fence: {prompt[:80]!r}")
        return why

    def fill(self, code: str, row: Snippet) -> str:
        for name, (text, times) in (row.get("expand") or {}).items():
            code = code.replace(name, text * times)
        return re.sub(r"/canary|\b(?:PORT|HOSTPID|SENTINELPID)\b", lambda m: self.words[m[0]], code)


class _Watch(threading.Thread):
    """Samples memory while a snippet runs: MiB that processes, machine and driver grew by."""

    def __init__(self, skip: int) -> None:
        super().__init__(daemon=True)
        self.skip, self.over, self.peak = skip, threading.Event(), [0, 0, 0]
        self.start()

    def run(self) -> None:
        first: list[int] | None = None
        while not self.over.wait(0.1 if first else 0):
            own, shared = _memory()
            now = [sum(size for _, size in _children(self.skip).values()), shared, own]
            first = first or now
            self.peak = [
                max(p, (n - f) >> 20) for p, n, f in zip(self.peak, now, first, strict=True)
            ]

    def stop(self) -> list[int]:
        self.over.set()
        self.join()
        return self.peak

    def idle(self, seconds: float) -> float:
        """CPU seconds that the executor's processes use in the next ``seconds``."""
        time.sleep(0.2)  # the last cell's own work may still be booked
        before = _children(self.skip)
        end, used = time.monotonic() + seconds, dict(before)
        while time.monotonic() < end:  # a process that is killed in between still counts
            time.sleep(0.1)
            used |= _children(self.skip)
        ticks = sum(t - before.get(key, (0, 0))[0] for key, (t, _) in used.items())
        return ticks / os.sysconf("SC_CLK_TCK")


def drive() -> None:
    """The driver's process: reads its job from stdin, writes rows into the descriptor it names."""
    global GOLD_ANSWER, HOST_SECRET
    job = json.loads(sys.stdin.readline())
    GOLD_ANSWER, HOST_SECRET = job["secrets"][1], job["secrets"][2]
    os.set_inheritable(job["fd"], False)
    rows = os.fdopen(job["fd"], "w")
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans stay below us

    def say(what: Any) -> None:
        rows.write(json.dumps(what) + "\n")
        rows.flush()

    driver = Driver(job)
    say({"level": str(driver.executor.info.level), "layers": list(driver.executor.info.layers)})
    todo = [[row] for row in job["snippets"]]
    if job["together"]:
        free = [r for r in job["snippets"] if not ALONE & set(r["check"])]
        todo = [[r] for r in job["snippets"] if ALONE & set(r["check"])]
        todo += [free[i : i + CHUNK] for i in range(0, len(free), CHUNK)]
    for group in todo:
        say({"start": [row["id"] for row in group]})
        done = driver.group(group)
        if done is None:
            driver.repair()
            done = []
            for row in group:
                say({"start": [row["id"]]})
                done += driver.group([row]) or []
        for row in done:
            say(asdict(row))
        if any("did not come back" in row.why for row in done):
            os._exit(1)  # a thread still waits: go on in a new driver
    driver.executor.close()
    driver.sentinel.kill()


# ---- this process


def _own_pids() -> list[str]:
    """The command that puts the driver into a process namespace of its own; empty if none works."""
    for user in ([], ["--user", "--map-current-user"]):
        box = ["unshare", *user, "--pid", "--fork", "--mount-proc", "--kill-child"]
        with contextlib.suppress(OSError):
            if subprocess.run([*box, "true"], capture_output=True, check=False).returncode == 0:
                # A process 1 gets no signal of kill(-1) and no default action: have a shell be it.
                return [*box, "sh", "-c", '"$@"; exit $?', "sh"]
    return []


def _canary() -> tuple[Path, list[str]]:
    """A folder that only the sandbox protects (all may read and write it), and the secrets.

    In /var/tmp where there is one: a sandbox that only hides /tmp shall not pass.
    """
    place = "/var/tmp" if os.access("/var/tmp", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="hostile-", dir=place))
    file = f"SECRET-FILE-{os.urandom(12).hex()}"  # 36 bytes, as the snippet stat-probe knows
    secrets = [file, *(f"SECRET-{k}-{os.urandom(12).hex()}" for k in ("GOLD", "MEM", "ENV", "MOD"))]
    _fill(folder, secrets)
    users = Path("/etc/passwd").read_text().splitlines()[:1]
    return folder, [*secrets, *users]


def battery(
    snippets: Sequence[Snippet],
    level: str = "A",
    without: Sequence[str] = (),
    together: bool = True,
    python: str = sys.executable,
    progress: bool = False,
) -> list[Row]:
    """Run snippets in the sandbox at ``level`` without the named layers; one row for each.

    Args:
        together: run several snippets at the same time where their checks permit it.
        python: the interpreter of the driver.

    Raises:
        RuntimeError: the driver does not start, for example because the level is refused.
    """
    todo, rows, name = list(snippets), dict[str, Row](), {s["id"]: s["class"] for s in snippets}
    alone: list[str] = []
    while todo:
        folder, secrets = _canary()
        environment = {**os.environ, "CANARY_ENV": secrets[3], "HF_TOKEN": secrets[3]}
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [os.environ.get("PYTHONPATH"), str(HERE.parent)])
        )
        read, write = os.pipe()
        os.set_inheritable(write, True)
        argv = f"CMD-CANARY-{os.urandom(8).hex()}"
        job = {"folder": str(folder), "secrets": [*secrets, argv], "argv": argv, "fd": write}
        now = [s for s in todo if s["id"] in alone] or todo
        job |= {"level": level, "without": list(without), "snippets": now}
        job |= {"together": together and not alone}
        with tempfile.TemporaryFile() as log:
            driver = subprocess.Popen(
                [*_own_pids(), python, __file__, "--drive", argv],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=folder / "cwd",
                pass_fds=(write,),
                start_new_session=True,
            )
            os.close(write)
            assert driver.stdin
            with contextlib.suppress(OSError):
                driver.stdin.write(json.dumps(job).encode() + b"\n")
                driver.stdin.close()
            under_way, started, why = _collect(read, rows, progress)
            with contextlib.suppress(OSError):
                os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
            log.seek(0)
            text = log.read(100_000).decode(errors="replace")
        shutil.rmtree(folder, ignore_errors=True)
        if not started:
            raise RuntimeError(f"the driver did not start ({why}):\n{text[-3000:]}")
        lost = [i for i in under_way if i not in rows]
        if len(lost) == 1:
            rows[lost[0]] = Row(lost[0], name[lost[0]], False, f"host: the driver {why}", 0.0)
        # Of several the guilty one is not known: once more, one by one.
        alone = lost if len(lost) > 1 else [i for i in alone if i not in rows]
        if not lost and len(rest := [s for s in todo if s["id"] not in rows]) == len(todo):
            raise RuntimeError(f"the driver {why} without a row of {len(rest)}:\n{text[-3000:]}")
        todo = [s for s in todo if s["id"] not in rows]
    return [rows[s["id"]] for s in snippets]


def _collect(read: int, rows: dict[str, Row], progress: bool) -> tuple[list[str], bool, str]:
    """Read rows until the driver ends: ids under way, whether it started, and how it ended."""
    under_way: list[str] = []
    started, rest = False, b""
    try:
        while True:
            # Longer than the driver itself waits for its slowest snippet, a session of 60 cells.
            if not select.select([read], [], [], 90)[0]:
                return under_way, started, "hung"
            block = os.read(read, 65536)
            if not block:
                return under_way, started, "died"
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                row = json.loads(line)
                if "level" in row:
                    started = True
                elif "start" in row:
                    under_way = row["start"]
                else:
                    rows[row["id"]] = Row(**row)
                    under_way = [i for i in under_way if i != row["id"]]
                    if progress:
                        mark = "held" if row["held"] else "BROKEN"
                        print(
                            f"{mark:7}{row['seconds']:6.1f} s  {row['id']:28} {row['why']}",
                            flush=True,
                        )
    finally:
        os.close(read)


def main() -> int:
    if sys.argv[1:2] == ["--sentinel"]:
        sentinel(sys.argv[2])
        return 0
    if sys.argv[1:2] == ["--drive"]:
        drive()
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--level", default="A", help="isolation level: A, B, C or D")
    parser.add_argument("--without", nargs="*", default=[], help="layers to leave out")
    parser.add_argument("--only", nargs="*", default=[], help="ids or classes of snippets")
    parser.add_argument("--one-by-one", action="store_true", help="never two at the same time")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    start = time.monotonic()
    rows = battery(
        load(options.only), options.level, options.without, not options.one_by_one, progress=True
    )
    bad = [row for row in rows if not row.held]
    for row in bad:
        print(f"NOT HELD {row.cls}/{row.id}: {row.why}")
    print(f"{len(rows) - len(bad)} of {len(rows)} held, {time.monotonic() - start:.0f} s")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
