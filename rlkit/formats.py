"""Format rules: whether a response has the form that a run asks for, right or wrong."""

from __future__ import annotations

from typing import Literal

from rlkit.completion import THINK_CLOSE, THINK_OPEN, Completion
from rlkit.extract import boxes

FormatName = Literal["boxed", "zero", "none"]

_TAGS = (THINK_OPEN, THINK_CLOSE, "<answer>", "</answer>")
_END_TOKENS = ("<|endoftext|>", "<|im_end|>")


def boxed_format(completion: Completion) -> bool:
    r"""The embedded models' form.

    At most one ``<think>...</think>``, at the start and closed if present; exactly one, non-empty
    ``\boxed{}`` after it; end reached. A direct boxed answer is well formed.
    """
    text = completion.text.strip()
    opened, closed = text.count(THINK_OPEN), text.count(THINK_CLOSE)
    if not completion.reached_end or opened != closed or opened > 1:
        return False
    if opened and not text.startswith(THINK_OPEN):
        return False
    final = text.rpartition(THINK_CLOSE)[2]
    return final.count(r"\boxed") == 1 and any(boxes(final))


def zero_format(completion: Completion) -> bool:
    """The five conditions of the study's Zero runs (arXiv 2503.04548, released ``STILLZero``).

    The response, prefill included, (1) starts with ``<think>``; (2) ends with ``</answer>``, end
    tokens and space aside; (3) holds each of the four tags exactly once, in order; (4) has
    non-empty reasoning and answer; (5) has only space between ``</think>`` and ``<answer>``.
    """
    text = _without_end(completion.text).lstrip()
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    starts = [text.index(tag) for tag in _TAGS]
    if starts != sorted(starts) or starts[0] != 0 or not text.endswith(_TAGS[3]):
        return False
    ends = [start + len(tag) for start, tag in zip(starts, _TAGS, strict=True)]
    reasoning, gap, answer = (
        text[end:start] for end, start in zip(ends[:3], starts[1:], strict=True)
    )
    return bool(reasoning.strip()) and not gap.strip() and bool(answer.strip())


def _without_end(text: str) -> str:
    """``text`` without the end tokens and space behind it; linear time, whatever the text."""
    end = len(text)
    while True:
        while end and text[end - 1].isspace():
            end -= 1
        token = next((t for t in _END_TOKENS if text.endswith(t, 0, end)), None)
        if token is None:
            return text[:end]
        end -= len(token)


def well_formed(completion: Completion, format: FormatName) -> bool:
    """Whether ``completion`` obeys the named format rule; ``none`` accepts everything."""
    if format == "boxed":
        return boxed_format(completion)
    return format == "none" or zero_format(completion)
