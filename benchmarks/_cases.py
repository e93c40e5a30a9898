"""The command line that the benchmarks of a training step share, and what it stands for."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _clock import CLOCKS
from _script import skewed_lengths
from _stock import Model, Setup, Stock
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as hf_logging

from rlkit import environment, models, rewards, tasks, templates
from rlkit.config import resolve

SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2,
    },
    "1.5b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2,
    },
}  # fmt: skip
"""Sizes of Qwen2.5 models (their config.json); weights are drawn at random."""
VOCABULARY = 151_936
LEARN: dict[str, Any] = {"temperature": 1.4, "learning_rate": 4e-4, "max_completion_length": 100}
"""Of notebook 03 on chain: what a run to an accuracy uses unless told otherwise."""


def random_model(
    shape: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None
) -> Model:
    """A Qwen2 model with random weights that speaks the embedded tokenizer's ids.

    ``vocabulary``: tokens that it knows, ``VOCABULARY`` unless given.
    """
    torch.manual_seed(0)
    config = Qwen2Config(
        **shape,
        vocab_size=vocabulary or VOCABULARY,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config).eval(), tokenizer


def long_problems(
    task: str, count: int, tokenizer: PreTrainedTokenizerBase, tokens: int
) -> list[dict[str, Any]]:
    """Problems whose prompts have at least ``tokens`` tokens: questions in a row, told apart."""
    rows = tasks.load_problems(task, "train", count)
    found = []
    for number, row in enumerate(rows):
        text = ""
        for other in range(number, number + tokens):
            text += rows[other % count]["prompt"][-1]["content"] + "\n"
            made = {**row, "prompt": [{"role": "user", "content": text}]}
            if len(templates.encode([made], tokenizer)[0]) >= tokens:
                break
        found.append(made)
    return found


def build_setup(arguments: argparse.Namespace) -> Setup:
    """What the two sides share, from the command line."""
    if (arguments.device == "cuda") != torch.cuda.is_available():
        fix = "hide the GPU with CUDA_VISIBLE_DEVICES=" if torch.cuda.is_available() else "no GPU"
        raise SystemExit(f"--device {arguments.device} does not fit this machine: {fix}")
    chosen = dict(LEARN) if arguments.learn else {}
    given = {
        "temperature": arguments.temperature,
        "learning_rate": arguments.learning_rate,
        "max_completion_length": arguments.budget,
        "micro_batch_size": arguments.micro_batch,
    }
    chosen |= {name: value for name, value in given.items() if value is not None}
    config = resolve(
        "tiny",
        model=arguments.model,
        dtype=arguments.dtype,
        task=arguments.task,
        seed=arguments.seed,
        steps=arguments.steps + (0 if arguments.learn else 1),  # one to warm up
        batch_size=arguments.prompts * arguments.rollouts,
        rollouts=arguments.rollouts,
        **chosen,
    )
    # A coin where answers are all wrong: without unequal rewards no group would be trained on.
    coin = (arguments.reward or ("accuracy" if arguments.shape is None else "coin")) == "coin"
    paid = [("coin", rewards.random_reward, 1.0)] if coin else rewards.build(config.reward)
    if arguments.shape is None:
        problems = tasks.load_problems(config.task.task, "train", config.task.train_problems)
        return Setup(config, problems, partial(models.load_policy, config.model), paid)
    tokenizer = models.load_policy(config.model)[1]
    lengths = partial(
        skewed_lengths,
        rows=config.train.batch_size,
        mean=arguments.mean_length,
        longest=config.sampling.max_completion_length,
    )

    count = max(64, arguments.prompts)
    problems = long_problems(config.task.task, count, tokenizer, arguments.prompt_tokens)
    config = replace(config, task=replace(config.task, train_problems=count))
    make = partial(random_model, SHAPES[arguments.shape], tokenizer)
    return Setup(config, problems, make, paid, lengths)


def stock_candidates(setup: Setup, arguments: argparse.Namespace) -> list[Stock]:
    """The stock settings to choose from, or the one given as ``<micro-batch>:<dtype>``."""
    if arguments.stock != "auto":
        micro, _, dtype = arguments.stock.partition(":")
        return [Stock(int(micro), dtype == "bfloat16")]
    batch = setup.config.train.batch_size
    sizes = sorted({batch, max(1, batch // 4), max(1, batch // 8)}, reverse=True)
    return [Stock(size, bf16) for bf16 in (False, True) for size in sizes if batch % size == 0]


def print_table(rows: Sequence[tuple[str, ...]], head: tuple[str, ...], markdown: bool) -> None:
    """A table for the terminal, or as Markdown."""
    if markdown:
        lines = [head, tuple("---" if i == 0 else "---:" for i in range(len(head))), *rows]
        print("\n".join("| " + " | ".join(line) + " |" for line in lines))
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for line in (head, *rows):
        cells = [line[0].ljust(widths[0])]
        print("  ".join(cells + [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]))


def print_origin() -> None:
    """Date, versions, processor and command: what a table of numbers needs to be repeated."""
    found = environment.describe()
    names = ("torch", "transformers", "trl")
    versions = ", ".join(f"{name} {found['packages'][name]}" for name in names)
    commit = (found["git_commit"] or "unknown")[:7] + " with changes" * bool(found["git_dirty"])
    device = ", ".join(found["gpus"]) or f"{found['cpu']}, {found['torch_threads']} threads"
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    today = datetime.date.today().isoformat()
    print(f"{today}, {versions}, code {commit}, {device}.\n\n    {command}\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that the benchmarks of a training step share."""
    parser.add_argument("--model", default="tiny-base", help="a model of data/models or a folder")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    parser.add_argument("--task", default="chain")
    parser.add_argument(
        "--reward", choices=("accuracy", "coin"), help="default accuracy; with --shape a coin"
    )
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--budget", type=int, help="tokens per response; default of the profile")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--micro-batch", type=int, help="of our side; default of the profile")
    parser.add_argument("--stock", default="auto", help="auto, or for example 32:float32")
    parser.add_argument("--prompt-tokens", type=int, default=192, help="with --shape")
    parser.add_argument("--mean-length", type=float, default=16.0, help="with --shape")
    parser.add_argument("--steps", type=int, default=5, help="per block, after one to warm up")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, help="of torch; default all cores")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process")
    parser.add_argument("--markdown", action="store_true")
    parser.set_defaults(learn=False)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line and set up torch accordingly."""
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if argv is None:
        hf_logging.set_verbosity_error()
    return arguments
