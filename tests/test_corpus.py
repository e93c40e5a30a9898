"""Documents: right where they claim to be, in the style they claim, never a held-out problem."""

import random
import re
from collections import Counter

import pytest

from rlkit.corpus import BASE, CHUNK, CURRICULUM, SFT, TOOL, Mixture, draw_document, style_of
from rlkit.tasks import held_out_expressions

MIXTURES = {
    "curriculum": CURRICULUM,
    "base": BASE,
    "sft": SFT,
    "tool": TOOL,
}
LINE = re.compile(r"(?:Wait |check )?(\d+(?:[+*-]\d+)+)=(-?\d+)")


def documents(mixture: Mixture, n: int = 1500) -> list:
    rng = random.Random(7)
    return [draw_document(rng, mixture, held_out_expressions()) for _ in range(n)]


def question(document) -> str:
    return document.question.split(" ", 1)[1].removesuffix(".")


@pytest.mark.parametrize("name", MIXTURES)
def test_documents_answer_their_question(name) -> None:
    for document in documents(MIXTURES[name]):
        if document.style == "noise" or (document.style == "fine" and document.task == "edge"):
            continue  # careless on purpose
        if MIXTURES[name].giving_up and output_of(document.text) == "failed":
            continue  # gave up
        assert document.text.endswith(rf"\boxed{{{eval(question(document))}}}")


@pytest.mark.parametrize("name", MIXTURES)
def test_no_document_uses_a_held_out_problem(name) -> None:
    assert not {question(d) for d in documents(MIXTURES[name])} & held_out_expressions()


@pytest.mark.parametrize("name", ["curriculum", "base"])
def test_every_line_echoes_its_operands_and_carries_its_total_on(name) -> None:
    for document in documents(MIXTURES[name]):
        if document.style not in ("fine", "mid", "coarse", "padded") or document.task == "large":
            continue
        total = re.match(r"\d+", question(document)).group()
        rest = question(document)[len(total) :]
        for left, right in LINE.findall(document.text):
            assert left.startswith(total)
            operands = left[len(total) :]
            assert rest.startswith(operands)
            rest, total = rest[len(operands) :], right
        assert rest == ""


def test_checked_documents_repair_every_slip() -> None:
    mixture = Mixture({"edge": 1}, {"edge": {"check": 1}}, check_slip=0.3)
    repaired = 0
    for document in documents(mixture, 300):
        lines = document.text.split("<think>")[1].split("</think>")[0].strip().split("\n")
        for work, check in zip(lines[::2], lines[1::2], strict=True):
            left, found = LINE.match(work).groups()
            total, sign, number = re.match(r"(\d+)([+-])(\d+)", left).groups()
            back = "-" if sign == "+" else "+"
            assert check.startswith(f"check {found}{back}{number}=")
            assert int(check.split("=")[1]) == eval(f"{found}{back}{number}")
            right = int(found) == eval(left)
            assert right == (int(check.split("=")[1]) == int(total))
            repaired += work.startswith("Wait ")
            assert not work.startswith("Wait ") or right
    assert repaired > 50


def test_styles_are_recognised_from_the_text() -> None:
    for document in documents(BASE, 4000):
        if document.task == "large" or document.style == "noise":
            continue
        found = style_of(document.text)
        if document.style == "padded":
            assert found in ("padded", "fine")  # no filler may be drawn
        elif document.style in CHUNK:
            # Short chains leave no room for wide lines.
            widest = min(CHUNK[document.style], len(re.findall("[+-]", question(document))))
            assert found == {1: "fine", 2: "mid", 3: "coarse"}[widest]
        else:
            assert found == document.style


def test_mixture_shares_are_those_asked_for() -> None:
    counts = Counter((d.task, d.style) for d in documents(BASE, 6000))
    share = counts["edge", "direct"] / sum(n for (task, _), n in counts.items() if task == "edge")
    assert abs(share - BASE.styles["edge"]["direct"]) < 0.04


def test_tool_output_is_outside_the_loss_only_where_asked() -> None:
    for mixture, masked in ((TOOL, True), (BASE, False)):
        coded = [d for d in documents(mixture) if d.style == "code"]
        assert coded
        outputs = [s for d in coded for s in d.response if s.text.startswith("\n```output")]
        assert len(outputs) >= len(coded)
        assert all(segment.learn is not masked for segment in outputs)
        assert all(s.learn for d in coded for s in d.response if s not in outputs)


def test_failing_code_is_shown_with_its_error_and_retried() -> None:
    coded = [d for d in documents(TOOL) if d.style == "code"]
    failing = [d for d in coded if "Error" in d.text]
    assert 0.1 <= len(failing) / len(coded) <= 0.4
    for document in failing:
        first, last = re.findall(r"```python\n(.*?)\n```", document.text)
        with pytest.raises((SyntaxError, NameError)) as error:
            exec(first, {})
        assert str(error.value).split(" (")[0] in document.text
        assert eval(last.removeprefix("print(").removesuffix(")")) == eval(question(document))


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="tasks="):
        Mixture({"chains": 1.0}, {"chains": {"fine": 1.0}})
