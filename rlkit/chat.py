r"""Ask a model a question and watch it: each token as it comes, the code it runs, what comes back.

    ask(engine, "Calculate 322*511.", tools=tools)
    panel(engine, tools)

What is watched is what any other generation would give: the same tokens for the same seed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import ipywidgets
from IPython.core.getipython import get_ipython
from transformers import PreTrainedTokenizerBase

from rlkit import templates
from rlkit.completion import Completion, ToolCall
from rlkit.engine import Engine, Sampling, stable_key
from rlkit.toolloop import ToolLoop
from rlkit.tools import Tools
from rlkit.trace_view import Trace, paint, trace, visible
from rlkit.watch import Display, NoTools, Screen, Terminal, Watched, Written

BUDGET = 512
"""Tokens of a response, unless told otherwise."""


def ask(
    engine: Engine,
    question: str,
    *,
    tools: Tools | None = None,
    template: str = "question",
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
    show: Screen | None = None,
) -> Completion:
    """Ask one question and show the response while it is being written.

    Args:
        question: any text; the embedded models know sums and products ("Calculate 322*511.").
        tools: runs the code that the response writes; None: code is text like any other.
        template: a name of ``templates.TEMPLATES``.
        max_new_tokens: budget, outputs of tools included; default ``BUDGET``, or what the model's
            positions leave.
        seed: another one draws another response.
        show: where to show it; default one output in a notebook, standard output elsewhere.

    Raises:
        ValueError: an empty question, or characters that the model's tokenizer does not know.
    """
    question = question.strip()
    if not question:
        raise ValueError('question is empty: expected a text such as "Calculate 322*511."')
    if unknown := unknown_characters(question, engine.tokenizer):
        raise ValueError(
            f"the model's tokenizer does not know {', '.join(map(repr, unknown))}: write the "
            'question without, for example "Calculate 322*511."'
        )
    row = {"problem_id": "chat", "prompt": [{"role": "user", "content": question}]}
    prompt = templates.encode([row], engine.tokenizer, template)[0]
    prefill = templates.prefill_text(template, engine.tokenizer)
    room = engine.model.config.max_position_embeddings - len(prompt)
    # At least 1: without any room the engine's own message says what to do.
    budget = max_new_tokens or max(min(BUDGET, room), 1)
    screen = show or (Terminal() if get_ipython() is None else Display())
    written = Written(engine.tokenizer, budget, prefill)

    def on_tokens(row: int, ids: Sequence[int], call: ToolCall | None) -> None:
        written.add(ids, call)
        update(now=False)

    def update(now: bool) -> None:
        screen.update(Trace(written.text, tuple(written.calls), question), now)

    with _loop(tools, prefill) as loop:
        watched = Watched(loop, on_tokens, lambda row: update(now=True))
        ((completion,),) = engine.generate(
            [prompt],
            Sampling(budget, temperature=temperature, greedy=greedy),
            n=1,
            keys=[stable_key(seed, "chat", 0, question)],
            prefill=prefill,
            tools=watched,
        )
    written.finish(completion, engine.end_ids)
    screen.end(trace(completion, question=question))
    return completion


def unknown_characters(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Characters of ``text`` that the tokenizer can only turn into its unknown token."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return []
    found = []
    for character in dict.fromkeys(text):
        ids = tokenizer(character, add_special_tokens=False)["input_ids"]
        if unknown in ids:
            found.append(character)
    return found


@contextlib.contextmanager
def _loop(tools: Tools | None, prefill: str) -> Iterator[ToolLoop]:
    if tools is None:
        yield NoTools()
        return
    with tools.loop(prefill=prefill) as loop:
        yield loop


# --- the panel ------------------------------------------------------------------------------------


class Panel:
    """A form for ``ask``; shown when it is the last expression of a cell.

    Attributes:
        question, seed, run_code, greedy, button, output: its widgets.
        completion: the last response, None before the first.
    """

    def __init__(self, engine: Engine, tools: Tools | None, **options: Any) -> None:
        self.engine, self.tools, self.options = engine, tools, options
        self.completion: Completion | None = None
        self._running = threading.Lock()
        self.question = ipywidgets.Textarea(
            value="Calculate 322*511.", rows=2, layout=ipywidgets.Layout(width="60ch")
        )
        self.run_code = ipywidgets.Checkbox(
            value=tools is not None, disabled=tools is None, description="run the code"
        )
        self.greedy = ipywidgets.Checkbox(value=False, description="greedy")
        self.seed = ipywidgets.BoundedIntText(value=0, min=0, max=2**31, description="seed")
        self.button = ipywidgets.Button(description="Ask", button_style="primary")
        self.output = ipywidgets.Output()
        self.button.on_click(self._asked)
        controls = ipywidgets.HBox([self.button, self.run_code, self.greedy, self.seed])
        self.box = ipywidgets.VBox([self.question, controls, self.output])

    def _asked(self, _: object) -> None:
        if not self._running.acquire(blocking=False):
            return  # a second click
        self.button.disabled, self.button.description = True, "Running …"
        try:
            self._publish("")
            self.completion = ask(
                self.engine,
                self.question.value,
                tools=self.tools if self.run_code.value else None,
                greedy=self.greedy.value,
                seed=self.seed.value,
                show=Display(self._publish),
                **self.options,
            )
        except Exception as error:  # a callback's error would end in a log that nobody reads
            self._publish(paint(visible(f"{type(error).__name__}: {error}"), "1;31"))
        finally:
            self.button.disabled, self.button.description = False, "Ask"
            self._running.release()

    def _publish(self, text: str) -> None:
        # Set, not captured: a capture reaches the page only if no other output is captured, and
        # with every token it would send all earlier states again.
        data = {"text/plain": text}
        self.output.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.box._repr_mimebundle_(**options)


def panel(engine: Engine, tools: Tools | None = None, **options: Any) -> Panel:
    """A form in which to type a question and watch the response.

    Args:
        tools: None leaves no choice to run code.
        options: arguments of ``ask``: ``template``, ``max_new_tokens``, ``temperature``.

    Raises:
        TypeError: an option that ``ask`` does not have, or that the form sets itself.
    """
    known = {"template", "max_new_tokens", "temperature"}
    if unknown := sorted(set(options) - known):
        raise TypeError(f"{', '.join(unknown)}: expected options among {', '.join(sorted(known))}")
    return Panel(engine, tools, **options)
