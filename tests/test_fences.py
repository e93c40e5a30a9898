"""Which code blocks a response has closed: variants, hostile texts, and texts that still grow."""

from __future__ import annotations

import random
import re

import pytest

from rlkit import fences
from rlkit.fences import Block, Search, closed_block, still3_block
from rlkit.tokenizer import build_tokenizer

PRINT = "```python\nprint(1)\n```"
Found = tuple[str, str] | None

VARIANTS: dict[str, tuple[str, Found]] = {
    # Behind the fence.
    "nothing after": (PRINT, ("print(1)", "")),
    "one line break": (PRINT + "\n", ("print(1)", "\n")),
    "a blank line": (PRINT + "\n\nSo", ("print(1)", "\n\nSo")),
    "text": (PRINT + " ok", ("print(1)", " ok")),
    "two blocks: the first": (PRINT + "\n```python\n2\n```", ("print(1)", "\n```python\n2\n```")),
    # In front of it.
    "behind a tag": ("<think>" + PRINT, ("print(1)", "")),
    "behind words": ("Code:" + PRINT, ("print(1)", "")),
    "behind spaces": ("  " + PRINT, ("print(1)", "")),
    "in a list": ("1. so\n\n   ```python\n   if x:\n       y\n   ```\n", ("if x:\n    y", "\n")),
    "in a list, closed at the margin": ("- ```py\n  x\n  y\n```", ("x\ny", "")),
    "with tabs": ("\t```python\n\tif x:\n\t\ty\n\t```", ("if x:\n\ty", "")),
    "in a quote of a list": ("* a\n\n    ```python\n\n    x\n    ```", ("\nx", "")),
    # Marks.
    "four": ("````python\nprint(1)\n````", ("print(1)", "")),
    "four around three": ("````python\n'''\n```\n'''\n````", ("'''\n```\n'''", "")),
    "four closed by three": ("````python\nprint(1)\n```\n", None),
    "three closed by four": ("```python\nprint(1)\n````", ("print(1)", "")),
    "tildes": ("~~~python\nprint(1)\n~~~", ("print(1)", "")),
    "tildes are not closed by backticks": ("~~~python\nprint(1)\n```\n", None),
    "backticks are not closed by tildes": ("```python\nprint(1)\n~~~\n", None),
    "two": ("``python\nprint(1)\n``", None),
    # Tags.
    "py": ("```py\n1\n```", ("1", "")),
    "python3": ("```python3\n1\n```", ("1", "")),
    "Python": ("```Python\n1\n```", ("1", "")),
    "PYTHON": ("```PYTHON\n1\n```", ("1", "")),
    "a space before it": ("``` python\n1\n```", ("1", "")),
    "spaces behind it": ("```python  \n1\n```", ("1", "")),
    "an attribute is code": ('```python title="x"\n1\n```', ('title="x"\n1', "")),
    "code on its line": ("```python import math\nmath.pi\n```", ("import math\nmath.pi", "")),
    "pytb": ("```pytb\n1\n```\n", None),
    "pycon": ("```pycon\n>>> 1\n```\n", None),
    "python2": ("```python2\n1\n```\n", None),
    "pythonic": ("```pythonic\n1\n```\n", None),
    "pythön": ("```pythön\n1\n```\n", None),
    "py.test": ("```py.test\n1\n```\n", None),
    "json": ('```json\n{"a": 1}\n```\n', None),
    "text's": ("```text\nhi\n```\n", None),
    "none": ("```\nprint(1)\n```\n", None),
    # On one line.
    "one line": ("```python print(1)```", ("print(1)", "")),
    "one line in a sentence": ("I run ```py print(1) ``` now", ("print(1)", " now")),
    "one line, tildes": ("~~~python print(1)~~~", ("print(1)", "")),
    "one line, fence in a string": ("```python print('```')```", ("print('```')", "")),
    "one line, quote in a comment": ("```python 1 # it's```", ("1 # it's", "")),
    "one line, string left open": ("```python print('a```\n", None),
    # Never closed.
    "then output": ("```python\nprint(1)\n```output\n1\n", ("print(1)", "output\n1\n")),
    "then the next": ("```python\nprint(1)\n```python\n2\n```", ("print(1)", "python\n2\n```")),
    "at all": ("```python\nprint(1)\n", None),
    "by two": ("```python\nprint(1)\n``\n", None),
    # Passed over.
    "own output first": ("```output\n3\n```\n" + PRINT, ("print(1)", "")),
    "own output behind": (PRINT + "\n```output\n3\n```\n", ("print(1)", "\n```output\n3\n```\n")),
    "another language first": ("```json\n{}\n```\n" + PRINT, ("print(1)", "")),
    "another language left open": ("```json\n{}\n" + PRINT, ("print(1)", "")),
    "left open, same marks inside": ("```text\na ```b``` c\n" + PRINT, ("print(1)", "")),
    "an example in a longer fence": ("````text\n" + PRINT.replace("python", "") + "\n````\n", None),
    "untagged first": ("```\nx\n```\n" + PRINT, ("print(1)", "")),
    "a stray fence": ("```\n" + PRINT, ("print(1)", "")),
    "python of another block's line": ("```text\nsee ```python\n```\n", None),
    # Words about fences.
    "inline code": ("Between ` ```python ` marks.\n" + PRINT, ("print(1)", "")),
    "inline code, both": ("`` ```python`` and `` ``` `` mark it.\n" + PRINT, ("print(1)", "")),
    "a sentence": ("I write ```python here.\n" + PRINT, ("print(1)", "")),
    "an empty pair": ("A ```python``` block:\n" + PRINT, ("print(1)", "")),
    "an empty pair alone": ("A ```python ``` block", None),
    "both in a sentence": ("Between ```python and ```:\n" + PRINT, ("print(1)", "")),
    "dots": ("```python ... ``` is how.\n" + PRINT, ("print(1)", "")),
    "no words: it fails when it runs": ("```python print(1```\n", ("print(1", "\n")),
    "an untagged pair": ("A ```block``` is\n" + PRINT, ("print(1)", "")),
    # Literals.
    "in a string": ("```python\ns = '```'\n```", ("s = '```'", "")),
    "in an f-string": ('```python\nf"```{x}```"\n```', ('f"```{x}```"', "")),
    "in a raw string": ("```python\nr'\\```'\n```", ("r'\\```'", "")),
    "in a docstring's line": ('```python\n"""a ```b``` c"""\n```', ('"""a ```b``` c"""', "")),
    "a docstring's own line": ('```python\n"""\n```\nx\n"""\n```', ('"""', '\nx\n"""\n```')),
    "behind an escaped quote": ("```python\n'\\'```'\n```", ("'\\'```'", "")),
    "in a continued string": ("```python\n'a\\\nb```'\n```", ("'a\\\nb```'", "")),
    "behind a closed string": ("```python\nprint('a')``` ", ("print('a')", " ")),
    "behind an empty string": ("```python\nx = ''``` ", ("x = ''", " ")),
    "a string left open": ("```python\nprint('a\n```", ("print('a", "")),
    "a docstring left open": ('```python\n"""a\nb ``` c\n```', ('"""a\nb ``` c', "")),
    "a string left open a line before": ("```python\nx = 'a\ny ```", ("x = 'a\ny", "")),
    "in a comment": ("```python\n# it's ``` here\n", ("# it's", " here\n")),
    # Lines and bytes.
    "CRLF": ("```python\r\nx\r\ny\r\n```\r\n", ("x\ny", "\r\n")),
    "CRLF, indented": (" ```py\r\n x\r\n y\r\n ```\r\n", ("x\ny", "\r\n")),
    "empty": ("```python\n```", ("", "")),
    "blank": ("```python\n\n  \n```", ("\n", "")),
    "NUL": ("```python\nx\0y\n```", ("x\0y", "")),
    "NUL behind code": ("```python\n\0 ```", ("\0", "")),
    "a lone surrogate": ("```python\n'\ud800'\n```", ("'\ud800'", "")),
    "not ASCII": ("```python\nprint('é▁🙂')\n```", ("print('é▁🙂')", "")),
    "no text": ("", None),
    "a fence alone": ("```", None),
    "a tag alone": ("```python", None),
    "only backticks": ("`" * 99, None),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name) -> None:
    text, expected = VARIANTS[name]
    assert closed_block(text) == (expected and Block(*expected))


def test_lines_inside_of_strings_keep_their_blanks() -> None:
    code = 's = """a\n   \nb"""\nprint(len(s))'
    assert closed_block(f"```python\n{code}\n```") == Block(code, "")


def first_closed(text: str) -> tuple[int, Block] | None:
    """The shortest start of ``text`` with a closed block, and that block, from scratch each."""
    for end in range(len(text) + 1):
        if block := closed_block(text[:end]):
            return end, block
    return None


def streamed(text: str, ends: list[int]) -> tuple[int, Block] | None:
    search = Search()
    for end in ends:
        if block := search.find(text[:end]):
            return end, block
    return None


@pytest.mark.parametrize("name", VARIANTS)
def test_a_growing_text_is_closed_at_the_first_closing_fence(name) -> None:
    """By character: nothing stands behind the fence yet, and the code is that of the whole text,
    unless what follows would have told otherwise.
    """
    text, expected = VARIANTS[name]
    found = streamed(text, list(range(len(text) + 1)))
    assert found == first_closed(text)
    if expected is None:
        assert found is None
        return
    assert found is not None
    end, block = found
    assert block == Block(expected[0], "")
    closing = text[len(text) - len(expected[1]) - 1]
    assert text[:end].endswith(closing * 3) and closed_block(text[: end - 1]) is None


PIECES = (
    "```python\n", "```python ", "```py", "thon", "```", "`", "``", "~~~", "~", "````python\n",
    "```json\n", "```output\n", "\n", "\n", "\n", "   ", "x = 1", "print(", "'", '"', '"""', "#",
    "\\", "\r\n", "text", "é", "<think>",
)  # fmt: skip


def test_a_growing_text_gives_the_same_as_all_of_it_at_once() -> None:
    """In steps of any size: what was settled before never has to be taken back."""
    rng = random.Random(0)
    closed = 0
    for _ in range(3000):
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 25)))
        ends = sorted({*rng.choices(range(len(text) + 1), k=rng.randint(0, 12)), len(text)})
        expected = next(((e, b) for e in ends if (b := closed_block(text[:e]))), None)
        assert streamed(text, ends) == expected, repr(text)
        assert streamed(text, list(range(len(text) + 1))) == first_closed(text), repr(text)
        closed += expected is not None
    assert 500 < closed < 2800


def test_embedded_tokens_close_at_the_first_closing_fence() -> None:
    tokenizer = build_tokenizer()
    rng = random.Random(1)
    closed = 0
    for _ in range(500):
        text = "".join(rng.choices(PIECES, k=20))
        pieces = [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]]
        text = "".join(pieces)
        ends = [len("".join(pieces[: k + 1])) for k in range(len(pieces))]
        expected = next(((e, b) for e in ends if (b := closed_block(text[:e]))), None)
        assert streamed(text, ends) == expected
        closed += expected is not None
    assert 50 < closed < 450


LINES = (
    "```python", "```py", "````python", "~~~Python3", "```", "```", "````", "~~~", "   ```",
    "```json", "```output", "x = 1", "  y = 2", "print('```')", "", "'''",
    "# it's",
)  # fmt: skip


def by_lines(lines: list[str]) -> tuple[int, str] | None:
    """A plain reader of whole lines: (place where the first python block closes, its code)."""
    marks, code, at = "", None, 0
    for line in lines:
        fence = re.match(r"( *)(`{3,}|~{3,})(\w*)", line)
        opens = fence is not None and fence[3].lower() in ("python", "python3", "py")
        ends = fence is not None and fence[2].startswith(marks)
        if code is not None and fence is not None and ends:
            return at + len(fence[1] + marks), "\n".join(code)
        if code is not None:
            code.append(line)
        elif fence is not None and opens:
            marks, code = fence[2], []
        elif marks and ends:
            marks = ""
        elif not marks and fence is None and "print('```')" in line:
            marks = "```"  # a fence behind text, and its line says no more of it
        elif not marks and fence is not None:
            marks = fence[2]
        at += len(line) + 1
    return None


def test_whole_lines_as_a_plain_reader_takes_them() -> None:
    rng = random.Random(2)
    closed = 0
    for _ in range(3000):
        lines = rng.choices(LINES, k=rng.randint(1, 14))
        text = "\n".join(lines) + "\n"
        found, expected = streamed(text, list(range(len(text) + 1))), by_lines(lines)
        assert (found and found[0]) == (expected and expected[0]), repr(text)
        if found and expected:
            code = expected[1]
            indented = next((x for x in code.split("\n") if x), "").startswith(" ")
            assert found[1].rest == "" and (indented or found[1].code == code)
            closed += 1
    assert closed > 1000


@pytest.mark.parametrize(
    ("before", "unit"),
    [
        ("", "`"),
        ("", "``` "),
        ("", "```\n"),
        ("", "x ```python y\n"),
        ("```json\n", "a```b"),
        ("`````python\n", "```\n"),
        ("```python\nx = '", "a```b"),
        ('```python\n"""', "``` "),
    ],
)
def test_a_megabyte_is_read_once(before, unit) -> None:
    """A reader that looked back at each fence would need hours."""
    text = before + unit * (1_000_000 // len(unit))
    block = closed_block(text)
    assert block is None or len(text) > len(block.rest)


@pytest.mark.parametrize("before", ["", "```python\nx = '", "`````json\n", "`````python\n"])
@pytest.mark.parametrize("unit", ["``` ", "```\n", "```json\n{}\n```\n", "a```b"])
def test_a_growing_text_is_not_searched_again(before, unit) -> None:
    """Of a text shown character by character, only the newest part is looked at each time."""
    text = before + unit * (4000 // len(unit))
    search, widest = Search(), 0
    for end in range(len(text) + 1):
        widest = max(widest, end - search._at)
        if search.find(text[:end]):
            return
    assert widest <= 20 + len(before)


STILL3: dict[str, tuple[str, Found]] = {
    "as asked for": ("```python\nprint(1)\n```\n\n", ("print(1)", "")),
    "text behind": ("```python\nprint(1)\n```\n\nSo", ("print(1)", "So")),
    "one line break stops nothing": ("```python\nprint(1)\n```\n", None),
    "no line break": ("```python\nprint(1)\n```", None),
    "one line break, then on to a later fence": (
        "```python\nprint(1)\n```\n1.\n```\nx\n```\n\n",
        ("print(1)\n```\n1.\n```\nx\n```".removesuffix("```").strip(), ""),
    ),
    "the last opening counts": ("```python\n1\n```\n```python\n2\n```\n\n", ("2", "")),
    "own output is run": ("```output\n3\n```\n\n", ("```output\n3", "")),
    "no opening: the whole text is run": ("So x = 3.\n```\n\n", ("So x = 3.", "")),
    "other cases are no opening": ("```Python\n1\n```\n\n", ("```Python\n1", "")),
    "python3 leaves its number": ("```python3\n1\n```\n\n", ("3\n1", "")),
    "a longer fence leaves a mark": ("```python\n1\n````\n\n", ("1\n`", "")),
    "tildes stop nothing": ("~~~python\n1\n~~~\n\n", None),
    "another tag: prose and fence are run": ("So\n```py\n1\n```\n\n", ("So\n```py\n1", "")),
    "no tag: the same": ("So\n```\n1\n```\n\n", ("So\n```\n1", "")),
    "in a list, the first indent goes": (
        "1. So\n   ```python\n   1\n   2\n   ```\n\n",
        ("1\n   2", ""),
    ),
    "fence in a literal": ("```python\nprint('```')\n```\n\n", ("print('```')", "")),
    "forgotten fence, invented output": (
        "```python\n1\n```output\n2\n```\n\n",
        ("1\n```output\n2", ""),
    ),
    "nothing": ("```\n\n", ("", "")),
    "CRLF": ("```python\r\n1\r\n```\r\n\r\n", None),
}


@pytest.mark.parametrize("name", STILL3)
def test_the_study_s_rule(name) -> None:
    text, expected = STILL3[name]
    assert still3_block(text) == (expected and Block(*expected))


class Counting:
    """A pattern that counts the characters it is sent over."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self.pattern, self.seen = pattern, 0

    def search(self, text: str, start: int, end: int) -> re.Match[str] | None:
        found = self.pattern.search(text, start, end)
        self.seen += (found.end() if found else end) - start
        return found


@pytest.mark.parametrize("quote", ['"', "'''"])
def test_a_string_of_fences_is_read_once(monkeypatch, quote) -> None:
    """From its start at each fence, one response in a rut would hold up a batch for minutes."""
    counting = Counting(fences._LITERAL_ENDS[quote])
    monkeypatch.setitem(fences._LITERAL_ENDS, quote, counting)
    search, text = Search(), f"```python\ns = {quote}"
    for _ in range(200):
        text += "a ``` "
        assert search.find(text) is None
    assert 1000 < counting.seen <= len(text)
    block = search.find(text + quote + "\n```")
    assert block is not None and block.code == text.removeprefix("```python\n") + quote
