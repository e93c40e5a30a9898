"""Where ``rlkit.hints`` puts code into a thought, and what announces it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rlkit.completion import THINK_CLOSE, THINK_OPEN, Completion
from rlkit.streams import Sampling

OPEN = "```python\n"
"""What an inserted block begins with."""
CODE = Sampling(2000)
_ENDS = (THINK_CLOSE, "```", "~~~")


@dataclass(frozen=True)
class HintRules:
    """How code is put into thoughts; the defaults are the study's."""

    separators: tuple[str, ...] = (
        "Wait", "But", "Alternatively", "Hmm", "Moreover", "Furthermore",
    )  # fmt: skip
    """Texts before which a thought may be cut. Words count as whole words, in this case. For the
    embedded models, which reason line by line: ``("\\n",)``."""
    hints: tuple[str, ...] = (
        "A short program can settle this step.",
        "Let me check this with Python instead of trusting my arithmetic.",
        "Running some code here is safer than working it out by hand.",
        "Let me write a few lines of Python and look at what they print.",
        "Before I go on, I compute this exactly.",
    )
    """Sentences that announce code; one is drawn for each block. The study has 14."""
    min_pieces: int = 5
    """Pieces that a thought must have to be cut; >= 1."""
    blocks: tuple[int, int] = (0, 3)
    """Blocks to put into the responses to a problem, drawn from this range, ends included. Problems
    that draw 0 are dropped. A response gets fewer if what it goes on with has too few pieces."""
    max_rounds: int = 6
    """Rounds, >= 1. In each, every response that has blocks to come gets one more try."""
    code: Sampling = CODE
    """How code is drawn; a block that is not closed within its budget is dropped, and the next
    round tries another."""

    def __post_init__(self) -> None:
        for name in ("separators", "hints"):
            texts = getattr(self, name)
            if (
                not isinstance(texts, tuple)
                or not texts
                or not all(isinstance(text, str) and text for text in texts)
            ):
                raise ValueError(f"{name}={texts!r}: expected a tuple of non-empty strings")
        if bad := [hint for hint in self.hints if re.search("[`~]", hint)]:
            raise ValueError(f"hints={bad!r}: expected no ` or ~; the fence is put behind the hint")
        low, high = self.blocks
        if not 0 <= low <= high or high < 1:
            raise ValueError(f"blocks={self.blocks!r}: expected 0 <= low <= high, and high >= 1")
        for name in ("min_pieces", "max_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected an integer >= 1")


STUDY = HintRules()


def open_thought(completion: Completion, prefill: str = "") -> tuple[int, int]:
    """Where code may be put into a response: characters ``[start, end)`` of its text.

    Its thought, from ``<think>`` or the last output to ``</think>``, a fence of the policy's own,
    or the end of the text; an empty range if there is none.
    """
    text, calls = completion.text, completion.tool_calls
    if calls:
        start = calls[-1].characters[1]
        if THINK_CLOSE in text[:start]:
            return start, start
    else:
        opened = text.find(THINK_OPEN)
        if opened < 0:
            return 0, 0
        start = max(opened + len(THINK_OPEN), len(prefill))
    ends = [at for end in _ENDS if (at := text.find(end, start)) >= 0]
    return start, min(ends, default=len(text))


def cuts(text: str, separators: Sequence[str]) -> list[int]:
    """Places before separators, in order; a text with k of them has k + 1 pieces.

    None before the first text that is not blank, and none between two separators with nothing but
    blanks in between: no piece is blank.
    """
    words = "|".join(_pattern(separator) for separator in separators)
    found: list[int] = []
    for match in re.finditer(words, text):
        if text[found[-1] if found else 0 : match.start()].strip():
            found.append(match.start())
    return found[:-1] if found and not text[found[-1] :].strip() else found


def _pattern(separator: str) -> str:
    """The separator, not inside a longer word."""
    before = r"(?<!\w)" if re.match(r"\w", separator) else ""
    after = r"(?!\w)" if re.search(r"\w$", separator) else ""
    return before + re.escape(separator) + after
