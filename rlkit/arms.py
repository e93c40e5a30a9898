"""The runs that stand behind a panel: RL, RL on a coin, and one round of rejection sampling.

Notebooks share runs by name: whoever comes first trains, the next one finds the finished run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rlkit import filters, models, rewards, runs, templates
from rlkit.config import EvalConfig, RewardConfig, RunConfig
from rlkit.engine import Sampling, load_engine, stable_key
from rlkit.paths import runs_dir
from rlkit.runs import RunError
from rlkit.sft import train_sft
from rlkit.tasks import load_problems
from rlkit.tools import calling, open_tools
from rlkit.traces import document
from rlkit.trainer import train_rl

Arm = Literal["rl", "random", "rft"]


def configs(
    rl: RunConfig,
    start: str,
    *,
    seeds: int,
    random_steps: int,
    random_learning_rate: float,
    rft_epochs: int,
    rft_batch_size: int,
    rft_learning_rate: float,
) -> dict[Arm, list[RunConfig]]:
    """The runs of one start on one task, one per seed: RL, its null arm, and the no-RL rival.

    Args:
        rl: the RL run; its name and seed are replaced.
        start: short name of the starting policy, ``base`` or ``sft``; part of the run names
            ``<task>-<start>-s<seed>``, ``<task>-<start>-random-s<seed>`` and
            ``<task>-<start>-rft-s<seed>``, by which notebooks share runs.
        seeds: how many; 0, 1, ...
        random_steps, random_learning_rate: of the arm on a random reward. Adam makes steps of full
            size out of pure noise, so at RL's own rate the coin wears any policy down.
        rft_epochs, rft_batch_size, rft_learning_rate: the fine-tuning of the ``rft`` arm;
            the batch counts documents.
    """
    tuned = replace(
        rl.train,
        batch_size=rft_batch_size,
        micro_batch_size=rft_batch_size,
        rollouts=rft_batch_size,  # not used by SFT, but a batch must be made of whole groups
        epochs=rft_epochs,
        learning_rate=rft_learning_rate,
    )
    null = replace(rl.train, steps=random_steps, learning_rate=random_learning_rate)
    coin = RewardConfig(reward="random", format=rl.reward.format, allow_exploitable=True)
    changes: dict[Arm, dict[str, Any]] = {
        "rl": {},
        "random": {"reward": coin, "train": null},
        "rft": {"train": tuned, "eval": EvalConfig()},
    }
    stem = f"{rl.task.task.replace('+', '-')}-{start}"
    out: dict[Arm, list[RunConfig]] = {}
    for arm, change in changes.items():
        prefix = stem if arm == "rl" else f"{stem}-{arm}"
        out[arm] = [
            replace(rl, name=f"{prefix}-s{seed}", seed=seed, **change) for seed in range(seeds)
        ]
    return out


def train(plan: Mapping[Arm, Sequence[RunConfig]]) -> dict[Arm, list[Path]]:
    """Run folders of every arm of ``configs``, trained now or found finished.

    ``random`` and ``rft`` may have fewer seeds than ``rl``.
    """
    return {
        "rl": [obtain(config) for config in plan["rl"]],
        "random": [obtain(config) for config in plan["random"]],
        "rft": [obtain_tuned(c, rl) for c, rl in zip(plan["rft"], plan["rl"], strict=False)],
    }


def obtain(
    config: RunConfig,
    *,
    reward_fns: rewards.RewardFns | None = None,
    group_filter: filters.GroupFilter | None = None,
) -> Path:
    """The finished RL run of ``config``: the one that exists, continued if need be, else a new one.

    A run of the same name from other settings, rewards or weights is moved aside
    (``<name>.old-<n>``), so that a notebook can be run again with a changed parameter.
    """
    train = partial(train_rl, config, reward_fns=reward_fns, group_filter=group_filter)
    try:
        return train()
    except RunError:
        if runs.is_locked(runs_dir() / config.name):
            raise  # another process is writing it
        return train(fresh=True)


def obtain_tuned(config: RunConfig, rl: RunConfig) -> Path:
    """The finished run of one round of rejection-sampling fine-tuning (RFT).

    The starting policy of ``rl`` answers training problems of ``rl``, as many completions as ``rl``
    draws in all; the rewarded ones, without repetitions, become the documents of an SFT run. What
    was drawn and kept stands in ``rejection.json`` of the run folder.
    """
    folder = runs_dir() / config.name
    note = folder / "rejection.json"
    source = {"weights": models.fingerprint(rl.model), "rl": asdict(replace(rl, name=config.name))}
    known = note.is_file() and json.loads(note.read_text())["source"] == source
    if known and runs.read_config(folder) == config:
        return folder
    documents = rejection_sample(rl)
    folder = train_sft(config, documents=documents, fresh=True)
    counts = {"drawn": rl.train.steps * rl.train.batch_size, "kept": len(documents)}
    # Written last: where it exists, the run is complete.
    runs.write_atomic(note, json.dumps({**counts, "source": source}, indent=1) + "\n")
    return folder


def rejection_sample(rl: RunConfig) -> list[dict[str, Any]]:
    """Rewarded, distinct completions of the starting policy, as documents for ``train_sft``.

    With ``tool='python'`` they are drawn with the tool, up to ``max_calls`` calls each.

    Raises ValueError if no completion was rewarded.
    """
    drawn = rl.train.steps * rl.train.batch_size
    count = min(drawn // rl.train.rollouts, rl.task.train_problems)
    rows = load_problems(rl.task.task, "train", count, revision=rl.task.task_revision)
    template = rl.task.template
    chat = not templates.get(template).plain
    engine = load_engine(rl.model, chat_template=chat)
    tokenizer = engine.tokenizer
    prefill = templates.prefill_text(template, tokenizer)
    with open_tools(rl.tools, tokenizer) as tools, calling(tools, prefill) as loop:
        groups = engine.generate(
            templates.encode(rows, tokenizer, template),
            Sampling(
                rl.sampling.max_completion_length,
                temperature=rl.sampling.temperature,
                top_p=rl.sampling.top_p,
            ),
            n=drawn // count,
            keys=[stable_key(rl.seed, "rejection", 0, row["problem_id"]) for row in rows],
            prefill=prefill,
            tools=loop,
        )
    flat = [c for group in groups for c in group]
    asked = [row for row, group in zip(rows, groups, strict=True) for _ in group]
    values, _ = rewards.score(rewards.build(rl.reward), flat, asked, **rewards.facts(rl, 0))
    kept = {
        (row["problem_id"], c.text): document(row, c, prefill)
        for row, c, value in zip(asked, flat, values, strict=True)
        if value is not None and value > 0
    }
    if not kept:
        raise ValueError(
            f"none of {len(flat)} completions of {rl.model.model!r} on {rl.task.task!r} was "
            "rewarded: there is nothing to fine-tune on. Raise steps or batch_size, or take an "
            "easier task."
        )
    return list(kept.values())


def drawn(run: Path) -> int:
    """Completions that a run drew from its policy: rollouts of RL, or what RFT filtered."""
    note = run / "rejection.json"
    if note.is_file():
        return int(json.loads(note.read_text())["drawn"])
    return int(runs.read_metrics(run)["completions"].iloc[-1])


def kept(run: Path) -> int:
    """Documents of a rejection-sampling run: rewarded completions without repetitions."""
    return int(json.loads((run / "rejection.json").read_text())["kept"])
