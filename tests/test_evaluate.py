from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rlkit import evaluate, metrics, stats
from rlkit.completion import Completion
from rlkit.engine import Engine, Sampling, stable_key
from rlkit.pretrain import new_model
from rlkit.tasks import load_problems
from rlkit.templates import encode
from rlkit.tokenizer import build_tokenizer

SAMPLING = Sampling(max_new_tokens=32)


def problem(i: int, answer: str = "7") -> dict[str, Any]:
    return {
        "problem_id": f"p{i}",
        "prompt": [{"role": "user", "content": "3+4"}],
        "answer": answer,
        "answer_type": "integer",
        "source": "test",
        "meta": "{}",
    }


def said(text: str, stop: str = "eos", tokens: int = 3) -> Completion:
    return Completion.from_text(text, token_ids=range(tokens), stop=stop)  # type: ignore[arg-type]


RIGHT, WRONG = said("\\boxed{7}"), said("\\boxed{8}", tokens=5)
THINK = said("<think>\nWait, verify 3+4=7\n</think>\\boxed{7}", tokens=10)
CUT = said("\\boxed{7}", stop="length", tokens=32)
MUTE = said("However I do not know", tokens=4)


class Scripted:
    """Stands in for a model: returns given responses and records how it was asked."""

    def __init__(self, sampled: list[list[Completion]], greedy: list[Completion]) -> None:
        self.sampled, self.greedy, self.calls = sampled, greedy, []  # type: ignore[var-annotated]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        n: int,
        keys: Sequence[int],
        first_sample: int = 0,
        prefill: str = "",
    ) -> list[list[Completion]]:
        self.calls.append((list(prompts), sampling, n, list(keys), prefill))
        return [[c] for c in self.greedy] if sampling.greedy else [s[:n] for s in self.sampled]


def run(engine: Any, problems: list[dict[str, Any]], **changes: Any) -> evaluate.EvalResult:
    settings: dict[str, Any] = {
        "prompts": [[1, 2]] * len(problems),
        "sampling": SAMPLING,
        "n": 4,
        "run_seed": 5,
        "purpose": "test",
        "greedy": True,
    }
    return evaluate.evaluate(engine, problems, **{**settings, **changes})


@pytest.fixture
def result() -> evaluate.EvalResult:
    engine = Scripted(
        [[RIGHT, WRONG, THINK, CUT], [WRONG, WRONG, MUTE, RIGHT], [THINK, THINK, THINK, RIGHT]],
        [RIGHT, WRONG, THINK],
    )
    return run(engine, [problem(i) for i in range(3)])


def test_summary_values(result: evaluate.EvalResult) -> None:
    s = result.summary
    assert s["greedy"] == stats.wilson(2, 3)
    assert s["avg@4"].value == pytest.approx((2 + 1 + 4) / 12)
    assert s["pass@1"].value == pytest.approx(s["avg@4"].value)
    assert s["pass@2"].value == pytest.approx((5 / 6 + 1 / 2 + 1) / 3)
    assert s["pass@4"].value == 1.0
    # p0: 7, 8, 7, (cut off: no vote) -> 7. p1: 8, 8, none, 7 -> 8. p2: 7.
    assert s["maj@4"].value == pytest.approx(2 / 3)
    assert s["completion_ratio"].value == pytest.approx(11 / 12)
    assert s["reasoning_rate"].value == pytest.approx(4 / 12)
    assert s["accuracy_reasoning"].value == 1.0
    assert s["accuracy_reasoning"].low < 1.0  # Wilson over the two problems with reasoning
    assert s["accuracy_direct"].value == pytest.approx(3 / 8)
    assert s["length"].value == pytest.approx((3 * 3 + 5 * 3 + 10 * 4 + 32 + 4) / 12)
    assert s["length_right"].value == pytest.approx((3 * 3 + 10 * 4) / 7)
    assert s["length_wrong"].value == pytest.approx((5 * 3 + 32 + 4) / 5)
    assert s["keywords_verification"].value == pytest.approx(4 / 12)
    assert s["keywords_reflection"].value == pytest.approx(5 / 12)
    assert s["keywords_correction"].value == 0.0
    assert s["keywords_any"].value == pytest.approx(5 / 12)
    assert all(e.low <= e.value <= e.high for e in s.values())
    with pytest.raises(KeyError, match="no 'pass@8' in this evaluation; it has greedy"):
        result["pass@8"]


def test_rows_and_calls() -> None:
    engine = Scripted([[RIGHT, CUT]], [WRONG])
    result = run(engine, [problem(0)], n=2, prefill="<think>", step=3)
    greedy, sampled = engine.calls
    key = stable_key(5, "test", 3, "p0")
    assert greedy == ([[1, 2]], Sampling(max_new_tokens=32, greedy=True), 1, [key], "<think>")
    assert sampled == ([[1, 2]], SAMPLING, 2, [key], "<think>")
    assert list(result.rows["decoding"]) == ["greedy", "sampled", "sampled"]
    assert list(result.rows["correct"]) == [False, True, False]  # cut off: not correct
    assert result.info["sampling"]["max_new_tokens"] == 32


def test_greedy_only_describes_the_greedy_rows() -> None:
    result = run(Scripted([], [RIGHT, MUTE]), [problem(0), problem(1)], n=0)
    assert result["greedy"].value == 0.5
    assert result["length"].value == pytest.approx(3.5)
    assert not any(key.startswith(("avg", "pass", "maj")) for key in result.summary)


def test_undefined_quantities() -> None:
    result = run(Scripted([[RIGHT] * 4], [RIGHT]), [problem(0)])
    assert math.isnan(result["length_wrong"].value)
    assert math.isnan(result["accuracy_reasoning"].value)


@pytest.mark.parametrize(
    ("problems", "changes", "message"),
    [
        ([], {}, "no problems"),
        ([problem(0), problem(0)], {}, "1 problem_id.s. occur more than once, for example 'p0'"),
        ([problem(0)], {"prompts": []}, "0 prompts for 1 problems"),
        ([problem(0)], {"n": 0, "greedy": False}, "nothing to draw"),
        ([problem(0)], {"n": -1}, "n=-1"),
        ([problem(0)], {"ks": [1, 8]}, r"ks holds \[8\]"),
        ([problem(0)], {"sampling": Sampling(8, greedy=True)}, "all samples .* equal"),
    ],
)
def test_bad_input(problems: Any, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(Scripted([[RIGHT] * 4], [RIGHT]), problems, **changes)


def test_infra_rows_leave_every_quantity() -> None:
    broken = said("", stop="infra", tokens=0)
    engine = Scripted([[RIGHT, RIGHT, broken, broken], [WRONG, RIGHT, RIGHT, RIGHT]], [RIGHT] * 2)
    result = run(engine, [problem(0), problem(1)])
    assert result.info["infra"] == 2
    assert result["avg@4"].value == pytest.approx((1 + 3 / 4) / 2)
    assert "pass@4" not in result.summary  # one problem has only two valid samples
    assert result["pass@2"].value == 1.0
    with pytest.raises(ValueError, match="no valid sample"):
        run(Scripted([[broken] * 4], [broken]), [problem(0)])


@pytest.mark.parametrize(
    ("text", "category", "hit"),
    [
        ("WAIT, no", "reflection", True),
        ("waiting", "reflection", False),
        ("double-check it", "verification", True),
        ("double\ncheck", "verification", True),
        ("incorrect", "correction", False),
        ("revise", "correction", True),
    ],
)
def test_keywords_are_whole_words_in_any_case(text: str, category: str, hit: bool) -> None:
    assert metrics.keyword_hits(pd.Series([text]))[category].tolist() == [hit]


def test_save_and_load_round_trip(result: evaluate.EvalResult, tmp_path: Path) -> None:
    evaluate.save(result, tmp_path, "test-base")
    back = evaluate.load(tmp_path, "test-base")
    assert back.summary == result.summary
    assert back.info == result.info
    assert metrics.summarise(back.rows) == result.summary  # rows alone give the numbers again
    assert sorted(p.name for p in (tmp_path / "eval").iterdir()) == [
        "test-base.json",
        "test-base.parquet",
    ]
    with pytest.raises(FileNotFoundError, match=r"no evaluation 'nope'.*found: test-base"):
        evaluate.load(tmp_path, "nope")


def test_undefined_survives_the_file(tmp_path: Path) -> None:
    result = run(Scripted([[RIGHT] * 4], [RIGHT]), [problem(0)])
    evaluate.save(result, tmp_path, "x")
    assert math.isnan(evaluate.load(tmp_path, "x")["length_wrong"].value)


def test_a_failing_save_keeps_the_old_evaluation(
    result: evaluate.EvalResult, tmp_path: Path
) -> None:
    evaluate.save(result, tmp_path, "x")
    before = (tmp_path / "eval" / "x.json").read_bytes()
    unwritable = evaluate.EvalResult(result.rows, result.summary, {"bad": float("nan")})
    with pytest.raises(ValueError, match="JSON compliant"):
        evaluate.save(unwritable, tmp_path, "x")
    assert (tmp_path / "eval" / "x.json").read_bytes() == before


def test_curve_reads_only_its_split(result: evaluate.EvalResult, tmp_path: Path) -> None:
    for name in ("validation-000020", "validation-000000", "validation-long-000010", "test-000020"):
        evaluate.save(result, tmp_path, name)
    points = evaluate.curve(tmp_path)
    assert sorted(points["step"].unique()) == [0, 20]
    assert set(points["metric"]) == set(result.summary)
    assert evaluate.curve(tmp_path, "nothing").empty


def test_compare_is_paired_by_problem(result: evaluate.EvalResult) -> None:
    shuffled = evaluate.EvalResult(result.rows.iloc[::-1], result.summary)
    same = evaluate.compare(result, shuffled)
    assert (same.difference.value, same.p) == (0.0, 1.0)
    better = run(Scripted([[RIGHT] * 4] * 3, [RIGHT] * 3), [problem(i) for i in range(3)])
    gain = evaluate.compare(result, better, "avg")
    assert gain.difference.value == pytest.approx(1 - 7 / 12)
    assert gain.p == 0.5  # two non-zero differences
    for metric in ("greedy", "pass@2", "maj@4", "length", "completion_ratio", "reasoning_rate"):
        d = evaluate.compare(result, better, metric).difference.value
        a, b = (evaluate.per_problem(r.rows, metric).mean() for r in (result, better))
        assert d == pytest.approx(b - a)


def test_compare_errors(result: evaluate.EvalResult) -> None:
    other = run(Scripted([[RIGHT] * 4] * 2, [RIGHT] * 2), [problem(0), problem(9)])
    with pytest.raises(ValueError, match="2 only in a, 1 only in b, 1 shared"):
        evaluate.compare(result, other)
    with pytest.raises(ValueError, match="metric='nonsense'"):
        evaluate.compare(result, result, "nonsense")
    greedy_only = run(Scripted([], [RIGHT]), [problem(0)], n=0)
    with pytest.raises(ValueError, match="needs sampled rows"):
        evaluate.compare(greedy_only, greedy_only, "avg")


def test_with_the_real_engine() -> None:
    tokenizer = build_tokenizer()
    engine = Engine(new_model(tokenizer, seed=0), tokenizer)
    problems = load_problems("chain", "test", 3)
    prompts = encode(problems, tokenizer, "question")

    def once(chosen: slice, purpose: str) -> pd.DataFrame:
        return evaluate.evaluate(
            engine,
            problems[chosen],
            prompts=prompts[chosen],
            sampling=Sampling(max_new_tokens=12),
            n=4,
            run_seed=1,
            purpose=purpose,
            greedy=True,
        ).rows

    rows = once(slice(None), "a")
    assert rows.equals(once(slice(None), "a"))
    assert not rows["text"].equals(once(slice(None), "b")["text"])
    assert len(rows) == 3 * (1 + 4)
    assert rows["n_tokens"].between(1, 12).all()
    assert set(rows["stop"]) <= {"eos", "length"}
    # A problem's samples do not depend on which other problems are evaluated.
    alone = once(slice(1, 2), "a")["text"].tolist()
    assert alone == rows[rows["problem_id"] == problems[1]["problem_id"]]["text"].tolist()
