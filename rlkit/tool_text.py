r"""A tool's output as text for a prompt: nothing in it can pass for the prompt's own structure.

A program chooses what it prints, so its output is hostile: it may close its own fence, end the
turn, or open a new one. ``safe_text`` splits such texts by U+200B, which shows nothing and which no
fence or token holds. Encode the text by ``output_ids``, and mask it in the loss.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from rlkit.sandbox.limits import Limits
from rlkit.sandbox.result import LEFT_OUT, Result

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BREAK = "\u200b"
"""Zero-width space: put into fences and tokens so that they are none any more."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_FENCE = re.compile(r"(``)(?=`)|(~~)(?=~)")
# Only the first character is consumed and the rest is looked at: overlapping tokens are all broken
# in one pass, and as no look-ahead accepts U+200B at its start, a second pass changes nothing.
_TOKEN = r"""
    <(?=[|｜][^<>\n]*[|｜]>)                # <|im_end|>, <｜end▁of▁sentence｜>
  | ｜(?=[A-Za-z_▁]{2,}｜)                  # ｜DSML｜
  | \[(?=\|[A-Za-z_]{3,}\|\])               # [|endofturn|]
    # Names that Python writes itself: they stand in every traceback.
  | [<◁](?!(?:module|string|stdin|cell|lambda|locals|(?:list|dict|set)comp|genexpr)>)
        (?=/?(?:s|[^\W\d][\w.:=▁-]+)/?[>▷])  # <think>, </s>, <<SYS>>, <seed:think>, <function=f>
    # Indices and lists (x[mask], [True], [x_1]) and areas ([ABC]) are no tokens.
  | \[(?=/[A-Za-z_]{2,}\]|@\w+@\]|(?:inst|sys|tool_calls|tool_results|available_tools)\]
        |(?-i:[A-Z]{2,}(?:_[A-Z]{2,})+|[gs]?MASK|CLS|SEP|PAD|UNK|BOS|EOS|EOT|EOP|SOP|THINK|ARGS
            |IMG|AUDIO|PREFIX|MIDDLE|SUFFIX)\])  # [INST], [/INST], [TOOL_CALLS], [gMASK]
"""


def safe_text(text: str, tokens: Sequence[str] = ()) -> str:
    r"""Make a tool's output safe to put into a prompt; ``safe_text`` of the result changes nothing.

    Line ends become "\n"; other control bytes except "\t" are removed; lone surrogates become
    U+FFFD; runs of three backticks or tildes and all that looks like a token of a chat template or
    of a reasoning format (in any case) are split by U+200B.

    Args:
        tokens: more texts to break, for example ``tokenizer.all_special_tokens``. Those of one
            character cannot be broken and are passed over.

    Raises:
        ValueError: one of ``tokens`` holds U+200B, so that breaking could form it.
    """
    if bad := [token for token in tokens if BREAK in token]:
        raise ValueError(f"tokens={bad!r} hold U+200B: expected texts without it; leave them out")
    # First all that removes characters: a token must not be formed behind the search for it.
    text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = _FENCE.sub(rf"\g<0>{BREAK}", _SURROGATE.sub("\ufffd", text))
    text = re.sub(_TOKEN, rf"\g<0>{BREAK}", text, flags=re.VERBOSE | re.IGNORECASE)
    if literal := [f"{re.escape(t[0])}(?={re.escape(t[1:])})" for t in tokens if len(t) > 1]:
        text = re.sub("|".join(literal), rf"\g<0>{BREAK}", text, flags=re.IGNORECASE)
    return text


def output_ids(block: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids of a tool's output; special tokens in it are text like any other.

    The one way in which generation and fine-tuning encode an output, so that their ids agree.
    """
    ids = tokenizer(block, add_special_tokens=False, split_special_tokens=True)
    return tuple(int(i) for i in ids["input_ids"])


def head_tail(text: str, limit: int, left_out: int = 0) -> tuple[str, int]:
    """Keep ``limit`` characters of a text: its head, ``LEFT_OUT`` with a number, and its tail.

    Args:
        limit: characters to keep, >= 2; the mark does not count.
        left_out: characters that an earlier cut took from the text; this cut goes on at its mark
            (at the middle of the text if it shows none).

    Returns:
        The text, and the number of characters left out by both cuts together.
    """
    if limit < 2:
        raise ValueError(f"limit={limit}: expected at least 2 characters, one for each end")
    before, mark, after = text.partition(LEFT_OUT.format(left_out)) if left_out else (text, "", "")
    if not mark:
        half = len(text) // 2 if left_out else limit // 2
        before, after = text[:half], text[half:]
    count = left_out + max(len(before) + len(after) - limit, 0)
    if not count:
        return text, 0
    tail = min(len(after), max(limit - limit // 2, limit - len(before)))
    return before[: limit - tail] + LEFT_OUT.format(count) + after[len(after) - tail :], count


def describe(
    result: Result,
    *,
    echo: bool = True,
    errors: Literal["last_line", "traceback"] = "traceback",
    max_characters: int = 2000,
    limits: Limits | None = None,
    tokens: Sequence[str] = (),
) -> str:
    """What the model reads about a run, without a fence: output, error, and why it was stopped.

    Args:
        echo: also show the value of the last expression.
        errors: show the last line of a traceback or all of it.
        max_characters: of output and traceback together, >= 4; longer ones lose their middles.
            Messages in round brackets come on top.
        limits: name these in the messages.
        tokens: see ``safe_text``.

    Raises:
        ValueError: status ``infra``; a fault of the machinery is no news for the model.
    """
    if result.status == "infra":
        raise ValueError(
            f"status 'infra' ({result.error or 'no details'}): expected a run of the code itself; "
            "end the row without a reward instead of showing it to the model"
        )
    if errors not in ("last_line", "traceback") or max_characters < 4:
        raise ValueError(
            f"errors={errors!r}, max_characters={max_characters}: expected 'last_line' or "
            "'traceback', and at least 4 characters"
        )
    # Python's own lines of tildes under an expression would be broken up as fences: left out.
    trace = _UNDERLINE.sub("", result.traceback) if errors == "traceback" else ""
    # Made safe before the cut: what is removed takes no room, what is added is counted.
    error = safe_text(trace or result.error, tokens).rstrip()
    output = [safe_text(result.stdout, tokens).rstrip(), safe_text(result.echo, tokens) * echo]
    body = "\n".join(filter(None, output))
    room = min(len(error), max(max_characters // 2, max_characters - len(body)))
    parts = [
        head_tail(body, max(max_characters - room, 2), result.cut)[0],
        head_tail(error, max(room, 2))[0],
        _message(result, limits)
        or ("" if body or error else "(no output; use print to show values)"),
        _VARIABLES.get(result.variables, ""),
    ]
    # Once more, as the cuts and joins may have formed a token.
    return safe_text("\n".join(filter(None, parts)), tokens)


def _message(result: Result, limits: Limits | None) -> str:
    """One line about the status, "" if the output and the error say it all."""
    if result.status == "timeout" and limits:
        # Both: which of them came first depends on what else the machine does, and the same
        # program must read the same.
        cpu, wall = limits.cpu_seconds, limits.wall_seconds
        return f"(stopped at its time limit: {cpu:g} s of CPU, {wall:g} s in all)"
    if result.status == "memory" and limits:
        return f"(out of memory; the limit is {limits.memory_mib:g} MiB)"
    if result.status == "error" and (result.error or result.traceback):
        return ""
    return _MESSAGES.get(result.status, "")


_MESSAGES = {
    "error": "(failed without an error message)",
    "timeout": "(stopped at the time limit)",
    "memory": "(out of memory)",
    "output": "(stopped: it printed too much)",
    "refused": "(not allowed here: files, network, other processes)",
}
_VARIABLES = {
    "restored": "(earlier cells were run again to restore their variables)",
    "lost": "(the variables of earlier cells are lost; define them again)",
}
_UNDERLINE = re.compile(r"^ +(?=\^*~)[~^]++\n", re.MULTILINE)
# As the study searches them: the groups match anything, and the dot any character.
_STILL3_REFUSES = re.compile(r"(\s|^)?input\(|(\s|^)?os.system\(")


def format_output(
    result: Result,
    *,
    compat: Literal["still3"] | None = None,
    code: str | None = None,
    tokens: Sequence[str] = (),
    **shown: Any,
) -> str:
    r"""The fenced block that follows a code block in a response.

    By default "```output\n", ``describe``, "\n```\n". With ``compat="still3"`` the block that the
    published code of arXiv 2503.04548 inserts after the code's closing fence and its blank line:
    "```Output\n", text, "```\n\n". The text is, stripped and cut to 200 characters, "..." and 200:

    * "None" for empty code; "RuntimeError" for code with ``input(`` or ``os.system(``;
    * "Timeout Error" after a timeout;
    * the last line of the traceback after an error: what was printed before is lost;
    * a TypeError if not one character was printed: that code would then evaluate the last line,
      but hands a list to a search in text, so it fails whatever the line is;
    * otherwise what was printed.

    Only the text is reproduced: not the five seconds, the globals without ``__name__``, an exit
    told as "SystemExit: 0", or a timeout told by ``timeout_decorator`` ("'Timed Out'"). Limits that
    the study has not give the traceback's last line, else MemoryError (memory) or RuntimeError
    (refused). Unlike there, the text passes through ``safe_text``.

    Args:
        code: the code that ran, needed with ``compat``.
        shown: arguments of ``describe``; they mean nothing with ``compat``.

    Raises:
        ValueError: status ``infra``; another ``compat``; ``compat`` without ``code``.

    Source: STILL-3-TOOL/evaluation/run_eval_tool.py and executor.py in
    https://github.com/RUCAIBox/Slow_Thinking_with_LLMs
    """
    text = describe(result, tokens=tokens, **shown)
    if compat is None:
        return f"```output\n{text}\n```\n"
    if compat != "still3" or code is None:
        raise ValueError(
            f"compat={compat!r}, code={code!r}: expected 'still3' and the code that ran"
        )
    text = _still3(result, code.strip()).strip()
    text = safe_text(text if len(text) <= 400 else f"{text[:200]}...{text[-200:]}", tokens)
    # The closing fence has no line of its own: a backtick before it would make it a longer run.
    return f"```Output\n{text}{BREAK if text.endswith('`') else ''}```\n\n"


def _still3(result: Result, code: str) -> str:
    if not code:
        return "None"
    if _STILL3_REFUSES.search(code):
        return "RuntimeError"
    if result.status == "timeout":
        return "Timeout Error"
    if trace := result.traceback or result.error:
        # As there: of a message of several lines the last one counts, even an empty one.
        return trace.removesuffix("\n").split("\n")[-1]
    if result.status in ("memory", "refused", "error"):
        return "MemoryError" if result.status == "memory" else "RuntimeError"
    return result.stdout or "TypeError: a bytes-like object is required, not 'list'"
