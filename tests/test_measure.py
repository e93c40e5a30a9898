"""Stored measurements: made once per setting, never mistaken for another one."""

import pytest
from tiny import save_tiny_model

from rlkit import evaluate
from rlkit import measure as module
from rlkit.config import ToolConfig
from rlkit.measure import measure
from rlkit.sandbox import Limits, PythonExecutor
from rlkit.tool_probes import Falsified


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("RLKIT_RUNS", str(tmp_path / "runs"))
    return save_tiny_model(tmp_path / "model")


def few(model, **changes):
    settings = dict(problems=4, samples=3, max_completion_length=12) | changes
    return measure(model, "chain", split="validation", **settings)


def test_the_same_question_is_answered_from_the_file(model, monkeypatch) -> None:
    first = few(model)
    monkeypatch.setattr(module, "load_engine", None)  # any further sampling would fail
    again = few(model)
    assert again.rows.equals(first.rows)
    assert again["pass@1"] == first["pass@1"]
    with pytest.raises(TypeError):
        few(model, seed=1)


def test_other_settings_and_other_weights_are_measured_anew(model) -> None:
    first = few(model)
    assert not few(model, temperature=2.0).rows["text"].equals(first.rows["text"])
    assert len(few(model, samples=5).rows) > len(first.rows)
    save_tiny_model(model, seed=5)
    assert not few(model).rows["text"].equals(first.rows["text"])


def test_forced_reasoning_starts_every_response(model) -> None:
    rows = few(model, force_reasoning=True).rows
    assert rows["text"].str.startswith("<think>").all()
    assert not few(model).rows["text"].str.startswith("<think>").all()


def test_a_larger_sample_extends_the_smaller_one(model) -> None:
    small, large = few(model).rows, few(model, samples=5).rows
    keys = ["problem_id", "decoding", "sample"]
    both = small.merge(large, on=keys, suffixes=("", "_large"))
    assert len(both) == len(small)
    assert (both["text"] == both["text_large"]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "runs"}, "mode='runs': expected one of"),
        ({"executor": Falsified(None)}, "mode='written' with an executor"),
        ({"force": "a", "force_reasoning": True}, "force='<think>a'"),
        ({"mode": "none", "force": "```python\n"}, "which mode='none' bans"),
    ],
)
def test_settings_that_would_mislead_are_refused(model, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        few(model, **settings)


def test_what_runs_the_code_tells_measurements_apart(model, tmp_path) -> None:
    """And an executor like the one that would be made is that one."""
    run = tmp_path / "runs" / f"models-{model.name}"
    rules = ToolConfig(tool="python", tool_seconds=2)
    usual, short = Limits(2, 6), Limits(1, 6)

    def count(**settings) -> int:
        few(model, samples=1, problems=1, mode="run", tools=rules, **settings)
        return len(evaluate.names(run))

    assert count() == 1
    with PythonExecutor(usual) as same:
        assert count(executor=same) == 1
        assert count(executor=Falsified(same)) == 2
        assert count(executor=Falsified(same, seed=1)) == 3
    for number, other in enumerate(({"limits": short}, {"seed": 1}, {"packages": ()}), 4):
        with PythonExecutor(**({"limits": usual} | other)) as executor:
            assert count(executor=executor) == number
            assert count(executor=executor) == number
