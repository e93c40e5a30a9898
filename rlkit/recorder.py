"""Write a run folder so that a crash, a kill or a full disk at any moment leaves it readable.

Whole files are written aside and renamed; metrics are appended and flushed line by line. One
process holds the lock of a folder while it writes. The layout is described in ``rlkit.runs``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import platform
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rlkit import runs
from rlkit.config import RunConfig, flat
from rlkit.paths import runs_dir
from rlkit.runs import RunError, State, Status, write_atomic

HEARTBEAT_SECONDS = 5.0
MERGE_EVERY = 100
"""Steps after which rollout parts are merged into one file."""


class Recorder:
    """The one writer of a run folder. Made by ``open_run``; use ``close`` or ``with``."""

    def __init__(self, path: Path, lock: int, status: Status) -> None:
        self.path = path
        self._lock = lock
        self._status = status
        self._mutex = threading.RLock()
        self._stop = threading.Event()
        self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8")
        self._beat = threading.Thread(
            target=self._keep_beating, name="rlkit-heartbeat", daemon=True
        )
        self._beat.start()

    @property
    def status(self) -> Status:
        """The status as last written."""
        return self._status

    def update(self, **changes: Any) -> None:
        """Change fields of status.json and renew the heartbeat."""
        with self._mutex:
            self._status = replace(self._status, **changes, heartbeat=time.time())
            write_atomic(
                self.path / "status.json", json.dumps(_status_json(self._status), indent=1)
            )

    def environment(self, env: Mapping[str, Any]) -> None:
        """Replace env.json, once more is known (the hub commit of the weights)."""
        text = json.dumps(dict(env), indent=2, sort_keys=True)
        write_atomic(self.path / "env.json", text, sync=True)

    def warn(self, message: str) -> None:
        """Add a warning to status.json."""
        self.update(warnings=(*self._status.warnings, message))

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Append one step to metrics.jsonl; NaN and infinity become null."""
        clean = {key: _finite(value) for key, value in row.items()}
        self._metrics.write(json.dumps(clean, allow_nan=False) + "\n")
        self._metrics.flush()

    def rollouts(self, step: int, columns: Mapping[str, Sequence[Any]]) -> None:
        """Write the completions of one step, and merge parts every ``MERGE_EVERY`` steps."""
        base = self.path / "rollouts"
        _write_parquet(base / f"step-{step:06d}.parquet", pa.table(dict(columns)))
        if step % MERGE_EVERY == 0:
            parts = [p for p in runs.rollout_parts(base) if step - MERGE_EVERY < p[0] == p[1]]
            if parts:
                table = pa.concat_tables(
                    [pq.read_table(p[2]) for p in parts], promote_options="default"
                )
                _write_parquet(base / f"steps-{parts[0][0]:06d}-{step:06d}.parquet", table)
                for _, _, path in parts:
                    path.unlink()

    @contextlib.contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """A folder to write into; it becomes checkpoints/step-NNNNNN once complete."""
        base = self.path / "checkpoints"
        final, aside = base / f"step-{step:06d}", base / f".step-{step:06d}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            yield aside
            for path in (*aside.rglob("*"), aside):
                _sync(path)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _sync(base)
        self.update(checkpoint=final.name)

    def command(self) -> tuple[str, int]:
        """(command, id) of control.json; ("run", 0) if there is none or it cannot be read."""
        try:
            data = json.loads((self.path / "control.json").read_text())
            return str(data["command"]), int(data["id"])
        except (OSError, ValueError, KeyError, TypeError):
            return "run", 0

    def close(self, state: State, error: str = "") -> None:
        """Write the last status and give up the lock. A second call does nothing."""
        if self._stop.is_set():
            return
        self._stop.set()
        try:
            self.update(state=state, error=error)
        except OSError:
            # A full disk must not hide the error that ended the run; without a holder of the lock
            # and a heartbeat, readers see the run as dead.
            pass
        finally:
            with contextlib.suppress(OSError):
                self._metrics.close()
            os.close(self._lock)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            self.close("done")
        elif issubclass(kind, KeyboardInterrupt):
            self.close("interrupted", "interrupted from the keyboard")
        else:
            self.close("failed", f"{kind.__name__}: {error}")

    def _keep_beating(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with self._mutex:
                if self._stop.is_set():
                    return
                with contextlib.suppress(OSError):  # the training thread meets a full disk itself
                    self.update()


def open_run(
    config: RunConfig,
    env: Mapping[str, Any],
    *,
    kind: str = "rl",
    max_steps: int,
    data: str = "",
    fresh: bool | Literal["unfinished"] = False,
) -> Recorder | Path:
    """Start writing runs/<name>/, or return the folder of the same run if it is already done.

    Args:
        config: the run; its name is the folder's.
        env: content of env.json.
        kind: ``rl`` or ``sft``.
        max_steps: planned steps.
        data: hash of what the configuration only names or does not hold: weights, documents.
        fresh: what to do with an existing folder. False: reuse a finished run of the same
            configuration, refuse anything else. ``"unfinished"``: also start again after a crash
            or an interrupt of the same configuration. True: always start again. An old folder is
            never overwritten or deleted but moved to ``<name>.old-<n>``. A folder whose run never
            finished a step (its configuration was refused, say) is moved aside without asking.

    Raises:
        RunError: another process writes the folder, or it holds another or an unfinished run.
    """
    path = runs_dir() / config.name
    path.mkdir(parents=True, exist_ok=True)
    lock = _take_lock(path)
    try:
        if (path / "config.json").exists():
            if _keep(path, config, kind, data, fresh):
                os.close(lock)
                return path
            path.rename(_old_name(path))
            os.close(lock)
            path.mkdir(parents=True)
            lock = _take_lock(path)
        for name in ("rollouts", "eval", "checkpoints"):
            (path / name).mkdir(exist_ok=True)
        write_atomic(path / "config.json", config.to_json(), sync=True)
        now = time.time()
        status = Status(
            state="running", kind=kind, max_steps=max_steps, pid=os.getpid(), host=platform.node(),
            heartbeat=now, started=now, data=data,
        )  # fmt: skip
        recorder = Recorder(path, lock, status)
        recorder.environment(env)
        recorder.update()
        return recorder
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(lock)
        raise


def _keep(path: Path, config: RunConfig, kind: str, data: str, fresh: object) -> bool:
    """Whether the existing run answers the request; raises RunError if it must not be replaced."""
    if fresh is True:
        return False
    old, status = runs.read_config(path), runs.read_status(path)
    if status.step == 0 and status.state != "done":
        return False
    if (old, status.kind, status.data) != (config, kind, data):
        before, after = flat(old), flat(config)
        changed = [f"{k}: {before[k]!r} -> {after[k]!r}" for k in after if before[k] != after[k]]
        changed += [f"kind: {status.kind} -> {kind}"] if status.kind != kind else []
        changed += ["other weights, problems or documents"] if status.data != data else []
        raise RunError(
            f"run {config.name!r} exists with another configuration ({'; '.join(changed)}). Choose "
            "another name, or pass fresh=True to move the old run aside."
        )
    if status.state == "done":
        return True
    if fresh == "unfinished":
        return False
    raise RunError(
        f"run {config.name!r} exists and stopped at step {status.step} of {status.max_steps} "
        f"(state {status.state!r}{': ' + status.error if status.error else ''}). Pass "
        "fresh='unfinished' to start it again; the old folder is moved aside."
    )


def _take_lock(path: Path) -> int:
    handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    for _ in range(20):  # a reader holds the lock for microseconds
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            time.sleep(0.01)
    os.close(handle)
    raise RunError(
        f"run {path.name!r} is being written by another process. Wait for it, stop it, or choose "
        "another name."
    )


def _old_name(path: Path) -> Path:
    n = 1
    while (old := path.with_name(f"{path.name}.old-{n}")).exists():
        n += 1
    return old


def _status_json(status: Status) -> dict[str, Any]:
    data = asdict(status)
    del data["dead"]
    return data


def _write_parquet(path: Path, table: pa.Table) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    try:
        pq.write_table(table, aside, compression="zstd")
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
