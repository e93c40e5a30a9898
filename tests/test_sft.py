from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_model, tiny_config

from rlkit import models, runs, sft
from rlkit.config import ConfigError
from rlkit.engine import Engine, Sampling
from rlkit.sft import IGNORED, encode_documents, plan, plan_steps, train_sft
from rlkit.tokenizer import build_tokenizer

DOCUMENTS = [
    {
        "prompt": [{"role": "user", "content": f"Compute {a}+{b}."}],
        "completion": f"<think>{a}+{b}={a + b}\n</think>\\boxed{{{a + b}}}"
        if b % 2
        else str(a + b),
    }
    for a in (1, 2, 3)
    for b in range(7)
]


@pytest.fixture(autouse=True)
def runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("RLKIT_HEADLESS", "1")
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def config(model: Path, **params: Any) -> Any:
    return tiny_config(model, **{"reward": "accuracy", "allow_exploitable": False, **params})


def test_the_prompt_gets_no_loss_and_the_end_token_does() -> None:
    tokenizer = build_tokenizer()
    (example,) = encode_documents(DOCUMENTS[1:2], tokenizer, "question")
    ids, labels = example["input_ids"], example["labels"]
    start = next(i for i, label in enumerate(labels) if label != IGNORED)
    assert tokenizer.decode(ids[:start]) == "<|user|>Compute 1+1.<|assistant|>"
    assert labels[:start] == [IGNORED] * start
    assert tokenizer.decode(labels[start:]) == "<think>1+1=2\n</think>\\boxed{2}<|end|>"
    assert labels[-1] == tokenizer.eos_token_id
    assert labels[start:] == ids[start:]


def test_a_prefilled_start_is_not_learned_twice() -> None:
    tokenizer = build_tokenizer()
    (example,) = encode_documents(DOCUMENTS[1:2], tokenizer, "zero_short")
    text = tokenizer.decode(example["input_ids"])
    assert text.endswith("Assistant: <think>1+1=2\n</think>\\boxed{2}<|end|>")
    kept = [label for label in example["labels"] if label != IGNORED]
    assert tokenizer.decode(kept) == "1+1=2\n</think>\\boxed{2}<|end|>"


def test_every_document_is_used_in_every_epoch(model: Path) -> None:
    cfg = config(model, epochs=3, batch_size=16, micro_batch_size=4)
    lengths = [7 * i % 23 for i in range(21)]
    steps = plan(lengths, cfg)
    assert len(steps) == plan_steps(21, cfg) == 4
    assert {len(parts) for parts in steps} == {4}
    assert all(0 < len(part) <= 4 for parts in steps for part in parts)
    used = [i for parts in steps for part in parts for i in part]
    assert sorted(used) == sorted([*range(21)] * 3)
    for parts in steps:
        assert [lengths[i] for part in parts for i in part] == sorted(
            lengths[i] for part in parts for i in part
        )
    assert plan(lengths, cfg) == steps
    assert (
        plan(lengths, config(model, epochs=3, batch_size=16, micro_batch_size=4, seed=1)) != steps
    )


def test_fewer_documents_than_a_batch(model: Path) -> None:
    steps = plan([3, 1, 2], config(model, batch_size=16, micro_batch_size=2))
    assert steps == [[[1], [2], [0]]]


def test_loss_is_the_token_mean_over_the_whole_step(model: Path) -> None:
    """Exact against plain cross-entropy, although parts hold different numbers of tokens."""
    cfg = config(model, batch_size=32, rollouts=4, micro_batch_size=8, max_grad_norm=1e9)
    path = train_sft(cfg, documents=DOCUMENTS)
    policy, tokenizer = models.load_policy(cfg.model)
    total, tokens = torch.zeros(()), 0
    for example in encode_documents(DOCUMENTS, tokenizer, "question"):
        ids = torch.tensor([example["input_ids"]])
        labels = torch.tensor(example["labels"])
        logits = policy(ids).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits, labels[1:], ignore_index=IGNORED, reduction="sum"
        )
        tokens += int((labels[1:] != IGNORED).sum())
    loss = total / tokens
    loss.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in policy.parameters()))
    metrics = runs.read_metrics(path)
    assert metrics["loss"].tolist() == pytest.approx([loss.item()], abs=1e-5)
    assert metrics["grad_norm"].tolist() == pytest.approx([norm.item()], rel=1e-4)
    assert metrics["tokens"].tolist() == [tokens]
    assert metrics["completions"].tolist() == [len(DOCUMENTS)]


def test_a_run_learns_its_documents_and_is_recorded(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "documents.jsonl"
    file.write_text("\n".join(json.dumps(d) for d in DOCUMENTS[:1]))
    cfg = config(
        model, documents=str(file), epochs=100, batch_size=4, micro_batch_size=4,
        learning_rate=2e-2, lr_schedule="constant", warmup_steps=2,
    )  # fmt: skip
    path = train_sft(cfg)
    status = runs.read_status(path)
    assert (status.state, status.kind, status.step) == ("done", "sft", 25)
    metrics = runs.read_metrics(path)
    assert metrics["loss"].iloc[0] > 3
    assert metrics["loss"].iloc[-1] < 0.1
    policy, tokenizer = models.load_policy(config(runs.final_checkpoint(path)).model)
    prompt = sft.templates.encode(DOCUMENTS[:1], tokenizer, "question")
    engine = Engine(policy, tokenizer)
    (answers,) = engine.generate(prompt, Sampling(8, greedy=True), n=1, keys=[0])
    assert (answers[0].text, answers[0].stop) == ("1", "eos")
    assert train_sft(cfg) == path  # reused


def test_same_seed_same_weights(model: Path) -> None:
    cfg = config(model, epochs=2, micro_batch_size=4)
    weights = []
    for _ in range(2):
        path = train_sft(cfg, documents=DOCUMENTS, fresh=True)
        weights.append((runs.final_checkpoint(path) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_bad_documents_are_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="documents=''"):
        train_sft(config(model))
    with pytest.raises(ConfigError, match="no such file"):
        train_sft(config(model, documents=str(tmp_path / "none.jsonl")))
    (tmp_path / "broken.jsonl").write_text('{"prompt": []}\n{"pro')
    with pytest.raises(ConfigError, match="line 2: not JSON"):
        train_sft(config(model, documents=str(tmp_path / "broken.jsonl")))
    with pytest.raises(ConfigError, match="documents are empty"):
        train_sft(config(model), documents=[])
    with pytest.raises(ConfigError, match="document 0: prompt='x'"):
        train_sft(config(model), documents=[{"prompt": "x", "completion": "y"}])
    with pytest.raises(ConfigError, match="document 1: completion=''"):
        train_sft(config(model), documents=[DOCUMENTS[0], {**DOCUMENTS[0], "completion": ""}])
    long = {**DOCUMENTS[0], "completion": "1" * 300}
    with pytest.raises(ConfigError, match=r"document 1 has \d+ tokens, the model has 256"):
        train_sft(config(model), documents=[DOCUMENTS[0], long])
