"""Copy a finished study into the tree: ``python -m rlkit publish``.

The committed notebook keeps its own text, code and default parameters; only outputs and execution
counts come from the study, cell by cell, without traces of papermill or of the machine.
"""

from __future__ import annotations

import argparse
import copy
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from rlkit import paths
from rlkit.study import Layout
from rlkit.studystate import Record, Study, notebook_digest

_ABSOLUTE = r"(?<![\w./+-])/(?:home|root|Users|tmp|var|opt|mnt|srv|private|usr|{first})/[\w.-]+"
_KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
_KEPT_CELL_METADATA = ("tags", "jupyter")


class PublishError(ValueError):
    """A study that must not be committed; the text says why and what to do."""


def machine_paths(text: str) -> list[str]:
    """Absolute paths of this machine (or of one like it) that occur in ``text``."""
    pattern = _ABSOLUTE.format(first=re.escape(paths.root().parts[1]))
    return sorted(set(re.findall(pattern, text)))


def clean_text(text: str) -> str:
    """``text`` with the repository's own paths made relative and progress bars collapsed."""
    replacements = [
        (f"{paths.root()}/", ""),
        (str(paths.root()), "."),
        (f"{sys.prefix}/", "<venv>/"),
        (f"{tempfile.gettempdir()}/", "<tmp>/"),
        (f"{Path.home()}/", "~/"),
    ]
    for old, new in replacements:
        text = text.replace(old, new)
    return re.sub(r"^.*\r(?=[^\r\n])", "", text, flags=re.MULTILINE).replace("\r", "")


def clean_outputs(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Outputs without machine paths, widget views and transient metadata; equal streams joined."""
    cleaned: list[NotebookNode] = []
    for output in outputs:
        output = nbformat.from_dict(_map_text(output))
        if "data" in output:
            view = output.data.pop("application/vnd.jupyter.widget-view+json", None)
            output.metadata = nbformat.from_dict({})
            if view is not None and set(output.data) <= {"text/plain", "text/html"}:
                continue  # a widget without its state: only a placeholder is left
        last = cleaned[-1] if cleaned else None
        if last and output.output_type == "stream" == last.output_type and output.name == last.name:
            last.text += output.text
        else:
            cleaned.append(output)
    for output in cleaned:
        if output.output_type == "stream":
            output.text = clean_text(output.text)
    return cleaned


def clean_notebook(source: NotebookNode, executed: NotebookNode, name: str) -> NotebookNode:
    """A copy of ``source`` with the outputs of ``executed``, matched by cell id.

    Raises:
        PublishError: a code cell was not executed, ended in an error, or shows a machine path.
    """
    results = {cell.id: cell for cell in executed.cells if cell.cell_type == "code"}
    notebook = copy.deepcopy(source)
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": _KERNELSPEC, "language_info": {"name": "python"}}
    )
    for cell in notebook.cells:
        kept = {key: cell.metadata[key] for key in _KEPT_CELL_METADATA if key in cell.metadata}
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type != "code":
            continue
        if cell.id not in results:
            raise PublishError(f"{name}: cell {cell.id!r} is not in the executed notebook")
        result = results[cell.id]
        if result.execution_count is None and cell.source.strip():
            raise PublishError(f"{name}: cell {cell.id!r} was not executed")
        cell.execution_count = result.execution_count
        cell.outputs = clean_outputs(result.outputs)
        if any(output.output_type == "error" for output in cell.outputs):
            raise PublishError(f"{name}: cell {cell.id!r} ended in an error")
        found = machine_paths("\n".join(_texts(cell.outputs)))
        if found:
            raise PublishError(
                f"{name}: the outputs of cell {cell.id!r} hold paths of this machine: "
                f"{', '.join(found)}. Print paths relative to rlkit.paths.root()."
            )
    return notebook


def publish(layout: Layout, study: Study) -> list[Path]:
    """Write the outputs of ``study`` into notebooks/ and its figures into figures/.

    Everything is checked before the first file is written.

    Returns:
        The files written.

    Raises:
        PublishError: the study is not complete, or a notebook changed since it ran.
    """
    if study.status != "done":
        raise PublishError(
            f"study {study.folder.name!r} is {study.status}; only a complete one is published"
        )
    if study.profile == "smoke":
        raise PublishError("a smoke study shows that notebooks run; its numbers mean nothing")
    notebooks = {stem: _ready(layout, study, stem) for stem in sorted(study.records)}
    if len({record.code for record in study.records.values()}) > 1:
        print("note: the package changed while this study ran; its notebooks differ in code")
    figures = sorted(file for file in (study.folder / "figures").glob("*") if file.is_file())
    for figure in figures:
        if figure.suffix == ".json" and (found := machine_paths(figure.read_text())):
            raise PublishError(f"figure {figure.name} holds paths of this machine: {found}")
    written = []
    for stem, notebook in notebooks.items():
        target = layout.notebooks / f"{stem}.ipynb"
        nbformat.write(notebook, target)
        written.append(target)
    (layout.root / "figures").mkdir(exist_ok=True)
    for figure in figures:
        written.append(Path(shutil.copy(figure, layout.root / "figures" / figure.name)))
    return written


def _ready(layout: Layout, study: Study, stem: str) -> NotebookNode:
    record: Record = study.records[stem]
    path = layout.notebooks / f"{stem}.ipynb"
    if not path.exists():
        raise PublishError(f"{layout.show(path)} does not exist any more")
    source = nbformat.read(path, as_version=4)
    if notebook_digest(source, record.parameters) != record.digest:
        raise PublishError(
            f"{stem}: its code or the package version changed since the study ran: run it again"
        )
    executed = nbformat.read(study.folder / f"{stem}.ipynb", as_version=4)
    notebook = clean_notebook(source, executed, stem)
    provenance = {"profile": study.profile, "parameters": record.parameters}
    notebook.metadata["rlkit"] = nbformat.from_dict(provenance | {"version": study.version})
    return notebook


def _map_text(value: Any) -> Any:
    """``value`` with every text cleaned, except stored images and streams (joined first)."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, Mapping):
        raw = value.get("output_type") == "stream"
        return {
            key: item if raw or str(key).startswith("image/") else _map_text(item)
            for key, item in value.items()
        }
    return [_map_text(item) for item in value] if isinstance(value, list) else value


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [
            text
            for key, item in value.items()
            if not str(key).startswith("image/")
            for text in _texts(item)
        ]
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m rlkit publish``; the newest finished study unless ``--id`` names one."""
    parser = argparse.ArgumentParser(
        prog="rlkit publish", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--id", default="", help="name of the study folder")
    options = parser.parse_args(argv)
    layout = Layout.of_repository()
    studies = Study.load_all(layout.studies)
    if options.id:
        chosen = [study for study in studies if study.folder.name == options.id]
    else:
        chosen = [s for s in studies if s.status == "done" and s.profile != "smoke"]
    if not chosen:
        known = ", ".join(f"{study.folder.name} ({study.status})" for study in studies) or "none"
        print(f"error: no such finished study; there are: {known}", file=sys.stderr)
        return 2
    try:
        written = publish(layout, chosen[-1])
    except PublishError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"published study {chosen[-1].folder.name}:")
    print("\n".join(f"  {layout.show(path)}" for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
