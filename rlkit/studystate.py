"""The state of a study, kept in ``studies/<id>/state.json``, and the hashes that it relies on."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from nbformat import NotebookNode

from rlkit import paths

Status = Literal["pending", "running", "done", "failed", "interrupted"]


@dataclass
class Record:
    """How far one notebook of a study is."""

    digest: str
    parameters: dict[str, Any]
    status: Status = "pending"
    code: str = ""
    """Hash of the package's files when it ran."""
    started: str = ""
    seconds: float = 0.0
    exit_code: int | None = None
    error: str = ""
    runs: list[str] = field(default_factory=list)
    """Run folders that it wrote."""


@dataclass
class Study:
    """A study folder."""

    folder: Path
    profile: str
    created: str
    version: str = field(default_factory=lambda: package_version())
    records: dict[str, Record] = field(default_factory=dict)

    @property
    def status(self) -> Status:
        """``done`` if every notebook is; otherwise the state of the one that is in the way."""
        states = {record.status for record in self.records.values()}
        for state in ("failed", "interrupted", "running", "pending"):
            if state in states:
                return state
        return "done" if states else "pending"

    def keep(self, stems: Iterable[str]) -> None:
        """Forget notebooks that are no longer part of the study."""
        wanted = set(stems)
        self.records = {stem: self.records[stem] for stem in self.records if stem in wanted}

    def save(self) -> None:
        """Write state.json in one step, so that a reader never sees half of it."""
        content = {
            "id": self.folder.name,
            "profile": self.profile,
            "created": self.created,
            "version": self.version,
            "status": self.status,
            "notebooks": {stem: asdict(record) for stem, record in sorted(self.records.items())},
        }
        aside = self.folder / "state.json.new"
        aside.write_text(json.dumps(content, indent=2) + "\n")
        aside.replace(self.folder / "state.json")

    @classmethod
    def load(cls, folder: Path) -> Study:
        """Read a study folder."""
        content = json.loads((folder / "state.json").read_text())
        records = {stem: Record(**record) for stem, record in content["notebooks"].items()}
        return cls(folder, content["profile"], content["created"], content["version"], records)

    @classmethod
    def load_all(cls, studies: Path) -> list[Study]:
        """Every study below ``studies``, oldest first."""
        found = [cls.load(state.parent) for state in studies.glob("*/state.json")]
        return sorted(found, key=lambda study: (study.created, study.folder.name))


def package_version() -> str:
    """The version in pyproject.toml."""
    content = tomllib.loads((paths.root() / "pyproject.toml").read_text())
    return str(content["project"]["version"])


def code_digest() -> str:
    """Hash of the package's modules and profiles."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted([*package.rglob("*.py"), *package.rglob("*.yaml")]):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def notebook_digest(notebook: NotebookNode, parameters: dict[str, Any]) -> str:
    """Hash of what decides a notebook's outputs: code cells, parameters, package version."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    text = json.dumps([cells, parameters, package_version()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
