"""Train the embedded models from scratch: ``python -m rlkit pretrain``.

Two stages of one run, since the final mixture alone never teaches the model to keep its place in a
long question (measured: after 10 million tokens it knew every sum and still copied wrong numbers):
first almost only line-by-line reasoning on many short chains, then the mixture that the base model
imitates.
The SFT and tool models continue from the base model.

Everything is a function of the seed: chunk i of documents is drawn from (seed, stage, i), so a
killed run resumes at its last chunk.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from rlkit import gate
from rlkit.cards import card
from rlkit.corpus import (
    BASE,
    CURRICULUM,
    PADDED,
    PADDING,
    SFT,
    TOOL,
    Document,
    Mixture,
    draw_document,
)
from rlkit.paths import data_dir, runs_dir
from rlkit.tasks import held_out_expressions
from rlkit.tokenizer import build_tokenizer, load_tokenizer

IGNORE = -100
CHUNK_DOCUMENTS = 10_000


@dataclass(frozen=True)
class Stage:
    """One stretch of training on one mixture, with a learning-rate cycle of its own."""

    mixture: Mixture
    chunks: int
    """Chunks of CHUNK_DOCUMENTS documents."""
    peak_rate: float
    """AdamW rate after warm-up, decayed by a cosine to 5 % of it at the stage's end."""
    equal_tokens: bool = False
    """Weigh every learned token the same. Otherwise every batch weighs the same, and since a batch
    holds documents of like length, tokens of short documents count more: with that the model
    answers at once more often than its corpus does."""


@dataclass(frozen=True)
class Recipe:
    """How one shipped model is made."""

    name: str
    stages: tuple[Stage, ...]
    start: str = ""
    """Model to continue from; empty starts from random weights."""
    batch_tokens: int = 2048
    """Tokens of one update, padding included."""


RECIPES = {
    "tiny-base": Recipe(
        "tiny-base",
        (
            Stage(CURRICULUM, 26, 1.5e-3),
            Stage(BASE, 7, 2.5e-4, equal_tokens=True),
        ),
    ),
    "tiny-sft": Recipe("tiny-sft", (Stage(SFT, 2, 2.5e-4, equal_tokens=True),), start="tiny-base"),
    "tiny-padded": Recipe(
        "tiny-padded",
        (
            Stage(PADDING, 1, 5e-4, equal_tokens=True),
            Stage(PADDED, 2, 2.5e-4, equal_tokens=True),
        ),
        start="tiny-sft",
    ),
    "tiny-tool": Recipe("tiny-tool", (Stage(TOOL, 6, 8e-4, equal_tokens=True),), start="tiny-base"),
}


def new_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen2ForCausalLM:
    """The embedded architecture: 0.66M parameters, every part of Qwen2 at a small size."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def encode_document(
    document: Document, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """(token ids, labels): the prompt and unlearned segments carry no loss."""
    message = [{"role": "user", "content": document.question}]
    prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = list(tokenizer(prompt)["input_ids"])
    labels = [IGNORE] * len(ids)
    for segment in document.response:
        piece = tokenizer(segment.text)["input_ids"]
        ids += piece
        labels += piece if segment.learn else [IGNORE] * len(piece)
    assert isinstance(tokenizer.eos_token_id, int)
    return [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]


def batches(
    pairs: list[tuple[list[int], list[int]]], batch_tokens: int, rng: random.Random, pad: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Right-padded (ids, labels) [rows, length], documents of like length together, shuffled."""
    # No attention mask is needed: padding is on the right, attention causal, labels ignored there.
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]), rng.random()))
    groups: list[list[int]] = [[]]
    for i in order:
        if (len(groups[-1]) + 1) * len(pairs[i][0]) > batch_tokens:
            groups.append([])
        groups[-1].append(i)
    rng.shuffle(groups)
    for group in groups:
        longest = max(len(pairs[i][0]) for i in group)
        ids = torch.full((len(group), longest), pad)
        labels = torch.full((len(group), longest), IGNORE)
        for row, i in enumerate(group):
            ids[row, : len(pairs[i][0])] = torch.tensor(pairs[i][0])
            labels[row, : len(pairs[i][1])] = torch.tensor(pairs[i][1])
        yield ids, labels


def chunk_pairs(
    mixture: Mixture, seed: str, tokenizer: PreTrainedTokenizerBase, documents: int
) -> list[tuple[list[int], list[int]]]:
    """Encoded documents of one chunk; a pure function of its arguments."""
    rng = random.Random(seed)
    held_out = held_out_expressions()
    return [
        encode_document(draw_document(rng, mixture, held_out), tokenizer) for _ in range(documents)
    ]


def rate_at(progress: float, peak: float) -> float:
    """Learning rate at ``progress`` in [0, 1]: 2 % warm-up, then cosine to 5 % of the peak."""
    if progress < 0.02:
        return peak * progress / 0.02
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (progress - 0.02) / 0.98)))


def pretrain(
    recipe: Recipe,
    output: Path,
    *,
    seed: int = 0,
    chunk_documents: int = CHUNK_DOCUMENTS,
    models_dir: Path | None = None,
) -> Path:
    """Train one model into ``output``; resumes from ``<output>.partial`` if that exists.

    Args:
        recipe: what to train; ``recipe.start`` is looked up in ``models_dir`` (data/models).
        output: folder for weights, config and tokenizer; replaced only when training is complete.
        seed: seed of weights and documents.
        chunk_documents: documents per chunk; smaller only in tests.
    """
    models = models_dir or data_dir() / "models"
    if recipe.start:
        if not (models / recipe.start).is_dir():
            raise FileNotFoundError(
                f"{recipe.name} continues from {recipe.start!r}, which is not in {models}; "
                f"run `python -m rlkit pretrain {recipe.start}` first"
            )
        tokenizer: PreTrainedTokenizerBase = load_tokenizer(str(models / recipe.start))
        model = Qwen2ForCausalLM.from_pretrained(models / recipe.start, dtype=torch.float32)
    else:
        tokenizer = build_tokenizer()
        model = new_model(tokenizer, seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    partial = output.with_name(output.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    state_file = partial / "state.pt"
    identity = json.dumps([asdict(recipe), seed, chunk_documents], sort_keys=True)
    done = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if state["identity"] == identity:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            done = state["chunk"]
    chunks = [(s, i) for s, stage in enumerate(recipe.stages) for i in range(stage.chunks)]
    assert isinstance(tokenizer.pad_token_id, int)
    model.train()
    bar = tqdm(total=len(chunks), initial=done, desc=recipe.name, unit="chunk")
    for at in range(done, len(chunks)):
        stage, index = chunks[at]
        name = f"{recipe.name}/{seed}/{stage}/{index}"
        pairs = chunk_pairs(recipe.stages[stage].mixture, name, tokenizer, chunk_documents)
        groups = list(
            batches(pairs, recipe.batch_tokens, random.Random(name), tokenizer.pad_token_id)
        )
        learned = sum(int((labels != IGNORE).sum()) for _, labels in groups)
        learned_per_batch = learned / len(groups)
        losses = []
        for step, (ids, labels) in enumerate(groups):
            progress = (index + step / len(groups)) / recipe.stages[stage].chunks
            for group in optimizer.param_groups:
                group["lr"] = rate_at(progress, recipe.stages[stage].peak_rate)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE
            )
            weight = 1.0
            if recipe.stages[stage].equal_tokens:
                weight = int((labels != IGNORE).sum()) / learned_per_batch
            (loss * weight).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        bar.set_postfix(loss=f"{sum(losses) / len(losses):.3f}")
        bar.update()
        state = {
            "identity": identity,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "chunk": at + 1,
        }
        torch.save(state, state_file.with_suffix(".tmp"))
        state_file.with_suffix(".tmp").replace(state_file)
    bar.close()
    save_model(model, tokenizer, output)
    shutil.rmtree(partial)
    return output


def save_model(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Write weights, generation config and tokenizer aside, then move them into place."""
    aside = output.with_name(output.name + ".new")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    if output.exists():
        shutil.rmtree(output)
    aside.rename(output)


def main(argv: list[str] | None = None) -> int:
    """Command line: rebuild the named models (default: all, in order), then print the gate."""
    parser = argparse.ArgumentParser(prog="rlkit pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"of {', '.join(RECIPES)}; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=runs_dir() / "pretrain", help="folder")
    arguments = parser.parse_args(argv)
    names = arguments.models or list(RECIPES)
    unknown = sorted(set(names) - set(RECIPES))
    if unknown:
        parser.error(f"unknown models {unknown}: expected some of {', '.join(RECIPES)}")
    for name in names:
        start = RECIPES[name].start
        built = (arguments.output / start).is_dir() if start else False
        pretrain(
            RECIPES[name],
            arguments.output / name,
            seed=arguments.seed,
            models_dir=arguments.output if built else None,
        )
        describe(RECIPES[name], arguments.output / name, arguments.seed)
    return 0


def describe(recipe: Recipe, folder: Path, seed: int) -> None:
    """Measure the entry gate of a model just built, print it, keep it and write the card."""
    checks = gate.CHECKS[recipe.name](str(folder)) if recipe.name in gate.CHECKS else []
    if checks:
        gate.write(checks, folder)
        print("\n".join([f"{recipe.name}: entry gate on validation problems", *map(str, checks)]))
    model = Qwen2ForCausalLM.from_pretrained(folder)
    text = card(
        recipe,
        seed=seed,
        documents=CHUNK_DOCUMENTS,
        parameters=model.num_parameters(),
        gate=checks,
    )
    (folder / "README.md").write_text(text)
