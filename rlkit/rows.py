"""Problem rows: their schema, and reading them from local files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlkit.verify import ANSWER_TYPES, GoldError, check_gold

Row = dict[str, Any]
COLUMNS = ("problem_id", "prompt", "answer", "answer_type", "source", "meta")


def load_file(path: Path | str) -> list[Row]:
    """Problem rows of a local .jsonl or .parquet file with the columns of ``COLUMNS``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another file type, a line that is no JSON object, or what ``validate_rows``
            refuses.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path.name}: expected a .jsonl or .parquet file of problem rows")
    if not path.is_file():
        raise FileNotFoundError(f"No problem file {str(path)!r}; give its path from the project")
    rows = _read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path)
    return validate_rows(rows, path.name)


def validate_rows(rows: Iterable[Mapping[str, Any]], where: str = "problems") -> list[Row]:
    """Check problem rows; returns them as plain dicts with only the columns of ``COLUMNS``.

    Raises:
        ValueError: no rows, missing columns, a wrong type, a prompt that is no list of messages
            ending with a user turn, meta that is no JSON object, or a problem_id used twice.
        GoldError: a gold answer that cannot be parsed.
    """
    checked: list[Row] = []
    seen: dict[str, int] = {}
    for number, row in enumerate(rows):
        at = f"{where}, row {number}"
        missing = [column for column in COLUMNS if column not in row]
        if missing:
            raise ValueError(
                f"{at}: no column {', '.join(missing)}; found {', '.join(map(str, row))}. A "
                f"problem row has {', '.join(COLUMNS)}."
            )
        clean = {column: row[column] for column in COLUMNS}
        for column in COLUMNS:
            if column != "prompt" and not isinstance(clean[column], str):
                raise ValueError(f"{at}: {column}={clean[column]!r}, expected a string")
        clean["prompt"] = _checked_prompt(clean["prompt"], at)
        _check_meta(clean["meta"], at)
        first = seen.setdefault(clean["problem_id"], number)
        if not clean["problem_id"] or first != number:
            raise ValueError(
                f"{at}: problem_id={clean['problem_id']!r} is "
                + (f"also that of row {first}" if clean["problem_id"] else "empty")
                + "; seeds and paired tests need one id per problem"
            )
        if clean["answer_type"] not in ANSWER_TYPES:
            raise ValueError(
                f"{at}: answer_type={clean['answer_type']!r}, expected {' or '.join(ANSWER_TYPES)}"
            )
        if not clean["answer"].strip():
            raise GoldError(f"{at}: problem {clean['problem_id']!r} has an empty gold answer")
        check_gold(clean["answer"], clean["answer_type"], clean["problem_id"])
        checked.append(clean)
    if not checked:
        raise ValueError(f"{where}: no rows; a run needs at least one problem")
    return checked


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}, line {number}: no valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path.name}, line {number}: expected a JSON object per line")
        rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path.name} is no readable Parquet file: {error}") from error
    return rows


def _checked_prompt(prompt: Any, at: str) -> list[dict[str, str]]:
    good = isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in prompt
    )
    if not good or not prompt or prompt[-1]["role"] != "user" or not prompt[-1]["content"].strip():
        raise ValueError(
            f"{at}: prompt={prompt!r}, expected a list of messages that ends with the user's "
            'question, [{"role": "user", "content": "..."}]'
        )
    return [{"role": m["role"], "content": m["content"]} for m in prompt]


def _check_meta(meta: str, at: str) -> None:
    try:
        value = json.loads(meta)
    except json.JSONDecodeError as error:
        raise ValueError(f"{at}: meta={meta!r} is no valid JSON; use '{{}}' for none") from error
    if not isinstance(value, dict):
        raise ValueError(f"{at}: meta={meta!r}, expected a JSON object; use '{{}}' for none")
