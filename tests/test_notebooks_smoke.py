"""Every notebook, end to end through the runner, with the smallest parameters that work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from rlkit import paths

NOTEBOOKS = sorted(path.stem for path in (paths.root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def committed() -> dict[Path, bytes]:
    files = [*paths.root().glob("notebooks/*.ipynb"), *paths.root().glob("figures/*.*")]
    return {file: file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a smoke study, run by the command that people use."""
    scratch = tmp_path_factory.mktemp("smoke")
    changes = {"RLKIT_STUDIES": "studies", "RLKIT_RUNS": "runs"}
    before = committed()
    done = subprocess.run(
        [sys.executable, "-m", "rlkit", "study", "--profile", "smoke", "--id", "smoke"],
        cwd=paths.root(),
        env=os.environ
        | {name: str(scratch / folder) for name, folder in changes.items()}
        | {"RLKIT_PNG": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "Results: " in done.stdout
    assert committed() == before  # the runner writes below studies/ and runs/ only
    return scratch / "studies" / "smoke"


def test_every_notebook_is_done(study):
    state = json.loads((study / "state.json").read_text())
    assert list(state["notebooks"]) == NOTEBOOKS
    assert {record["status"] for record in state["notebooks"].values()} == {"done"}


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_every_code_cell_ran_and_no_widget_state_was_stored(study, stem):
    notebook = nbformat.read(study / f"{stem}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert all(cell.execution_count for cell in cells)
    assert "widgets" not in notebook.metadata
