"""One sampled response as every later stage sees it: rewards, evaluation, logs and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlkit.extract import extract_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Stop = Literal["eos", "length", "calls", "infra"]
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class ToolCall:
    """One code execution inside a completion.

    ``span`` is the half-open token range ``[start, end)`` of the tool's output in ``token_ids``,
    ``characters`` the same in ``text``. Seconds are CPU and wall time of the child process.
    """

    code: str
    output: str
    status: str
    cpu_seconds: float
    wall_seconds: float
    span: tuple[int, int]
    characters: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Completion:
    """A response of the policy to one prompt.

    Attributes:
        text: decoded response without the trailing end or pad token, special tokens kept, with the
            template's prefill (for example ``<think>``) in front.
        reasoning: text before the last ``</think>`` (tags removed), ``""`` without reasoning. An
            unclosed ``<think>`` makes everything after it reasoning.
        final: text after the reasoning; answers are read only from here.
        answer: the extracted final answer, None if there is none.
        token_ids: ids written after the prompt, end token included; prefill and padding are not.
        loss_mask: 1 for a token written by the policy, 0 for tool output; same length as token_ids.
        stop: why it ended. ``eos``: end token written; ``length``: token budget used up; ``calls``:
            tool-call budget used up; ``infra``: the machinery failed, the row carries no reward.
        logprobs: log-probability of each sampled token under the sampling policy, None if unknown.
    """

    text: str
    reasoning: str
    final: str
    answer: str | None
    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    stop: Stop
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.loss_mask) != len(self.token_ids):
            raise ValueError(
                f"loss_mask has {len(self.loss_mask)} entries for {len(self.token_ids)} tokens; "
                "each token needs exactly one mask value"
            )
        if self.logprobs is not None and len(self.logprobs) != len(self.token_ids):
            raise ValueError(
                f"logprobs has {len(self.logprobs)} entries for {len(self.token_ids)} tokens"
            )

    @property
    def reached_end(self) -> bool:
        """True if the policy ended the response itself inside the token budget."""
        return self.stop == "eos"

    @property
    def own_text(self) -> str:
        """``text`` without what a tool wrote; a line break stands in its place."""
        pieces, at = list[str](), 0
        for start, end in (call.characters for call in self.tool_calls):
            if start < end:
                pieces.append(self.text[at:start])
                at = end
        return "\n".join([*pieces, self.text[at:]])

    @classmethod
    def from_ids(
        cls,
        token_ids: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop: Stop,
        prefill: str = "",
        end_ids: Sequence[int] = (),
        logprobs: Sequence[float] | None = None,
    ) -> Completion:
        """Build the view from sampled ids (no tool calls). ``end_ids``: ids that end a response."""
        ids = tuple(int(i) for i in token_ids)
        body = ids[:-1] if stop == "eos" and ids and ids[-1] in set(end_ids) else ids
        text = prefill + str(tokenizer.decode(list(body), skip_special_tokens=False))
        return cls.from_text(
            text, token_ids=ids, stop=stop, logprobs=None if logprobs is None else tuple(logprobs)
        )

    @classmethod
    def from_text(
        cls,
        text: str,
        *,
        token_ids: Sequence[int] = (),
        stop: Stop = "eos",
        logprobs: tuple[float, ...] | None = None,
    ) -> Completion:
        """Build the view from decoded text; used by the reward self-check and by tests."""
        reasoning, final = split_reasoning(text)
        ids = tuple(token_ids)
        return cls(
            text=text,
            reasoning=reasoning,
            final=final,
            answer=extract_answer(final),
            token_ids=ids,
            loss_mask=(1,) * len(ids),
            stop=stop,
            logprobs=logprobs,
        )


def split_reasoning(text: str) -> tuple[str, str]:
    """Split a response into (reasoning, final part).

    The final part starts after the last ``</think>``, so an answer quoted while thinking is never
    graded. A ``<think>`` that is never closed leaves no final part.
    """
    head, close, tail = text.rpartition(THINK_CLOSE)
    if close:
        return head.replace(THINK_OPEN, "", 1).strip(), tail.strip()
    before, opened, after = text.partition(THINK_OPEN)
    if opened:
        return after.strip(), ""
    return "", before.strip()
