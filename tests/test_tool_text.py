"""Tool output as text: nothing in it may end its fence, its turn, or begin a new one."""

from __future__ import annotations

import random
import re
import traceback
from types import SimpleNamespace

import pytest

from rlkit import paths
from rlkit.sandbox.result import Result
from rlkit.tool_text import BREAK, LEFT_OUT, describe, format_output, head_tail, safe_text

TOKENS = [
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|reserved_special_token_0|>",
    "<|0.00|>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜▁pad▁｜>",
    "｜DSML｜",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "<seed:think>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<bos>",
    "<eos>",
    "<s>",
    "</s>",
    "<pad>",
    "<unk>",
    "<mask>",
    "<unused12>",
    "<extra_id_0>",
    "<function=run>",
    "<BOS_TOKEN>",
    "<fim-prefix>",
    "<image>",
    "◁think▷",
    "◁/think▷",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[gMASK]",
    "[EOS]",
    "[|endofturn|]",
    "[@BOS@]",
]
PLAIN = [
    "a<b",
    "a<b>c",
    "x <= 3 | y",
    "0<|x|<1",
    "|x|",
    "[1, 2]",
    "[True]",
    "[nan]",
    "[x_1]",
    "[ABC] = 12",
    "y = x[mask]",
    "A[i][j]",
    "<class 'int'>",
    "<re.Match object; span=(0, 1), match='a'>",
    "dtype('<f8')",
    "``x``",
    "~x + ~~y",
    'File "<string>", line 1, in <module>',
    "<function f.<locals>.<lambda> at 0x7f>",
    "\tüñí ∑ 数\n",
]
ALPHABET = [*"`~<>|｜[]/_s▁\r\n\t \x00\x1b\x7f\x85\ud800a", BREAK, "think", "im_end", "INST", "SYS"]
ALPHABET += ["<|", "|>", "</", "``", "eos", "module", "<|im\x00_end|>", "◁", "▷"]
FOREIGN = ("§§", "aa", "\n\n", "`a", "module", "%end%", "!")
GENERIC = re.compile(
    r"<[|｜][^<>\n]*[|｜]>|</?(?!module>)([a-z]\w+|s)>|\[/?(inst|tool_calls)\]|<</?sys>>", re.I
)
LIMITS = SimpleNamespace(cpu_seconds=1.0, wall_seconds=4.0, memory_mib=512)


def check_safe(text: str, tokens: tuple[str, ...] = ()) -> None:
    assert safe_text(text, tokens) == text
    assert not re.search(r"`{3}|~{3}", text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text)
    assert not GENERIC.search(text)
    assert not [token for token in tokens if len(token) > 1 and token.lower() in text.lower()]
    text.encode()


@pytest.mark.parametrize("token", TOKENS)
def test_tokens_are_broken_behind_their_first_character(token):
    for case in (token, token.upper() if token[0] == "<" else token):
        found = safe_text(f"x{case}{case}y")
        assert case not in found
        assert found.startswith(f"x{case[0]}{BREAK}{case[1]}") or case.startswith("<<")
        assert found.replace(BREAK, "") == f"x{case}{case}y"


@pytest.mark.parametrize("text", PLAIN)
def test_mathematics_and_python_stay_as_they_are(text):
    assert safe_text(text) == text


def test_line_ends_control_bytes_and_surrogates():
    assert safe_text("a\r\nb\rc\n\td\x00\x1b[2J\x08\x7f\x85e") == "a\nb\nc\n\td[2Je"
    assert safe_text("x\ud83d\ude00y") == "x\ufffd\ufffdy"


def test_a_token_is_not_formed_by_removing_control_bytes():
    assert safe_text("<|im\x00_end|>") == f"<{BREAK}|im_end|>"
    assert safe_text("`\x7f`\x00`") == f"``{BREAK}`"
    assert safe_text("</\x00think\x85>") == f"<{BREAK}/think>"


@pytest.mark.parametrize("mark", "`~")
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 100])
def test_no_run_of_three_is_left(mark, n):
    runs = re.findall(f"{mark}+", safe_text(mark * n))
    assert max(map(len, runs)) <= 2 and sum(map(len, runs)) == n


def test_foreign_tokens():
    assert safe_text("a %END% b§§§", FOREIGN) == f"a %{BREAK}END% b§{BREAK}§{BREAK}§"
    assert safe_text("wow!!", FOREIGN) == "wow!!"  # one character cannot be broken
    assert safe_text("x]~b]y", ["]~b]"]) == f"x]{BREAK}~b]y"
    with pytest.raises(ValueError, match=r"U\+200B"):
        safe_text("ab", [f"a{BREAK}b"])


@pytest.mark.parametrize("tokens", [(), FOREIGN], ids=["none", "foreign"])
def test_random_texts_end_safe(tokens):
    rng = random.Random(7)
    for _ in range(4000):
        text = "".join(rng.choices(ALPHABET + list(tokens), k=rng.randrange(25)))
        check_safe(safe_text(text, tokens), tokens)


@pytest.mark.parametrize("tokens", [(), FOREIGN], ids=["none", "foreign"])
def test_random_blocks_hold_exactly_one_fence(tokens):
    rng = random.Random(8)
    statuses = ["ok", "error", "timeout", "memory", "output", "refused"]
    for _ in range(2000):
        words = ["".join(rng.choices(ALPHABET, k=rng.randrange(30))) for _ in range(4)]
        cut = rng.choice([0, 0, 7])
        stdout = LEFT_OUT.format(7).join((words[0], words[1])) if cut else words[0]
        result = Result(rng.choice(statuses), stdout, "", words[2], words[3], words[1], cut=cut)
        options = {
            "max_characters": rng.randrange(4, 40),
            "errors": rng.choice(["last_line", "traceback"]),
        }
        check_safe(describe(result, tokens=tokens, **options), tokens)
        block = format_output(result, tokens=tokens, **options)
        assert block.startswith("```output\n") and block.endswith("\n```\n")
        assert re.findall("`{3,}|~{3,}", block) == ["```", "```"]
        check_safe(block[len("```output\n") : -len("\n```\n")], tokens)
        study = format_output(result, compat="still3", code="x", tokens=tokens)
        assert study.startswith("```Output\n") and study.endswith("```\n\n")
        assert re.findall("`{3,}|~{3,}", study) == ["```", "```"]
        check_safe(study[len("```Output\n") : -len("```\n\n")], tokens)


def test_hostile_repetition_takes_linear_time():
    """Each of these took minutes if a search began again at every character."""
    for part in ("<|", "<", "[|a", "｜a", "<a", "`", "[/A", "<｜▁", "[A_", "◁/", "~"):
        safe_text(part * 200_000 + "a" * 200_000)
    describe(Result("error", traceback=" " * 200_000 + "~" * 200_000))


def test_head_tail():
    assert head_tail("abcdef", 6) == ("abcdef", 0)
    assert head_tail("abcdefg", 5) == ("ab... [2 characters left out] ...efg", 2)
    assert head_tail("", 2) == ("", 0)
    with pytest.raises(ValueError, match="limit=1"):
        head_tail("abc", 1)


def test_a_second_cut_goes_on_at_the_first():
    rng = random.Random(9)
    for _ in range(2000):
        text = "".join(rng.choices("abcdefgh", k=rng.randrange(60)))
        first, second = rng.randrange(2, 50), rng.randrange(2, 50)
        once, n = head_tail(text, first)
        twice, m = head_tail(once, second, n)
        if second >= first:
            assert (twice, m) == (once, n)
        else:
            assert len(twice.replace(LEFT_OUT.format(m), "")) == len(text) - m
            assert m == max(len(text) - second, 0)
            head, _, tail = twice.partition(LEFT_OUT.format(m)) if m else (text, "", "")
            assert text.startswith(head) and text.endswith(tail)


def test_a_short_end_leaves_its_room_to_the_other():
    mark, more = LEFT_OUT.format(10), LEFT_OUT.format(13)
    assert head_tail(f"a{mark}bcdefg", 4, 10) == (f"a{more}efg", 13)
    assert head_tail(f"abcdef{mark}g", 4, 10) == (f"abc{more}g", 13)
    assert head_tail(f"abcd{mark}efgh", 5, 10) == (f"ab{more}fgh", 13)


def test_a_second_cut_without_a_mark_goes_on_in_the_middle():
    assert head_tail("abcdef", 4, 10) == ("ab... [12 characters left out] ...ef", 12)
    assert head_tail("ab", 4, 10) == ("a... [10 characters left out] ...b", 10)


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (Result("ok", "1\n2\n"), "1\n2"),
        (Result("ok", "1\n", echo="'x'"), "1\n'x'"),
        (Result("ok", echo="5"), "5"),
        (Result("ok", " \n", stderr="a warning"), "(no output; use print to show values)"),
        (Result("error", "1\n", "", "E: x", "Traceback:\n  y\nE: x\n"), "1\nTraceback:\n  y\nE: x"),
        (Result("error", error="E: x"), "E: x"),
        (Result("error"), "(failed without an error message)"),
        (
            Result("timeout", "1\n", cpu_seconds=1.0, wall_seconds=1.4),
            "1\n(stopped at the time limit)",
        ),
        (Result("memory"), "(out of memory)"),
        (Result("memory", error="MemoryError"), "MemoryError\n(out of memory)"),
        (Result("output", "aaa"), "aaa\n(stopped: it printed too much)"),
        (
            Result("refused", error="PermissionError: no"),
            "PermissionError: no\n(not allowed here: files, network, other processes)",
        ),
        (Result("ok", "1\n", variables="kept"), "1"),
        (
            Result("ok", "1\n", variables="restored"),
            "1\n(earlier cells were run again to restore their variables)",
        ),
        (
            Result("error", error="NameError: x", variables="lost"),
            "NameError: x\n(the variables of earlier cells are lost; define them again)",
        ),
    ],
)
def test_what_the_model_reads(result, text):
    assert describe(result) == text
    assert format_output(result) == f"```output\n{text}\n```\n"


def test_limits_are_named():
    def shown(status, **seconds):
        return describe(Result(status, **seconds), limits=LIMITS)

    text = "(stopped at its time limit: 1 s of CPU, 4 s in all)"
    # The same, whichever came first: that depends on what else the machine does.
    assert shown("timeout", cpu_seconds=1.01, wall_seconds=2.0) == text
    assert shown("timeout", cpu_seconds=0.1, wall_seconds=4.0) == text
    assert shown("memory") == "(out of memory; the limit is 512 MiB)"


def test_options_of_describe():
    result = Result("error", "1\n", "", "E: x", "Traceback:\n  y\nE: x\n", echo="5")
    assert describe(result, errors="last_line", echo=False) == "1\nE: x"
    for options in ({"errors": "all"}, {"max_characters": 3}):
        with pytest.raises(ValueError, match=r"errors=.*max_characters="):
            describe(result, **options)


def test_infrastructure_faults_never_become_text():
    result = Result("infra", "1", error="worker died")
    for show in (describe, format_output):
        with pytest.raises(ValueError, match=r"infra.*worker died"):
            show(result)
    with pytest.raises(ValueError, match="infra"):
        format_output(result, compat="still3", code="")


def test_a_real_traceback_keeps_its_form():
    """The tildes that Python 3.11 and later put under an expression would be broken up."""
    trace = (
        'Traceback (most recent call last):\n  File "<string>", line 1, in <module>\n'
        "    (abcde + 1) / 0\n    ~~~~~~~~~~~~^~~\nZeroDivisionError: division by zero\n"
    )
    result = Result("error", error="ZeroDivisionError: division by zero", traceback=trace)
    assert describe(result) == trace.replace("    ~~~~~~~~~~~~^~~\n", "").rstrip()
    try:
        exec("(1 + 1 + 1) / (1 - 1)")
    except ZeroDivisionError:
        text = describe(Result("error", error="", traceback=traceback.format_exc()))
    assert BREAK not in text and text.endswith("ZeroDivisionError: division by zero")


def test_long_output_loses_its_middle():
    text = describe(Result("ok", "a" * 50 + "b" * 60), max_characters=100)
    assert text == "a" * 50 + "... [10 characters left out] ..." + "b" * 50
    assert describe(Result("ok", "a" * 100), max_characters=100) == "a" * 100
    stdout, cut = head_tail("a" * 5000 + "b" * 5000, 8000)
    text = describe(Result("ok", stdout, cut=cut))
    assert text == "a" * 1000 + "... [8000 characters left out] ..." + "b" * 1000
    assert describe(Result("ok", stdout, cut=cut), max_characters=8000) == stdout


def test_output_and_error_share_the_room():
    stdout, trace = "a" * 300, "e" * 300
    text = describe(Result("error", stdout, "", "e", trace), max_characters=200)
    mark = "... [200 characters left out] ..."
    assert text == f"{'a' * 50}{mark}{'a' * 50}\n{'e' * 50}{mark}{'e' * 50}"
    text = describe(Result("error", "a" * 20, "", "e", trace), max_characters=200)
    assert text == f"{'a' * 20}\n{'e' * 90}... [120 characters left out] ...{'e' * 90}"
    text = describe(Result("error", stdout, "", "E: x"), max_characters=200)
    assert text == f"{'a' * 98}... [104 characters left out] ...{'a' * 98}\nE: x"


def study(result: Result, code: str = "code") -> str:
    block = format_output(result, compat="still3", code=code)
    assert block.startswith("```Output\n") and block.endswith("```\n\n")
    return block.removeprefix("```Output\n").removesuffix("```\n\n")


SILENT = "TypeError: a bytes-like object is required, not 'list'"


@pytest.mark.parametrize(
    ("result", "code", "text"),
    [
        (Result("ok", " 1\n2\n"), "print(1)", "1\n2"),
        (Result("ok"), "y = 10", SILENT),
        (Result("ok", echo="5"), "2 + 3", SILENT),
        (Result("ok", "\n"), "print('')", ""),
        (Result("ok"), "", "None"),
        (Result("ok"), " \n", "None"),
        (Result("ok", "3"), "my_input('x')", "RuntimeError"),
        (Result("ok", "3"), "import os\nos.system('ls')", "RuntimeError"),
        (Result("ok", "3"), "os_system('ls')", "RuntimeError"),  # the dot is any character
        (Result("ok", "3"), "print(input)", "3"),
        (Result("timeout", "3"), "while 1: 0", "Timeout Error"),
        (Result("error", "3", "", "E: x", "Traceback:\n  y\nE: x\n"), "x", "E: x"),
        (Result("error", "", "", "E: x"), "x", "E: x"),
        (Result("error", "", "", "b", "Traceback:\nE: a\nb\n"), "x", "b"),
        (Result("error", "", "", "", "Traceback:\nE: a\n\n"), "x", ""),
        (Result("memory", "3"), "x", "MemoryError"),
        (Result("refused", "3", error="PermissionError: no"), "x", "PermissionError: no"),
        (Result("refused", "3"), "x", "RuntimeError"),
        (Result("ok", "a" * 200 + "b" * 200), "x", "a" * 200 + "b" * 200),
        (Result("ok", "a" * 201 + "b" * 200), "x", "a" * 200 + "..." + "b" * 200),
        (Result("error", error="E: " + "a" * 398), "x", "E: " + "a" * 197 + "..." + "a" * 200),
        (Result("ok", "</think>"), "x", f"<{BREAK}/think>"),
        (Result("ok", "x`"), "x", f"x`{BREAK}"),
    ],
)
def test_the_texts_of_the_study(result, code, text):
    assert study(result, code) == text


def test_the_study_of_a_flood_keeps_both_ends():
    stdout, cut = head_tail("a" * 9000 + "b" * 9000, 8192)
    assert study(Result("output", stdout, cut=cut)) == "a" * 200 + "..." + "b" * 200


def test_silent_code_fails_as_in_the_study():
    """The cause, with the library that the study searches with."""
    regex = pytest.importorskip("regex")
    with pytest.raises(TypeError) as error:
        regex.search(r"(\s|^)?input\(", ["y = 10"][:-1])
    assert traceback.format_exception_only(error.value)[-1].strip() == SILENT


def test_compat_needs_its_arguments():
    for options in ({"compat": "still3"}, {"compat": "still4", "code": "x"}):
        with pytest.raises(ValueError, match=r"compat=.*code="):
            format_output(Result("ok", "1"), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"status": "fine"},
        {"variables": "gone"},
        {"cut": -1},
        {"cpu_seconds": float("nan")},
        {"wall_seconds": float("inf")},
    ],
)
def test_results_are_checked(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*expected"):
        Result(**{"status": "ok", **options})
    assert Result("ok").ok and not Result("error").ok


def test_a_tokenizer_finds_none_of_its_tokens():
    """With a real tokenizer, whose fences and tags are tokens of their own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(paths.root() / "data" / "models" / "tiny-tool")
    names = {t: i for t, i in tokenizer.get_vocab().items() if re.match(r"<.{3,}>$|```", t)}
    assert {"<|end|>", "<|user|>", "</think>", "```output\n", "```"} <= names.keys()
    hostile = "".join(f"{name}{name} x{name[0]}{name}" for name in names)
    assert (
        names.keys()
        == set(tokenizer.convert_ids_to_tokens(tokenizer.encode(hostile))) & names.keys()
    )
    for tokens in ((), tokenizer.all_special_tokens):
        ids = tokenizer.encode(safe_text(hostile, tokens), add_special_tokens=False)
        assert not set(ids) & set(names.values())
