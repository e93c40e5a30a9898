"""Bias, variance and direction of policy-gradient estimators at a frozen checkpoint.

    python benchmarks/estimators.py --model tiny-base --task edge --rollouts 65536 --out figures
    python benchmarks/estimators.py --quick --out /tmp/estimators

Rollouts are collected in blocks of 64 problems x 64 rollouts; a finished block is a file under
``runs/estimators/``, so a stopped run goes on where it was. Each rollout's exact gradient is
sketched (``rlkit.estimators``). Results go to ``estimators.csv``, where rows of the same setting
replace the older ones, and the figure ``estimators`` is drawn from the whole table.
docs/estimators.md says what is measured and what came out.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _estimator_figure import (
    GAIN_GROUP,
    GAIN_STEP,
    SHOWN,
    Table,
    draw,
    markdown,
    row_of,
    shipped,
    update,
)
from _frozen import BATCH, Bench, Rollouts, Setting

from rlkit import display, paths
from rlkit.estimators import (
    ESTIMATORS,
    Blocks,
    Estimator,
    Floats,
    Sketch,
    batch_gap,
    batches,
    jackknife,
    mean_interval,
    moments,
    reduce_batches,
    weights,
)

GROUPS = (2, 4, 8, 16, 64)
REFERENCE = ("RLOO", "pass@4")
"""Their largest groups give the two references: the gradients of accuracy and of pass@4."""
CORRECTIONS = {"": "uncorrected", "token": "token ratio, clipped", "sequence": "sequence ratio"}
"""Of stale rollouts."""

Key = tuple[str, int]
"""Estimator and group size."""


# --- collecting -----------------------------------------------------------------------------------


def groups_of(setting: Setting) -> list[int]:
    """Group sizes that the blocks can be dealt into."""
    return [
        group
        for group in GROUPS
        if group <= setting.rollouts and BATCH // group <= setting.problems
    ]


def checked(setting: Setting) -> list[Key]:
    """Block means that are also kept exactly: the reference, and one to see the sketch's error."""
    largest = groups_of(setting)[-1]
    return [("RLOO", largest), ("GRPO", min(GAIN_GROUP, largest))]


def block_weights(batch: Rollouts, estimator: Estimator, group: int) -> tuple[Any, Any]:
    """Indices and weights [batches, P * G] of a block dealt into batches."""
    problems, rollouts = batch.rewards.shape
    index = batches(problems, rollouts, BATCH, group)
    reward, length = batch.rewards.reshape(-1), batch.lengths.reshape(-1)
    found = [weights(reward[i], length[i], estimator) for i in index]
    return index.reshape(len(index), -1), np.array(found).reshape(len(index), -1)


def collect(setting: Setting, blocks: int) -> list[Path]:
    """Files of that many blocks; makes those that are missing."""
    if blocks < 3:
        raise ValueError(
            f"{blocks} blocks: expected at least 3 of {setting.problems * setting.rollouts} "
            "rollouts each; raise --rollouts"
        )
    folder = setting.folder()
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"block-{block:03d}.npz" for block in range(blocks)]
    missing = [block for block in range(blocks) if not files[block].exists()]
    if not missing:
        return files
    bench = Bench(setting)
    sketch = Sketch(bench.size, setting.width)
    for block in missing:
        batch = bench.roll(f"block-{block}", setting.problems, setting.rollouts)
        exact = torch.zeros(2, batch.rewards.size)
        for i, (name, group) in enumerate(checked(setting)):
            index, weight = block_weights(batch, ESTIMATORS[name], group)
            exact[i, index.reshape(-1)] = torch.tensor(weight.reshape(-1) / len(index)).float()
        vectors, sums, ratios = bench.sketch(batch, sketch, exact)
        arrays: dict[str, Any] = {k: v.numpy().astype(np.float16) for k, v in vectors.items()}
        arrays |= {"rewards": batch.rewards, "lengths": batch.lengths, "log_ratio": ratios}
        save(files[block], {**arrays, "exact": sums.numpy()})
        print(f"{folder.name} block {block + 1}/{blocks}: reward {batch.rewards.mean():.3f}")
    return files


def save(path: Path, arrays: dict[str, Any]) -> None:
    """Write a whole file or none, so that a stopped run never leaves half a block."""
    aside = path.with_suffix(".tmp")
    with aside.open("wb") as file:
        np.savez(file, **arrays)
    aside.replace(path)


def step_gains(
    setting: Setting, files: Sequence[Path], count: int, problems: int, rollouts: int
) -> dict[str, Floats]:
    """Gain in accuracy of one step of ``GAIN_STEP`` along each estimator's gradient, [count] each.

    Every repeat has its own batch and its own test problems; before and after share the random
    numbers of the rollouts. ``best`` steps along the reference, the mean over the blocks' files.
    """
    folder = setting.folder()
    exact = np.mean([np.load(file)["exact"][0] for file in files], axis=0)
    bench: Bench | None = None
    found: dict[str, list[float]] = {name: [] for name in ("best", *SHOWN)}
    for repeat in range(count):
        path = folder / f"gain-{GAIN_STEP}-{problems}x{rollouts}-{repeat:03d}.npz"
        if not path.exists():
            bench = bench or Bench(setting)
            batch = bench.roll(f"gain-{repeat}", BATCH // GAIN_GROUP, GAIN_GROUP)
            weight = np.array(
                [weights(batch.rewards, batch.lengths, ESTIMATORS[name]) for name in SHOWN]
            ).reshape(len(SHOWN), -1)
            _, sums, _ = bench.sketch(batch, None, torch.tensor(weight).float())
            gradients = {"best": torch.tensor(exact), **dict(zip(SHOWN, sums, strict=True))}
            test = (f"test-{repeat}", problems, rollouts)
            before, gains = bench.roll(*test).rewards.mean(), {}
            for name, gradient in gradients.items():
                with bench.moved(gradient, GAIN_STEP):
                    gains[name] = bench.roll(*test).rewards.mean() - before
            save(path, gains)
            print(f"{folder.name} step {repeat + 1}/{count}: best {gains['best']:+.3f}")
        with np.load(path) as data:
            for name, values in found.items():
                values.append(float(data[name]))
    return {name: np.array(values) for name, values in found.items()}


# --- analysis -------------------------------------------------------------------------------------


def reduce_blocks(setting: Setting, files: Sequence[Path]) -> dict[Key, Blocks]:
    """Every estimator at every group size; stale rollouts: RLOO with each correction."""
    found: dict[Key, list[Any]] = {}
    for file in files:
        with np.load(file) as data:
            arrays = {name: data[name] for name in data.files}
        names = ("plain", "up", "down") if setting.stale else ("plain",)
        vectors = {name: arrays[name].astype(np.float32) for name in names}
        batch = Rollouts([], [], [], arrays["rewards"], arrays["lengths"])
        ratio = np.exp(arrays["log_ratio"])
        for name, estimator in ESTIMATORS.items():
            if setting.stale and name != "RLOO":
                continue
            for group in groups_of(setting):
                if estimator.k > group:
                    continue
                index, weight = block_weights(batch, estimator, group)
                for correction, what in CORRECTIONS.items() if setting.stale else [("", "")]:
                    if correction == "token":
                        up, down = vectors["up"], vectors["down"]
                        gradients = [
                            np.maximum(w, 0) @ up[i] + np.minimum(w, 0) @ down[i]
                            for i, w in zip(index, weight, strict=True)
                        ]
                    else:
                        scaled = weight * ratio[index] if correction else weight
                        gradients = [
                            w @ vectors["plain"][i] for i, w in zip(index, scaled, strict=True)
                        ]
                    key = (f"{name}, {what}" if what else name, group)
                    found.setdefault(key, []).append(reduce_batches(np.array(gradients)))
    return {
        key: Blocks(*(np.array(part) for part in zip(*parts, strict=True)))
        for key, parts in found.items()
    }


def references_of(reduced: dict[Key, Blocks]) -> dict[str, Floats]:
    """Per objective the block means [S, m] of its unbiased estimator at the largest group."""
    largest = max(group for _, group in reduced)
    return {name: reduced[name, largest].mean for name in REFERENCE if (name, largest) in reduced}


def analyse(setting: Setting, blocks: int, full: Setting) -> Table:
    """Collect what is missing and measure every estimator against the references.

    Args:
        full: the same policy at temperature 1, a reference for other temperatures too. Its blocks
            may be larger: block s starts with the same problems, and is compared with others only.
    """
    files = collect(setting, blocks)
    reduced = reduce_blocks(setting, files)
    targets: dict[str, dict[str, Floats]] = {}
    if setting.stale:
        fresh = replace(setting, stale=False)
        targets[""] = references_of(reduce_blocks(fresh, collect(fresh, blocks)))
    else:
        targets[""] = references_of(reduced)
    if setting.temperature != 1.0:
        targets[" at T=1"] = references_of(reduce_blocks(full, collect(full, blocks)))
    rows = []
    for (name, group), found in reduced.items():
        for where, references in targets.items():
            for target, reference in references.items():
                if target != "RLOO" and name not in REFERENCE:
                    continue  # the gradient of pass@4 matters for two estimators only
                first = not where and target == "RLOO"
                suffix = (" of pass@4" if target != "RLOO" else "") + where
                values = moments(found, reference)
                norm = values.pop("reference_norm")  # the same for all, so only one row
                if first and not rows:
                    rows.append(row_of(setting, "reference", 0, "reference_norm", norm))
                for quantity, estimate in values.items():
                    if first or quantity in ("cosine", "batch_cosine"):
                        rows.append(row_of(setting, name, group, quantity + suffix, estimate))
        base = reduced.get(("RLOO", group))
        if base is not None and name != "RLOO":
            gap = batch_gap(found, base, targets[""]["RLOO"])
            rows.append(row_of(setting, name, group, "batch_cosine minus RLOO", gap))
    rows += rollout_rows(setting, files)
    return rows if setting.stale else rows + sketch_rows(setting, files, reduced)


def rollout_rows(setting: Setting, files: Sequence[Path]) -> Table:
    """What the rollouts are like: accuracy, length, gradient norms; if stale, how stale.

    ``best constant baseline`` is E[r |g|^2] / E[|g|^2], which minimises the variance of one
    rollout's (r - b) g (Greensmith, Bartlett and Baxter 2004, JMLR 5).
    """
    sums = []
    for file in files:
        with np.load(file) as data:
            reward, ratio = data["rewards"].reshape(-1), np.exp(data["log_ratio"])
            squared = (data["plain"].astype(np.float32) ** 2).sum(axis=1)
            parts = [reward, data["lengths"], data["log_ratio"], ratio, ratio**2]
            parts += [squared * reward, squared, data["lengths"].reshape(-1) * reward]
            sums.append([float(np.mean(part)) for part in parts])
    values = np.array(sums)

    def at(keep: Any) -> dict[str, float]:
        means = values[keep].mean(axis=0)
        right, length, log_ratio, first, second, energy_right, energy, length_right = means
        found = {
            "accuracy": right,
            "length, right": length_right / right,
            "length, wrong": (length - length_right) / (1 - right),
            "gradient norm, right": math.sqrt(energy_right / right),
            "gradient norm, wrong": math.sqrt((energy - energy_right) / (1 - right)),
            "best constant baseline": energy_right / energy,
        }
        if setting.stale:
            found |= {"KL of behaviour": -log_ratio, "effective sample share": first**2 / second}
        return found

    return [
        row_of(setting, "rollouts", 0, name, estimate)
        for name, estimate in jackknife(at, len(values)).items()
    ]


def sketch_rows(setting: Setting, files: Sequence[Path], reduced: dict[Key, Blocks]) -> Table:
    """The same moments from exact block means and from sketched ones, for one estimator."""
    reference, mine = checked(setting)
    exact = np.array([np.load(file)["exact"] for file in files], dtype=np.float64)
    none, rows = np.zeros(len(exact)), []
    for what, pair in {
        "exact": (exact[:, 0], exact[:, 1]),
        "sketch": (reduced[reference].mean, reduced[mine].mean),
    }.items():
        found = moments(Blocks(pair[1], pair[1], none, none), pair[0])
        for quantity in ("cosine", "scale", "reference_norm"):
            rows.append(row_of(setting, *mine, f"{quantity} ({what})", found[quantity]))
    return rows


def gain_rows(setting: Setting, gains: dict[str, Floats]) -> Table:
    """Mean gain of each estimator, and its paired difference to RLOO's."""
    rows = []
    for name, values in gains.items():
        pair = {"gain": values, "gain minus RLOO": values - gains["RLOO"]}
        for quantity, sample in pair.items():
            if quantity == "gain" or name not in ("RLOO", "best"):
                rows.append(row_of(setting, name, GAIN_GROUP, quantity, mean_interval(sample)))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Collect, measure, write the table and the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny-base")
    parser.add_argument("--task", default="edge", help="an embedded task")
    parser.add_argument("--rollouts", type=int, default=65536, help="for the reference gradient")
    parser.add_argument("--problems", type=int, default=64, help="problems of a block")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--drift", type=int, default=0, help="steps away from the checkpoint")
    parser.add_argument("--stale", action="store_true", help="rollouts of the shipped checkpoint")
    parser.add_argument("--steps", type=int, default=16, help="repeats of the one-step gain")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="default: figures/")
    parser.add_argument("--quick", action="store_true", help="the whole path in seconds")
    asked = parser.parse_args(argv)
    setting = Setting(
        asked.model, asked.task, asked.temperature, asked.drift, asked.stale, asked.seed,
        problems=asked.problems,
    )  # fmt: skip
    full = replace(setting, temperature=1.0, problems=64)
    blocks, test = asked.rollouts // (setting.problems * setting.rollouts), (48, 8)
    if asked.quick:
        setting = replace(setting, problems=16, rollouts=16, budget=64, width=1024)
        full = replace(setting, temperature=1.0)
        blocks, test, asked.steps = 3, (4, 4), 2
    rows = analyse(setting, blocks, full)
    if asked.steps and not setting.drift and setting.temperature == 1.0:
        rows += gain_rows(
            setting, step_gains(setting, collect(setting, blocks), asked.steps, *test)
        )
    out = asked.out or paths.figures_dir()
    table = update(out / "estimators.csv", setting, rows)
    print(markdown(table, setting, GAIN_GROUP))
    if len(shipped(table)):
        display.show(draw(table), "estimators", folder=out)


if __name__ == "__main__":
    main()
