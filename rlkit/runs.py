"""Read run folders: the only store of a run, readable while it is written and after a crash.

::

    runs/<name>/config.json          the RunConfig
                env.json             versions, hardware, code state
                status.json          state, step, heartbeat (replaced atomically)
                control.json         command for the running process
                metrics.jsonl        one object per step
                rollouts/            step-000001.parquet; merged to steps-000001-000100.parquet
                eval/                evaluation rows and summaries
                checkpoints/         step-000100/, complete or absent
                resume/              step-000120/, the newest resume point of an unfinished run

``rlkit.start`` makes them, ``rlkit.recorder`` writes them.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rlkit.config import RunConfig
from rlkit.paths import runs_dir

State = Literal["queued", "running", "paused", "done", "failed", "interrupted"]
Command = Literal["run", "pause", "stop"]
UNFINISHED = ("queued", "running", "paused")
DEAD_AFTER = 30.0
"""Seconds without a heartbeat after which an unfinished run may be called dead."""
READ_ATTEMPTS = 5
"""Parts are merged every 100 steps, so a reader meets this once, rarely twice."""
_PART = re.compile(r"step-(\d{6})\.parquet")
_STEP = re.compile(r"step-(\d{6})")
_MERGED = re.compile(r"steps-(\d{6})-(\d{6})\.parquet")


class RunError(RuntimeError):
    """A run folder that cannot be used as asked; the text says what to do."""


@dataclass(frozen=True)
class Notice:
    """A warning of the pre-flight check, the watchdog or the recorder.

    Attributes:
        step: finished steps when it was given.
        code: what it is about, the same words each time; each code is given once per run.
        message: what was seen, the likely cause and the parameter to change.
    """

    step: int
    code: str
    message: str


@dataclass(frozen=True)
class Status:
    """The content of status.json, plus what a reader finds out.

    Attributes:
        kind: ``rl`` or ``sft``.
        step: finished steps. max_steps: planned steps.
        heartbeat: Unix time of the last sign of life, written every few seconds.
        data: hash of what the configuration only names or does not hold: weights, problem rows,
            documents.
        warnings: in the order in which they were given.
        checkpoint: name of the newest complete checkpoint; at the end, the final weights.
        resumed: steps after which the run was taken up again by another process.
        dead: set by the reader: unfinished, silent for 30 s and no process holds the lock.
    """

    state: State = "queued"
    kind: str = "rl"
    step: int = 0
    max_steps: int = 0
    pid: int = 0
    host: str = ""
    heartbeat: float = 0.0
    started: float = 0.0
    error: str = ""
    control_id: int = 0
    data: str = ""
    warnings: tuple[Notice, ...] = ()
    checkpoint: str = ""
    resumed: tuple[int, ...] = ()
    dead: bool = field(default=False, compare=False)


def folder(run: str | Path) -> Path:
    """The folder of a run given by name (under runs/) or by path."""
    path = Path(run)
    return path if path.is_absolute() or len(path.parts) > 1 else runs_dir() / path


def read_config(run: str | Path) -> RunConfig:
    """The configuration of a run. Raises RunError if the folder holds no run."""
    path = folder(run) / "config.json"
    if not path.exists():
        known = ", ".join(sorted(p.name for p in list_runs())) or "none"
        raise RunError(f"no run {str(run)!r} (no config.json). Existing runs: {known}.")
    return RunConfig.from_json(path.read_text())


def read_status(run: str | Path, *, now: float | None = None) -> Status:
    """Where a run stands; a run whose process died without a word is marked ``dead``.

    Args:
        run: name or folder.
        now: Unix time to judge the heartbeat by; default the present.
    """
    path = folder(run)
    try:
        data = json.loads((path / "status.json").read_text())
    except FileNotFoundError:
        raise RunError(f"no run {str(run)!r} (no status.json)") from None
    except ValueError as error:  # a power cut can leave an empty file
        raise RunError(
            f"status.json of run {path.name!r} cannot be read ({error}). Pass fresh=True to move "
            "the folder aside and start again."
        ) from None
    known = {f.name for f in fields(Status)} - {"dead"}
    data = {key: value for key, value in data.items() if key in known}
    data["warnings"] = tuple(Notice(**notice) for notice in data.get("warnings", ()))
    data["resumed"] = tuple(data.get("resumed", ()))
    status = Status(**data)
    silent = (time.time() if now is None else now) - status.heartbeat > DEAD_AFTER
    elsewhere = status.host != platform.node()  # its lock cannot be trusted from here
    dead = status.state in UNFINISHED and silent and (elsewhere or not is_locked(path))
    return replace(status, dead=dead)


def read_environment(run: str | Path) -> dict[str, Any]:
    """The content of env.json; empty before it is written."""
    path = folder(run) / "env.json"
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return data


def is_locked(path: Path) -> bool:
    """Whether a living process writes this run folder."""
    try:
        handle = os.open(path / ".lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


def read_metrics(run: str | Path) -> pd.DataFrame:
    """One row per step. A last line cut off by a crash or still being written is left out."""
    return pd.DataFrame(read_metrics_rows(run))


def read_metrics_rows(run: str | Path) -> list[dict[str, Any]]:
    """The rows of ``read_metrics`` as they were written; None where a number was not finite."""
    path = folder(run) / "metrics.jsonl"
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue  # empty or torn
    return rows


def read_rollouts(run: str | Path, steps: range | None = None) -> pd.DataFrame:
    """One row per completion, ordered by step, group and sample.

    Args:
        run: name or folder.
        steps: only these steps; default all.
    """
    for attempt in range(READ_ATTEMPTS):
        try:
            frames = [
                pd.read_parquet(path)
                for first, last, path in rollout_parts(folder(run) / "rollouts")
                if steps is None or (first < steps.stop and last >= steps.start)
            ]
            break
        except FileNotFoundError:  # the writer has just merged this part into another file
            if attempt == READ_ATTEMPTS - 1:
                raise
    if not frames:
        return pd.DataFrame()
    rows = pd.concat(frames, ignore_index=True)
    return rows if steps is None else rows[rows["step"].isin(steps)].reset_index(drop=True)


def rollout_parts(rollouts: Path) -> list[tuple[int, int, Path]]:
    """(first step, last step, file) of every rollout file, in order, each step exactly once.

    A crash between writing a merged file and removing its parts leaves both; the merged one counts.
    """
    merged, parts = [], []
    for path in rollouts.glob("*.parquet"):
        if match := _MERGED.fullmatch(path.name):
            merged.append((int(match[1]), int(match[2]), path))
        elif match := _PART.fullmatch(path.name):
            parts.append((int(match[1]), int(match[1]), path))
    alone = [p for p in parts if not any(first <= p[0] <= last for first, last, _ in merged)]
    return sorted(merged + alone)


def list_runs(where: Path | None = None) -> list[Path]:
    """Folders of all runs under ``where`` (default runs/), by name; replaced ones left out."""
    base = where or runs_dir()
    if not base.is_dir():
        return []
    found = (path.parent for path in base.glob("*/config.json"))
    return sorted(path for path in found if ".old-" not in path.name)


def final_checkpoint(run: str | Path) -> Path:
    """The folder with the final weights of a finished run, for ``models.load_policy``.

    Raises:
        RunError: the run is not done.
    """
    status = read_status(run)
    path = folder(run) / "checkpoints" / status.checkpoint
    if status.state != "done" or not status.checkpoint or not path.is_dir():
        state = "dead" if status.dead else status.state
        raise RunError(f"run {folder(run).name!r} has no final weights: its state is {state!r}")
    return path


def resume_point(run: str | Path) -> tuple[int, Path] | None:
    """(step, folder) of the newest complete resume point; None if there is none."""
    found = [
        (int(match[1]), path)
        for path in (folder(run) / "resume").glob("step-*")
        if (match := _STEP.fullmatch(path.name))
    ]
    return max(found, default=None)


def send(run: str | Path, command: Command) -> int:
    """Ask a running process to pause, go on or stop at the end of its step.

    Returns:
        The id that status.json shows as ``control_id`` once the command was taken.
    """
    path = folder(run) / "control.json"
    last = json.loads(path.read_text())["id"] if path.exists() else 0
    write_atomic(path, json.dumps({"command": command, "id": last + 1}))
    return int(last) + 1


def write_atomic(path: Path, text: str, *, sync: bool = False) -> None:
    """Replace a file by ``text`` so that a reader sees the old or the new content, never a part.

    Args:
        path: the file.
        text: its new content.
        sync: also wait until the content is on disk (survives a power cut, costs milliseconds).
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            if sync:
                os.fsync(handle.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_parquet(path: Path, table: pa.Table) -> None:
    """Replace a file by ``table``, as ``write_atomic`` does for text."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        pq.write_table(table, aside, compression="zstd")
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
