"""Evaluation: samples in, one row per sample and a summary with intervals out.

Nothing here chooses a checkpoint. An evaluation describes the weights it is given; picking the best
point of a test curve is how a maximum of noise becomes a headline (the study's 37.08 is the best
raw point of a curve that ends near 32.6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

import pandas as pd

from rlkit.completion import Completion
from rlkit.correct import all_correct
from rlkit.engine import Sampling, stable_key
from rlkit.metrics import (
    KEYWORDS,
    EvalResult,
    check_ks,
    compare,
    curve,
    load,
    names,
    per_problem,
    save,
    summarise,
)
from rlkit.tool_metrics import call_columns
from rlkit.toolloop import ToolLoop
from rlkit.tools import Tools

__all__ = [
    "KEYWORDS",
    "EvalResult",
    "check_problems",
    "compare",
    "curve",
    "evaluate",
    "load",
    "names",
    "per_problem",
    "save",
    "summarise",
]

Problem = Mapping[str, Any]


class Generates(Protocol):
    """The part of ``engine.Engine`` that evaluation uses."""

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        *,
        n: int,
        keys: list[int],
        first_sample: int = 0,
        prefill: str = "",
        tools: ToolLoop | None = None,
    ) -> list[list[Completion]]:
        """Completions of shape [prompts][n]."""
        ...


def check_problems(problems: Sequence[Problem]) -> list[str]:
    """Problem ids in order. Raises ValueError for an empty list or an id that occurs twice."""
    if not problems:
        raise ValueError("no problems to evaluate: the list is empty. Check the split's name.")
    ids = [str(p["problem_id"]) for p in problems]
    twice = sorted({i for i in ids if ids.count(i) > 1}) if len(set(ids)) < len(ids) else []
    if twice:
        raise ValueError(
            f"{len(twice)} problem_id(s) occur more than once, for example {twice[0]!r}; "
            "intervals and paired tests need each problem once. Drop the duplicates."
        )
    return ids


def evaluate(
    engine: Generates,
    problems: Sequence[Problem],
    *,
    prompts: list[list[int]],
    sampling: Sampling,
    n: int,
    run_seed: int,
    purpose: str,
    step: int = 0,
    greedy: bool = False,
    prefill: str = "",
    ks: Sequence[int] | None = None,
    tools: Tools | None = None,
) -> EvalResult:
    """Draw ``n`` samples per problem, with ``greedy`` one greedy response too, and summarise.

    Args:
        problems: problem rows; prompts: their encoded prompts in the same order.
        sampling: temperature, top_p and token budget of the sampled pass.
        n: samples per problem, >= 0; 0 asks for the greedy pass only.
        run_seed, purpose, step: with the problem id they key the random numbers, so an evaluation
            never disturbs training and can be repeated alone.
        prefill: start of the response that the prompts already end with, as text (for example
            ``templates.prefill_text``, or ``<think>`` to force reasoning).
        ks: budgets for pass@k and maj@k; default the powers of 2 up to n.
        tools: runs the code that responses write; rows and summary then count the calls.

    Raises ValueError for unusable sizes, empty or duplicated problems.
    """
    ids = check_problems(problems)
    if len(prompts) != len(problems):
        raise ValueError(f"{len(prompts)} prompts for {len(problems)} problems: expected one each")
    if n < 0 or (n == 0 and not greedy):
        raise ValueError(f"n={n!r} with greedy={greedy}: nothing to draw. Use n >= 1 or greedy")
    if sampling.greedy and n > 0:
        raise ValueError(
            f"sampling.greedy with n={n}: all samples of a problem would be equal. "
            "Pass a sampled setting, and greedy=True for the greedy response."
        )
    ks = check_ks(ks, n)
    keys = [stable_key(run_seed, purpose, step, i) for i in ids]
    rows: list[dict[str, Any]] = []
    passes = [("greedy", replace(sampling, greedy=True), 1)] if greedy else []
    passes += [("sampled", sampling, n)] if n else []
    for decoding, how, count in passes:
        if tools is None:
            drawn = engine.generate(prompts, how, n=count, keys=keys, prefill=prefill)
        else:
            with tools.loop(prefill=prefill) as loop:
                drawn = engine.generate(
                    prompts, how, n=count, keys=keys, prefill=prefill, tools=loop
                )
        flat = [c for completions in drawn for c in completions]
        asked = [problem for problem, each in zip(problems, drawn, strict=True) for _ in each]
        right = all_correct(flat, asked)  # at once: expressions are judged in parallel
        new = [
            _row(problem, decoding, number % count, completion, ok)
            for number, (problem, completion, ok) in enumerate(zip(asked, flat, right, strict=True))
        ]
        if tools is not None:
            for name, values in call_columns(flat).items():
                for row, value in zip(new, values, strict=True):
                    row[name] = value
        rows += new
    frame = pd.DataFrame(rows)
    info = {
        "problems": len(ids),
        "samples": n,
        "greedy": greedy,
        "run_seed": run_seed,
        "purpose": purpose,
        "step": step,
        "sampling": {
            **asdict(sampling),
            "stop": list(sampling.stop),
            "banned": list(sampling.banned),
        },
        "prefill": prefill,
        "infra": int((frame["stop"] == "infra").sum()),
    }
    return EvalResult(frame, summarise(frame, ks=ks), info)


def _row(
    problem: Problem, decoding: str, sample: int, completion: Completion, right: bool
) -> dict[str, Any]:
    return {
        "problem_id": str(problem["problem_id"]),
        "decoding": decoding,
        "sample": sample,
        "text": completion.text,
        "answer": completion.answer,
        "gold": str(problem["answer"]),
        "correct": right,
        "stop": completion.stop,
        "n_tokens": len(completion.token_ids),
        "reasoning": bool(completion.reasoning),
    }
