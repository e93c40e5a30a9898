"""nbval with small parameters: ``pytest --nb-smoke notebooks``.

The committed notebooks hold the outputs of a full run, for people. Here each one runs with the
parameters of configs/smoke.yaml and is compared, cell id by cell id, with tests/golden/NN_x.ipynb
(written by tools/golden.py). Unlike plain nbval, what cannot be compared fails: see
``SmokeNotebook.problems``.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbval.plugin import IPyNbCell, IPyNbFile, find_comment_markers, find_metadata_tags
from papermill.parameterize import parameterize_notebook

from rlkit.study import Layout, plan

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
_FRACTION = re.compile(r"(?<![\w.])-?\d+\.\d+(?:[eE][+-]?\d+)?(?!\.?\w)")
_NOT_COMPARED = ("image/png", "image/jpeg", "application/vnd.jupyter.widget-view+json")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--nb-smoke",
        action="store_true",
        help="run notebooks with configs/smoke.yaml and compare with tests/golden",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.nb_smoke:
        return
    config.option.nbval = True
    config.option.nbval_current_env = True
    config.option.nbval_sanitize_with = str(ROOT / "configs" / "nbval_sanitize.cfg")
    scratch = tempfile.mkdtemp(prefix="nb-smoke-")
    config.add_cleanup(lambda: shutil.rmtree(scratch, ignore_errors=True))
    os.environ |= {
        "RLKIT_FIGURES": f"{scratch}/figures",
        "RLKIT_RUNS": f"{scratch}/runs",
        "RLKIT_HEADLESS": "1",
        "RLKIT_PNG": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(
    file_path: Path, parent: pytest.Collector
) -> Generator[None, list[Any], list[Any]]:
    collected = yield
    if not parent.config.option.nb_smoke:
        return collected
    return [
        SmokeNotebook.from_parent(parent, path=file_path) if isinstance(item, IPyNbFile) else item
        for item in collected
    ]


class SmokeNotebook(IPyNbFile):
    """A notebook with smoke parameters and the reference outputs swapped in."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skip_compare += ("stderr",)  # progress bars and warnings of libraries

    def collect(self) -> Iterator[pytest.Item]:
        stem = self.path.stem
        [job] = plan(Layout(ROOT, ROOT / "studies"), "smoke", [stem])
        self.nb = nbformat.read(self.path, as_version=4)
        if job.parameters:
            self.nb.metadata.setdefault("papermill", {})
            for cell in self.nb.cells:
                cell.metadata.setdefault("tags", [])
            self.nb = parameterize_notebook(
                self.nb, job.parameters, kernel_name="python3", language="python"
            )
        golden_file = GOLDEN / f"{stem}.ipynb"
        golden = nbformat.read(golden_file, as_version=4).cells if golden_file.exists() else []
        reference = {cell.id: cell for cell in golden if cell.cell_type == "code"}
        code = [cell for cell in self.nb.cells if cell.cell_type == "code"]
        compared, absent = 0, []
        for number, cell in enumerate(code):
            options = defaultdict(bool, find_metadata_tags(cell.metadata))
            options.update(find_comment_markers(cell.source))
            options.setdefault("check", True)
            if "injected-parameters" in cell.metadata.get("tags", []) or not cell.source.strip():
                cell.outputs, cell.execution_count = [], None
            elif cell.id in reference:
                cell.outputs = reference[cell.id].outputs
                cell.execution_count = reference[cell.id].execution_count
                compared += options["check"] and not options["skip"] and _comparable(cell)
            else:
                cell.outputs, cell.execution_count = [], None
                absent.append(cell.id)
            yield SmokeCell.from_parent(
                self, name=f"Cell {number}", cell_num=number, cell=cell, options=options
            )
        yield Reference.from_parent(
            self, name="reference", problems=self.problems(golden_file, reference, absent, compared)
        )

    def problems(
        self, golden_file: Path, reference: dict[str, Any], absent: list[str], compared: int
    ) -> list[str]:
        """What would make the comparison of this notebook an empty promise."""
        if not golden_file.exists():
            return [f"no reference: {golden_file.relative_to(ROOT)} is missing"]
        stale = sorted(set(reference) - {cell.id for cell in self.nb.cells})
        found = [f"code cell {name!r} is absent from the reference" for name in absent]
        found += [f"the reference holds {name!r}, the notebook does not" for name in stale]
        if not compared:
            found.append("no cell is compared: every output is ignored, empty or an image")
        return found


class SmokeCell(IPyNbCell):
    """A cell whose numbers are compared to six digits, inside plotly figures too."""

    def sanitize(self, s: Any) -> Any:
        if isinstance(s, str):
            return _FRACTION.sub(lambda match: _rounded(float(match[0])), super().sanitize(s))
        if isinstance(s, dict):
            if {"dtype", "bdata"} <= s.keys():
                s = np.frombuffer(base64.b64decode(s["bdata"]), s["dtype"]).tolist()
                return self.sanitize(s)
            kept = sorted(s.keys() - {"uid", "template"})
            return {key: self.sanitize(s[key]) for key in kept}
        if isinstance(s, list):
            return [self.sanitize(item) for item in s]
        return _rounded(s) if isinstance(s, float) else s


class Reference(pytest.Item):
    """Fails when a notebook's comparison is incomplete."""

    def __init__(self, *, problems: list[str], **rest: Any) -> None:
        super().__init__(**rest)
        self.problems = problems

    def runtest(self) -> None:
        if self.problems:
            text = "\n".join(f"  {problem}" for problem in self.problems)
            pytest.fail(f"{text}\nRegenerate with: python tools/golden.py", pytrace=False)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self.path.name}::reference"


def _comparable(cell: nbformat.NotebookNode) -> bool:
    return cell.execution_count is not None and any(
        output.get("name") == "stdout" or set(output.get("data", {})) - set(_NOT_COMPARED)
        for output in cell.outputs
    )


def _rounded(value: float) -> str:
    return f"{value + 0.0:.6g}"
