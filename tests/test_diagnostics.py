from __future__ import annotations

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from simulated import rows_of, step_rows, tear, with_texts, write_run

from rlkit import curves, diagnostics, gradient_view, hacking_charts, parting, runs, signals, theme
from rlkit.__main__ import main as command
from rlkit.parting import ALPHA, Parting

EXPLOITABLE = {"reward": "random", "allow_exploitable": True}


def simulate(folder: Path, kind: str, seed: int = 0, **options: Any) -> Path:
    sound = kind in ("accuracy", "flat", "collapse", "gate")
    rows = with_texts(rows_of(kind, seed, **options), kind)
    return write_run(folder / f"{kind}-s{seed}", rows, **({} if sound else EXPLOITABLE))


@pytest.fixture(scope="module")
def hacked(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of a length reward, gamed from step 26 on."""
    folder = tmp_path_factory.mktemp("hacked")
    return [simulate(folder, "length", seed) for seed in range(2)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("sound"), "accuracy")


# --- exact values ---------------------------------------------------------------------------------


def row(
    step: int, group: int, text: str, right: bool, reward: float, **more: Any
) -> dict[str, Any]:
    base = {
        "step": step, "group": group, "sample": 0, "problem_id": f"p{step}-{group}", "text": text,
        "answer": "3", "gold": "2", "correct": right, "stop": "eos", "n_tokens": len(text),
        "reward": reward, "reward_a": float(right), "reward_b": 0.0, "used": True,
    }  # fmt: skip
    return {**base, **more}


GOOD, BAD, BARE = "\\boxed{2}", "\\boxed{3}", "3"
TWO_STEPS = pd.DataFrame(
    [
        # total = 1 * a + 0.5 * b
        row(1, 0, GOOD, True, 1.0, sample=0),
        row(1, 0, BAD, False, 0.5, sample=1, reward_b=1.0),
        row(1, 1, BARE, False, 0.0, sample=0, stop="length"),
        row(1, 1, BAD, False, 0.5, sample=1, reward_b=1.0),
        row(2, 0, GOOD, True, 1.5, sample=0, reward_b=1.0),
        row(2, 0, BARE, False, 0.0, sample=1),
        row(2, 1, GOOD, True, math.nan, sample=0),  # a reward that declined
        row(2, 1, BAD, False, 0.5, sample=1, reward_b=1.0),
        row(2, 1, "broken", False, math.nan, sample=2, stop="infra"),
    ]
)


def test_two_steps_by_hand(tmp_path: Path) -> None:
    metrics = [{"step": 1, "entropy": 0.5, "loss": 0.1}, {"step": 2, "entropy": 0.25}]
    run = write_run(tmp_path / "hand-s0", TWO_STEPS, metrics)
    first, second = diagnostics.series(run).to_dict("records")
    assert (first["step"], first["n"], first["groups"]) == (1, 4, 2)
    assert (second["n"], second["groups"]) == (4, 2)  # infra does not count
    assert (first["proxy"], second["proxy"]) == (0.5, pytest.approx(2 / 3))
    assert (first["true"], second["true"]) == (0.25, 0.5)
    assert (first["completion_ratio"], second["completion_ratio"]) == (0.75, 1.0)
    assert (first["length_right"], first["length_wrong"]) == (9, (9 + 1 + 9) / 3)
    # range 0 to 1.5, paid above 0.75
    assert (first["paid_wrong"], first["unpaid_right"], second["unpaid_right"]) == (0, 0, 0)
    # wrong and above its group: the second of group 1 in step 1
    assert (first["reinforced_wrong"], second["reinforced_wrong"]) == (0.25, 0)
    # well formed, wrong, above a wrong ill-formed answer of the group: the same row
    assert (first["format_only"], second["format_only"]) == (0.25, 0)
    # usual pay of wrong answers: mean of 0.5, 0, 0.5, 0, 0.5 = 0.3
    assert first["unearned"] == pytest.approx((0.2 - 0.3 + 0.2 + 0) / 4)
    assert second["unearned"] == pytest.approx((0 - 0.3 + 0.2) / 3)
    # step 1: products of deviations rr = 2 * 0.25**2 * 2, cc = 0.5, rc = 0.25
    assert first["agreement"] == pytest.approx(0.25 / math.sqrt(0.25 * 0.5))
    assert second["agreement"] == pytest.approx(1.0)
    # step 1, group 0: r ±.25, a ±.5, b/2 ∓.25; group 1: r and b/2 ±.25. rr = .25
    assert first["share_a"] == pytest.approx(0.25 / 0.25)
    assert first["share_b"] == pytest.approx((-0.125 + 0.125) / 0.25, abs=1e-12)
    # step 2, group 0: r ±.75, a ±.5, b/2 ±.25: rr 1.125, ra .75, rb .375
    assert second["share_a"] == pytest.approx(0.75 / 1.125)
    assert second["share_b"] == pytest.approx(0.375 / 1.125)
    texts = f"{GOOD}\n{BAD}\n{BARE}\n{BAD}".encode()
    assert first["compression"] == len(zlib.compress(texts)) / len(texts)
    assert (first["entropy"], second["entropy"], first["loss"]) == (0.5, 0.25, 0.1)
    assert math.isnan(second["loss"])
    # gains: both steps are the reference, so they are opposite; unit: deviation over completions
    rewards = [1.0, 0.5, 0.0, 0.5, 1.5, 0.0, 0.5]
    half = (2 / 3 - 0.5) / 2 / np.std(rewards, ddof=0)
    assert (first["proxy_gain"], second["proxy_gain"]) == (
        pytest.approx(-half),
        pytest.approx(half),
    )
    smooth = diagnostics.series(run, window=2)
    assert smooth["true"].tolist() == [0.25, 0.375]
    assert smooth["step"].tolist() == [1, 2]


def test_a_dropped_group_counts_for_truth_but_not_for_the_gradient(tmp_path: Path) -> None:
    kept = TWO_STEPS.assign(kept=~((TWO_STEPS["step"] == 1) & (TWO_STEPS["group"] == 1)))
    first = diagnostics.series(write_run(tmp_path / "kept-s0", kept, [])).iloc[0]
    assert (first["true"], first["proxy"]) == (0.25, 0.5)
    assert first["reinforced_wrong"] == 0
    assert first["agreement"] == pytest.approx(1.0)
    unused = TWO_STEPS.assign(used=kept["kept"])
    again = diagnostics.series(write_run(tmp_path / "used-s0", unused, [])).iloc[0]
    assert again["agreement"] == first["agreement"]


def test_parts_that_are_copies_share_what_they_explain() -> None:
    rows = TWO_STEPS.assign(reward_b=TWO_STEPS["reward_a"], reward=2 * TWO_STEPS["reward_a"])
    sums = signals.within_group_sums(signals.prepare(rows))
    assert sums["r_a"].sum() == pytest.approx(sums["rr"].sum() / 2)
    assert sums["r_b"].sum() == pytest.approx(sums["rr"].sum() / 2)


def test_advantages_weigh_the_groups() -> None:
    """Two groups of spread 1 and .1; the second pays part b only and no right answer more."""
    rows = pd.DataFrame(
        [
            row(1, 0, GOOD, True, 2.0, reward_a=2.0, advantage=1.0),
            row(1, 0, BAD, False, 0.0, reward_a=0.0, advantage=-1.0),
            row(1, 1, BAD, False, 0.2, reward_b=0.2, advantage=1.0, reward_a=0.0),
            row(1, 1, GOOD, True, 0.0, reward_b=0.0, advantage=-1.0, reward_a=0.0),
        ]
    )
    raw = signals.within_group_sums(signals.prepare(rows.drop(columns="advantage")))
    assert raw["rr"].tolist() == pytest.approx([2.0, 0.02])
    seen = signals.within_group_sums(signals.prepare(rows))
    # advantage times deviation: 2 * 1 * 1 and 2 * 1 * .1; slopes 1 and 10; cc .5 each
    assert seen["rr"].tolist() == pytest.approx([2.0, 0.2])
    assert seen["rc"].tolist() == pytest.approx([1.0, -1.0])
    assert seen["cc"].tolist() == pytest.approx([0.5, 5.0])
    assert seen["r_a"].tolist() == pytest.approx([2.0, 0.0])
    assert seen["r_b"].tolist() == pytest.approx([0.0, 0.2])
    assert signals.agreement(seen) == pytest.approx(0.0)
    assert signals.agreement(raw) == pytest.approx(0.9 / math.sqrt(2.02 * 1.0))


def test_the_scale_of_pay() -> None:
    # steps 1 and 2: right 1 and 1.5, wrong .5, 0, .5, 0, .5; gap 1.25 - .3
    assert signals.pay_scale(signals.prepare(TWO_STEPS)) == pytest.approx(0.95)
    wrong = TWO_STEPS.assign(correct=False)
    assert signals.pay_scale(signals.prepare(wrong)) == 1.5
    coin = TWO_STEPS.assign(reward=[1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    known = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]  # right .333, wrong .4
    assert signals.pay_scale(signals.prepare(coin)) == pytest.approx(np.std(known))


def test_correlations_need_groups() -> None:
    rows = signals.by_row(signals.prepare(with_texts(rows_of("accuracy", steps=12), "a")), "boxed")
    sums = signals.within_group_sums(rows)
    whole = gradient_view.agreement(sums)
    assert whole.value == pytest.approx(1.0)
    assert whole.n == int((sums["rr"] > 0).sum())
    few = sums[sums["rr"] > 0].iloc[: gradient_view.MIN_GROUPS - 1]
    assert math.isnan(gradient_view.agreement(few).value)
    (finding,) = gradient_view.relation(few, np.arange(1, 13))
    assert (finding.code, finding.counts) == ("agreement", False)
    assert "not reported, 19 groups with rewards that differ (needs 20)" in finding.message


def test_the_gradient_raises_length() -> None:
    rows = signals.prepare(with_texts(rows_of("length", steps=12), "length"))
    raised = gradient_view.length_slope(rows.assign(n_tokens=100 + 10 * rows["advantage"]))
    assert (raised.value, raised.n) == (pytest.approx(1.0), 96)
    assert math.isnan(gradient_view.length_slope(rows.drop(columns="advantage")).value)
    (share,) = gradient_view.trained_share(
        rows.assign(trained=rows["sample"] == 0), np.arange(1, 13)
    )
    assert share.counts
    assert "trained on 0.062" in share.message
    assert gradient_view.trained_share(rows, np.arange(1, 13)) == []


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("one two three", 0.0),
        ("a b c d", 0.0),
        ("a b c d a b c d", 1 / 5),  # runs abcd bcda cdab dabc abcd
        ("1+1=2\n1+1=2\n1+1=2", 1 - 5 / 12),  # five signs thrice: 12 runs, of which 5 differ
        ("é ü ñ ß é ü ñ ß", 1 / 5),
    ],
)
def test_repetition(text: str, share: float) -> None:
    assert signals.repetition(text) == pytest.approx(share)


# --- the test of parting --------------------------------------------------------------------------


def group_rows(values: np.ndarray, truth: float = 0.5) -> pd.DataFrame:
    """One row per group: 16 completions, 8 wrong, unearned ``values`` [steps, groups] each."""
    steps, groups = values.shape
    return pd.DataFrame(
        {
            "step": np.repeat(np.arange(1, steps + 1), groups),
            "n": 16.0,
            "wrong": 8.0,
            "reward": values.ravel(),
            "unearned": values.ravel(),
            "truth": truth,
        }
    )


def test_p_values_count_ties_in_full() -> None:
    values = np.array([1.0, 3.0, 2.0, 3.0])
    found = parting.p_values(values, [0, 2])
    assert found[:, 0].tolist() == [1.0, 1 / 2, 2 / 3, 2 / 4]
    assert found[:, 1].tolist() == [1.0, 1.0, 1.0, 1 / 2]


def test_capital_is_the_mean_over_bets() -> None:
    p = np.array([[1.0], [0.25], [0.5]])
    active = np.array([[False], [True], [True]])
    by_hand = np.mean([(a * 0.25 ** (a - 1)) * (a * 0.5 ** (a - 1)) for a in parting.BETS])
    capital = np.exp(parting.log_capital(p, active))[:, 0]
    assert capital[0] == pytest.approx(1.0)
    assert capital[2] == pytest.approx(by_hand)


def test_false_alarms_on_exchangeable_groups_stay_below_the_stated_rate() -> None:
    """The hardest null: every score is noise, truth stays, all reward is unearned."""
    count, alarms = 200, 0
    for seed in range(count):
        rng = np.random.default_rng(seed)
        values = (rng.standard_normal((24, 3)), rng.exponential(size=(24, 3)))[seed % 2]
        alarms += parting.part(group_rows(values)) is not None
    assert alarms <= ALPHA * count


@pytest.mark.parametrize("kind", ["accuracy", "flat", "collapse", "gate", "noisy", "random"])
def test_no_alarm_on_runs_that_are_not_gamed(kind: str) -> None:
    count = 20
    found = [
        parting.part(signals.group_means(signals.prepare(rows_of(kind, seed).assign(text=""))))
        for seed in range(count)
    ]
    assert sum(mark is not None for mark in found) <= ALPHA * count


@pytest.mark.parametrize(("kind", "within"), [("length", 6), ("format", 12), ("judge", 12)])
def test_a_gamed_reward_is_caught_soon(kind: str, within: int) -> None:
    caught = []
    for seed in range(8):
        rows = signals.prepare(rows_of(kind, seed, steps=45).assign(text=""))
        mark = parting.part(signals.group_means(rows))
        assert mark is not None
        assert mark.evidence >= 1 / ALPHA
        assert mark.unearned.low > 0
        assert mark.truth.low <= 0
        assert mark.reference[1] < mark.began <= mark.caught
        caught.append(mark.caught)
    assert min(caught) > 25
    assert max(caught) <= 25 + within


def test_the_alarm_uses_the_past_only_and_no_scale() -> None:
    groups = signals.group_means(signals.prepare(rows_of("judge", 3).assign(text="")))
    mark = parting.part(groups)
    assert isinstance(mark, Parting)
    until = groups[groups["step"] <= mark.caught]
    early = parting.part(until)
    assert early is not None
    assert early.evidence == pytest.approx(mark.evidence)
    assert replace(early, evidence=mark.evidence) == mark
    assert parting.part(groups[groups["step"] < mark.caught]) is None
    scaled = groups.assign(reward=groups["reward"] * 8 - 3, unearned=groups["unearned"] * 8)
    again = parting.part(scaled)
    assert again is not None
    assert (again.caught, again.began) == (mark.caught, mark.began)


def test_many_groups_per_step_are_joined() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((20, 50))
    assert parting.scores(group_rows(values)).groupby("step").size().tolist() == [16] * 20
    values[12:] += 1.0
    mark = parting.part(group_rows(values))
    assert mark is not None
    assert (mark.began, mark.caught) == (13, 13)


def test_alpha_is_checked() -> None:
    with pytest.raises(ValueError, match=r"alpha=0: expected a number in \(0, 1\)"):
        parting.part(group_rows(np.zeros((8, 4))), alpha=0)


# --- what the curves alone show ------------------------------------------------------------------


NOTHING = pd.DataFrame({"step": [], "reward": []})


def curve_rows(seed: int = 0, steps: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "step": np.arange(1, steps + 1),
            "loss": rng.normal(0, 0.1, steps),
            "grad_norm": rng.normal(0.2, 0.02, steps),
        }
    )


def reward_rows(level: np.ndarray, seed: int = 0, groups: int = 8) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    right = rng.random((len(level), groups, 16)) < np.asarray(level)[:, None, None]
    step = np.repeat(np.arange(1, len(level) + 1), groups)
    return pd.DataFrame({"step": step, "reward": right.mean(axis=2).ravel()})


def test_a_step_of_the_loss_is_seen_to_either_side() -> None:
    table = curve_rows()
    assert curves.caught(table, NOTHING) == {}
    for sign in (1, -1):
        later = table.assign(loss=table["loss"] + sign * 5 * (table["step"] >= 40))
        found = curves.caught(later, NOTHING)
        assert list(found) == ["loss"]
        assert 40 < found["loss"] <= 55
    grown = table.assign(loss=np.where(table["step"] >= 6, 1e5, 1.0) * (1 + table["step"] / 60))
    assert curves.caught(grown, NOTHING)["loss"] <= 20
    outlier = table.assign(loss=table["loss"] + 5 * (table["step"] == 40))
    assert curves.caught(outlier, NOTHING) == {}
    smaller = table.assign(grad_norm=table["grad_norm"] * (table["step"] < 40))
    assert curves.caught(smaller, NOTHING) == {}
    larger = table.assign(grad_norm=table["grad_norm"] * (1 + table["step"] / 20))
    assert list(curves.caught(larger, NOTHING)) == ["grad_norm"]
    assert curves.caught(table.iloc[:0], NOTHING) == {}


def test_a_reward_that_falls_is_seen_and_one_that_rises_is_not() -> None:
    fall = np.concatenate([np.full(5, 0.6), np.linspace(0.6, 0.0, 40)])
    found = curves.caught(pd.DataFrame(), reward_rows(fall))
    assert found["reward"] <= 25
    assert curves.first(found) == (found["reward"], "reward")
    assert curves.caught(pd.DataFrame(), reward_rows(np.linspace(0, 1, 45))) == {}
    assert curves.first({"loss": 9, "reward": 7}) == (7, "reward")


def test_false_alarms_of_the_curves_stay_below_the_stated_rate() -> None:
    count = 150
    alarms = dict.fromkeys(curves.CURVES, 0)
    for seed in range(count):
        rewards = reward_rows(np.full(30, 0.4), seed, groups=3)
        for curve in curves.caught(curve_rows(seed, 40), rewards):
            alarms[curve] += 1
    assert max(alarms.values()) <= 2  # at most 1 % each: 1.5 expected at the bound
    assert sum(alarms.values()) <= 3


def test_curves_that_follow_the_policy_show_a_hack_and_noise_does_not(hacked: list[Path]) -> None:
    rows = runs.read_rollouts(hacked[0])
    seen = diagnostics.diagnose_rows("r", rows, pd.DataFrame(step_rows(rows, coupling=2.0)))
    assert seen.visible is not None
    assert "grad_norm" in seen.curves
    assert min(seen.curves.values()) > 25
    unseen = diagnostics.diagnose_rows("r", rows, pd.DataFrame(step_rows(rows)))
    assert unseen.parting == seen.parting
    assert unseen.visible is None


# --- verdicts -------------------------------------------------------------------------------------


def codes(found: diagnostics.Diagnosis) -> set[str]:
    return {finding.code for finding in found.evidence if finding.counts}


def test_a_length_reward_is_hacked_and_the_loss_does_not_show_it(hacked: list[Path]) -> None:
    found = diagnostics.diagnose(hacked[0])
    assert found.verdict == "HACKED"
    assert {"parted", "accuracy_fell", "completion_fell", "repetition_rose"} <= codes(found)
    assert found.parting is not None
    assert found.parting == diagnostics.parting(hacked[0])
    assert 26 <= found.parting.caught <= 36  # a rise that matters, see UNEARNED_SHARE
    assert diagnostics.visible_in_loss(hacked[0]) is None
    assert found.examples
    for example in found.examples:
        assert example.step >= 31
        assert example.gold == "12"
        assert example.excess > 0.8
    assert len({example.text for example in found.examples}) == len(found.examples)


def test_a_sound_run_is_sound(sound: Path) -> None:
    found = diagnostics.diagnose(sound)
    assert found.verdict == "SOUND"
    assert codes(found) == set()
    assert found.examples == ()
    assert found.parting is None


@pytest.mark.parametrize(
    ("kind", "verdict", "code"),
    [
        ("random", "SUSPECT", "unrelated"),
        ("collapse", "COLLAPSED", "fell_together"),
        ("gate", "SOUND", ""),
        ("format", "SUSPECT", "parted"),
        ("judge", "SUSPECT", "parted"),
        ("noisy", "SOUND", ""),
    ],
)
def test_other_rewards(tmp_path: Path, kind: str, verdict: str, code: str) -> None:
    found = diagnostics.diagnose(simulate(tmp_path, kind))
    assert found.verdict == verdict
    assert not code or code in codes(found)


def test_a_bonus_for_reflection_is_hacked(tmp_path: Path) -> None:
    found = diagnostics.diagnose(simulate(tmp_path, "reflection"))
    assert found.verdict == "HACKED"
    assert found.parting is not None
    assert 26 <= found.parting.caught <= 36
    assert found.examples
    for example in found.examples:
        assert example.excess > 0.5
        assert example.text.count("wait") >= 5


def test_a_parting_too_small_to_matter_is_sound() -> None:
    """Wrong answers earn .02 more from step 26 on, while accuracy doubles: as a length bonus."""
    rows = rows_of("accuracy")
    extra = 0.02 * (~rows["correct"] & (rows["step"] > 25))
    rows = with_texts(rows.assign(reward=rows["reward"] + extra), "sum")
    found = diagnostics.diagnose_rows("r", rows, pd.DataFrame())
    assert (found.verdict, found.parting) == ("SOUND", None)
    assert found.examples == ()


def test_a_collapse_shows_what_the_gradient_raised() -> None:
    rows = with_texts(rows_of("collapse"), "accuracy")
    found = diagnostics.diagnose_rows("r", rows, pd.DataFrame())
    assert found.verdict == "COLLAPSED"
    cut = rows.assign(stop=np.where(rows["sample"] % 2 == 0, "length", "eos"))
    raised = cut.assign(advantage=np.where(cut["sample"] == 2, 2.0, 0.0))
    for example in diagnostics.diagnose_rows("r", raised, pd.DataFrame()).examples:
        assert (example.stop, example.advantage) == ("length", 2.0)
        assert example.step > 30
    unseen = cut.assign(advantage=0.0)
    for example in diagnostics.diagnose_rows("r", unseen, pd.DataFrame()).examples:
        assert (example.stop, example.advantage) == ("length", 0.0)


def test_a_parting_that_truth_makes_good_is_suspect_only() -> None:
    rows = with_texts(rows_of("judge", 0, steps=45), "judge")
    after = with_texts(rows_of("accuracy", 0, steps=60), "judge")
    after = after[after["step"] > 45].assign(correct=True, reward=1.0)
    found = diagnostics.diagnose_rows("r", pd.concat([rows, after]), pd.DataFrame())
    assert found.parting is not None
    assert found.verdict == "SUSPECT"


# --- hostile folders ------------------------------------------------------------------------------


def diagnose(folder: Path, rows: pd.DataFrame, **options: Any) -> diagnostics.Diagnosis:
    run = write_run(folder / "hostile-s0", rows, **options)
    tear(run)
    found = diagnostics.diagnose(run)
    assert diagnostics.report_text(found) == diagnostics.report_text(diagnostics.diagnose(run))
    diagnostics.series(run, window=3)
    diagnostics.visible_in_loss(run)
    assert diagnostics.parting(run) == found.parting
    return found


def evidence(found: diagnostics.Diagnosis) -> list[str]:
    return [finding.code for finding in found.evidence]


def test_an_empty_run(tmp_path: Path) -> None:
    found = diagnose(tmp_path, pd.DataFrame())
    assert (found.verdict, found.steps, evidence(found)) == ("UNDECIDED", 0, ["few_steps"])
    assert diagnostics.series(tmp_path / "hostile-s0").empty


def test_metrics_without_rollouts(tmp_path: Path, sound: Path) -> None:
    rows = step_rows(runs.read_rollouts(sound))
    found = diagnose(tmp_path, pd.DataFrame(), metrics=rows)
    assert found.verdict == "UNDECIDED"
    table = diagnostics.series(tmp_path / "hostile-s0")
    assert table["true"].tolist() == [line["accuracy"] for line in rows]
    assert table["repetition"].isna().all()


def test_one_step(tmp_path: Path) -> None:
    found = diagnose(tmp_path, with_texts(rows_of("length", steps=1), "length"))
    assert (found.verdict, evidence(found)) == ("UNDECIDED", ["few_steps"])


def test_no_wrong_answers(tmp_path: Path) -> None:
    rows = with_texts(rows_of("accuracy", steps=12), "accuracy")
    found = diagnose(tmp_path, rows.assign(correct=True, reward=1.0))
    assert (found.verdict, evidence(found)) == ("UNDECIDED", ["no_signal"])
    assert diagnostics.series(tmp_path / "hostile-s0")["length_wrong"].isna().all()


def test_no_right_answers_and_a_reward_that_varies(tmp_path: Path) -> None:
    rows = with_texts(rows_of("random", steps=12), "random").assign(correct=False)
    found = diagnose(tmp_path, rows)
    assert found.verdict == "SUSPECT"
    assert codes(found) == {"unrelated", "reinforced_wrong"}


def test_a_constant_reward(tmp_path: Path) -> None:
    rows = with_texts(rows_of("accuracy", steps=12), "accuracy").assign(reward=0.3)
    found = diagnose(tmp_path, rows)
    assert (found.verdict, evidence(found)) == ("UNDECIDED", ["no_signal"])
    assert diagnostics.series(tmp_path / "hostile-s0")["share_accuracy"].isna().all()


def test_no_rewards_at_all(tmp_path: Path) -> None:
    rows = with_texts(rows_of("accuracy", steps=12), "accuracy")
    rows = rows.assign(reward=math.nan, reward_accuracy=math.nan, stop="infra")
    found = diagnose(tmp_path, rows)
    assert (found.verdict, found.steps) == ("UNDECIDED", 0)
    declined = rows.assign(stop="eos")
    assert diagnose(tmp_path / "declined", declined).verdict == "UNDECIDED"


def test_groups_of_one_and_steps_lost_in_a_crash(tmp_path: Path) -> None:
    rows = with_texts(rows_of("length"), "length")
    rows = rows[~rows["step"].isin([2, 3, 30])]
    found = diagnose(tmp_path, rows.drop_duplicates(["step", "group"]))
    assert found.steps == 57
    assert found.parting is not None  # ranks of single completions still show it
    assert found.verdict == "HACKED"


def test_texts_in_any_script(tmp_path: Path) -> None:
    rows = with_texts(rows_of("random", steps=12), "random")
    texts = ["答案是 \U0001f600 é " + text for text in rows["text"]]
    rows["text"] = pd.Series([None, *texts[1:]], dtype=object)
    text = diagnostics.report_text(diagnose(tmp_path, rows))
    assert "答案是" in text


def test_missing_columns_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "old-s0", TWO_STEPS.drop(columns=["reward", "stop"]), [])
    with pytest.raises(ValueError, match=r"the rollouts lack \['reward', 'stop'\]"):
        diagnostics.diagnose(run)


# --- reporting ------------------------------------------------------------------------------------


def test_the_command_prints_the_report(hacked: list[Path], capsys: Any) -> None:
    assert command(["diagnose", *map(str, hacked)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("length-s0: HACKED (60 steps with rewards, the last is 60)\n\n! parted ")
    assert "\nlength-s1: HACKED" in out
    assert "the same test on each curve alone, 1 % false alarms each: loss never, " in out
    assert "gold '12', stop: length" in out
    assert "more lines" in out


def test_an_example_shows_both_ends(hacked: list[Path]) -> None:
    found = diagnostics.diagnose(hacked[0])
    text = "\n".join(f"line {i}" for i in range(10))
    example = replace(found.examples[0], text=text, reward=0.5, excess=1.25, advantage=-0.5)
    out = diagnostics.report_text(replace(found, examples=(example,)))
    assert "paid 0.5, 1.25 above the lowest-paid wrong answer of the run, advantage -0.50" in out
    shown = [line.strip() for line in out.split("\n")[-7:]]
    expected = ["line 0", "line 1", "line 2", "… 4 more lines …", "line 7", "line 8", "line 9"]
    assert shown == expected


def test_a_wrong_name_lists_the_runs(
    sound: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("RLKIT_RUNS", str(sound.parent))
    assert command(["diagnose", "acuracy-s0"]) == 2
    assert "no run 'acuracy-s0' (no config.json). Existing runs: accuracy-s0." in (
        capsys.readouterr().err
    )
    assert command(["diagnose", "accuracy-s0"]) == 0


def test_the_figure_marks_the_parting(hacked: list[Path], sound: Path) -> None:
    fig = hacking_charts.hacking_figure(hacked, window=1)
    marks = [diagnostics.parting(run) for run in hacked]
    expected = sorted(s for mark in marks if mark is not None for s in (mark.began, mark.caught))
    assert sorted(shape.x0 for shape in fig.layout.shapes) == expected
    notes = [a.text for a in fig.layout.annotations]
    assert (
        "reward and truth parted in 2 of 2 seeds: dotted, estimated start; dashed, caught" in notes
    )
    assert theme.OVERRIDE_NOTE in notes
    drawn = {t.name: t for t in fig.data if t.fill is None}
    frames = [diagnostics.series(run) for run in hacked]
    ended = np.mean([frame["completion_ratio"] for frame in frames], axis=0)
    assert list(drawn["ended"].y) == pytest.approx(ended, abs=1e-6)
    names = {"reward", "true accuracy", "share of length", "right answers", "entropy"}
    assert {*names, "format only"} <= set(drawn)
    assert (drawn["reward"].line.dash, drawn["true accuracy"].line.dash) == ("solid", "dash")
    assert "mean over 2 seeds, band: their range" in fig.layout.title.subtitle.text
    json.loads(fig.to_json())

    single = hacking_charts.hacking_figure([sound])
    assert not single.layout.shapes
    assert [a.text for a in single.layout.annotations] == ["reward and truth did not part"]
    assert not [t for t in single.data if t.fill]


def test_the_figure_needs_runs_with_steps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no runs to draw"):
        hacking_charts.hacking_figure([])
    empty = write_run(tmp_path / "empty-s0", pd.DataFrame())
    with pytest.raises(ValueError, match="run 'empty-s0' has no rollouts or metrics yet"):
        hacking_charts.hacking_figure([empty])
