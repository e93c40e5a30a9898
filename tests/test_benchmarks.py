"""The benchmarks' own arithmetic, and that both sides of a comparison do the same work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_config
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from rlkit import advantages, models, paths, rewards, tasks, templates, verify_pool
from rlkit.sandbox import Limits, PythonExecutor, Result
from rlkit.streams import row_streams
from rlkit.tokenizer import build_tokenizer
from rlkit.tool_config import ToolConfig
from rlkit.tools import Tools

sys.path.insert(0, str(paths.root() / "benchmarks"))

import _answers
import _cases
import _script
import _turns
import executor
import floor
import step
import verify
from _clock import PHASES, Clock, Step
from _gradients import gradient_gap
from _stock import SIDES, Setup, Stock, run
from _work import (
    Shape,
    Work,
    completion_work,
    decode_passes,
    padded_work,
    prompt_work,
    rollout_work,
    trained_rows,
)

import tools

STOCK = Stock(micro_batch=4, bf16=False)
OPTIONS = [
    "--prompts", "2", "--rollouts", "4", "--budget", "12", "--reward", "coin",
    "--stock", "4:float32", "--steps", "1", "--repeats", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def setup(model: Path) -> Setup:
    config = tiny_config(model, steps=2, micro_batch_size=8)
    problems = tasks.load_problems("chain", "train", 12)
    make = partial(models.load_policy, config.model)
    return Setup(config, problems, make, [("coin", rewards.random_reward, 1.0)])


@pytest.fixture
def grouped() -> Qwen2ForCausalLM:
    """A model with grouped-query attention, whose attention is plain matrix products."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return Qwen2ForCausalLM(config)


def rotary(model: Qwen2ForCausalLM, positions: int) -> int:
    """What transformers multiplies to get the angles, once per pass and never backwards."""
    return 2 * len(model.model.rotary_emb.inv_freq) * positions


def test_operations_of_a_pass_are_those_that_torch_counts(grouped: Qwen2ForCausalLM) -> None:
    rows, length = 3, 7
    ids = torch.randint(50, (rows, length))
    forward = Work(rows * length, rows * length**2, rows * length).operations(
        Shape.of(grouped.config)
    )
    with floor.counter() as counted:
        logits = grouped(ids).logits
    assert counted.get_total_flops() == forward + rotary(grouped, length)
    with floor.counter() as counted:
        logits.sum().backward()
    assert counted.get_total_flops() == 2 * forward


def test_operations_of_decoding_are_those_that_torch_counts(grouped: Qwen2ForCausalLM) -> None:
    prompt, length = 5, 4
    ids = torch.randint(50, (1, prompt + length - 1))
    cache = DynamicCache(config=grouped.config)
    with torch.no_grad(), floor.counter() as counted:
        grouped(ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
        for at in range(prompt, ids.shape[1]):
            grouped(ids[:, at : at + 1], past_key_values=cache)
    shape = Shape.of(grouped.config)
    # Reading the prompt, transformers multiplies what the causal mask then hides as well.
    hidden = Work(pairs=prompt**2 - prompt * (prompt + 1) // 2).operations(shape)
    work = rollout_work([prompt], [length], 1).operations(shape)
    assert counted.get_total_flops() == work + hidden + rotary(grouped, ids.shape[1])


def test_fused_attention_is_counted_in_both_directions() -> None:
    q, k = (torch.randn(2, 3, n, 4, requires_grad=True) for n in (5, 6))
    with floor.counter() as counted:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, k)
    assert counted.get_total_flops() == 2 * 2 * (2 * 3 * 5 * 6 * 4)
    with floor.counter() as counted:
        out.sum().backward()
    assert counted.get_total_flops() == 5 * 2 * (2 * 3 * 5 * 6 * 4)  # scores once more


def test_work_of_rollouts_by_hand() -> None:
    assert prompt_work(3) == Work(3, 6, 1)
    assert completion_work(3, 1) == Work(0, 0, 0)
    assert completion_work(3, 3) == Work(2, (3 + 1) + (3 + 2), 2)
    prompts, completions = [3, 3, 2, 2], [3, 1, 2, 2]
    shared = rollout_work(prompts, completions, 2)
    assert shared == Work(3 + 2 + 2 + 1 + 1, 6 + 3 + 9 + 3 + 3, 2 + 2 + 1 + 1)
    alone = rollout_work(prompts, completions, 1)
    assert alone == shared + prompt_work(3) + prompt_work(2)
    assert padded_work(prompts, completions, True) == Work(4 * 6, 4 * 36, 4 * 5)
    assert padded_work(prompts, completions, False) == Work(4 * 6, 4 * 36, 3 + 1 + 2 + 2)
    passes = list(decode_passes(prompts, completions))
    assert passes == [(3, (3 + 2 + 2) + 3), (1, 3 + 2)]
    decoded = rollout_work(prompts, completions, 2)
    read = prompt_work(3) + prompt_work(2)
    assert sum(rows for rows, _ in passes) == decoded.tokens - read.tokens
    assert sum(pairs for _, pairs in passes) == decoded.pairs - read.pairs


def test_rows_of_groups_with_equal_rewards_need_no_training() -> None:
    assert trained_rows([1, 1, 0, 1, 0, 0], 2) == [False, False, True, True, False, False]
    done = Step(prompts=[3, 3, 2, 2], completions=[3, 1, 2, 2], rewards=[1, 1, 0, 1])
    assert floor.training_work(done, 2) == rollout_work([2, 2], [2, 2], 2)


@pytest.mark.parametrize(("name", "size"), [("0.5b", 494_032_768), ("1.5b", 1_543_714_304)])
def test_shapes_are_those_of_the_published_models(name: str, size: int, model: Path) -> None:
    _, tokenizer = models.load_policy(tiny_config(model).model)
    with torch.device("meta"):
        made, _ = _cases.random_model(_cases.SHAPES[name], tokenizer)
    assert sum(p.numel() for p in made.parameters()) == size


def test_long_problems_have_prompts_as_long_as_asked(model: Path) -> None:
    _, tokenizer = models.load_policy(tiny_config(model).model)
    rows = _cases.long_problems("chain", 6, tokenizer, 60)
    prompts = templates.encode(rows, tokenizer)
    assert all(60 <= len(prompt) < 120 for prompt in prompts)
    assert len(set(map(tuple, prompts))) == 6


def fixed(reading: list[float]) -> Callable[[], float]:
    return partial(next, iter(reading))


def test_nested_phases_count_once() -> None:
    clock = Clock(lambda number: False, read=fixed([0, 1, 3, 7, 15, 31, 99]))
    backward = clock._wrap(lambda: None, "backward")
    forward = clock._wrap(backward, "forward")
    clock.on_train_begin()
    forward()
    clock.on_step_end(None, type("State", (), {"global_step": 1}), None)
    (done,) = clock.steps
    assert done.seconds == {
        "generation": 0, "reward": 0, "forward": 2 + 8, "backward": 4, "other": 1 + 16,
    }  # fmt: skip
    assert done.total == 31


def timed(seconds: float, tokens: int) -> Step:
    """A step whose phases take equally long."""
    return Step(dict.fromkeys(PHASES, seconds / len(PHASES)), completions=[tokens])


def test_ratios_are_of_neighbours() -> None:
    blocks: list[step.Block] = [
        {"ours": [timed(1, 10), timed(1, 10)], "stock": [timed(4, 10), timed(2, 20)]},
        {"ours": [timed(2, 10), timed(2, 10)], "stock": [timed(8, 20), timed(8, 20)]},
        {"ours": [timed(1, 10), timed(3, 10)], "stock": [timed(1, 10), timed(1, 10)]},
    ]
    for phase in ("step", "generation"):
        found = step.ratio(blocks, phase)
        assert (found.median, found.low, found.high) == pytest.approx((3, 0.5, 4))
    assert step.tokens_per_second(blocks[0], "stock", "step") == pytest.approx(30 / 6)
    rows = {name: rest for name, *rest in step.phase_rows(blocks)}
    assert rows["step, s"] == ["1.500", "3.000", "3.00 (0.50 to 4.00)"]
    # Tokens per second of each repeat: ours 10, 5, 5; stock 5, 2.5, 10.
    assert rows["tokens/s of step"] == ["5.0", "5.0", "2.00 (0.50 to 2.00)"]


def test_an_accuracy_counts_when_the_next_evaluation_holds_it() -> None:
    curve = [(5, 0.96), (10, 0.94), (15, 0.95), (20, 0.97), (25, 0.99)]
    assert step.first_of_two(curve, 0.95) == 15
    assert step.first_of_two(curve[:3], 0.95) is None
    reached, never = step.Learned(12.0, 15, ()), step.Learned(None, None, ((20, 0.5),))
    rows = step.learn_rows({
        0: {"ours": reached, "stock": step.Learned(60.0, 20, ())},
        1: {"ours": reached, "stock": never},
    })  # fmt: skip
    assert rows[0] == ("0", "12.0 (15 steps)", "60.0 (20 steps)", "5.00", "1.33", "3.75")
    assert rows[1] == ("1", "12.0 (15 steps)", "not in 20 steps", "", "", "")
    assert rows[2][:4] == ("median", "", "", "5.00 (5.00 to 5.00)")
    assert rows[2][5] == "3.75 (3.75 to 3.75)"


def test_both_sides_have_the_same_gradient(setup: Setup, tmp_path: Path) -> None:
    gap = gradient_gap(setup, STOCK, tmp_path)
    assert 0 < gap.whole < step.EXACT  # 0 would mean that a side was compared with itself
    assert gap.worst < 1e-4


def test_a_scaled_advantage_is_noticed(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    centred = advantages.METHODS["group_mean"]
    monkeypatch.setitem(advantages.METHODS, "group_mean", lambda r: 1.001 * centred(r))
    with pytest.raises(SystemExit, match="different gradients"):
        step.check_gradients(setup, STOCK, tmp_path)


def test_other_rewards_are_noticed(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = rewards.score
    calls = []

    def drifting(*args: object, **info: object) -> object:
        calls.append(1)
        values, parts = score(*args, **info)
        return [v + len(calls) for v in values], parts

    monkeypatch.setattr(rewards, "score", drifting)
    with pytest.raises(RuntimeError, match="different rewards"):
        gradient_gap(setup, STOCK, tmp_path)


@pytest.mark.parametrize("side", SIDES)
def test_rollouts_follow_the_script(
    side: str, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = setup.config.train.batch_size
    script = partial(_script.skewed_lengths, rows=rows, mean=6.0, longest=12)
    scripted = Setup(setup.config, setup.problems, setup.make, setup.reward_fns, script)
    steps = run(side, scripted, STOCK, tmp_path)
    assert [s.completions for s in steps] == [script(0, 1).tolist(), script(0, 2).tolist()]
    assert script(0, 1).min() >= 2 and script(0, 1).max() <= 12 and np.std(script(0, 1)) > 0
    monkeypatch.setattr(_script, "_force", lambda logits, over, end: logits)
    with pytest.raises(RuntimeError, match="not the scripted ones"):
        run(side, scripted, STOCK, tmp_path)


def test_a_step_of_both_sides_is_measured(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = step.main(["--model", str(model), *OPTIONS, "--steps", "2", "--markdown"])
    (block,) = found["blocks"]
    for side in SIDES:
        assert len(block[side]) == 2
        for done in block[side]:
            assert set(done.seconds) == set(PHASES)
            assert min(done.seconds.values()) > 0
            assert len(done.prompts) == len(done.completions) == len(done.rewards) == 8
            assert all(1 <= length <= 12 for length in done.completions)
    for ours, stock in zip(block["ours"], block["stock"], strict=True):
        assert ours.prompts == stock.prompts  # the same problems, in the same order
        assert ours.rewards == stock.rewards  # the coin knows step, row and problem
    lines = capsys.readouterr().out.splitlines()
    table = [line.split("|") for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(PHASES) + 3
    assert all(len(cells) == 6 for cells in table)


def test_time_to_an_accuracy_ends_with_the_second_evaluation(model: Path) -> None:
    options = ["--learn", "--goal", "0", "--learn-steps", "9", "--every", "2", "--seeds", "1"]
    found = step.main(["--model", str(model), *OPTIONS, *options, "--held-out", "2"])
    for side in SIDES:
        learned = found["results"][0][side]
        assert learned.steps == 2
        assert [at for at, _ in learned.curve] == [2, 4]
        assert learned.seconds > 0


def test_the_floor_is_below_what_is_done(model: Path) -> None:
    found = floor.main(["--model", str(model), *OPTIONS])
    assert [row[0] for row in found["floors"]] == [
        "rlkit, generation", "rlkit, training", "stock TRL, generation", "stock TRL, training",
    ]  # fmt: skip
    for _, needed, executed, least, took, times in found["floors"]:
        assert float(needed) >= 0 and float(least) >= 0 and float(took) > 0
        assert float(executed) >= 1
        assert float(times) > 1
    costs = [float(times) for _, _, times in found["savings"]]
    assert costs == sorted(costs) and costs[0] == 1
    for side in SIDES:
        for part in floor.PARTS:
            times = found["kinds"][side][part]
            assert min(times["matrix products"], times["elementwise"], times["Python"]) > 0
        assert found["kinds"][side]["other"]["optimizer"] > 0
        assert not found["kinds"][side]["generation"]["optimizer"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::rsqrt", "norms"),
        ("aten::_log_softmax", "softmax and sampling"),
        ("aten::index_select", "copies and indexing"),
        ("aten::mul", "elementwise"),
        ("aten::addcmul_", "elementwise"),
        ("Optimizer.step#AdamW.step", "optimizer"),
    ],
)
def test_operators_are_told_apart(name: str, kind: str) -> None:
    assert floor.kind_of(name) == kind


def test_random_weights_run_with_skewed_lengths(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    monkeypatch.setitem(_cases.SHAPES, "0.5b", small)
    monkeypatch.setattr(_cases, "VOCABULARY", 1000)  # more than the tokenizer knows
    shape = ["--shape", "0.5b", "--prompt-tokens", "40", "--mean-length", "5"]
    found = step.main(["--model", str(model), *OPTIONS, *shape])
    (block,) = found["blocks"]
    for ours, stock in zip(block["ours"], block["stock"], strict=True):
        assert ours.completions == stock.completions
        assert len(set(ours.completions)) > 1 and max(ours.completions) <= 12
        assert ours.prompts == stock.prompts and min(ours.prompts) >= 40
        assert 0 < sum(ours.rewards) < len(ours.rewards)


@pytest.mark.parametrize("distinct", [False, True])
def test_a_mix_has_the_proportions_it_promises(distinct: bool) -> None:
    mix = _answers.steps_of(3, 10, 8, 16, distinct)
    assert mix == _answers.steps_of(3, 10, 8, 16, distinct)
    assert [len(batch) for batch in mix] == [128] * 10
    items = [item for batch in mix for item in batch]
    assert sum(kind == "expression" for _, _, kind in items) == 128
    for at in range(0, len(items), 16):
        group = items[at : at + 16]
        assert len({item[1:] for item in group}) == 1
        assert not distinct or len({answer for answer, _, _ in group}) == 16
    golds = {gold for _, gold, kind in items if kind == "expression"}
    assert len(golds) == 8
    assert len({answer for answer, _, _ in _answers.bombs(0, 8)}) == 8


def test_judging_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verify_pool.close()  # the processes of other tests would be counted too
    pool = verify_pool.Pool(workers=2, seconds=0.5)
    monkeypatch.setattr(verify_pool, "_pool", pool)
    monkeypatch.setattr(verify_pool, "_cache", type(verify_pool._cache)())
    options = ["--steps", "5", "--problems", "2", "--rollouts", "6", "--repeats", "1"]
    found = verify.main([*options, "--bombs", "2", "--markdown"])
    assert len(found["mixes"]) == 2
    for (result,) in found["mixes"].values():
        assert result.items == 60 and result.ours > 0 and result.plain > 0
        for difference in result.differences:
            assert (difference.verdict == "right") != difference.plain
            assert difference.reason
    ((count, clean, took, bound, timeouts, left),) = found["bombs"]
    assert (count, timeouts, left) == (2, 2, 0)
    assert clean > 0 and took >= 0.5 and bound > clean
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 4 + 3


def test_a_difference_names_the_rule_behind_it() -> None:
    wrong, unparsable = verify.Verdict.WRONG, verify.Verdict.UNPARSABLE
    expected = [
        (("12", "1200", "expression"), wrong, "exactly"),
        (("x=12", "12", "integer"), unparsable, "a number and nothing else"),
        (("1 2", "x", "expression"), unparsable, "one expression as a whole"),
        (("x 5", "5", "expression"), wrong, "no number is picked"),
    ]
    for item, verdict, words in expected:
        assert words in verify.Difference(item, verdict, True).reason


def test_every_way_to_run_code_prints_the_right_answers(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    script = paths.root() / "benchmarks" / "executor.py"
    # A process of its own: pools are forked from it, and this one has threads of torch.
    done = subprocess.run(
        [sys.executable, str(script), "--quick", "--markdown", "--json", str(file)],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(paths.root())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr  # a wrong answer of anyone ends the script
    found = json.loads(file.read_text(encoding="utf-8"))
    names = {executor.SUBPROCESS, executor.BARE, executor.OURS, executor.SESSION, executor.POOL}
    names |= {executor.JUPYTER, executor.ROW}
    for program in executor.PROGRAMS:
        times = found["milliseconds"][program]
        assert names <= set(times) <= names | {executor.SMOLAGENTS}
        assert all(len(values) == 2 and min(values) > 0 for values in times.values())
        rates = found["runs_per_second"][program]
        assert list(rates)[:3] == [executor.flying(n) for n in (1, 2, 4)]
        assert len(rates) == 5 and all(min(values) > 0 for values in rates.values())
    assert found["load"]["runs"] == found["load"][executor.OURS] == 4
    assert len(found["bars"]) == 6
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    width = {line.count("|") for line in lines}
    assert width == {4, 6} and len(lines) == 2 * (2 + len(times)) + 2 + 5 + 2 + 2 + 2 + 6
    assert sum(line.endswith("| met |") or "NOT MET" in line for line in lines) == 6


def test_a_wrong_answer_is_noticed() -> None:
    wrong = {executor.SUBPROCESS: executor.by_subprocess, executor.OURS: lambda name: "3"}
    with pytest.raises(RuntimeError, match="rlkit, print: printed '3', expected '2'"):
        executor.latencies(wrong, 1)


def test_ratios_of_times_are_of_the_same_round() -> None:
    found = executor.ratios([4, 9, 2], [2, 3, 2])
    assert found == {"medians": 2, "minima": 1, "low": 1, "high": 3}


def test_every_way_to_call_a_tool_writes_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tools.main([
        "--prompts", "3", "--rollouts", "2", "--rounds", "1", "--threads", "1", "--markdown",
    ])  # fmt: skip
    (one,) = found["rounds"]
    assert tuple(one) == tools.SIDES
    right = one[tools.READY].written
    assert right.calls > 0 and 0 < right.policy_tokens < sum(map(len, right.ids))
    for measured in one.values():
        assert measured.written == right and measured.same == 6 and measured.seconds > 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(tools.SIDES)
    assert {line.count("|") for line in lines} == {6}


@pytest.mark.parametrize("work", list(tools.PROGRAMS))
def test_long_responses_follow_the_script(work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    monkeypatch.setattr(tools, "LONG_SHAPE", small)
    found = tools.main([
        "--case", "long", "--prompts", "1", "--rollouts", "2", "--rounds", "1", "--threads", "1",
        "--work", work, "--seconds", "0", "0.01",
    ])  # fmt: skip
    (one,) = found["rounds"]
    assert tuple(one) == tools.SIDES
    for measured in one.values():  # the script's own texts: a run of ours that differs has stopped
        assert measured.written == one[tools.READY].written
        assert measured.written.calls == 2 * tools.LONG_CALLS


def test_other_texts_of_a_tool_loop_are_noticed() -> None:
    with pytest.raises(RuntimeError, match="side: 2 of 16 texts differ"):
        tools.same_rows("side", [[1]] * 14 + [[2]] * 2, [[1]] * 16)
    assert tools.same_rows("side", [[1]] * 15 + [[2]], [[1]] * 16) == 15
    with pytest.raises(RuntimeError, match="row 1 is not the scripted one"):
        tools.check_script([[4, 1], [5, 1]], np.array([[4, 1, 1], [5, 6, 1]]), end=1)


def test_a_turn_ends_at_its_rest_of_the_budget() -> None:
    """The usual loop obeys the same limits as ours: budget with outputs, calls, draws by place."""
    tokenizer = build_tokenizer()
    block = tokenizer("```python\nprint(6 * 7)\n```\n", add_special_tokens=False)["input_ids"]
    output = tokenizer("```output\n42\n```\n", add_special_tokens=False)["input_ids"]
    draws = _turns.Draws(row_streams([1], 3, 0))
    held = []

    def turn(texts: list[list[int]], room: int) -> list[list[int]]:
        held.append((list(draws.active), [len(text) for text in texts], room))
        return [[9] * 5 + block if draws.active[i] else [9] * 3 + [1] for i in range(len(texts))]

    def run(codes: Sequence[str]) -> list[Result]:
        assert set(codes) <= {"print(6 * 7)"}
        return [Result("ok", "42\n") for _ in codes]

    size = 5 + len(block) + len(output)
    budget = 2 * size + 2
    config = ToolConfig(tool="python", max_calls=2)
    with PythonExecutor(Limits()) as executor:
        kit = Tools(executor, tokenizer, config)
        done = _turns.by_turns([[7], [7, 7], [7]], kit, draws, budget, turn, run)
    assert done.ids[0] == [9, 9, 9, 1]
    assert done.ids[1] == done.ids[2] == ([9] * 5 + block + output) * 2 + [9, 9]
    assert done.calls == 4 and done.policy_tokens == 4 + 2 * (2 * (5 + len(block)) + 2)
    assert held == [
        ([0, 1, 2], [1, 2, 1], budget),
        ([1, 2], [2 + size, 1 + size], budget - size),
        ([1, 2], [2 + 2 * size, 1 + 2 * size], 2),
    ]
