"""Prompt/completion documents of supervised fine-tuning: read, checked, as ids with labels.

The chat template renders the prompt alone; the completion's text follows it as it is. R1-Distill's
template would delete all reasoning from an assistant turn (everything up to ``</think>``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlkit import templates
from rlkit.checks import ConfigError
from rlkit.tool_text import output_ids

Document = dict[str, Any]
IGNORED = -100
"""Label of a token without loss."""


def read_documents(path: str) -> list[Document]:
    """Read a JSONL file of documents. Raises ConfigError for a missing file or a broken line."""
    if not path:
        raise ConfigError(
            "documents='': expected a JSONL file with prompt and completion per line. Set "
            "documents, or pass documents=[...] to train_sft."
        )
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"documents={path!r}: no such file")
    rows = []
    # Not splitlines(): a tool's output may hold U+2028, at which it would cut a line in two.
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                at = f"documents={path!r}, line {number}"
                raise ConfigError(f"{at}: not JSON ({error})") from error
    return rows


def check_documents(rows: Sequence[Document]) -> None:
    """Raise ConfigError for no documents, or one without messages, a text, or usable outputs."""
    if not rows:
        raise ConfigError("the documents are empty; training needs at least one")
    for number, row in enumerate(rows):
        prompt, completion = row.get("prompt"), row.get("completion")
        if not isinstance(prompt, list) or not prompt:
            raise ConfigError(
                f"document {number}: prompt={prompt!r}, expected a list of messages "
                '[{"role": "user", "content": ...}]'
            )
        if not isinstance(completion, str) or not completion:
            raise ConfigError(f"document {number}: completion={completion!r}, expected a text")
        output_ranges(row, number)


def output_ranges(row: Document, number: int) -> list[tuple[int, int]]:
    """What a tool wrote in a document, as ranges of characters ``[start, end)``; [] for nothing.

    They count in ``completion`` as it is given: from its first character, whether or not it repeats
    the start of the response that the template has already written.

    Args:
        row: the document; ``outputs`` is optional.
        number: its number, for the error.

    Raises:
        ConfigError: no list of pairs; a range that is empty, outside the text, or not behind the
            one before it (they may touch).
    """
    outputs, size = row.get("outputs", []), len(row["completion"])
    if not isinstance(outputs, list):
        raise ConfigError(
            f"document {number}: outputs={outputs!r}, expected a list of ranges [[start, end], ...]"
        )
    found: list[tuple[int, int]] = []
    for each in outputs:
        pair = isinstance(each, list | tuple) and len(each) == 2
        if not pair or not all(type(at) is int for at in each):
            raise ConfigError(
                f"document {number}: output range {each!r}, expected two integers [start, end]"
            )
        start, end = each
        least = found[-1][1] if found else 0
        if not least <= start < end <= size:
            raise ConfigError(
                f"document {number}: output range [{start}, {end}), expected {least} <= start < end"
                f" <= {size}: inside the completion, in order, not empty and without overlap. "
                "Count characters, not tokens or bytes."
            )
        found.append((start, end))
    return found


def encode_documents(
    rows: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    *,
    mask_output: bool = True,
) -> list[dict[str, list[int]]]:
    """``input_ids`` and ``labels`` of each document: prompt, completion, end token.

    Labels are ``IGNORED`` on the prompt and, with ``mask_output``, on what a tool wrote. Outputs
    and the texts between them are encoded piece by piece, as generation put them together: ids of
    the whole text would differ where a piece begins. (Where a policy spelled a text in another way
    than its tokenizer does, the ids are the tokenizer's.)

    A completion that repeats the start of the response which the template has already written
    (``<think>``) loses it, as the policy never writes it; ``outputs`` shift by as much.

    Raises:
        ConfigError: see ``output_ranges``; an output that begins in what is lost.
    """
    prompts = templates.encode(rows, tokenizer, template)
    shown = templates.prefill_text(template, tokenizer)
    end = int(tokenizer.eos_token_id)
    examples = []
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        ids, labels = list(prompt), [IGNORED] * len(prompt)
        for text, output in _pieces(row, number, shown):
            if output:
                new = list(output_ids(text, tokenizer))
            else:
                new = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += new
            labels += [IGNORED] * len(new) if output and mask_output else new
        examples.append({"input_ids": [*ids, end], "labels": [*labels, end]})
    return examples


def _pieces(row: Document, number: int, shown: str) -> list[tuple[str, bool]]:
    """The completion without ``shown`` in pieces: text, and whether a tool wrote it."""
    text, ranges = row["completion"], output_ranges(row, number)
    at = len(shown) if text.startswith(shown) else 0
    if ranges and ranges[0][0] < at:
        start, end = ranges[0]
        raise ConfigError(
            f"document {number}: output range [{start}, {end}) begins in {shown!r}, which the "
            f"template writes itself; expected {at} <= start"
        )
    pieces = []
    for start, end in ranges:
        pieces += [(text[at:start], False), (text[start:end], True)]
        at = end
    return [(piece, output) for piece, output in [*pieces, (text[at:], False)] if piece]
