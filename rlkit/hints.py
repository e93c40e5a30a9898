r"""Code put into thoughts that were written without it: the study's second way to make tool traces.

A policy thinks about a problem without a tool. Its thought is cut at a reflection word, a sentence
that announces code is put there, and the policy writes the code, reads its output and goes on
(arXiv 2503.04548, section 4.4; the wording of the sentences is our own).

The sentences are the synthesiser's, not the policy's. As in the study they are part of what is
learned: without them nothing would teach the policy to reach for code. ``outputs`` of a document
holds the tool's output alone; ``inserted`` holds the sentences, for those who want to leave them
out of the loss or count them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rlkit import templates
from rlkit.completion import Completion, ToolCall
from rlkit.config import ModelConfig
from rlkit.engine import Engine, Sampling, stable_key
from rlkit.fences import Block
from rlkit.hint_rules import OPEN, STUDY, HintRules, cuts, open_thought
from rlkit.rows import Row
from rlkit.sandbox import Result
from rlkit.toolloop import Rejoin, Resume
from rlkit.tools import FENCES, Tools
from rlkit.traces import Draw, Range, TraceSet, assemble, check_inputs


@dataclass(frozen=True)
class _Draft:
    """A whole response to which blocks are added."""

    draw: Draw
    prompt: tuple[int, ...]
    left: int  # blocks to come
    reason: str = "few pieces"  # why the last try failed

    @property
    def name(self) -> str:
        """What keys its random numbers."""
        return f"{self.draw.problem['problem_id']}#{self.draw.sample}"


@dataclass(frozen=True)
class _Part:
    """The beginning of a response, up to where it is to go on."""

    draft: _Draft
    ids: tuple[int, ...]
    calls: tuple[ToolCall, ...]
    inserted: tuple[Range, ...]


def hint(
    engine: Engine,
    problems: Sequence[Row],
    *,
    model: ModelConfig,
    template: str,
    tools: Tools | None,
    sampling: Sampling,
    n: int,
    seed: int,
    per_problem: int = 0,
    rules: HintRules = STUDY,
) -> TraceSet:
    """Code put into the policy's own thoughts; kept as ``traces.distil`` keeps.

    Thoughts hold no fence (its tokens are never drawn). What follows an inserted block may hold
    blocks of the policy's own; all calls count for ``max_calls``.

    Args:
        sampling: of thoughts and of what follows a block, with a budget of ``max_new_tokens`` for
            each (study: temperature 0.6, top_p 0.95, 20,000 tokens). A response that would then
            exceed the model's positions gets no further block.
        n: thoughts per problem.
        rules: where the code goes.
        engine, problems, model, template, tools, seed, per_problem: see ``traces.distil``.

    Raises:
        ValueError: see ``traces.distil``; a tool with variables that outlive a block; all problems
            drew 0 blocks.
        GoldError: a problem has no usable gold answer.
    """
    tools, rows = check_inputs(problems, tools, n, per_problem)
    if tools.config.tool_state != "fresh":
        raise ValueError(
            f"tool_state={tools.config.tool_state!r}: expected 'fresh'. Blocks are inserted in "
            "several passes, and variables would not live from one to the next."
        )
    wanted = [_stream(seed, "hint blocks", 0, r["problem_id"]).randint(*rules.blocks) for r in rows]
    asked = [(row, blocks) for row, blocks in zip(rows, wanted, strict=True) if blocks]
    if not asked:
        raise ValueError(
            f"all {len(rows)} problems drew 0 blocks from blocks={rules.blocks!r}: give more "
            "problems, or a range that begins with 1"
        )
    synthesis = _Synthesis(engine, tools, sampling, rules, seed, template)
    drafts = synthesis.thoughts(asked, n)
    for number in range(1, rules.max_rounds + 1):
        drafts = synthesis.round(drafts, number)
    usable = [d for d in drafts if d.draw.inserted]
    discarded = Counter(d.reason for d in drafts if not d.draw.inserted)
    how: dict[str, Any] = {
        "method": "hint",
        "sampling": asdict(sampling),
        "rules": asdict(rules),
        "n": n,
        "seed": seed,
        "per_problem": per_problem,
        "problems_without_blocks": len(rows) - len(asked),
    }
    draws = [draft.draw for draft in usable]
    return assemble(draws, discarded, how, engine, rows, model, template, tools)


class _Synthesis:
    """One run of ``hint``: what all its rounds share."""

    def __init__(
        self,
        engine: Engine,
        tools: Tools,
        sampling: Sampling,
        rules: HintRules,
        seed: int,
        template: str,
    ) -> None:
        self.engine, self.tools, self.sampling = engine, tools, sampling
        self.rules, self.seed, self.template = rules, seed, template
        self.tokenizer = engine.tokenizer
        self.prefill = templates.prefill_text(template, engine.tokenizer)

    def thoughts(self, asked: Sequence[tuple[Row, int]], n: int) -> list[_Draft]:
        """``n`` responses without code to each problem, with the blocks that they are to get."""
        rows = [row for row, _ in asked]
        prompts = templates.encode(rows, self.tokenizer, self.template)
        groups = self.engine.generate(
            prompts,
            replace(self.sampling, banned=(*self.sampling.banned, *FENCES)),
            n=n,
            keys=[stable_key(self.seed, "hint thought", 0, row["problem_id"]) for row in rows],
            prefill=self.prefill,
        )
        return [
            _Draft(Draw(row, sample, completion), tuple(prompt), blocks)
            for (row, blocks), prompt, group in zip(asked, prompts, groups, strict=True)
            for sample, completion in enumerate(group)
        ]

    def round(self, drafts: Sequence[_Draft], number: int) -> list[_Draft]:
        """Try to add one block to each response that is to have more."""
        done: dict[str, _Draft] = {}
        opened: list[_Part] = []
        for draft in drafts:
            part = self._cut(draft, number) if draft.left else None
            if part is None:
                # A text that cannot be cut now cannot be cut later.
                done[draft.name] = replace(draft, left=0)
            elif not self._fits(part, self.rules.code):
                done[draft.name] = replace(draft, reason="too long")
            else:
                opened.append(part)
        ready: list[_Part] = []
        for part, run in zip(opened, self._write_and_run(opened, number), strict=True):
            if isinstance(run, str):
                done[part.draft.name] = replace(part.draft, reason=run)
            elif not self._fits(run, self.sampling):
                done[part.draft.name] = replace(part.draft, reason="too long")
            else:
                ready.append(run)
        for part, rest in zip(ready, self._go_on(ready, number), strict=True):
            draft = part.draft
            draw = replace(draft.draw, completion=rest, inserted=part.inserted)
            more = replace(draft, draw=draw, left=draft.left - 1)
            failed = replace(draft, reason="infra")
            done[draft.name] = failed if rest.stop == "infra" else more
        return [done[draft.name] for draft in drafts]

    def _cut(self, draft: _Draft, number: int) -> _Part | None:
        """The response up to a random cut, the hint and the opening fence; None: not to be cut."""
        completion, rules = draft.draw.completion, self.rules
        if len(completion.tool_calls) >= self.tools.config.max_calls:
            return None
        start, end = open_thought(completion, self.prefill)
        places = cuts(completion.text[start:end], rules.separators)
        pieces = len(places) + 1
        if start >= end or pieces < rules.min_pieces:
            return None
        draws = _stream(self.seed, "hint cut", number, draft.name)
        kept = draws.randint(-(-pieces // 3), pieces)
        at = end if kept == pieces else start + places[kept - 1]
        count = self._tokens_before(completion, at)
        before = self._text(completion.token_ids[:count])
        # A token may hold the cut inside: then it goes, and with it a line break before the word.
        gap = "" if before[-1:].isspace() else "\n"
        sentence = f"{gap}{draws.choice(rules.hints)}\n{OPEN}"
        ids = self.tokenizer(sentence, add_special_tokens=False)["input_ids"]
        span = (len(before), len(before) + len(sentence))
        return _Part(
            draft,
            (*completion.token_ids[:count], *map(int, ids)),
            completion.tool_calls,
            (*draft.draw.inserted, span),
        )

    def _tokens_before(self, completion: Completion, at: int) -> int:
        """How many tokens spell no more than the first ``at`` characters of the text."""
        low, high = 0, len(completion.token_ids)
        while low < high:
            middle = (low + high + 1) // 2
            if len(self._text(completion.token_ids[:middle])) <= at:
                low = middle
            else:
                high = middle - 1
        # A piece of a character is decoded as one, too: not behind that.
        while low and not completion.text.startswith(self._text(completion.token_ids[:low])):
            low -= 1
        return low

    def _text(self, ids: Sequence[int]) -> str:
        return self.prefill + str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def _fits(self, part: _Part, sampling: Sampling) -> bool:
        positions = int(self.engine.model.config.max_position_embeddings)
        used = len(part.draft.prompt) + len(part.ids)
        return used + sampling.max_new_tokens <= positions

    def _keys(self, parts: Sequence[_Part], purpose: str, number: int) -> list[int]:
        return [stable_key(self.seed, purpose, number, part.draft.name) for part in parts]

    def _write_and_run(self, parts: Sequence[_Part], number: int) -> list[_Part | str]:
        """Let the policy write each block to its closing fence, run all, add the output.

        Instead of a part: why it cannot be used.
        """
        if not parts:
            return []
        stop = _StopAtFence(self.tools)
        drawn = self.engine.generate(
            [[*part.draft.prompt, *part.ids] for part in parts],
            self.rules.code,
            n=1,
            keys=self._keys(parts, "hint code", number),
            tools=stop,
        )
        submit = self.tools.executor.submit
        running = {row: submit(block.code) for row, block in stop.blocks.items()}
        found: list[_Part | str] = []
        for row, (part, [written]) in enumerate(zip(parts, drawn, strict=True)):
            if row not in running:
                found.append("code not closed")
                continue
            result = running[row].result()
            if result.status == "infra":
                found.append("infra")
            else:
                ids = (*part.ids, *written.token_ids)
                found.append(self._with_output(replace(part, ids=ids), stop.blocks[row], result))
        return found

    def _with_output(self, part: _Part, block: Block, result: Result) -> _Part:
        ids = (*part.ids, *self.tools.encode(self.tools.block(result, block)))
        call = ToolCall(
            code=block.code,
            output=self.tools.text(result, block.code),
            status=result.status,
            cpu_seconds=result.cpu_seconds,
            wall_seconds=result.wall_seconds,
            span=(len(part.ids), len(ids)),
        )
        return replace(part, ids=ids, calls=(*part.calls, call))

    def _go_on(self, parts: Sequence[_Part], number: int) -> list[Completion]:
        """The whole responses, written to their ends with the tool in the loop."""
        done: dict[int, Completion] = {}
        left = [self.tools.config.max_calls - len(part.calls) for part in parts]
        for calls in sorted(set(left)):
            places = [i for i, each in enumerate(left) if each == calls]
            chosen = [parts[i] for i in places]
            # Behind an output nothing of the text before it counts for the loop: no prefill.
            with self.tools.loop(max_calls=calls) as loop:
                drawn = self.engine.generate(
                    [[*part.draft.prompt, *part.ids] for part in chosen],
                    self.sampling,
                    n=1,
                    keys=self._keys(chosen, "hint rest", number),
                    tools=loop,
                )
            for i, part, [rest] in zip(places, chosen, drawn, strict=True):
                done[i] = self._joined(part, rest)
        return [done[i] for i in range(len(parts))]

    def _joined(self, part: _Part, rest: Completion) -> Completion:
        ids, base = (*part.ids, *rest.token_ids), len(part.ids)
        ends = self.engine.end_ids
        whole = Completion.from_ids(
            ids, self.tokenizer, stop=rest.stop, prefill=self.prefill, end_ids=ends
        )
        spans = [call.span for call in part.calls]
        spans += [(call.span[0] + base, call.span[1] + base) for call in rest.tool_calls]
        mask = [1] * len(ids)
        calls = []
        for call, (start, end) in zip((*part.calls, *rest.tool_calls), spans, strict=True):
            mask[start:end] = [0] * (end - start)
            characters = (len(self._text(ids[:start])), len(self._text(ids[:end])))
            calls.append(replace(call, span=(start, end), characters=characters))
        return replace(whole, loss_mask=tuple(mask), tool_calls=tuple(calls))


class _StopAtFence:
    """A tool loop that runs nothing: each row ends where it closes the block that it begins in."""

    rejoin: Rejoin = "barrier"

    def __init__(self, tools: Tools) -> None:
        self.blocks: dict[int, Block] = {}
        self._tools = tools
        self._written: dict[int, list[int]] = {}
        self._ended: list[int] = []

    def feed(self, row: int, new_ids: Sequence[int]) -> str | None:
        written = self._written.setdefault(row, [])
        written += new_ids
        if not self._tools.may_close(new_ids):
            return None
        text = str(self._tools.tokenizer.decode(written, skip_special_tokens=False))
        block = self._tools.search()(OPEN + text)
        if block is None:
            return None
        self.blocks[row] = block
        return block.code

    def submit(self, row: int, code: str) -> None:
        self._ended.append(row)

    def collect(self, wait: bool) -> list[Resume]:
        found = [Resume(row, stop="calls") for row in self._ended]
        self._ended.clear()
        return found

    def end(self, row: int) -> None:
        self._written.pop(row, None)


def _stream(seed: int, purpose: str, number: int, name: str) -> random.Random:
    return random.Random(stable_key(seed, purpose, number, name))
