from __future__ import annotations

import numpy as np
import pytest

from rlkit.advantages import EPSILON, METHODS, compute, flat_groups

NAN = float("nan")
MIXED = np.array([[1.0, 0, 0, 0], [1, 1, 1, 0], [0.5, 0.25, 0, 1]])


def test_group_mean_subtracts_the_mean() -> None:
    assert compute([[1, 0, 0, 0]], "group_mean").tolist() == [[0.75, -0.25, -0.25, -0.25]]


def test_group_std_is_a_z_score_with_bessels_correction() -> None:
    result = compute([[1, 0, 0, 0]], "group_std")
    assert result == pytest.approx(np.array([[1.5, -0.5, -0.5, -0.5]]), rel=1e-5)
    assert compute(MIXED, "group_std").std(axis=1, ddof=1) == pytest.approx(1, rel=1e-4)


def test_batch_std_divides_by_one_number() -> None:
    ratio = compute(MIXED, "batch_std") / compute(MIXED, "group_mean")
    assert ratio == pytest.approx(1 / (MIXED.std(ddof=1) + EPSILON))


def test_rloo_is_reward_minus_the_mean_of_the_others() -> None:
    result = compute(MIXED, "rloo")
    for group, row in zip(MIXED, result, strict=True):
        for i, value in enumerate(row):
            assert value == pytest.approx(group[i] - np.delete(group, i).mean())


def test_reinforce_pp_is_a_batch_z_score_of_centred_rewards() -> None:
    result = compute(MIXED, "reinforce_pp")
    assert result.mean() == pytest.approx(0, abs=1e-12)
    assert result.std(ddof=1) == pytest.approx(1, rel=1e-4)
    scale = result / compute(MIXED, "group_mean")
    assert scale == pytest.approx(scale[0, 0])


@pytest.mark.parametrize("method", METHODS)
def test_equal_rewards_give_exactly_zero(method: str) -> None:
    # 0.1 is not a binary fraction: a mean of ten of them differs from 0.1 by rounding.
    rewards = np.array([[0.1] * 10, [0, 1, 0, 1, 0, 1, 0, 0, 0, 0]])
    result = compute(rewards, method)
    assert (result[0] == 0).all()
    assert (result[1] != 0).all()
    assert (compute([[0.1] * 10] * 3, method) == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_row_without_reward_leaves_the_baseline(method: str) -> None:
    with_gap = compute([[1, 0, NAN, 0], [0, 1, NAN, 1]], method)
    without = compute([[1, 0, 0], [0, 1, 1]], method)
    assert with_gap[:, [0, 1, 3]] == pytest.approx(without)
    assert (with_gap[:, 2] == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_groups_with_one_or_no_reward_are_zero(method: str) -> None:
    result = compute([[NAN, NAN, NAN], [1, NAN, NAN], [1, 0, 1]], method)
    assert (result[:2] == 0).all()
    assert np.isfinite(result).all()
    assert result[2, 0] > 0 > result[2, 1]


@pytest.mark.parametrize("method", METHODS)
def test_constant_shift_changes_nothing(method: str) -> None:
    assert compute(MIXED + 7, method) == pytest.approx(compute(MIXED, method), abs=1e-9)


def test_flat_groups() -> None:
    found = flat_groups(np.array([[1.0, 1, 1], [0, 1, 0], [NAN, 2, 2], [NAN, NAN, NAN]]))
    assert found.tolist() == [True, False, True, True]


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"advantage='ppo'.*rloo"):
        compute([[1, 0]], "ppo")
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        compute([1, 0], "rloo")
