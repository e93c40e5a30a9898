"""Publishing a finished study: what is copied, what is cleaned, what is refused."""

import json

import nbformat
import pytest
from notebook_factory import code, notebook, write, write_profile

from rlkit import paths
from rlkit.publish import PublishError, clean_outputs, clean_text, machine_paths, publish
from rlkit.study import Layout, plan, run

BAR = (
    "import sys\n"
    "for i in range(3): print(f'step {i}', end='\\r', file=sys.stderr)\n"
    "print('done', file=sys.stderr)"
)


@pytest.fixture
def layout(tmp_path, monkeypatch):
    monkeypatch.setenv("RLKIT_RUNS", str(tmp_path / "runs"))
    write_profile(tmp_path, "default", {"01": {"steps": 1}})
    write_profile(tmp_path, "smoke", {})
    return Layout(tmp_path, tmp_path / "studies")


def go(layout, profile="default"):
    return run(layout, plan(layout, profile), profile)


def test_outputs_are_published_into_the_notebook_as_it_stands(layout):
    show_root = "from rlkit import paths\nprint(steps, paths.root() / 'runs' / 'x')"
    figure = (
        "import os, pathlib\n"
        "folder = pathlib.Path(os.environ['RLKIT_FIGURES'])\n"
        "(folder / 'f.png').write_bytes(b'png')\n"
        "(folder / 'f.json').write_text('{}')"
    )
    path = write(
        layout.root,
        "01_a",
        notebook(code("show", show_root, "keep-me"), code("bar", BAR), code("figure", figure)),
    )
    study = go(layout)
    nb = nbformat.read(path, as_version=4)
    nb.cells[0].source = "# New title"
    nbformat.write(nb, path)

    written = publish(layout, study)
    assert [file.name for file in written] == ["01_a.ipynb", "f.json", "f.png"]
    result = nbformat.read(path, as_version=4)
    nbformat.validate(result)
    cells = {cell.id: cell for cell in result.cells}
    assert list(cells) == ["title", "parameters", "show", "bar", "figure"]  # nothing injected
    assert cells["title"].source == "# New title"
    assert "steps = 3" in cells["parameters"].source
    assert cells["show"].outputs[0].text == "1 runs/x\n"
    assert cells["show"].execution_count is not None
    assert cells["show"].metadata == {"tags": ["keep-me"]}
    assert cells["bar"].outputs[0].text == "done\n"
    assert set(result.metadata) == {"kernelspec", "language_info", "rlkit"}
    assert result.metadata.language_info == {"name": "python"}
    assert result.metadata.rlkit["parameters"] == {"steps": 1}
    assert "papermill" not in path.read_text()
    assert (layout.root / "figures" / "f.png").read_bytes() == b"png"


def test_a_study_that_is_not_complete_is_refused(layout):
    write(layout.root, "01_a", notebook(code("break", "raise ValueError")))
    with pytest.raises(PublishError, match="is failed"):
        publish(layout, go(layout))


def test_a_smoke_study_is_refused(layout):
    write(layout.root, "01_a", notebook())
    with pytest.raises(PublishError, match="smoke"):
        publish(layout, go(layout, "smoke"))


def test_a_notebook_that_changed_or_shows_the_machine_is_refused(layout):
    path = write(layout.root, "01_a", notebook(code("show", "print('in ' + '/home/me/x.txt')")))
    before = path.read_bytes()
    study = go(layout)
    with pytest.raises(PublishError, match=r"'show' hold paths of this machine: /home/me"):
        publish(layout, study)
    assert path.read_bytes() == before
    write(layout.root, "01_a", notebook(code("show", "print(2)")))
    with pytest.raises(PublishError, match="changed since the study ran"):
        publish(layout, study)


def test_an_error_output_or_a_cell_that_did_not_run_is_refused(layout):
    write(layout.root, "01_a", notebook(code("show", "print(1)")))
    study = go(layout)
    file = study.folder / "01_a.ipynb"
    good = nbformat.read(file, as_version=4)

    good.cells[-1].outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]
    nbformat.write(good, file)
    with pytest.raises(PublishError, match="ended in an error"):
        publish(layout, study)
    good.cells[-1].execution_count = None
    nbformat.write(good, file)
    with pytest.raises(PublishError, match="was not executed"):
        publish(layout, study)


def test_paths_are_found_inside_figures_but_not_inside_images():
    root = str(paths.root())
    data = {
        "application/vnd.plotly.v1+json": {"layout": {"title": f"{root}/runs/a"}},
        "image/png": "iVBOR/home/abc/tmp/x",
        "application/vnd.jupyter.widget-view+json": {"model_id": "1"},
    }
    view = {key: data[key] for key in ["application/vnd.jupyter.widget-view+json"]}
    bar = nbformat.v4.new_output("display_data", data=view | {"text/plain": "0%"})
    [output] = clean_outputs([nbformat.v4.new_output("display_data", data=data), bar])
    assert output.data["application/vnd.plotly.v1+json"]["layout"]["title"] == "runs/a"
    assert output.data["image/png"] == data["image/png"]
    assert "widget" not in json.dumps(output)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see /home/me/x", ["/home/me"]),
        ("'/tmp/abc'", ["/tmp/abc"]),
        ("at:/usr/lib/x", ["/usr/lib"]),
        (f"in {paths.root()}", [str(paths.root())[: len(str(paths.root()))]]),
        ("https://example.org/home/page and a/usr/b, AQ/tmp/Z+/tmp/Z", []),
        ("runs/home/x 3/4 <tmp>/a", []),
    ],
)
def test_machine_paths(text, found):
    hits = machine_paths(text)
    assert len(hits) == len(found)
    assert all(want.startswith(hit) for hit, want in zip(hits, found, strict=True))


def test_progress_bars_collapse_to_their_last_state():
    assert clean_text("a\rb\rc\nd\r\n") == "c\nd\n"
