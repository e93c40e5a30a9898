"""Prompt templates and their encoding, on the embedded tokenizer."""

import pytest

from rlkit.completion import Completion
from rlkit.rewards import zero_format
from rlkit.templates import TEMPLATES, Template, encode, get, prefill_text
from rlkit.tokenizer import build_tokenizer

QUESTION = r"Compute 19+14 for {x} and \boxed{}."


def row(question=QUESTION, **changes):
    return {"problem_id": "p", "prompt": [{"role": "user", "content": question}]} | changes


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def text_of(template, tokenizer, **changes):
    [ids] = encode([row(**changes)], tokenizer, template)
    return tokenizer.decode(ids)


def test_the_roles_of_the_study_are_there():
    assert list(TEMPLATES) == ["question", "boxed", "zero_short", "zero_long", "code"]
    assert {n for n, t in TEMPLATES.items() if t.plain} == {"zero_short", "zero_long"}
    assert all(t.role for t in TEMPLATES.values())


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_holds_the_question_once_and_unchanged(name, tokenizer):
    text = text_of(name, tokenizer)
    assert text.count(QUESTION) == 1
    [message] = TEMPLATES[name].messages(QUESTION)
    assert message["role"] == "user"
    assert text.count(message["content"]) == 1


def test_question_is_the_chat_template_and_nothing_else(tokenizer):
    assert text_of("question", tokenizer) == f"<|user|>{QUESTION}<|assistant|>"
    assert encode([row()], tokenizer) == encode([row()], tokenizer, TEMPLATES["question"])


def test_boxed_and_code_ask_for_a_box_in_a_user_turn(tokenizer):
    for name in ("boxed", "code"):
        text = text_of(name, tokenizer, question="Q")
        assert text.startswith("<|user|>")
        assert text.endswith("<|assistant|>")
        assert text.count(r"\boxed{}") == 1
    assert "```python\n" in text
    assert "```output\n" in text


@pytest.mark.parametrize("name", ["zero_short", "zero_long"])
def test_zero_templates_are_plain_text_with_a_prefilled_tag(name, tokenizer):
    text = text_of(name, tokenizer, question="Q")
    assert "<|" not in text
    assert text.endswith("\n\nUser: Q\nAssistant: <think>")
    assert "<answer> 12 </answer>" in text
    assert r"\boxed" not in text
    assert prefill_text(name) == prefill_text(name, tokenizer) == "<think>"
    written = " 12 </think> <answer> 12 </answer>"
    assert zero_format(Completion.from_text(prefill_text(name) + written))


def test_the_long_zero_template_is_the_longer_one():
    assert len(TEMPLATES["zero_long"].text) > 2 * len(TEMPLATES["zero_short"].text)


def test_plain_templates_need_no_chat_template_and_add_no_special_tokens(tokenizer):
    bare = build_tokenizer()
    bare.chat_template = None
    assert encode([row()], bare, "zero_short") == encode([row()], tokenizer, "zero_short")
    for name in ("question", "boxed", "code"):
        with pytest.raises(ValueError, match=r"no chat template.*zero_short, zero_long"):
            encode([row()], bare, name)
    with pytest.raises(ValueError, match="no chat template"):
        prefill_text("question", bare)


def test_a_missing_chat_template_names_the_folder(tmp_path):
    bare = build_tokenizer()
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "my-model")
    loaded = type(bare).from_pretrained(tmp_path / "my-model")
    with pytest.raises(ValueError, match="my-model"):
        encode([row()], loaded, "question")


def test_a_chat_template_that_opens_the_reasoning_is_a_prefill(tokenizer):
    assert prefill_text("question", tokenizer) == prefill_text("question") == ""
    opens = build_tokenizer()
    opens.chat_template = opens.chat_template.replace(
        "{% if add_generation_prompt %}<|assistant|>",
        "{% if add_generation_prompt %}<|assistant|><think>\n",
    )
    assert prefill_text("question", opens) == "<think>\n"
    assert text_of("question", opens).endswith("<think>\n")
    closes = build_tokenizer()
    closes.chat_template = opens.chat_template.replace("<think>\n", "<think>\n\n</think>\n\n")
    assert prefill_text("question", closes) == ""


def test_earlier_turns_stay_and_only_the_question_is_wrapped(tokenizer):
    turns = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": r"\boxed{2}"},
        {"role": "user", "content": "2+2"},
    ]
    text = text_of("boxed", tokenizer, prompt=turns)
    assert text.startswith(r"<|user|>1+1<|assistant|>\boxed{2}<|end|><|user|>2+2")
    with pytest.raises(ValueError, match="2 turns before its question"):
        encode([row(prompt=turns)], tokenizer, "zero_short")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("2+2", "prompt is a string"),
        ([], "must end with a user message"),
        ([{"role": "assistant", "content": "4"}], "must end with a user message"),
        ([{"role": "user", "content": ""}], "must end with a user message"),
    ],
)
def test_bad_prompts_name_the_problem(prompt, words, tokenizer):
    with pytest.raises(ValueError, match=f"'p'.*{words}"):
        encode([row(prompt=prompt)], tokenizer, "question")


def test_unknown_templates_list_the_known_ones(tokenizer):
    with pytest.raises(ValueError, match=r"'short'.*question, boxed, zero_short, zero_long, code"):
        encode([row()], tokenizer, "short")
    assert get(TEMPLATES["code"]) is TEMPLATES["code"]


def test_a_template_is_checked_when_it_is_made():
    with pytest.raises(ValueError, match="exactly once"):
        Template("mine", "role", "no question")
    with pytest.raises(ValueError, match="only plain templates"):
        Template("mine", "role", "{question}", prefill="<think>")


def test_encode_gives_one_list_of_ints_per_row(tokenizer):
    prompts = encode([row(), row("2")], tokenizer, "question")
    assert len(prompts) == 2
    assert all(type(i) is int for ids in prompts for i in ids)
    assert encode([], tokenizer, "question") == []
