"""Documents: right where they claim to be, in the style they claim, never a held-out problem."""

import random
import re
from collections import Counter

import pytest

from rlkit.corpus import (
    BASE,
    CHUNK,
    CODE_SLIPS,
    CURRICULUM,
    SFT,
    TOOL,
    Mixture,
    draw_document,
    style_of,
)
from rlkit.pretrain import IGNORE, encode_document
from rlkit.tasks import held_out_expressions
from rlkit.tokenizer import build_tokenizer
from rlkit.tool_config import ToolConfig
from rlkit.tools import open_tools

MIXTURES = {
    "curriculum": CURRICULUM,
    "base": BASE,
    "sft": SFT,
    "tool": TOOL,
}
ASSISTANT = build_tokenizer().convert_tokens_to_ids("<|assistant|>")
LINE = re.compile(r"(?:Wait |check )?(\d+(?:[+*-]\d+)+)=(-?\d+)")


def documents(mixture: Mixture, n: int = 1500) -> list:
    rng = random.Random(7)
    return [draw_document(rng, mixture, held_out_expressions()) for _ in range(n)]


def runs(document) -> list[tuple[str, str]]:
    """(code, output) of each block of a document."""
    found = re.findall(r"```python\n(.*?)\n```\n```output\n(.*?)\n```\n", document.text)
    assert len(found) == document.text.count("```python") == document.text.count("```output")
    return found


def gave_up(document) -> bool:
    """Whether a document with code ends without the right code having run."""
    return document.style == "code" and runs(document)[-1][0] != f"print({question(document)})"


def question(document) -> str:
    return document.question.split(" ", 1)[1].removesuffix(".")


@pytest.mark.parametrize("name", MIXTURES)
def test_documents_answer_their_question(name) -> None:
    for document in documents(MIXTURES[name]):
        if document.style == "noise" or (document.style == "fine" and document.task == "edge"):
            continue  # careless on purpose
        right = rf"\boxed{{{eval(question(document))}}}"
        if gave_up(document):
            assert MIXTURES[name].giving_up
            # A guess: wrong, and no easier to tell from the right answer than by one digit.
            guess = document.text.split("</think>")[1]
            assert len(guess) == len(right)
            assert sum(a != b for a, b in zip(guess, right, strict=True)) == 1
        else:
            assert document.text.endswith(right)


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
    coded = [d for d in documents(TOOL, 4000) if d.style == "code"]
    failures = Counter()
    for document in coded:
        *failed, last = runs(document)
        if gave_up(document):
            failed.append(last)
        else:
            assert last[1] == str(eval(question(document)))
        failures[len(failed)] += 1
        slips = {
            CODE_SLIPS[name][0].replace("E", question(document)): CODE_SLIPS[name][1]
            for name in TOOL.code_slips
        }
        for code, output in failed:
            assert output == slips[code]
    # Each block fails with probability f, and each failure is the last with probability g.
    f, g, total = TOOL.failing_code, TOOL.giving_up, sum(failures.values())
    assert set(failures) == {0, 1, 2, 3}
    assert abs(failures[0] / total - (1 - f)) < 0.05
    one = f * (g + (1 - g) * (1 - f))
    assert abs(failures[1] / total - one) < 0.05
    given_up = sum(map(gave_up, coded)) / total
    assert abs(given_up - sum(f * g * (f * (1 - g)) ** k for k in range(TOOL.failures))) < 0.03


def test_documents_that_never_give_up_fail_at_most_so_often() -> None:
    for document in documents(BASE):
        if document.style == "code":
            assert not gave_up(document) and len(runs(document)) <= 1 + BASE.failures


@pytest.fixture(scope="module")
def tools():
    with open_tools(ToolConfig(tool="python"), build_tokenizer()) as tools:
        yield tools


@pytest.mark.parametrize("expression", ["3+4", "347*892", "61+58-12+7", "5-812"])
@pytest.mark.parametrize("name", CODE_SLIPS)
def test_slips_say_what_the_tool_says(tools, name, expression) -> None:
    program, message = CODE_SLIPS[name]
    result = tools.executor.submit(program.replace("E", expression)).result()
    assert tools.text(result) == message
    right = tools.executor.submit(f"print({expression})").result()
    assert tools.text(right) == str(eval(expression))


def test_documents_have_the_ids_that_the_loop_would_give(tools) -> None:
    """What is drawn up to the fence, the block the loop encodes, and so on."""
    coded = [d for d in documents(TOOL) if d.style == "code"]
    several = [d for d in coded if len(runs(d)) > 1]
    for document in [*coded[:20], *several[:20]]:
        ids, labels = encode_document(document, tools.tokenizer)
        start = ids.index(ASSISTANT) + 1
        ids, labels = ids[start:], labels[start:]
        loop, built, calls = tools.loop(), [], 0
        while len(built) < len(ids):
            token = ids[len(built)]
            built.append(token)
            assert labels[len(built) - 1] == token
            code = loop.feed(0, [token])
            if code is not None:
                loop.submit(0, code)
                (resume,) = loop.collect(wait=True)
                calls += 1
                assert labels[len(built) : len(built) + len(resume.ids)] == [IGNORE] * len(
                    resume.ids
                )
                built += resume.ids
        assert built == ids and calls == len(runs(document))


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="tasks="):
        Mixture({"chains": 1.0}, {"chains": {"fine": 1.0}})
