"""Problem rows from the Hugging Face hub, by name and revision, and from local files.

Splits are named by their role here, not as on the hub: AIME and MATH-500 can only be tested on,
whatever the hub calls their split. Where the hub has training problems, ``validation`` is a fixed
part of them, chosen by a hash of the question, so that equal questions never part.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rlkit.literals import canonical_number
from rlkit.rows import Row, load_file, validate_rows
from rlkit.verify import GoldError

__all__ = ["HUB", "HubSpec", "load_file", "load_hub", "resolved_revision", "validate_rows"]

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported

VALIDATION_SHARE = 32
"""One in this many training questions belongs to the validation split."""


def _same(value: Any) -> str:
    return str(value)


def _after_hashes(value: Any) -> str:
    """GSM8K's gold answer: what follows the last ``####`` of the worked solution."""
    _, mark, answer = str(value).rpartition("####")
    return answer if mark else ""


def _zero_question(value: Any) -> str:
    """The question of a prompt that is wrapped in an R1-Zero conversation, ``""`` if it is not."""
    text = str(value[0]["content"]) if value else ""
    _, user, rest = text.partition("User:")
    question, assistant, _ = rest.rpartition("Assistant:")
    return question if user and assistant else ""


def _ground_truth(value: Any) -> str:
    """The reward_model column in veRL's form; the authors' code takes the first of a list."""
    truth = value["ground_truth"]
    return str(truth[0] if isinstance(truth, list) else truth)


@dataclass(frozen=True)
class HubSpec:
    """Where a data set is, and which of its columns mean what.

    Column names are taken from ``source``; they are never guessed, a missing one is an error.
    """

    repo: str
    splits: Mapping[str, str]
    """Role (train, validation, test) to the split's name on the hub."""
    question: str
    answer: str
    answer_type: str
    source: str
    """Address where the split and column names were read."""
    id: str | None = None
    """Column with a stable id; None numbers the rows of the split."""
    config: str | None = None
    read_question: Callable[[Any], str] = _same
    read_answer: Callable[[Any], str] = _same


HUB = {
    "aime-2024": HubSpec(
        "HuggingFaceH4/aime_2024",
        {"test": "train"},
        question="problem",
        answer="answer",
        id="id",
        answer_type="integer",
        source="https://huggingface.co/datasets/HuggingFaceH4/aime_2024/blob/main/README.md",
    ),
    "aime-2025": HubSpec(
        "math-ai/aime25",
        {"test": "test"},
        question="problem",
        answer="answer",
        answer_type="integer",
        source="https://github.com/EleutherAI/lm-evaluation-harness/blob/"
        "14319236f159176579d3c6f985076975c0a87362/lm_eval/tasks/aime/aime25.yaml",
    ),
    "math-500": HubSpec(
        "HuggingFaceH4/MATH-500",
        {"test": "test"},
        question="problem",
        answer="answer",
        answer_type="expression",
        source="https://github.com/huggingface/lighteval/blob/"
        "01a0033c7d95f96afa4e83a6ee71cdcf057618bd/src/lighteval/tasks/tasks/math_500.py",
    ),
    "gsm8k": HubSpec(
        "openai/gsm8k",
        {"train": "train", "validation": "train", "test": "test"},
        config="main",
        question="question",
        answer="answer",
        answer_type="integer",
        read_answer=_after_hashes,
        source="https://github.com/EleutherAI/lm-evaluation-harness/blob/"
        "03919286402aa7d80b010d5b7551548b5e44b419/lm_eval/tasks/gsm8k/gsm8k.yaml",
    ),
    # The prompt column holds one user message: instruction, "User: <question>", "Assistant:". The
    # answer column is veRL's, read by the authors' own verl/workers/reward_manager/naive.py.
    "still-3-rl-90k": HubSpec(
        "RUC-AIBOX/STILL-3-RL-90K",
        {"train": "train", "validation": "train"},
        question="prompt",
        answer="reward_model",
        answer_type="expression",
        read_question=_zero_question,
        read_answer=_ground_truth,
        source="https://github.com/zwhe99/DeepMath/blob/"
        "0d97187a17b0e1b54ecef109c43a904b50c99506/tsne/tsne.py",
    ),
}


def load_hub(
    name: str,
    revision: str = "main",
    split: str | None = None,
    *,
    n: int | None = None,
    local: Path | str | None = None,
) -> list[Row]:
    """Problem rows of a data set of ``HUB``.

    Args:
        name: a key of ``HUB``.
        revision: branch, tag or commit; the commit it stands for is in each row's ``meta``.
        split: ``train``, ``validation`` or ``test``; None takes ``test`` if there is one.
        n: only the first n rows. Checking the gold answers takes about 5 ms per expression, so
            ask for what you need of a large set.
        local: a copy of the data set, a folder laid out as on the hub or one .parquet/.jsonl file.

    Raises:
        ValueError: unknown name or split, missing columns (those found are listed), an empty
            question, or a gold answer that cannot be parsed (the row is named).
    """
    spec = _spec(name)
    role = split or ("test" if "test" in spec.splits else "train")
    if role not in spec.splits:
        raise ValueError(
            f"split={role!r}: {name!r} has {', '.join(spec.splits)}. Benchmarks are for testing "
            "only; 'gsm8k' and 'still-3-rl-90k' have training problems."
        )
    commit = None if local is not None else resolved_revision(name, revision)
    data = _load(spec, spec.splits[role], commit or revision, local)
    found = list(data.column_names)
    wanted = [spec.question, spec.answer] + ([spec.id] if spec.id else [])
    missing = [column for column in wanted if column not in found]
    if missing:
        raise ValueError(
            f"{spec.repo} at revision {revision!r} has no column {', '.join(missing)}: found "
            f"{', '.join(found)}. Its layout has changed; pin an earlier revision."
        )
    rows: list[Row] = []
    for index, record in enumerate(data):
        if n is not None and len(rows) == n:
            break
        row = _row(name, spec, role, index, record, commit)
        if "validation" in spec.splits and role != "test":
            held_out = _is_validation(row["prompt"][0]["content"])
            if held_out != (role == "validation"):
                continue
        rows.append(row)
    return validate_rows(rows, f"{spec.repo} ({role})")


def resolved_revision(name: str, revision: str = "main") -> str | None:
    """The commit that ``revision`` stands for now, None if the hub cannot be reached.

    Raises:
        ValueError: unknown name, or the hub has no such repository or revision.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo = _spec(name).repo
    try:
        return HfApi().dataset_info(repo, revision=revision, timeout=30).sha
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(f"The hub has no data set {repo!r} at revision {revision!r}") from error
    except (httpx.TransportError, HfHubHTTPError, OfflineModeIsEnabled):
        return None


def _spec(name: str) -> HubSpec:
    if name not in HUB:
        raise ValueError(f"Data set {name!r} is unknown: expected one of {', '.join(HUB)}")
    return HUB[name]


def _load(spec: HubSpec, split: str, revision: str, local: Path | str | None) -> Any:
    from datasets import load_dataset

    if local is None:
        return load_dataset(spec.repo, spec.config, split=split, revision=revision)
    path = Path(local)
    if path.is_dir():
        return load_dataset(str(path), spec.config, split=split)
    if not path.is_file():
        raise FileNotFoundError(f"local={str(path)!r}: no such file or folder")
    kind = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}.get(path.suffix)
    if kind is None:
        raise ValueError(f"local={path.name!r}: expected a folder, a .parquet or a .jsonl file")
    return load_dataset(kind, data_files={split: str(path)}, split=split)


def _row(
    name: str, spec: HubSpec, role: str, index: int, record: Mapping[str, Any], commit: str | None
) -> Row:
    hub_split = spec.splits[role]
    problem_id = f"{name}/{hub_split}/{record[spec.id] if spec.id else index}"
    question = spec.read_question(record[spec.question]).strip()
    if not question:
        raise ValueError(
            f"{spec.repo}, {hub_split} row {index} ({problem_id}): no question in column "
            f"{spec.question!r}: {record[spec.question]!r}"
        )
    answer = spec.read_answer(record[spec.answer]).strip()
    if not answer:
        raise GoldError(
            f"{spec.repo}, {hub_split} row {index} ({problem_id}): no gold answer in column "
            f"{spec.answer!r}: {record[spec.answer]!r}"
        )
    meta = {"commit": commit, "repo": spec.repo, "row": index, "split": hub_split}
    return {
        "problem_id": problem_id,
        "prompt": [{"role": "user", "content": question}],
        "answer": canonical_number(answer) or answer,
        "answer_type": spec.answer_type,
        "source": spec.repo,
        "meta": json.dumps(meta, sort_keys=True),
    }


def _is_validation(question: str) -> bool:
    words = " ".join(question.split())
    digest = blake2b(words.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % VALIDATION_SHARE == 0
