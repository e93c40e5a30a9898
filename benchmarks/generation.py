"""Tokens per second of ``rlkit.engine`` and of ``transformers.generate``, in turn in one process.

    python benchmarks/generation.py --model tiny-base --task edge --prompts 8 --rollouts 16
    python benchmarks/generation.py --floor

Machines are shared and noisy, so only the ratio of neighbouring measurements is reported, with its
spread over the repeats. Both sample at temperature 1 with the same budget; tokens after a row's end
do not count. With ``--floor`` the engine is compared with this machine instead: with the time of
nothing but the matrix products of the same rollouts, of the same shapes and in the same order.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlkit.config import ModelConfig
from rlkit.decode import make_decoder
from rlkit.engine import Engine, Sampling, stable_key
from rlkit.models import load_policy
from rlkit.qwen2_decoder import Qwen2Decoder
from rlkit.tasks import load_problems
from rlkit.templates import encode


def main() -> None:
    """Run both in turn and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-base")
    parser.add_argument("--task", default="edge")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--budget", type=int, default=200, help="tokens per response")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--floor", action="store_true", help="compare with the bare products")
    arguments = parser.parse_args()

    model, tokenizer = load_policy(ModelConfig(model=arguments.model))
    model.eval()
    engine = Engine(model, tokenizer)
    rows = load_problems(arguments.task, "validation", arguments.prompts)
    prompts = encode(rows, tokenizer)
    longest = max(map(len, prompts))
    padded = [[tokenizer.pad_token_id] * (longest - len(p)) + p for p in prompts]
    ids = torch.tensor(padded).repeat_interleave(arguments.rollouts, dim=0)
    mask = (ids != tokenizer.pad_token_id).long()

    def ours(repeat: int) -> int:
        keys = [stable_key(repeat, "benchmark", 0, row["problem_id"]) for row in rows]
        groups = engine.generate(
            prompts, Sampling(arguments.budget), n=arguments.rollouts, keys=keys
        )
        return sum(len(c.token_ids) for group in groups for c in group)

    def theirs(repeat: int) -> int:
        torch.manual_seed(repeat)
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=arguments.budget,
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                pad_token_id=tokenizer.pad_token_id,
            )[:, longest:]
        ends = output == tokenizer.eos_token_id
        first = torch.where(ends.any(1), ends.int().argmax(1) + 1, output.shape[1])
        return int(first.sum())

    if arguments.floor:
        compare_with_floor(model, ours, arguments.repeats)
        return
    rates: dict[str, list[float]] = {"engine": [], "generate": []}
    ours(-1)
    theirs(-1)
    for repeat in range(arguments.repeats):
        for name, run in (("engine", ours), ("generate", theirs)):
            start = time.perf_counter()
            tokens = run(repeat)
            rates[name].append(tokens / (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(rates["engine"], rates["generate"], strict=True)]
    for name, values in rates.items():
        print(f"{name:9s} {statistics.median(values):10.0f} tokens/s (median)")
    report("ratio", ratios)


def report(name: str, ratios: list[float]) -> None:
    """Print a ratio and its spread."""
    print(
        f"{name:9s} {statistics.median(ratios):10.2f} (from {min(ratios):.2f} to {max(ratios):.2f} "
        f"over {len(ratios)} repeats, {torch.get_num_threads()} threads)"
    )


@dataclass(frozen=True)
class Pass:
    """One forward pass: ``length`` new tokens for each of ``rows``; ``slots`` cached in all."""

    rows: int
    length: int
    slots: int


class Recording(Qwen2Decoder):
    """Notes the shape of every forward pass."""

    passes: ClassVar[list[Pass]] = []

    def _forward(self, ids: Tensor, slots: Tensor, end: int) -> Tensor:
        self.passes.append(Pass(*ids.shape, end))
        return super()._forward(ids, slots, end)


def compare_with_floor(model: PreTrainedModel, ours: Callable[[int], int], repeats: int) -> None:
    """Print the engine's time as a multiple of that of its matrix products."""
    if not isinstance(make_decoder(model), Qwen2Decoder):
        raise SystemExit("--floor knows the shapes of plain Qwen2 models only")
    ratios, times = [], []
    ours(-1)
    for repeat in range(repeats):
        Recording.passes.clear()
        with mock.patch("rlkit.engine.make_decoder", Recording):
            ours(repeat)
        products = Products(model, Recording.passes)
        products.run()
        start = time.perf_counter()
        ours(repeat)
        middle = time.perf_counter()
        products.run()
        end = time.perf_counter()
        ratios.append((middle - start) / (end - middle))
        times.append(end - middle)
    passes = [p for p in Recording.passes if p.length == 1]
    mean = sum(p.rows for p in passes) / len(passes)
    print(f"floor     {1e3 * statistics.median(times) / len(passes):10.3f} ms per step (median)")
    print(f"steps     {len(passes):10d} in the last repeat, of {mean:.1f} rows on average")
    report("time/floor", ratios)


class Products:
    """The matrix products of some forward passes, and nothing else."""

    def __init__(self, model: PreTrainedModel, passes: list[Pass]) -> None:
        self.passes = list(passes)
        self.decoder = decoder = Qwen2Decoder(model, None)
        rows = max(p.rows for p in passes)
        slots = max(p.slots for p in passes)
        tokens = max(p.rows * p.length for p in passes)
        widest = max(weight.shape[0] for layer in decoder.layers for weight in layer)
        self.inputs = torch.randn(tokens, widest)
        shape = (len(decoder.layers), 2, rows * decoder.kv_heads, slots, decoder.head_dim)
        self.cache = torch.randn(shape)

    @torch.inference_mode()
    def run(self) -> None:
        """Multiply."""
        heads, kv_heads, size = self.decoder.heads, self.decoder.kv_heads, self.decoder.head_dim
        for p in self.passes:
            x = self.inputs[: p.rows * p.length]
            count = p.rows * kv_heads
            group = heads // kv_heads * p.length
            queries = self.inputs.view(-1)[: count * group * size].view(count, group, size)
            keys, values = self.cache[:, :, :count, : p.slots].unbind(1)
            for index, (qkv, _, out, gate_up, down) in enumerate(self.decoder.layers):
                torch.mm(x[:, : len(qkv)], qkv)
                weights = torch.bmm(queries, keys[index].transpose(1, 2))
                torch.bmm(weights, values[index])
                torch.mm(x[:, : len(out)], out)
                torch.mm(x[:, : len(gate_up)], gate_up)
                torch.mm(x[:, : len(down)], down)
            head = self.decoder.head
            torch.mm(x[: p.rows, : head.shape[1]], head.t())


if __name__ == "__main__":
    main()
