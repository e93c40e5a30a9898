"""Run the numbered notebooks as one study: ``python -m rlkit study --profile default``.

Every notebook runs in its own papermill process. A study lives in ``studies/<id>/`` (executed
notebooks, logs, figures, state.json); notebooks/ and the committed figures/ are never touched. A
study that broke is continued at the notebook that failed.
"""

from __future__ import annotations

import argparse
import fcntl
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml

from rlkit import parameters as params
from rlkit import paths
from rlkit.launch import launch
from rlkit.studystate import Record, Study, code_digest, notebook_digest

PROFILES = ("default", "full", "smoke")


class StudyError(ValueError):
    """A study that cannot be planned or run; the text says what to change."""


@dataclass(frozen=True)
class Layout:
    """Where a repository keeps what a study reads and writes."""

    root: Path
    studies: Path

    @classmethod
    def of_repository(cls) -> Layout:
        """The layout of this repository (``$RLKIT_STUDIES`` moves the studies)."""
        return cls(paths.root(), paths.studies_dir())

    @property
    def notebooks(self) -> Path:
        """The numbered notebooks, ``NN_name.ipynb``."""
        return self.root / "notebooks"

    def show(self, path: Path) -> str:
        """``path`` for people: relative to the root where it lies below it."""
        return str(path.relative_to(self.root) if path.is_relative_to(self.root) else path)


@dataclass(frozen=True)
class Job:
    """One notebook and the parameters that it will run with."""

    stem: str
    source: Path
    parameters: dict[str, Any]
    digest: str
    """Hash of code cells, parameters and package version: a change means that it runs again."""


def plan(
    layout: Layout, profile: str, stems: Sequence[str] = (), settings: Sequence[str] = ()
) -> list[Job]:
    """The jobs of a study in order.

    Args:
        layout: the repository.
        profile: a file of configs/ that maps notebook names to parameters; ``_all`` applies to
            every notebook that declares the name.
        stems: notebooks to run, by name or number (``03``); all if empty.
        settings: ``name=value`` (all notebooks that declare it) or ``03.name=value``.

    Raises:
        StudyError, ParameterError: unknown profile, notebook or parameter, or a wrong type.
    """
    sources = {path.stem: path for path in sorted(layout.notebooks.glob("[0-9][0-9]_*.ipynb"))}
    if not sources:
        raise StudyError(f"no notebooks named NN_name.ipynb in {layout.show(layout.notebooks)}/")
    chosen = [resolve_stem(stem, sources) for stem in stems] or list(sources)
    declared = {
        stem: params.read_parameters(nbformat.read(path, as_version=4))
        for stem, path in sources.items()
    }
    given = _from_profile(layout, profile, declared)
    for setting in settings:
        _apply_setting(setting, declared, chosen, given)
    jobs = []
    for stem in sorted(set(chosen)):
        values = params.check(declared[stem], given[stem], stem)
        digest = notebook_digest(nbformat.read(sources[stem], as_version=4), values)
        jobs.append(Job(stem, sources[stem], values, digest))
    return jobs


def resolve_stem(text: str, known: Mapping[str, Any]) -> str:
    """The notebook called ``text``: its name, its file name, or its number."""
    name = text.removesuffix(".ipynb").rpartition("/")[2]
    matches = [stem for stem in known if name in (stem, stem.partition("_")[0])]
    if len(matches) != 1:
        raise StudyError(params.describe_unknown("notebook", name, known))
    return matches[0]


def _from_profile(
    layout: Layout, profile: str, declared: Mapping[str, Mapping[str, params.Parameter]]
) -> dict[str, dict[str, Any]]:
    file = layout.root / "configs" / f"{profile}.yaml"
    if not file.exists():
        raise StudyError(params.describe_unknown("profile", profile, PROFILES))
    content = yaml.safe_load(file.read_text()) or {}
    where = layout.show(file)
    given: dict[str, dict[str, Any]] = {stem: {} for stem in declared}
    for name, value in (content.pop("_all", None) or {}).items():
        _set_everywhere(name, value, declared, list(declared), given, f"{where}, _all")
    for key, values in content.items():
        try:
            given[resolve_stem(key, declared)].update(values or {})
        except StudyError as error:
            raise StudyError(f"{where}: {error}") from None
    for stem, values in given.items():  # also of notebooks that are not chosen now
        params.check(declared[stem], values, f"{where}, {stem}")
    return given


def _set_everywhere(
    name: str,
    value: Any,
    declared: Mapping[str, Mapping[str, params.Parameter]],
    stems: Sequence[str],
    given: dict[str, dict[str, Any]],
    where: str,
) -> None:
    takers = [stem for stem in stems if name in declared[stem]]
    if not takers:
        known = sorted({known for stem in stems for known in declared[stem]})
        raise params.ParameterError(f"{where}: {params.describe_unknown('parameter', name, known)}")
    for stem in takers:
        given[stem][name] = value


def _apply_setting(
    setting: str,
    declared: Mapping[str, Mapping[str, params.Parameter]],
    chosen: Sequence[str],
    given: dict[str, dict[str, Any]],
) -> None:
    target, equals, text = setting.partition("=")
    if not equals:
        raise StudyError(f"--set {setting!r}: expected name=value, such as --set seed=1")
    head, dot, name = target.strip().rpartition(".")
    stems = [resolve_stem(head, declared)] if dot else list(chosen)
    takers = [stem for stem in stems if name in declared[stem]]
    value: Any = params.parse_text(declared[takers[0]][name], text.strip()) if takers else text
    _set_everywhere(name, value, declared, stems, given, f"--set {setting}")


def run(layout: Layout, jobs: Sequence[Job], profile: str, study_id: str = "") -> Study:
    """Run ``jobs`` one after the other, skipping those already done; stops at the first failure.

    Args:
        layout: the repository.
        jobs: what ``plan`` returned.
        profile: name of the profile, kept in state.json.
        study_id: continue or start this study; by default the newest unfinished study of the
            profile, else a new one.

    Returns:
        The study as it stands at the end; ``study.status`` is ``done``, ``failed`` or
        ``interrupted``. Never raises for what a notebook does.
    """
    study = open_study(layout.studies, profile, study_id)
    with _locked(study.folder):
        study.keep(job.stem for job in jobs)
        code = code_digest()
        for number, job in enumerate(jobs, start=1):
            label = f"[{number}/{len(jobs)}] {job.stem}"
            record = study.records.get(job.stem)
            if record and record.status == "done" and record.digest == job.digest:
                changed = "" if record.code == code else "; made with earlier package code"
                print(f"{label}: done before{changed}", flush=True)
                continue
            print(f"{label}: running", flush=True)
            record = launch(study, job.stem, job.source, job.parameters, job.digest, code)
            print(f"{label}: {describe(record)}", flush=True)
            if record.status != "done":
                break
        missing = [job for job in jobs if job.stem not in study.records]
        for job in missing:
            study.records[job.stem] = Record(digest=job.digest, parameters=job.parameters)
        study.save()
    return study


def open_study(studies: Path, profile: str, study_id: str = "") -> Study:
    """The study to work on: the one named, else the newest unfinished of the profile, else new."""
    if study_id:
        if study_id.startswith(".") or Path(study_id).name != study_id:
            raise StudyError(f"study id {study_id!r}: expected one folder name, such as default-1")
        if (studies / study_id / "state.json").exists():
            study = Study.load(studies / study_id)
            if study.profile != profile:
                raise StudyError(
                    f"study {study_id!r} has profile {study.profile!r}, not {profile!r}: "
                    "choose another id or that profile"
                )
            return study
    else:
        unfinished = [
            study
            for study in Study.load_all(studies)
            if study.profile == profile and study.status != "done"
        ]
        if unfinished:
            return unfinished[-1]
    created = time.strftime("%Y%m%d-%H%M%S")
    folder = studies / (study_id or f"{profile}-{created}")
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(folder=folder, profile=profile, created=created)
    study.save()
    return study


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(
                f"study {folder.name!r} is being run by another process: wait for it, or start "
                "a second one with --id another-name"
            ) from None
        yield


def describe(record: Record) -> str:
    """One line about how a notebook ended."""
    return f"{record.status} in {record.seconds:.0f} s" + (
        f": {record.error}" if record.error else ""
    )


def summary(layout: Layout, study: Study) -> str:
    """The table at the end of a study: notebook, status, seconds, executed notebook."""
    rows = [("notebook", "status", "seconds", "output")]
    for stem, record in sorted(study.records.items()):
        seconds = f"{record.seconds:.0f}" if record.seconds else "-"
        output = study.folder / f"{stem}.ipynb"
        rows.append((stem, record.status, seconds, layout.show(output) if output.exists() else "-"))
    total = sum(record.seconds for record in study.records.values())
    rows.append(("total", study.status, f"{total:.0f}", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines.insert(1, "-" * max(len(line) for line in lines))
    figures = study.folder / "figures"
    if any(figures.glob("*")):
        lines.append(f"Figures: {layout.show(figures)}/")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m rlkit study``; exit code 0 if every notebook is done."""
    parser = argparse.ArgumentParser(
        prog="rlkit study", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("notebooks", nargs="*", help="names or numbers; all by default")
    parser.add_argument("--profile", default="default", help=f"one of {', '.join(PROFILES)}")
    parser.add_argument("--id", default="", help="name of the study folder")
    parser.add_argument(
        "--set", action="append", default=[], metavar="[NN.]NAME=VALUE", help="a parameter"
    )
    parser.add_argument("--list", action="store_true", help="show parameters and stop")
    options = parser.parse_args(argv)
    layout = Layout.of_repository()
    try:
        jobs = plan(layout, options.profile, options.notebooks, options.set)
        if options.list:
            print(_listing(jobs))
            return 0
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        study = run(layout, jobs, options.profile, options.id)
    except (StudyError, params.ParameterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # between two notebooks
        print("stopped; the same command continues the study", file=sys.stderr)
        return 130
    print(summary(layout, study))
    if study.status == "done":
        print(f"Results: {layout.show(study.folder)}/  (to commit them: make publish)")
        return 0
    print(f"Broken study: {layout.show(study.folder)}/  (the same command continues it)")
    return 130 if study.status == "interrupted" else 1


def _listing(jobs: Sequence[Job]) -> str:
    lines = []
    for job in jobs:
        lines.append(job.stem)
        declared = params.read_parameters(nbformat.read(job.source, as_version=4))
        for name, parameter in declared.items():
            value = job.parameters.get(name, parameter.default)
            lines.append(f"  {name}: {parameter.type} = {value!r}  # {parameter.help}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
