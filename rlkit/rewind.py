"""Take a run folder back to a step: a resumed run leaves the files of an uninterrupted one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from rlkit import runs
from rlkit.runs import sync, write_atomic, write_parquet

_EVALUATION = re.compile(r".*-(\d{6})\.[a-z.]+")


def rewind(path: Path, step: int, save_every: int) -> str:
    """Remove what the run at ``path`` wrote after ``step``, torn and temporary files included.

    Checkpoints between multiples of ``save_every`` go too: they were the last of a stopped run.

    Returns:
        The name of the newest checkpoint that is left, "" if none is.
    """
    rows = [row for row in runs.read_metrics_rows(path) if row["step"] <= step]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomic(path / "metrics.jsonl", lines, sync=True)
    _rollouts(path / "rollouts", step)
    for file in (path / "eval").glob("*"):
        match = _EVALUATION.fullmatch(file.name)
        if match and int(match[1]) > step:
            file.unlink()
    for base, every in (("checkpoints", save_every), ("resume", 1)):
        for folder in (path / base).glob(".step-*.tmp"):
            shutil.rmtree(folder)
        for folder in (path / base).glob("step-*"):
            number = int(folder.name.removeprefix("step-"))
            if number > step or not every or number % every:
                shutil.rmtree(folder)
    return max((p.name for p in (path / "checkpoints").glob("step-*")), default="")


def _rollouts(base: Path, step: int) -> None:
    """Also splits a merged file that reaches beyond ``step`` into the parts it was made of."""
    keep = set()
    for first, last, file in runs.rollout_parts(base):
        if last <= step:
            keep.add(file)
            continue
        if first > step:
            continue
        table = pq.read_table(file)
        for number in range(first, step + 1):
            part = base / f"step-{number:06d}.parquet"
            write_parquet(part, table.filter(pc.equal(table["step"], number)))
            sync(part)  # the merged file is about to go
            keep.add(part)
    for file in [*base.glob("*.parquet"), *base.glob(".*.tmp")]:
        if file not in keep:
            file.unlink()
