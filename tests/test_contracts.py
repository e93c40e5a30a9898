"""What rlkit relies on inside TRL and transformers, so that an upgrade fails here and by name.

A failing test names what moved; compare it with the module it mentions before raising the pin.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.kernels.chunked_logprob as kernel
import trl.trainer.base_trainer as base_trainer
import trl.trainer.utils as trl_utils
from datasets import Dataset
from tiny import tiny_config
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer, set_seed
from trl.generation.vllm_generation import VLLMGeneration
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from rlkit import models, tasks, templates
from rlkit.arguments import trainer_arguments
from rlkit.compat import completion_only_head
from rlkit.grpo import RolloutTrainer
from rlkit.rollouts import Window
from rlkit.sft import IGNORED, DocumentTrainer

GRPO, SFT = "rlkit/grpo.py", "rlkit/sft.py"
ALWAYS = {
    "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages",
    "num_items_in_batch", "sampling_per_token_logps",
}  # fmt: skip


def moved(what: str, where: str = GRPO) -> str:
    return f"TRL or transformers moved: {what}; compare with {where}"


@dataclass
class Seen:
    """What the base classes asked of a trainer and when."""

    micro_steps: list[int] = field(default_factory=list)
    batches: list[dict[str, Tensor]] = field(default_factory=list)
    passes: list[dict[str, Any]] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)


class Watched(RolloutTrainer):
    """RolloutTrainer that writes down how it is called."""

    seen: Seen

    def _prepare_inputs(self, generation_batch: Mapping[str, Any]) -> dict[str, Tensor]:
        assert set(generation_batch) == {"micro_step"}, moved("get_train_dataloader")
        self.seen.micro_steps.append(int(generation_batch["micro_step"]))
        return super()._prepare_inputs(generation_batch)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        self.seen.batches.append(dict(batch))
        return batch

    def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> Any:
        self.seen.passes.append(
            {"arguments": len(args), "grad": torch.is_grad_enabled(), **options}
        )
        return super()._get_per_token_logps_and_entropies(*args, **options)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.seen.logs.append({
            "names": set(logs),
            "global_step": self.state.global_step,
            "scheduler": self.lr_scheduler.last_epoch,
            **{f"count {name}": len(values) for name, values in self._metrics["train"].items()},
        })  # fmt: skip
        super().log(logs, start_time)


def rewarded(completions: Sequence[Any], problems: Sequence[Any], /, **info: Any) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]


def trainer(
    model: Path,
    folder: Path,
    *,
    on_step: Callable[[Window, dict[str, float]], bool] = lambda window, row: False,
    **params: Any,
) -> Watched:
    settings = tiny_config(model, **{"learning_rate": 1e-2, **params})
    set_seed(0)
    policy, tokenizer = models.load_policy(settings.model)
    problems = tasks.load_problems("chain", "train", 12)
    made = Watched(
        settings, policy, tokenizer, problems, [("rewarded", rewarded, 1.0)], on_step, folder
    )
    made.seen = Seen()
    return made


@pytest.fixture(scope="module")
def on_policy(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """One step, finished; four parts."""
    made = trainer(model, tmp_path_factory.mktemp("on"), steps=1, micro_batch_size=4)
    made.run()
    return made


@pytest.fixture(scope="module")
def off_policy(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Three steps of two updates of two parts with a KL term to a reference of its own weights."""
    made = trainer(
        model, tmp_path_factory.mktemp("off"), steps=3, updates_per_batch=2, micro_batch_size=4,
        beta=0.1, mask_truncated=True,
    )  # fmt: skip
    assert made.ref_model is not None
    with torch.no_grad():
        for parameter in made.ref_model.parameters():
            parameter.mul_(3)
    made.run()
    return made


def stock(model: Path, folder: Path, reward: Callable[..., Any]) -> tuple[GRPOTrainer, Any]:
    """TRL's trainer with nothing overridden."""
    settings = tiny_config(model)
    policy, tokenizer = models.load_policy(settings.model)
    question = [{"role": "user", "content": "Compute 1+1."}]
    made = GRPOTrainer(
        model=policy,  # type: ignore[arg-type]
        reward_funcs=[reward],
        args=trainer_arguments(settings, folder),
        train_dataset=Dataset.from_list([{"prompt": question}]),
        processing_class=tokenizer,
    )
    made.model.train()
    return made, question


def scored(
    model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Log-probabilities of each completion by the model's own forward pass."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(logps.gather(-1, torch.tensor(completion)[:, None])[:, 0])
    return found


# --- names and arguments --------------------------------------------------------------------------

SIGNATURES: list[tuple[Any, str, list[str]]] = [
    (GRPOTrainer, "get_train_dataloader", ["self"]),
    (GRPOTrainer, "_prepare_inputs", ["self", "generation_batch"]),
    (GRPOTrainer, "_generate", ["self", "prompts"]),
    (GRPOTrainer, "_generate_and_score_completions", ["self", "inputs"]),
    (
        GRPOTrainer, "_calculate_rewards",
        ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    ),
    (GRPOTrainer, "_compute_loss", ["self", "model", "inputs"]),
    (GRPOTrainer, "log", ["self", "logs", "start_time"]),
    (
        GRPOTrainer, "_get_per_token_logps_and_entropies",
        ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size",
         "compute_entropy", "compute_aux_loss"],
    ),
    (GRPOTrainer, "_send_telemetry", ["self"]),
    (Trainer, "train", ["self", "resume_from_checkpoint"]),
    (Trainer, "_save_optimizer_and_scheduler", ["self", "output_dir"]),
    (Trainer, "_save_rng_state", ["self", "output_dir"]),
    (Trainer, "_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
    (VLLMGeneration, "sync_weights", ["self"]),
    (SFTTrainer, "get_train_dataloader", ["self"]),
    (SFTTrainer, "log", ["self", "logs", "start_time"]),
    (SFTTrainer, "_send_telemetry", ["self"]),
    (trl_utils, "add_fused_lm_head", ["model", "temperature"]),
    (trl_utils, "_use_triton", ["device"]),
    (
        ChunkedLogProbFunction, "forward",
        ["ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size",
         "final_logit_softcapping", "logit_scale", "outputs"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("owner", "name", "arguments"), SIGNATURES, ids=[f"{o.__name__}.{n}" for o, n, _ in SIGNATURES]
)
def test_names_and_arguments(owner: Any, name: str, arguments: list[str]) -> None:
    assert name in dir(owner), moved(f"{owner.__name__}.{name} is gone")
    found = list(inspect.signature(getattr(owner, name)).parameters)
    assert found[: len(arguments)] == arguments, moved(f"{owner.__name__}.{name} takes {found}")


def test_what_the_vllm_engine_is_made_of() -> None:
    """vLLM itself runs on GPU hosts only, so the source has to do."""
    where = "rlkit/grpo.py (_make_engine) and rlkit/vllm_engine.py"
    generation = inspect.getsource(VLLMGeneration)
    for name in ("self.llm = LLM(", 'logprobs_mode="processed_logprobs"'):
        assert name in generation, moved(f"VLLMGeneration has no {name}", where)
    assert "self.vllm_generation = VLLMGeneration(" in inspect.getsource(GRPOTrainer), moved(
        "GRPOTrainer makes no vllm_generation", where
    )


# --- rollouts -------------------------------------------------------------------------------------


def test_what_generate_returns(model: Path, tmp_path: Path) -> None:
    made, question = stock(model, tmp_path, lambda completions, **_: [0.0] * len(completions))
    result = made._generate([question] * 4)
    message = moved("GRPOTrainer._generate returns other things than RolloutTrainer._generate")
    assert len(result) == 8, message
    prompt_ids, completion_ids, mask, completions, logprobs, extra, images, tool_images = result
    expected = templates.encode([{"prompt": question}], made._tokenizer, "question")
    assert prompt_ids == expected * 4, message
    assert type(completion_ids) is type(completions) is list, message
    assert len(completion_ids) == len(completions) == 4, message
    assert all(type(i) is int for ids in completion_ids for i in ids), message
    assert completions[0][0]["role"] == "assistant", message
    assert (mask, logprobs, extra, images, tool_images) == (None, None, {}, None, []), message


def test_what_calculate_rewards_returns(model: Path, tmp_path: Path) -> None:
    made, question = stock(model, tmp_path, lambda completions, **_: [1.0, None, 0.5, 0.0])
    found = made._calculate_rewards(
        [{"prompt": question}] * 4, [question] * 4, ["a", "b", "c", "d"], [[5]] * 4
    )
    message = moved("GRPOTrainer._calculate_rewards: expected a tensor [rows, reward functions]")
    assert found.shape == (4, 1), message
    assert found[:, 0].isnan().tolist() == [False, True, False, False], message
    assert found[[0, 2, 3], 0].tolist() == [1, 0.5, 0], message


def test_the_tokenizer_is_kept(on_policy: Watched) -> None:
    kept = on_policy._tokenizer
    assert isinstance(kept, PreTrainedTokenizerBase), moved("GRPOTrainer._tokenizer")
    assert kept is on_policy.processing_class is on_policy.engine.tokenizer


def test_keys_of_a_scored_batch(model: Path, on_policy: Watched, off_policy: Watched) -> None:
    what = "keys of GRPOTrainer._generate_and_score_completions"
    assert set(on_policy.seen.batches[0]) == ALWAYS, moved(f"{what}, on-policy")
    more = {"old_per_token_logps", "ref_per_token_logps", "tool_mask"}
    for batch in off_policy.seen.batches:
        assert set(batch) == ALWAYS | more, moved(f"{what}, off-policy with KL and mask")


def test_values_of_a_scored_batch(on_policy: Watched, off_policy: Watched) -> None:
    """Rows in order, prompts padded on the left, everything of completions on the right."""
    for made, masked in ((on_policy, False), (off_policy, True)):
        window, (*_, batch) = made.window, made.seen.batches
        assert window is not None
        prompts = templates.encode(window.problems, made._tokenizer, "question")
        completions = [c for group in window.completions for c in group]
        tokens = 0
        for row, completion in enumerate(completions):
            prompt, ids = prompts[row // 4], list(completion.token_ids)
            kept = batch["prompt_mask"][row].bool(), batch["completion_mask"][row].bool()
            assert batch["prompt_ids"][row][kept[0]].tolist() == prompt
            assert batch["prompt_mask"][row].sort().values.equal(batch["prompt_mask"][row])
            assert batch["completion_ids"][row][kept[1]].tolist() == ids
            assert kept[1].tolist() == [True] * len(ids) + [False] * (len(kept[1]) - len(ids))
            claimed = batch["sampling_per_token_logps"][row][kept[1]].tolist()
            assert claimed == pytest.approx(completion.logprobs), moved("logprobs of _generate")
            if masked:
                own = batch["tool_mask"][row][kept[1]].tolist()
                assert own == [int(completion.reached_end)] * len(ids), moved("mask of _generate")
            tokens += len(ids) * (not masked or completion.reached_end)
        assert batch["num_items_in_batch"] == tokens, moved(
            "num_items_in_batch, the divisor of dapo"
        )
        assert batch["advantages"].shape == (16,), moved("advantages are one per row")


def test_the_reference_model_is_read(off_policy: Watched) -> None:
    """``ref_model`` is what the KL is measured to (here: the start's weights times 3)."""
    window, batch = off_policy.window, off_policy.seen.batches[-1]
    assert window is not None
    prompts = templates.encode(window.problems, off_policy._tokenizer, "question")
    flat = [(p, c.token_ids) for p, g in zip(prompts, window.completions, strict=True) for c in g]
    expected = scored(off_policy.ref_model, *zip(*flat, strict=True))
    for row, logps in enumerate(expected):
        apart = (batch["ref_per_token_logps"][row, : len(logps)] - logps).abs().max()
        assert apart < 1e-5, moved("GRPOTrainer.ref_model")


def test_without_kl_there_is_no_reference(on_policy: Watched) -> None:
    assert on_policy.ref_model is None, moved("GRPOTrainer.ref_model with beta=0")
    assert on_policy.args.beta == on_policy.beta == 0


def test_an_adapter_called_ref_is_the_reference(model: Path, tmp_path: Path) -> None:
    """With LoRA, TRL reads the adapter ``ref`` where there is one, else the base model."""
    for resets in (0, 5):
        made = trainer(
            model, tmp_path, steps=1, lora_rank=2, beta=0.1, reference_reset=resets,
            learning_rate=1e-9,
        )  # fmt: skip
        policy: Any = made.policy
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B.ref" in name:
                    parameter.normal_(0, 0.3)
        made.run()
        batch = made.seen.batches[0]
        window = made.window
        assert window is not None
        prompts = templates.encode(window.problems, made._tokenizer, "question")
        flat = [(p, g[0].token_ids) for p, g in zip(prompts, window.completions, strict=True)]
        sides = {}
        with policy.disable_adapter():
            sides["base"] = scored(policy, *zip(*flat, strict=True))
        if resets:
            policy.set_adapter("ref")
            sides["ref"] = scored(policy, *zip(*flat, strict=True))
        found = [batch["ref_per_token_logps"][4 * i, : len(ids)] for i, (_, ids) in enumerate(flat)]
        apart = {
            name: max(float((a - b).abs().max()) for a, b in zip(found, logps, strict=True))
            for name, logps in sides.items()
        }
        message = moved(f"the adapter that GRPOTrainer reads as reference: {apart}")
        assert not resets or apart["base"] > 1e-3, message
        assert apart["ref" if resets else "base"] < 1e-5, message


# --- loss -----------------------------------------------------------------------------------------


def test_beta_is_read_at_each_loss(model: Path, tmp_path: Path) -> None:
    made = trainer(model, tmp_path, steps=1, beta=0.1)
    made.run()  # the update has moved the policy away from its reference
    (part,) = made._parts
    found = {}
    for beta in (0.0, 0.5, 0.25):
        made.beta = beta
        made._metrics["train"].clear()
        found[beta] = float(GRPOTrainer._compute_loss(made, made.model, part).detach())
        kl = made._metrics["train"].get("kl", [])
        assert len(kl) == (beta > 0), moved("_metrics['train']['kl']: one value per loss")
    assert kl[0] > 1e-5
    for beta in (0.5, 0.25):
        message = moved("GRPOTrainer.beta is no longer read at each loss")
        assert found[beta] - found[0.0] == pytest.approx(beta * kl[0], rel=1e-3), message


def test_metrics_are_one_value_per_part(on_policy: Watched, off_policy: Watched) -> None:
    for made, parts in ((on_policy, 4), (off_policy, 4)):
        *steps, _ = made.seen.logs
        for row in steps:
            for name in ("clip_ratio/region_mean", *(["kl"] if made is off_policy else [])):
                message = moved(f"_metrics['train'][{name!r}]: expected one value per part")
                assert row.get(f"count {name}") == parts, message


def test_clip_ratio_is_a_mean_over_trained_tokens(on_policy: Watched) -> None:
    """Half the trained tokens clipped, the masked ones not counted."""
    part = dict(on_policy._parts[-1])
    mask = torch.zeros_like(part["completion_mask"])
    mask[:2] = part["completion_mask"][:2]
    made = on_policy
    with torch.no_grad():
        logps, _, _ = made._get_per_token_logps_and_entropies(
            made.model,
            torch.cat([part["prompt_ids"], part["completion_ids"]], 1),
            torch.cat([part["prompt_mask"], part["completion_mask"]], 1),
            mask.shape[1],
        )
    old = logps.clone()
    old[0] -= 1  # ratio e: clipped from above
    old[2] -= 1
    part.update(tool_mask=mask, old_per_token_logps=old, advantages=torch.ones(4))
    made._metrics["train"].clear()
    GRPOTrainer._compute_loss(made, made.model, part)
    (value,) = made._metrics["train"]["clip_ratio/region_mean"]
    share = float(mask[0].sum() / mask.sum())
    assert value == pytest.approx(share), moved("clip_ratio/region_mean")


# --- scoring --------------------------------------------------------------------------------------


def test_how_scores_are_asked_for(on_policy: Watched, off_policy: Watched) -> None:
    """No batch size: a part of an update, with gradient. With one: all rollouts, without."""
    what = "arguments of _get_per_token_logps_and_entropies"
    for row in on_policy.seen.passes[:4]:
        assert (row["arguments"], row["grad"]) == (4, True), moved(what)
        assert row.get("batch_size") is None, moved(what)
        assert row["compute_entropy"] is True, moved(what)
    first = off_policy.seen.passes[:6]  # old policy, reference, four parts
    assert [row.get("batch_size") for row in first] == [4, 4, None, None, None, None], moved(what)
    assert [row["grad"] for row in first] == [False] * 2 + [True] * 4, moved(what)


def test_scores_come_in_batches_and_as_three(on_policy: Watched) -> None:
    made, rows = on_policy, []
    ids = torch.randint(5, 100, (6, 20), generator=torch.Generator().manual_seed(0))
    body: Any = made.accelerator.unwrap_model(made.model).model
    hook = body.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with torch.no_grad():
        found = {
            size: GRPOTrainer._get_per_token_logps_and_entropies(
                made, made.model, ids, torch.ones_like(ids), 8, batch_size=size, compute_entropy=e
            )
            for size, e in ((4, False), (None, True))
        }
    hook.remove()
    assert rows == [4, 2, 6], moved("batch_size of _get_per_token_logps_and_entropies")
    message = moved("_get_per_token_logps_and_entropies returns (logps, entropies, aux loss)")
    assert all(len(result) == 3 for result in found.values()), message
    logps, entropies, aux = found[None]
    assert (logps.shape, entropies.shape, aux) == ((6, 8), (6, 8), None), message
    assert found[4][1:] == (None, None), message
    assert torch.allclose(found[4][0], logps, atol=1e-6), message


class Head:
    """In place of the kernel that the fused head calls: counts the positions it scores."""

    def __init__(self) -> None:
        self.positions: list[int] = []

    def apply(self, hidden: Tensor, *args: Any) -> Any:
        self.positions.append(len(hidden))
        return ChunkedLogProbFunction.apply(hidden, *args)


def test_the_head_scores_completions_only_inside_the_patch(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = "rlkit/compat.py"
    policy: Any = models.load_policy(tiny_config(model).model)[0]
    add_fused_lm_head(policy, temperature=1.5)
    head = Head()
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", head)
    ids = torch.randint(5, 100, (3, 10), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :6] = IGNORED
    labels[0, 8:] = IGNORED
    logps = []
    for patch in (None, completion_only_head):
        before = kernel._use_triton
        with torch.no_grad():
            if patch is None:
                out = policy(input_ids=ids, labels=labels, fused_lm_head=True)
            else:
                with patch():
                    assert kernel._use_triton is before, moved("the kernel's own switch", where)
                    out = policy(input_ids=ids, labels=labels, fused_lm_head=True)
        logps.append(out.log_probs)
    message = "TRL scores completions only on CPU too: rlkit/compat.py can go"
    assert head.positions[0] == 27, message
    assert head.positions[1] == 10, moved("trl.trainer.utils._use_triton", where)
    # What else asks this switch would be changed by the patch too.
    for code in (inspect.getsource(trl_utils), inspect.getsource(add_fused_lm_head)):
        assert code.count("_use_triton(") == 1, moved("who calls _use_triton", where)
    logits = policy(input_ids=ids).logits[:, :-1] / 1.5
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    for found in logps:
        apart = (found - expected.where(labels[:, 1:] != IGNORED, torch.zeros(()))).abs().max()
        assert apart < 1e-5, moved("add_fused_lm_head divides logits by its temperature")


@pytest.mark.parametrize("chunk", [7, 40, 8192])
def test_the_kernel_computes_log_softmax_and_entropy(chunk: int) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, requires_grad=True) for shape in ((11, 6), (40, 6), (40,))
    )
    targets = torch.randint(40, (11,))
    found = ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, 1.3, chunk, None, 1.0, ("log_probs", "entropy")
    )
    where = moved("trl.kernels.ChunkedLogProbFunction", "rlkit/forward.py")
    assert len(found) == 5, where
    assert found[2:] == (None, None, None), where
    expected = ((hidden @ weight.T + bias) / 1.3).log_softmax(-1)
    logps = expected.gather(-1, targets[:, None])[:, 0]
    entropies = -(expected.exp() * expected).sum(-1)
    for ours, theirs in zip(found[:2], (logps, entropies), strict=True):
        assert (ours - theirs).abs().max() < 1e-5, where
        sides = [
            torch.autograd.grad(side.square().sum(), (hidden, weight, bias), retain_graph=True)
            for side in (ours, theirs)
        ]
        for a, b in zip(*sides, strict=True):
            assert (a - b).norm() < 1e-4 * b.norm(), where


# --- the training loop ----------------------------------------------------------------------------


def test_one_call_per_part_in_order(on_policy: Watched, off_policy: Watched) -> None:
    assert on_policy.seen.micro_steps == list(range(4)), moved("_prepare_inputs is called per part")
    assert off_policy.seen.micro_steps == list(range(12)), moved("_prepare_inputs per part")
    assert len(off_policy.seen.batches) == 3


def test_log_comes_once_per_step_after_the_counters(off_policy: Watched) -> None:
    """What ``save_state`` writes inside ``on_step`` must belong to the finished step."""
    *steps, summary = off_policy.seen.logs
    message = moved("Trainer calls log at another moment")
    assert [row["global_step"] for row in steps] == [2, 4, 6], message
    assert [row["scheduler"] for row in steps] == [2, 4, 6], message
    for row in steps:
        assert {"loss", "grad_norm", "learning_rate"} <= row["names"], message
    assert "loss" not in summary["names"], message


def test_a_stop_asked_for_in_log_ends_the_run_there(model: Path, tmp_path: Path) -> None:
    made = trainer(
        model, tmp_path, steps=3, updates_per_batch=2, micro_batch_size=4,
        on_step=lambda window, row: True,
    )  # fmt: skip
    made.run()
    message = moved("control.should_training_stop is read after log")
    assert made.seen.micro_steps == list(range(4)), message
    assert made.state.global_step == 2, message


@pytest.fixture(scope="module")
def states(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders 1 to 3 with the resume points of a run of three steps."""
    folder = tmp_path_factory.mktemp("states")

    def save(window: Window, row: dict[str, float]) -> bool:
        (folder / str(window.step)).mkdir()
        made.save_state(folder / str(window.step))
        return False

    made = trainer(
        model, folder, steps=3, updates_per_batch=2, micro_batch_size=4, on_step=save
    )  # fmt: skip
    made.run()
    return folder


def test_files_of_a_resume_point(states: Path) -> None:
    names = {path.name for path in (states / "2").iterdir()}
    for name, writer in (
        ("optimizer.pt", "_save_optimizer_and_scheduler"),
        ("scheduler.pt", "_save_optimizer_and_scheduler"),
        ("rng_state.pth", "_save_rng_state"),
        ("model.safetensors", "save_pretrained"),
    ):
        assert name in names, moved(f"{writer} no longer writes {name}")
    state = json.loads((states / "2" / "trainer_state.json").read_text())
    assert state["global_step"] == 4, moved("trainer_state.json: global_step counts updates")


def test_resuming_goes_on_with_the_next_part(model: Path, states: Path, tmp_path: Path) -> None:
    steps: list[int] = []

    def note(window: Window, row: dict[str, float]) -> bool:
        steps.append(window.step)
        return False

    params: dict[str, Any] = {"steps": 3, "updates_per_batch": 2, "micro_batch_size": 4}
    for at in (1, 2):
        steps.clear()
        made = trainer(model, tmp_path, on_step=note, **params)
        start = torch.cat([p.detach().flatten() for p in made.policy.parameters()])
        made.run(resume=states / str(at))
        message = moved("train(resume_from_checkpoint) skips other parts of our DataLoader")
        assert made.seen.micro_steps == list(range(4 * at, 12)), message
        assert steps == list(range(at + 1, 4)), message
        assert made.state.global_step == 6, message
        end, _ = models.load_policy(tiny_config(states / "3").model)
        found = torch.cat([p.detach().flatten() for p in made.policy.parameters()])
        assert not torch.equal(found, start)
        message = moved("weights, optimizer or scheduler are not restored")
        assert torch.equal(found, torch.cat([p.flatten() for p in end.parameters()])), message


def test_resuming_at_the_end_adds_nothing(model: Path, states: Path, tmp_path: Path) -> None:
    """Trainer stops by itself as long as its one epoch holds all steps of the run.

    With several epochs TRL 1.16 adds a step there.
    """
    params: dict[str, Any] = {"steps": 3, "updates_per_batch": 2, "micro_batch_size": 4}
    plain = trainer(model, tmp_path, **params)
    plain.run(resume=states / "3")
    assert plain.seen.micro_steps == [], moved("Trainer adds an update when it resumes at the end")
    assert plain.state.global_step == 6
    assert [row["names"] & {"loss"} for row in plain.seen.logs] == [set()]


def test_nothing_is_sent(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda *a, **k: sent.append((a, k)))
    stock(model, tmp_path, lambda completions, **_: [0.0])
    assert len(sent) == 1, moved("TRL's telemetry: look for what RolloutTrainer must switch off")
    trainer(model, tmp_path)
    documents(model, tmp_path)
    assert len(sent) == 1, moved("_send_telemetry: something about a run leaves the machine")


# --- supervised fine-tuning -----------------------------------------------------------------------

EXAMPLES = [
    {"input_ids": [5, 6, 7, 8], "labels": [IGNORED, IGNORED, 7, 8]},
    {"input_ids": [5, 9], "labels": [IGNORED, 9]},
    {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]},
]


def documents(model: Path, folder: Path) -> DocumentTrainer:
    settings = tiny_config(
        model, batch_size=4, rollouts=2, micro_batch_size=2, epochs=1, reward="accuracy",
        allow_exploitable=False, learning_rate=1e-9,
    )  # fmt: skip
    policy, tokenizer = models.load_policy(settings.model)
    return DocumentTrainer(settings, policy, tokenizer, EXAMPLES, lambda row: False, folder)


def test_the_collator_pads_ids_and_labels(model: Path, tmp_path: Path) -> None:
    made = documents(model, tmp_path)
    batch = made.data_collator(copy.deepcopy(EXAMPLES))
    pad = made.processing_class.pad_token_id
    message = moved("SFTTrainer.data_collator", SFT)
    assert {"input_ids", "labels", "attention_mask"} <= set(batch), message
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 9, pad, pad], [5, 6, 7, pad]], message
    ignored = [[IGNORED, IGNORED, 7, 8], [IGNORED, 9, IGNORED, IGNORED], [IGNORED, 6, 7, IGNORED]]
    assert batch["labels"].tolist() == ignored, message
    assert batch["attention_mask"].sum(1).tolist() == [4, 2, 3], message


def test_accuracy_and_entropy_of_documents(model: Path, tmp_path: Path) -> None:
    """One value per part, over the tokens with loss."""
    made = documents(model, tmp_path)
    seen: list[dict[str, list[float]]] = []
    log = made.log

    def watched(logs: dict[str, float], start_time: float | None = None) -> None:
        seen.append({name: list(values) for name, values in made._metrics["train"].items()})
        log(logs, start_time)

    made.log = watched  # type: ignore[method-assign]
    made.train()
    right, entropies = [], []
    policy: Any = made.accelerator.unwrap_model(made.model)
    for number in (part for step in made._plan for part in step):
        found = []
        for example in (EXAMPLES[i] for i in number):
            with torch.no_grad():
                logits = policy(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(example["labels"][1:])
            kept = labels != IGNORED
            logps = logits[kept].log_softmax(-1)
            entropy = -(logps.exp() * logps).sum(-1)
            hits = (logps.argmax(-1) == labels[kept]).float()
            found.append(torch.stack([hits, entropy]))
        means = torch.cat(found, 1).mean(1)
        right.append(float(means[0]))
        entropies.append(float(means[1]))
    assert len(right) == 2
    message = moved("SFTTrainer._metrics['train']", SFT)
    assert seen[0].get("mean_token_accuracy") == pytest.approx(right), message
    assert seen[0].get("entropy") == pytest.approx(entropies, abs=1e-4), message
    assert not math.isnan(sum(entropies))
