"""Stored measurements: made once per setting, never mistaken for another one."""

import pytest
from tiny import save_tiny_model

from rlkit import measure as module
from rlkit.measure import measure


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
