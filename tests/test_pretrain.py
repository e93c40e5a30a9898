"""Building the embedded models: what carries loss, resume, refusals, the shipped files."""

import itertools
import json
import random

import pytest
import torch

from rlkit import gate, pretrain
from rlkit.config import ModelConfig
from rlkit.corpus import BASE, Document, Segment
from rlkit.gate import Check
from rlkit.models import load_policy
from rlkit.paths import data_dir
from rlkit.pretrain import IGNORE, Recipe, Stage, batches, chunk_pairs, encode_document, rate_at
from rlkit.tokenizer import build_tokenizer

SHIPPED = ("tiny-base", "tiny-sft", "tiny-padded", "tiny-tool")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_only_learned_segments_and_the_end_carry_loss(tokenizer) -> None:
    document = Document(
        "chain", "code", "Compute 1+2.", (Segment("12"), Segment("34", learn=False), Segment("5"))
    )
    ids, labels = encode_document(document, tokenizer)
    assert tokenizer.decode(ids) == "<|user|>Compute 1+2.<|assistant|>12345<|end|>"
    assert tokenizer.decode([i for i in labels if i != IGNORE]) == "125<|end|>"
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels, strict=True))


def test_batches_hold_every_document_once_within_the_budget(tokenizer) -> None:
    pairs = chunk_pairs(BASE, "x", tokenizer, 200)
    found = []
    for ids, labels in batches(pairs, 512, random.Random(0), tokenizer.pad_token_id):
        assert ids.shape == labels.shape
        assert ids.numel() <= 512 or len(ids) == 1
        for row, target in zip(ids.tolist(), labels.tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) + 1
            assert set(target[end:]) <= {IGNORE}
            found.append(row[:end])
    assert sorted(found) == sorted(ids for ids, _ in pairs)


def test_learning_rate_rises_then_falls_to_a_twentieth() -> None:
    rates = [rate_at(i / 100, 1.0) for i in range(101)]
    assert rates[0] == 0 and rates[2] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.05)
    assert all(a >= b for a, b in itertools.pairwise(rates[2:]))


def test_a_killed_build_resumes_to_the_same_weights(tmp_path, monkeypatch) -> None:
    recipe = Recipe("toy", (Stage(BASE, 2, 1e-3), Stage(BASE, 1, 1e-3, equal_tokens=True)))
    whole = pretrain.pretrain(recipe, tmp_path / "whole", chunk_documents=30)

    class Killed(Exception):
        pass

    real, calls = pretrain.chunk_pairs, []

    def dies_at_the_last_chunk(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(pretrain, "chunk_pairs", dies_at_the_last_chunk)
    with pytest.raises(Killed):
        pretrain.pretrain(recipe, tmp_path / "parts", chunk_documents=30)
    assert not (tmp_path / "parts").exists()
    parts = pretrain.pretrain(recipe, tmp_path / "parts", chunk_documents=30)
    assert len(calls) == 4  # chunks 0 and 1 were not drawn again
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (tmp_path / "parts.partial").exists()


def test_a_missing_start_model_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="pretrain tiny-base` first"):
        pretrain.pretrain(
            pretrain.RECIPES["tiny-sft"], tmp_path / "x", models_dir=tmp_path, chunk_documents=5
        )


def test_unknown_model_names_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        pretrain.main(["tiny-bass"])
    assert "tiny-base, tiny-sft, tiny-padded, tiny-tool" in capsys.readouterr().err


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_load_are_small_and_have_a_card(name) -> None:
    model, tokenizer = load_policy(ModelConfig(model=name))
    assert 200_000 <= sum(p.numel() for p in model.parameters()) <= 2_000_000
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert torch.isfinite(next(model.parameters())).all()
    text = "<think>19+14=33</think>\\boxed{33}"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    folder = data_dir() / "models" / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8_000_000
    card = (folder / "README.md").read_text()
    assert f"python -m rlkit pretrain {name}" in card and "seed" in card


@pytest.mark.parametrize("name", ["tiny-base", "tiny-sft", "tiny-tool"])
def test_recorded_gates_are_passed(name) -> None:
    checks = [
        Check(**row) for row in json.loads((data_dir() / "models" / name / "gate.json").read_text())
    ]
    assert checks and all(check.passed for check in checks), "\n".join(map(str, checks))


def test_shipped_base_passes_a_quick_gate(monkeypatch, tmp_path) -> None:
    """The gate's own code on the shipped weights, with few samples and bounds to match."""
    monkeypatch.setenv("RLKIT_RUNS", str(tmp_path))
    checks = {c.name: c for c in gate.check_base("tiny-base", problems=48, samples=16)}
    chain = checks["chain: accuracy when it reasons"]
    assert chain.passed
    assert checks["chain: share of samples that reason"].passed
    assert checks["edge: pass@1 with a forced <think>"].passed


def test_shipped_tool_model_gains_from_running_its_code(monkeypatch, tmp_path) -> None:
    """At least 40 points greedy on problems that no document holds, against both other modes."""
    monkeypatch.setenv("RLKIT_RUNS", str(tmp_path))
    checks = {c.name: c for c in gate.check_tool("tiny-tool", problems=32, samples=4)}
    for name in ("that minus no code", "that minus code not run", "share of calls that fail"):
        assert checks[f"large: {name}"].passed, checks[f"large: {name}"]


def test_gate_lines_say_pass_or_fail() -> None:
    assert str(Check("x", 0.5, low=0.4)).startswith("pass")
    assert str(Check("x", 0.5, high=0.4)).startswith("FAIL")
