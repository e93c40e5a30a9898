"""The embedded tokenizer: exact round trips, one token per digit, safe saving."""

import pytest

from rlkit.tokenizer import TAGS, WORDS, build_tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_every_printable_text_round_trips(tokenizer) -> None:
    ascii_text = "".join(map(chr, range(32, 127))) + "\n"
    for text in (ascii_text, " two  spaces ", "".join(TAGS), " ".join(WORDS), "checking Waiting"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_any_other_character_is_unknown_and_never_an_error(tokenizer) -> None:
    assert tokenizer("é😀\u0000٣")["input_ids"].count(tokenizer.unk_token_id) >= 4


def test_one_token_per_digit_and_per_tag(tokenizer) -> None:
    assert len(tokenizer("2048")["input_ids"]) == 4
    for token in (*TAGS, *WORDS):
        assert len(tokenizer(token)["input_ids"]) == 1
    assert len(tokenizer) <= 200


def test_tags_survive_decoding_without_special_tokens(tokenizer) -> None:
    ids = tokenizer("<think>1</think>2<|end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>1</think>2"


def test_saving_and_loading_changes_nothing(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    text = "<think>19+14=33\nWait check</think>\\boxed{33}<|end|>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    assert (again.eos_token_id, again.pad_token_id, again.padding_side) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        "left",
    )


def test_chat_template(tokenizer) -> None:
    messages = [{"role": "user", "content": "Compute 1+2."}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>Compute 1+2.<|assistant|>"
    whole = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": "3"}], tokenize=False
    )
    assert whole == prompt + "3<|end|>"
    with pytest.raises(Exception, match="not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)
