"""Small throwaway notebooks for the tests of the runner, of publishing and of the comparison."""

from pathlib import Path

import nbformat
import yaml

PARAMETERS = """\
steps = 3  # int: how far to count
rate = 1e-4  # float: a number with a fraction
label = "a"  # str: printed
seeds = [0, 1]  # list[int]: several
limit = None  # int | None: no limit if None
"""


def code(cell_id: str, source: str, *tags: str) -> nbformat.NotebookNode:
    """A code cell with an id and tags."""
    return nbformat.v4.new_code_cell(source, id=cell_id, metadata={"tags": list(tags)})


def notebook(*cells: nbformat.NotebookNode, parameters: str = PARAMETERS) -> nbformat.NotebookNode:
    """A notebook with a parameters cell in front of ``cells``."""
    title = nbformat.v4.new_markdown_cell("# Title", id="title")
    return nbformat.v4.new_notebook(
        cells=[title, code("parameters", parameters, "parameters"), *cells],
        metadata={"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}},
    )


def write(root: Path, stem: str, nb: nbformat.NotebookNode) -> Path:
    """Store a notebook as notebooks/<stem>.ipynb below ``root``."""
    path = root / "notebooks" / f"{stem}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


def write_profile(root: Path, profile: str, content: dict) -> None:
    """Store configs/<profile>.yaml below ``root``."""
    path = root / "configs" / f"{profile}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
