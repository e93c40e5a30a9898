from __future__ import annotations

import math

import pytest

from rlkit import paper


@pytest.mark.parametrize("name", [t for t in paper.tables() if t != "table1"])
def test_schema(name: str) -> None:
    frame = paper.load(name)
    assert tuple(frame.columns) == paper.COLUMNS
    assert len(frame)
    assert set(frame["tag"]) <= {"P", "F", "D"}
    assert frame["approx"].dtype == bool
    empty = frame["value"].isna()
    assert (frame["note"].str.contains("not published") == empty).all()
    assert (frame.loc[~empty, "unit"] != "").all()
    keys = ["figure_or_table", "model", "condition", "benchmark", "step", "metric"]
    assert not frame.duplicated(keys).any()
    percent = frame.loc[~empty & (frame["unit"] == "%"), "value"]
    assert percent.between(0, 100).all()


def test_nothing_read_from_a_curve_is_given_as_exact() -> None:
    for name in ("fig1", "fig3", "fig7"):
        frame = paper.load(name)
        assert frame.loc[frame["tag"] == "F", "approx"].all(), name


@pytest.mark.parametrize(
    ("name", "where", "expected"),
    [
        ("table3", {"condition": "Synthesis 5k", "benchmark": "AIME24", "metric": "length"}, 2254),
        ("table4", {"model": "DeepSeek-R1-Distill-Qwen-7B", "benchmark": "AIME24",
                    "metric": "length_wrong"}, 19419.58),
        ("table5", {"model": "STILL-3-1.5B", "benchmark": "average"}, 49.33),
        ("table6", {"condition": "question only"}, 39.33),
        ("table7", {"model": "Distillation 0.8k", "condition": "execution: yes",
                    "benchmark": "AIME24", "metric": "greedy"}, 86.67),
        ("fig3", {"step": "590"}, 37.08),
        ("fig1", {"figure_or_table": "Figure 1d", "condition": "KL 0",
                  "metric": "length"}, 1670),
        ("e9", {"step": "0"}, 0.1),
        ("cort", {"model": "STILL-3-Tool-32B", "benchmark": "AIME24"}, 76.7),
    ],
)  # fmt: skip
def test_values(name: str, where: dict[str, str], expected: float) -> None:
    assert paper.value(name, **where) == expected


def test_table5_averages_agree() -> None:
    frame = paper.load("table5")
    for _, rows in frame.groupby("model"):
        parts = rows.loc[rows["benchmark"] != "average", "value"]
        total = rows.loc[rows["benchmark"] == "average", "value"].iloc[0]
        assert math.isclose(parts.mean(), total, abs_tol=0.006)


def test_table1_and_errors() -> None:
    assert list(paper.load("table1")["recommendation"])[:3] == ["1024", "on-policy", "64"]
    with pytest.raises(ValueError, match="no table 'table9'"):
        paper.load("table9")
    with pytest.raises(ValueError, match="expected one"):
        paper.value("table7", model="STILL-2", benchmark="AIME25", metric="greedy")
