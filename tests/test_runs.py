from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rlkit import recorder as recorder_module
from rlkit import runs
from rlkit import start as start_module
from rlkit.config import RunConfig, resolve
from rlkit.recorder import Recorder
from rlkit.runs import Notice, RunError
from rlkit.start import open_run


@pytest.fixture(autouse=True)
def runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLKIT_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def config(**params: Any) -> RunConfig:
    return resolve("tiny-smoke", name="demo-s0", **params)


def start(cfg: RunConfig | None = None, **options: Any) -> Recorder:
    made = open_run(cfg or config(), {"seed": 0}, max_steps=3, **options)
    assert isinstance(made, Recorder)
    return made


def columns(step: int, rows: int = 2) -> dict[str, list[Any]]:
    return {"step": [step] * rows, "sample": list(range(rows)), "text": [f"<{step}>"] * rows}


def test_a_run_from_start_to_end() -> None:
    with start() as run:
        assert runs.read_status("demo-s0").state == "running"
        assert runs.is_locked(run.path)
        for step in (1, 2, 3):
            run.rollouts(step, columns(step))
            run.metrics({"step": step, "loss": 0.5, "length_right": float("nan")})
            run.update(step=step)
        with run.checkpoint(3) as folder:
            (folder / "weights").write_text("w")
        assert run.warn("test", "careful")
        assert not run.warn("test", "careful again")
    status = runs.read_status("demo-s0")
    assert (status.state, status.step, status.warnings) == (
        "done", 3, (Notice(3, "test", "careful"),),
    )  # fmt: skip
    assert not runs.is_locked(run.path)
    assert runs.read_config("demo-s0") == config()
    assert json.loads((run.path / "env.json").read_text()) == {"seed": 0}
    metrics = runs.read_metrics("demo-s0")
    assert metrics["step"].tolist() == [1, 2, 3]
    assert metrics["length_right"].isna().all()
    rollouts = runs.read_rollouts("demo-s0")
    assert rollouts["text"].tolist() == ["<1>", "<1>", "<2>", "<2>", "<3>", "<3>"]
    assert runs.read_rollouts("demo-s0", range(2, 3))["step"].tolist() == [2, 2]
    assert (runs.final_checkpoint("demo-s0") / "weights").read_text() == "w"
    assert runs.list_runs() == [run.path]


def test_the_same_finished_run_is_reused() -> None:
    with start() as run:
        run.metrics({"step": 1})
    again = open_run(config(), {}, max_steps=3)
    assert again == run.path
    assert len(runs.read_metrics("demo-s0")) == 1


def test_another_configuration_is_refused_and_named() -> None:
    with start():
        pass
    with pytest.raises(RunError, match=r"steps: 3 -> 5.*fresh=True"):
        start(config(steps=5))
    with pytest.raises(RunError, match="kind: rl -> sft"):
        start(kind="sft")
    with pytest.raises(RunError, match="other weights, problems, rewards or documents"):
        start(data="abc")


def test_fresh_moves_the_old_folder_aside(runs_folder: Path) -> None:
    for marker in (1, 2, 3):
        with start(fresh=True) as run:
            run.metrics({"step": marker})
    kept = [runs.read_metrics(runs_folder / f"demo-s0.old-{n}")["step"].item() for n in (1, 2)]
    assert kept == [1, 2]
    assert runs.read_metrics("demo-s0")["step"].item() == 3
    assert runs.list_runs() == [run.path]


def test_a_failed_run_keeps_its_error_and_is_not_overwritten(runs_folder: Path) -> None:
    def failing() -> None:
        with start() as run:
            run.update(step=1)
            raise ZeroDivisionError("by zero")

    with pytest.raises(ZeroDivisionError):
        failing()
    status = runs.read_status("demo-s0")
    assert (status.state, status.error) == ("failed", "ZeroDivisionError: by zero")
    with start():  # without a resume point it starts again
        assert runs.read_status("demo-s0").step == 0
    assert runs.read_status(runs_folder / "demo-s0.old-1").state == "failed"
    assert isinstance(open_run(config(), {}, max_steps=3), Path)


SAVING = config(save_every=2)


def unfinished(steps: int, resume_at: int) -> Path:
    """A run that broke off after ``steps`` steps, with a resume point at one of them."""

    def broken() -> None:
        with start(SAVING) as run:
            for step in range(1, steps + 1):
                run.warn(f"of step {step}", "careful")
                run.metrics({"step": step, "loss": 0.1 * step})
                run.rollouts(step, {"step": [step] * 2, "text": [f"<{step}>"] * 2})
                (run.path / "eval" / f"validation-{step:06d}.json").write_text("{}")
                run.update(step=step)
                if step % 2 == 0:
                    with run.checkpoint(step) as folder:
                        (folder / "weights").write_text(str(step))
                if step <= resume_at:
                    with run.resume_point(step) as folder:
                        (folder / "state").write_text(str(step))
            (run.path / "resume" / f".step-{steps:06d}.tmp").mkdir()
            (run.path / "rollouts" / ".step-000099.parquet.tmp").touch()
            with (run.path / "metrics.jsonl").open("a") as handle:
                handle.write('{"step": 99, "lo')
            run.close("failed", "gone")

    broken()
    return runs.runs_dir() / "demo-s0"


def test_an_unfinished_run_goes_on_from_its_resume_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkit.recorder.MERGE_EVERY", 4)
    path = unfinished(steps=5, resume_at=3)
    assert runs.resume_point(path) == (3, path / "resume" / "step-000003")
    assert [p.name for p in (path / "resume").glob("step-*")] == ["step-000003"]
    merged = [p.name for p in (path / "rollouts").glob("steps-*")]
    assert merged == ["steps-000001-000004.parquet"]  # reaches beyond the resume point
    with start(SAVING) as run:
        assert isinstance(run, Recorder)
        assert run.resume == path / "resume" / "step-000003"
        status = runs.read_status("demo-s0")
        assert (status.state, status.step, status.resumed) == ("running", 3, (3,))
        assert (status.checkpoint, status.error) == ("step-000002", "")
        # What was warned of after step 3 is warned of again, where it happens again.
        assert [notice.code for notice in status.warnings] == [f"of step {s}" for s in (1, 2, 3, 4)]
        assert runs.read_metrics("demo-s0")["step"].tolist() == [1, 2, 3]
        assert runs.read_rollouts("demo-s0")["text"].tolist() == [
            "<1>", "<1>", "<2>", "<2>", "<3>", "<3>",
        ]  # fmt: skip
        assert sorted(p.name for p in (path / "eval").iterdir()) == [
            f"validation-{step:06d}.json" for step in (1, 2, 3)
        ]
        assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["step-000002"]
        run.rollouts(4, {"step": [4], "text": ["again"]})
        assert [p.name for p in (path / "rollouts").iterdir()] == merged
        assert runs.read_rollouts("demo-s0")["text"].iloc[-1] == "again"
    assert not list(path.rglob("*.tmp"))
    assert not (path / "resume").exists()  # done: nothing to go on from


def test_fresh_and_another_configuration_do_not_touch_a_resume_point() -> None:
    path = unfinished(steps=3, resume_at=2)
    with pytest.raises(RunError, match="steps: 3 -> 5"):
        start(config(steps=5))
    assert len(runs.read_metrics(path)) == 3
    with start(SAVING, fresh=True) as run:
        assert run.resume is None
    assert runs.resume_point(path.with_name("demo-s0.old-1")) is not None


def test_a_resumed_run_does_not_obey_the_stop_that_ended_it() -> None:
    path = unfinished(steps=3, resume_at=2)
    (path / "control.json").write_text('{"command": "stop", "id": 4}')
    with start(SAVING) as run:
        assert run.command() == ("run", 4)
        assert runs.send("demo-s0", "pause") == 5


def test_going_on_with_other_versions_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished(steps=3, resume_at=2)
    with open_run(SAVING, {"seed": 0, "torch_threads": 64}, max_steps=3) as run:
        assert "other torch_threads" in run.status.warnings[-1].message
        run.environment(more=1)
        env = json.loads((run.path / "env.json").read_text())
    assert env.pop("more") == 1
    assert env == {"seed": 0, "torch_threads": 64, "before_resume": {"seed": 0}}


def test_a_run_that_never_made_a_step_does_not_block_its_name(runs_folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), start():
        raise ZeroDivisionError
    with start(config(steps=5)):
        pass
    assert (runs_folder / "demo-s0.old-1").is_dir()


STEPS = (
    "start.write_atomic", "recorder.write_atomic", "recorder.Recorder.update",
    "recorder.Recorder.environment", "recorder.Recorder.__init__",
)  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_start_that_was_cut_off_leaves_nothing_behind(
    name: str, error: BaseException, resumed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No thread that goes on writing, no lock, no folder that blocks the name."""
    monkeypatch.setattr(recorder_module, "HEARTBEAT_SECONDS", 0.01)
    if resumed:
        path = unfinished(steps=3, resume_at=2)
        (path / "control.json").write_text('{"command": "stop", "id": 4}')

    def broken(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"rlkit.{name}", broken)
        with contextlib.suppress(OSError, KeyboardInterrupt):
            # Only a changed environment is written when a run is resumed.
            open_run(SAVING, {"seed": 0, "torch_threads": 3}, max_steps=3)
            pytest.fail("it started all the same")
    for thread in threading.enumerate():
        if thread.name == "rlkit-heartbeat":
            thread.join(10)  # that of an ended run may be on its way out
            assert not thread.is_alive()
    assert not runs.is_locked(runs.runs_dir() / "demo-s0")
    with start(SAVING) as run:
        assert (run.resume is not None) == resumed
        run.update(step=3)
    time.sleep(0.05)
    assert runs.read_status("demo-s0").state == "done"


def test_a_status_that_a_power_cut_emptied_is_named() -> None:
    path = unfinished(steps=3, resume_at=2)
    (path / "status.json").write_text("")
    with pytest.raises(
        RunError, match=r"status\.json of run 'demo-s0' cannot be read .*fresh=True"
    ):
        start(SAVING)
    with start(SAVING, fresh=True):
        pass
    assert runs.resume_point(path.with_name("demo-s0.old-1")) is not None


def test_a_lock_whose_folder_was_moved_aside_is_not_taken(
    runs_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process starts the run anew between opening the lock and getting it."""
    with pytest.raises(ZeroDivisionError), start():
        raise ZeroDivisionError
    flock = start_module.fcntl.flock
    moved = runs_folder / "demo-s0.old-7"

    def late(handle: Any, how: int) -> None:
        if not moved.exists():
            (runs_folder / "demo-s0").rename(moved)
        flock(handle, how)

    monkeypatch.setattr(start_module.fcntl, "flock", late)
    with start() as run:
        assert runs.is_locked(run.path)
        assert not runs.is_locked(moved)


def test_of_processes_that_start_one_run_at_once_one_writes(runs_folder: Path) -> None:
    """All find a run to move aside; whoever waits for its lock must not take the moved one."""
    code = (
        "import sys, time\n"
        "from rlkit.config import resolve\n"
        "from rlkit.start import open_run\n"
        "from rlkit.runs import RunError\n"
        "config = resolve('tiny-smoke', name='demo-s0')\n"
        "print('ready', flush=True)\n"
        "for line in iter(sys.stdin.readline, ''):\n"
        "    time.sleep(max(0.0, float(line) - time.time()))\n"
        "    try:\n"
        "        run = open_run(config, {}, max_steps=3)\n"
        "    except RunError:\n"
        "        print('refused', flush=True)\n"
        "        continue\n"
        "    with run:\n"
        "        print('writes', flush=True)\n"
        "        sys.stdin.readline()\n"  # holds the lock until all have answered
        "        run.close('failed')\n"
    )
    pipe = subprocess.PIPE
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = [sys.executable, "-c", code]
    workers = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env) for _ in range(3)
    ]
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    rounds = 3
    for number in range(rounds):
        at = time.time() + 0.05
        for worker, delay in zip(workers, (0.0, 0.0005 * number, 0.001 * number), strict=True):
            assert worker.stdin is not None
            print(at + delay, file=worker.stdin, flush=True)
        said = [worker.stdout.readline() for worker in workers if worker.stdout is not None]
        assert sorted(said) == ["refused\n", "refused\n", "writes\n"]
        print(file=workers[said.index("writes\n")].stdin, flush=True)
        while runs.is_locked(runs_folder / "demo-s0"):
            time.sleep(0.01)
    for worker in workers:
        worker.communicate()
    assert len(list(runs_folder.glob("demo-s0.old-*"))) == rounds - 1


def test_an_interrupt_is_recorded() -> None:
    with pytest.raises(KeyboardInterrupt), start():
        raise KeyboardInterrupt
    assert runs.read_status("demo-s0").error == "interrupted from the keyboard"
    assert runs.read_status("demo-s0").state == "interrupted"
    with pytest.raises(RunError, match="no final weights: its state is 'interrupted'"):
        runs.final_checkpoint("demo-s0")


def test_a_second_writer_is_refused() -> None:
    with start(), pytest.raises(RunError, match="being written by another process"):
        start(fresh=True)


def test_a_torn_last_line_is_left_out() -> None:
    with start() as run:
        run.metrics({"step": 1})
        with (run.path / "metrics.jsonl").open("a") as handle:
            handle.write('{"step": 2, "lo')
    assert runs.read_metrics("demo-s0")["step"].tolist() == [1]


def test_parts_are_merged_and_each_step_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "MERGE_EVERY", 3)
    with start() as run:
        for step in range(1, 8):
            run.rollouts(step, columns(step))
        folder = run.path / "rollouts"
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["step-000007.parquet", "steps-000001-000003.parquet",
                         "steps-000004-000006.parquet"]  # fmt: skip
        # A crash after the rename and before the removal leaves a part beside its merged file.
        run.rollouts(2, columns(2))
    assert runs.read_rollouts("demo-s0")["step"].tolist() == [s for s in range(1, 8) for _ in "ab"]


def test_a_reader_meets_parts_that_are_being_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "MERGE_EVERY", 3)
    with start() as run:
        for step in (1, 2):
            run.rollouts(step, columns(step))
        read = runs.pd.read_parquet

        def slow(path: Path) -> Any:
            if len(runs.rollout_parts(run.path / "rollouts")) > 1:  # the writer is faster, once
                run.rollouts(3, columns(3))
            return read(path)

        monkeypatch.setattr(runs.pd, "read_parquet", slow)
        assert runs.read_rollouts("demo-s0")["step"].tolist() == [1, 1, 2, 2, 3, 3]
        for part in (run.path / "rollouts").iterdir():
            monkeypatch.setattr(runs.pd, "read_parquet", lambda path: read(f"{path}.gone"))
            with pytest.raises(
                FileNotFoundError, match=part.name
            ):  # gone for good: no endless loop
                runs.read_rollouts("demo-s0")


def test_commands_are_numbered_and_read() -> None:
    with start() as run:
        assert run.command() == ("run", 0)
        assert runs.send("demo-s0", "pause") == 1
        assert runs.send("demo-s0", "stop") == 2
        assert run.command() == ("stop", 2)
        (run.path / "control.json").write_text('{"comm')
        assert run.command() == ("run", 0)


def test_a_checkpoint_is_complete_or_absent() -> None:
    def failing(run: Recorder) -> None:
        with run.checkpoint(1) as folder:
            (folder / "half").write_text("x")
            raise OSError("disk full")

    with start() as run:
        with pytest.raises(OSError, match="full"):
            failing(run)
        assert list((run.path / "checkpoints").iterdir()) == []
        assert run.status.checkpoint == ""


def test_readers_name_what_exists() -> None:
    with start():
        pass
    with pytest.raises(RunError, match="Existing runs: demo-s0"):
        runs.read_config("other")
    with pytest.raises(RunError, match="no run 'other'"):
        runs.read_status("other")


WRITER = """
import sys
from rlkit.config import resolve
from rlkit.start import open_run
import resource
limit = int(sys.argv[1])
run = open_run(resolve("tiny-smoke", name="demo-s0"), {}, max_steps=10**6)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
print("ready", flush=True)
with run:
    for step in range(1, 10**6):
        run.rollouts(step, {"step": [step] * 50, "text": ["abc"] * 50})
        run.metrics({"step": step, "loss": 0.5, "note": "x" * 40})
        run.update(step=step)
        if step % 5 == 0:
            with run.checkpoint(step) as folder:
                (folder / "a").write_text("x" * 400)
                (folder / "b").write_text("done")
"""


def writer(limit: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(limit)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
    )


def assert_readable(run: Path) -> int:
    metrics = runs.read_metrics(run)
    steps = metrics["step"].tolist()
    assert steps == list(range(1, len(steps) + 1))
    rollouts = runs.read_rollouts(run)
    assert set(rollouts["step"]) >= set(steps)
    assert (rollouts.groupby("step").size() == 50).all()
    for checkpoint in (run / "checkpoints").glob("step-*"):
        assert (checkpoint / "b").read_text() == "done"
    assert runs.read_config(run) == config()
    return len(steps)


def test_kill_9_leaves_a_readable_folder(runs_folder: Path) -> None:
    run = runs_folder / "demo-s0"
    process = writer()
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or len(runs.read_metrics(run)) < 12:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert runs.is_locked(run)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert assert_readable(run) >= 12
    status = runs.read_status(run)
    assert status.state == "running"
    assert not status.dead  # it may only be slow
    assert runs.read_status(run, now=status.heartbeat + 31).dead
    with start():  # at once: the lock went with the process
        pass


@pytest.mark.parametrize(
    ("limit", "state"),
    [(4000, "failed"), (200, "running")],  # 200 bytes do not even hold the status
)
def test_a_full_disk_leaves_a_readable_folder(runs_folder: Path, limit: int, state: str) -> None:
    process = writer(limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "File too large" in errors
    run = runs_folder / "demo-s0"
    status = runs.read_status(run)
    assert status.state == state
    if state == "failed":
        assert assert_readable(run) >= 1
        assert "File too large" in status.error
    assert runs.read_status(run, now=time.time() + 31).dead == (state == "running")
    assert not list(run.rglob("*.tmp"))
