"""Measure one policy on one set of problems and keep the samples.

A measurement is stored under the run folder (or, for a shipped model, under ``runs/models-<name>``)
and read back when asked for again with the same settings, so notebooks can be re-run, extended and
compared without sampling anew.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from rlkit import evaluate, runs, templates
from rlkit.config import ModelConfig
from rlkit.engine import Sampling, load_engine
from rlkit.evaluate import EvalResult
from rlkit.paths import data_dir, runs_dir
from rlkit.tasks import Row, load_problems

THINK = "<think>"


def measure(
    policy: str | Path,
    task: str,
    *,
    split: str = "test",
    problems: int | None = None,
    samples: int = 16,
    greedy: bool = True,
    max_completion_length: int,
    temperature: float = 1.0,
    force_reasoning: bool = False,
    template: str = "question",
    seed: int = 0,
) -> EvalResult:
    """Evaluate a policy, or return the stored evaluation made with the same settings.

    Args:
        policy: a run folder (its final checkpoint is measured) or the name of a model.
        task: task name, as for ``load_problems``; ``problems`` takes the first so many rows.
        samples: sampled responses per problem, next to one greedy response.
        max_completion_length: token budget of one response.
        force_reasoning: start every response with ``<think>`` (the no-training baseline).
        seed: seed of the samples; the same seed pairs two policies on common random numbers.
    """
    run = runs.folder(policy) if _is_run(policy) else runs_dir() / f"models-{Path(policy).name}"
    rows = load_problems(task, split, problems)  # type: ignore[arg-type]
    settings = {
        "task": task,
        "split": split,
        "problems": _digest(rows),
        "samples": samples,
        "greedy": greedy,
        "budget": max_completion_length,
        "temperature": temperature,
        "forced": force_reasoning,
        "template": template,
        "seed": seed,
        "weights": _weights_digest(policy),
    }
    name = f"{task}-{split}-{_digest([settings])}"
    if name in evaluate.names(run):
        return evaluate.load(run, name)
    config = ModelConfig(model=str(policy))
    if _is_run(policy):
        dtype = runs.read_config(run).model.dtype
        config = ModelConfig(model=str(runs.final_checkpoint(run)), dtype=dtype)
    engine = load_engine(config)
    tokenizer = engine.tokenizer
    prompts = templates.encode(rows, tokenizer, template)
    prefill = templates.prefill_text(template, tokenizer)
    if force_reasoning and not prefill:
        prefill = THINK
        start = tokenizer(prefill, add_special_tokens=False)["input_ids"]
        prompts = [[*prompt, *start] for prompt in prompts]
    result = evaluate.evaluate(
        engine,
        rows,
        prompts=prompts,
        sampling=Sampling(max_completion_length, temperature=temperature),
        n=samples,
        run_seed=seed,
        purpose=f"measure/{task}/{split}",
        greedy=greedy,
        prefill=prefill,
    )
    result.info.update(settings)
    evaluate.save(result, run, name)
    return result


def _is_run(policy: str | Path) -> bool:
    return (Path(policy) / "status.json").is_file() or (
        (runs_dir() / str(policy)) / "status.json"
    ).is_file()


def _digest(values: list[Row]) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _weights_digest(policy: str | Path) -> str:
    """Hash of the weights, so that a rebuilt model is never answered with an old measurement."""
    if _is_run(policy):
        folder = runs.final_checkpoint(policy)
    else:
        named = data_dir() / "models" / str(policy)
        folder = named if named.is_dir() else Path(policy)
    if not folder.is_dir():
        return str(policy)  # a hub name: its commit is recorded in env.json
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
