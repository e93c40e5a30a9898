"""Promises about the repository itself: its notebooks, its texts, and what is tracked."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from rlkit import paths
from rlkit.parameters import read_parameters
from rlkit.publish import machine_paths

ROOT = paths.root()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
BINARY = {".safetensors", ".parquet", ".png"}


def files() -> list[Path]:
    """Tracked files, and those that git would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


SUPERUSER = "/" + "root"
"""Home of the superuser, put together so that this file does not hold the path it forbids."""


def test_no_file_holds_a_path_of_this_machine():
    own = {str(ROOT), str(Path.home()), sys.prefix} - {"/", "/usr", SUPERUSER}
    bad = []
    for file in files():
        if file.suffix in BINARY:
            continue
        text = file.read_text(errors="replace")
        bad += [f"{file.relative_to(ROOT)}: {path}" for path in own if f"{path}/" in text]
        bad += [
            f"{file.relative_to(ROOT)}: {hit}" for hit in re.findall(SUPERUSER + r"/[\w.]+", text)
        ]
    assert bad == []


def test_no_file_is_larger_than_git_hosts_like():
    assert [file for file in files() if file.stat().st_size > 20e6] == []


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_parameters_are_literals_with_a_type_and_a_comment(notebook):
    cells = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1
    parameters = read_parameters(notebook)
    assert parameters
    assert [name for name, parameter in parameters.items() if not parameter.help] == []
    for line in cells[0].source.splitlines():
        if re.match(r"\w+ *[:=]", line) and "#" in line:
            assert re.search(r"^\w+ *: *\w|# *\(?(int|float|str|bool|list|dict)\b", line), line


def test_cell_ids_are_names_that_stay(notebook):
    """An id drawn by an editor is eight hex digits; references are matched by id."""
    nbformat.validate(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len(set(ids))
    code = [cell.id for cell in notebook.cells if cell.cell_type == "code"]
    assert [name for name in code if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f-]+)?", name)] == []


def test_outputs_are_committed_without_errors(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert [cell.id for cell in code if cell.execution_count is None] == []
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs
    assert [output for output in outputs if output.output_type == "error"] == []


def test_nothing_of_papermill_or_widgets_is_committed(notebook):
    assert not {"papermill", "widgets"} & set(notebook.metadata)
    for cell in notebook.cells:
        assert not {"papermill", "execution"} & set(cell.metadata)
        assert "injected-parameters" not in cell.metadata.get("tags", [])
        for output in cell.get("outputs", []):
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def test_outputs_show_no_machine(notebook):
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            texts = [output.get("text", ""), *map(str, output.get("data", {}).values())]
            if "image/png" in output.get("data", {}):
                texts.remove(str(output.data["image/png"]))
            assert machine_paths("\n".join(texts)) == []


@pytest.mark.parametrize("profile", ["default", "full", "smoke"])
def test_profiles_fit_the_notebooks(profile):
    from rlkit.study import Layout, plan

    assert len(plan(Layout.of_repository(), profile)) == len(NOTEBOOKS)


def test_every_notebook_has_a_reference_and_smoke_parameters():
    smoke = yaml.safe_load((ROOT / "configs" / "smoke.yaml").read_text()) or {}
    for path in NOTEBOOKS:
        assert (ROOT / "tests" / "golden" / path.name).exists(), path.name
        assert path.stem in smoke or path.stem[:2] in smoke or "_all" in smoke, path.stem


def test_no_reference_is_left_over():
    golden = {path.name for path in (ROOT / "tests" / "golden").glob("*.ipynb")}
    assert golden <= {path.name for path in NOTEBOOKS}


def test_readme_names_the_two_commands_and_links_that_exist():
    text = (ROOT / "README.md").read_text()
    assert "make study" in text
    assert "make test" in text
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_make_knows_what_the_readme_says():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"`(?:make) ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert named <= targets
    assert {"study", "test", "lab", "lint", "figures", "publish", "test-slow"} <= targets


def test_the_version_is_said_once():
    from rlkit.studystate import package_version

    assert f"version: {package_version()}\n" in (ROOT / "CITATION.cff").read_text()
