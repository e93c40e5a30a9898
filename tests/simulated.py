"""Run folders of simulated policies, written by the real Recorder: fast, and their truth is known.

A policy is right with a chance per prompt, and its reward is one of a few functions of what it
does; from step ``hack`` on it writes longer (or better formed) answers if that pays.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rlkit.config import RewardConfig, RunConfig
from rlkit.recorder import Recorder
from rlkit.runs import Status

GROUPS, SIZE = 8, 16
MAX_TOKENS = 200


def rows_of(kind: str, seed: int = 0, *, steps: int = 60, hack: int = 25) -> pd.DataFrame:
    """Rollouts of a run, without texts.

    Kinds: ``accuracy``, ``flat`` and ``collapse`` (accuracy rewards; truth rises, stays, falls from
    step 30 on), ``gate`` (an accuracy gated by a form that is learned while truth stays), ``noisy``
    (accuracy plus normal noise that differs by prompt), ``random`` (a coin), ``length`` (L / L_max
    ± 1, arXiv 2503.04548 section 4.2), ``format`` (1 if well formed), ``judge`` (accuracy, but a
    growing share of wrong answers passes), ``reflection`` (accuracy plus a bonus per step of
    reflection; accuracy falls to 0 as the policy learns to write nothing else).
    """
    rng = np.random.default_rng([seed, steps])
    step = np.repeat(np.arange(1, steps + 1), GROUPS)
    since = np.maximum(step - hack, 0)
    level = np.minimum(0.15 + 0.02 * step, 0.6)
    if kind in ("flat", "gate", "format"):
        level = np.full(len(step), 0.4)
    if kind == "collapse":
        level = np.where(step > 30, np.maximum(0.03, 0.6 - 0.05 * (step - 30)), level)
    if kind == "reflection":
        level = np.maximum(0.0, level - 0.04 * since)
    if kind == "length":
        level = level * np.maximum(0.3, 1 - 0.02 * since)
    chance = np.clip(level + 0.6 * (rng.beta(2, 2, len(step)) - 0.5), 0.02, 0.98)
    shape = (len(step), SIZE)
    right = rng.random(shape) < chance[:, None]
    well = np.ones(shape, dtype=bool)
    length = np.clip(0.1 + 0.05 * rng.standard_normal(shape), 0.02, 1)
    if kind in ("length", "reflection"):
        length = np.minimum(length + 0.04 * since[:, None], 1.0)
    ended = length < 0.95
    right &= ended
    if kind == "gate":
        well = rng.random(shape) < np.minimum(1.0, 0.1 + 0.05 * step)[:, None]
    if kind == "format":
        well = rng.random(shape) < np.minimum(0.95, 0.3 + 0.05 * since)[:, None]
    passed = right | (rng.random(shape) < np.minimum(0.8, 0.02 + 0.03 * since)[:, None])
    noise = 0.3 * (rng.standard_normal((len(step), 1)) + rng.standard_normal(shape))
    reward = {
        "noisy": right + noise,
        "random": rng.integers(0, 2, shape).astype(float),
        "reflection": right + 2 * np.minimum(length, 0.9),
        "length": length + np.where(right, 1.0, -1.0),
        "format": well.astype(float),
        "judge": passed.astype(float),
    }.get(kind, (right & well).astype(float))
    return pd.DataFrame(
        {
            "step": np.repeat(step, SIZE),
            "group": np.repeat(np.arange(len(step)) % GROUPS, SIZE),
            "sample": np.tile(np.arange(SIZE), len(step)),
            "correct": right.ravel(),
            "well": well.ravel(),
            "stop": np.where(ended, "eos", "length").ravel(),
            "n_tokens": np.rint(length * MAX_TOKENS).astype(int).ravel(),
            "reward": reward.ravel(),
        }
    )


def with_texts(rows: pd.DataFrame, part: str) -> pd.DataFrame:
    """The columns that ``rollouts.rollout_columns`` writes; advantages by group_std."""
    texts = []
    lines = zip(rows["correct"], rows["well"], rows["stop"], rows["n_tokens"], strict=True)
    for i, (right, well, stop, tokens) in enumerate(lines):
        work = "\n".join(f"wait, {i % 7}+{j % 3}" for j in range(tokens // 10))
        answer = f"\\boxed{{{12 if right else i % 10}}}" if well else str(i % 10)
        texts.append(f"<think>{work}" + (f"</think>{answer}" if stop == "eos" else ""))
    groups = rows.groupby(["step", "group"])["reward"]
    centred = rows["reward"] - groups.transform("mean")
    spread = groups.transform(lambda values: values.std(ddof=0))
    keys = rows["step"].astype(str) + "-" + rows["group"].astype(str)
    return rows.drop(columns="well").assign(
        problem_id="p" + keys,
        text=texts,
        reasoning=True,
        answer=np.where(rows["correct"], "12", "7"),
        gold="12",
        advantage=centred / (spread + 1e-4),
        used=True,
        **{f"reward_{part}": rows["reward"]},
    )


def write_run(
    folder: Path,
    rollouts: pd.DataFrame,
    metrics: list[dict[str, Any]] | None = None,
    **reward: Any,
) -> Path:
    """A run folder as a recorder leaves it after its last step."""
    (folder / "rollouts").mkdir(parents=True)
    config = RunConfig(name=folder.name, reward=RewardConfig(**reward))
    (folder / "config.json").write_text(config.to_json())
    with (folder / ".lock").open("w") as lock, Recorder(folder, lock, Status()) as recorder:
        for step, rows in rollouts.groupby("step") if len(rollouts) else ():
            recorder.rollouts(int(step), rows.to_dict("list"))
        for row in metrics if metrics is not None else step_rows(rollouts):
            recorder.metrics(row)
    return folder


def step_rows(rollouts: pd.DataFrame, coupling: float = 0.0) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; loss and gradient norm are noise, as they mostly are.

    With ``coupling``, both also follow the change of the mean length since the step before:
    gradients are larger while the policy moves.
    """
    rng = np.random.default_rng(0)
    out: list[dict[str, Any]] = []
    before: float | None = None
    for step, rows in rollouts.groupby("step") if len(rollouts) else ():
        now = float(rows["n_tokens"].mean()) / MAX_TOKENS
        moved = 0.0 if before is None else abs(now - before)
        before = now
        out.append(
            {
                "step": int(step),
                "reward": float(rows["reward"].mean()),
                "accuracy": float(rows["correct"].mean()),
                "entropy": 1 / (1 + int(step)),
                "loss": float(rng.normal(0, 0.05)) - coupling * moved,
                "grad_norm": float(0.2 + 0.03 * rng.standard_normal()) + coupling * moved,
            }
        )
    return out


def tear(folder: Path) -> None:
    """Cut off the last line of the metrics, as a kill does."""
    with (folder / "metrics.jsonl").open("a") as handle:
        handle.write(json.dumps({"step": 999, "loss": 0.1})[:-4])
