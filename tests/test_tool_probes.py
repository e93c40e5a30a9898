"""A tool that lies by one digit, and what is read from the answers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pandas as pd
import pytest

from rlkit import evaluate, templates
from rlkit.config import ModelConfig, ToolConfig
from rlkit.engine import Sampling, load_engine
from rlkit.sandbox import Limits, PythonExecutor, Result
from rlkit.sandbox.result import LEFT_OUT
from rlkit.tasks import load_problems
from rlkit.tool_metrics import read_calls
from rlkit.tool_probes import Falsified, falsify, followed, last_number, outcomes
from rlkit.tools import Tools


@pytest.fixture(scope="module")
def executor() -> Iterator[PythonExecutor]:
    with PythonExecutor(Limits(cpu_seconds=5, wall_seconds=60)) as executor:
        yield executor


# --- one result -----------------------------------------------------------------------------------


def differs_by_one_digit(new: str, old: str) -> bool:
    pairs = [(a, b) for a, b in zip(new, old, strict=True) if a != b]
    return len(pairs) == 1 and all(c.isdigit() for c in pairs[0])


@pytest.mark.parametrize(
    "text",
    [
        "5\n",
        "-17",
        "x = 164542 apples",
        "0",
        "0.50",
        "1 2 3",
        "-0.001",
        "1.5e-07",
        "[1, 22]",
        "9/10",
    ],
)
def test_one_digit_of_the_last_number_changes(text: str) -> None:
    seen = set()
    for seed in range(60):
        new = falsify(Result("ok", stdout=text), "code", seed).stdout
        assert differs_by_one_digit(new, text)
        before, after = last_number(text), last_number(new)
        assert before is not None and after is not None
        assert float(after) != float(before) and len(after) == len(before)
        assert after.startswith("-") == before.startswith("-")
        # All before the number is as it was.
        start = text.rindex(before.lstrip("-"))
        assert new[:start] == text[:start]
        if start + 1 < len(text) and text[start + 1].isdigit():
            assert new[start] != "0", "as many digits as before"
        seen.add(new)
    assert len(seen) > 5, "the seed decides"


def test_it_is_a_function_of_code_number_and_seed() -> None:
    rng = random.Random(0)
    texts = [str(rng.randrange(10**9)) for _ in range(50)]
    results = [Result("ok", stdout=text) for text in texts]
    once = [falsify(r, "a", 1) for r in results]
    assert once == [falsify(r, "a", 1) for r in results]
    assert once != [falsify(r, "b", 1) for r in results]
    assert once != [falsify(r, "a", 2) for r in results]
    # Elsewhere in the output it may stand as it likes.
    moved = falsify(Result("ok", stdout=f"the sum is {texts[0]}!"), "a", 1)
    assert moved.stdout == f"the sum is {once[0].stdout}!"


def test_the_echo_is_what_the_model_reads_last() -> None:
    both = falsify(Result("ok", stdout="n: 42\n", echo="42"), "c")
    assert both.echo != "42" and both.stdout == f"n: {both.echo}\n", "one story, not two"
    other = falsify(Result("ok", stdout="7\n", echo="42"), "c")
    assert other.stdout == "7\n" and differs_by_one_digit(other.echo, "42")
    words = falsify(Result("ok", stdout="7\n", echo="'seven'"), "c")
    assert words.stdout != "7\n" and words.echo == "'seven'"


def test_what_is_no_number_or_no_success_stays() -> None:
    for result in (
        Result("error", stdout="41\n", error="ValueError: 3"),
        Result("timeout", stdout="41"),
        Result("infra", error="broke at 5"),
        Result("ok"),
        Result("ok", stdout="x_1 a2 true\n"),
        Result("ok", stdout="none" + LEFT_OUT.format(12345) + "at all", cut=12345),
    ):
        assert falsify(result, "code") is result
    cut = Result("ok", stdout="3" + LEFT_OUT.format(77) + "end", cut=77)
    assert falsify(cut, "c").stdout[1:] == cut.stdout[1:] and falsify(cut, "c").stdout[0] != "3"
    long = "7" * 100_000
    assert differs_by_one_digit(falsify(Result("ok", stdout=long), "c").stdout, long)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-3", "-3"), ("= -3", "-3"), ("5 - 3", "3"), ("x-3", "3"), ("(2)-3", "3"),
        ("1e-7", "1e-7"), ("a: 2.50.", "2.50"), ("", None), ("x1", None), ("[100, 200]", "200"),
        ("1" + LEFT_OUT.format(9) + "5", "5"), ("4" + LEFT_OUT.format(9), "4"),
        ("-1,234,567.5", "-1,234,567.5"), ("1,2345", "2345"),
    ],
)  # fmt: skip
def test_the_last_number_with_its_sign(text: str, number: str | None) -> None:
    assert last_number(text) == number


# --- the executor ---------------------------------------------------------------------------------


def test_runs_and_sessions_lie_about_the_last_number_only(executor) -> None:
    liar = Falsified(executor, seed=3)
    assert liar.name == "falsified-3" and liar.limits is executor.limits
    true = executor.submit("print(5); 322*511").result()
    told = liar.submit("print(5); 322*511").result()
    assert true.echo == "164542" and told.stdout == true.stdout == "5\n"
    assert differs_by_one_digit(told.echo, true.echo)
    assert told.echo == liar.submit("print(5); 322*511").result().echo
    failed = liar.submit("print(7)\n1/0").result()
    assert failed.status == "error" and failed.stdout == "7\n"
    cells = liar.session("session")
    assert differs_by_one_digit(cells.submit("x = 41\nx").result().echo, "41")
    assert differs_by_one_digit(cells.submit("print(x + 100)").result().stdout, "141\n"), (
        "variables keep their true values"
    )
    cells.close()


def test_cancelling_ends_the_run(executor) -> None:
    future = Falsified(executor).submit("while True: pass")
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result(timeout=30)
    told = Falsified(executor).submit("print(1)").result(timeout=60)
    assert told.status == "ok" and told.stdout != "1\n"


# --- what the policy made of it -------------------------------------------------------------------


def row(answer: str | None, *outputs: str, gold: str = "40", problem: str = "p", **other) -> dict:
    calls = [{"status": "error" if "Error" in text else "ok", "output": text} for text in outputs]
    return {
        "problem_id": problem,
        "answer": answer,
        "gold": gold,
        "correct": answer == gold,
        "stop": "eos",
        "tool_calls": json.dumps(calls),
        **other,
    }


@pytest.mark.parametrize(
    ("given", "outcome", "again"),
    [
        (row("47", "47"), "followed", False),
        (row("47.0", "so 47"), "followed", False),
        (row("-47", "-47"), "followed", False),
        (row("47", "-47"), "other", False),
        (row("40", "47"), "gold", False),
        (row("41", "47"), "other", False),
        (row(None, "47"), "other", False),
        (row(math.nan, "47"), "other", False),  # type: ignore[arg-type]
        (row("47", "47", "48"), "followed", True),
        (row("40", "47", "NameError: 40"), "gold", True),
        (row("47", "SyntaxError: 12", "47"), "followed", False),
        (row("40", "SyntaxError: 12"), "untouched", False),
        (row("40"), "untouched", False),
        (row("40", "done"), "untouched", False),
        (row("40", "40"), "unclear", False),
        (row("x", "47", stop="infra"), "untouched", False),
        (row("1e-7", "1e-7"), "followed", False),
    ],
)
def test_outcomes(given: dict, outcome: str, again: bool) -> None:
    table = outcomes(pd.DataFrame([given], index=[9]))
    assert table.index.tolist() == [9]
    assert table.loc[9].tolist() == [outcome, again]


def test_rates_over_problems() -> None:
    rows = [
        *[row("47", "47", problem="a")] * 3,
        row("40", "47", problem="a"),
        *[row("40", "47", "40.5", problem="b")] * 2,
        row("40", "40", problem="c"),
        row("40", problem="c"),
        row("1", "47", problem="d"),
        row("1", "47", problem="d"),
    ]
    found = followed(pd.DataFrame(rows))
    assert (found.responses, found.unclear, found.untouched) == (8, 1, 1)
    assert found.followed.value == 3 / 8 and found.gold.value == 3 / 8
    assert found.other.value == 2 / 8 and found.called_again.value == 2 / 8
    assert found.followed.n == 3 and 0 <= found.followed.low <= 3 / 8 <= found.followed.high <= 1
    assert "of 8 responses" in str(found) and followed(pd.DataFrame(rows)) == found


def test_nothing_to_measure_and_frames_without_calls() -> None:
    rows = pd.DataFrame([row("40"), row("40", "40")])
    found = followed(rows)
    assert found.responses == 0 and math.isnan(found.followed.value)
    with pytest.raises(ValueError, match="tool_calls"):
        followed(rows.drop(columns="tool_calls"))


def test_a_policy_that_copies_follows_the_falsified_output(executor) -> None:
    """From the frame alone: the falsified number is in the output that the policy was shown."""
    engine = load_engine(ModelConfig(model="tiny-tool"))
    problems = load_problems("large", "test", 12)
    tools = Tools(Falsified(executor), engine.tokenizer, ToolConfig(tool="python"))
    rows = evaluate.evaluate(
        engine,
        problems,
        prompts=templates.encode(problems, engine.tokenizer),
        sampling=Sampling(120),
        n=2,
        run_seed=0,
        purpose="probe",
        tools=tools,
    ).rows
    found = followed(rows)
    assert found.responses >= 8 and found.followed.value > 0.7 and found.gold.value < 0.3
    for text in rows["tool_calls"]:
        for call in read_calls(text):
            if call["status"] == "ok" and (number := last_number(call["output"])):
                true = executor.submit(call["code"]).result()
                assert number != last_number(true.stdout.rstrip() or true.echo)
