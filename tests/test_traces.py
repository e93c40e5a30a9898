"""Traces with a real executor: from a policy that follows a script, and from the shipped one."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import grouped_model, save_tiny_model, tiny_config
from torch import Tensor

from rlkit import arms, models, runs, tasks, templates, traces
from rlkit.checks import ConfigError
from rlkit.completion import Completion
from rlkit.config import ModelConfig
from rlkit.documents import IGNORED, encode_documents, read_documents
from rlkit.engine import Engine, Sampling, load_engine
from rlkit.hint_rules import OPEN, HintRules, cuts, open_thought
from rlkit.hints import hint
from rlkit.sft import train_sft
from rlkit.tokenizer import build_tokenizer
from rlkit.tool_config import ToolConfig
from rlkit.tools import Tools, calling, open_tools
from rlkit.traces import TraceSet, distil, document
from rlkit.verify import GoldError

TOOL = ToolConfig(tool="python")
SHIPPED = ModelConfig(model="tiny-tool")
OUTPUT = re.compile(r"\n```output\n.*?\n```\n", re.DOTALL)


@pytest.fixture(scope="module")
def tools() -> Iterator[Tools]:
    """The tokenizer of the embedded models is the same for all of them."""
    with open_tools(TOOL, build_tokenizer()) as opened:
        assert opened is not None
        yield opened


@pytest.fixture(scope="module")
def shipped() -> Engine:
    return load_engine(SHIPPED)


def row(expression: str, value: int) -> dict[str, Any]:
    return tasks.make_row("large", expression, value, "test")


# A script: what a policy writes at first, in its blocks, and behind their outputs.
Script = tuple[str, Sequence[str], Sequence[str]]


def continued(script: Script, response: str) -> str:
    """What the policy has yet to write, up to its end or the next output."""
    first, codes, ends = script
    *before, current = OUTPUT.split(response)
    if OPEN in current:
        return codes[len(before)].removeprefix(current.rpartition(OPEN)[2])
    return [first, *ends][len(before)].removeprefix(current)


class Speaker:
    """A decoder whose logits follow scripts: the real engine and the real tool loop run on it."""

    def __init__(self, scripts: dict[str, Script]) -> None:
        self.scripts, self.tokenizer = scripts, build_tokenizer()
        self.rows: list[list[int]] = []

    def casting(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def read(self, chunks: Sequence[Sequence[int]]) -> Tensor:
        before = self.rows or [[] for _ in chunks]
        self.rows = [old + list(new) for old, new in zip(before, chunks, strict=True)]
        return self._logits()

    def step(self, tokens: Tensor) -> Tensor:
        return self.read([[int(token)] for token in tokens])

    def select(self, rows: Tensor) -> None:
        self.rows = [list(self.rows[i]) for i in rows]

    def split(self, rows: Tensor) -> Speaker:
        part = Speaker(self.scripts)
        part.rows = [list(self.rows[i]) for i in rows]
        return part

    def join(self, other: Speaker) -> None:
        self.rows += other.rows

    def _logits(self) -> Tensor:
        logits = torch.zeros(len(self.rows), len(self.tokenizer))
        for number, ids in enumerate(self.rows):
            asked, _, response = self.tokenizer.decode(ids).partition("<|assistant|>")
            script = self.scripts[asked.removeprefix("<|user|>Calculate ").removesuffix(".")]
            rest = continued(script, response)
            new = self.tokenizer(rest)["input_ids"] if rest else [self.tokenizer.eos_token_id]
            logits[number, new[0]] = 1e4
        return logits


Speak = Callable[[dict[str, Script]], Engine]


@pytest.fixture
def speak(monkeypatch: pytest.MonkeyPatch) -> Speak:
    tokenizer = build_tokenizer()
    model = grouped_model(tokenizer, positions=400, spread=0.1)  # only its sizes are used

    def make(scripts: dict[str, Script]) -> Engine:
        monkeypatch.setattr("rlkit.engine.make_decoder", lambda *_: Speaker(scripts))
        return Engine(model, tokenizer)

    return make


def coded(code: str, end: str) -> Script:
    return f"<think>{OPEN}", [f"{code}\n```"], [f"</think>\\boxed{{{end}}}"]


SCRIPTS: dict[str, Script] = {
    "6*7": coded("print(6*7)", "42"),
    "2*3": coded("print(2*", "6"),  # right, but nothing ran
    "3*3": ("<think>3*3=9\n</think>\\boxed{9}", [], []),
    "4*4": coded("print(4*4)", "17"),
    "5*5": coded("print(5*5)", "25" + "5" * 150),
    "2*2": (f"<think>{OPEN}", ["print(2*\n```", "print(2*2)\n```"], [OPEN, r"</think>\boxed{4}"]),
}
PROBLEMS = [row(text, int(text[0]) * int(text[2])) for text in SCRIPTS]
BUDGET = 120


def make(engine: Engine, tools: Tools, **changes: Any) -> TraceSet:
    values = {"n": 2, "seed": 0, "sampling": Sampling(BUDGET), "problems": PROBLEMS} | changes
    return distil(engine, model=SHIPPED, template="question", tools=tools, **values)


def test_distilled_responses_ran_code_ended_and_were_right(speak: Speak, tools: Tools) -> None:
    found = make(speak(SCRIPTS), tools)
    first, second = found.documents
    text = "<think>```python\nprint(6*7)\n```\n```output\n42\n```\n</think>\\boxed{42}"
    start = text.index("\n```output")
    assert first == {
        "prompt": PROBLEMS[0]["prompt"],
        "completion": text,
        "outputs": [[start, text.index("</think>")]],
        "problem_id": "large:6*7",
        "answer": "42",
        "sample": 0,
        "tokens": 22,
        "calls": 1,
        "failed_calls": 0,
    }
    assert (second["calls"], second["failed_calls"], len(second["outputs"])) == (2, 1, 2)
    shown = [second["completion"][start:end] for start, end in second["outputs"]]
    assert [text.splitlines()[1] for text in shown] == ["```output"] * 2
    assert "SyntaxError" in shown[0] and "\n4\n" in shown[1]
    about = found.provenance
    assert about["counts"] == {
        "drawn": 12, "with_code": 10, "ran": 8, "ended": 6, "right": 4, "distinct": 2, "kept": 2,
    }  # fmt: skip
    assert about["discarded"] == {
        "no code": 2, "no call ran": 2, "not ended": 2, "wrong": 2, "repeated": 2,
    }  # fmt: skip
    assert about["encoded_as_generated"] == 2
    assert about["model"] == {
        "name": "tiny-tool", "fingerprint": models.fingerprint(SHIPPED), "commit": None,
    }  # fmt: skip
    assert (about["method"], about["seed"], about["template"]) == ("distil", 0, "question")
    assert about["sampling"]["max_new_tokens"] == BUDGET and about["tools"]["max_calls"] == 4
    assert about["limits"]["cpu_seconds"] == TOOL.tool_seconds
    assert {"rlkit", "torch", "transformers"} <= set(about["versions"])


def test_no_trace_at_all_tells_the_counts(speak: Speak, tools: Tools) -> None:
    with pytest.raises(ValueError, match=r"drawn 4, with_code 2, ran 0.*no code 2, no call ran 2"):
        make(speak(SCRIPTS), tools, problems=PROBLEMS[1:3])


def test_bad_arguments_are_refused(speak: Speak, tools: Tools) -> None:
    engine = speak(SCRIPTS)
    bare = {k: v for k, v in PROBLEMS[0].items() if k != "answer"}
    with pytest.raises(ValueError, match="row 0: no column answer"):
        make(engine, tools, problems=[bare])
    with pytest.raises(GoldError, match="problem 'large:6\\*7' has an empty gold answer"):
        make(engine, tools, problems=[{**PROBLEMS[0], "answer": " "}])
    with pytest.raises(ValueError, match="is also that of row 0"):
        make(engine, tools, problems=[PROBLEMS[0]] * 2)
    with pytest.raises(ValueError, match="tools=None: traces need a tool"):
        make(engine, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n=0"):
        make(engine, tools, n=0)
    with pytest.raises(ValueError, match="per_problem=-1"):
        make(engine, tools, per_problem=-1)


def test_a_document_keeps_a_start_that_the_policy_repeats() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer("<think>1</think>")["input_ids"] + [tokenizer.eos_token_id]
    ends = (tokenizer.eos_token_id,)
    twice = Completion.from_ids(ids, tokenizer, stop="eos", prefill="<think>", end_ids=ends)
    made = document(PROBLEMS[0], twice, "<think>")
    assert made == {"prompt": PROBLEMS[0]["prompt"], "completion": "<think><think>1</think>"}
    (example,) = encode_documents([made], tokenizer, "zero_short")
    assert example["input_ids"][-len(ids) :] == ids
    with pytest.raises(ValueError, match="does not begin with prefill='User'"):
        document(PROBLEMS[0], twice, "User")


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("template", ["question", "zero_short"])
def test_documents_encode_to_what_was_generated(
    shipped: Engine, tools: Tools, template: str, mask: bool
) -> None:
    """Prompt, every token written or forced, end token; no loss exactly where the tool wrote."""
    tokenizer = shipped.tokenizer
    rows = tasks.load_problems("large", "train", 6)
    prompts = templates.encode(rows, tokenizer, template)
    prefill = templates.prefill_text(template, tokenizer)
    if template == "zero_short":  # a text that the policy does not know: begin a block for it
        (more,) = [tokenizer("```python\nprint(")["input_ids"]]
        prompts = [prompt + more for prompt in prompts]
        prefill += "```python\nprint("
    with calling(tools, prefill) as loop:
        groups = shipped.generate(
            prompts, Sampling(200), n=3, keys=range(6), prefill=prefill, tools=loop
        )
    shown = templates.prefill_text(template, tokenizer)
    checked = calls = 0
    for asked, group in zip(rows, groups, strict=True):
        (prompt,) = templates.encode([asked], tokenizer, template)
        for completion in group:
            if not completion.reached_end:
                continue
            made = document(asked, completion, shown)
            (example,) = encode_documents([made], tokenizer, template, mask_output=mask)
            begun = tokenizer(prefill.removeprefix(shown))["input_ids"]
            body = [*begun, *completion.token_ids]
            assert example["input_ids"] == prompt + body
            silent = [IGNORED] * len(prompt) + [0] * len(begun)
            silent += [0 if own or not mask else IGNORED for own in completion.loss_mask]
            assert example["labels"] == [
                IGNORED if skip else token
                for skip, token in zip(silent, example["input_ids"], strict=True)
            ]
            assert ("outputs" in made) is bool(completion.tool_calls)
            checked += 1
            calls += len(completion.tool_calls)
    assert checked > 4 and calls > 4


def test_saved_traces_come_back_and_a_changed_file_does_not(
    speak: Speak, tools: Tools, tmp_path: Path
) -> None:
    made = make(speak(SCRIPTS), tools)
    file = traces.save(made, tmp_path / "sets" / "first")
    assert file == tmp_path / "sets" / "first.jsonl"
    assert traces.load(tmp_path / "sets" / "first") == made
    assert read_documents(str(file)) == list(made.documents)
    traces.save(make(speak(SCRIPTS), tools), tmp_path / "again")
    for end in ("jsonl", "json"):
        again = (tmp_path / f"again.{end}").read_bytes()
        assert again == file.with_suffix(f".{end}").read_bytes(), "no date, no timing"
    file.write_text(file.read_text().replace("42", "43"))
    with pytest.raises(ConfigError, match=r"sha256 .* the file was changed or cut"):
        traces.load(tmp_path / "sets" / "first")
    (tmp_path / "again.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"again.json is no provenance"):
        traces.load(tmp_path / "again")
    (tmp_path / "again.json").unlink()
    with pytest.raises(ConfigError, match=r"no file again.json with the provenance"):
        traces.load(tmp_path / "again")
    with pytest.raises(ConfigError, match="no such file"):
        traces.load(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"without .json or .jsonl"):
        traces.save(made, file)
    with pytest.raises(ConfigError, match="documents are empty"):
        traces.save(replace(made, documents=()), tmp_path / "empty")


# Thoughts of 6 pieces, each one line.
LINES = "\n".join(f"{i}+{i}={2 * i}" for i in range(6))
THOUGHT = f"<think>{LINES}\n</think>\\boxed{{1}}"
RULES = HintRules(
    separators=("\n",), hints=("Let me check.", "Compute this."), blocks=(1, 1), code=Sampling(60)
)


def add(engine: Engine, tools: Tools, problems: Any, **changes: Any) -> TraceSet:
    values = {"n": 1, "seed": 0, "sampling": Sampling(BUDGET), "rules": RULES} | changes
    return hint(engine, problems, model=SHIPPED, template="question", tools=tools, **values)


def test_a_hint_is_put_at_a_random_cut_and_its_code_runs(speak: Speak, tools: Tools) -> None:
    texts = [f"{i}*{i}" for i in range(2, 10)]
    problems = [row(text, int(text[0]) ** 2) for text in texts]
    scripts: dict[str, Script] = {
        text: (THOUGHT, [f"print({text})\n```"], [f"</think>\\boxed{{{int(text[0]) ** 2}}}"])
        for text in texts
    }
    found = add(speak(scripts), tools, problems)
    places, sentences = set(), set()
    for made, text in zip(found.documents, texts, strict=True):
        (start, end), (first, last) = made["inserted"][0], made["outputs"][0]
        before, said = made["completion"][:start], made["completion"][start:end]
        lines = before.removeprefix("<think>").rstrip("\n").split("\n")
        assert LINES.split("\n")[: len(lines)] == lines and 2 <= len(lines) <= 6
        assert before[-1] == "\n" or said[0] == "\n", "a line of its own"
        said = said.lstrip("\n")
        assert said in {f"{sentence}\n{OPEN}" for sentence in RULES.hints}
        value = int(text[0]) ** 2
        assert made["completion"][end:first] == f"print({text})\n```"
        assert made["completion"][first:last] == f"\n```output\n{value}\n```\n"
        assert made["completion"][last:] == f"</think>\\boxed{{{value}}}"
        places.add(len(lines))
        sentences.add(said)
    assert len(places) > 1 and len(sentences) == 2
    assert found == add(speak(scripts), tools, problems)
    other = add(speak(scripts), tools, problems, seed=1)
    assert other.documents != found.documents
    assert found.provenance["method"] == "hint"
    assert found.provenance["rules"]["hints"] == list(RULES.hints)
    assert found.provenance["encoded_as_generated"] == len(texts)


def test_hints_are_learned_and_output_is_not(speak: Speak, tools: Tools) -> None:
    scripts: dict[str, Script] = {"6*7": (THOUGHT, ["print(42)\n```"], [r"</think>\boxed{42}"])}
    (made,) = add(speak(scripts), tools, PROBLEMS[:1]).documents
    tokenizer = build_tokenizer()
    (example,) = encode_documents([made], tokenizer, "question")
    text = tokenizer.decode([label for label in example["labels"] if label != IGNORED])
    start, end = made["outputs"][0]
    assert text == made["completion"][:start] + made["completion"][end:] + "<|end|>"
    (start, end) = made["inserted"][0]
    assert made["completion"][start:end] in text


def test_blocks_are_added_until_the_wanted_number(speak: Speak, tools: Tools) -> None:
    more = "\n".join(f"{i}" for i in range(10, 16)) + "\n</think>\\boxed{0}"
    scripts: dict[str, Script] = {
        "6*7": (THOUGHT, ["1\n```", "2\n```", "42\n```"], [more, more, r"</think>\boxed{42}"])
    }
    rules = replace(RULES, blocks=(3, 3))
    (made,) = add(speak(scripts), tools, PROBLEMS[:1], rules=rules).documents
    assert made["calls"] == 3 and len(made["inserted"]) == len(made["outputs"]) == 3
    shown = [made["completion"][start:end].strip() for start, end in made["outputs"]]
    assert shown == [f"```output\n{value}\n```" for value in (1, 2, 42)]
    assert all(
        made["completion"][start:end].endswith(f"\n{OPEN}") for start, end in made["inserted"]
    )
    with pytest.raises(ValueError, match=r"right 0.*wrong 1"):  # two rounds are not enough
        add(speak(scripts), tools, PROBLEMS[:1], rules=replace(rules, max_rounds=2))
    few = Tools(tools.executor, tools.tokenizer, replace(TOOL, max_calls=2))
    with pytest.raises(ValueError, match=r"right 0.*wrong 1"):  # nor are two calls
        add(speak(scripts), few, PROBLEMS[:1], rules=rules)


def test_own_blocks_behind_a_hint_count_for_the_calls(speak: Speak, tools: Tools) -> None:
    scripts: dict[str, Script] = {
        "6*7": (THOUGHT, ["1\n```", "42\n```"], [OPEN, r"</think>\boxed{42}"])
    }
    (made,) = add(speak(scripts), tools, PROBLEMS[:1]).documents
    assert made["calls"] == 2 and len(made["inserted"]) == 1
    one = Tools(tools.executor, tools.tokenizer, replace(TOOL, max_calls=1))
    with pytest.raises(ValueError, match=r"ended 0.*not ended 1"):
        add(speak(scripts), one, PROBLEMS[:1])


@pytest.mark.parametrize(
    ("script", "changes", "reason"),
    [
        (("<think>1\n2\n3\n4\n</think>5", [], []), {}, "few pieces 1"),
        ((r"\boxed{42}", [], []), {}, "few pieces 1"),
        ((THOUGHT, ["9" * 80], []), {}, "code not closed 1"),
        ((THOUGHT, ["1"], []), {}, "code not closed 1"),
        ((THOUGHT, ["1\n```"], ["2"]), {"sampling": Sampling(380)}, "too long 1"),
        ((THOUGHT, ["1/0\n```"], [r"</think>\boxed{42}"]), {}, "no call ran 1"),
        ((THOUGHT, ["1\n```"], [r"</think>\boxed{41}"]), {}, "wrong 1"),
    ],
)
def test_why_a_hinted_response_is_discarded(
    speak: Speak, tools: Tools, script: Script, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"drawn 1, .*discarded: {reason}"):
        add(speak({"6*7": script}), tools, PROBLEMS[:1], **changes)


def test_problems_that_draw_no_block_are_dropped(speak: Speak, tools: Tools) -> None:
    problems = [row(f"{i}*1", i) for i in range(10, 22)]
    scripts: dict[str, Script] = {
        f"{i}*1": (THOUGHT, [f"{i}\n```"], [f"</think>\\boxed{{{i}}}"]) for i in range(10, 22)
    }
    found = add(speak(scripts), tools, problems, rules=replace(RULES, blocks=(0, 1)))
    dropped = found.provenance["problems_without_blocks"]
    assert 0 < dropped < 12 and len(found.documents) == 12 - dropped
    assert found.provenance["counts"]["drawn"] == 12 - dropped
    names = {f"large:{i}*1" for i in range(10, 22)}
    alone = names - {made["problem_id"] for made in found.documents}
    rest = [problem for problem in problems if problem["problem_id"] in alone]
    with pytest.raises(ValueError, match=f"all {dropped} problems drew 0 blocks"):
        add(speak(scripts), tools, rest, rules=replace(RULES, blocks=(0, 1)))


def test_variables_that_outlive_a_block_are_refused(speak: Speak, tools: Tools) -> None:
    live = Tools(tools.executor, tools.tokenizer, replace(TOOL, tool_state="session"))
    with pytest.raises(ValueError, match="tool_state='session': expected 'fresh'"):
        add(speak(SCRIPTS), live, PROBLEMS[:1])


def test_where_a_thought_may_be_cut() -> None:
    words = HintRules().separators
    text = "Wait, so Butter. But no. Hmm, Wait But\n\nAlternatively yes"
    places = [0, *cuts(text, words), len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(places)]
    assert parts == [
        "Wait, so Butter. ",
        "But no. ",
        "Hmm, ",
        "Wait ",
        "But\n\n",
        "Alternatively yes",
    ]
    assert cuts("\na\n\nb\n", ("\n",)) == [2], "no piece is blank"
    assert cuts("nothing", words) == []

    def thought(text: str, prefill: str = "") -> str:
        start, end = open_thought(Completion.from_text(text), prefill)
        return text[start:end]

    assert thought("<think>a b</think>c") == "a b"
    assert thought("<think>\na b", "<think>\n") == "a b"
    assert thought("<think>a ~~~b</think>c") == "a "
    assert thought("a b</think>c") == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"separators": "Wait"}, "separators='Wait': expected a tuple"),
        ({"hints": ()}, r"hints=\(\): expected a tuple of non-empty"),
        ({"hints": ("run ```",)}, "expected no ` or ~"),
        ({"blocks": (2, 1)}, r"blocks=\(2, 1\)"),
        ({"blocks": (0, 0)}, r"blocks=\(0, 0\)"),
        ({"min_pieces": 0}, "min_pieces=0"),
        ({"max_rounds": 0}, "max_rounds=0"),
    ],
)
def test_bad_rules_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HintRules(**changes)


@pytest.fixture
def runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("RLKIT_HEADLESS", "1")
    return tmp_path / "runs"


def test_from_the_shipped_model_to_a_fine_tuned_one(
    shipped: Engine, tools: Tools, tmp_path: Path, runs_folder: Path
) -> None:
    problems = tasks.load_problems("large", "train", 8)
    found = make(shipped, tools, problems=problems, sampling=Sampling(200), per_problem=1)
    assert len(found.documents) >= 3
    assert all(made["answer"] in made["completion"] for made in found.documents)
    file = traces.save(found, tmp_path / "traces")
    # A policy of random weights: the one it was drawn from has nothing left to learn.
    model = save_tiny_model(tmp_path / "model")
    cfg = tiny_config(
        model, documents=str(file), epochs=8, batch_size=4, micro_batch_size=4,
        learning_rate=1e-2, reward="accuracy", allow_exploitable=False, tool="python",
    )  # fmt: skip
    metrics = runs.read_metrics(train_sft(cfg))
    assert metrics["loss"].iloc[-1] < metrics["loss"].iloc[0] - 1
    examples = encode_documents(found.documents, build_tokenizer(), "question")
    learned = sum(label != IGNORED for example in examples for label in example["labels"])
    assert metrics["tokens"].iloc[-1] == 8 * learned


def test_hints_from_the_shipped_model(shipped: Engine, tools: Tools) -> None:
    """Its code is mostly right, and its output is read."""
    problems = tasks.load_problems("large", "train", 6)
    rules = replace(RULES, min_pieces=2, hints=HintRules().hints)
    found = add(shipped, tools, problems, n=4, rules=rules, sampling=Sampling(200))
    for made in found.documents:
        assert made["completion"].startswith("<think>") and made["calls"] >= 1
        (start, end), (first, _) = made["inserted"][0], made["outputs"][0]
        assert end < first and made["completion"][:start].count("\n") < 6
        assert f"\n{made['answer']}\n```\n" in made["completion"]
    assert found.provenance["encoded_as_generated"] == len(found.documents)


def test_rejection_sampling_with_the_tool(tmp_path: Path, runs_folder: Path) -> None:
    settings: dict[str, Any] = {
        "task": "large", "reward": "accuracy", "allow_exploitable": False,
        "max_completion_length": 160, "steps": 1, "batch_size": 16, "rollouts": 4,
    }  # fmt: skip
    rl = tiny_config(Path("tiny-tool"), tool="python", **settings)
    documents = arms.rejection_sample(rl)
    assert documents == arms.rejection_sample(rl)
    with_code = [made for made in documents if "```output" in made["completion"]]
    assert len(with_code) >= 2
    assert [made for made in documents if "outputs" in made] == with_code
    for made in with_code:
        for start, end in made["outputs"]:
            assert OUTPUT.fullmatch(made["completion"][start:end])
    assert all(set(made) <= {"prompt", "completion", "outputs"} for made in documents)
    chain = tiny_config(Path("tiny-tool"), **{**settings, "task": "chain"})
    plain = arms.rejection_sample(chain)
    assert plain and all(set(made) == {"prompt", "completion"} for made in plain)
