from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config

from rlkit import preflight, rewards, tasks
from rlkit.completion import Completion
from rlkit.config import RunConfig
from rlkit.preflight import Finding, PreflightError
from rlkit.tokenizer import build_tokenizer

PROBLEMS = tasks.load_problems("chain", "train", 8)
TOKENIZER = build_tokenizer()
END = int(TOKENIZER.eos_token_id)


def config(**params: Any) -> RunConfig:
    return tiny_config(
        Path("unused"), **{"reward": "accuracy", "allow_exploitable": False, **params}
    )


def right(row: dict[str, Any]) -> Completion:
    return Completion.from_text(rf"\boxed{{{row['answer']}}}", token_ids=[1, END])


def wrong(row: dict[str, Any]) -> Completion:
    return Completion.from_text(r"\boxed{-1}", token_ids=[1, END])


def unboxed(row: dict[str, Any]) -> Completion:
    return Completion.from_text(row["answer"], token_ids=[1, END])


def cut(row: dict[str, Any]) -> Completion:
    return Completion.from_text("12+", token_ids=[1, 2], stop="length")


def answers(*kinds: Callable[[dict[str, Any]], Completion]) -> preflight.Sample:
    return lambda rows: [[kind(row) for kind in kinds] for row in rows]


def check(
    cfg: RunConfig | None = None,
    sample: preflight.Sample | None = None,
    *,
    end_ids: Sequence[int] = (END,),
    has_reference: bool = False,
    problems: Sequence[dict[str, Any]] = PROBLEMS,
) -> list[Finding]:
    cfg = cfg or config()
    return preflight.check(
        cfg,
        TOKENIZER,
        end_ids,
        problems,
        rewards.build(cfg.reward),
        sample or answers(right, wrong, wrong, right),
        has_reference=has_reference,
    )


def test_a_sound_run_has_no_findings() -> None:
    assert check() == []


def test_an_end_token_that_does_not_end_is_an_error() -> None:
    with pytest.raises(PreflightError, match=r"<\|end\|>.*eos_token_id"):
        check(end_ids=[99])


def test_a_budget_below_the_bare_answer_is_an_error() -> None:
    with pytest.raises(PreflightError, match="max_completion_length=3 cannot hold"):
        check(config(max_completion_length=3))


def test_nothing_that_ends_is_an_error_naming_the_budget() -> None:
    with pytest.raises(PreflightError, match=r"none of 32 .*max_completion_length=12"):
        check(sample=answers(cut, cut, cut, cut))


def test_mostly_cut_completions_are_a_warning() -> None:
    (found,) = check(sample=answers(right, wrong, cut, cut))
    assert (found.level, found.check) == ("warning", "budget")
    assert "only 50%" in found.message


def test_groups_without_variance_name_the_cause() -> None:
    (hard,) = check(sample=answers(wrong, wrong))
    assert hard.check == "variance"
    assert "rollouts or temperature" in hard.message
    (solved,) = check(sample=answers(right, right))
    assert "solved already" in solved.message


def test_a_missing_reference_is_an_error() -> None:
    with pytest.raises(PreflightError, match=r"beta=0\.1 needs a reference"):
        check(config(beta=0.1))
    assert check(config(beta=0.1), has_reference=True) == []


def test_an_exploitable_reward_stops_unless_allowed() -> None:
    (found,) = check(
        config(reward="format", allow_exploitable=True), answers(right, unboxed, wrong, right)
    )
    assert (found.level, found.check) == ("warning", "reward")
    assert "Recorded" in found.message

    def pays_anything(completions: Any, problems: Any, /, **info: Any) -> list[float | None]:
        return [1.0] * len(completions)

    with pytest.raises(PreflightError, match="pays what it should not") as caught:
        preflight.check(
            config(), TOKENIZER, [END], PROBLEMS, [("any", pays_anything, 1.0)],
            answers(right, wrong), has_reference=False,
        )  # fmt: skip
    assert "empty response, end of reasoning only, list of numbers" in str(caught.value)


def test_a_reward_that_crashes_on_a_probe_is_one_error_among_others() -> None:
    def crashes(completions: Any, problems: Any, /, **info: Any) -> list[float | None]:
        return [float(c.answer.isdigit()) for c in completions]

    with pytest.raises(PreflightError, match="AttributeError on the probe 'empty resp") as caught:
        preflight.check(
            config(max_completion_length=3), TOKENIZER, [END], PROBLEMS, [("mine", crashes, 1.0)],
            answers(right, wrong), has_reference=False,
        )  # fmt: skip
    assert str(caught.value).count("\n- ") == 2


def test_a_question_the_tokenizer_cannot_write_is_an_error() -> None:
    strange = {**PROBLEMS[0], "prompt": [{"role": "user", "content": "Σ 1 + 2"}]}
    with pytest.raises(PreflightError, match="not in the encoded prompt"):
        check(problems=[strange])


def test_all_errors_are_reported_at_once() -> None:
    with pytest.raises(PreflightError) as caught:
        check(config(max_completion_length=3, beta=0.1), end_ids=[99])
    assert str(caught.value).count("\n- ") == 3


def test_a_filter_that_leaves_nothing_to_compare_is_a_warning() -> None:
    def right_only(values: Any, completions: Any, problems: Any) -> Any:
        return values > 0

    def findings(group_filter: Any) -> list[Finding]:
        cfg = config(group_filter="qs")
        rows = [[right(row), wrong(row)] for row in PROBLEMS]
        paid = rewards.build(cfg.reward)
        return preflight.probe_findings(cfg, PROBLEMS, rows, paid, group_filter)

    assert findings(None) == []
    [finding] = findings(right_only)
    assert (finding.level, finding.check) == ("warning", "group_filter")
    assert "group_filter='qs'" in finding.message and "50% of completions kept" in finding.message


def test_a_reward_or_filter_that_breaks_on_real_samples_is_an_error_finding() -> None:
    cfg = config(group_filter="qs")
    rows = [[right(row), wrong(row)] for row in PROBLEMS]

    def short(completions: Any, problems: Any, /, **info: Any) -> list[float | None]:
        return [1.0]

    def numbers(values: Any, completions: Any, problems: Any) -> Any:
        return values

    (found,) = preflight.probe_findings(cfg, PROBLEMS, rows, [("mine", short, 1.0)])
    assert (found.level, found.check) == ("error", "reward")
    (found,) = preflight.probe_findings(cfg, PROBLEMS, rows, rewards.build(cfg.reward), numbers)
    assert (found.level, found.check) == ("error", "group_filter")
    assert "expected a bool array" in found.message
