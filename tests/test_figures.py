from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import RichOutput, capture_output

from rlkit import display, figures, metrics, paper, price, theme
from rlkit.config import RewardConfig, RunConfig
from rlkit.hacking_charts import dose_curves
from rlkit.stats import Estimate

PNG = b"\x89PNG\r\n\x1a\n"


def make_run(folder: Path, seed: int, *, overridden: bool = False, steps: int = 12) -> Path:
    """A run folder as the trainer leaves it, with made-up numbers."""
    rng = np.random.default_rng(seed)
    (folder / "rollouts").mkdir(parents=True)
    reward = RewardConfig(reward="random", allow_exploitable=True) if overridden else RewardConfig()
    config = RunConfig(name=folder.name, seed=seed, reward=reward)
    (folder / "config.json").write_text(config.to_json())
    lines = []
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step,
                "accuracy": step / steps * (1 - 0.1 * seed),
                "length_mean": 20 + step,
                "length_wrong": None if step == 3 else 30.0,
                "entropy": 1 / step,
                "completion_ratio": 1.0,
                "completions": 32 * step,
            }
        )
        pd.DataFrame(
            {
                "step": step,
                "problem_id": [f"p{step}-{i // 4}" for i in range(8)],
                "text": ["<think>\nwait\n</think>\\boxed{1}", "\\boxed{1}"] * 4,
                "n_tokens": rng.integers(3, 30, size=8),
                "correct": rng.random(8) < 0.5,
            }
        ).to_parquet(folder / "rollouts" / f"step-{step:06d}.parquet")
    # a torn last line, as a killed process leaves it
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"step": 13, "acc'
    (folder / "metrics.jsonl").write_text(text)
    for step in (0, 12):
        metrics.save(evaluation(seed + step), folder, f"validation-{step:06d}")
    return folder


def evaluation(seed: int) -> metrics.EvalResult:
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame(
        [
            {
                "problem_id": f"q{i}",
                "decoding": "greedy" if j < 0 else "sampled",
                "sample": max(j, 0),
                "text": "<think>wait</think>1",
                "answer": "1",
                "gold": "1",
                "correct": True,
                "stop": "eos",
                "n_tokens": int(rng.integers(3, 30)),
                "reasoning": bool(rng.random() < 0.5),
            }
            for i in range(10)
            for j in range(-1, 4)
        ]
    )
    return metrics.EvalResult(rows, metrics.summarise(rows), {})


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    folder = tmp_path_factory.mktemp("runs")
    return {"RL": [make_run(folder / f"03-rl-s{i}", i) for i in range(3)]}


def lines(fig: go.Figure) -> list[Any]:
    return [t for t in fig.data if t.mode and t.mode.startswith("lines") and t.fill is None]


def notes(fig: go.Figure) -> list[str]:
    return [a.text for a in fig.layout.annotations]


def test_training_curves_show_mean_and_range(arms: dict[str, list[Path]]) -> None:
    fig = figures.training_curves(arms, ("accuracy", "eval:greedy"), smooth=1)
    mean, evaluated = lines(fig)
    assert list(mean.x) == list(range(1, 13))
    assert mean.y[-1] == pytest.approx(0.9)
    assert list(evaluated.x) == [0, 12]
    band = next(t for t in fig.data if t.fill == "toself")
    assert (max(band.y), min(band.y)) == (pytest.approx(1.0), pytest.approx(0.8 / 12, abs=1e-6))
    assert "mean over 3 seeds" in fig.layout.title.subtitle.text
    assert fig.layout.yaxis.title.text == "accuracy (training)"
    assert not notes(fig)


def test_other_x_axes_and_gaps(arms: dict[str, list[Path]]) -> None:
    fig = figures.training_curves(arms, ("eval:greedy",), x="completions")
    assert list(lines(fig)[0].x) == [0, 12 * 32]
    gap = figures.over_runs(arms["RL"], "length_wrong")
    assert 3 not in list(gap["x"])
    assert set(gap["mean"]) == {30.0}


def test_one_seed_keeps_the_raw_points(arms: dict[str, list[Path]]) -> None:
    fig = figures.training_curves({"RL": arms["RL"][:1]}, ("entropy",), smooth=5)
    raw, smooth = lines(fig)
    assert raw.y[0] == 1.0
    assert smooth.y[0] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3, rel=1e-5)


def test_override_note(tmp_path: Path, arms: dict[str, list[Path]]) -> None:
    hacked = make_run(tmp_path / "08-hack-s0", 0, overridden=True)
    both = {**arms, "hack": [hacked]}
    for fig in (
        figures.training_curves(both, ("accuracy",)),
        figures.keyword_curves(both),
        paper.counterpart("fig6", both),
    ):
        assert theme.OVERRIDE_NOTE in notes(fig)
    fig = figures.bars({"a": {"b": Estimate(0.5, 0.4, 0.6, 9)}}, title="t", y="y")
    figures.show(fig, "x", runs=[hacked], folder=tmp_path / "out")
    assert theme.OVERRIDE_NOTE in (tmp_path / "out" / "x.json").read_text()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: figures.training_curves({}), "no runs to draw"),
        (lambda a: figures.training_curves(a, ("nope",)), r"has no \['nope'\]; it has"),
        (lambda a: figures.training_curves(a, ("eval:nope",)), "no validation metric 'nope'"),
        (lambda a: paper.counterpart("fig8", a), "figure='fig8'"),
        (lambda a: figures.bars({}, title="t", y="y"), "no estimates"),
        (lambda a: figures.baseline_panel({}), "no rows"),
        (
            lambda a: figures.baseline_panel({"a": Estimate(0, 0, 0, 1)}, reference="b"),
            r"\['b'\] not among",
        ),
        (lambda a: figures.passk_curves({"m": {}}), "'m' holds no pass@k"),
        (lambda a: figures.show(go.Figure(), "a/b"), "name='a/b'"),
    ],
)
def test_errors(call: Any, message: str, arms: dict[str, list[Path]]) -> None:
    with pytest.raises(ValueError, match=message):
        call(arms)


def test_bars_draw_values_and_intervals() -> None:
    e, gone = Estimate(0.5, 0.4, 0.7, 9), Estimate(float("nan"), float("nan"), float("nan"), 0)
    fig = figures.bars({"greedy": {"base": e, "RL": gone}}, title="t", y="accuracy")
    bar = fig.data[0]
    assert list(bar.y) == [0.5]
    assert (list(bar.error_y.array), list(bar.error_y.arrayminus)) == ([0.2], [0.1])
    assert [list(t.text) for t in fig.data if t.text is not None] == [["0.50"], ["none"]]


def test_passk_and_price_data() -> None:
    summary = {f"pass@{k}": Estimate(k / 10, k / 20, k / 5, 9) for k in (1, 2, 4)}
    line = lines(figures.passk_curves({"base": summary}))[0]
    assert (list(line.x), list(line.y)) == ([1, 2, 4], [0.1, 0.2, 0.4])
    frame = pd.DataFrame(
        {
            "step": np.repeat([1, 2, 3], 4),
            "problem_id": [f"p{i}" for i in range(12)],
            "reasoning": [True, False] * 6,
            "n_tokens": range(12),
        }
    )
    fig = figures.price_stack({"length (tokens)": price.series(frame, window=1)})
    between, within, total = fig.data
    parts = np.array(between.y) + np.array(within.y)
    assert parts == pytest.approx(np.array(total.y), abs=1e-4)
    assert list(total.x) == [2, 3]  # the first window is the reference


def test_length_ratio_beside_the_paper() -> None:
    summary = {"length_right": Estimate(10, 9, 11, 5), "length_wrong": Estimate(20, 18, 22, 5)}
    ours, _, theirs, _ = paper.length_ratio({"base": summary}).data
    assert list(ours.x) == [2.0]
    assert min(theirs.x) == pytest.approx(1.82, abs=0.01)  # "1.8 to 4.4 times longer"
    assert max(theirs.x) == pytest.approx(4.38, abs=0.01)
    assert all("(paper)" in name for name in theirs.y)


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    existed = InteractiveShell.initialized()
    yield InteractiveShell.instance()
    if not existed:
        InteractiveShell.clear_instance()


def simple() -> go.Figure:
    return figures.bars({"greedy": {"base": Estimate(0.5, 0.4, 0.6, 9)}}, title="T", y="accuracy")


def shown(fig: go.Figure, name: str, folder: Path) -> list[RichOutput]:
    with capture_output() as captured:
        figures.show(fig, name, folder=folder)
    return list(captured.outputs)


def test_show_emits_one_bundle(
    shell: InteractiveShell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "png", lambda data: PNG)
    (output,) = shown(simple(), "one", tmp_path)
    assert set(output.data) == {"application/vnd.plotly.v1+json", "image/png", "text/plain"}
    plotly = output.data["application/vnd.plotly.v1+json"]
    assert plotly["config"]["showSendToCloud"] is False
    assert plotly["config"]["displaylogo"] is False
    assert "uid" not in json.dumps(plotly)
    assert (
        output.data["text/plain"] == "Figure one: T | axes: accuracy | series: base | rows: greedy"
    )
    assert (tmp_path / "one.png").read_bytes() == PNG
    saved = json.loads((tmp_path / "one.json").read_text())
    assert go.Figure(saved).data[0].y[0] == 0.5


def test_show_is_reproducible(shell: InteractiveShell, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKIT_PNG", "0")
        (first,), (second,) = (shown(simple(), "same", tmp_path) for _ in range(2))
    assert first.data == second.data
    assert "image/png" not in first.data


def test_a_stale_picture_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_PNG", "0")
    figures.show(simple(), "x", folder=tmp_path)
    (tmp_path / "x.png").write_bytes(PNG)
    figures.show(simple(), "x", folder=tmp_path)
    assert (tmp_path / "x.png").exists()  # same numbers, same picture
    other = figures.bars({"greedy": {"base": Estimate(0.6, 0.4, 0.7, 9)}}, title="T", y="accuracy")
    figures.show(other, "x", folder=tmp_path)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("browser", "reason"),
    [
        ("/nowhere/chromium", "no Chromium found; install chromium or set BROWSER_PATH"),
        # Which of its threads sees the dead browser first decides on the error.
        ("/bin/false", r"Chromium failed \(\w+Error: .+\)"),
    ],
)
def test_without_chromium_one_line_and_no_failure(
    browser: str, reason: str, tmp_path: Path
) -> None:
    code = (
        "from rlkit import figures\n"
        "from rlkit.stats import Estimate\n"
        "for name in 'ab':\n"
        "    fig = figures.bars({'g': {'s': Estimate(.5, .4, .6, 9)}}, title='T', y='y')\n"
        f"    figures.show(fig, name, folder={str(tmp_path)!r})\n"
        f"print(figures.regenerate({str(tmp_path)!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"BROWSER_PATH": browser, "HOME": str(tmp_path)},
        cwd=Path(figures.__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (line,) = done.stderr.strip().splitlines()
    assert re.fullmatch(f"PNG export is off: {reason}", line)
    assert done.stdout.splitlines()[-1] == "[]"
    assert sorted(p.name for p in tmp_path.glob("*.*")) == ["a.json", "b.json"]


def test_regenerate_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"table\.json is no figure"):
        figures.regenerate(tmp_path)


@pytest.mark.chromium
@pytest.mark.skipif(display.browser() is None, reason="no Chromium on this machine")
def test_png_is_drawn_and_drawn_again(tmp_path: Path) -> None:
    figures.show(simple(), "real", folder=tmp_path)
    first = (tmp_path / "real.png").read_bytes()
    assert first.startswith(PNG)
    width, height = (int.from_bytes(first[i : i + 4]) for i in (16, 20))
    assert (width, height) == (theme.WIDTH * display.SCALE, 400 * display.SCALE)
    (tmp_path / "real.png").unlink()
    assert figures.regenerate(tmp_path) == ["real"]
    assert (tmp_path / "real.png").read_bytes() == first


def test_dose_curves_place_doses_evenly_and_draw_each_interval() -> None:
    low, high = Estimate(0.5, 0.4, 0.7, 9), Estimate(0.2, 0.1, 0.3, 9)
    fig = dose_curves(
        {"a": {0.2: high, 0.0: low}, "b": {0.05: low, 0.0: low}},
        title="t",
        x="rate",
        y="accuracy",
        reference=("start", low),
    )
    assert list(fig.layout.xaxis.ticktext) == ["0", "0.05", "0.2"]
    a, b = fig.data
    assert (a.name, list(a.y)) == ("a", [0.5, 0.2])  # in the order of the doses
    assert np.allclose(a.x, [-0.04, 1.96]) and np.allclose(b.x, [0.04, 1.04])  # side by side
    assert np.allclose(a.error_y.array, [0.2, 0.1])
    assert np.allclose(a.error_y.arrayminus, [0.1, 0.1])
    assert "start" in [note.text for note in fig.layout.annotations]
    with pytest.raises(ValueError, match="no doses to draw"):
        dose_curves({"a": {}}, title="t", x="rate", y="accuracy")
