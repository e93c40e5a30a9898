"""A run that was killed at any moment and called again equals one that never was, bit by bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from killed import Moment, arm
from tiny import tiny_config

from rlkit import runs
from rlkit.config import RunConfig
from rlkit.grpo import RolloutTrainer
from rlkit.trainer import train_rl

# Four prompts a step from twelve problems: a pass over the pool takes three steps.
BASE: dict[str, Any] = {"steps": 8, "learning_rate": 1e-2, "name": "whole"}
ADAPTIVE = {"beta": 0.1, "kl_schedule": "adaptive", "kl_target": 1e-3, "kl_gain": 1.0}
EVALUATED = {"eval_every": 2, "eval_problems": 2, "eval_samples": 2, "save_every": 3}


class Killed(BaseException):
    """Stands for the end of the process, where it is too slow to start one."""


@pytest.fixture(autouse=True)
def runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("RLKIT_HEADLESS", "1")
    return tmp_path / "runs"


def assert_same_run(broken: Path, whole: Path) -> None:
    """Every number, completion, evaluation and weight; only clocks may differ."""
    numbers = []
    for path in (broken, whole):
        metrics = runs.read_metrics(path)
        numbers.append(metrics.drop(columns=[c for c in metrics if c.startswith("seconds_")]))
    pd.testing.assert_frame_equal(numbers[0], numbers[1], check_exact=True)
    pd.testing.assert_frame_equal(
        runs.read_rollouts(broken), runs.read_rollouts(whole), check_exact=True
    )
    for folder in ("eval", "checkpoints", "rollouts"):
        files = [
            sorted(p.relative_to(path) for p in (path / folder).rglob("*") if p.is_file())
            for path in (broken, whole)
        ]
        assert files[0] == files[1]
        for file in files[0]:
            if file.suffix in (".safetensors", ".json"):
                assert (broken / file).read_bytes() == (whole / file).read_bytes(), file
    ends = [runs.read_status(path) for path in (broken, whole)]
    assert ends[0].checkpoint == ends[1].checkpoint
    assert ends[0].warnings == ends[1].warnings


def break_off(config: RunConfig, at: Moment, step: int) -> None:
    def die() -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        arm(at, step, die, patch.setattr)
        with pytest.raises(Killed):
            train_rl(config)


@pytest.mark.parametrize(
    ("params", "at", "step", "resumed"),
    [
        # in the third pass over the pool, in the middle of a step
        ({"resume_every": 2, "micro_batch_size": 4, "drop_no_signal": False}, "loss", 8, 6),
        # between the two updates of a batch; adaptive KL; evaluation and checkpoints on
        (
            {"resume_every": 3, "updates_per_batch": 2, "micro_batch_size": 8, **ADAPTIVE,
             **EVALUATED},
            "optimizer", 5, 3,
        ),
        # the reference was replaced on the way; the resume point is half written
        (
            {"resume_every": 1, "beta": 0.2, "kl_schedule": "cosine", "reference_reset": 3},
            "saving", 6, 5,
        ),
        ({"resume_every": 2, "lora_rank": 2, "beta": 0.2, "reference_reset": 2}, "rollouts", 6, 4),
        ({"resume_every": 4, "refill_rounds": 2, "rollouts": 2}, "recorded", 5, 4),
    ],
)  # fmt: skip
def test_a_resumed_run_equals_an_uninterrupted_one(
    model: Path, params: dict[str, Any], at: Moment, step: int, resumed: int
) -> None:
    whole = train_rl(tiny_config(model, **{**BASE, **params}))
    config = tiny_config(model, **{**BASE, **params, "name": "broken"})
    break_off(config, at, step)
    assert runs.read_status("broken").state == "failed"
    broken = train_rl(config)
    assert runs.read_status(broken).resumed == (resumed,)
    assert runs.read_status(broken).state == "done"
    assert_same_run(broken, whole)
    assert not (broken / "resume").exists()


def test_a_torn_resume_point_is_not_used(model: Path) -> None:
    """What a kill leaves of one that was being written: a folder under another name."""
    params = {**BASE, "resume_every": 2}
    whole = train_rl(tiny_config(model, **params))
    config = tiny_config(model, **{**params, "name": "broken"})
    break_off(config, "recorded", 4)
    base = runs.runs_dir() / "broken/resume"
    torn = base / ".step-000004.tmp"
    torn.mkdir()
    (torn / "optimizer.pt").write_bytes(b"torn")
    broken = train_rl(config)
    assert runs.read_status(broken).resumed == (2,)
    assert_same_run(broken, whole)


def test_two_breaks_and_a_stop_leave_no_trace(model: Path) -> None:
    params = {**BASE, "resume_every": 2, **ADAPTIVE}
    whole = train_rl(tiny_config(model, **params))
    config = tiny_config(model, **{**params, "name": "broken"})
    break_off(config, "saved", 3)
    with pytest.MonkeyPatch.context() as patch:
        arm("recorded", 5, lambda: runs.send("broken", "stop"), patch.setattr)
        train_rl(config)
    status = runs.read_status("broken")
    assert (status.state, status.step) == ("interrupted", 5)
    assert runs.resume_point("broken") == (5, runs.runs_dir() / "broken/resume/step-000005")
    break_off(config, "loss", 6)
    assert runs.read_status(train_rl(config)).resumed == (2, 5, 5)
    assert_same_run(runs.runs_dir() / "broken", whole)


def test_no_step_is_added_at_the_end(model: Path) -> None:
    """Killed between the last step and the end: only the weights are read."""
    config = tiny_config(model, **{**BASE, "resume_every": 1, "steps": 3})
    whole = train_rl(tiny_config(model, **{**BASE, "resume_every": 1, "steps": 3, "name": "w"}))

    # After the last step there is no resume point, so one is made by hand.
    with pytest.MonkeyPatch.context() as patch:
        last = RolloutTrainer.log

        def log(self: RolloutTrainer, logs: dict[str, float], start: float | None = None) -> None:
            last(self, logs, start)
            if self.state.global_step == 3:
                folder = runs.runs_dir() / "whole/resume/step-000003"
                folder.mkdir()
                self.save_state(folder)
                raise Killed

        patch.setattr(RolloutTrainer, "log", log)
        with pytest.raises(Killed):
            train_rl(config)
    path = train_rl(config)
    assert runs.read_status(path).resumed == (3,)
    assert_same_run(path, whole)


def test_without_resume_points_a_run_starts_again(model: Path) -> None:
    config = tiny_config(model, **{**BASE, "resume_every": 0, "steps": 3})
    break_off(config, "recorded", 2)
    path = train_rl(config)
    assert runs.read_status(path).resumed == ()
    assert len(runs.read_metrics(path)) == 3
    assert len(runs.read_metrics(path.with_name("whole.old-1"))) == 2


def kill(config: dict[str, Any], at: Moment, step: int) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed.py")),
         json.dumps({**config, "at": at, "step": step})],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_kill_9(model: Path) -> None:
    params = {
        **BASE, **ADAPTIVE, "updates_per_batch": 2, "micro_batch_size": 8, "resume_every": 3,
        "model": str(model),
    }  # fmt: skip
    kill({**params, "name": "broken"}, "optimizer", 5)
    status = runs.read_status("broken")
    assert (status.state, status.step) == ("running", 4)  # it had no chance to say more
    broken = train_rl(tiny_config(**{**params, "name": "broken"}))
    assert runs.read_status(broken).resumed == (3,)
    assert_same_run(broken, train_rl(tiny_config(**params)))


MATRIX = {
    "on-policy": {},
    "off-policy": {"updates_per_batch": 2, "micro_batch_size": 4},
    "four updates": {"updates_per_batch": 4, "micro_batch_size": 4, "loss_type": "grpo"},
    "fixed KL": {"beta": 0.1},
    "linear KL": {"beta": 0.1, "kl_schedule": "linear", "kl_estimator": "k3_corrected"},
    "cosine KL, resets": {"beta": 0.2, "kl_schedule": "cosine", "reference_reset": 3},
    "adaptive KL, off-policy": {**ADAPTIVE, "updates_per_batch": 2, "micro_batch_size": 8},
    "evaluated": EVALUATED,
    "evaluated, adaptive": {**EVALUATED, **ADAPTIVE},
    "LoRA": {"lora_rank": 2, "beta": 0.1, "reference_reset": 2},
    "dynamic sampling": {"refill_rounds": 2, "rollouts": 2},
    "warm-up, masks": {"warmup_steps": 3, "mask_truncated": True, "entropy_coef": 0.01},
}


@pytest.mark.slow
@pytest.mark.parametrize("resume_every", [1, 3])
@pytest.mark.parametrize("name", MATRIX)
def test_kill_9_at_every_moment(model: Path, name: str, resume_every: int) -> None:
    """Killed at three moments in turn, each time in another step and pass over the pool."""
    params = {**BASE, **MATRIX[name], "resume_every": resume_every, "model": str(model)}
    moments: list[tuple[Moment, int]] = [("rollouts", 3), ("loss", 5), ("recorded", 7)]
    if "updates_per_batch" in params:
        moments[1] = ("optimizer", 5)
    if resume_every == 3:
        moments[2] = ("saving", 6)
    for at, step in moments:
        kill({**params, "name": "broken"}, at, step)
    broken = train_rl(tiny_config(**{**params, "name": "broken"}))
    assert_same_run(broken, train_rl(tiny_config(**params)))
