"""Measure one policy on one set of problems and keep the samples.

A measurement is stored under the run folder (or, for a shipped model, under ``runs/models-<name>``)
and read back when asked for again with the same settings, so notebooks can be re-run, extended and
compared without sampling anew.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from rlkit import evaluate, runs, templates
from rlkit.config import ModelConfig, ToolConfig
from rlkit.engine import Sampling, load_engine
from rlkit.evaluate import EvalResult
from rlkit.paths import data_dir, runs_dir
from rlkit.sandbox import Limits, PythonExecutor
from rlkit.sandbox.executor import PACKAGES
from rlkit.tasks import Row, load_problems
from rlkit.tools import Executor, Mode, banned_texts, open_tools, run_limits

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
    mode: Mode = "written",
    tools: ToolConfig | None = None,
    force: str = "",
    executor: Executor | None = None,
) -> EvalResult:
    """Evaluate a policy, or return the stored evaluation made with the same settings.

    Args:
        policy: a run folder (its final checkpoint is measured) or the name of a model.
        task: task name, as for ``load_problems``; ``problems`` takes the first so many rows.
        samples: sampled responses per problem, next to one greedy response.
        max_completion_length: token budget of one response.
        force_reasoning: start every response with ``<think>`` (the no-training baseline).
        force: start every response with this text instead, behind what the template opens.
        mode: ``none``: no response may hold a backtick, so none holds code; ``written``: code is
            text like any other; ``run``: it is executed as ``tools`` says.
        tools: the rules of ``mode='run'``, not read in the others; default
            ``ToolConfig(tool="python")``.
        executor: runs the code; default a sandbox of its own. In the settings it is told apart by
            its class, its ``name`` if it has one (``tool_probes.Falsified``), its limits, and a
            ``PythonExecutor`` by packages, seed and echo as well.
        seed: seed of the samples; the same seed pairs two policies on common random numbers.

    Raises:
        ValueError: an unknown ``mode``; an ``executor`` that the mode does not use; both
            ``force_reasoning`` and ``force``; a forced text that ``mode='none'`` bans.
    """
    _check(mode, executor, force, force_reasoning)
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
    start = THINK if force_reasoning else force
    rules = replace(tools or ToolConfig(), tool="python" if mode == "run" else "none")
    if mode != "written" or force:
        settings |= {"mode": mode, "force": force}
    if mode == "run":
        settings |= {"tools": asdict(rules), **_described(executor, run_limits(rules))}
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
    if start and not (prefill and start == THINK):  # a template may have opened it already
        prefill += start
        ids = tokenizer(start, add_special_tokens=False)["input_ids"]
        prompts = [[*prompt, *ids] for prompt in prompts]
    with open_tools(rules, tokenizer, executor) as opened:
        result = evaluate.evaluate(
            engine,
            rows,
            prompts=prompts,
            sampling=Sampling(
                max_completion_length, temperature=temperature, banned=banned_texts(mode)
            ),
            n=samples,
            run_seed=seed,
            purpose=f"measure/{task}/{split}",
            greedy=greedy,
            prefill=prefill,
            tools=opened,
        )
    result.info.update(settings)
    evaluate.save(result, run, name)
    return result


def _check(mode: str, executor: Executor | None, force: str, force_reasoning: bool) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r}: expected one of {get_args(Mode)}")
    if executor is not None and mode != "run":
        raise ValueError(f"mode={mode!r} with an executor: no code would run; set mode='run'")
    if force and force_reasoning:
        raise ValueError(
            f"force={force!r} with force_reasoning=True: expected one of them. For both texts set "
            f"force={THINK + force!r}"
        )
    if banned := [text for text in banned_texts("none") if mode == "none" and text in force]:
        raise ValueError(f"force={force!r} holds {banned}, which mode='none' bans")


def _described(executor: Executor | None, usual: Limits) -> dict[str, Any]:
    """What tells an executor from the one that is made without it, which is ``""``."""
    if executor is None:
        return {"executor": ""}
    python = isinstance(executor, PythonExecutor)
    found = {"executor": getattr(executor, "name", "" if python else type(executor).__name__)}
    if executor.limits != usual:
        found["limits"] = asdict(executor.limits)
    if isinstance(executor, PythonExecutor):
        own = {"packages": executor.info.packages, "seed": executor.seed, "echo": executor.echo}
        default = {"packages": PACKAGES, "seed": 0, "echo": True}
        found |= {key: value for key, value in own.items() if value != default[key]}
    return found


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
