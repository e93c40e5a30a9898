"""The comparison of notebooks: what it must not let pass.

One folder holds one notebook per defect; the real plugin runs over all of them once, in a process.
"""

import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import golden
import nbformat
import pytest
from nbformat import NotebookNode
from notebook_factory import code, notebook, write, write_profile

REPO = Path(__file__).resolve().parent.parent
SHOW = "import sys\nprint('steps', steps, 'value', 1 / 3)\nprint('noise', id(sys), file=sys.stderr)"
FIGURE = """\
from IPython.display import display
figure = {"data": [{"uid": "x", "y": [0.1, 0.2]}], "layout": {"title": "t"}}
display({"application/vnd.plotly.v1+json": figure, "text/plain": "figure"}, raw=True)"""
TRAINED = "import random\nprint(random.random())"


def healthy() -> NotebookNode:
    return notebook(
        code("show", SHOW),
        code("figure", FIGURE),
        code("trained", TRAINED, "nbval-ignore-output"),
    )


def cell(nb: NotebookNode, cell_id: str) -> NotebookNode:
    return next(cell for cell in nb.cells if cell.id == cell_id)


def change_number(nb: NotebookNode) -> None:
    cell(nb, "figure").source = FIGURE.replace("0.2]", "0.21]")


def add_cell(nb: NotebookNode) -> None:
    nb.cells.append(code("new", "print(1)"))


def remove_cell(nb: NotebookNode) -> None:
    nb.cells.remove(cell(nb, "figure"))


def ignore_all(nb: NotebookNode) -> None:
    for name in ("show", "figure"):
        cell(nb, name).metadata.tags = ["nbval-ignore-output"]


def break_assert(nb: NotebookNode) -> None:
    cell(nb, "trained").source = "assert False, 'an invariant'"


DEFECTS: dict[str, tuple[Callable[[NotebookNode], None] | None, str, str]] = {
    # notebook: (change, the item that must fail, what it must say)
    "01_good": (None, "", ""),
    "02_parameter": (None, "Cell 2", "steps 4"),
    "03_number": (change_number, "Cell 3", "0.21"),
    "04_missing": (None, "reference", "tests/golden/04_missing.ipynb is missing"),
    "05_added": (add_cell, "reference", "code cell 'new' is absent from the reference"),
    "06_removed": (remove_cell, "reference", "the reference holds 'figure'"),
    "07_ignored": (ignore_all, "reference", "no cell is compared"),
    "08_broken": (break_assert, "Cell 4", "an invariant"),
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> dict[str, dict[str, str]]:
    """Notebook to item to failure text ("" if it passed)."""
    root = tmp_path_factory.mktemp("repo")
    reference = root / "tests" / "golden"
    reference.mkdir(parents=True)
    for stem, (change, _, _) in DEFECTS.items():
        nb = healthy()
        if change:
            change(nb)
        write(root, stem, nb)
        if stem != "04_missing":
            nbformat.write(by_hand(), reference / f"{stem}.ipynb")
    write_profile(root, "smoke", {"_all": {"steps": 2}, "02": {"steps": 4}})
    shutil.copy(REPO / "notebooks" / "conftest.py", root / "notebooks")
    shutil.copy(REPO / "configs" / "nbval_sanitize.cfg", root / "configs")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--nb-smoke", "notebooks"]
    done = subprocess.run(
        [*command, "--rootdir", str(root), "-c", "/dev/null", "--junit-xml", "result.xml"],
        cwd=root,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPO), "HOME": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found: dict[str, dict[str, str]] = {stem: {} for stem in DEFECTS}
    for case in ElementTree.parse(root / "result.xml").iter("testcase"):
        stem = next(stem for stem in DEFECTS if stem in case.attrib["classname"])
        failure = case.find("failure")
        found[stem][case.attrib["name"]] = "" if failure is None else str(failure.text)
    return found


def by_hand() -> NotebookNode:
    """A reference that is not made by the tool, so that the test does not depend on it."""
    stream = nbformat.v4.new_output("stream", text="steps 2 value 0.33333334\n")
    figure = {"data": [{"uid": "y", "y": [0.1, 0.20000000001]}], "layout": {"title": "t"}}
    data = {"application/vnd.plotly.v1+json": figure, "text/plain": "figure"}
    outputs = {"show": [stream], "figure": [nbformat.v4.new_output("display_data", data=data)]}
    nb = healthy()
    for number, code_cell in enumerate(nb.cells[1:], start=1):
        code_cell.execution_count = number
        code_cell.outputs = outputs.get(code_cell.id, [])
    return nb


def test_equal_outputs_pass_every_item(outcome):
    cells = [f"Cell {number}" for number in range(5)]  # with the injected parameters
    assert outcome["01_good"] == dict.fromkeys([*cells, "reference"], "")


@pytest.mark.parametrize("stem", list(DEFECTS)[1:])
def test_a_defect_fails_the_item_that_it_concerns(outcome, stem):
    _, item, text = DEFECTS[stem]
    assert text in outcome[stem][item]
    assert [name for name, failure in outcome[stem].items() if failure] == [item]


def test_the_tool_writes_only_what_is_compared(outcome):
    executed = by_hand()
    cell(executed, "trained").outputs = [nbformat.v4.new_output("stream", text="0.5\n")]
    show = cell(executed, "show")
    show.outputs.append(nbformat.v4.new_output("stream", name="stderr", text="noise"))
    cell(executed, "figure").outputs[0].data["image/png"] = "AAAA"
    result = golden.reference(healthy(), executed, "01_good")
    assert [c.id for c in result.cells] == ["parameters", "show", "figure", "trained"]
    assert cell(result, "trained").outputs == []
    assert [output.name for output in cell(result, "show").outputs] == ["stdout"]
    assert "image/png" not in cell(result, "figure").outputs[0].data
    assert all(c.source == "" and c.execution_count for c in result.cells)
