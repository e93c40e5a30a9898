r"""Prompt templates: how a problem becomes token ids. ``encode`` is the only place that does it.

The templates play the roles that arXiv 2503.04548 gives its prompts; the wording is our own.
Chat templates need a tokenizer with a chat template. Plain ones render the text themselves, which
is what a base model without a chat template is prompted with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlkit.completion import THINK_OPEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

QUESTION_MARK = "{question}"


@dataclass(frozen=True)
class Template:
    """A prompt template.

    Attributes:
        name: the value of ``TaskConfig.template``.
        role: what the study uses it for.
        text: the prompt with ``{question}`` once; nothing else is substituted.
        prefill: start of the response that the prompt already holds; part of ``Completion.text``.
        plain: render ``text`` as is, without chat template and special tokens.
    """

    name: str
    role: str
    text: str = QUESTION_MARK
    prefill: str = ""
    plain: bool = False

    def __post_init__(self) -> None:
        if self.text.count(QUESTION_MARK) != 1:
            raise ValueError(f"Template {self.name!r}: text needs {QUESTION_MARK} exactly once")
        if self.prefill and not self.plain:
            raise ValueError(
                f"Template {self.name!r}: only plain templates have a prefill of their own; with a "
                "chat template it belongs to the tokenizer's generation prompt"
            )

    def messages(self, question: str) -> list[Message]:
        """The prompt of one question as messages: one user turn (plain: the text to render)."""
        # replace, not format: questions are full of braces.
        return [{"role": "user", "content": self.text.replace(QUESTION_MARK, question)}]


_ZERO_HEAD = (
    "The following is a dialogue of a User and an Assistant. The User poses a problem and the "
    "Assistant solves it. The Assistant works the problem out in its mind first and only then "
    "tells the User the answer. "
)
_ZERO_TAGS = (
    "The thinking stands between <think> and </think>, the answer after it between <answer> and "
    "</answer>, like this: <think> thinking </think> <answer> 12 </answer>."
)
_ZERO_TAIL = f"\n\nUser: {QUESTION_MARK}\nAssistant: {THINK_OPEN}"

TEMPLATES = {
    template.name: template
    for template in (
        Template("question", "the question alone; training and test of the 1.5B model"),
        Template(
            "boxed",
            "instruction to reason and box; costs the question-only model points",
            f"{QUESTION_MARK}\n\nThink it through step by step and give the final answer in "
            r"\boxed{}.",
        ),
        Template(
            "zero_short",
            "short plain-text prompt for RL from a base model",
            _ZERO_HEAD + _ZERO_TAGS + _ZERO_TAIL,
            prefill=THINK_OPEN,
            plain=True,
        ),
        Template(
            "zero_long",
            "detailed plain-text prompt for RL from a base model",
            _ZERO_HEAD
            + "The thinking may take all the room it needs: take the problem apart, write down "
            "what is known, collect ideas and try them, check each step, repair what is wrong, and "
            "go back to earlier steps when a path leads nowhere. It reads like a person talking to "
            'themselves, with turns such as "Hmm", "Wait", "Alternatively", "let me double check", '
            '"I wonder whether", "But" and "let me rethink this". '
            + _ZERO_TAGS
            + " Between <answer> and </answer> stands ONLY the final answer, without explanation."
            + _ZERO_TAIL,
            prefill=THINK_OPEN,
            plain=True,
        ),
        Template(
            "code",
            "tool prompt: run Python where a step calculates or verifies",
            "Solve the problem below in consecutive steps.\n\n"
            "Whenever a step calculates or verifies something, you MUST write a Python program "
            "that runs as it stands, between ```python and ```:\n```python\nprint(6 * 7)\n```\n"
            "What it prints follows between ```output and ```:\n```output\n42\n```\n"
            "Compare the output with what you expected. If they differ, find out why and resolve "
            "it before you go on. Print every value that matters, and think of edge cases. Give "
            r"the final answer in \boxed{}."
            f"\n\nQuestion: {QUESTION_MARK}",
        ),
    )
}


def get(template: str | Template) -> Template:
    """The template of that name. Raises ValueError with the known names."""
    if isinstance(template, Template):
        return template
    if template not in TEMPLATES:
        raise ValueError(f"template={template!r}: expected one of {', '.join(TEMPLATES)}")
    return TEMPLATES[template]


def encode(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: str | Template = "question",
) -> list[list[int]]:
    """Prompt token ids of problem rows, prefill included, without padding.

    Args:
        rows: problem rows; ``prompt`` is a list of messages that ends with the user's question.
        tokenizer: the policy's tokenizer.
        template: a name of ``TEMPLATES``, or a Template.

    Raises:
        ValueError: unknown template, a prompt that is no list of messages or does not end with a
            user turn, earlier turns under a plain template, no chat template where one is needed.
    """
    chosen = get(template)
    if not chosen.plain:
        _require_chat_template(tokenizer, chosen)
    prompts = []
    for row in rows:
        *earlier, question = _messages(row)
        messages = chosen.messages(question["content"])
        if chosen.plain:
            if earlier:
                raise ValueError(
                    f"Problem {row.get('problem_id')!r} has {len(earlier)} turns before its "
                    f"question; the plain template {chosen.name!r} holds one question only"
                )
            text = messages[0]["content"]
        else:
            text = _render(tokenizer, [*earlier, *messages])
        # The text holds its special tokens already; adding more would double the first one.
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts.append([int(i) for i in ids])
    return prompts


def prefill_text(template: str | Template, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """The start of every response that stands in the prompt already, ``""`` if there is none.

    A chat template may open the reasoning itself (R1-Distill's ends with ``<think>`` and a line
    break); give the tokenizer to have that counted.
    """
    chosen = get(template)
    if chosen.plain or tokenizer is None:
        return chosen.prefill
    _require_chat_template(tokenizer, chosen)
    rendered = _render(tokenizer, chosen.messages("1"))
    if not rendered.rstrip().endswith(THINK_OPEN):
        return ""
    return rendered[rendered.rindex(THINK_OPEN) :]


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return str(text)


def _require_chat_template(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    if tokenizer.chat_template is None:
        plain = [name for name, known in TEMPLATES.items() if known.plain]
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no chat template, which template="
            f"{template.name!r} needs. Add chat_template.jinja to that folder, take an instruct "
            f"model, or use a plain template ({', '.join(plain)})."
        )


def _messages(row: Mapping[str, Any]) -> list[Message]:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        raise ValueError(
            f"Problem {row.get('problem_id')!r}: prompt is a string, expected a list of messages "
            '[{"role": "user", "content": ...}]; a string would skip the chat template'
        )
    messages = [dict(message) for message in prompt]
    if not messages or messages[-1].get("role") != "user" or not messages[-1].get("content"):
        raise ValueError(
            f"Problem {row.get('problem_id')!r}: prompt must end with a user message that holds "
            f"the question, found {messages[-1:]}"
        )
    return messages
