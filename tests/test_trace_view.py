"""Splitting responses and showing them: nothing is lost, and nothing passes for what it is not."""

from __future__ import annotations

import io
import json
import random
from dataclasses import asdict

import pandas as pd
import pytest
from nbconvert.filters.ansi import ansi2html, strip_ansi

from rlkit.completion import Completion, ToolCall
from rlkit.trace_parts import Part, parts
from rlkit.trace_view import (
    ansi,
    examples,
    legend,
    row_trace,
    show,
    trace,
    visible,
)

OUTPUT = "\n```output\n42\n```\n"


def call(text: str, output: str = OUTPUT, status: str = "ok", at: int = 0) -> ToolCall:
    start = text.index(output, at)
    return ToolCall("code", output, status, 0.1, 0.2, (0, 0), (start, start + len(output)))


def kinds(text: str, *calls: ToolCall) -> list[tuple[str, str]]:
    found = parts(text, calls)
    assert "".join(part.text for part in found) == text
    return [(part.kind, part.text) for part in found]


def test_a_whole_response() -> None:
    text = (
        "<think>First\n```python\nprint(6*)\n```\n```output\nSyntaxError\n```\nagain "
        f"```python\nprint(6*7)\n```{OUTPUT}so</think>It is \\boxed{{42}}, sure."
    )
    failed = call(text, "\n```output\nSyntaxError\n```\n", "error")
    assert kinds(text, call(text), failed) == [
        ("reasoning", "<think>First\n"),
        ("code", "```python\nprint(6*)\n```"),
        ("failed", "\n```output\nSyntaxError\n```\n"),
        ("reasoning", "again "),
        ("code", "```python\nprint(6*7)\n```"),
        ("output", OUTPUT),
        ("reasoning", "so</think>"),
        ("text", "It is "),
        ("answer", r"\boxed{42}"),
        ("text", ", sure."),
    ]


def test_output_that_no_call_made_is_invented_whatever_it_looks_like() -> None:
    text = f"```python\nprint(6*7)\n```{OUTPUT}"
    assert [kind for kind, _ in kinds(text, call(text))] == ["code", "output"]
    assert kinds(text) == [
        ("code", "```python\nprint(6*7)\n```"),
        ("text", "\n"),
        ("invented", "```output\n42\n```"),
        ("text", "\n"),
    ]
    twice = f"```python\n1\n```{OUTPUT}```python\n1\n```{OUTPUT}"
    assert [k for k, t in kinds(twice, call(twice)) if t.strip()] == [
        "code",
        "output",
        "code",
        "invented",
    ]


def test_a_block_that_the_policy_opened_and_the_tool_filled() -> None:
    text = "```python\nprint(6*7)\n```output\n42\n```\ndone"
    assert kinds(text, call(text, "42\n```\n")) == [
        ("code", "```python\nprint(6*7)\n```output\n"),
        ("output", "42\n```\n"),
        ("text", "done"),
    ]
    # The same text without a call: the policy wrote all of it.
    assert [kind for kind, _ in kinds(text)] == ["code", "invented", "text"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("plain", [("text", "plain")]),
        ("<think>never closed", [("reasoning", "<think>never closed")]),
        ("a<think>b", [("text", "a"), ("reasoning", "<think>b")]),
        ("a</think>b</think>c", [("reasoning", "a</think>b</think>"), ("text", "c")]),
        # The split comes first, as it does for the answer: an open block ends with the reasoning.
        (
            "<think>```python\nx\n</think>\\boxed{5}",
            [
                ("reasoning", "<think>"),
                ("code", "```python\nx\n"),
                ("reasoning", "</think>"),
                ("answer", "\\boxed{5}"),
            ],
        ),
        ("\\boxed{1} or \\boxed{2}", [("text", "\\boxed{1} or "), ("answer", "\\boxed{2}")]),
        ("\\boxed{\\boxed{2}}!", [("answer", "\\boxed{\\boxed{2}}"), ("text", "!")]),
        ("<answer>7</answer>.", [("answer", "<answer>7</answer>"), ("text", ".")]),
        ("sum\n#### 7", [("text", "sum\n"), ("answer", "#### 7")]),
        ("\\boxed{1}</think>none", [("reasoning", "\\boxed{1}</think>"), ("text", "none")]),
        ("```\nuntagged\n```", [("text", "```\nuntagged\n```")]),
        ("~~~output\n3\n~~~", [("invented", "~~~output\n3\n~~~")]),
        ("```python\na\n```python\nb", [("code", "```python\na\n```python\nb")]),
        ("```output\n```\n\\boxed{3}", [("invented", "```output\n```"), ("text", "\n")]),
    ],
)
def test_single_forms(text: str, expected: list[tuple[str, str]]) -> None:
    assert kinds(text)[: len(expected)] == expected


def test_hostile_texts_stay_whole() -> None:
    rng = random.Random(0)
    pieces = [
        "```", "~~~", "````", "```python\n", "``` output\n", "```output\n", "\n", " ", "x = '```'",
        "<think>", "</think>", "\\boxed{", "}", "{", "\\", "\\boxed{4}", "<answer>", "</answer>",
        "#### 4", "\x1b[31m", "\u202e", "\x00", "\ud800", "漢", "\u200b", "'''", '"""',
    ]  # fmt: skip
    for _ in range(2000):
        text, calls = "", []
        for _ in range(rng.randrange(12)):
            piece = "".join(rng.choices(pieces, k=rng.randrange(6)))
            if rng.random() < 0.2:
                place = (len(text), len(text) + len(piece))
                calls.append(ToolCall("", piece, "ok", 0, 0, (0, 0), place))
            text += piece
        found = parts(text, calls)
        assert "".join(part.text for part in found) == text
        assert all(part.text for part in found)
        ran = "".join(part.text for part in found if part.kind == "output")
        assert ran == "".join(text[slice(*c.characters)] for c in calls)
        shown = strip_ansi(ansi(found))
        assert not set(shown) & {"\x1b", "\x00", "\u202e", "\ud800", "\r"}


@pytest.mark.parametrize("places", [[(0, 99)], [(2, 1)], [(-1, 2)], [(0, 3), (2, 4)]])
def test_places_that_do_not_fit_the_text_are_refused(places: list[tuple[int, int]]) -> None:
    calls = [ToolCall("", "", "ok", 0, 0, (0, 0), place) for place in places]
    with pytest.raises(ValueError, match="of this very text"):
        parts("abcdef", calls)


def test_a_call_of_broken_machinery_has_no_place() -> None:
    broken = ToolCall("x", "gone", "infra", 0, 0, (0, 0), (0, 0))
    assert kinds("```python\nx\n```", broken) == [("code", "```python\nx\n```")]


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'tool'"):
        Part("tool", "x")  # type: ignore[arg-type]


# --- as text --------------------------------------------------------------------------------------


def test_every_line_says_who_wrote_it_even_without_colours() -> None:
    text = f"<think>```python\nprint(1)\n```{OUTPUT}</think>\\boxed{{42}}"
    plain = ansi(parts(text, [call(text)]), colour=False)
    assert plain.splitlines() == [
        "   thinks │ <think>",
        "     code │ ```python",
        "          │ print(1)",
        "          │ ```",
        "   output │ ```output",
        "          │ 42",
        "          │ ```",
        "   thinks │ </think>",
        "   answer │ \\boxed{42}",
    ]
    assert strip_ansi(ansi(parts(text, [call(text)]))) == plain
    assert " INVENTED │ ```output" in ansi(parts(text), colour=False)


def test_only_colours_that_survive_as_classes_are_used() -> None:
    """nbconvert, and so what renders notebooks with it, turns others into inline styles."""
    text = f"q```python\n1\n```{OUTPUT}```output\n1\n```\n\\boxed{{1}}"
    page = ansi2html(ansi([Part("question", "?"), *parts(text, [call(text)])]) + legend())
    assert "style=" not in page and "\x1b" not in page
    assert {"ansi-cyan-fg", "ansi-magenta-fg", "ansi-bold"} <= set(page.replace('"', " ").split())


def test_model_text_cannot_colour_itself() -> None:
    shown = ansi([Part("text", "\x1b[32m✓ right\x1b[0m\r\x9b31m\u202e")])
    assert strip_ansi(shown) == r"   writes │ \x1b[32m✓ right\x1b[0m\r\x9b31m\u202e"
    assert visible("a\tb\n漢") == "a\tb\n漢"


def test_long_lines_are_wrapped_and_keep_every_character() -> None:
    rng = random.Random(1)
    for _ in range(200):
        line = "".join(rng.choices("ab  ", k=rng.randrange(1, 90))).strip() + "."
        rows = ansi([Part("text", line)], colour=False, width=10).splitlines()
        bodies = [row[12:] for row in rows]
        assert all(len(body) <= 10 for body in bodies)
        assert "".join(bodies).replace(" ", "") == line.replace(" ", "")
    assert ansi([Part("text", "one two three")], colour=False, width=8).splitlines() == [
        "   writes │ one two",
        "          │ three",
    ]
    with pytest.raises(ValueError, match="width=7"):
        ansi([], width=7)


def test_facts_of_a_trace() -> None:
    done = Completion.from_text("\\boxed{5}", token_ids=[1, 2, 3])
    assert trace(done, gold="6", correct=False, name="p").facts(colour=False) == (
        "p · ✗ wrong · answer 5 · gold 6 · no calls · ended by itself · 3 tokens"
    )
    assert trace(done).facts(colour=False).startswith("answer 5 · no calls")
    assert "\x1b[1;32m✓ right" in trace(done, correct=True).facts()
    ran = [ToolCall("", "", status, 0, 0, (0, 0)) for status in ("ok", "error", "infra")]
    cut = Completion("", "", "", None, (), (), "calls", tuple(ran))
    assert trace(cut).facts(colour=False) == (
        "no answer · 2 calls (1 failed) · tool calls used up · 0 tokens"
    )


def test_show_writes_plain_text_to_a_file(monkeypatch) -> None:
    file = io.StringIO()
    done = trace(Completion.from_text("\\boxed{5}"), question="2+3?")
    show(done, file)
    assert file.getvalue() == done.render(colour=False) + "\n"
    assert " question │ 2+3?" in file.getvalue()
    assert done._repr_mimebundle_() == {"text/plain": done.render(colour=False)}


# --- examples -------------------------------------------------------------------------------------


def frame(**changes: list) -> pd.DataFrame:
    text = f"```python\nprint(6*7)\n```{OUTPUT}\\boxed{{42}}"
    ran = json.dumps([asdict(call(text))])
    rows = []
    for number in range(40):
        kind = number % 4  # right with code, wrong with code, right without, cut off
        rows.append(
            {
                "problem_id": f"p{number % 10}",
                "decoding": "sampled" if number >= 10 else "greedy",
                "sample": number // 10,
                "text": text if kind < 2 else "\\boxed{1}",
                "answer": "42" if kind < 2 else "1" if kind == 2 else None,
                "gold": "42" if kind != 2 else "1",
                "correct": kind in (0, 2),
                "stop": "length" if kind == 3 else "eos",
                "n_tokens": 12,
                "calls": int(kind < 2),
                "failed_calls": 0,
                "tool_calls": ran if kind < 2 else "[]",
            }
        )
    return pd.DataFrame(rows).assign(**changes)


def test_examples_of_each_class_and_what_is_absent() -> None:
    chosen = examples(frame(), n=2, problems=[{"problem_id": "p0", "prompt": [{"content": "Q"}]}])
    found = {group.title: (group.count, len(group.traces)) for group in chosen.groups}
    assert found == {
        "right, after a failed call": (0, 0),
        "right, code at the first try": (10, 2),
        "right, no code ran": (10, 2),
        "wrong, code ran": (10, 2),
        "wrong, no code ran": (0, 0),
        "ended by a limit": (10, 2),
    }
    text = chosen.render(colour=False)
    assert "right, after a failed call: no response" in text
    assert "ended by a limit: 10 of 40 responses" in text
    for group in chosen.groups:
        for each in group.traces:
            assert each.correct == group.title.startswith("right") or "limit" in group.title
            assert bool(each.calls) == ("code ran" in group.title or "try" in group.title) or (
                group.title == "right, no code ran"
            )


def test_the_choice_depends_on_ids_and_seed_alone() -> None:
    rows = frame()
    first = examples(rows, n=3, seed=1)
    assert examples(rows.sample(frac=1, random_state=0), n=3, seed=1) == first
    names = {
        tuple(t.name for g in examples(rows, n=3, seed=seed).groups for t in g.traces)
        for seed in range(5)
    }
    assert len(names) > 1
    failed = rows.assign(failed_calls=rows["calls"])
    groups = {g.title: g.count for g in examples(failed).groups}
    assert groups["right, after a failed call"] == 10
    assert groups["right, code at the first try"] == 0


def test_rows_measured_without_tools_and_broken_rows() -> None:
    rows = frame().drop(columns=["calls", "failed_calls", "tool_calls"])
    groups = {g.title: g.count for g in examples(rows).groups}
    assert groups["right, no code ran"] == 20 and groups["wrong, no code ran"] == 10
    broken = frame(stop=["infra"] * 40)
    assert all(g.count == 0 and g.of == 0 for g in examples(broken).groups)
    with pytest.raises(ValueError, match="n_tokens"):
        examples(rows.drop(columns="n_tokens"))
    with pytest.raises(ValueError, match="n=0"):
        examples(rows, n=0)


def test_a_row_read_back_from_a_file_gives_the_same_trace(tmp_path) -> None:
    frame().to_parquet(tmp_path / "rows.parquet")
    stored = pd.read_parquet(tmp_path / "rows.parquet")
    for before, after in zip(frame().to_dict("records"), stored.to_dict("records"), strict=True):
        assert row_trace(after) == row_trace(before)
