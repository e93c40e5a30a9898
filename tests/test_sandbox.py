"""The executor as its callers see it: results, limits, sessions, faults of its own machinery.

What hostile code can reach is in test_sandbox_hostile.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from queue import Queue
from unittest.mock import Mock

import pytest

from rlkit.sandbox import InfraError, IsolationError, Limits, PythonExecutor, Result, executor, host
from rlkit.sandbox.child import Child, Output
from rlkit.sandbox.host import State
from rlkit.sandbox.levels import attempts

LIMITS = Limits(cpu_seconds=1.0, wall_seconds=3.0, memory_mib=256)
BUSY = "import time\nwhile time.process_time() - started < {}: pass"


@pytest.fixture(scope="module")
def ex() -> Iterator[PythonExecutor]:
    with PythonExecutor(LIMITS) as executor:
        yield executor


@pytest.fixture
def bare() -> Iterator[PythonExecutor]:
    """Without packages it starts in a tenth of a second."""
    with PythonExecutor(LIMITS, packages=(), running=2) as executor:
        yield executor


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Poll, so that a slow machine only takes longer."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


def kill_server(ex: PythonExecutor) -> None:
    os.killpg(ex._host.zygote.process.pid, signal.SIGKILL)


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# What a run gives ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "stdout", "error"),
    [
        ("print(1 + 1)", "ok", "2\n", ""),
        ("", "ok", "", ""),
        ("x = 1", "ok", "", ""),
        ("print('é∑😀')", "ok", "é∑😀\n", ""),
        ("print('no newline', end='')", "ok", "no newline", ""),
        ("print('before')\n1/0", "error", "before\n", "ZeroDivisionError: division by zero"),
        ("x = (", "error", "", "SyntaxError: '(' was never closed"),
        ("import sys\nprint('a')\nsys.exit()", "ok", "a\n", ""),
        ("import sys\nsys.exit(0)", "ok", "", ""),
        ("import sys\nsys.exit(3)", "error", "", "SystemExit: 3"),
        ("print('a')\nexit()", "ok", "a\n", ""),
        ("quit('why')", "error", "", "SystemExit: why"),
        ("raise KeyboardInterrupt", "error", "", "KeyboardInterrupt"),
        ("input('? ')", "error", "? ", "EOFError: EOF when reading a line"),
        ("[0] * 10**10", "memory", "", "MemoryError"),
        ("import torch", "error", "", "ModuleNotFoundError: No module named 'torch'"),
        ("import rlkit", "error", "", "ModuleNotFoundError: No module named 'rlkit'"),
        (
            "import os\nos.fork()",
            "refused",
            "",
            "PermissionError: [Errno 1] Operation not permitted",
        ),
        ("while True: pass", "timeout", "", ""),
        ("print('a')\nwhile True: pass", "timeout", "a\n", ""),
        (
            "import os\nprint('a')\nos._exit(4)",
            "error",
            "a\n",
            "SystemExit: the code ended its own process (exit status 4)",
        ),
        (
            "import ctypes\nctypes.string_at(0)",
            "error",
            "",
            "the process crashed: Segmentation fault",
        ),
    ],
)
def test_status_and_texts(
    ex: PythonExecutor, code: str, status: str, stdout: str, error: str
) -> None:
    result = ex.run(code)
    assert (result.status, result.stdout, result.error) == (status, stdout, error)
    assert result.ok is (status == "ok")
    assert result.variables == "" and result.cut == 0


def test_the_echo_is_the_value_of_a_last_expression(ex: PythonExecutor) -> None:
    assert [ex.run(code).echo for code in ("2**10", "'a'", "None", "x = 1", "1/0", "1\n;\n")] == [
        "1024",
        "'a'",
        "",
        "",
        "",
        "",
    ]
    assert ex.run("print(1)\n[1, 2]").echo == "[1, 2]"
    long = ex.run("'x' * 100_000").echo
    assert len(long) < 5_000 and "characters left out" in long
    with PythonExecutor(LIMITS, packages=(), echo=False) as quiet:
        assert quiet.run("2**10").echo == ""


def test_the_traceback_shows_the_code_and_nothing_of_the_machinery(ex: PythonExecutor) -> None:
    result = ex.run("def f(x):\n    return 1 / x\n\nf(0)")
    lines = result.traceback.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert '  File "<cell>", line 4, in <module>' in lines and "    return 1 / x" in lines
    assert lines[-1] == result.error == "ZeroDivisionError: division by zero"
    assert "runner" not in result.traceback and "/" not in result.traceback.replace("1 / x", "")
    wrong = ex.run("for i in range(3)\n    print(i)")
    assert wrong.traceback.splitlines()[0] == '  File "<cell>", line 1'
    with ex.session() as trace:
        trace.run("def f(x):\n    return 1 / x\n")
        lines = trace.run("f(0)").traceback.splitlines()
    assert [line for line in lines if line.strip(" ^~")] == [
        "Traceback (most recent call last):",
        '  File "<cell 2>", line 1, in <module>',
        "    f(0)",
        '  File "<cell>", line 2, in f',
        "    return 1 / x",
        "ZeroDivisionError: division by zero",
    ]


def test_a_run_ends_as_a_program_does(ex: PythonExecutor) -> None:
    result = ex.run("import atexit\natexit.register(print, 'bye')\nprint('hello')")
    assert result.stdout == "hello\nbye\n"
    later = "import threading, time\ndef f():\n    time.sleep(0.1)\n    print('later')\n"
    assert ex.run(later + "threading.Thread(target=f).start()\nprint(1)").stdout == "1\nlater\n"
    assert ex.run("help(len)").stdout.startswith("Help on built-in function len")
    gone = ex.run("import sys\nprint(1)\ndel sys.stdout")
    assert (gone.status, gone.stdout, gone.stderr) == ("ok", "1\n", "")


def test_warnings_go_to_stderr(ex: PythonExecutor) -> None:
    result = ex.run("import warnings\nwarnings.warn('careful')\nprint(1)")
    assert result.stdout == "1\n" and "UserWarning: careful" in result.stderr


@pytest.mark.parametrize(
    ("data", "keep", "text", "cut"),
    [
        (b"", 8, "", 0),
        (b"12345678", 8, "12345678", 0),
        (b"123456789", 8, "1234... [1 characters left out] ...6789", 1),
        (b"ab\xff", 8, "ab\ufffd", 0),
        # a character that the cut goes through is dropped on both sides
        (
            "abcé".encode() + b"......" + "éxyz".encode(),
            8,
            "abc... [8 characters left out] ...xyz",
            8,
        ),
    ],
)
def test_head_and_tail(data: bytes, keep: int, text: str, cut: int) -> None:
    for size in (1, 2, 3, 100):
        output = Output(keep)
        for i in range(0, len(data), size):
            output.add(data[i : i + size])
        assert output.text() == (text, cut)


def test_much_output_is_cut_and_endless_output_stopped(ex: PythonExecutor) -> None:
    result = ex.run("for i in range(10_000): print(i)")
    assert result.status == "ok"
    assert result.stdout.startswith("0\n1\n") and result.stdout.endswith("9998\n9999\n")
    assert result.cut == 48_890 - (LIMITS.output_kib << 10)
    flood = ex.run("while True: print('y' * 1000)")
    assert flood.status == "output" and flood.stdout.startswith("yyy")
    assert len(flood.stdout) < 9_000 and flood.cpu_seconds < LIMITS.cpu_seconds


def test_seconds_are_those_of_the_child(ex: PythonExecutor) -> None:
    busy = ex.run("import time\nt = time.process_time()\nwhile time.process_time() - t < 0.2: pass")
    assert 0.2 <= busy.cpu_seconds < 0.5 and busy.wall_seconds >= 0.2
    asleep = ex.run("import time\ntime.sleep(0.3)")
    assert asleep.cpu_seconds < 0.2 and asleep.wall_seconds >= 0.3


def test_wall_limit_stops_what_sleeps(bare: PythonExecutor) -> None:
    result = bare.run("import time\nprint('zzz')\ntime.sleep(100)")
    assert result.status == "timeout" and result.stdout == "zzz\n" and result.cpu_seconds < 0.5


def test_cpu_of_all_threads_counts(bare: PythonExecutor) -> None:
    code = (
        "import threading\ndef f():\n    while True: pass\n"
        "threading.Thread(target=f).start()\nimport time\ntime.sleep(50)"
    )
    result = bare.run(code)
    assert result.status == "timeout" and result.cpu_seconds >= LIMITS.cpu_seconds


def test_threads_do_not_pass_the_cpu_limit_between_two_looks(bare: PythonExecutor) -> None:
    code = (
        "import hashlib, threading, time\ndef f():\n    while time.thread_time() < 0.55:\n"
        "        hashlib.pbkdf2_hmac('sha256', b'', b'', 9999)\n"  # without the interpreter's lock
        "threads = [threading.Thread(target=f) for _ in range(2)]\n"
        "for thread in threads: thread.start()\nfor thread in threads: thread.join()"
    )
    assert bare.run(code).status == "timeout"
    with bare.session() as trace:
        assert trace.run(code).status == "timeout"


def test_code_of_any_kind_of_text(ex: PythonExecutor) -> None:
    assert ex.run("print('a')\n" + "#" * 3_000_000).stdout == "a\n"
    assert ex.run("print(1)\0").status == "error"
    assert ex.run("x = '\ud800'").status == "error"
    assert ex.run("(" * 5_000 + ")" * 5_000).status in ("error", "memory")
    with pytest.raises(TypeError, match=r"code is bytes: expected the text"):
        ex.run(b"print(1)")  # type: ignore[arg-type]


def test_a_forged_report_is_not_a_status(ex: PythonExecutor) -> None:
    forged = (
        "import os, json, struct\ntext = json.dumps({}).encode()\n"
        "os.write(3, struct.pack('!I', len(text)) + text)\n"
    )
    assert ex.run(forged + "while True: pass").status == "timeout"
    garbage = ex.run("import os\nos.write(3, b'\\0\\0\\0\\4abcd')\nos._exit(0)")
    assert (garbage.status, garbage.error) == ("error", "the code wrote into its own report")
    deep = "import os, struct\nt = b'[' * 100_000\nos.write(3, struct.pack('!I', len(t)) + t)"
    assert ex.run(deep).status == "error"
    assert ex.run("import os\nwhile True: os.write(3, b'x' * 1000)").status == "output"


def test_a_report_that_is_heard_only_at_the_end_is_heard_whole() -> None:
    async def main() -> str:
        child = Child(LIMITS, session=False)
        for fd in child.ends[1:]:
            os.close(fd)
        with socket.socket(fileno=child.ends[0]) as channel:
            channel.send(b"R")
            child._heard()
            child.begin()
            report = json.dumps({"kind": "error", "error": "\U0001f600" * 8_000}).encode()
            channel.sendall(struct.pack("!I", len(report)) + report)
            child.ended((0, 0.1))
        return child.result().error

    assert asyncio.run(main()) == "\U0001f600" * 8_000


# Nothing is shared, everything is repeatable ---------------------------------------------------


def test_runs_share_nothing(ex: PythonExecutor) -> None:
    ex.run("import math, builtins\nmath.sqrt = print\nbuiltins.sum = print\nsecret = 1")
    after = ex.run("import math\nprint(math.sqrt(4), sum([1, 2]), 'secret' in globals())")
    assert after.stdout == "2.0 3 False\n"


def test_random_numbers_and_hashes_repeat(ex: PythonExecutor) -> None:
    code = (
        "import random, numpy\n"
        "print(random.random(), numpy.random.rand(), hash('a'), list({'a', 'b', 'c', 'd'}))"
    )
    first = ex.run(code).stdout
    assert ex.run(code).stdout == first
    assert ex.run(code, seed=1).stdout != first
    with PythonExecutor(LIMITS) as other:
        assert other.run(code).stdout == first
    with ex.session() as trace:
        cells = [trace.run("import random\nprint(random.random())").stdout for _ in range(2)]
    assert cells[0] != cells[1] and first.startswith(cells[0].strip())


def test_modules_of_python_itself_may_be_named() -> None:
    with PythonExecutor(LIMITS, packages=("json", "sys")) as executor:
        assert executor.run("import json\nprint(json.dumps(1))").stdout == "1\n"


def test_the_callers_environment_stays_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf-canary")
    with PythonExecutor(LIMITS, packages=()) as executor:
        seen = executor.run("import os, sys\nprint(dict(os.environ), sys.argv, sys.path)").stdout
        assert "canary" not in seen and "site-packages" not in seen
        assert executor.run("import os\nprint(os.environ['CUDA_VISIBLE_DEVICES'])").stdout == "\n"
        assert executor.run("import numpy").error == "ModuleNotFoundError: No module named 'numpy'"


# Sessions --------------------------------------------------------------------------------------


def test_a_session_keeps_variables(ex: PythonExecutor) -> None:
    with ex.session() as trace:
        assert trace.run("x = 1").variables == "kept"
        assert trace.run("x += 1\nx").echo == "2"
        failed = trace.run("x += 1\n1/0")
        assert (failed.status, failed.variables) == ("error", "kept")
        assert '"<cell 3>", line 2' in failed.traceback
        assert trace.run("print(x)").stdout == "3\n"
    with ex.session() as other:
        assert other.run("x").error.startswith("NameError")


def test_an_interrupted_cell_keeps_variables(bare: PythonExecutor) -> None:
    with bare.session() as trace:
        trace.run("x = 41")
        stopped = trace.run("x += 1\nprint('a')\nwhile True: pass")
        assert (stopped.status, stopped.stdout, stopped.variables) == ("timeout", "a\n", "kept")
        assert trace.run("x").echo == "42"


def test_a_killed_session_is_rebuilt_from_what_succeeded(bare: PythonExecutor) -> None:
    with bare.session() as trace:
        trace.run("x = [1]\nprint('once')")
        trace.run("x.append(2)\n1/0")  # failed: not run again
        trace.run("x.append(3)")
        stubborn = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"
        stopped = trace.run(stubborn)
        assert (stopped.status, stopped.variables) == ("timeout", "restored")
        after = trace.run("print(x)")
        assert (after.stdout, after.variables) == ("[1, 3]\n", "kept")
        ended = trace.run("import os\nos._exit(0)")
        assert (ended.status, ended.variables) == ("error", "restored")
        assert trace.run("print(x)").stdout == "[1, 3]\n"


def test_what_cannot_be_rebuilt_is_called_lost(bare: PythonExecutor) -> None:
    with bare.session() as trace:
        trace.run("import time\nstart = time.time()")
        trace.run(f"if time.time() > {time.time() + 0.5}: raise ValueError('too late')")
        time.sleep(0.6)
        assert trace.run("import os\nos._exit(0)").variables == "lost"
        assert trace.run("start").error == "NameError: name 'start' is not defined"
        assert trace.run("y = 1").variables == "kept"


def test_variables_of_failed_cells_alone_are_lost_with_their_child(bare: PythonExecutor) -> None:
    with bare.session() as trace:
        assert trace.run("import os\nos._exit(0)").variables == "kept"  # there were none
        assert trace.run("x = 1\n1/0").variables == "kept"
        assert trace.run("import os\nos._exit(0)").variables == "lost"
        assert trace.run("x = 2").variables == "kept"
        assert trace.run("import os\nos._exit(0)").variables == "restored"


def test_a_cell_runs_once_even_if_no_child_follows(
    bare: PythonExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bare.session() as trace:
        assert trace.run("x = 1").ok
        monkeypatch.setattr(bare._host, "_fork", Mock(side_effect=host._LostError("no more")))
        ended = trace.run("x += 1\nimport os\nos._exit(0)")
        assert (ended.status, ended.variables) == ("error", "lost")
        assert trace.run("x").status == "infra"
        monkeypatch.undo()
        restored = trace.run("x")
        assert (restored.echo, restored.variables) == ("1", "restored")


def test_replay_runs_the_earlier_cells_again(bare: PythonExecutor) -> None:
    with bare.session("replay") as trace:
        assert trace.run("x = 1\nprint('a')").stdout == "a\n"
        assert trace.run("x += 1\nos").status == "error"
        result = trace.run("print(x)")
        assert (result.stdout, result.variables) == ("1\n", "kept")
        assert (
            trace.run("import os\nprint(os.getpid())").stdout
            != trace.run("print(os.getpid())").stdout
        )


def test_fresh_cells_know_nothing(bare: PythonExecutor) -> None:
    with bare.session("fresh") as trace:
        trace.run("x = 1")
        result = trace.run("x")
        assert result.error.startswith("NameError") and result.variables == ""
    with pytest.raises(ValueError, match="state='live': expected one of"):
        bare.session("live")  # type: ignore[arg-type]


def test_a_session_does_nothing_between_cells(bare: PythonExecutor) -> None:
    with bare.session() as trace:
        trace.run("import threading, time\nn = 0\ndef f():\n    global n\n    while True: n += 1")
        trace.run("threading.Thread(target=f, daemon=True).start()")
        first = int(trace.run("n").echo)
        child = trace._session.child
        assert child is not None
        wait_for(lambda: Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2][1] == "T")
        used = child.cpu()
        time.sleep(0.3)
        assert child.cpu() - used < 0.01  # its last thread may have stopped a moment later
        assert trace.run(f"while n == {first}: time.sleep(0.001)").ok  # now it goes on


def test_cells_do_not_overlap(bare: PythonExecutor) -> None:
    with bare.session() as trace:
        slow = trace.submit("import time\ntime.sleep(0.5)")
        with pytest.raises(RuntimeError, match="still runs: wait for its result"):
            trace.submit("x")
        assert slow.result().ok and trace.run("1").ok


def test_a_closed_session_leaves_no_process(bare: PythonExecutor) -> None:
    trace = bare.session()
    assert trace.run("x = 1").ok
    child = trace._session.child
    assert child is not None and alive(child.pid)
    trace.close()
    wait_for(lambda: not alive(child.pid))
    with pytest.raises(RuntimeError, match="this session is closed"):
        trace.run("x")


@pytest.mark.parametrize("state", ["fresh", "session", "replay"])
@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_closing_a_session_cancels_its_cell(
    bare: PythonExecutor, state: State, pause: float
) -> None:
    with bare.session(state) as trace:
        cell = trace.submit("import time\ntime.sleep(60)")
        time.sleep(pause)
    with pytest.raises(CancelledError):
        cell.result(timeout=5)
    dropped = bare.session(state).submit("import time\ntime.sleep(60)")  # nobody holds the trace
    gc.collect()
    with pytest.raises(CancelledError):
        dropped.result(timeout=5)
    wait_for(lambda: not any(c.session for c in list(bare._host._children.values())))


# Many at once ----------------------------------------------------------------------------------


def test_hundreds_in_flight(ex: PythonExecutor) -> None:
    results = ex.run_all(f"print({i} * {i})" for i in range(256))
    assert [int(result.stdout) for result in results] == [i * i for i in range(256)]


@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 4096, reason="needs 3000 descriptors"
)
def test_more_births_than_the_fork_servers_socket_holds() -> None:
    with PythonExecutor(LIMITS, packages=(), running=450) as many, ExitStack() as stack:
        traces = [stack.enter_context(many.session()) for _ in range(450)]
        results = [cell.result() for cell in [trace.submit("1") for trace in traces]]
    assert {result.status for result in results} == {"ok"}


@pytest.mark.parametrize("runs", [12, pytest.param(64, marks=pytest.mark.slow)])
def test_waiting_for_a_core_is_no_time_of_the_run(ex: PythonExecutor, runs: int) -> None:
    code = "import time\nt = time.process_time()\nwhile time.process_time() - t < 0.4: pass"
    assert [result.status for result in ex.run_all([code] * runs)] == ["ok"] * runs


def test_runs_are_counted_by_status(bare: PythonExecutor) -> None:
    assert bare.counts == {}
    bare.run_all(["1", "1/0", "2", "import os\nos.fork()"])
    assert bare.counts == {"ok": 2, "error": 1, "refused": 1}


def test_any_thread_may_call(ex: PythonExecutor) -> None:
    found: dict[int, str] = {}

    def work(i: int) -> None:
        found[i] = ex.run(f"print({i})").stdout

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: f"{i}\n" for i in range(16)}


def test_asyncio(ex: PythonExecutor) -> None:
    async def main() -> list[str]:
        results = await asyncio.gather(*[ex.arun(f"print({i})") for i in range(8)])
        async with ex.session() as trace:
            await trace.arun("x = 'kept'")
            results.append(await trace.arun("print(x)"))
        return [result.stdout for result in results]

    assert asyncio.run(main()) == [*(f"{i}\n" for i in range(8)), "kept\n"]


def test_cancelling_kills(bare: PythonExecutor) -> None:
    async def main() -> None:
        task = asyncio.create_task(bare.arun("import time\ntime.sleep(60)"))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    running = [bare.submit("import time\ntime.sleep(60)") for _ in range(2)]  # all its places
    waiting = [bare.submit("print(1)") for _ in range(4)]
    time.sleep(0.1)
    assert waiting[2].cancel() and all(future.cancel() for future in running)
    assert [f.result().stdout for i, f in enumerate(waiting) if i != 2] == ["1\n"] * 3
    assert bare.counts["timeout"] == 0


def test_closing_ends_what_runs() -> None:
    for pause in (0.0, 0.0, 0.1):
        with PythonExecutor(LIMITS, packages=(), running=1) as executor:
            futures = [executor.submit("import time\ntime.sleep(60)") for _ in range(3)]
            time.sleep(pause)
        for future in futures:  # not CancelledError: in a task it would pass for one's own
            with pytest.raises(InfraError, match="this executor is closed"):
                future.result(timeout=5)
        with pytest.raises(InfraError, match="this executor is closed"):
            executor.run("print(1)")
        executor.close()  # once more does nothing


def test_a_callback_may_submit_but_not_wait(bare: PythonExecutor) -> None:
    told: Queue[object] = Queue()

    def callback(_: object) -> None:
        told.put(bare.submit("print(2)"))
        try:
            bare.run("print(3)")
        except RuntimeError as error:
            told.put(str(error))

    bare.submit("import time\ntime.sleep(0.1)").add_done_callback(callback)
    following = told.get(timeout=20)
    assert isinstance(following, Future) and following.result(20).stdout == "2\n"
    assert told.get(timeout=20) == "a future's callback would wait for itself here: use submit()"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_exit_in_a_callback_closes(bare: PythonExecutor) -> None:
    bare.submit("import time\ntime.sleep(0.1)").add_done_callback(lambda _: sys.exit(1))
    bare._host.thread.join(20)
    with pytest.raises(InfraError, match="this executor is closed"):
        bare.run("print(1)")


def test_run_all_takes_several_texts(bare: PythonExecutor) -> None:
    with pytest.raises(TypeError, match=r"codes is one text: expected several; run\(\) takes one"):
        bare.run_all("print(1)")
    with pytest.raises(TypeError, match="code is NoneType"):
        bare.run_all(["import time\ntime.sleep(60)"] * 2 + [None])  # type: ignore[list-item]
    assert bare.run("print(1)").ok  # the others have been cancelled and hold no place


# Faults of the machinery -----------------------------------------------------------------------


def test_a_dead_fork_server_is_replaced_and_runs_go_on(bare: PythonExecutor) -> None:
    futures = [bare.submit(f"import time\ntime.sleep(0.3)\nprint({i})") for i in range(6)]
    with bare.session() as trace:
        trace.run("x = 41")
        child = trace._session.child
        assert child is not None
        kill_server(bare)
        wait_for(lambda: child.gone)
        result = trace.run("x += 1\nx")
        assert (result.echo, result.variables) == ("42", "restored")
    assert [future.result().stdout for future in futures] == [f"{i}\n" for i in range(6)]
    assert bare.counts["infra"] == 0


def test_spare_children_that_died_are_not_the_next_runs_fault() -> None:
    with PythonExecutor(LIMITS, packages=(), running=8) as executor:
        assert executor.run("print(1)").ok
        wait_for(lambda: len(executor._host._children) == 8)
        spares = list(executor._host._children.values())
        wait_for(lambda: all(child.ready.done() for child in spares))
        for child in spares:
            os.kill(child.pid, signal.SIGKILL)
        wait_for(lambda: all(child.gone for child in spares))
        assert [result.status for result in executor.run_all(["print(1)"] * 4)] == ["ok"] * 4


def test_a_child_that_dies_before_it_has_its_cell(bare: PythonExecutor) -> None:
    """The half sent cell must not stay in the loop under a number that others get."""
    assert all(result.ok for result in bare.run_all(["print(1)"] * 4))
    wait_for(lambda: all(child.ready.done() for child in list(bare._host._children.values())))
    before = descriptors()
    for child in list(bare._host._children.values()):
        os.kill(child.pid, signal.SIGSTOP)
    futures = [bare.submit(f"print({i})\n" + "#" * 2_000_000) for i in range(2)]
    time.sleep(0.1)
    kill_server(bare)
    assert [future.result(20).stdout for future in futures] == ["0\n", "1\n"]
    assert [result.stdout for result in bare.run_all(["print(1)"] * 4)] == ["1\n"] * 4
    wait_for(lambda: descriptors() <= before)


def test_a_stopped_fork_server_is_given_up(
    bare: PythonExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_ANSWER_SECONDS", 1.0)
    assert bare.run("print(1)").ok
    os.killpg(bare._host.zygote.process.pid, signal.SIGSTOP)
    results = bare.run_all(["print(2)"] * 6)  # more than there are spare children
    assert [result.stdout for result in results] == ["2\n"] * 6


def test_a_machinery_that_keeps_failing_is_infra_then_stops(bare: PythonExecutor) -> None:
    over = threading.Event()

    def killer() -> None:
        while not over.is_set():
            with contextlib.suppress(ProcessLookupError):
                kill_server(bare)
            time.sleep(0.02)

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        for _ in range(11):
            result = bare.run("import time\ntime.sleep(2)")
            assert (result.status, result.stdout) == ("infra", "")
        with pytest.raises(InfraError, match=r"failed in the machinery, not in their code"):
            bare.run("print(1)")
        with pytest.raises(InfraError, match=r"rlkit doctor"):
            bare.run("print(1)")
    finally:
        over.set()
        thread.join()
    assert bare.counts["infra"] == 11


def test_a_fork_of_the_host_may_not_use_it(bare: PythonExecutor) -> None:
    script = (
        "import os, sys\nfrom rlkit.sandbox import InfraError, PythonExecutor\n"
        "with PythonExecutor(packages=()) as ex:\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        try:\n            ex.run('1')\n"
        "        except InfraError as error:\n            print(error, flush=True)\n"
        "        ex.close()\n"
        "        os._exit(0)\n"
        "    os.waitpid(pid, 0)\n"
        "    print(ex.run('print(1+1)').stdout)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert "this is a fork of it: make an executor in each process" in done.stdout, done.stderr
    assert done.stdout.strip().endswith("2")


def test_nothing_outlives_a_killed_host() -> None:
    script = (
        "from rlkit.sandbox import PythonExecutor\nimport time\n"
        "ex = PythonExecutor(packages=(), running=4)\n"
        "trace = ex.session()\ntrace.run('1')\n"
        "futures = [ex.submit('import time\\ntime.sleep(60)') for _ in range(4)]\n"
        "time.sleep(0.5)\n"
        "host = ex._host\n"
        "print(host.zygote.process.pid, *[c.pid for c in host._children.values()], flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        pids = [int(word) for word in run.stdout.readline().split()]
        assert len(pids) >= 6 and all(alive(pid) for pid in pids)
        run.kill()
    wait_for(lambda: not any(alive(pid) for pid in pids))


def test_nothing_is_left_behind() -> None:
    mixed = [
        "print(1)",
        "1/0",
        "import os\nos._exit(1)",
        "print('x' * 10**6)",
        "import os\nos.closerange(0, 64)",
        "import signal\nsignal.pause()",
    ]
    limits = replace(LIMITS, cpu_seconds=0.2, wall_seconds=0.3)

    def children() -> set[str]:
        own = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()
        return set(own.split())

    before, processes = descriptors(), children()
    with PythonExecutor(limits, packages=()) as executor:
        executor.run_all(mixed)
        during = descriptors()
        for _ in range(5):
            executor.run_all(mixed * 2)
            with executor.session() as trace:
                trace.run("x = 1")
        wait_for(lambda: descriptors() <= during)
        wait_for(lambda: len(executor._host._children) <= executor._host._spare_count)
    assert descriptors() == before
    assert children() == processes


@pytest.mark.slow
def test_ten_thousand_mixed_runs_leave_nothing() -> None:
    mixed = [
        *["print(1 + 1)"] * 40,
        *["import sympy\nx = sympy.symbols('x')\nprint(sympy.solve(x**2 - 2))"] * 4,
        *["1/0"] * 3,
        "import os\nos._exit(1)",
        "print('x' * 10**6)",
        "import os\nos.closerange(0, 64)",
        "import ctypes\nctypes.string_at(0)",
        "[0] * 10**10",
        "import signal\nsignal.pause()",
        "while True: pass",
        "import threading, time\n"
        "for _ in range(20): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
    ]

    def resident(pid: int | str) -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) >> 8  # MiB

    expected = ["ok"] * 44 + ["error"] * 4 + ["output", "error", "error", "memory"]
    expected += ["timeout", "timeout", "ok"]
    limits = replace(LIMITS, cpu_seconds=0.3, wall_seconds=0.6)
    with PythonExecutor(limits) as executor:
        temporary = {*Path("/tmp").iterdir()} if Path("/tmp").is_dir() else set()
        executor.run_all(mixed)
        opened, memory = descriptors(), resident("self")
        rounds = 10_000 // len(mixed)
        for i in range(rounds):
            assert [result.status for result in executor.run_all(mixed)] == expected
            if i % 20 == 0:
                with executor.session() as trace:
                    trace.run("x = 1")
                    assert trace.run("x").echo == "1"
        wait_for(lambda: len(executor._host._children) <= executor._host._spare_count)
        assert descriptors() <= opened + 4
        assert resident("self") <= memory + 30
        zombies = [p for p in Path("/proc").iterdir() if p.name.isdigit() and _zombie(p)]
        assert not zombies
    assert {p for p in Path("/tmp").iterdir() if p.name.startswith("rlkit")} <= temporary


def _zombie(process: Path) -> bool:
    try:
        state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return False
    return state == "Z" and int(parent) == os.getpid()


# Levels and arguments --------------------------------------------------------------------------


def test_the_host_says_what_it_gives(ex: PythonExecutor) -> None:
    info = ex.info
    assert info.level in "ABC" and {"landlock", "seccomp", "rlimits"} <= set(info.layers)
    assert info.python.startswith(sys.version.split()[0]) and info.landlock >= 1
    assert info.packages == ("numpy", "sympy", "mpmath")


def test_levels_below_the_one_asked_for_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(IsolationError) as refused:
        PythonExecutor(isolation="A", packages=())
    text = str(refused.value)
    assert "No isolation of level A or better holds on this host" in text
    assert "bubblewrap is not installed (Debian, Ubuntu: apt-get install bubblewrap)" in text
    with PythonExecutor(packages=()) as executor:
        assert executor.info.level in "BC"
        assert any("bubblewrap is not installed" in why for why in executor.info.rejected)


def test_a_leak_is_found_and_the_level_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    holes = [replace(a, layers=("rlimits",)) for a in attempts(root=False)[:1]]
    monkeypatch.setattr(executor, "attempts", lambda root: holes)
    with pytest.raises(IsolationError, match=r"code in it got through to: .*writing files.*UDP"):
        PythonExecutor(isolation="D", packages=())


@pytest.mark.skipif(shutil.which("cc") is None, reason="no compiler")
def test_a_package_of_one_file_does_not_open_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onefile.c").write_text(
        "#include <Python.h>\nstatic struct PyModuleDef about = {PyModuleDef_HEAD_INIT, "
        '"onefile"};\nPyMODINIT_FUNC PyInit_onefile(void) { return PyModule_Create(&about); }'
    )
    command = ["cc", "-shared", "-fPIC", "-I", sysconfig.get_path("include"), "onefile.c"]
    if subprocess.run([*command, "-o", "onefile.so"], cwd=tmp_path, check=False).returncode:
        pytest.skip("no headers of Python")
    (tmp_path / "gold").write_text("42")
    tmp_path.chmod(0o755)  # what stops a child of another user must be the cage
    monkeypatch.syspath_prepend(tmp_path)
    with PythonExecutor(LIMITS, packages=("onefile",)) as small:
        assert small.run("import onefile").ok
        assert small.run(f"open({str(tmp_path / 'gold')!r})").status in ("refused", "error")


def test_without_landlock_reading_has_to_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    last = attempts(root=False)[-1]
    assert last.degraded and last.level == "D"
    monkeypatch.setattr(executor, "attempts", lambda root: [replace(last, degraded=False)])
    with pytest.raises(IsolationError, match="reading files, listing folders"):
        PythonExecutor(isolation="D", packages=())
    monkeypatch.setattr(executor, "attempts", lambda root: [last])
    with pytest.raises(IsolationError, match="allow_degraded=True"):
        PythonExecutor(isolation="D", packages=())
    with PythonExecutor(isolation="D", allow_degraded=True, packages=()) as weak:
        assert weak.info.level == "D"
        assert weak.run("open('/tmp/x', 'w')").status == "refused"
        assert weak.run("import os\nos.fork()").status == "refused"


def test_too_many_sessions_are_a_fault_of_the_machinery(bare: PythonExecutor) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert bare.run("print(1)").ok  # its spare children hold theirs by now
    opened = descriptors()
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 24, hard))
    traces = [bare.session() for _ in range(12)]
    try:
        results = [trace.run("x = 1") for trace in traces]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert results[0].ok
    assert results[-1].status == "infra" and "ulimit -n" in results[-1].error
    for trace in traces:
        trace.close()
    assert bare.run("print(1)").ok
    wait_for(lambda: descriptors() <= opened + 8)  # spare children that were on their way


def test_descriptors_that_do_not_fit_stop_no_other_run(bare: PythonExecutor) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    bare._host._slots = asyncio.Semaphore(20)  # their children are on their way together
    assert bare.run("print(1)").ok
    wait_for(lambda: all(child.ready.done() for child in list(bare._host._children.values())))
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 30, hard))
    traces = [bare.session() for _ in range(12)]
    try:
        statuses = [future.result().status for future in [t.submit("x = 1") for t in traces]]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert set(statuses) == {"ok", "infra"}
    for trace in traces:
        trace.close()
    assert bare.run("print(1)").ok
    wait_for(lambda: not any(c.session for c in list(bare._host._children.values())))


def test_a_fork_server_that_does_not_start_again_is_told() -> None:
    before = descriptors()
    with PythonExecutor(LIMITS, packages=()) as executor:
        start = Mock(side_effect=OSError("no memory"))
        executor._host.start = start
        future = executor.submit("import time\ntime.sleep(60)")
        kill_server(executor)
        with pytest.raises(InfraError, match="the fork server does not start again: no memory"):
            future.result(timeout=20)
        with pytest.raises(InfraError, match="no memory"):
            executor.run("print(1)")
    assert descriptors() == before and start.call_count == 1


def test_a_run_that_had_not_begun_when_all_stopped_is_told_why(bare: PythonExecutor) -> None:
    futures: Queue[Future[Result]] = Queue()

    def stop() -> None:
        futures.put(bare.submit("print(1)"))
        bare._host._loop.call_soon(bare._host._give_up, "no more")  # its task is there by then

    bare._host._loop.call_soon_threadsafe(stop)
    with pytest.raises(InfraError, match="no more"):
        futures.get(timeout=20).result(timeout=20)


def test_a_program_that_is_missing_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "shell", lambda *_: ["/nonexistent/bwrap"])
    before = descriptors()
    with pytest.raises(IsolationError, match="No such file or directory: '/nonexistent/bwrap'"):
        PythonExecutor(packages=())
    assert descriptors() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change its root folder")
def test_root_without_landlock_gets_an_empty_root_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    chroot = [a for a in attempts(root=True) if "chroot" in a.layers]
    monkeypatch.setattr(executor, "attempts", lambda root: chroot)
    with PythonExecutor(LIMITS, isolation="D") as caged:
        assert caged.info.hides_names and caged.info.level == "D"
        assert caged.run("open('/etc/passwd')").status == "refused"  # not even its own root
        assert caged.run("open('/new', 'w')").status == "refused"
        solved = caged.run("import sympy\nx = sympy.symbols('x')\nprint(sympy.solve(x**2 - 4))")
        assert solved.stdout == "[-2, 2]\n"
        assert caged.run("import os\nprint(os.getuid() > 60_000)").stdout == "True\n"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("cpu_seconds", 0, "cpu_seconds=0: expected 0.01 to 3600"),
        ("cpu_seconds", "1", "cpu_seconds='1': expected a number"),
        ("cpu_seconds", float("nan"), "cpu_seconds=nan: expected 0.01 to 3600"),
        ("cpu_seconds", True, "cpu_seconds=True: expected a number"),
        ("wall_seconds", 1.0, "wall_seconds=1.0: expected 5 to 86400"),
        ("memory_mib", 1.5, "memory_mib=1.5: expected a number"),
        ("stack_mib", 1000, "stack_mib=1000: expected 1 to 120"),
        ("output_stop_kib", 1, "output_stop_kib=1: expected 8 to"),
        ("files", 2, "files=2: expected 8 to 1024"),
    ],
)
def test_limits_are_checked(field: str, value: object, message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as refused:
        Limits(**{field: value})  # type: ignore[arg-type]
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"isolation": "E"}, ValueError, "isolation='E': expected one of"),
        ({"running": 0}, ValueError, "running=0: expected 1 to 1024"),
        ({"seed": -1}, ValueError, "seed=-1: expected a whole number"),
        ({"running": "4"}, ValueError, "running='4': expected 1 to 1024"),
        ({"running": 2.5}, ValueError, r"running=2\.5: expected 1 to 1024"),
        ({"echo": "yes"}, TypeError, "echo='yes': expected True or False"),
        ({"allow_degraded": 1}, TypeError, "allow_degraded=1: expected True or False"),
        ({"limits": {"cpu_seconds": 1}}, TypeError, "limits={'cpu_seconds': 1}: expected Limits"),
        ({"packages": "numpy"}, TypeError, "packages='numpy': expected a sequence of names"),
        ({"packages": (1,)}, TypeError, r"packages=\(1,\): expected a sequence of names"),
        ({"packages": ("nosuch",)}, ModuleNotFoundError, "'nosuch' is not an importable package"),
    ],
)
def test_arguments_are_checked(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PythonExecutor(**arguments)  # type: ignore[arg-type]


def test_threads_fit_into_little_memory(ex: PythonExecutor) -> None:
    code = (
        "import threading, time\nthreads = [threading.Thread(target=time.sleep, args=(0.1,)) "
        "for _ in range(20)]\nfor thread in threads: thread.start()\nprint(len(threads))"
    )
    assert ex.run(code).stdout == "20\n"


def test_memory_and_files_are_limited(ex: PythonExecutor) -> None:
    assert ex.run("x = bytearray(300 << 20)").status == "memory"
    assert ex.run("x = bytearray(200 << 20)\nprint(len(x))").stdout == f"{200 << 20}\n"
    opened = ex.run(
        "import os\nn = 0\ntry:\n    while True: os.dup(0); n += 1\nexcept OSError: pass\nn"
    )
    assert 50 <= int(opened.echo) <= 64


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python itself bounds C recursion there")
def test_a_deep_recursion_fits_the_stack(ex: PythonExecutor) -> None:
    code = (
        "import sys, functools\nsys.setrecursionlimit(100_000)\n"
        "@functools.lru_cache(None)\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)\n"
        "print(f(20_000))"
    )
    assert ex.run(code).stdout == "20000\n"
