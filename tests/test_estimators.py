"""Gradient estimators: exact expectations on small bandits, the sketch, the noise correction."""

import importlib
import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from rlkit import estimators, paths
from rlkit.estimators import ESTIMATORS, Blocks, Estimator, Sketch
from rlkit.stats import Estimate, pass_at_k

BENCH = paths.root() / "benchmarks"
RIGHT = np.array([1.0, 0.0, 1.0, 0.0])  # reward of each arm
ARMS = np.array([[0.15, 0.4, 0.05, 0.4], [0.5, 0.2, 0.2, 0.1]])  # two problems
LENGTHS = np.array([3.0, 1.0, 7.0, 2.0])


def expected(probs, estimator, group, lengths=LENGTHS, change=None):
    """E[sum_i w_i grad log p(a_i)] in the logits: all outcomes of a group, weighed by chance."""
    total = np.zeros(len(probs))
    for outcome in itertools.product(range(len(probs)), repeat=group):
        arms = np.array(outcome)
        reward = RIGHT[arms][None]
        weight = (change or estimators.weights)(reward, lengths[arms][None], estimator)
        scores = np.eye(len(probs))[arms] - probs
        total += np.prod(probs[arms]) * (np.asarray(weight)[0] @ scores)
    return total


def true_gradient(probs):
    return probs * (RIGHT - probs @ RIGHT)


@pytest.mark.parametrize("probs", ARMS)
@pytest.mark.parametrize("group", [2, 3, 5])
def test_rloo_and_reinforce_are_unbiased(probs, group):
    for name in ("RLOO", "REINFORCE"):
        got = expected(probs, ESTIMATORS[name], group)
        np.testing.assert_allclose(got, true_gradient(probs), atol=1e-14)


@pytest.mark.parametrize("group", [2, 3, 5])
def test_the_group_mean_shortens_the_gradient_and_does_not_turn_it(group):
    got = expected(ARMS[0], ESTIMATORS["Dr. GRPO"], group)
    np.testing.assert_allclose(got, (group - 1) / group * true_gradient(ARMS[0]), atol=1e-14)


@pytest.mark.parametrize("group", [2, 3, 4, 5])
def test_dividing_by_the_deviation_weighs_problems_and_turns_no_single_one(group):
    """A problem's weight is E[sqrt(c (G - c))] * sqrt(1 - 1/G) / (G p (1 - p)), c ~ Bin(G, p)."""
    factors = []
    for probs in ARMS:
        p = float(probs @ RIGHT)
        factor = sum(
            math.comb(group, c) * p**c * (1 - p) ** (group - c) * math.sqrt(c * (group - c))
            for c in range(group + 1)
        )
        factor *= math.sqrt(1 - 1 / group) / (group * p * (1 - p))
        got = expected(probs, ESTIMATORS["GRPO, constant"], group)
        # The package adds 1e-6 to the deviation, which is at least 0.4 here.
        np.testing.assert_allclose(got, factor * true_gradient(probs), rtol=4e-6, atol=1e-12)
        factors.append(factor)
    # In groups of up to 3 every mixed group has the same deviation: no problem is preferred.
    # In larger ones the harder problem (p = 0.2 against 0.7) is.
    assert (factors[0] > 1.001 * factors[1]) == (group > 3)


def test_the_sequence_mean_turns_the_gradient_where_length_goes_with_success():
    probs = ARMS[0]
    got = expected(probs, ESTIMATORS["RLOO, sequence mean"], 4)
    p = probs @ RIGHT
    pull = probs * (RIGHT - p) / LENGTHS  # E[(r - p) / L * (onehot - probs)]
    np.testing.assert_allclose(got, pull - pull.sum() * probs, atol=1e-14)
    cosine = got @ true_gradient(probs) / np.linalg.norm(got) / np.linalg.norm(true_gradient(probs))
    assert cosine < 0.99
    same = expected(probs, ESTIMATORS["RLOO, sequence mean"], 4, lengths=np.full(4, 5.0))
    np.testing.assert_allclose(same, true_gradient(probs) / 5, atol=1e-14)


@pytest.mark.parametrize(("group", "k"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (5, 3)])
@pytest.mark.parametrize("probs", ARMS)
def test_pass_at_k_is_unbiased_for_the_gradient_of_pass_at_k(probs, group, k):
    p = probs @ RIGHT
    truth = k * (1 - p) ** (k - 1) * true_gradient(probs)
    got = expected(probs, Estimator("rloo", "constant", k=k), group)
    np.testing.assert_allclose(got, truth, atol=1e-14)

    def published(reward, lengths, _):
        """Transformed rewards of 2505.15201, where a wrong rollout's others hold all c right."""
        c = int(reward.sum())
        wrong = pass_at_k(group - 1, c, k - 1) if k > 1 and c < group else 0.0
        return np.where(reward == 1, 1.0, wrong) * k / group

    np.testing.assert_allclose(
        expected(probs, ESTIMATORS["RLOO"], group, change=published), truth, atol=1e-14
    )


def test_pass_at_one_is_rloo():
    rewards = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    lengths = np.ones_like(rewards)
    np.testing.assert_allclose(
        estimators.pass_at_k_advantages(rewards, 1),
        estimators.weights(rewards, lengths, ESTIMATORS["RLOO"]) * rewards.size,
        atol=1e-15,
    )


def test_what_tokens_divide():
    rewards, lengths = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[2.0, 4.0], [6.0, 8.0]])
    signs = np.array([[1.0, -1.0], [-1.0, 1.0]])
    for gather, share in (("constant", 0.25), ("token", 1 / 20), ("sequence", 0.25 / lengths)):
        got = estimators.weights(rewards, lengths, Estimator("rloo", gather))
        np.testing.assert_allclose(got, signs * share)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Estimator("rlo", "constant"), "advantage='rlo'"),
        (lambda: Estimator("rloo", "mean"), "gather='mean'"),
        (lambda: Estimator("group_std", "constant", k=2), "k=2, advantage='group_std'"),
        (lambda: estimators.pass_at_k_advantages([[0.5, 1]], 1), "zeros and ones"),
        (lambda: estimators.pass_at_k_advantages([[0, 1]], 3), "k=3"),
        (lambda: estimators.pass_at_k_advantages([[1]], 1), "G >= 2"),
        (lambda: estimators.weights([[0, 1]], [[1, 0]], ESTIMATORS["RLOO"]), "at least one token"),
        (lambda: estimators.weights([[0, 1]], [[1]], ESTIMATORS["RLOO"]), r"lengths \(1, 1\)"),
        (lambda: estimators.batches(6, 8, 16, 4), "6 problems x 8 rollouts"),
        (lambda: Sketch(0, 4), "size=0"),
        (lambda: Sketch(3, 4)(torch.zeros(1, 2)), r"expected \[n, 3\]"),
        (lambda: estimators.mean_interval([1.0]), "at least two"),
        (
            lambda: estimators.moments(
                Blocks(np.ones((2, 3)), np.ones((2, 3)), np.ones(2), np.zeros(2)), np.ones((2, 3))
            ),
            "S >= 3",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("group", [2, 4, 8])
def test_batches_use_every_rollout_once_in_groups_of_one_problem(group):
    index = estimators.batches(8, 8, 16, group)
    assert index.shape == (4, 16 // group, group)
    assert sorted(index.reshape(-1)) == list(range(64))
    problems = index // 8
    assert (problems == problems[:, :, :1]).all()
    assert all(len(set(batch[:, 0])) == 16 // group for batch in problems)


# --- sketch ---------------------------------------------------------------------------------------


def test_the_sketch_is_linear_and_adds_part_by_part():
    sketch = Sketch(50, 16, seed=1)
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sketch(2 * x[:1] - x[1:2]), 2 * sketch(x[:1]) - sketch(x[1:2]))
    parts = torch.zeros(3, 16)
    for start, end in ((0, 7), (7, 30), (30, 50)):
        sketch.add(parts, x[:, start:end], start)
    torch.testing.assert_close(parts, sketch(x))


def test_the_sketch_keeps_inner_products_with_the_stated_error():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, generator=generator)
    y = 0.3 * x + torch.randn(400, generator=generator)
    x[:3] *= 20  # a few heavy parameters: the hard case for buckets
    width, draws = 64, []
    for seed in range(400):
        a, b = Sketch(400, width, seed)(torch.stack([x, y])).double()
        draws.append(float(a @ b))
    truth = float(x @ y)
    bound = math.sqrt((float(x @ x) * float(y @ y) + truth**2) / width)
    spread = np.std(draws, ddof=1)
    assert spread < 1.1 * bound
    assert abs(np.mean(draws) - truth) < 3 * spread / math.sqrt(len(draws))


# --- moments --------------------------------------------------------------------------------------


def test_two_blocks_are_the_split_half_product():
    x, y = np.random.default_rng(0).normal(size=(2, 2, 5))
    got = estimators.across(x @ y.T, np.ones(2, bool))
    assert got == pytest.approx((x[0] @ y[1] + x[1] @ y[0]) / 2)


def test_moments_without_noise_are_exact():
    reference = np.tile([3.0, 4.0, 0.0], (4, 1))
    mean = np.tile([6.0, 0.0, 0.0], (4, 1))
    blocks = Blocks(mean, mean / 6, np.full(4, 36.0 + 9.0), np.full(4, 0.25))
    found = {name: e.value for name, e in estimators.moments(blocks, reference).items()}
    assert found == pytest.approx(
        {
            "cosine": 0.6,
            "scale": 18 / 25,
            "bias": 1.0,
            "snr": 4.0,
            "batch_cosine": 0.6,
            "empty": 0.25,
            "reference_norm": 5.0,
        }
    )


def test_the_gap_of_two_estimators_is_the_difference_of_their_batch_cosines():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(5, 6)) + 2
    pair = []
    for _ in range(2):
        parts = [estimators.reduce_batches(rng.normal(size=(3, 6)) + 1) for _ in range(5)]
        pair.append(Blocks(*(np.array(part) for part in zip(*parts, strict=True))))
    one, other = (estimators.moments(b, reference)["batch_cosine"].value for b in pair)
    gap = estimators.batch_gap(*pair, reference)
    assert gap.value == pytest.approx(one - other)
    assert gap.low < gap.value < gap.high
    same = estimators.batch_gap(pair[0], pair[0], reference)
    assert (same.low, same.value, same.high) == (0, 0, 0)


def synthetic(rng, blocks, batches, size, cosine, noise):
    """Gradients with a known angle to the reference, and noise that both share."""
    truth = np.zeros(size)
    truth[0] = 1.0
    mine = np.zeros(size)
    mine[:2] = 2 * cosine, 2 * math.sqrt(1 - cosine**2)
    kept, reference = [], []
    for _ in range(blocks):
        shared = noise * rng.normal(size=(batches, size))
        kept.append(estimators.reduce_batches(mine + shared))
        reference.append(truth + shared.mean(axis=0))
    return Blocks(*(np.array(part) for part in zip(*kept, strict=True))), np.array(reference)


def test_noise_shared_with_the_reference_is_in_no_moment():
    size, noise, repeats = 400, 0.5, 40
    found, naive = [], []
    for seed in range(repeats):
        blocks, reference = synthetic(np.random.default_rng(seed), 16, 4, size, 0.7, noise)
        got = estimators.moments(blocks, reference)
        found.append([got[name].value for name in ("cosine", "scale", "snr", "reference_norm")])
        a, b = blocks.mean.mean(axis=0), reference.mean(axis=0)
        naive.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    truth = [0.7, 1.4, 4 / (size * noise**2), 1.0]
    error = np.std(found, axis=0, ddof=1) / math.sqrt(repeats)
    np.testing.assert_array_less(np.abs(np.mean(found, axis=0) - truth), 4 * error + 0.01)
    kept = size * noise**2 / (4 * 16)  # squared norm of the noise in the means of all blocks
    wrong = (1.4 + kept) / math.sqrt((4 + kept) * (1 + kept))
    assert np.mean(naive) == pytest.approx(wrong, abs=0.02)
    assert wrong > 0.78  # the plain cosine of the means would have said this instead of 0.7


def test_jackknife_intervals_cover_at_their_level():
    hits = 0
    for seed in range(200):
        blocks, reference = synthetic(np.random.default_rng(1000 + seed), 16, 2, 50, 0.7, 0.4)
        cosine = estimators.moments(blocks, reference)["cosine"]
        hits += cosine.low <= 0.7 <= cosine.high
    assert 180 <= hits <= 199  # nominal 190


def test_the_jackknife_of_a_mean_is_the_t_interval():
    values = np.random.default_rng(0).normal(size=9)
    jack = estimators.jackknife(lambda keep: {"m": float(values[keep].mean())}, 9)["m"]
    plain = estimators.mean_interval(values)
    assert (jack.low, jack.high) == pytest.approx((plain.low, plain.high))
    half = 2.306004 * values.std(ddof=1) / 3  # t of 8 degrees of freedom
    assert plain.high - plain.value == pytest.approx(half, rel=1e-5)


def test_an_empty_gradient_has_no_direction():
    mean, direction, energy, empty = estimators.reduce_batches(np.array([[3.0, 4.0], [0.0, 0.0]]))
    assert mean == pytest.approx([1.5, 2.0])
    assert direction == pytest.approx([0.3, 0.4])
    assert (energy, empty) == (12.5, 0.5)


# --- benchmark ------------------------------------------------------------------------------------


@pytest.fixture
def frozen(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import _frozen

    return _frozen


def test_rollout_gradients_add_up_to_the_batch_gradient(frozen):
    bench = frozen.Bench(frozen.Setting(task="chain", temperature=1.2, budget=64))
    batch = bench.roll("test", 2, 16)
    assert 0 < batch.rewards.sum() < batch.rewards.size
    assert batch.rewards.shape == (2, 16)
    sampled = [(bench.logprobs(None, ids) - old) * mask for _, ids, mask, old in bench.parts(batch)]
    assert max(float(part.detach().abs().max()) for part in sampled) < 1e-3
    sketch = Sketch(bench.size, 256)
    weight = estimators.weights(batch.rewards, batch.lengths, ESTIMATORS["GRPO"]).reshape(1, -1)
    weight = torch.tensor(weight).float()
    vectors, sums, ratios = bench.sketch(batch, sketch, weight)
    direct = bench.direction(batch, ESTIMATORS["GRPO"])
    assert float((sums[0] - direct).norm() / direct.norm()) < 1e-5
    torch.testing.assert_close(bench.sketch(batch, None, weight)[1], sums)
    torch.testing.assert_close(weight @ vectors["plain"], sketch(sums), rtol=1e-3, atol=1e-5)
    assert list(vectors) == ["plain"]
    assert not ratios.any()


def test_a_step_goes_where_it_says_and_comes_back(frozen):
    bench = frozen.Bench(frozen.Setting(task="chain"))
    flat = torch.nn.utils.parameters_to_vector
    before = flat(bench.parameters).detach().clone()
    gradient = torch.randn(bench.size, generator=torch.Generator().manual_seed(0))
    with bench.moved(gradient, 0.5):
        change = flat(bench.parameters).detach() - before
        assert float(change.norm()) == pytest.approx(0.5, rel=1e-3)
        assert float(change @ gradient / change.norm() / gradient.norm()) > 0.999
    assert torch.equal(flat(bench.parameters), before)
    with bench.moved(torch.zeros(bench.size), 0.5):
        assert torch.equal(flat(bench.parameters), before)


def test_stale_rollouts_are_weighed_by_their_ratio_and_clipped(frozen):
    with pytest.raises(ValueError, match="drift >= 1"):
        frozen.Setting(stale=True)
    bench = frozen.Bench(frozen.Setting(task="chain", budget=64, drift=2, stale=True))
    batch = bench.roll("test", 1, 8)
    fresh = frozen.Bench(frozen.Setting(task="chain", budget=64)).roll("test", 1, 8)
    assert batch.sequences == fresh.sequences  # of the shipped checkpoint
    sketch, none = Sketch(bench.size, 256), torch.zeros(1, 8)
    vectors, _, ratios = bench.sketch(batch, sketch, none)
    assert np.abs(ratios).max() > 1e-3
    for row, ids, mask, old in ((r[0], i[:1], m[:1], o[:1]) for r, i, m, o in bench.parts(batch)):
        ratio = ((bench.logprobs(None, ids) - old) * mask).exp()
        assert float(ratio.detach().log().sum()) == pytest.approx(ratios[row], abs=1e-4)
        for name, keep in (("up", ratio <= 1.2), ("down", ratio >= 0.8)):
            # The gradient of the ratio itself is ratio * grad log p.
            total = (ratio * mask * keep).sum()
            parts = torch.autograd.grad(total, bench.parameters, retain_graph=True)
            whole = sketch(torch.cat([p.reshape(-1) for p in parts])[None])[0]
            torch.testing.assert_close(vectors[name][row], whole, rtol=1e-3, atol=1e-3)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("estimators")


def stored_block(path, rng, stale):
    """A block of 16 problems x 8 rollouts with made-up gradients of 5 numbers."""
    arrays = {
        "rewards": (rng.random((16, 8)) < 0.4).astype(float),
        "lengths": rng.integers(1, 9, (16, 8)).astype(float),
        "log_ratio": rng.normal(size=128) if stale else np.zeros(128),
        "exact": np.zeros((0, 5)),
    }
    for name in ("plain", "up", "down") if stale else ("plain",):
        arrays[name] = rng.integers(-8, 9, (128, 5)).astype(np.float16)
    np.savez(path, **arrays)
    return arrays


def test_stored_blocks_become_batch_gradients(tmp_path, bench, frozen):
    data = stored_block(tmp_path / "block-000.npz", np.random.default_rng(0), stale=False)
    setting = frozen.Setting(problems=16, rollouts=8)
    reduced = bench.reduce_blocks(setting, [tmp_path / "block-000.npz"])
    assert {group for _, group in reduced} == {8}  # a batch of 128 in groups of 4 needs 32 problems
    reward = data["rewards"]
    others = (reward.sum(1, keepdims=True) - reward) / 7
    gradient = (reward - others).reshape(-1) @ data["plain"].astype(float) / 128
    got = reduced["RLOO", 8]
    np.testing.assert_allclose(got.mean[0], gradient, rtol=1e-5)
    np.testing.assert_allclose(got.direction[0], gradient / np.linalg.norm(gradient), rtol=1e-5)
    assert got.energy == pytest.approx([gradient @ gradient], rel=1e-5)
    assert set(reduced) == {(name, 8) for name in ESTIMATORS}


def test_stale_blocks_are_corrected_three_ways(tmp_path, bench, frozen):
    data = stored_block(tmp_path / "block-000.npz", np.random.default_rng(1), stale=True)
    setting = frozen.Setting(problems=16, rollouts=8, drift=1, stale=True)
    reduced = bench.reduce_blocks(setting, [tmp_path / "block-000.npz"])
    reward = data["rewards"]
    weight = (reward - (reward.sum(1, keepdims=True) - reward) / 7).reshape(-1) / 128
    right = reward.reshape(-1) == 1
    clipped = np.where(right[:, None], data["up"], data["down"]).astype(float)
    for name, gradient in {
        "RLOO, uncorrected": weight @ data["plain"].astype(float),
        "RLOO, token ratio, clipped": weight @ clipped,
        "RLOO, sequence ratio": (weight * np.exp(data["log_ratio"])) @ data["plain"].astype(float),
    }.items():
        np.testing.assert_allclose(reduced[name, 8].mean[0], gradient, rtol=1e-5)
    assert len(reduced) == 3


def test_rollout_statistics(tmp_path, bench, frozen):
    rng, files = np.random.default_rng(2), []
    for block in range(3):
        files.append(tmp_path / f"block-{block:03d}.npz")
        data = stored_block(files[-1], rng, stale=False)
        data["plain"] = np.where(data["rewards"].reshape(-1, 1) == 1, 1.0, 2.0) * np.ones((128, 5))
        data["lengths"] = np.where(data["rewards"] == 1, 30.0, 10.0)
        np.savez(files[-1], **data)
    rows = bench.rollout_rows(frozen.Setting(problems=16, rollouts=8), files)
    found = {row["quantity"]: row["value"] for row in rows}
    p = found["accuracy"]
    assert (found["length, right"], found["length, wrong"]) == pytest.approx((30, 10))
    assert found["gradient norm, right"] == pytest.approx(math.sqrt(5), rel=1e-5)
    assert found["gradient norm, wrong"] == pytest.approx(2 * math.sqrt(5), rel=1e-5)
    assert found["best constant baseline"] == pytest.approx(p / (p + 4 * (1 - p)), rel=1e-5)


def test_the_table_replaces_rows_of_the_same_setting_only(tmp_path, bench, frozen):
    path, half = tmp_path / "estimators.csv", bench.mean_interval([0.0, 1.0])
    for setting in (frozen.Setting(), frozen.Setting(temperature=1.2)):
        table = bench.update(path, setting, [bench.row_of(setting, "RLOO", 4, "cosine", half)])
    assert list(table["temperature"]) == [1.0, 1.2]
    new = bench.row_of(frozen.Setting(), "RLOO", 4, "cosine", bench.mean_interval([2.0, 4.0]))
    table = bench.update(path, frozen.Setting(), [new])
    assert list(table["value"]) == [3.0, 0.5]
    assert list(table["P"]) == [32, 32]
    with pytest.raises(ValueError, match="at temperature 1 first"):
        bench.draw(table[table["temperature"] == 1.2])


def test_rounding_noise_does_not_reach_the_table(bench, frozen):
    row = bench.row_of(frozen.Setting(), "RLOO", 4, "gap", Estimate(-3e-18, -1e-17, 2e-3, 16))
    assert (str(row["value"]), str(row["low"]), row["high"]) == ("0.0", "0.0", 0.002)


@pytest.mark.parametrize("model", ["tiny-base", "tiny-sft"])
def test_the_documentation_shows_the_table(bench, frozen, model):
    table = pd.read_csv(paths.root() / "figures" / "estimators.csv")
    shown = bench.markdown(table, frozen.Setting(model=model), 16)
    assert shown.count("\n") == len(ESTIMATORS) + 2  # two lines of head, and the reference's gain
    assert shown in (paths.root() / "docs" / "estimators.md").read_text(encoding="utf-8")


def test_quick_run_writes_table_and_figure_and_goes_on_where_it_was(tmp_path):
    def run():
        done = subprocess.run(
            [sys.executable, str(BENCH / "estimators.py"), "--quick", "--task", "chain", "--out",
             str(tmp_path / "out")],
            env={**os.environ, "RLKIT_RUNS": str(tmp_path / "runs"), "RLKIT_PNG": "0",
                 "PYTHONPATH": str(paths.root())},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "block 3/3" in run()
    table = pd.read_csv(tmp_path / "out" / "estimators.csv")
    assert (tmp_path / "out" / "estimators.json").exists()

    def value(estimator, group, quantity):
        chosen = table[
            (table["estimator"] == estimator)
            & (table["G"] == group)
            & (table["quantity"] == quantity)
        ]
        return chosen["value"].item()

    assert set(table["G"]) == {0, 8, 16}
    # The reference is RLOO in the largest groups; the group mean only shortens it.
    assert value("RLOO", 16, "cosine") == pytest.approx(1)
    assert value("Dr. GRPO", 16, "cosine") == pytest.approx(1)
    assert value("Dr. GRPO", 16, "scale") == pytest.approx(15 / 16)
    assert value("Dr. GRPO", 8, "scale") == pytest.approx(7 / 8 * value("RLOO", 8, "scale"))
    assert value("pass@4", 16, "cosine of pass@4") == pytest.approx(1)
    for quantity in ("cosine", "scale", "reference_norm"):  # what 1024 numbers keep of 659,200
        exact, kept = (value("GRPO", 16, f"{quantity} ({what})") for what in ("exact", "sketch"))
        assert kept == pytest.approx(exact, rel=0.2)
        assert kept != exact
    assert set(table.loc[table["quantity"] == "gain", "estimator"]) >= {"best", "RLOO", "GRPO"}
    assert (table["low"] <= table["value"]).mean() > 0.5

    written = (tmp_path / "out" / "estimators.csv").read_bytes()
    one = next((tmp_path / "runs").rglob("block-001.npz"))
    blocks = {f: f.stat().st_mtime_ns for f in (tmp_path / "runs").rglob("block-*.npz")}
    one.unlink()
    again = run()
    assert "block 2/3" in again and "block 1/3" not in again
    assert {f for f, t in blocks.items() if f.stat().st_mtime_ns != t} == {one}
    assert (tmp_path / "out" / "estimators.csv").read_bytes() == written
