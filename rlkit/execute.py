"""Run one notebook with papermill, in a process of its own (``python -m rlkit.execute job.json``).

The exit code is the only thing the caller trusts: when a kernel is killed, papermill's metadata
still calls every cell ``completed``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import nbformat
import papermill
import zmq
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

OK = 0
CELL_FAILED = 1
NEVER_STARTED = 75
"""The kernel died before the first cell (a port race, a busy machine): worth another try."""
KERNEL_DIED = 138
"""The kernel was killed while a cell ran; papermill's own command uses the same code."""


def execute(source: Path, output: Path, parameters: dict[str, Any], cwd: Path) -> int:
    """Execute ``source`` into ``output`` and return one of the exit codes of this module.

    What the cells print is copied to stdout as it is printed. Widget state is left out: a single
    FigureWidget would add 5 MB.
    """
    try:
        papermill.execute_notebook(
            nbformat.read(source, as_version=4),
            str(output),
            parameters=parameters,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stdout,
            cwd=str(cwd),
            start_timeout=180,
            store_widget_state=False,
        )
    except PapermillExecutionError:
        return CELL_FAILED
    except (RuntimeError, zmq.ZMQError) as error:
        if not _has_begun(output):
            return NEVER_STARTED
        if isinstance(error, DeadKernelError):
            return KERNEL_DIED
        raise
    return OK


def _has_begun(output: Path) -> bool:
    if not output.exists():
        return False
    cells = nbformat.read(output, as_version=4).cells
    # Not the status: at the end papermill turns every pending cell into a completed one.
    return any(cell.metadata.get("papermill", {}).get("start_time") for cell in cells)


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    sys.exit(execute(Path(job["source"]), Path(job["output"]), job["parameters"], Path(job["cwd"])))
