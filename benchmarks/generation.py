"""Tokens per second of ``rlkit.engine`` and of ``transformers.generate``, in turn in one process.

    python benchmarks/generation.py --model tiny-base --task edge --prompts 8 --rollouts 16

Machines are shared and noisy, so only the ratio of neighbouring measurements is reported, with its
spread over the repeats. Both sample at temperature 1 with the same budget; tokens after a row's end
do not count.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from rlkit.config import ModelConfig
from rlkit.engine import Engine, Sampling, stable_key
from rlkit.models import load_policy
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
    print(
        f"ratio     {statistics.median(ratios):10.2f} (from {min(ratios):.2f} to {max(ratios):.2f} "
        f"over {arguments.repeats} repeats, {torch.get_num_threads()} threads)"
    )


if __name__ == "__main__":
    main()
