"""Rows that leave generation and come back, with a scripted loop in place of a real tool."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from tiny import grouped_model
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
)

from rlkit.completion import Completion, ToolCall
from rlkit.decode import ModuleDecoder
from rlkit.engine import Engine, Sampling, pick_tokens, row_streams, uniforms
from rlkit.qwen2_decoder import Qwen2Decoder
from rlkit.tokenizer import build_tokenizer
from rlkit.toolloop import Rejoin, Resume, Waiting

BUDGET = 40
KEYS = [11, 12, 13]
N = 4
OUTPUT = (20, 30, 40, 50, 60)


@dataclass(frozen=True)
class Step:
    """Call a tool once the row has sampled ``after`` tokens since its last call."""

    after: int
    ids: tuple[int, ...] = OUTPUT
    stop: str | None = None
    ran: bool = True


@dataclass
class Scripted:
    """Follows a plan per row; results come back late and in random order if ``seed`` is given."""

    plan: dict[int, list[Step]]
    rejoin: Rejoin = "barrier"
    seed: int | None = None
    seen: dict[int, list[int]] = field(default_factory=dict)
    running: dict[int, tuple[int, Step, str]] = field(default_factory=dict)
    since: dict[int, int] = field(default_factory=dict)
    done: dict[int, int] = field(default_factory=dict)
    batches: list[list[int]] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def feed(self, row: int, new_ids: Sequence[int]) -> str | None:
        assert row not in self.running, "a waiting row must not generate"
        assert row not in self.ended, "an ended row must not generate"
        self.seen.setdefault(row, []).extend(new_ids)
        self.since[row] = self.since.get(row, 0) + len(new_ids)
        steps, number = self.plan.get(row, []), self.done.get(row, 0)
        if number < len(steps) and self.since[row] == steps[number].after:
            return f"code {row}.{number}"
        return None

    def submit(self, row: int, code: str) -> None:
        number = self.done.get(row, 0)
        self.done[row], self.since[row] = number + 1, 0
        delay = 0 if self.seed is None else self.rng.randrange(25)
        self.running[row] = (delay, self.plan[row][number], code)

    def collect(self, wait: bool) -> list[Resume]:
        self.running = {r: (d - 1, step, code) for r, (d, step, code) in self.running.items()}
        ready = [row for row, (delay, _, _) in self.running.items() if delay < 0]
        if wait and not ready:
            ready = [min(self.running, key=lambda row: self.running[row][0])]
        self.rng.shuffle(ready)
        out = []
        for row in ready[:2]:  # a few at a time: the engine has to ask again
            _, step, code = self.running.pop(row)
            call = ToolCall(code, f"out of {code}", "ok", 0.1, 0.2, (0, 0)) if step.ran else None
            out.append(Resume(row, step.ids, call, step.stop))  # type: ignore[arg-type]
        self.batches.append([r.row for r in out])
        return out

    def end(self, row: int) -> None:
        assert row not in self.running, "a waiting row has not ended"
        self.ended.append(row)


# Prompt 0: rows 0 to 3, and so on. Several calls, at the first token, back to back, none at all.
PLAN = {
    0: [Step(5), Step(3, OUTPUT[:2]), Step(4)],
    1: [Step(1)],
    3: [Step(2, ()), Step(1, (9,)), Step(1)],
    4: [Step(20, OUTPUT * 2)],
    6: [Step(4, stop="infra")],
    7: [Step(3), Step(2, (), stop="calls", ran=False)],
    9: [Step(6, OUTPUT * 20)],
    10: [Step(BUDGET - 5)],
    11: [Step(7), Step(7)],
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """Grouped-query attention; an end token that is hardly ever drawn, so that plans are played."""
    model = grouped_model(tokenizer, positions=128, spread=0.2)
    with torch.no_grad():  # a fair share of rows still ends by itself
        model.lm_head.weight[tokenizer.eos_token_id] *= 0.5
    return model


@pytest.fixture(params=[Qwen2Decoder, ModuleDecoder])
def decoder(request, monkeypatch) -> None:
    monkeypatch.setattr("rlkit.engine.make_decoder", request.param)


def prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    texts = ["Compute 19+14.", "Evaluate 47+85-19+62-38.", "Compute 1."]
    return [tokenizer(text)["input_ids"] for text in texts]


def play(model, tokenizer, loop, max_rows: int = 512, **sampling) -> list[Completion]:
    groups = Engine(model, tokenizer, max_rows=max_rows).generate(
        prompts(tokenizer), Sampling(BUDGET, **sampling), n=N, keys=KEYS, tools=loop
    )
    return [c for group in groups for c in group]


@pytest.mark.parametrize("rejoin", ["barrier", "ready"])
def test_continued_rows_equal_a_full_forward_pass(model, tokenizer, decoder, rejoin) -> None:
    """Every log-probability and every draw, after whatever was forced before it."""
    loop = Scripted(PLAN, rejoin, seed=1)
    done = play(model, tokenizer, loop)
    streams = row_streams(KEYS, N, 0)
    for row, completion in enumerate(done):
        prompt, ids = prompts(tokenizer)[row // N], list(completion.token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        mask = np.array(completion.loss_mask, dtype=bool)
        draws = uniforms(np.repeat(streams[row], len(ids)), np.arange(len(ids)))
        tokens, _ = pick_tokens(logits, Sampling(1), draws)
        assert np.array_equal(np.array(ids)[mask], tokens.numpy()[mask])
        sampled = np.array(ids)[mask].tolist()
        ended_itself = completion.stop == "eos" or (completion.stop == "length" and mask[-1])
        assert loop.seen.get(row, []) == (sampled[:-1] if ended_itself else sampled)
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()
        found = np.array(completion.logprobs)
        np.testing.assert_allclose(found[mask], expected[mask], rtol=0, atol=1e-5)
        assert not found[~mask].any()
    assert sum(len(c.tool_calls) for c in done) > 10
    assert sorted(loop.ended) == list(range(len(done))), "each row ends once"


@pytest.mark.parametrize("rejoin", ["barrier", "ready"])
def test_masks_spans_and_stops(model, tokenizer, rejoin) -> None:
    done = play(model, tokenizer, Scripted(PLAN, rejoin, seed=2))
    for row, completion in enumerate(done):
        forced = [i for i, m in enumerate(completion.loss_mask) if m == 0]
        spans = [range(*call.span) for call in completion.tool_calls]
        assert forced == [i for span in spans for i in span]
        for number, (span, call) in enumerate(zip(spans, completion.tool_calls, strict=True)):
            step = PLAN[row][number]
            assert tuple(completion.token_ids[i] for i in span) == step.ids[: len(span)]
            assert len(span) == min(len(step.ids), BUDGET - span.start)
            assert call.output == f"out of code {row}.{number}" and call.cpu_seconds == 0.1
        assert len(completion.token_ids) <= BUDGET
        if completion.stop == "length":
            assert len(completion.token_ids) == BUDGET
    assert [len(done[row].tool_calls) for row in (2, 5, 8)] == [0, 0, 0]
    assert [c.span for c in done[3].tool_calls] == [(2, 2), (3, 4), (5, 10)]
    assert done[1].tool_calls[0].span == (1, 6)
    assert done[6].stop == "infra" and done[6].token_ids[4:] == OUTPUT
    assert done[7].stop == "calls" and len(done[7].token_ids) == 3 + 5 + 2
    assert len(done[7].tool_calls) == 1, "nothing ran the second time"
    assert done[9].stop == "length" and done[9].tool_calls[0].span == (6, BUDGET)
    assert done[10].stop == "length" and done[10].tool_calls[0].span == (BUDGET - 5, BUDGET)


def test_rejoining_early_changes_no_token(model, tokenizer, decoder) -> None:
    barrier = play(model, tokenizer, Scripted(PLAN))
    late = play(model, tokenizer, Scripted(PLAN, seed=0))
    assert [c.token_ids for c in late] == [c.token_ids for c in barrier]
    assert late == barrier, "the tools' speed must not reach the floats: same batches"
    for seed in range(8):
        ready = play(model, tokenizer, Scripted(PLAN, "ready", seed))
        assert [c.token_ids for c in ready] == [c.token_ids for c in barrier]
        assert [c.loss_mask for c in ready] == [c.loss_mask for c in barrier]
        assert [c.stop for c in ready] == [c.stop for c in barrier]
        assert [c.tool_calls for c in ready] == [c.tool_calls for c in barrier]


@pytest.mark.parametrize("rejoin", ["barrier", "ready"])
def test_tokens_do_not_depend_on_the_split_into_passes(model, tokenizer, decoder, rejoin) -> None:
    """Rows are numbered over the whole call, so each pass plays its part of the plan."""
    whole = play(model, tokenizer, Scripted(PLAN, rejoin, seed=3))
    for max_rows in (1, 4, 8):
        split = play(model, tokenizer, Scripted(PLAN, rejoin, seed=3), max_rows)
        assert [c.token_ids for c in split] == [c.token_ids for c in whole]
        assert [c.tool_calls for c in split] == [c.tool_calls for c in whole]


def test_a_loop_without_calls_changes_nothing(model, tokenizer) -> None:
    loop = Scripted({})
    assert play(model, tokenizer, loop) == play(model, tokenizer, None)
    assert not loop.batches, "nothing waits, so nothing is collected"


def test_results_come_in_row_order_whatever_order_they_are_collected_in() -> None:
    """The order of rows in a batch may reach the last digits, so it must not depend on speed."""
    loop = Scripted({}, seed=0)
    answers = [[Resume(9)], [Resume(12), Resume(7)]]
    loop.collect = lambda wait: answers.pop(0)  # type: ignore[method-assign]
    waiting = Waiting(loop, offset=4)
    waiting.rows = [5, 3, 8]
    assert [row for row, _ in waiting.results(idle=True)] == [3, 5, 8]


def test_ready_lets_others_run_meanwhile(model, tokenizer) -> None:
    """One row waits long; with the barrier nobody can overtake it, with ready all the rest do."""
    loop = Scripted({0: [Step(1)], 1: [Step(1)], 2: [Step(4)]}, "ready", seed=4)
    play(model, tokenizer, loop)
    assert [] in loop.batches, "asked without blocking while nothing was ready"


def test_greedy_rows_continue_as_transformers_does(model, tokenizer, decoder) -> None:
    """Prompt, own tokens and forced ones as a fresh prompt give the rest of the row."""
    done = play(model, tokenizer, Scripted(PLAN, "ready", seed=5), greedy=True)
    checked = 0
    for row, completion in enumerate(done):
        if not completion.tool_calls or completion.stop in ("calls", "infra"):
            continue
        start = completion.tool_calls[-1].span[1]
        rest = list(completion.token_ids[start:])
        if not rest:
            continue
        ids = torch.tensor([prompts(tokenizer)[row // N] + list(completion.token_ids[:start])])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=BUDGET - start,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )[0, ids.shape[1] :].tolist()
        assert rest == output[: len(rest)]
        assert completion.stop == "eos" or len(output) == len(rest)
        checked += 1
    assert checked >= 4


def test_a_forced_end_token_does_not_end_the_row(model, tokenizer) -> None:
    end = tokenizer.eos_token_id
    done = play(model, tokenizer, Scripted({2: [Step(3, (end, 30))]}))
    assert done[2].token_ids[3:5] == (end, 30) and len(done[2].token_ids) > 5


def test_a_stop_text_in_tool_output_does_not_end_the_row(model, tokenizer) -> None:
    """Neither one inside the output nor one that the policy's next token would complete."""
    plan = {2: [Step(3, tuple(tokenizer("x##")["input_ids"]))]}
    free = play(model, tokenizer, Scripted(plan))[2]
    after = tokenizer.decode([free.token_ids[6]])
    for stop in ("##", "#" + after, "x##" + after):
        assert free.text.count(stop) == 1
        found = play(model, tokenizer, Scripted(plan), stop=(stop,))[2]
        assert found.token_ids == free.token_ids


@pytest.mark.parametrize(
    ("results", "error", "message"),
    [
        ([], RuntimeError, "collect\\(wait=True\\) returned nothing while 1 rows wait"),
        ([Resume(3)], ValueError, "row 3, which does not wait"),
        ([Resume(1), Resume(1)], ValueError, "row 1, which does not wait"),
    ],
)
def test_a_loop_that_breaks_the_protocol_is_told(
    model, tokenizer, monkeypatch, results, error, message
) -> None:
    loop = Scripted({1: [Step(1)]})
    monkeypatch.setattr(loop, "collect", lambda wait: results)
    with pytest.raises(error, match=message):
        play(model, tokenizer, loop)


def test_bad_values_are_refused(model, tokenizer) -> None:
    with pytest.raises(ValueError, match="stop='eos': expected None, 'calls' or 'infra'"):
        Resume(0, stop="eos")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rejoin='late'"):
        play(model, tokenizer, Scripted({}, "late"))  # type: ignore[arg-type]


def test_sliding_windows_cannot_be_continued(tokenizer) -> None:
    """Their caches forget tokens by slot, so padding inside a row would push real ones out."""
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        sliding_window=8,
        eos_token_id=tokenizer.eos_token_id,
    )
    with pytest.raises(ValueError, match="DynamicSlidingWindowLayer"):
        play(MistralForCausalLM(config).eval(), tokenizer, Scripted({1: [Step(1)]}))
