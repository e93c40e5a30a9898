"""The numbers a study ends with, as CSV beside its figures, and the README's table made from them.

A README number that nobody regenerates goes stale: notebooks write ``figures/<notebook>.csv``, and
``make readme`` copies them into README.md; a test compares the two.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlkit import paths
from rlkit.stats import Estimate

if TYPE_CHECKING:
    from rlkit.panels import Contrast

COLUMNS = ("quantity", "value", "low", "high", "seeds", "verdict")
BEGIN = "<!-- results: written by `make readme` -->"
END = "<!-- /results -->"


def save(
    name: str,
    values: Mapping[str, Estimate],
    contrasts: Sequence[Contrast] = (),
    *,
    seeds: Mapping[str, int],
    verdicts: Mapping[str, str] | None = None,
) -> Path:
    """Write ``figures/<name>.csv``: measured values, then differences with their verdicts.

    Args:
        name: file name without ending, for example ``03_results``.
        values: label to estimate.
        contrasts: differences; their verdict goes beside them.
        verdicts: other verdicts than BETTER and WORSE for some contrasts, by name.
        seeds: training seeds behind the numbers, by the beginning of their label (``""``: all).
    """
    rows = [(label, e, "") for label, e in values.items()]
    said = verdicts or {}
    rows += [(c.name, c.difference, said.get(c.name, c.verdict.conclusion)) for c in contrasts]
    path = paths.figures_dir() / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for label, e, verdict in rows:
            numbers = (f"{x:.4f}" for x in (e.value, e.low, e.high))
            count = next(n for start, n in seeds.items() if label.startswith(start))
            writer.writerow([label, *numbers, count, verdict])
    return path


def markdown(path: Path) -> str:
    """One results file as a markdown table."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = ["| quantity | value | 95 % interval | seeds | verdict |", "|---|---|---|---|---|"]
    for row in rows:
        value, low, high = (float(row[key]) for key in ("value", "low", "high"))
        # Lengths and ratios of lengths are read with fewer digits than accuracies.
        digits = 1 if abs(value) >= 10 else 3
        lines.append(
            f"| {row['quantity']} | {value:.{digits}f} | {low:.{digits}f} to {high:.{digits}f} "
            f"| {row['seeds']} | {row['verdict']} |"
        )
    return "\n".join(lines)


def fill(text: str, folder: Path) -> str:
    """``text`` with the tables of all ``*_results.csv`` of ``folder`` between the markers.

    Raises ValueError if the markers are missing or no results exist.
    """
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"README.md needs the lines {BEGIN!r} and {END!r} around its results")
    files = sorted(folder.glob("*_results.csv"))
    if not files:
        raise ValueError(f"{folder} has no *_results.csv; run `make study` and `make publish`")
    tables = "\n\n".join(f"Notebook {file.name[:2]}:\n\n{markdown(file)}" for file in files)
    return f"{text[: begin + len(BEGIN)]}\n{tables}\n{text[end:]}"


def main(argv: list[str] | None = None) -> int:
    """Write the tables into README.md."""
    argparse.ArgumentParser(prog="rlkit readme", description=main.__doc__).parse_args(argv)
    readme = paths.root() / "README.md"
    readme.write_text(fill(readme.read_text(), paths.root() / "figures"))
    print(f"wrote {readme.name}")
    return 0
