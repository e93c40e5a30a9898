"""Makes rollouts again in other batches and counts those that come out different.

    python benchmarks/regenerate.py --model tiny-base --rollouts 10000
    python benchmarks/regenerate.py --run NAME

A rollout depends on (seed, purpose, step, problem, sample, place) alone, so it can be made again by
itself. Only the last digits of the probabilities depend on the shape of the batch. They change a
token where the uniform draw falls that close to the border between two tokens; for each rollout
that differs, the distance at its first differing token is printed.

The rollouts are drawn as training draws them (groups of ``--group`` samples, ``--max-rows`` rows at
a time), then again alone, in random batches of 7, and in random batches of 128. With ``--run`` they
are those that a training run logged at its first step, whose policy is the run's start model, and
the logged text is what is compared with. A run made on another machine, with other versions or
threads may differ for that reason too.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from rlkit import runs
from rlkit.arguments import sampling as sampling_of
from rlkit.config import ModelConfig
from rlkit.engine import Engine, Sampling, row_streams, stable_key, uniforms
from rlkit.models import load_policy
from rlkit.tasks import load_problems
from rlkit.templates import encode, prefill_text


@dataclass(frozen=True)
class Rollout:
    """One response and what it takes to make it again."""

    prompt: tuple[int, ...]
    key: int
    sample: int
    text: str
    token_ids: tuple[int, ...] | None
    """None where only the text was logged."""


@dataclass(frozen=True)
class Difference:
    """A rollout that came out different."""

    rollout: Rollout
    place: int | None
    """Index of its first differing token, None where the tokens are not known."""
    margin: float | None
    """Distance there between the uniform draw and the border of the two tokens' intervals."""


def main() -> None:
    """Regenerate and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-base")
    parser.add_argument("--task", nargs="+", default=["chain", "edge"])
    parser.add_argument("--run", help="a run whose first step is made again")
    parser.add_argument("--rollouts", type=int, default=10_000)
    parser.add_argument("--group", type=int, default=16, help="samples per problem")
    parser.add_argument("--max-rows", type=int, default=128, help="rows at a time when drawn first")
    parser.add_argument("--budget", type=int, default=200, help="tokens per response")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 7, 128])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.run:
        engine, sampling, prefill, rollouts = logged(arguments.run)
    else:
        model, tokenizer = load_policy(ModelConfig(model=arguments.model))
        engine = Engine(model, tokenizer, max_rows=arguments.max_rows)
        sampling = Sampling(arguments.budget, temperature=arguments.temperature)
        prefill, rollouts = "", []
        for task in arguments.task:
            count = -(-arguments.rollouts // len(arguments.task))
            rollouts += drawn(engine, sampling, task, count, arguments.group, arguments.seed)
    tokens = sum(len(r.token_ids or ()) for r in rollouts)
    known = f", {tokens} tokens" if tokens else ""
    print(f"{len(rollouts)} rollouts{known}, {torch.get_num_threads()} threads")
    for size in arguments.batches:
        found = regenerate(engine, sampling, rollouts, size, prefill, arguments.seed)
        print(f"batches of {size:4d}: {len(found)} differ")
        for difference in found:
            print(f"  token {difference.place}, margin {difference.margin}")


def drawn(
    engine: Engine, sampling: Sampling, task: str, count: int, group: int, seed: int
) -> list[Rollout]:
    """``count`` rollouts of training problems of a task, in groups as training draws them."""
    rows = load_problems(task, "train", -(-count // group))
    prompts = encode(rows, engine.tokenizer)
    keys = [stable_key(seed, "train", 1, row["problem_id"]) for row in rows]
    groups = engine.generate(prompts, sampling, n=group, keys=keys)
    return [
        Rollout(tuple(prompt), key, sample, completion.text, completion.token_ids)
        for prompt, key, completions in zip(prompts, keys, groups, strict=True)
        for sample, completion in enumerate(completions)
    ][:count]


def logged(run: str) -> tuple[Engine, Sampling, str, list[Rollout]]:
    """Engine, sampling, prefill and logged rollouts of a run's first step."""
    config = runs.read_config(run)
    model, tokenizer = load_policy(config.model)
    table = runs.read_rollouts(run, range(1, 2))
    if table.empty:
        raise SystemExit(f"{run}: no rollouts of step 1 are logged")
    task = config.task
    rows = load_problems(task.task, "train", task.train_problems, revision=task.task_revision)
    prompts = encode(rows, tokenizer, task.template)
    by_id = {row["problem_id"]: tuple(p) for row, p in zip(rows, prompts, strict=True)}
    rollouts = [
        Rollout(by_id[name], stable_key(config.seed, "train", 1, name), int(sample), text, None)
        for name, sample, text in zip(
            table["problem_id"], table["sample"], table["text"], strict=True
        )
    ]
    prefill = prefill_text(task.template, tokenizer)
    return Engine(model, tokenizer), sampling_of(config), prefill, rollouts


def regenerate(
    engine: Engine,
    sampling: Sampling,
    rollouts: Sequence[Rollout],
    size: int,
    prefill: str = "",
    seed: int = 0,
) -> list[Difference]:
    """Make all rollouts again, ``size`` at a time in random company; those that differ.

    A batch holds rollouts of one sample number (``first_sample`` is one per call).
    """
    order = list(rollouts)
    random.Random(seed).shuffle(order)
    by_sample: dict[int, list[Rollout]] = {}
    for rollout in order:
        by_sample.setdefault(rollout.sample, []).append(rollout)
    found = []
    for sample, members in sorted(by_sample.items()):
        for at in range(0, len(members), size):
            batch = members[at : at + size]
            groups = engine.generate(
                [r.prompt for r in batch],
                sampling,
                n=1,
                keys=[r.key for r in batch],
                first_sample=sample,
                prefill=prefill,
            )
            for rollout, (again,) in zip(batch, groups, strict=True):
                same = again.text == rollout.text
                if rollout.token_ids is not None:
                    same = again.token_ids == rollout.token_ids
                if not same:
                    found.append(explain(engine.model, sampling, rollout, again.token_ids))
    return found


def explain(
    model: PreTrainedModel, sampling: Sampling, rollout: Rollout, again: Sequence[int]
) -> Difference:
    """Where a rollout first differs and how close its draw was to the border there."""
    if rollout.token_ids is None:
        return Difference(rollout, None, None)
    pairs = enumerate(zip(rollout.token_ids, again, strict=False))
    place, (a, b) = next((t, pair) for t, pair in pairs if pair[0] != pair[1])
    ids = torch.tensor([[*rollout.prompt, *rollout.token_ids[:place]]], device=model.device)
    with torch.no_grad():
        logits = model(ids).logits[0, -1].double() / sampling.temperature
    cumulative = logits.softmax(-1).cumsum(-1).cpu().numpy()
    draw = uniforms(row_streams([rollout.key], 1, rollout.sample), place)[0]
    # The border is where the lower token's interval ends.
    return Difference(rollout, place, float(np.abs(draw - cumulative[min(a, b) : max(a, b)]).min()))


if __name__ == "__main__":
    main()
