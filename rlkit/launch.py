"""Start the process of one notebook, show its output with a prefix, and judge how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat

from rlkit import execute, paths
from rlkit.studystate import Record, Study

STARTS = 3
"""Attempts at starting a kernel; only one that died before its first cell is tried again."""
_NOISE = (
    "Kernel is running over TCP without encryption",
    "KeyboardInterrupt caught in kernel",  # how nbclient ends a kernel
)


def launch(
    study: Study, stem: str, source: Path, parameters: dict[str, Any], digest: str, code: str
) -> Record:
    """Run one notebook of ``study``; its record is saved before, during and after."""
    begun = time.time()
    record = Record(digest=digest, parameters=parameters, status="running", code=code)
    record.started = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(begun))
    study.records[stem] = record
    study.save()
    output = study.folder / f"{stem}.ipynb"
    try:
        for _ in range(STARTS):
            output.unlink(missing_ok=True)
            record.exit_code = _process(study.folder, stem, source, output, parameters)
            if record.exit_code != execute.NEVER_STARTED:
                break
        record.status = "done" if record.exit_code == execute.OK else "failed"
        record.error = "" if record.status == "done" else reason(record.exit_code, output)
    except KeyboardInterrupt:
        record.status, record.error = "interrupted", "stopped by the user"
    finally:
        record.seconds = round(time.time() - begun, 1)
        record.runs = _runs_since(begun)
        study.save()
    return record


def environment(folder: Path) -> dict[str, str]:
    """The environment of a notebook's process: figures and display go to the study folder."""
    return os.environ | {
        "RLKIT_FIGURES": str(folder / "figures"),
        "RLKIT_HEADLESS": "1",
        "RLKIT_RUNS": str(paths.runs_dir().resolve()),
        # The kernel must import the package that runs the study, installed or not.
        "PYTHONPATH": os.pathsep.join(
            [str(paths.root()), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


def reason(exit_code: int | None, output: Path) -> str:
    """Why a notebook failed, in one line. The exit code decides, never the metadata."""
    if exit_code == execute.NEVER_STARTED:
        return f"its kernel died before the first cell, {STARTS} times"
    if exit_code == execute.KERNEL_DIED:
        return "its kernel was killed while a cell ran (out of memory?)"
    if exit_code is not None and exit_code < 0:
        return f"its process was ended by {signal.Signals(-exit_code).name}"
    if exit_code == execute.CELL_FAILED and output.exists():
        for cell in nbformat.read(output, as_version=4).cells:
            for result in cell.get("outputs", []):
                if result.output_type == "error":
                    return f"{result.ename}: {result.evalue}".splitlines()[0]
    return f"its process ended with exit code {exit_code}; see {output.stem}.log beside it"


def _process(
    folder: Path, stem: str, source: Path, output: Path, parameters: dict[str, Any]
) -> int:
    (folder / "figures").mkdir(exist_ok=True)
    job = folder / f"{stem}.job.json"
    job.write_text(
        json.dumps(
            {
                "source": str(source.resolve()),
                "output": str(output.resolve()),
                "parameters": parameters,
                "cwd": str(folder.resolve()),  # stray relative files stay out of notebooks/
            }
        )
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "rlkit.execute", str(job.resolve())],
        cwd=paths.root(),
        env=environment(folder.resolve()),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the other
    )
    assert process.stdout is not None
    try:
        with (folder / f"{stem}.log").open("w") as log:
            for line in process.stdout:
                log.write(line)
                if line.strip() and not any(noise in line for noise in _NOISE):
                    print(f"  {stem.partition('_')[0]} | {line}", end="", flush=True)
        return process.wait()
    finally:
        _end(process)
        job.unlink(missing_ok=True)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()  # its kernel notices that it is gone and exits by itself
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _runs_since(begun: float) -> list[str]:
    """Runs written since then: those that the notebook trained, not those that it found."""
    return sorted(
        status.parent.name
        for status in paths.runs_dir().glob("*/status.json")
        if status.stat().st_mtime >= begun
    )
