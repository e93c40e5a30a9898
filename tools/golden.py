"""Write the reference outputs of the notebook tests: ``python tools/golden.py [03 ...]``.

Runs the notebooks with the parameters of configs/smoke.yaml and stores, in tests/golden/, the
outputs of the cells that are compared. Look at the diff before committing it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbval.plugin import find_comment_markers, find_metadata_tags

from rlkit import paths
from rlkit.publish import clean_notebook
from rlkit.study import Layout, plan, run


def reference(source: NotebookNode, executed: NotebookNode, name: str) -> NotebookNode:
    """The code cells of a notebook with the outputs that nbval compares, and nothing else."""
    notebook = clean_notebook(source, executed, name)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in notebook.cells:
        options = dict(find_metadata_tags(cell.metadata)) | dict(find_comment_markers(cell.source))
        if options.get("check") is False or options.get("skip"):
            cell.outputs = []
        cell.source = ""  # the notebook has it; a copy would only go stale
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            for key in [key for key in output.get("data", {}) if key.startswith("image/")]:
                del output.data[key]
        cell.metadata.clear()
    return notebook


def main(stems: list[str]) -> int:
    """Run and write; exit code 1 if a notebook fails."""
    golden = paths.root() / "tests" / "golden"
    golden.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"RLKIT_RUNS": f"{scratch}/runs", "RLKIT_PNG": "0"}
        layout = Layout(paths.root(), Path(scratch) / "studies")
        jobs = plan(layout, "smoke", stems)
        study = run(layout, jobs, "smoke")
        for job in jobs:
            if study.records[job.stem].status != "done":
                print(f"error: {job.stem}: {study.records[job.stem].error}", file=sys.stderr)
                return 1
            source = nbformat.read(job.source, as_version=4)
            executed = nbformat.read(study.folder / f"{job.stem}.ipynb", as_version=4)
            nbformat.write(reference(source, executed, job.stem), golden / f"{job.stem}.ipynb")
            print(f"wrote tests/golden/{job.stem}.ipynb")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
