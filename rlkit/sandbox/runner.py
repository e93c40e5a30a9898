"""Runs cells inside a caged child and reports on each. What it sends is not to be trusted.

Foreign code runs in this very process, so it can forge the report; the host decides a run's status
from what it did itself and from the exit status (``executor``). Standard library only.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import errno
import io
import json
import linecache
import os
import random
import signal
import struct
import sys
import threading
import traceback
import types

CHANNEL = 3
HEAD = struct.Struct("!IIBB")
"""Before each cell: its length in bytes, seed, flags: echo, last."""
_FRAMES = 20
_SHOWN = 4_000  # characters of each text


def serve() -> None:
    """Run cells from the channel until one is the last, or the host closes the channel."""
    main = types.ModuleType("__main__")  # dataclasses and pickle look for it in sys.modules
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process
    streams = [
        io.TextIOWrapper(
            io.BufferedWriter(io.FileIO(fd, "w", closefd=False)),
            encoding="utf-8",
            errors="backslashreplace",  # a lone surrogate is no reason to fail
            line_buffering=True,  # a killed run keeps the lines that it has printed
        )
        for fd in (1, 2)
    ]
    sys.stdout, sys.stderr = streams
    vars(sys).update(__stdout__=streams[0], __stderr__=streams[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.write(CHANNEL, b"R")
    number = 0
    while head := _read(HEAD.size):
        length, seed, echo, last = HEAD.unpack(head)
        code = _read(length).decode("utf-8", "surrogatepass")
        number += 1
        if number == 1:
            random.seed(seed)
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed(seed)
        report = _run(code, f"<cell {number}>" if number > 1 else "<cell>", main.__dict__, echo)
        if last:
            # What the interpreter does at its end: lets idle executors go, waits for threads.
            _guarded(threading._shutdown)  # type: ignore[attr-defined]
            _guarded(atexit._run_exitfuncs)
        _guarded(lambda: sys.stdout.flush())  # it may be another one by now, or none
        for stream in streams:
            _guarded(stream.flush)
        text = json.dumps(report).encode()
        os.write(CHANNEL, struct.pack("!I", len(text)) + text)
        if last:
            return


def _run(code: str, name: str, scope: dict[str, object], echo: bool) -> dict[str, str]:
    """Execute one cell; the fields of its report."""
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    shown = ""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tree = ast.parse(code, name)
        last = tree.body[-1] if echo and tree.body else None
        if isinstance(last, ast.Expr):
            tree.body.pop()
        exec(compile(tree, name, "exec", dont_inherit=True), scope)
        if isinstance(last, ast.Expr):
            expression = compile(ast.Expression(last.value), name, "eval", dont_inherit=True)
            value = eval(expression, scope)
            if value is not None:
                shown = _cut(repr(value))
    except BaseException as error:
        _guarded(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
        return _describe(error)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return {"echo": shown}


def _describe(error: BaseException) -> dict[str, str]:
    kind = "error"
    if isinstance(error, SystemExit) and error.code in (None, 0):
        kind = "exit"
    elif isinstance(error, MemoryError):
        kind = "memory"
    elif isinstance(error, OSError) and error.errno in (errno.EPERM, errno.EACCES):
        kind = "refused"
    try:
        trace = error.__traceback__
        while trace is not None and not trace.tb_frame.f_code.co_filename.startswith("<cell"):
            trace = trace.tb_next  # ours, and ast.parse's
        lines = traceback.format_exception(type(error), error, trace, limit=-_FRAMES)
        last = traceback.format_exception_only(type(error), error)[-1]
        return {"kind": kind, "error": _cut(last.strip()), "traceback": _cut("".join(lines))}
    except BaseException as second:  # a hostile __str__, or no memory left for the text
        return {
            "kind": kind,
            "error": f"{type(error).__name__} ({type(second).__name__} in its text)",
        }


def _cut(text: str) -> str:
    """Head and tail, so that the three texts of a report stay below its size in any encoding."""
    text = str.__str__(text)
    if len(text) <= _SHOWN:
        return text
    left_out = f"... [{len(text) - _SHOWN} characters left out] ..."
    return text[: _SHOWN // 2] + left_out + text[-_SHOWN // 2 :]


def _guarded(action: object) -> None:
    """Foreign code may have left anything here; what it raises is its own affair."""
    try:
        action()  # type: ignore[operator]
    except BaseException:
        return


def _read(size: int) -> bytes:
    """``size`` bytes from the channel, empty if the host closed it."""
    parts = b""
    while len(parts) < size:
        part = os.read(CHANNEL, size - len(parts))
        if not part:
            return b""
        parts += part
    return parts
