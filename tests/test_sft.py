from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from tiny import save_tiny_model, tiny_config
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from rlkit import models, runs, sft, templates
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


CODE = "<think>```python\nprint(6*7)\n```\n"
OUTPUT = "```output\n42\n```\n"
REST = "</think>\\boxed{42}"
TOKENS = 6  # of OUTPUT
SPAN = [len(CODE), len(CODE + OUTPUT)]
TRACE = {**DOCUMENTS[0], "completion": CODE + OUTPUT + REST, "outputs": [SPAN]}


def learned(example: dict[str, list[int]], tokenizer: Any) -> str:
    """What the loss covers, as text; positions without loss show as a bar."""
    shown = ["|" if k == IGNORED else tokenizer.decode([k]) for k in example["labels"]]
    return "".join(shown)


def r1_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, two line breaks merged; the stock chat template of R1-Distill."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*letters, "\u010a\u010a"])}
    core = Tokenizer(token_models.BPE(vocab=vocab, merges=[("\u010a", "\u010a")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
        additional_special_tokens=["<｜User｜>", "<｜Assistant｜>"],
    )
    folder = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (folder / "deepseek_r1_distill.jinja").read_text(encoding="utf-8")
    return tokenizer


def test_a_tools_output_gets_no_loss_unless_it_is_asked_for() -> None:
    tokenizer = build_tokenizer()
    (masked,) = encode_documents([TRACE], tokenizer, "question")
    (whole,) = encode_documents([TRACE], tokenizer, "question", mask_output=False)
    assert masked["input_ids"] == whole["input_ids"]
    (prompt,) = templates.encode([TRACE], tokenizer, "question")
    before = "|" * len(prompt)
    assert learned(masked, tokenizer) == before + CODE + "|" * TOKENS + REST + "<|end|>"
    assert learned(whole, tokenizer) == before + CODE + OUTPUT + REST + "<|end|>"
    for row in (masked, whole):
        kept = [(i, k) for i, k in zip(row["input_ids"], row["labels"], strict=True) if k >= 0]
        assert all(i == k for i, k in kept)


def test_pieces_are_encoded_alone_and_special_tokens_in_outputs_are_text() -> None:
    tokenizer = r1_tokenizer()
    assert len(tokenizer("\n\n", add_special_tokens=False)["input_ids"]) == 1
    texts = ["a\n", "\n<｜User｜>é\n", "\n<｜User｜>"]
    row = {**DOCUMENTS[0], "completion": "".join(texts), "outputs": [[2, 2 + len(texts[1])]]}
    (example,) = encode_documents([row], tokenizer, "question")
    prompt = templates.encode([row], tokenizer, "question")[0]
    body = example["input_ids"][len(prompt) :]
    user = tokenizer.convert_tokens_to_ids("<｜User｜>")
    assert body.count(user) == 1 and body[-2:] == [user, tokenizer.eos_token_id]
    assert len(body) == 2 + len(texts[1].encode()) + 2 + 1, "no line breaks merged over a border"
    assert tokenizer.decode(body[:-1]) == "".join(texts)
    labels = example["labels"][len(prompt) :]
    assert [k == IGNORED for k in labels] == [False] * 2 + [True] * len(texts[1].encode()) + [
        False
    ] * 3


def test_outputs_may_touch_and_stand_at_the_ends() -> None:
    tokenizer = build_tokenizer()
    row = {**DOCUMENTS[0], "completion": "12345", "outputs": [[0, 2], [2, 3], [4, 5]]}
    (example,) = encode_documents([row], tokenizer, "question")
    assert learned(example, tokenizer).endswith("||||4|<|end|>")


def test_ranges_count_in_the_completion_as_given() -> None:
    """With or without the start that the template writes: the same example."""
    tokenizer = build_tokenizer()
    start, end = SPAN
    cut = len("<think>")
    without = {
        **TRACE,
        "completion": TRACE["completion"][cut:],
        "outputs": [[start - cut, end - cut]],
    }
    examples = encode_documents([TRACE, without], tokenizer, "zero_short")
    assert examples[0] == examples[1]
    assert (
        learned(examples[0], tokenizer).lstrip("|") == CODE[cut:] + "|" * TOKENS + REST + "<|end|>"
    )
    with pytest.raises(ConfigError, match=r"document 0: output range \[3, 9\) begins in '<think>'"):
        encode_documents([{**TRACE, "outputs": [[3, 9]]}], tokenizer, "zero_short")


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ("all", r"document 1: outputs='all', expected a list"),
        ([[1, 2, 3]], r"document 1: output range \[1, 2, 3\], expected two integers"),
        ([[1.0, 2]], r"document 1: output range \[1.0, 2\], expected two integers"),
        ([[True, 2]], r"expected two integers"),
        ([5], r"document 1: output range 5, expected two integers"),
        ([[-1, 2]], r"document 1: output range \[-1, 2\), expected 0 <= start < end <= 5"),
        ([[3, 6]], r"output range \[3, 6\), expected 0 <= start < end <= 5"),
        ([[2, 2]], r"output range \[2, 2\)"),
        ([[3, 2]], r"output range \[3, 2\)"),
        ([[2, 4], [3, 5]], r"output range \[3, 5\), expected 4 <= start < end <= 5"),
        ([[3, 4], [0, 1]], r"output range \[0, 1\), expected 4 <= start"),
    ],
)
def test_bad_ranges_are_named(model: Path, outputs: Any, message: str) -> None:
    bad = {**DOCUMENTS[0], "completion": "12345", "outputs": outputs}
    with pytest.raises(ConfigError, match=message):
        train_sft(config(model), documents=[TRACE, bad])
    with pytest.raises(ConfigError, match=message):
        encode_documents([TRACE, bad], build_tokenizer(), "question")


def test_reasoning_survives_a_chat_template_that_deletes_it() -> None:
    tokenizer = r1_tokenizer()
    completion = "<think>\nlong thought</think>\\boxed{1}"
    row = {**DOCUMENTS[0], "completion": completion, "outputs": [[8, 12]]}
    turn = [*row["prompt"], {"role": "assistant", "content": completion}]
    assert "long thought" not in tokenizer.apply_chat_template(turn, tokenize=False), "the trap"
    (example,) = encode_documents([row], tokenizer, "question")
    asked = f"{tokenizer.bos_token}<｜User｜>Compute 1+0.<｜Assistant｜>"
    assert tokenizer.decode(example["input_ids"]) == asked + completion + tokenizer.eos_token
    assert learned(example, tokenizer).lstrip("|") == (
        " thought</think>\\boxed{1}" + tokenizer.eos_token
    )


@pytest.mark.parametrize("mask", [True, False])
def test_outputs_reach_the_gradient_only_without_the_mask(model: Path, mask: bool) -> None:
    """At the positions that predict a tool's tokens, the loss has exactly no gradient."""
    policy, tokenizer = models.load_policy(config(model).model)
    (example,) = encode_documents([TRACE], tokenizer, "question", mask_output=mask)
    found = policy(torch.tensor([example["input_ids"]]), labels=torch.tensor([example["labels"]]))
    (gradient,) = torch.autograd.grad(found.loss, found.logits)
    (whole,) = encode_documents([TRACE], tokenizer, "question", mask_output=False)
    prompt = whole["labels"].count(IGNORED)
    start = prompt + len(tokenizer(CODE, add_special_tokens=False)["input_ids"])
    size = gradient[0].abs().sum(-1)
    outputs = torch.arange(start - 1, start - 1 + TOKENS)  # each predicts one
    others = torch.tensor([i for i in range(prompt - 1, len(size) - 1) if i not in outputs])
    assert bool((size[outputs] == 0).all()) is mask
    assert bool((size[outputs] > 0).all()) is not mask
    assert (size[others] > 0).all() and (size[: prompt - 1] == 0).all() and size[-1] == 0


def test_lines_are_read_whole_whatever_stands_in_them(tmp_path: Path) -> None:
    file = tmp_path / "documents.jsonl"
    rows = [{**TRACE, "completion": "a\u2028b\x85c"}, TRACE]
    file.write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    assert sft.read_documents(str(file)) == rows


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


@pytest.mark.parametrize("mask", [True, False])
def test_loss_is_the_token_mean_over_the_whole_step(model: Path, mask: bool) -> None:
    """Exact against plain cross-entropy, although parts hold different numbers of tokens."""
    cfg = config(
        model, batch_size=32, rollouts=4, micro_batch_size=8, max_grad_norm=1e9, mask_output=mask
    )
    documents = [*DOCUMENTS, TRACE, {**TRACE, "outputs": [[0, 7], [9, 15]]}]
    path = train_sft(cfg, documents=documents)
    policy, tokenizer = models.load_policy(cfg.model)
    total, tokens = torch.zeros(()), 0
    for example in encode_documents(documents, tokenizer, "question", mask_output=mask):
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
    assert metrics["completions"].tolist() == [len(documents)]


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
