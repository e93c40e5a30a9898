"""Start a run, go on with an unfinished one, or find a finished one: who may write its folder.

A run is its configuration and a hash of its weights and problems. Nothing is overwritten: what is
not continued is moved aside. Two processes that start the same run at once end up with one writer.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from rlkit import runs
from rlkit.config import RunConfig, flat
from rlkit.paths import runs_dir
from rlkit.recorder import Recorder
from rlkit.rewind import rewind
from rlkit.runs import RunError, Status, write_atomic

EXACT = ("packages", "machine", "cpu", "torch_threads", "gpus", "git_commit")
"""Parts of env.json that must stay equal for a resumed run to be bit-identical."""
LOCK_ATTEMPTS = 20


def open_run(
    config: RunConfig,
    env: Mapping[str, Any],
    *,
    kind: str = "rl",
    max_steps: int,
    data: str = "",
    fresh: bool = False,
) -> Recorder | Path:
    """Start or continue writing runs/<name>/, or return the folder if that run is already done.

    An unfinished run of the same configuration (crash, kill, Ctrl-C, stop) is taken back to its
    newest resume point, to be continued from ``Recorder.resume``; without one it starts again.

    Args:
        config: the run; its name is the folder's.
        env: content of env.json.
        kind: ``rl`` or ``sft``.
        max_steps: planned steps.
        data: hash of what the configuration only names or does not hold: weights, problem rows,
            documents.
        fresh: start again whatever exists.

    A run that is not continued is never overwritten or deleted: its folder is moved to
    ``<name>.old-<n>``.

    Raises:
        RunError: another process writes the folder, or it holds another run.
    """
    path = runs_dir() / config.name
    while True:
        lock = _take_lock(path)
        try:
            if not (path / "config.json").exists():
                return _start(path, config, lock, env, kind, max_steps, data)
            status = None if fresh else _same_run(path, config, kind, data)
            if status is not None and status.state == "done":
                lock.close()
                return path
            point = runs.resume_point(path)
            if status is not None and point is not None:
                return _continue(path, config, lock, status, env, *point)
            path.rename(_old_name(path))
        except BaseException:
            lock.close()
            raise
        # Whoever waited for this lock notices that its folder has gone (``_take_lock``). The next
        # round starts the run, or finds that another process was faster.
        lock.close()


def _start(
    path: Path,
    config: RunConfig,
    lock: IO[str],
    env: Mapping[str, Any],
    kind: str,
    max_steps: int,
    data: str,
) -> Recorder:
    for name in ("rollouts", "eval", "checkpoints"):
        (path / name).mkdir(exist_ok=True)
    now = time.time()
    status = Status(
        state="running", kind=kind, max_steps=max_steps, pid=os.getpid(), host=platform.node(),
        heartbeat=now, started=now, data=data,
    )  # fmt: skip
    recorder = Recorder(path, lock, status)
    (path / "env.json").unlink(missing_ok=True)
    recorder.environment(**env)
    recorder.update()
    # Last: without it there is no run, and a start that was cut off begins again.
    write_atomic(path / "config.json", config.to_json(), sync=True)
    return recorder


def _same_run(path: Path, config: RunConfig, kind: str, data: str) -> Status | None:
    """Status of the existing run if it is the one asked for; None if it never finished a step.

    Raises:
        RunError: it is another run.
    """
    old, status = runs.read_config(path), runs.read_status(path)
    if status.step == 0 and status.state != "done":
        return None
    if (old, status.kind, status.data) == (config, kind, data):
        return status
    before, after = flat(old), flat(config)
    changed = [f"{k}: {before[k]!r} -> {after[k]!r}" for k in after if before[k] != after[k]]
    changed += [f"kind: {status.kind} -> {kind}"] if status.kind != kind else []
    changed += ["other weights, problems, rewards or documents"] if status.data != data else []
    raise RunError(
        f"run {config.name!r} exists with another configuration ({'; '.join(changed)}). Choose "
        "another name, or pass fresh=True to move the old run aside."
    )


def _continue(
    path: Path,
    config: RunConfig,
    lock: IO[str],
    status: Status,
    env: Mapping[str, Any],
    step: int,
    folder: Path,
) -> Recorder:
    """Take an unfinished run back to its resume point and write on from there."""
    control = path / "control.json"
    if control.exists():  # the command that stopped it is done with
        write_atomic(control, json.dumps({**json.loads(control.read_text()), "command": "run"}))
    before = runs.read_environment(path)
    checkpoint = rewind(path, step, config.train.save_every)
    status = replace(
        status,
        state="running", step=step, checkpoint=checkpoint, error="", pid=os.getpid(),
        host=platform.node(), resumed=(*status.resumed, step),
        warnings=tuple(notice for notice in status.warnings if notice.step <= step),
    )  # fmt: skip
    recorder = Recorder(path, lock, status, resume=folder)
    recorder.update()
    changed = [key for key in EXACT if before.get(key) != env.get(key)]
    if changed:
        recorder.environment(**env, before_resume=before)
        recorder.warn(
            "environment",
            f"resumed after step {step} with other {', '.join(changed)}: from here on the numbers "
            "can differ from an uninterrupted run. Both environments are in env.json.",
        )
    return recorder


def _take_lock(path: Path) -> IO[str]:
    """The locked file of the run folder ``path``, which is made if need be."""
    for _ in range(LOCK_ATTEMPTS):  # a reader holds the lock for microseconds
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            path.mkdir(parents=True, exist_ok=True)
            handle = (path / ".lock").open("a")
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # While this process waited, the folder may have been moved aside with its lock.
                if os.path.samestat(os.fstat(handle.fileno()), (path / ".lock").stat()):
                    return handle
            except BaseException:
                handle.close()
                raise
            handle.close()
        time.sleep(0.01)
    raise RunError(
        f"run {path.name!r} is being written by another process. Wait for it, stop it, or choose "
        "another name."
    )


def _old_name(path: Path) -> Path:
    n = 1
    while (old := path.with_name(f"{path.name}.old-{n}")).exists():
        n += 1
    return old
