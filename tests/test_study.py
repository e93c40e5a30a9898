"""The runner of notebooks, on throwaway notebooks: nothing here is replaced by a stand-in."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from notebook_factory import code, notebook, write, write_profile

from rlkit import paths, study
from rlkit.parameters import ParameterError
from rlkit.study import Layout, StudyError, plan, run
from rlkit.studystate import Study

COUNT = code("count", "for i in range(steps):\n    print('line', i, label)")


@pytest.fixture
def layout(tmp_path, monkeypatch):
    monkeypatch.setenv("RLKIT_RUNS", str(tmp_path / "runs"))
    write_profile(tmp_path, "default", {})
    return Layout(tmp_path, tmp_path / "studies")


def go(layout: Layout, profile: str = "default", **options) -> Study:
    return run(layout, plan(layout, profile), profile, **options)


def executed(result: Study, stem: str) -> nbformat.NotebookNode:
    return nbformat.read(result.folder / f"{stem}.ipynb", as_version=4)


# --- planning -----------------------------------------------------------------------------------


def test_plan_orders_notebooks_and_merges_parameters(layout):
    write(layout.root, "02_b", notebook(COUNT))
    write(layout.root, "01_a", notebook(COUNT, parameters="steps = 1  # int: n"))
    write_profile(layout.root, "default", {"_all": {"label": "z", "steps": 4}, "02": {"steps": 5}})
    jobs = plan(layout, "default", settings=["01.steps=7"])
    assert [(job.stem, job.parameters) for job in jobs] == [
        ("01_a", {"steps": 7}),
        ("02_b", {"steps": 5, "label": "z"}),
    ]


@pytest.mark.parametrize(
    ("profile", "stems", "settings", "complaint"),
    [
        ("defualt", [], [], "unknown profile 'defualt' .did you mean 'default'"),
        ("default", ["09"], [], "unknown notebook '09'.*01_a"),
        ("default", [], ["stepz=1"], "unknown parameter 'stepz' .did you mean 'steps'"),
        ("default", [], ["01.seed=1"], "unknown parameter 'seed'"),
        ("default", [], ["04.steps=1"], "unknown notebook '04'"),
        ("default", [], ["steps"], "expected name=value"),
        ("default", [], ["steps=many"], "steps='many' is str; expected int"),
        ("default", [], ["steps=1.5"], "expected int"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(layout, profile, stems, settings, complaint):
    write(layout.root, "01_a", notebook(COUNT))
    with pytest.raises((StudyError, ParameterError), match=complaint):
        plan(layout, profile, stems, settings)
    assert not layout.studies.exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"_all": {"nothing": 1}}, "default.yaml, _all: unknown parameter 'nothing'"),
        ({"01": {"nothing": 1}}, "default.yaml, 01_a: unknown parameter 'nothing'"),
        ({"03_c": {"steps": 1}}, "default.yaml: unknown notebook '03_c'"),
        ({"01": {"steps": "x"}}, "default.yaml, 01_a: steps='x' is str"),
    ],
)
def test_a_profile_that_cannot_work_is_refused(layout, content, complaint):
    write(layout.root, "01_a", notebook(COUNT))
    write_profile(layout.root, "default", content)
    with pytest.raises((StudyError, ParameterError), match=complaint):
        plan(layout, "default")


def test_a_repository_without_notebooks_is_named(layout):
    with pytest.raises(StudyError, match="no notebooks"):
        plan(layout, "default")


# --- running ------------------------------------------------------------------------------------


def test_a_study_runs_streams_and_leaves_the_tree_alone(layout, capfd, monkeypatch):
    source = write(
        layout.root,
        "01_a",
        notebook(
            COUNT,
            code(
                "env",
                "import os, pathlib\n"
                "figures = pathlib.Path(os.environ['RLKIT_FIGURES'])\n"
                "(figures / 'f.json').write_text('{}')\n"
                "pathlib.Path('stray.txt').write_text('x')\n"
                "run = pathlib.Path(os.environ['RLKIT_RUNS']) / '01-arm-s0'\n"
                "run.mkdir(parents=True); (run / 'status.json').write_text('{}')\n"
                "assert os.environ['RLKIT_HEADLESS'] == '1'",
            ),
            code("widget", "import ipywidgets\nipywidgets.IntSlider()"),
        ),
    )
    before = source.read_bytes()
    write_profile(layout.root, "default", {"01": {"steps": 2, "label": "b"}})
    result = go(layout)
    out = capfd.readouterr().out
    assert result.status == "done"
    assert "01 | line 0 b\n" in out
    assert "01 | line 1 b\n" in out
    assert "line 2" not in out
    assert source.read_bytes() == before
    assert {path.name for path in layout.notebooks.iterdir()} == {"01_a.ipynb"}
    assert not (layout.root / "figures").exists()
    assert (result.folder / "figures" / "f.json").exists()
    assert (result.folder / "stray.txt").exists()
    assert result.records["01_a"].runs == ["01-arm-s0"]
    assert "widgets" not in executed(result, "01_a").metadata
    state = json.loads((result.folder / "state.json").read_text())
    assert state["status"] == "done"
    assert state["notebooks"]["01_a"]["parameters"] == {"steps": 2, "label": "b"}
    table = study.summary(layout, result)
    assert "studies/" in table
    assert str(layout.root) not in table


def test_a_broken_study_goes_on_at_the_notebook_that_failed(layout, capsys):
    write(layout.root, "01_a", notebook(COUNT))
    write(layout.root, "02_b", notebook(code("break", "raise ValueError('no luck')")))
    write(layout.root, "03_c", notebook(COUNT))
    broken = go(layout)
    assert broken.status == "failed"
    states = {stem: record.status for stem, record in broken.records.items()}
    assert states == {"01_a": "done", "02_b": "failed", "03_c": "pending"}
    assert broken.records["02_b"].error == "ValueError: no luck"
    first = (broken.folder / "01_a.ipynb").stat().st_mtime_ns

    write(layout.root, "02_b", notebook(code("break", "print('luck')")))
    mended = go(layout)
    assert mended.folder == broken.folder
    assert mended.status == "done"
    assert (mended.folder / "01_a.ipynb").stat().st_mtime_ns == first
    assert "01_a: done before" in capsys.readouterr().out

    again = go(layout)  # a finished study is not touched: the next one is new
    assert again.folder != broken.folder


def test_changed_code_or_parameters_run_again_changed_text_does_not(layout):
    path = write(layout.root, "01_a", notebook(COUNT))
    write(layout.root, "02_b", notebook(code("break", "raise ValueError")))
    first = go(layout).records["01_a"].started
    time.sleep(1.1)  # the resolution of `started`
    nb = nbformat.read(path, as_version=4)
    nb.cells[0].source = "# Another title"
    nbformat.write(nb, path)
    assert go(layout).records["01_a"].started == first
    write_profile(layout.root, "default", {"01": {"steps": 1}})
    assert go(layout).records["01_a"].started != first


def test_a_killed_kernel_fails_although_the_metadata_says_completed(layout):
    kill = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    write(layout.root, "01_a", notebook(COUNT, code("kill", kill), code("after", "print(1)")))
    result = go(layout)
    record = result.records["01_a"]
    assert (record.status, record.exit_code) == ("failed", 138)
    assert "killed" in record.error
    killed = next(cell for cell in executed(result, "01_a").cells if cell.id == "kill")
    assert killed.metadata.papermill.status == "completed"  # the reason why it is not trusted


def test_a_kernel_that_exits_quietly_fails(layout):
    write(layout.root, "01_a", notebook(code("leave", "import os\nos._exit(0)")))
    assert go(layout).records["01_a"].exit_code == 138


def kernel_that_fails(folder: Path, times: int) -> Path:
    """A JUPYTER_PATH whose python3 kernel exits at its first ``times`` starts."""
    spec = folder / "kernels" / "python3"
    spec.mkdir(parents=True)
    script = folder / "kernel.py"
    script.write_text(
        "import pathlib, sys\n"
        f"count = pathlib.Path({str(folder / 'count')!r})\n"
        "starts = int(count.read_text()) if count.exists() else 0\n"
        "count.write_text(str(starts + 1))\n"
        f"if starts < {times}: sys.exit(1)\n"
        "from ipykernel import kernelapp\n"
        "kernelapp.launch_new_instance(argv=sys.argv[1:])\n"
    )
    argv = [sys.executable, str(script), "-f", "{connection_file}"]
    content = {"argv": argv, "display_name": "x", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(("times", "status"), [(1, "done"), (9, "failed")])
def test_a_kernel_that_dies_at_its_start_is_tried_again(
    layout, tmp_path, monkeypatch, times, status
):
    folder = kernel_that_fails(tmp_path / "jupyter", times)
    monkeypatch.setenv("JUPYTER_PATH", str(folder))
    write(layout.root, "01_a", notebook(COUNT))
    result = go(layout)
    assert result.status == status
    assert (folder / "count").read_text() == ("2" if status == "done" else "3")


def _run_in_child(root: str) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    layout = Layout(Path(root), Path(root) / "studies")
    go(layout)


def test_an_interrupted_study_ends_its_notebook_and_can_go_on(layout):
    sleeper = "import time, os, pathlib\npathlib.Path('pid').write_text(str(os.getpid()))\n"
    write(layout.root, "01_a", notebook(code("sleep", sleeper + "time.sleep(600)")))
    child = multiprocessing.get_context("spawn").Process(
        target=_run_in_child, args=(str(layout.root),)
    )
    child.start()
    while not (pids := [p for p in layout.studies.glob("*/pid") if p.read_text()]):
        assert child.is_alive()
        time.sleep(0.1)
    with pytest.raises(StudyError, match="being run by another process"):
        go(layout)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGTERM)
    child.join(30)
    [state] = Study.load_all(layout.studies)
    assert state.records["01_a"].status == "interrupted"
    kernel = int(pids[0].read_text())
    for _ in range(100):
        if not Path(f"/proc/{kernel}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{kernel}").exists()
    write(layout.root, "01_a", notebook(COUNT))
    assert go(layout).status == "done"


def test_an_id_is_one_folder_of_one_profile(layout):
    write(layout.root, "01_a", notebook(COUNT))
    write_profile(layout.root, "full", {})
    with pytest.raises(StudyError, match="one folder name"):
        go(layout, study_id="../x")
    assert go(layout, study_id="mine").folder.name == "mine"
    with pytest.raises(StudyError, match="has profile 'default'"):
        go(layout, "full", study_id="mine")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["study", "--profile", "nope"], "unknown profile 'nope'; known: default, full, smoke"),
        (["stdy"], "unknown command 'stdy' (did you mean 'study'?)"),
        (["publish", "--id", "nope"], "no such finished study"),
        (["figures", "nope"], "nope is not a folder"),
    ],
)
def test_the_command_reports_bad_input_in_one_line(layout, arguments, complaint):
    if arguments[0] == "study" and not list(paths.root().glob("notebooks/*.ipynb")):
        pytest.skip("no notebooks yet")
    done = subprocess.run(
        [sys.executable, "-m", "rlkit", *arguments],
        cwd=paths.root(),
        env=os.environ | {"RLKIT_STUDIES": str(layout.studies)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {complaint}")
    assert len(done.stderr.splitlines()) == 1
