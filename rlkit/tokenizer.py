"""The tokenizer of the embedded models: one token per character, plus tags and a few whole words.

Arithmetic is learned far sooner when each digit is one token. Tags, fences and words that the
analyses count (``Wait``, ``check``, ...) are single tokens too, so that rewards, prompts and tool
loops read the same text as with a real model.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

PAD, END, UNK = "<|pad|>", "<|end|>", "<|unk|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"

CONTROL = (PAD, END, UNK, USER, ASSISTANT)
TAGS = (
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "```python\n",
    "```output\n",
    "```",
    r"\boxed{",
)
WORDS = (
    "Compute", "Evaluate", "Calculate", "print(", "Wait", "verify", "check", "However", "reflect",
    "confirm", "correct", "revise", "adjust", "but", "alternatively", "double", "the", "answer",
    "is", "Error", "Traceback", "Timeout", "None", "True", "False", "import", "step", "Let", "so",
    "ok", "again", "User", "Assistant",
)  # fmt: skip

# No default system turn: every prompt token is paid for in each of thousands of rollouts.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}{{ raise_exception('The embedded chat template knows the roles user and assistant, "
    "not ' + message['role']) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make the embedded tokenizer. Every printable ASCII text round-trips; anything else is unk."""
    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    vocab = {token: i for i, token in enumerate((*CONTROL, *characters))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNK))
    core.decoder = decoders.Fuse()
    # Not special: skip_special_tokens must never delete <think> from a decoded response.
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in (*TAGS, *WORDS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNK,
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_tokenizer(folder: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer saved by ``build_tokenizer().save_pretrained``.

    Not through AutoTokenizer: for the model type qwen2 that class replaces any tokenizer by Qwen2's
    own and changes the tokens without a word (transformers 5.17, tokenization_auto.py).
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    probe = "<think>19+14=33\nWait</think>" + r"\boxed{33}"
    if tokenizer.decode(tokenizer(probe)["input_ids"]) != probe:
        raise ValueError(
            f"The tokenizer in {folder!r} does not return the text it was given. Save it with "
            "rlkit.tokenizer.build_tokenizer().save_pretrained(folder)."
        )
    return tokenizer
