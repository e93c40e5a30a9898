"""Problems: forms, answers, disjoint splits, refusals."""

import json
import random
import re

import pytest

from rlkit import tasks
from rlkit.hub import validate_rows
from rlkit.tasks import CHAINS, Chain, draw_chain, load_problems, training_stream

FROZEN = [
    ("chain", "validation", 128),
    ("chain", "test", 256),
    ("edge", "validation", 128),
    ("edge", "test", 256),
    ("chain-long", "test", 128),
    ("edge-long", "test", 128),
    ("large", "validation", 64),
    ("large", "test", 200),
]


def expression(row: dict) -> str:
    return json.loads(row["meta"])["expression"]


@pytest.mark.parametrize(("task", "split", "count"), FROZEN)
def test_frozen_splits_hold_right_answers_of_the_stated_form(task, split, count) -> None:
    rows = load_problems(task, split)
    assert len(rows) == count
    validate_rows(rows)
    for row in rows:
        assert re.fullmatch(r"[\d+*-]+", expression(row))
        assert row["answer"] == str(eval(expression(row)))
        assert row["prompt"][-1]["content"].endswith(f" {expression(row)}.")
        assert row["meta"] == json.dumps(json.loads(row["meta"]), sort_keys=True)


@pytest.mark.parametrize("task", CHAINS)
def test_frozen_chains_fit_their_task(task) -> None:
    for row in load_problems(task, "test"):
        parts = re.findall(r"\d+|[+-]", expression(row))
        chain = Chain(tuple(map(int, parts[::2])), tuple(parts[1::2]))
        assert chain.expression == expression(row)
        assert chain.fits(CHAINS[task])


def test_every_length_has_its_share_of_the_test_problems() -> None:
    for task in ("chain", "edge", "edge-long"):
        terms = [json.loads(row["meta"])["terms"] for row in load_problems(task, "test")]
        low, high = CHAINS[task].terms
        counts = [terms.count(n) for n in range(low, high + 1)]
        assert max(counts) - min(counts) <= 1


def test_no_problem_is_in_two_splits() -> None:
    seen: dict[str, str] = {}
    for task, split, _ in FROZEN:
        for row in load_problems(task, split):
            assert expression(row) not in seen, (task, split, seen[expression(row)])
            seen[expression(row)] = f"{task}-{split}"
    assert set(seen) == tasks.held_out_expressions()


@pytest.mark.parametrize("task", ["chain", "edge", "large"])
def test_training_problems_are_right_distinct_and_never_held_out(task) -> None:
    rows = load_problems(task, "train", 1500)
    found = {expression(row) for row in rows}
    assert len(found) == 1500
    assert not found & tasks.held_out_expressions()
    assert all(row["answer"] == str(eval(expression(row))) for row in rows[:300])


def test_held_out_problems_are_skipped_when_the_stream_draws_one(monkeypatch) -> None:
    first = next(training_stream("chain"))
    monkeypatch.setattr(tasks, "held_out_expressions", lambda: frozenset([expression(first)]))
    assert expression(next(training_stream("chain"))) != expression(first)


def test_training_problems_are_a_pure_function_of_their_index() -> None:
    assert load_problems("edge", "train", 40)[:20] == load_problems("edge", "train", 20)
    other = next(training_stream("edge", "other"))
    assert expression(other) != expression(load_problems("edge", "train", 1)[0])


def test_draws_fit_the_spec_and_can_be_given_a_length() -> None:
    rng = random.Random(0)
    for spec in CHAINS.values():
        for _ in range(200):
            assert draw_chain(rng, spec).fits(spec)
    assert {len(draw_chain(rng, CHAINS["edge"], 2).numbers) for _ in range(20)} == {2}


def test_a_local_file_serves_as_a_task(tmp_path) -> None:
    rows = load_problems("chain", "test", 3)
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_problems(str(path)) == rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chains", "test"), "'chains' is unknown: expected one of chain, edge"),
        (("chain", "train"), "endless"),
        (("edge-long", "train", 5), "testing only"),
        (("edge-long", "validation"), "no validation split"),
        (("chain", "test", 0), "n=0"),
        (("chain", "test", 1000), "256 test problems, fewer than the 1000"),
    ],
)
def test_bad_requests_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_problems(*arguments)


def test_an_empty_file_is_refused(tmp_path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match="no rows"):
        load_problems(str(tmp_path / "none.jsonl"))


def kinds(rows: list[dict]) -> list[str]:
    return [row["problem_id"].partition(":")[0] for row in rows]


def test_a_mixture_takes_its_tasks_in_turn() -> None:
    rows = load_problems("large+chain", "train", 7)
    assert kinds(rows) == ["large", "chain"] * 3 + ["large"]
    assert rows[::2] == load_problems("large", "train", 4)
    assert rows[1::2] == load_problems("chain", "train", 3)
    assert load_problems("chain+large", "train", 2) == [rows[1], rows[0]]
    three = load_problems("large+edge+chain", "train", 6)
    assert kinds(three) == ["large", "edge", "chain"] * 2


def test_a_mixture_has_the_splits_of_its_tasks() -> None:
    rows = load_problems("large+chain", "validation", 10)
    assert rows[::2] == load_problems("large", "validation", 5)
    assert rows[1::2] == load_problems("chain", "validation", 5)
    every = load_problems("large+chain", "test")  # as many as the smaller one has
    assert len(every) == 400 and kinds(every).count("large") == 200
    assert len({row["problem_id"] for row in every}) == 400
    assert load_problems("edge-long+chain", "test", 1) == load_problems("edge-long", "test", 1)


def test_files_mix_and_may_have_a_plus_in_their_path(tmp_path, monkeypatch) -> None:
    rows = load_problems("chain", "test", 3)
    (tmp_path / "a+b").mkdir()
    for name in ("a+b/mine+more.jsonl", "plain.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_problems(str(tmp_path / "a+b/mine+more.jsonl")) == rows
    monkeypatch.chdir(tmp_path)
    large = load_problems("large", "test", 3)
    turns = [row for pair in zip(large, rows, strict=True) for row in pair]
    assert load_problems("large+plain.jsonl") == turns
    assert load_problems("plain.jsonl+large")[::2] == rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chain+chain", "test"), r"task='chain\+chain' names a task twice"),
        (("large+chian", "test"), "'chian' is unknown: expected one of chain, edge"),
        (("chain+", "test"), r"task='chain\+': expected a task on each side"),
        (("+", "test"), "twice"),
        (("large+chain", "train"), "The train split of 'large' is endless"),
        (("chain+edge-long", "train", 4), "testing only"),
        (("chain+edge-long", "validation", 4), "'edge-long' has no validation split"),
        (("large+chain", "test", 500), "'large' has 200 test problems, fewer than the 250"),
        (("large+chain", "test", 0), "n=0"),
        (("chain+nowhere.jsonl", "test"), "nowhere.jsonl"),
    ],
)
def test_bad_mixtures_are_refused(arguments, message) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_problems(*arguments)
