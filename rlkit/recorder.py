"""Write a run folder so that a crash, a kill or a full disk at any moment leaves it readable.

Whole files are written aside and renamed; metrics are appended and flushed line by line. One
process holds the lock of a folder while it writes. The layout is described in ``rlkit.runs``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlkit import runs
from rlkit.runs import Notice, State, Status, sync, write_atomic, write_parquet

HEARTBEAT_SECONDS = 5.0
MERGE_EVERY = 100
"""Steps after which rollout parts are merged into one file."""


class Recorder:
    """The one writer of a run folder, made by ``start.open_run``; for a ``with`` statement.

    Attributes:
        path: the run folder.
        resume: the resume point to go on from; None for a run that starts.
    """

    def __init__(
        self, path: Path, lock: IO[str], status: Status, resume: Path | None = None
    ) -> None:
        self.path = path
        self.resume = resume
        self._lock = lock
        self._status = status
        self._mutex = threading.RLock()
        self._stop = threading.Event()
        self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8")
        self._beat = threading.Thread(
            target=self._keep_beating, name="rlkit-heartbeat", daemon=True
        )
        self._unsynced: list[Path] = []  # rollout files since the last resume point

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

    def environment(self, **more: Any) -> None:
        """Add to env.json, as it becomes known (the hub commit of the weights)."""
        text = json.dumps({**runs.read_environment(self.path), **more}, indent=2, sort_keys=True)
        write_atomic(self.path / "env.json", text, sync=True)

    def warn(self, code: str, message: str) -> bool:
        """Add a warning to status.json; False if one of this code is there already."""
        known = self._status.warnings
        if any(notice.code == code for notice in known):
            return False
        self.update(warnings=(*known, Notice(self._status.step, code, message)))
        return True

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Append one step to metrics.jsonl; NaN and infinity become null."""
        clean = {key: _finite(value) for key, value in row.items()}
        self._metrics.write(json.dumps(clean, allow_nan=False) + "\n")
        self._metrics.flush()

    def rollouts(self, step: int, columns: Mapping[str, Sequence[Any]]) -> None:
        """Write the completions of one step, and merge parts every ``MERGE_EVERY`` steps."""
        base = self.path / "rollouts"
        self._write(base / f"step-{step:06d}.parquet", pa.table(dict(columns)))
        if step % MERGE_EVERY == 0:
            parts = [p for p in runs.rollout_parts(base) if step - MERGE_EVERY < p[0] == p[1]]
            if parts:
                table = pa.concat_tables(
                    [pq.read_table(p[2]) for p in parts], promote_options="default"
                )
                self._write(base / f"steps-{parts[0][0]:06d}-{step:06d}.parquet", table)
                # Their only copy is the merged file: it has to be on disk before they go.
                self._sync_rollouts()
                for _, _, path in parts:
                    path.unlink()

    def _write(self, path: Path, table: pa.Table) -> None:
        write_parquet(path, table)
        self._unsynced.append(path)

    def _sync_rollouts(self) -> None:
        for path in self._unsynced:
            if path.exists():  # merged since
                sync(path)
        self._unsynced.clear()
        sync(self.path / "rollouts")

    @contextlib.contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """A folder to write into; it becomes checkpoints/step-NNNNNN once complete."""
        with _folder(self.path / "checkpoints", step) as aside:
            yield aside
        self.update(checkpoint=f"step-{step:06d}")

    @contextlib.contextmanager
    def resume_point(self, step: int) -> Iterator[Path]:
        """A folder to write into; once complete it replaces the resume points before it.

        Metrics and rollouts reach the disk first: going on from ``step`` needs their rows.
        """
        with _folder(self.path / "resume", step) as aside:
            yield aside
            os.fsync(self._metrics.fileno())
            self._sync_rollouts()
        for old in (self.path / "resume").glob("step-*"):
            if old.name < f"step-{step:06d}":
                shutil.rmtree(old)

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
            if state == "done":
                shutil.rmtree(self.path / "resume", ignore_errors=True)
        except OSError:
            # A full disk must not hide the error that ended the run; without a holder of the lock
            # and a heartbeat, readers see the run as dead.
            pass
        finally:
            with contextlib.suppress(OSError):
                self._metrics.close()
            self._lock.close()

    def __enter__(self) -> Recorder:
        self._beat.start()
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


def _status_json(status: Status) -> dict[str, Any]:
    data = asdict(status)
    del data["dead"]
    return data


@contextlib.contextmanager
def _folder(base: Path, step: int) -> Iterator[Path]:
    """base/step-NNNNNN: complete and on disk, or absent."""
    final, aside = base / f"step-{step:06d}", base / f".step-{step:06d}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            sync(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    sync(base)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
