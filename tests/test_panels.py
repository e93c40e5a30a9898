"""Panels, their differences, the runs behind them, and the tables of the notebooks."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from tiny import save_tiny_model, tiny_config

from rlkit import arms, metrics, panels, report, runs
from rlkit.config import RunConfig, resolve
from rlkit.panels import Entry
from rlkit.price import decompose
from rlkit.stats import Estimate

DIRECT = r"\boxed{27}"
FINE = "<think>19+14=33\n33-6=27\n</think>\\boxed{27}"


def result(correct, lengths=None, texts=None) -> metrics.EvalResult:
    """An evaluation with ``correct`` [problems][samples]; a right answer is 27, a wrong one 0."""
    rows = []
    for p, line in enumerate(correct):
        for j, ok in enumerate(line):
            rows.append(
                {
                    "problem_id": f"p{p:03d}",
                    "decoding": "sampled",
                    "sample": j,
                    "text": texts[p][j] if texts else DIRECT,
                    "answer": "27" if ok else "0",
                    "gold": "27",
                    "correct": bool(ok),
                    "stop": "eos",
                    "n_tokens": lengths[p][j] if lengths else 10,
                    "reasoning": bool(texts) and "<think>" in texts[p][j],
                }
            )
    frame = pd.DataFrame(rows)
    return metrics.EvalResult(frame, metrics.summarise(frame))


def drawn(rate, seed, problems=40, samples=8):
    return (np.random.default_rng(seed).random((problems, samples)) < rate).tolist()


def test_values_are_seeds_problems_samples_in_a_fixed_order():
    one, two = [[1, 0], [0, 0], [1, 1]], [[0, 0], [0, 1], [1, 1]]
    shuffled = result(one)
    shuffled = metrics.EvalResult(shuffled.rows.sample(frac=1, random_state=1), shuffled.summary)
    values = Entry("x", (shuffled, result(two))).values()
    assert values.tolist() == [one, two]


def test_maj_and_pass_have_one_value_per_problem():
    entry = Entry("x", (result([[1, 1, 0], [0, 0, 1]]),))
    assert entry.by("maj@3").values().tolist() == [[[1.0], [0.0]]]
    assert entry.by("pass@3").values().tolist() == [[[1.0], [1.0]]]


def test_tokens_count_every_voter():
    entry = Entry("x", (result([[1, 0]], lengths=[[10, 20]]),))
    assert entry.tokens() == 15
    assert entry.by("maj@2").tokens() == 30


def test_one_seed_is_about_the_checkpoint_and_many_about_the_recipe():
    old = Entry("old", (result(drawn(0.3, 0)),))
    high = tuple(result(drawn(0.8, seed)) for seed in range(1, 8))
    single = panels.contrast(Entry("new", high[:1]), old, 0.03)
    assert (single.scope, single.verdict.conclusion) == ("this checkpoint", "BETTER")
    assert single.difference.value == pytest.approx(
        np.mean(high[0].rows["correct"]) - np.mean(old.results[0].rows["correct"])
    )
    few = panels.contrast(Entry("new", high[:3]), old, 0.03)
    assert few.verdict.conclusion == "INCONCLUSIVE"
    many = panels.contrast(Entry("new", high), old, 0.03)
    assert (many.scope, many.verdict.conclusion) == ("recipe, 7 seeds", "BETTER")
    assert len(many.per_seed) == 7
    back = panels.contrast(old, Entry("new", high), 0.03)
    assert back.verdict.conclusion == "WORSE"
    assert back.difference.value == pytest.approx(-many.difference.value)


def test_sample_counts_may_differ():
    new = Entry("new", (result(drawn(0.8, 1, samples=8)),))
    old = Entry("old", (result(drawn(0.3, 2, samples=4)),))
    found = panels.contrast(new, old, 0.03).difference.value
    assert found == pytest.approx(new.values().mean() - old.values().mean())


def test_other_problems_or_seed_counts_are_refused():
    a, b = result(drawn(0.5, 1, problems=3)), result(drawn(0.5, 1, problems=4))
    with pytest.raises(ValueError, match="different problems"):
        panels.contrast(Entry("a", (a,)), Entry("b", (b,)), 0.03)
    with pytest.raises(ValueError, match="2 seeds and 'b' 3"):
        panels.contrast(Entry("a", (a, a)), Entry("b", (a, a, a)), 0.03)


def test_no_difference_anywhere_is_no_proof_of_equivalence_on_few_problems():
    same = Entry("x", (result(drawn(0.5, 1, problems=10)),))
    found = panels.contrast(same, same, 0.03)
    assert found.difference.low < -0.2
    assert found.verdict.conclusion == "INCONCLUSIVE"
    large = Entry("x", (result([[1]] * 300),))
    assert panels.contrast(large, large, 0.03).verdict.conclusion == "EQUIVALENT"
    seven = Entry("x", (result([[1]] * 10),) * 7)
    assert seven.estimate().low < 0.8
    assert panels.contrast(seven, seven, 0.03).verdict.conclusion == "INCONCLUSIVE"


def test_the_best_baseline_is_the_highest():
    rates = {"a": 0.2, "b": 0.6, "c": 0.9}
    low, high, rl = (Entry(name, (result(drawn(rate, 3)),)) for name, rate in rates.items())
    panel = panels.Panel("chain", low, rl, low, (low, high), ())
    assert panel.best is high
    text = report.panel_table(panel)
    assert next(line for line in text.splitlines() if line.endswith("best without RL"))[0] == "b"


def test_conditional_gap_by_hand():
    rows = result([[1, 0], [1, 1]], lengths=[[30, 10], [20, 46]]).rows
    gap = panels.conditional_gap(rows, "n_tokens", rows["correct"])
    assert gap.value == pytest.approx(32 - 10)
    assert gap.low <= gap.value <= gap.high
    everything = panels.conditional_gap(rows, "n_tokens", [True] * 4)
    assert math.isnan(everything.value)
    wrong = result([[0, 0]] * 5, lengths=[[1, 2]] * 5).rows
    assert math.isnan(panels.conditional_gap(wrong, "correct", wrong["n_tokens"] > 1).value)


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RLKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("RLKIT_HEADLESS", "1")
    return tmp_path


SIZES = {
    "seeds": 2,
    "random_steps": 1,
    "random_learning_rate": 1e-4,
    "rft_epochs": 1,
    "rft_batch_size": 4,
    "rft_learning_rate": 1e-3,
}


def test_names_seeds_and_settings_of_the_arms():
    rl = resolve("tiny", task="edge", steps=7)
    plan = arms.configs(rl, "base", **SIZES)
    assert [c.name for configs in plan.values() for c in configs] == [
        "edge-base-s0", "edge-base-s1", "edge-base-random-s0", "edge-base-random-s1",
        "edge-base-rft-s0", "edge-base-rft-s1",
    ]  # fmt: skip
    assert [c.seed for c in plan["rl"]] == [0, 1]
    assert plan["rl"][0].train == rl.train
    assert plan["random"][0].reward.reward == "random"
    assert plan["random"][0].train.steps == 1
    assert plan["random"][0].train.learning_rate == 1e-4
    assert plan["rft"][0].train.steps == 7, "as many completions as RL"
    assert plan["rft"][0].train.learning_rate == 1e-3
    assert all(RunConfig.from_json(c.to_json()) == c for cs in plan.values() for c in cs)


def test_rejection_sampling_keeps_distinct_rewarded_answers_of_the_model(home):
    rl = tiny_config(save_tiny_model(home / "model"))  # a coin rewards about half
    documents = arms.rejection_sample(rl)
    assert 0 < len(documents) < rl.train.steps * rl.train.batch_size
    assert documents == arms.rejection_sample(rl)
    keys = {(d["prompt"][0]["content"], d["completion"]) for d in documents}
    assert len(keys) == len(documents)


def test_rejection_sampling_says_when_nothing_was_right(home):
    rl = tiny_config(save_tiny_model(home / "model"), reward="accuracy", allow_exploitable=False)
    with pytest.raises(ValueError, match="none of 32 completions"):
        arms.rejection_sample(rl)


def test_runs_are_shared_by_name_and_moved_aside_when_settings_change(home):
    rl = tiny_config(save_tiny_model(home / "model"), steps=1)
    plan = arms.configs(rl, "base", **{**SIZES, "seeds": 1})
    first = arms.train(plan)
    assert set(first) == {"rl", "random", "rft"}
    marks = {arm: json.loads((r / "status.json").read_text()) for arm, [r] in first.items()}
    assert {mark["state"] for mark in marks.values()} == {"done"}
    assert arms.drawn(first["rft"][0]) == arms.drawn(first["rl"][0]) == 16
    again = arms.train(plan)
    assert again == first
    assert all(
        json.loads((r / "status.json").read_text()) == marks[arm] for arm, [r] in again.items()
    )
    longer = arms.configs(tiny_config(home / "model", steps=2), "base", **{**SIZES, "seeds": 1})
    changed = arms.train(longer)
    assert runs.read_status(changed["rl"][0]).max_steps == 2
    assert (home / "runs" / "chain-base-s0.old-1" / "config.json").is_file()
    assert (home / "runs" / "chain-base-rft-s0.old-1" / "config.json").is_file()
    assert not (home / "runs" / "chain-base-random-s0.old-1").exists()
    assert arms.drawn(changed["rft"][0]) == 32
    assert 0 < arms.kept(changed["rft"][0]) < 32


# --- tables ---------------------------------------------------------------------------------------


def test_columns_line_up_and_numbers_stand_right():
    lines = report.table(["name", "n"], [["a", 5], ["long name", 1234]]).splitlines()
    assert lines[2:] == ["a             5", "long name  1234"]


def test_predictions_are_judged_by_the_interval():
    ranges = {"in": (0.0, 1.0), "out": (0.0, 0.1), "across": (0.0, 0.5), "none": (0.0, 1.0)}
    nan = math.nan
    measured = {
        "in": Estimate(0.5, 0.4, 0.6, 9),
        "out": Estimate(0.5, 0.4, 0.6, 9),
        "across": Estimate(0.5, 0.4, 0.6, 9),
        "none": Estimate(nan, nan, nan, 0),
    }
    lines = report.prediction_table(ranges, measured).splitlines()[2:]
    assert [line.split()[-1] for line in lines] == ["held", "missed", "unclear", "undefined"]
    with pytest.raises(ValueError, match="extra"):
        report.prediction_table(ranges, {**measured, "extra": measured["in"]})


def test_style_summary_shares_and_accuracy():
    rows = result([[1, 0], [1, 1]], texts=[[FINE, DIRECT], [FINE, FINE]]).rows
    summary = report.style_summary(rows)
    assert list(summary) == ["direct", "fine"]
    assert summary["fine"]["share"].value == 0.75
    assert summary["fine"]["accuracy"].value == 1.0
    assert summary["direct"]["accuracy"].value == 0.0


def test_a_mere_change_of_the_mix_lies_between_the_styles():
    before = result([[0, 0, 0, 1]] * 3, [[5, 5, 5, 25]] * 3, [[DIRECT] * 3 + [FINE]] * 3)
    after = result([[0, 1, 1, 1]] * 3, [[5, 25, 25, 25]] * 3, [[DIRECT] + [FINE] * 3] * 3)
    split = decompose(before.rows, after.rows, labels=report.by_style)
    assert split.total.value == pytest.approx(10)
    assert report.between_share(split).value == pytest.approx(1)
    assert "fine" in report.price_table(split)
    same = decompose(before.rows, before.rows, labels=report.by_style)
    assert math.isnan(report.between_share(same).value)


def test_printed_samples_are_drawn_not_picked_and_stay_text():
    rows = result([[1, 0]] * 5, texts=[["<think><b>1</b>\n</think>x", DIRECT]] * 5).rows
    text = report.samples_text(rows)
    assert text == report.samples_text(rows)
    assert "<b>1</b>" in text
    assert text.count("[direct, wrong]") == 1


def test_style_stack_sums_to_one(home):
    run = arms.obtain(tiny_config(save_tiny_model(home / "model")))
    figure = report.style_stack({"RL": [run]}, window=1)
    total = np.sum([trace.y for trace in figure.data], axis=0)
    assert np.allclose(total, 1)
    assert len(total) == 2


def test_config_changes_names_what_differs():
    rl = resolve("tiny", steps=7)
    plan = arms.configs(rl, "base", **SIZES)
    line = report.config_changes(plan["rl"][0], plan["random"][0])
    assert "reward accuracy → random" in line
    assert "steps 7 → 1" in line
    assert "seed" not in line
    assert "chain-base-s0" in report.config_table(plan["rl"][0], plan["random"][0])
