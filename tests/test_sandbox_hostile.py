"""The sandbox holds against the battery of hostile snippets, and lets ordinary code work.

``hostile.py`` says how a snippet is run and checked. Here: the battery at level A, each layer's own
worth, the battery as an ordinary user, and programs as models write them in good faith.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile import Row, Snippet, battery, load

import rlkit.sandbox
from rlkit.sandbox import Limits, PythonExecutor

ROOT = Path(__file__).resolve().parent.parent
ORDINARY = [json.loads(line) for line in (ROOT / "tests/ordinary.jsonl").read_text().splitlines()]
USER = 61234
FAST = {"kernel", "signal", "ptrace", "proc", "env-secret", "symlink", "ctypes", "session-cross"}
"""Classes whose snippets end at once: all of them belong to the quick part."""
SLOW = {"hang", "cpu-loop", "uncatchable-loop", "huge-pow", "regex", "sympy-hang", "memory-bomb"}
"""Classes whose snippets run into a limit: one of each in the quick part."""
NAMES = {"stat-probe", "stat-probe-access"}
"""Landlock hides no names and sizes: only namespaces hold these, and ``info.hides_names`` says so.
"""


def quick() -> list[Snippet]:
    """All snippets of the fast classes, one of the slow, and two of each other one."""
    chosen: dict[str, list[Snippet]] = {}
    for row in load():
        some = chosen.setdefault(row["class"], [])
        if row["class"] in FAST or len(some) < (1 if row["class"] in SLOW else 2):
            some.append(row)
    return [row for rows in chosen.values() for row in rows]


def broken(rows: list[Row]) -> list[str]:
    return [f"{row.cls}/{row.id}: {row.why}" for row in rows if not row.held]


def test_the_battery_is_whole():
    rows = load()
    assert len(rows) == len({row["id"] for row in rows}) >= 400
    assert {row["class"] for row in quick()} == {row["class"] for row in rows}
    for row in rows:
        assert ("code" in row) != ("cells" in row) and row["must"] and row["check"], row["id"]
    covered = rlkit.sandbox.__doc__ or ""
    for name in {row["class"] for row in rows}:
        assert re.search(rf"[(, \n]{re.escape(name)}[,)\n]", covered) or name.startswith("session-")
    with pytest.raises(ValueError, match=r"only=\['nonsense'\]: expected ids or classes"):
        load(["nonsense"])


@pytest.fixture(scope="module")
def level() -> str:
    """The best that holds here; without bubblewrap and namespaces that is B or C."""
    with PythonExecutor(packages=()) as executor:
        return executor.info.level


@pytest.fixture
def _level_a(level: str) -> None:
    if level != "A":
        pytest.skip(f"this host gives level {level}: install bubblewrap, allow namespaces")


def open_at(level: str, rows: list[Row]) -> list[str]:
    """What is not held, less what ``level`` does not promise to hold."""
    promised = [row for row in rows if level == "A" or row.id not in NAMES]
    return broken(promised)


def test_hostile_snippets_are_held(level):
    assert open_at(level, battery(quick(), level=level)) == []


@pytest.mark.slow
def test_all_hostile_snippets_are_held(level):
    assert open_at(level, battery(load(), level=level)) == []


@pytest.mark.usefixtures("_level_a")
@pytest.mark.parametrize(
    ("layer", "ids"),
    [
        ("namespaces", ["stat-probe", "stat-probe-access"]),
        ("landlock", ["proc-self-games"]),
        ("seccomp", ["net-udp", "fork-vfork", "sys-userfaultfd", "sig-f-setown-ex", "pidfd"]),
        ("rlimits", ["mem-fd-table"]),
    ],
)
def test_each_layer_holds_what_no_other_does(layer, ids):
    snippets = load(ids)
    assert broken(battery(snippets, level="A")) == []
    assert [row.id for row in battery(snippets, level="A", without=[layer]) if row.held] == []


@pytest.mark.slow
@pytest.mark.usefixtures("_level_a")
def test_the_harness_sees_what_an_open_sandbox_lets_through():
    """With rlimits alone nothing stands before files, sockets and processes: checks must fire."""
    fires = {
        "read-open": "noleak: a secret",
        "list-host": "notext:LISTED: printed",
        "stat-probe": "nostat: printed",
        "d-rmtree": "nowrite: the canary's folder changed",
        "w-append": "nowrite: the canary's folder changed",  # again: the canary was repaired
        "w-chmod": "nowrite: the canary's folder changed",
        "net-tcp": "['hits'] changed",
        "net-udp": "['hits'] changed",
        "prlimit-host": "host: the driver died",  # with 9 descriptors it cannot go on
        "fork-ctypes": "noleft: ",
        "sess-fork-orphan": "noleft: ",
        "sig-parent-told": "notext:SIGNALLED: printed",
    }
    without = ["landlock", "namespaces", "uid", "seccomp"]
    snippets = load([*fires, "env-environ"])
    rows = {row.id: row.why for row in battery(snippets, "A", without, together=False)}
    assert rows.pop("env-environ") == ""  # held by the fork server's own clean environment
    assert {id_: why for id_, why in rows.items() if fires[id_] not in why} == {}


def test_ordinary_snippets_work():
    limits = Limits(cpu_seconds=10, wall_seconds=60, memory_mib=512)
    with PythonExecutor(limits) as executor:
        results = executor.run_all(row["code"] for row in ORDINARY)
    wrong = {
        row["id"]: (result.status, result.stdout[:200], result.error)
        for row, result in zip(ORDINARY, results, strict=True)
        if (result.status, result.stdout) != ("ok", row["stdout"])
    }
    assert wrong == {}


@pytest.fixture
def as_user() -> Iterator[list[str]]:
    """Start of a command that runs a copy of the harness as an ordinary user, and its folder."""
    folder = Path(tempfile.mkdtemp(prefix="as-user-"))
    shutil.copytree(ROOT / "rlkit/sandbox", folder / "rlkit/sandbox")
    shutil.copy(ROOT / "rlkit/tool_text.py", folder / "rlkit")
    (folder / "rlkit/__init__.py").touch()
    (folder / "tests").mkdir()
    for name in ("hostile.py", "hostile.jsonl"):
        shutil.copy(ROOT / "tests" / name, folder / "tests")
    (folder / "out").mkdir()
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o777 if path.name == "out" else 0o755)
    command: list[str] = []
    if os.geteuid() == 0:
        ids = [f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
        command = [*_readable_interpreter(), "setpriv", *ids, "env", f"HOME={folder}/out"]
        probe = [*command, sys.executable, "-c", "import numpy, sympy"]
        done = subprocess.run(probe, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no ordinary user can run this interpreter: {done.stderr[-200:]}")
    yield [*command, sys.executable, str(folder / "tests/hostile.py"), "--json"]
    shutil.rmtree(folder, ignore_errors=True)


def _readable_interpreter() -> list[str]:
    """A view of the file system in which others too can reach an interpreter in a closed home."""
    base = Path(os.path.realpath(sys.executable)).parent.parent
    parents = [path for path in reversed(base.parents) if not path.stat().st_mode & 1]
    if not parents or not shutil.which("bwrap"):
        return []
    top = parents[0]
    between = [path for path in reversed(base.parents) if path.is_relative_to(top) and path != top]
    view = ["bwrap", "--dev-bind", "/", "/", "--perms", "0755", "--tmpfs", str(top)]
    for path in between:
        view += ["--perms", "0755", "--dir", str(path)]
    return [*view, "--ro-bind", str(base), str(base)]


@pytest.mark.usefixtures("_level_a")
@pytest.mark.parametrize(("without", "open_"), [([], set()), (["namespaces"], NAMES)])
def test_held_for_an_ordinary_user(as_user, without, open_):
    classes = ["file-read", "file-write", "symlink", "signal", "ptrace", "proc", "env-secret"]
    classes += ["fork-bomb", "process", "cross-talk", "disk"]
    rows_file = Path(as_user[-2]).parent.parent / "out/rows.json"
    layers = ["--without", *without] if without else []
    done = subprocess.run(
        [*as_user, str(rows_file), *layers, "--only", *classes],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert rows_file.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    rows = [Row(**row) for row in json.loads(rows_file.read_text())]
    assert {row.id for row in rows if not row.held} == open_, broken(rows)
