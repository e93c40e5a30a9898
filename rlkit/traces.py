"""Responses with executed code as documents for fine-tuning, saved with where they came from.

Two ways to make them, both of arXiv 2503.04548, section 4.4. ``distil`` lets a policy answer with
the tool in the loop and keeps what ran code and was right. ``hints.hint`` puts code into thoughts
that were written without it. A document is a row of ``sft.train_sft``: ``prompt``, ``completion``,
and ``outputs``, the ranges of characters that a tool wrote.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlkit import environment, models, templates
from rlkit.checks import ConfigError
from rlkit.completion import Completion
from rlkit.config import ModelConfig
from rlkit.correct import all_correct
from rlkit.documents import Document, check_documents, encode_documents, read_documents
from rlkit.engine import Engine, Sampling, stable_key
from rlkit.rows import Row, validate_rows
from rlkit.runs import write_atomic
from rlkit.session import data_hash
from rlkit.tools import Tools, calling

Range = tuple[int, int]
FILTERS = {
    "with_code": ("few pieces", "code not closed", "too long", "infra", "no code"),
    "ran": ("no call ran",),
    "ended": ("not ended",),
    "right": ("wrong",),
    "distinct": ("repeated",),
    "kept": ("over per_problem",),
}
"""The filters in order: what is counted behind each, and why it discards. ``infra``: the machinery
failed. The first three reasons are those of ``hints.hint`` alone."""


@dataclass(frozen=True)
class TraceSet:
    """Documents and where they came from.

    Attributes:
        documents: rows for ``sft.train_sft``, with ``problem_id``, ``answer`` (gold), ``sample``,
            ``tokens``, ``calls``, ``failed_calls`` and, where a synthesiser wrote into the
            response, ``inserted`` (ranges like ``outputs``).
        provenance: model, prompts, sampling, tool, versions, and how many each filter left. No
            date and no timing: the same run gives the same files.
    """

    documents: tuple[Document, ...]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Draw:
    """A response that may become a document; ``inserted``: characters by a synthesiser."""

    problem: Row
    sample: int
    completion: Completion
    inserted: tuple[Range, ...] = ()


def document(row: Mapping[str, Any], completion: Completion, prefill: str = "") -> Document:
    """A completion as a document: its text without the prefill, and what a tool wrote of it.

    Without calls there is no key ``outputs``. A response that repeats the prefill keeps it, since
    ``encode_documents`` takes one away.

    Raises:
        ValueError: the text does not begin with ``prefill``.
    """
    text, outputs = completion.text, [call.characters for call in completion.tool_calls]
    cut = prefill_cut(completion, prefill)
    found: Document = {"prompt": row["prompt"], "completion": text[cut:]}
    if ranges := _shifted([each for each in outputs if each[0] < each[1]], cut):
        found["outputs"] = ranges
    return found


def prefill_cut(completion: Completion, prefill: str) -> int:
    """How many characters ``document`` takes from the start of a completion's text."""
    if not completion.text.startswith(prefill):
        raise ValueError(
            f"the text {completion.text[:40]!r} does not begin with prefill={prefill!r}: give the "
            "prefill that was given to Engine.generate"
        )
    repeated = bool(prefill) and completion.text.startswith(prefill, len(prefill))
    return 0 if repeated else len(prefill)


def distil(
    engine: Engine,
    problems: Sequence[Row],
    *,
    model: ModelConfig,
    template: str,
    tools: Tools | None,
    sampling: Sampling,
    n: int,
    seed: int,
    per_problem: int = 0,
) -> TraceSet:
    """Right responses with executed code: the study's distillation, from any policy.

    A response is kept if a call of it ran without an error, the policy ended it, and the answer is
    right. Of identical texts to a problem the first is kept.

    Args:
        engine: generates the responses.
        problems: problem rows (``tasks.load_problems``).
        model: what the engine holds; its name and the hash of its weights go into the provenance.
        template: prompt template.
        tools: of ``tools.open_tools``.
        sampling: how tokens are drawn; ``max_new_tokens`` counts output too.
        n: responses per problem.
        seed: of all draws.
        per_problem: documents per problem, at most; 0 for all.

    Raises:
        ValueError: no tool, problems that are no problem rows, or no response was kept.
        GoldError: a problem has no usable gold answer.
    """
    tools, rows = check_inputs(problems, tools, n, per_problem)
    prefill = templates.prefill_text(template, engine.tokenizer)
    with calling(tools, prefill) as loop:
        groups = engine.generate(
            templates.encode(rows, engine.tokenizer, template),
            sampling,
            n=n,
            keys=[stable_key(seed, "distil", 0, row["problem_id"]) for row in rows],
            prefill=prefill,
            tools=loop,
        )
    draws = [
        Draw(row, sample, completion)
        for row, group in zip(rows, groups, strict=True)
        for sample, completion in enumerate(group)
    ]
    how = {"method": "distil", "sampling": asdict(sampling), "n": n, "seed": seed}
    return assemble(
        draws, Counter(), how | {"per_problem": per_problem}, engine, rows, model, template, tools
    )


def check_inputs(
    problems: Sequence[Row], tools: Tools | None, n: int, per_problem: int
) -> tuple[Tools, list[Row]]:
    """The arguments of a synthesis, checked; see ``distil`` for the errors."""
    if tools is None:
        raise ValueError("tools=None: traces need a tool; open it with ToolConfig(tool='python')")
    if n < 1 or per_problem < 0:
        raise ValueError(f"n={n}, per_problem={per_problem}: expected n >= 1 and per_problem >= 0")
    return tools, validate_rows(problems)


def assemble(
    draws: Sequence[Draw],
    discarded: Counter[str],
    how: Mapping[str, Any],
    engine: Engine,
    problems: Sequence[Row],
    model: ModelConfig,
    template: str,
    tools: Tools,
) -> TraceSet:
    """Filter responses and describe what is left.

    Args:
        draws: what may be kept, in the order of problems.
        discarded: why responses were discarded before, by reason.
        how: what the method adds to the provenance; it holds ``per_problem``.

    Raises:
        ValueError: nothing is left; the text has the counts behind each filter.
    """
    drawn = len(draws) + discarded.total()
    kept, discarded = _select(draws, discarded, how["per_problem"])
    counts, left = {"drawn": drawn}, drawn
    for name, reasons in FILTERS.items():
        left -= sum(discarded[reason] for reason in reasons)
        counts[name] = left
    why = {r: discarded[r] for reasons in FILTERS.values() for r in reasons if discarded[r]}
    if not kept:
        raise ValueError(
            f"no trace was kept: {_listed(counts)}; discarded: {_listed(why) or 'nothing'}. Take a "
            "stronger model or easier problems, or raise n or max_new_tokens."
        )
    prefill = templates.prefill_text(template, engine.tokenizer)
    documents = tuple(_described(draw, prefill) for draw in kept)
    encoded = encode_documents(documents, engine.tokenizer, template)
    same = [
        tuple(e["input_ids"][-len(d.completion.token_ids) :]) == d.completion.token_ids
        for e, d in zip(encoded, kept, strict=True)
    ]
    provenance = {
        **how,
        "model": {
            "name": model.model,
            "fingerprint": models.fingerprint(model),
            "commit": models.hub_commit(engine.model),
        },
        "template": template,
        "prefill": prefill,
        "tools": asdict(tools.config),
        "limits": asdict(tools.executor.limits),
        "problems": {"count": len(problems), "hash": data_hash(problems)},
        "versions": {"rlkit": importlib.metadata.version("rlkit"), **environment.versions()},
        "counts": counts,
        "discarded": why,
        # A policy may spell a text in another way than its tokenizer, which encodes documents.
        "encoded_as_generated": sum(same),
    }
    # As it is read back: tuples become lists.
    return TraceSet(_plain(documents), json.loads(json.dumps(provenance)))


def _select(
    draws: Sequence[Draw], discarded: Counter[str], per_problem: int
) -> tuple[list[Draw], Counter[str]]:
    reasons = [_unusable(draw.completion) for draw in draws]
    usable = [draw for draw, reason in zip(draws, reasons, strict=True) if not reason]
    discarded = discarded + Counter(reason for reason in reasons if reason)
    right = all_correct([d.completion for d in usable], [d.problem for d in usable])
    kept: list[Draw] = []
    texts: set[tuple[str, str]] = set()
    number: Counter[str] = Counter()
    for draw, ok in zip(usable, right, strict=True):
        name = draw.problem["problem_id"]
        if not ok:
            discarded["wrong"] += 1
        elif (name, draw.completion.text) in texts:
            discarded["repeated"] += 1
        elif per_problem and number[name] == per_problem:
            discarded["over per_problem"] += 1
        else:
            number[name] += 1
            kept.append(draw)
        if ok:
            texts.add((name, draw.completion.text))
    return kept, discarded


def _unusable(completion: Completion) -> str:
    if completion.stop == "infra":
        return "infra"
    if not completion.tool_calls:
        return "no code"
    if not any(call.status == "ok" for call in completion.tool_calls):
        return "no call ran"
    return "" if completion.reached_end else "not ended"


def _described(draw: Draw, prefill: str) -> Document:
    completion = draw.completion
    statuses = [call.status for call in completion.tool_calls]
    found = document(draw.problem, completion, prefill)
    if draw.inserted:
        found["inserted"] = _shifted(draw.inserted, prefill_cut(completion, prefill))
    return found | {
        "problem_id": draw.problem["problem_id"],
        "answer": draw.problem["answer"],
        "sample": draw.sample,
        "tokens": len(completion.token_ids),
        "calls": len(statuses),
        "failed_calls": len(statuses) - statuses.count("ok"),
    }


def save(traces: TraceSet, path: Path | str) -> Path:
    """Write ``<path>.jsonl``, which ``TaskConfig.documents`` can name, and ``<path>.json``.

    The latter holds the provenance and the hash of the former.

    Returns:
        The JSONL file.

    Raises:
        ConfigError: ``path`` ends in .json or .jsonl, or the documents cannot be learned.
    """
    check_documents(traces.documents)
    data, note = _files(path)
    text = "".join(json.dumps(row) + "\n" for row in traces.documents)
    described = {**traces.provenance, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    data.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(data, text)
    write_atomic(note, json.dumps(described, indent=1, sort_keys=True) + "\n")
    return data


def load(path: Path | str) -> TraceSet:
    """Read what ``save`` wrote.

    Raises:
        ConfigError: a file is missing or broken, or the documents are not those that were saved.
    """
    data, note = _files(path)
    rows = read_documents(str(data))
    if not note.is_file():
        raise ConfigError(
            f"traces {str(path)!r}: no file {note.name} with the provenance. Copy both files, or "
            f"read {data.name} alone by documents.read_documents."
        )
    try:
        provenance = json.loads(note.read_text(encoding="utf-8"))
        saved = provenance.pop("sha256")
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"traces {str(path)!r}: {note.name} is no provenance with a sha256 ({error!r})"
        ) from error
    found = hashlib.sha256(data.read_bytes()).hexdigest()
    if found != saved:
        raise ConfigError(
            f"traces {str(path)!r}: {data.name} has sha256 {found[:16]}..., its provenance says "
            f"{str(saved)[:16]}...: the file was changed or cut. Restore it, or make the traces "
            "again."
        )
    check_documents(rows)
    return TraceSet(tuple(rows), provenance)


def _files(path: Path | str) -> tuple[Path, Path]:
    if str(path).endswith((".json", ".jsonl")):
        raise ConfigError(f"path={str(path)!r}: expected a path without .json or .jsonl")
    return Path(f"{path}.jsonl"), Path(f"{path}.json")


def _shifted(ranges: Sequence[Range], by: int) -> list[list[int]]:
    return [[start - by, end - by] for start, end in ranges]


def _plain(documents: Sequence[Document]) -> tuple[Document, ...]:
    return tuple(json.loads(json.dumps(row)) for row in documents)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
