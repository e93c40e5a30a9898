"""Code on a SandboxFusion server: a small real server with its schema, honest and hostile."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rlkit.config import ToolConfig
from rlkit.remote_executor import MAX_BYTES, START, SandboxFusionExecutor
from rlkit.sandbox import Limits
from rlkit.tokenizer import build_tokenizer
from rlkit.tool_text import describe
from rlkit.tools import Executor, Tools

RELEASE = threading.Event()


def answer(outcome: str, /, **run: Any) -> dict[str, Any]:
    """A response as the server's ``RunCodeResponse`` writes it."""
    return {
        "status": outcome,
        "message": "",
        "compile_result": None,
        "run_result": run or None,
        "executor_pod_name": None,
        "files": {},
    }


def finished(
    code: Any = 0, stdout: Any = "", stderr: Any = "", seconds: Any = 0.25
) -> dict[str, Any]:
    return answer(
        "Failed" if code else "Success",
        status="Finished",
        execution_time=seconds,
        return_code=code,
        stdout=stdout,
        stderr=stderr,
    )


def really_run(request: dict[str, Any]) -> dict[str, Any]:
    """As sandbox/runners/base.py without isolation."""
    command = [sys.executable, "-I", "-S", "-c", request["code"]]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=request["run_timeout"], check=False
        )
    except subprocess.TimeoutExpired:
        return answer(
            "Failed", status="TimeLimitExceeded", execution_time=0.5, stdout="part", stderr=""
        )
    return finished(done.returncode, done.stdout, done.stderr)


SCRIPTED: dict[str, Any] = {
    "ok": finished(0, "1\n", "a warning"),
    "nulls": finished(0, None, None, None),
    "killed": finished(-9),
    "killed-by-shell": finished(137),
    "exit": finished(3),
    "flood": finished(0, "a" * (1 << 20)),
    "not-our-memory": finished(1, "", "Traceback (most recent call last):\nE: MemoryError"),
    "numpy-memory": finished(1, "", "numpy._core._exceptions._ArrayMemoryError: Unable"),
}
INFRA: dict[str, Any] = {
    "sandbox-error": answer("SandboxError"),
    "error": answer("SandboxError", status="Error", stderr="exception on running command"),
    "run-error-alone": answer("Success", status="Error", return_code=0, stdout="1"),
    "no-run": answer("Success"),
    "success-with-code": finished(1) | {"status": "Success"},
    "failed-with-0": finished(0, "1") | {"status": "Failed"},
    "unknown-status": finished(0, "1") | {"status": "Fine"},
    "status-is-a-list": finished(0, "1") | {"status": ["Success"]},
    "code-is-text": finished("0", "1"),
    "code-is-true": finished(True, "1"),
    "no-code": finished(None, "1"),
    "stdout-is-a-list": finished(0, ["1"]),
    "stdout-is-empty-list": finished(0, []),
    "stderr-is-a-number": finished(1, "", 5),
    "seconds-are-text": finished(0, "1", "", "0.1"),
    "seconds-below-0": finished(0, "1", "", -1.0),
    "seconds-are-none": finished(0, "1", "", float("nan")),
    "a-list": [],
    "a-number": 5,
    "null": None,
    "not-json": b"<html>nginx</html>",
    "empty": b"",
    "not-utf8": b'{"status": "\xff"}',
    "deep": b"[" * 200_000,
    "too-long": b"x" * (50 << 20),
    "half": b'{"status": "Succ',
}
SPECIAL = {
    "http-500",
    "http-404",
    "redirect",
    "hang",
    "trickle",
    "trickle-header",
    "short",
    "hang-up",
    "garbage",
}


class Handler(BaseHTTPRequestHandler):
    requests: list[dict[str, Any]]
    """What was asked for; of the server's class."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append({"path": self.path, "type": self.headers["Content-Type"], **request})
        name = request["code"].removeprefix("#")
        try:
            if name in SPECIAL:
                self.special(name)
            elif name in SCRIPTED | INFRA:
                self.reply((SCRIPTED | INFRA)[name])
            else:
                self.reply(really_run(request))
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client does not listen any more

    def reply(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def special(self, name: str) -> None:
        if name.startswith("http-"):
            self.reply(finished(0, "1\n"), int(name[-3:]))
        elif name == "redirect":
            host, port = self.server.server_address[:2]
            self.reply(b"", 307, Location=f"http://{host}:{port}/elsewhere")
        elif name == "garbage":
            self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        elif name == "hang":
            RELEASE.wait(30)
        elif name == "short":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(json.dumps(finished(0, "1")).encode())
        elif name == "trickle-header":
            self.trickle(b"HTTP/1.0 200 OK\r\nX: ")
        elif name == "trickle":
            self.trickle(b"HTTP/1.0 200 OK\r\n\r\n")

    def trickle(self, start: bytes) -> None:
        """Bytes that come often enough to keep a socket's timeout from ending the wait."""
        self.wfile.write(start)
        while not RELEASE.wait(0.1):
            self.wfile.write(b" ")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def handler() -> Iterator[tuple[str, type[Handler]]]:
    kind = type("OneHandler", (Handler,), {"requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    RELEASE.clear()
    yield f"http://127.0.0.1:{server.server_port}", kind
    RELEASE.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def url(handler: tuple[str, type[Handler]]) -> str:
    return handler[0]


@pytest.fixture
def executor(url: str) -> Iterator[SandboxFusionExecutor]:
    with SandboxFusionExecutor(url, wall_seconds=3.0, timeout=20.0) as executor:
        yield executor


def test_the_request_is_the_documented_one(handler, executor):
    executor.run("#ok")
    assert handler[1].requests[-1] == {
        "path": "/run_code",
        "type": "application/json",
        "code": "#ok",
        "language": "python",
        "run_timeout": 3.0,
        "memory_limit_MB": 1024,
    }


def test_results_of_code(executor):
    result = executor.run("#ok")
    assert (result.status, result.stdout, result.stderr) == ("ok", "1\n", "a warning")
    assert (result.wall_seconds, result.cpu_seconds, result.cut) == (0.25, 0.0, 0)
    assert (result.error, result.traceback, result.echo, result.variables) == ("", "", "", "")
    nulls = executor.run("#nulls")
    assert nulls.ok and nulls.stdout == "" and 0 < nulls.wall_seconds < 20


def test_errors_of_code(executor):
    result = executor.run("import sys\nprint(1)\nprint('warning', file=sys.stderr)\n1/0")
    assert (result.status, result.stdout) == ("error", "1\n")
    assert result.error == "ZeroDivisionError: division by zero"
    assert result.traceback.startswith("Traceback (most recent call last):\n")
    assert "warning" not in result.traceback and "warning" in result.stderr
    chained = executor.run("try:\n    1/0\nexcept ZeroDivisionError:\n    [][0]")
    assert chained.error == "IndexError: list index out of range"
    assert "ZeroDivisionError" in chained.traceback
    syntax = executor.run("x = (")
    assert syntax.status == "error" and syntax.error.startswith("SyntaxError:")
    assert syntax.traceback == syntax.stderr
    assert executor.run("#exit").error == "exit code 3"


def test_code_that_is_no_text_is_the_codes_fault(handler, executor):
    sent = len(handler[1].requests)
    result = executor.run("print('\ud800')")
    assert (result.status, len(handler[1].requests)) == ("error", sent)
    assert result.error.startswith("SyntaxError: 'utf-8' codec can't encode")


def test_limits(url, executor):
    for name in ("#killed", "#killed-by-shell", "raise MemoryError", "#numpy-memory"):
        assert executor.run(name).status == "memory"
    assert executor.run("#not-our-memory").status == "error"
    with SandboxFusionExecutor(url, wall_seconds=1.5) as short:
        result = short.run("while True: pass")
    assert (result.status, result.stdout, result.wall_seconds) == ("timeout", "part", 0.5)


def test_long_output_keeps_head_and_tail(url):
    with SandboxFusionExecutor(url, max_characters=1000) as executor:
        result = executor.run("#flood")
        mark = f"... [{(1 << 20) - 1000} characters left out] ..."
        assert result.stdout == "a" * 500 + mark + "a" * 500
        assert result.cut == (1 << 20) - 1000
        assert describe(result, max_characters=4).startswith("aa... [1048572 characters")
        result = executor.run(f"raise ValueError('{'e' * 5000}')")
        assert result.error == "ValueError: " + "e" * 988
        assert len(result.traceback) == 1000 + len("... [4081 characters left out] ...")


@pytest.mark.parametrize("name", INFRA)
def test_answers_without_sense_are_the_machinerys_fault(executor, name):
    result = executor.run(f"#{name}")
    assert (result.status, result.stdout) == ("infra", "")
    assert result.error
    assert len(result.error) <= 500


@pytest.mark.parametrize("name", sorted(SPECIAL))
def test_faults_of_the_transport(handler, name):
    with SandboxFusionExecutor(handler[0], wall_seconds=0.5, timeout=1.0) as executor:
        result = executor.run(f"#{name}")
        assert (result.status, result.stdout) == ("infra", "")
        assert result.error
        # The next run is not hurt.
        assert executor.run("#ok").ok
    if name in ("hang", "trickle", "trickle-header"):
        assert result.wall_seconds >= 1.0
    assert "/elsewhere" not in [request["path"] for request in handler[1].requests]


def test_a_long_answer_is_not_read_to_its_end(executor):
    assert f"{MAX_BYTES + 1} bytes" in executor.run("#too-long").error


def test_many_at_once_come_back_in_order_and_are_counted(executor):
    codes = [f"print({i})" if i % 4 else "#half" for i in range(12)]
    results = executor.run_all(codes)
    assert [r.stdout for r in results] == [f"{i}\n" if i % 4 else "" for i in range(12)]
    assert executor.counts == {"ok": 9, "infra": 3}
    assert executor.submit("#exit").result().status == "error"
    assert executor.counts == {"ok": 9, "infra": 3, "error": 1}


def test_no_more_than_running_are_in_flight(url):
    with SandboxFusionExecutor(url, running=1, wall_seconds=0.5, timeout=1.0) as executor:
        first, second = executor.submit("#hang"), executor.submit("#ok")
        third = executor.submit("#ok")
        assert third.cancel()
        assert first.result().status == "infra"
        assert second.result().ok  # its own time began when it was sent
        with pytest.raises(CancelledError):
            third.result()
    with pytest.raises(RuntimeError, match="shutdown"):
        executor.submit("#ok")


def test_closing_drops_what_was_not_sent(url):
    with SandboxFusionExecutor(url, running=1, wall_seconds=0.5, timeout=1.0) as executor:
        sent, waiting = executor.submit("#hang"), executor.submit("#ok")
        while not sent.running():
            time.sleep(0.01)
    assert sent.result().status == "infra" and waiting.cancelled()


def test_asyncio(url):
    async def work() -> list[str]:
        async with SandboxFusionExecutor(url) as executor:
            results = await asyncio.gather(*(executor.arun(f"print({i})") for i in range(3)))
        return [result.stdout for result in results]

    assert asyncio.run(work()) == ["0\n", "1\n", "2\n"]


def test_fresh_cells(executor):
    with executor.session(state="fresh") as session:
        assert session.run("x = 1").ok
        result = session.run("print(x)")
    assert result.error == "NameError: name 'x' is not defined"
    assert result.variables == ""


def test_replayed_cells(executor):
    with executor.session(state="replay") as session:
        first = session.run("import sys\nx = [1]\nprint('first')\nprint('noise', file=sys.stderr)")
        assert (first.stdout, first.variables) == ("first\n", "kept")
        failed = session.run("x.append(5)\n'''\\{}'''\n1/0")
        assert failed.error == "ZeroDivisionError: division by zero"
        assert session.run("x.append(2)\nsys.exit(0)").ok
        last = session.run("print(x, __name__)\nprint('{}')")
        assert (last.stdout, last.stderr) == ("[1, 2] __main__\n{}\n", "")
    assert session.cells == ()


@pytest.mark.parametrize(("state", "shown"), [("fresh", "NameError"), ("replay", "1")])
def test_it_serves_the_tool_loop(executor: Executor, state, shown):
    """Its limits are told, and blocks of a response run one after the other."""
    assert executor.limits == Limits(cpu_seconds=3.0, wall_seconds=3.0, memory_mib=1024)
    tokenizer = build_tokenizer()
    tools = Tools(executor, tokenizer, ToolConfig(tool="python", tool_state=state))
    outputs = []
    with tools.loop() as loop:
        for code in ("x = 1", "print(x)"):
            text = f"```python\n{code}\n```"
            found = [loop.feed(0, [i]) for i in tokenizer(text)["input_ids"]]
            assert found[-1] == code
            loop.submit(0, code)
            (back,) = loop.collect(wait=True)
            outputs.append(back.call.output)
    assert outputs[0] == "(no output; use print to show values)"
    assert outputs[1].startswith(shown)


def test_live_sessions_are_refused(executor):
    with pytest.raises(ValueError, match=r"state='session'.*PythonExecutor"):
        executor.session(state="session")


def test_what_is_not_guaranteed(executor):
    assert (executor.info.level, executor.info.layers) == ("remote", ())
    assert any("isolation" in line for line in executor.info.not_guaranteed)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8080",
        "localhost",
        "",
        "ftp://host",
        "file:///etc",
        "http://",
        "http://:80",
        "http://host:port",
        "http://host:99999",
        "http://[::1",
        "http://user:secret@host",
        "http://host/?x=1",
        "http://host/#a",
        "http://host/a b",
        "http://host\r\nX: y",
    ],
)
def test_a_malformed_url_is_named(url):
    with pytest.raises(ValueError, match="expected scheme, host") as error:
        SandboxFusionExecutor(url)
    assert repr(url) in str(error.value)


@pytest.mark.parametrize("path", ["/", "/run_code", "/run_code/"])
def test_paths_of_the_url(handler, path):
    SandboxFusionExecutor(handler[0] + path).close()
    assert handler[1].requests[-1]["path"] == "/run_code"


def test_a_path_in_front(handler):
    SandboxFusionExecutor(f"{handler[0]}/box/7").close()
    assert handler[1].requests[-1]["path"] == "/box/7/run_code"


@pytest.mark.parametrize(
    "options",
    [
        {"wall_seconds": 0},
        {"wall_seconds": float("inf")},
        {"memory_mib": 0},
        {"running": 0},
        {"timeout": 5.0},
        {"max_characters": 1},
    ],
)
def test_values_are_checked(url, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*expected"):
        SandboxFusionExecutor(url, **options)


def test_no_server_is_told_with_the_way_to_start_one(unused_port):
    url = f"http://127.0.0.1:{unused_port}"
    with pytest.raises(ConnectionError, match="ConnectionRefusedError") as error:
        SandboxFusionExecutor(url)
    assert repr(url) in str(error.value) and START in str(error.value)


@pytest.fixture
def unused_port() -> int:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        return server.server_port


def test_another_server_is_not_taken_for_a_sandbox(monkeypatch, url):
    monkeypatch.setitem(SCRIPTED, "print(6 * 7)", finished(0, "hello"))
    with pytest.raises(ConnectionError, match=r"prints 42.*'hello'"):
        SandboxFusionExecutor(url)


def test_a_first_run_whose_output_is_lost_is_tried_again(monkeypatch, handler):
    url, kind = handler
    replies = iter([finished(0, ""), finished(0, ""), finished(0, "42\n")])

    monkeypatch.setattr(kind, "reply", lambda self, _: Handler.reply(self, next(replies)))
    SandboxFusionExecutor(url).close()
    assert next(replies, None) is None


def test_proxies_of_the_environment_are_not_used(monkeypatch, url):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    SandboxFusionExecutor(url).close()


def test_no_thread_is_left(url):
    before = set(threading.enumerate())
    with SandboxFusionExecutor(url, running=4) as executor:
        executor.run_all(["#ok"] * 8)
    deadline = time.monotonic() + 10
    while any(t.name.startswith("sandbox") for t in set(threading.enumerate()) - before):
        assert time.monotonic() < deadline
        time.sleep(0.01)
