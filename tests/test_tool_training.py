"""Training on responses that hold tool output: what is learned from, recorded, and made again."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from dictated import Faulty, Scripted
from killed import Moment, arm
from tiny import coin, tiny_config
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from rlkit import evaluate, models, runs, tasks, templates
from rlkit.config import RunConfig
from rlkit.grpo import RolloutTrainer
from rlkit.rollouts import Window, step_metrics
from rlkit.sandbox import InfraError, Limits, PythonExecutor
from rlkit.tokenizer import END, build_tokenizer
from rlkit.tools import Executor, Tools
from rlkit.trainer import train_rl

BUDGET = 110


def block(code: str) -> str:
    return f"```python\n{code}\n```\n"


# One call and an answer; a failure and a second try; none; a call too many; output and text beyond
# the budget; a call whose result is the end of the row.
TEXTS = (
    block("print(6*7)") + r"so \boxed{42}" + END,
    block("1/0") + "Wait\n" + block("print(2)") + "ok" + END,
    r"\boxed{42}" + END,
    block("print(1)") + block("print(2)") + block("print(3)") + r"\boxed{42}" + END,
    block("print('ab'*70)") + "never read",
    "is " + block("x=1") + "7",
)
TOOL: dict[str, Any] = {
    "tool": "python", "max_calls": 2, "max_completion_length": BUDGET, "steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture(scope="module")
def executor() -> Iterator[PythonExecutor]:
    with PythonExecutor(Limits(cpu_seconds=5, wall_seconds=30)) as opened:
        yield opened


@pytest.fixture(autouse=True)
def runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("RLKIT_HEADLESS", "1")


def follow(
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] = TEXTS,
) -> None:
    """Each response is one of ``texts``, a function of its random stream."""
    ids = [tokenizer(text)["input_ids"] for text in texts]
    Scripted(lambda number, stream: ids[stream % len(ids)]).patch(monkeypatch)


def answers_42(count: int = 12) -> list[dict[str, Any]]:
    rows = tasks.load_problems("chain", "train", count)
    return [{**row, "answer": "42"} for row in rows]


class Updates(TrainerCallback):
    """Gradients and weights before each update of the optimizer."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **have: Any) -> None:
        model = have["model"]
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.gradients.append({n: p.grad.detach().clone() for n, p in named})
        self.weights.append(copy.deepcopy(model.state_dict()))


def seeded_policy(config: RunConfig) -> Any:
    set_seed(config.seed)
    return models.load_policy(config.model)[0]


def make_trainer(
    config: RunConfig, executor: Executor, folder: Path, windows: list[Window]
) -> tuple[RolloutTrainer, list[dict[str, float]]]:
    set_seed(config.seed)
    policy, tokenizer = models.load_policy(config.model)
    numbers: list[dict[str, float]] = []

    def on_step(window: Window, row: dict[str, float]) -> bool:
        windows.append(window)
        numbers.append(row)
        return False

    made = RolloutTrainer(
        config, policy, tokenizer, answers_42(), [("coin", coin, 1.0)], on_step, folder,
        tools=Tools(executor, tokenizer, config.tools),
    )  # fmt: skip
    return made, numbers


def train(
    config: RunConfig, executor: Executor, folder: Path
) -> tuple[list[Window], list[dict[str, float]]]:
    windows: list[Window] = []
    made, numbers = make_trainer(config, executor, folder, windows)
    made.run()
    return windows, numbers


def own_scores(model: Any, prompt: Sequence[int], completion: Any, t: float) -> tuple[Tensor, ...]:
    """Log-probability and entropy of the policy's tokens alone, from a plain forward pass."""
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    logps = (model(ids).logits[0, len(prompt) - 1 : -1] / t).log_softmax(-1)
    own = torch.tensor(completion.loss_mask).bool()
    chosen = logps.gather(-1, ids[0, len(prompt) :, None])[:, 0]
    return chosen[own], -(logps.exp() * logps).sum(-1)[own]


def written_loss(
    config: RunConfig, window: Window, update: int, policy: Any, before: Any, start: Any
) -> Tensor:
    """The loss of one update as the papers write it, over the policy's tokens only.

    ``before``: the policy that the step began with; ``start``: the reference.
    """
    train = config.train
    tokenizer = build_tokenizer()
    prompts = templates.encode(window.problems, tokenizer, config.task.template)
    rows = [
        (prompt, completion, float(advantage))
        for prompt, group, weights in zip(
            prompts, window.completions, window.advantages, strict=True
        )
        for completion, advantage in zip(group, weights, strict=True)
    ]
    size = len(rows) // train.updates_per_batch
    tokens = sum(sum(c.loss_mask) for _, c, _ in rows) / train.updates_per_batch
    t = config.sampling.temperature
    loss, entropy, own = torch.zeros(()), torch.zeros(()), 0
    for prompt, completion, advantage in rows[update * size : (update + 1) * size]:
        logps, entropies = own_scores(policy, prompt, completion, t)
        with torch.no_grad():
            old, _ = own_scores(before, prompt, completion, t)
            reference, _ = own_scores(start, prompt, completion, t)
        ratio = (logps - old).exp()
        clipped = ratio.clamp(1 - train.epsilon, 1 + train.epsilon_high)
        terms = -torch.min(ratio * advantage, clipped * advantage)
        gap = reference - logps
        terms = terms + train.beta * (gap.exp() - gap - 1)
        divisor = {
            "dapo": tokens,
            "grpo": len(terms) * size,
            "dr_grpo": size * config.sampling.max_completion_length,
        }[train.loss_type]
        loss = loss + terms.sum() / divisor
        entropy, own = entropy + entropies.sum(), own + len(terms)
    return loss - train.entropy_coef * entropy / own


CASES: dict[str, dict[str, Any]] = {
    **{loss: {"loss_type": loss} for loss in ("dapo", "grpo", "dr_grpo")},
    **{
        f"{loss}, KL, two updates": {"loss_type": loss, "beta": 0.5, "updates_per_batch": 2}
        for loss in ("dapo", "grpo", "dr_grpo")
    },
    "KL": {"beta": 0.5},
    "entropy": {"entropy_coef": 0.1, "loss_type": "grpo"},
    "hot": {"temperature": 1.4, "advantage": "group_std"},
    "checkpointed": {"gradient_checkpointing": True, "beta": 0.5},
    "checkpointed, two updates": {"gradient_checkpointing": True, "updates_per_batch": 2},
    "LoRA": {"lora_rank": 4, "beta": 0.5, "loss_type": "grpo"},
}


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_policys_tokens_alone(
    model, tokenizer, executor, tmp_path, monkeypatch, name
) -> None:
    """Two steps, so that ratio and KL have left 1 and 0 where they can."""
    follow(monkeypatch, tokenizer)
    config = tiny_config(
        model, **{**TOOL, "micro_batch_size": 4, "max_grad_norm": 1e9, "learning_rate": 1e-2,
                  **CASES[name]},
    )  # fmt: skip
    windows: list[Window] = []
    made, numbers = make_trainer(config, executor, tmp_path, windows)
    assert made._packed == (name.split(",")[0] not in ("checkpointed", "LoRA"))
    updates = Updates()
    made.add_callback(updates)
    # Fresh ones: the trainer's forward pass is bound to its own model.
    start, before, policy = (seeded_policy(config) for _ in range(3))
    scored: list[tuple[Tensor, Mapping[str, Tensor]]] = []
    score = RolloutTrainer._score

    def kept(self: RolloutTrainer, *args: Any, **options: Any) -> Any:
        found = score(self, *args, **options)
        if found[0].requires_grad:
            found[0].retain_grad()
            scored.append((found[0], self._part))
        return found

    monkeypatch.setattr(RolloutTrainer, "_score", kept)
    made.run()
    assert all(n["logp_difference"] < 1e-3 for n in numbers)
    per_step = config.train.updates_per_batch
    assert len(updates.gradients) == 2 * per_step
    for number, found in enumerate(updates.gradients):
        step, update = divmod(number, per_step)
        before.load_state_dict(updates.weights[step * per_step])
        policy.load_state_dict(updates.weights[number])
        policy.zero_grad()
        written_loss(config, windows[step], update, policy, before, start).backward()
        expected = {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}
        assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=2e-6, msg=key)
    # The same, read off the log-probabilities themselves.
    forced = 0
    for logps, part in scored:
        written, own = part["completion_mask"].bool(), part["tool_mask"].bool()
        assert logps.grad is not None
        assert (logps.grad[written & ~own] == 0).all()
        forced += int((written & ~own).sum())
        if per_step == 1 and not config.train.beta:  # else a ratio may be clipped, a sum be 0
            pays = (part["advantages"] != 0)[:, None]
            assert (logps.grad[written & own & pays] != 0).all()
    assert forced > 100


@pytest.mark.parametrize("packed", [True, False])
def test_output_is_context_of_what_follows(
    model, tokenizer, executor, tmp_path, monkeypatch, packed
) -> None:
    follow(monkeypatch, tokenizer, TEXTS[:1])
    config = tiny_config(model, **TOOL)
    windows: list[Window] = []
    made, _ = make_trainer(config, executor, tmp_path, windows)
    made._packed = packed
    completion = made.sample(answers_42(1), "train", 1)[0][0]
    prompt = templates.encode(answers_42(1), tokenizer)[0]
    start, end = completion.tool_calls[0].span
    ids = torch.tensor([prompt + list(completion.token_ids)] * 2)
    ids[1, len(prompt) + start + 3] = tokenizer("9")["input_ids"][0]
    with torch.no_grad():
        logps, _, _ = made._get_per_token_logps_and_entropies(
            made.model, ids, torch.ones_like(ids), len(completion.token_ids)
        )
    own = torch.tensor(completion.loss_mask).bool()
    after = own & (torch.arange(len(own)) >= end)
    torch.testing.assert_close(logps[0, :start], logps[1, :start], rtol=0, atol=1e-6)
    assert (logps[0, after] - logps[1, after]).abs().min() > 1e-7
    np.testing.assert_allclose(
        logps[0][own], np.array(completion.logprobs)[own.numpy()], rtol=0, atol=1e-5
    )


def test_the_call_budget_follows_its_schedule(
    model, tokenizer, executor, tmp_path, monkeypatch
) -> None:
    text = r"\boxed{42}" + block("0") * 5 + END
    follow(monkeypatch, tokenizer, [text])
    config = tiny_config(
        model, **{**TOOL, "steps": 5, "first_calls": 1, "max_calls": 3, "calls_every": 2,
                  "max_completion_length": 150},
    )  # fmt: skip
    windows, _ = train(config, executor, tmp_path)
    assert [config.tools.calls_at(step) for step in range(1, 6)] == [1, 1, 2, 2, 3]
    for window in windows:
        flat = [c for group in window.completions for c in group]
        assert {len(c.tool_calls) for c in flat} == {config.tools.calls_at(window.step)}
        assert {c.stop for c in flat} == {"calls"}
        assert not window.correct.any()
        assert step_metrics(window, tools=True)["calls_ended"] == 1


def test_out_of_calls_is_truncated_and_never_right(
    model, tokenizer, executor, tmp_path, monkeypatch
) -> None:
    texts = [block("0") + "ok" + block("1") + r"\boxed{42}", block("0") + r"\boxed{42}" + END]
    answer_first = [block("0") + r"\boxed{42} " + block("1")]
    follow(monkeypatch, tokenizer, texts + answer_first)
    config = tiny_config(
        model, **{**TOOL, "max_calls": 1, "mask_truncated": True, "steps": 1, "beta": 0.1}
    )
    windows: list[Window] = []
    made, _ = make_trainer(config, executor, tmp_path, windows)
    made.run()
    [window] = windows
    flat = [c for group in window.completions for c in group]
    assert {c.stop for c in flat} == {"eos", "calls"}
    assert window.correct.reshape(-1).tolist() == [c.stop == "eos" for c in flat]
    assert any(c.answer == "42" and c.stop == "calls" for c in flat)
    tokens = sum(int((p["completion_mask"] * p["tool_mask"]).sum()) for p in made._parts)
    assert tokens == sum(sum(c.loss_mask) for c in flat if c.stop == "eos") > 0


FIGURES = (
    "call_rate", "calls_mean", "call_failures", "calls_ended", "tool_tokens_mean", "seconds_tool",
)  # fmt: skip
COLUMNS = ("calls", "failed_calls", "tool_tokens", "tool_seconds", "tool_calls")


def test_a_run_records_its_calls(model, tokenizer, executor, monkeypatch) -> None:
    follow(monkeypatch, tokenizer)
    config = tiny_config(model, **TOOL, eval_every=2, eval_problems=3, eval_samples=2)
    path = train_rl(config, problems=answers_42(), executor=executor)
    metrics, rollouts = runs.read_metrics(path), runs.read_rollouts(path)
    assert runs.read_status(path).state == "done"
    assert metrics[list(FIGURES)].notna().all().all()
    assert (metrics["logp_difference"] < 1e-3).all()
    for _, row in metrics.iterrows():
        drawn = rollouts[rollouts["step"] == row["step"]]
        assert row["call_rate"] == (drawn["calls"] > 0).mean()
        assert row["calls_mean"] == drawn["calls"].mean()
        assert row["call_failures"] == drawn["failed_calls"].sum() / drawn["calls"].sum()
        assert row["calls_ended"] == (drawn["stop"] == "calls").mean()
        assert row["tool_tokens_mean"] == drawn["tool_tokens"].mean()
        assert row["seconds_tool"] == pytest.approx(drawn["tool_seconds"].sum())
        assert row["seconds_tool"] > 0
    seen = set()
    for row in rollouts.itertuples():
        calls = json.loads(row.tool_calls)
        assert row.calls == len(calls)
        assert row.failed_calls == sum(call["status"] != "ok" for call in calls)
        assert row.tool_tokens == sum(call["span"][1] - call["span"][0] for call in calls)
        for call in calls:
            shown = row.text[slice(*call["characters"])]
            assert shown.lstrip("\n").startswith("```output\n" + call["output"][:20])
            seen.add((call["code"], call["output"].splitlines()[0], call["status"]))
    assert {
        ("print(6*7)", "42", "ok"),
        ("1/0", "ZeroDivisionError: division by zero", "error"),
        ("x=1", "(no output; use print to show values)", "ok"),
    } <= seen
    assert set(rollouts["stop"]) == {"eos", "length", "calls"}
    assert (
        rollouts["correct"].any() and not rollouts.loc[rollouts["stop"] != "eos", "correct"].any()
    )
    for step in (0, 2):
        result = evaluate.load(path, f"validation-{step:06d}")
        assert result.rows["calls"].sum() > 0
        called = result.rows[result.rows["calls"] > 0]
        assert called["text"].str.contains("```output", regex=False).all()
    without = train_rl(tiny_config(model, name="plain-s0"), problems=answers_42())
    assert not set(FIGURES) & set(runs.read_metrics(without))
    assert not set(COLUMNS) & set(runs.read_rollouts(without))


def test_without_the_tool_code_is_text(model, tokenizer, executor, monkeypatch) -> None:
    follow(monkeypatch, tokenizer)
    path = train_rl(tiny_config(model, max_completion_length=BUDGET), problems=answers_42())
    texts = runs.read_rollouts(path)["text"]
    assert texts.str.contains("```python", regex=False).any()
    assert not texts.str.contains("```output", regex=False).any()


def timeless(frame: pd.DataFrame) -> pd.DataFrame:
    """Without what a clock said."""
    frame = frame.drop(columns=[c for c in frame if c.startswith(("seconds_", "tool_seconds"))])
    if "tool_calls" in frame:
        calls = frame["tool_calls"].map(json.loads)
        clocks = ("cpu_seconds", "wall_seconds")
        frame["tool_calls"] = [
            json.dumps([{k: v for k, v in call.items() if k not in clocks} for call in each])
            for each in calls
        ]
    return frame


def assert_same_run(broken: Path, whole: Path) -> None:
    for read in (runs.read_metrics, runs.read_rollouts):
        pd.testing.assert_frame_equal(
            timeless(read(broken)), timeless(read(whole)), check_exact=True
        )
    assert evaluate.names(broken) == evaluate.names(whole)
    for name in evaluate.names(whole):
        one, other = (timeless(evaluate.load(path, name).rows) for path in (broken, whole))
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    first, second = (
        (runs.final_checkpoint(path) / "model.safetensors").read_bytes() for path in (broken, whole)
    )
    assert first == second


class Killed(BaseException):
    """Stands for the end of the process."""


RESUMED: dict[str, Any] = {**TOOL, "steps": 5, "learning_rate": 1e-2, "resume_every": 2}


@pytest.mark.parametrize(
    ("params", "at", "step"),
    [
        ({"first_calls": 1, "calls_every": 2, "eval_every": 2, "eval_problems": 2}, "rollouts", 4),
        ({"updates_per_batch": 2, "micro_batch_size": 4, "beta": 0.1}, "optimizer", 3),
        ({"tool_state": "session", "max_calls": 3, "max_completion_length": 180}, "saving", 4),
    ],
)
def test_a_killed_and_resumed_run_is_the_same(
    model, tokenizer, executor, monkeypatch, params: dict[str, Any], at: Moment, step: int
) -> None:
    follow(monkeypatch, tokenizer, [*TEXTS, block("x=6") + block("print(x*7)") + "42" + END])

    def start(name: str) -> Path:
        config = tiny_config(model, **{**RESUMED, **params, "name": name})
        return train_rl(config, problems=answers_42(), executor=executor)

    def die() -> None:
        raise Killed

    whole = start("whole-s0")
    with pytest.MonkeyPatch.context() as patch:
        arm(at, step, die, patch.setattr)
        with pytest.raises(Killed):
            start("broken-s0")
    assert runs.read_status("broken-s0").state == "failed"
    with pytest.MonkeyPatch.context() as patch:
        arm("recorded", 4, lambda: runs.send("broken-s0", "stop"), patch.setattr)
        assert runs.read_status(start("broken-s0")).state == "interrupted"
    broken = start("broken-s0")
    assert runs.read_status(broken).resumed == (2, 4)
    assert_same_run(broken, whole)


def test_a_tool_run_survives_kill_9() -> None:
    """The embedded tool model, drawing its own tokens, with a sandbox of its own."""
    params: dict[str, Any] = {
        "task": "large+chain", "train_problems": 12, "tool": "python", "steps": 3,
        "max_completion_length": 100, "resume_every": 1, "learning_rate": 1e-4,
        "model": "tiny-tool", "temperature": 1.2,
    }  # fmt: skip
    killed = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed.py")),
         json.dumps({**params, "name": "broken-s0", "at": "loss", "step": 3})],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    broken = train_rl(tiny_config(**{**params, "name": "broken-s0"}))
    assert runs.read_status(broken).resumed == (2,)
    whole = train_rl(tiny_config(**{**params, "name": "whole-s0"}))
    assert_same_run(broken, whole)
    metrics = runs.read_metrics(whole)
    assert (metrics["logp_difference"] < 1e-3).all()
    assert metrics["call_rate"].mean() > 0.1
    kinds = runs.read_rollouts(whole)["problem_id"].str.partition(":")[0]
    assert kinds.value_counts().to_dict() == {"large": 24, "chain": 24}


def test_rows_whose_tool_was_lost_have_no_reward_and_no_loss(
    model, tokenizer, executor, monkeypatch
) -> None:
    lost = block("print(1)") + block("LOST = 1") + "never" + END
    follow(monkeypatch, tokenizer, [*TEXTS, lost, lost, lost])
    params = {**TOOL, "steps": 3, "beta": 0.1, "eval_every": 3, "eval_problems": 6}
    path = train_rl(tiny_config(model, **params), problems=answers_42(), executor=Faulty(executor))
    assert runs.read_status(path).state == "done"
    rollouts, metrics = runs.read_rollouts(path), runs.read_metrics(path)
    gone = rollouts["tool_calls"].str.contains("LOST")
    assert 0 < gone.sum() < len(rollouts)
    assert (rollouts.loc[gone, "stop"] == "infra").all()
    assert not (rollouts.loc[~gone, "stop"] == "infra").any()
    assert rollouts.loc[gone, "reward"].isna().all() and rollouts.loc[~gone, "reward"].notna().all()
    assert (rollouts.loc[gone, "advantage"] == 0).all()
    assert not rollouts.loc[gone, "correct"].any()
    assert (rollouts.loc[gone, "calls"] == 1).all(), "a lost call says nothing about the policy"
    assert (rollouts.loc[gone, "failed_calls"] == 0).all()
    assert np.isfinite(metrics[["loss", "grad_norm", "reward"]]).all().all()
    assert evaluate.load(path, "validation-000003").info["infra"] > 0


def test_lost_rows_are_as_if_never_drawn(model, tokenizer, executor, tmp_path, monkeypatch) -> None:
    """All tokens of the loss, whatever the divisor, are those of the other rows."""
    follow(monkeypatch, tokenizer, [*TEXTS, block("LOST = 1")])
    windows: list[Window] = []
    config = tiny_config(model, **{**TOOL, "steps": 1, "micro_batch_size": 4, "beta": 0.1})
    made, _ = make_trainer(config, Faulty(executor), tmp_path, windows)
    made.run()
    flat = [c for group in windows[0].completions for c in group]
    assert any(c.stop == "infra" for c in flat)
    tokens = sum(int((p["completion_mask"] * p["tool_mask"]).sum()) for p in made._parts)
    assert tokens == sum(sum(c.loss_mask) for c in flat if c.stop != "infra")
    assert int(made._parts[0]["num_items_in_batch"]) == tokens


@pytest.mark.parametrize("late", [False, True])
def test_a_broken_executor_stops_the_run_which_then_goes_on(
    model, tokenizer, executor, monkeypatch, late: bool
) -> None:
    follow(monkeypatch, tokenizer)

    def start(name: str, runner: Executor) -> Path:
        config = tiny_config(model, **{**RESUMED, "name": name, "resume_every": 1, "steps": 3})
        return train_rl(config, problems=answers_42(), executor=runner)

    counted = Faulty(executor)
    whole = start("whole-s0", counted)
    with pytest.raises(InfraError, match="the fork server is gone"):
        start("broken-s0", Faulty(executor, last=counted.runs - 3, late=late))
    status = runs.read_status("broken-s0")
    assert (status.state, status.step) == ("failed", 2)
    assert "InfraError" in status.error and "the fork server is gone" in status.error
    broken = start("broken-s0", executor)
    assert runs.read_status(broken).resumed == (2,)
    assert_same_run(broken, whole)
