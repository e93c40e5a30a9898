r"""A corpus of answers whose verdicts were decided by hand, and what plain math-verify makes of it.

``answers.jsonl`` has one object per line: answer, gold, type, verdict, class and why. Some rows
have more: ``known`` says why ``verify`` misses the verdict (``actual`` is what it says instead);
``math_verify`` with ``reason`` stands where plain math-verify disagrees with ``verify``. Rows of
class ``integer-generated`` are those of ``near_misses``; ``not right`` leaves open how an answer
fails.
"""

import json
import logging
import re
from collections import Counter

import pytest

from rlkit.paths import root
from rlkit.verify import GoldError, Verdict, check_gold, verify

ROWS = [
    json.loads(line)
    for line in (root() / "tests" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
]
GENERATED = (17, 42, 149, 2024, 70541, 999983)


def show(row):
    return f"{row['type']} gold {row['gold'][:60]!r}, answer {row['answer'][:60]!r}"


def near_misses(number):
    """Wrong answers close to a positive integer of two digits or more, by what was done to it."""
    text = str(number)
    return {
        "one more": str(number + 1),
        "one less": str(number - 1),
        "sign": str(-number),
        "ten times": text + "0",
        "a hundred times": text + "00",
        "last digit lost": text[:-1],
        "last two digits swapped": text[:-2] + text[-1] + text[-2],
        "a hundredth": f"{text[:-2]}.{text[-2:]}",
    }


@pytest.fixture(scope="module")
def verdicts():
    return [verify(row["answer"], row["gold"], row["type"]) for row in ROWS]


def test_the_corpus_is_large_sound_and_without_duplicates():
    pairs = [(row["answer"], row["gold"], row["type"]) for row in ROWS]
    assert len(set(pairs)) == len(pairs) >= 700
    needed = {"answer", "gold", "type", "verdict", "class", "why"}
    for row in ROWS:
        extra = set(row) - needed
        assert needed <= set(row), row
        assert extra <= {"known", "actual", "math_verify", "reason"}, row
        assert row["verdict"] in {*Verdict, "not right"}
        assert ("known" in row) == ("actual" in row)
        assert ("math_verify" in row) == ("reason" in row)
    for gold, answer_type in {(row["gold"], row["type"]) for row in ROWS}:
        try:
            check_gold(gold, answer_type)
        except GoldError as error:
            pytest.fail(f"{error}")


def test_every_class_has_rows():
    counts = Counter(row["class"] for row in ROWS)
    assert counts["integer-form"] + counts["integer-miss"] + counts["integer-text"] >= 200
    assert min(counts.values()) >= 7, counts
    assert len(counts) >= 24
    hand = [row for row in ROWS if not row["class"].endswith("generated")]
    assert len(hand) >= 450 and len(hand) > len(ROWS) / 2
    assert Counter(row["verdict"] for row in ROWS)["right"] >= 200


def test_generated_rows_are_those_of_the_generator():
    stored = {
        (row["gold"], row["why"], row["answer"])
        for row in ROWS
        if row["class"] == "integer-generated"
    }
    assert stored == {
        (str(number), why, answer)
        for number in GENERATED
        for why, answer in near_misses(number).items()
    }


def test_integers_match_exactly(verdicts):
    rows = [(row, got) for row, got in zip(ROWS, verdicts, strict=True) if row["type"] == "integer"]
    assert [show(row) for row, got in rows if got != row["verdict"]] == []
    assert not any("known" in row for row, _ in rows)


def test_expressions_match_but_for_known_failures(verdicts):
    """A known failure that is none any more has to leave the list."""
    wrong = []
    for row, got in zip(ROWS, verdicts, strict=True):
        if row["verdict"] == "not right":
            met = got != "right" and "known" not in row
        else:
            met = got == row.get("actual", row["verdict"])
        if not met:
            wrong.append(f"{show(row)}: {got}")
    assert wrong == []
    known = [row for row in ROWS if "known" in row]
    assert all(row["actual"] != row["verdict"] for row in known)
    assert len(known) <= 10


def test_one_false_right_is_known(verdicts):
    paid = [
        (row["answer"], row["gold"])
        for row, got in zip(ROWS, verdicts, strict=True)
        if got == "right" and row["verdict"] != "right"
    ]
    assert paid == [("x^2+2=0", "x^2+1=0")]


def test_disagreements_with_plain_math_verify_are_listed(verdicts, monkeypatch):
    """Its defaults on boxed texts. Bombs are left out: in this process nothing would stop them."""
    import math_verify

    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    unlisted = []
    for row, got in zip(ROWS, verdicts, strict=True):
        if row["class"] == "bomb":
            continue
        gold, answer = (math_verify.parse(rf"\boxed{{{row[key]}}}") for key in ("gold", "answer"))
        says = math_verify.verify(gold, answer)
        if says is not row.get("math_verify", got == "right"):
            unlisted.append(f"{show(row)}: math-verify says {says}, verify says {got}")
        if row.get("math_verify") == (got == "right"):
            unlisted.append(f"{show(row)}: listed as a disagreement, but both say {got}")
    assert unlisted == []


def test_the_documented_counts_are_those_of_the_corpus():
    text = (root() / "docs" / "verification.md").read_text(encoding="utf-8")
    counts = Counter((row["reason"], row["math_verify"]) for row in ROWS if "reason" in row)
    table = re.findall(r"^\| ([\w ]+?) \| (\d+) \| (\d+) \|", text, flags=re.MULTILINE)
    documented = {reason: (int(only_it), int(only_we)) for reason, only_it, only_we in table}
    reasons = {reason for reason, _ in counts}
    assert documented == {name: (counts[name, True], counts[name, False]) for name in reasons}
    assert f"{len(ROWS)} pairs" in text
