from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import save_tiny_model

from rlkit.config import ModelConfig
from rlkit.models import PROBE, ModelError, fingerprint, load_policy
from rlkit.session import save_weights
from rlkit.tokenizer import build_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def test_model_and_tokenizer_agree(folder: Path) -> None:
    model, tokenizer = load_policy(ModelConfig(model=str(folder)))
    expected = build_tokenizer()
    assert tokenizer(PROBE)["input_ids"] == expected(PROBE)["input_ids"]
    assert tokenizer.decode(tokenizer(PROBE)["input_ids"]) == PROBE
    assert tokenizer.padding_side == "left"
    assert model.config.pad_token_id == tokenizer.pad_token_id == expected.pad_token_id
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training


def test_saved_weights_load_again(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_policy(ModelConfig(model=str(folder)))
    (tmp_path / "saved").mkdir()
    save_weights(model, tokenizer, tmp_path / "saved")
    again, other = load_policy(ModelConfig(model=str(tmp_path / "saved")))
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert other.chat_template == tokenizer.chat_template
    assert other(PROBE)["input_ids"] == tokenizer(PROBE)["input_ids"]


def test_the_fingerprint_holds_all_that_decides_what_is_sampled(folder: Path) -> None:
    config = ModelConfig(model=str(folder))
    before = fingerprint(config)
    (folder / "README.md").write_text("a card")
    assert fingerprint(config) == before
    for name in ("chat_template.jinja", "generation_config.json", "config.json", "tokenizer.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        assert fingerprint(config) != before, name
        (folder / name).write_bytes(content)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert fingerprint(config) != before
    weights.write_bytes(content)
    assert fingerprint(config) == before


def test_lora_is_saved_as_an_adapter_and_merged_when_loaded(folder: Path, tmp_path: Path) -> None:
    config = ModelConfig(model=str(folder), lora_rank=4)
    model, tokenizer = load_policy(config)
    assert isinstance(model, PeftModel)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in n for n in trained)
    assert not any("lm_head" in n for n in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    (tmp_path / "adapter").mkdir()
    save_weights(model, tokenizer, tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    merged, _ = load_policy(ModelConfig(model=str(tmp_path / "adapter")))
    assert not isinstance(merged, PeftModel)
    base, _ = load_policy(ModelConfig(model=str(folder)))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        want = model.eval()(ids).logits
        assert torch.allclose(merged(ids).logits, want, atol=1e-5)
        assert not torch.allclose(base(ids).logits, want, atol=1e-2)


@pytest.mark.parametrize(
    ("missing", "word"),
    [
        (["config.json"], "configuration"),
        (["model.safetensors"], "weights"),
        (["tokenizer.json", "tokenizer_config.json"], "tokenizer"),
    ],
)
def test_an_incomplete_folder_is_named(folder: Path, missing: list[str], word: str) -> None:
    for name in missing:
        (folder / name).unlink()
    with pytest.raises(ModelError, match=f"no {word}.*{missing[0]}"):
        load_policy(ModelConfig(model=str(folder)))


def test_a_folder_without_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"no chat template.*chat_template\.jinja"):
        load_policy(ModelConfig(model=str(folder)))
    _, tokenizer = load_policy(ModelConfig(model=str(folder)), chat_template=False)
    assert tokenizer.chat_template is None


def test_broken_files_are_reported(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_policy(ModelConfig(model=str(folder)))
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_policy(ModelConfig(model=str(folder)))


def test_an_unknown_name_is_reported() -> None:
    with pytest.raises(ModelError, match="model='no-such-model' is neither"):
        load_policy(ModelConfig(model="no-such-model"))


def test_a_tokenizer_that_changes_text_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["normalizer"] = {"type": "Replace", "pattern": {"String": "+"}, "content": "-"}
    path.write_text(json.dumps(data))
    with pytest.raises(ModelError, match="rewards would read"):
        load_policy(ModelConfig(model=str(folder)))


def test_a_tokenizer_larger_than_the_model_is_refused(folder: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(10)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="do not belong together"):
        load_policy(ModelConfig(model=str(folder)))
