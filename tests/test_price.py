from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from rlkit import price


def rows(seed: int, p: float, lengths: tuple[float, float], problems: int = 20) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    n = problems * 6
    thinks = rng.random(n) < p
    return pd.DataFrame(
        {
            "step": np.repeat(np.arange(n // 12), 12),
            "problem_id": [f"p{i % problems}" for i in range(n)],
            "reasoning": thinks,
            "n_tokens": np.where(thinks, lengths[1], lengths[0]) + rng.normal(size=n),
            "correct": rng.random(n) < np.where(thinks, 0.9, 0.2),
        }
    )


@pytest.mark.parametrize("value", ["n_tokens", "correct"])
@pytest.mark.parametrize("seed", range(5))
def test_identity_is_exact_and_antisymmetric(seed: int, value: str) -> None:
    a, b = rows(seed, 0.4, (10, 40)), rows(seed + 100, 0.8, (12, 50))
    there, back = price.decompose(a, b, value), price.decompose(b, a, value)
    total = b[value].astype(float).mean() - a[value].astype(float).mean()
    assert there.total.value == pytest.approx(total, abs=1e-12)
    assert there.between.value + there.within.value == pytest.approx(total, abs=1e-12)
    assert back.between.value == pytest.approx(-there.between.value, abs=1e-12)
    assert back.within.value == pytest.approx(-there.within.value, abs=1e-12)
    assert there.by_mode["between"].sum() == pytest.approx(there.between.value, abs=1e-12)


def frame(modes: list[str], lengths: list[float]) -> pd.DataFrame:
    ids = [f"p{i}" for i in range(len(modes))]
    return pd.DataFrame({"problem_id": ids, "mode": modes, "n_tokens": lengths})


def by_column(f: pd.DataFrame) -> list[str]:
    return list(f["mode"])


def test_pure_selection_and_pure_change() -> None:
    a = frame(["direct", "direct", "direct", "reasoning"], [10, 10, 10, 50])
    b = frame(["direct", "reasoning", "reasoning", "reasoning"], [10, 50, 50, 50])
    c = frame(["direct", "direct", "direct", "reasoning"], [12, 12, 12, 60])
    switch = price.decompose(a, b, labels=by_column)
    assert switch.between.value == pytest.approx(20)
    assert switch.within.value == pytest.approx(0, abs=1e-12)
    grow = price.decompose(a, c, labels=by_column)
    assert grow.between.value == pytest.approx(0, abs=1e-12)
    assert grow.within.value == pytest.approx(0.75 * 2 + 0.25 * 10)


def test_a_new_mode_counts_as_between() -> None:
    a = frame(["direct"] * 4, [10.0] * 4)
    b = frame(["direct", "direct", "tool", "tool"], [10, 10, 30, 30])
    result = price.decompose(a, b, labels=by_column)
    assert result.between.value == pytest.approx(10)
    assert result.within.value == pytest.approx(0, abs=1e-12)
    assert list(result.by_mode["mode"]) == ["direct", "tool"]
    assert np.isnan(result.by_mode["mean_a"][1])


def test_intervals_pair_equal_problem_sets() -> None:
    a = rows(0, 0.5, (10, 40))
    b = a.assign(n_tokens=a["n_tokens"] + 5)
    paired = price.decompose(a, b)
    assert (paired.total.low, paired.total.high) == (pytest.approx(5), pytest.approx(5))
    assert paired.total.method == "bootstrap over problems (paired)"
    other = b.assign(problem_id="q" + b["problem_id"])
    independent = price.decompose(a, other)
    assert independent.total.high - independent.total.low > 1
    assert independent.total.method == "bootstrap over problems (independent)"


def test_labels_from_text_and_errors() -> None:
    texts = pd.DataFrame(
        {"text": ["<think>\n1+1=2\n</think>\\boxed{2}", "\\boxed{2}", "<think></think>x"]}
    )
    assert price.by_reasoning(texts) == ["reasoning", "direct", "direct"]
    a = rows(0, 0.5, (10, 40))
    with pytest.raises(ValueError, match="set b has no rows"):
        price.decompose(a, a.iloc[:0])
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['reward'\]"):
        price.decompose(a, a, "reward")


def test_series_adds_up_in_every_bin() -> None:
    data = rows(0, 0.5, (10, 40))
    data.loc[data["step"] >= 5, "n_tokens"] += 7
    out = price.series(data, window=3)
    assert list(out["step"]) == [1.0, 4.0, 7.5]  # the last single step joins its neighbour
    assert (out["total"] - out["between"] - out["within"]).abs().max() < 1e-12
    assert out.loc[0, ["total", "between", "within"]].abs().max() == 0
    assert out["within"].iloc[-1] == pytest.approx(7, abs=0.5)
    assert (out["total_low"] <= out["total"]).all()
    assert (out["total"] <= out["total_high"]).all()
    with pytest.raises(ValueError, match="window=0"):
        price.series(data, window=0)
