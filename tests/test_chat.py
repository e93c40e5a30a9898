"""Watching a response: the same tokens, the same text, on every kind of screen."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbconvert.filters.ansi import strip_ansi
from tiny import grouped_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from traitlets.config import Config
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlkit import chat, templates
from rlkit.completion import Completion, ToolCall
from rlkit.config import ModelConfig, ToolConfig
from rlkit.engine import Engine, Sampling, load_engine, stable_key
from rlkit.sandbox import Limits, PythonExecutor
from rlkit.tokenizer import CHAT_TEMPLATE
from rlkit.toolloop import Resume
from rlkit.tools import CodeLoop, Tools
from rlkit.trace_view import Trace, trace
from rlkit.watch import Display, NoTools, Terminal, Watched, Written

QUESTION = "Calculate 322*511."


class Screen:
    """Keeps all that is shown."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []
        self.waits = 0
        self.final: Trace | None = None

    def update(self, so_far: Trace, now: bool) -> None:
        self.traces.append(so_far)
        self.waits += now

    def end(self, final: Trace) -> None:
        self.final = final


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(ModelConfig(model="tiny-tool"))


@pytest.fixture(scope="module")
def executor() -> Iterator[PythonExecutor]:
    with PythonExecutor(Limits(cpu_seconds=5, wall_seconds=60)) as executor:
        yield executor


@pytest.fixture
def tools(engine, executor) -> Tools:
    return Tools(executor, engine.tokenizer, ToolConfig(tool="python"))


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte: characters beyond ASCII are cut over two to four tokens."""
    marks = ["<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*marks, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=marks[0], pad_token=marks[0],
        additional_special_tokens=marks[1:], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    made.chat_template = CHAT_TEMPLATE
    return made


# --- tokens and text ------------------------------------------------------------------------------


def unwatched(engine: Engine, tools: Tools | None, seed: int, **sampling) -> Completion:
    row = {"prompt": [{"role": "user", "content": QUESTION}]}
    prompts = templates.encode([row], engine.tokenizer, "question")
    keys, how = [stable_key(seed, "chat", 0, QUESTION)], Sampling(200, **sampling)
    if tools is None:
        return engine.generate(prompts, how, n=1, keys=keys)[0][0]
    with tools.loop() as loop:
        return engine.generate(prompts, how, n=1, keys=keys, tools=loop)[0][0]


def without_times(completion: Completion) -> Completion:
    calls = (replace(c, cpu_seconds=0.0, wall_seconds=0.0) for c in completion.tool_calls)
    return replace(completion, tool_calls=tuple(calls))


@pytest.mark.parametrize("ran", [True, False])
def test_watching_changes_no_token_and_shows_all_of_the_text(engine, tools, ran) -> None:
    used = tools if ran else None
    calls = 0
    for seed in range(8):
        screen = Screen()
        done = chat.ask(engine, QUESTION, tools=used, max_new_tokens=200, seed=seed, show=screen)
        assert without_times(done) == without_times(unwatched(engine, used, seed))
        texts = [each.text for each in screen.traces]
        assert all(later.startswith(sooner) for sooner, later in pairwise(texts))
        assert len(set(texts)) > len(done.token_ids) // 2, "token by token"
        assert screen.final == trace(done, question=QUESTION)
        live = [(call.output, call.characters) for call in screen.traces[-1].calls]
        assert live == [(call.output, call.characters) for call in done.tool_calls]
        assert screen.waits == len(done.tool_calls)
        calls += len(done.tool_calls)
    assert (calls > 0) == ran


def test_greedy_and_temperature_reach_the_model(engine) -> None:
    for options in ({"greedy": True}, {"temperature": 0.3}):
        done = chat.ask(engine, QUESTION, max_new_tokens=200, show=Screen(), **options)
        assert done == unwatched(engine, None, 0, **options)


@pytest.mark.parametrize("budget", [3, 20, 26, 30, 60])
def test_the_streamed_text_is_the_completion_s_where_budgets_cut(engine, tools, budget) -> None:
    """The last token never passes the loop, and the tool's output may be cut."""
    written = Written(engine.tokenizer, budget)
    for seed in range(4):
        written = Written(engine.tokenizer, budget)
        with tools.loop() as loop:
            watched = Watched(loop, lambda row, ids, call, to=written: to.add(ids, call))
            row = {"prompt": [{"role": "user", "content": QUESTION}]}
            prompts = templates.encode([row], engine.tokenizer)
            ((done,),) = engine.generate(prompts, Sampling(budget), n=1, keys=[seed], tools=watched)
        unfinished = written.text
        written.finish(done, engine.end_ids)
        assert written.text == done.text and done.text.startswith(unfinished)
        assert tuple(written.ids) == done.token_ids[: len(written.ids)]
        assert written.calls == [] or [c.characters for c in written.calls] == [
            c.characters for c in done.tool_calls
        ]


def test_characters_cut_over_tokens_appear_when_they_are_complete() -> None:
    tokenizer = byte_tokenizer()
    text = "aé漢🙂 b\u200b\ufffd!"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    written, seen = Written(tokenizer, len(ids)), []
    for token in ids:
        written.add([token])
        seen.append(written.text)
    assert seen[-1] == text
    assert set(seen) == {text[:i] for i in range(1, len(text) + 1) if i != 8}, "never half of one"
    prefilled = Written(tokenizer, 99, "<think>")
    prefilled.add(ids[:1])
    prefilled.add(ids[1:2])
    assert prefilled.text == "<think>a"
    prefilled.add([], last=True)
    assert prefilled.text == "<think>a\ufffd"


def test_random_bytes_end_up_as_the_completion_s_text() -> None:
    tokenizer = byte_tokenizer()
    engine = Engine(grouped_model(tokenizer, positions=128, spread=0.2), tokenizer)
    for seed in range(6):
        written = Written(tokenizer, 60)
        watched = Watched(NoTools(), lambda row, ids, call, to=written: to.add(ids, call))
        ((done,),) = engine.generate([[5]], Sampling(60), n=1, keys=[seed], tools=watched)
        ((alone,),) = engine.generate([[5]], Sampling(60), n=1, keys=[seed])
        assert done == alone
        written.finish(done, engine.end_ids)
        assert written.text == done.text


def test_a_watched_loop_passes_everything_on(tools) -> None:
    seen: list = []
    with tools.loop(rejoin="ready") as loop:
        watched = Watched(loop, lambda *args: seen.append(args), lambda row: seen.append(row))
        assert watched.rejoin == "ready"
        ids = tools.encode("```python\nprint(6*7)\n```")
        code = watched.feed(3, ids)
        assert code == "print(6*7)"
        watched.submit(3, code)
        (result,) = watched.collect(True)
    assert isinstance(result, Resume) and isinstance(result.call, ToolCall)
    assert seen == [(3, ids, None), 3, (3, result.ids, result.call)]
    assert isinstance(loop, CodeLoop)


# --- questions ------------------------------------------------------------------------------------


def test_unknown_characters_and_empty_questions_say_what_to_do(engine) -> None:
    for question, match in (("½ of 4, π?", "'½', 'π'"), (" \n", "empty")):
        with pytest.raises(ValueError, match=match):
            chat.ask(engine, question, show=Screen())
    assert chat.unknown_characters("½", byte_tokenizer()) == []


def test_any_known_text_may_be_asked(engine) -> None:
    done = chat.ask(engine, "What is love?", max_new_tokens=5, show=Screen())
    assert len(done.token_ids) <= 5


def test_the_default_budget_fits_the_model() -> None:
    tokenizer = byte_tokenizer()
    engine = Engine(grouped_model(tokenizer, positions=40, spread=0.2), tokenizer)
    with torch.no_grad():
        engine.model.lm_head.weight[tokenizer.eos_token_id] = 0
    done = chat.ask(engine, "1234567890", show=Screen())
    assert len(done.token_ids) == 40 - 12 or done.stop == "eos"
    with pytest.raises(ValueError, match="40 positions"):
        chat.ask(engine, "1" * 60, show=Screen())


# --- screens --------------------------------------------------------------------------------------


def test_a_terminal_gets_each_character_once(engine, tools, capsys) -> None:
    file = io.StringIO()
    done = chat.ask(engine, QUESTION, tools=tools, greedy=True, show=Terminal(file))
    body, _, facts = file.getvalue().rpartition("\n[")
    assert body == done.text and facts == trace(done).facts(colour=False) + "]\n"
    again = chat.ask(engine, QUESTION, tools=tools, greedy=True)  # outside of a notebook
    assert capsys.readouterr().out == file.getvalue() and again.text == done.text


def test_a_display_is_updated_now_and_then_and_always_at_the_end(engine, tools) -> None:
    frozen: list[str] = []
    ask = {"tools": tools, "greedy": True}
    done = chat.ask(engine, QUESTION, show=Display(frozen.append, lambda: 0.0), **ask)
    first, waiting, final = frozen
    assert "print" not in first
    assert "print(322*511)" in waiting and "output" not in waiting, "all the code, while it runs"
    assert final == trace(done, question=QUESTION).render()
    ticks, steady = iter(range(10**6)), []
    chat.ask(engine, QUESTION, show=Display(steady.append, lambda: next(ticks) / 80), **ask)
    assert len(frozen) < len(steady) < len(done.token_ids)


@pytest.fixture
def notebook() -> Iterator[None]:
    """IPython as a kernel has it, in a module of its own and without a history file."""
    config = Config({"HistoryManager": {"enabled": False}})
    InteractiveShell.instance(config=config, user_module=types.ModuleType("shell_main"))
    yield
    InteractiveShell.clear_instance()
    del sys.modules["shell_main"]


def test_in_a_notebook_there_is_one_output_and_it_is_the_final_trace(engine, notebook) -> None:
    with capture_output() as captured:
        done = chat.ask(engine, QUESTION, greedy=True)
    first, *later = captured._outputs
    assert captured.stdout == "" and not first["update"] and len(later) >= 2
    assert all(output["update"] for output in later)
    assert len({output["transient"]["display_id"] for output in captured._outputs}) == 1
    final = trace(done, question=QUESTION).render()
    assert later[-1]["data"] == {"text/plain": final} and "\x1b[1;34m" in final


# --- the panel ------------------------------------------------------------------------------------


def shown(panel: chat.Panel) -> str:
    (output,) = panel.output.outputs
    return strip_ansi(output["data"]["text/plain"])


def test_the_panel_asks_and_shows(engine, tools) -> None:
    panel = chat.panel(engine, tools, max_new_tokens=200)
    panel.greedy.value = True
    panel.button.click()
    assert panel.completion is not None and len(panel.completion.tool_calls) == 1
    expected = trace(panel.completion, question=QUESTION).render(colour=False)
    assert shown(panel) == expected and "164542" in expected
    panel.run_code.value = False
    panel.question.value = "Calculate 2*3."
    panel.button.click()
    assert panel.completion.tool_calls == () and "question │ Calculate 2*3." in shown(panel)
    assert not panel.button.disabled and panel.button.description == "Ask"
    assert "application/vnd.jupyter.widget-view+json" in panel._repr_mimebundle_()


def test_the_panel_updates_while_it_runs_and_ignores_a_second_click(engine, tools) -> None:
    panel = chat.panel(engine, tools)
    states = []

    def second(change: object) -> None:
        states.append((panel.button.disabled, panel.completion))
        if len(states) < 20:
            panel.button.click()

    panel.output.observe(second, "outputs")
    panel.button.click()
    assert len(states) >= 3, "cleared, waiting for the tool or written, final"
    assert all(disabled and completion is None for disabled, completion in states)
    assert panel.completion is not None and not panel.button.disabled


def test_errors_are_shown_in_the_panel_and_the_next_question_works(engine) -> None:
    panel = chat.panel(engine)
    assert panel.run_code.disabled and not panel.run_code.value
    panel.question.value = "√2 \x1b[2J"
    panel.button.click()
    assert "ValueError" in shown(panel) and "'√'" in shown(panel) and "\x1b" not in shown(panel)
    assert panel.completion is None and not panel.button.disabled
    panel.question.value = QUESTION
    panel.button.click()
    assert panel.completion is not None
    with pytest.raises(TypeError, match="sampling"):
        chat.panel(engine, sampling=3)
