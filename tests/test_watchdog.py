from __future__ import annotations

from typing import Any

import pytest

from rlkit.watchdog import WINDOW, watch

HEALTHY = {
    "groups_all_right": 1,
    "groups_all_wrong": 2,
    "groups_mixed": 5,
    "completion_ratio": 0.98,
    "entropy": 0.4,
    "accuracy": 0.5,
    "grad_norm": 0.3,
}


NO_MIX = {"groups_mixed": 0}


def rows(count: int = WINDOW, **changes: Any) -> list[dict[str, Any]]:
    return [{**HEALTHY, "step": i, **changes} for i in range(1, count + 1)]


def test_a_healthy_run_is_silent() -> None:
    assert watch(rows(50)) == []


@pytest.mark.parametrize(
    ("changes", "code", "parameter"),
    [
        ({**NO_MIX, "groups_all_right": 8, "groups_all_wrong": 0}, "groups_all_right", "task"),
        ({**NO_MIX, "groups_all_right": 0, "groups_all_wrong": 8}, "groups_all_wrong", "rollouts"),
        ({"completion_ratio": 0.3}, "clipped", "max_completion_length"),
        ({"grad_norm": 0.0}, "no_gradient", "reward"),
    ],
)
def test_each_failure_is_named_with_its_parameter(
    changes: dict[str, Any], code: str, parameter: str
) -> None:
    found = watch(rows() + rows(**changes))
    assert [w.code for w in found] == [code]
    assert parameter in found[0].message


def test_entropy_collapse_needs_an_unsolved_task() -> None:
    collapsed = rows() + rows(entropy=0.01)
    assert [w.code for w in watch(collapsed)] == ["entropy_collapse"]
    assert watch(rows() + rows(entropy=0.01, accuracy=0.99)) == []


def test_one_odd_step_is_not_a_trend() -> None:
    assert watch(rows(20) + rows(1, completion_ratio=0.0, grad_norm=0.0)) == []
    assert watch(rows(WINDOW - 1, completion_ratio=0.0)) == []


def test_missing_values_are_skipped() -> None:
    assert watch([{"step": i} for i in range(10)]) == []
