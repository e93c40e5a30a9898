"""The one place that touches TRL internals: a GRPOTrainer that samples with our engine.

What it changes, and why (TRL 1.16):

- ``get_train_dataloader`` yields step numbers. The prompts of a step are a function of (seed, step)
  and of nothing else, so evaluation, resuming or a second ``train()`` cannot shift them.
- ``_generate`` hands over the rollouts of ``rlkit.rollouts`` with their Completion objects; TRL's
  own decoding drops special tokens, which would delete ``<think>``.
- ``_calculate_rewards`` hands over their rewards; advantages are rlkit's.
- ``_prepare_inputs`` drops rows without signal, sorts by length inside an update, splits, trims.
- ``_get_per_token_logps_and_entropies`` scores plain models on CPU without padding and with each
  prompt read once (``rlkit.forward``); elsewhere it trims before TRL's own pass.
- ``log`` reports one row per step instead of TRL's averages.
- The LM head scores completion positions only, on CPU too (``rlkit.compat``).
- ``save_state`` and ``run(resume=...)`` write and read resume points between steps, where no
  rollout is left over: the next step follows from its number, the weights and the optimizer.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from rlkit import filters, forward, kl, rewards, templates
from rlkit.arguments import sampling, trainer_arguments
from rlkit.batching import Tensors, loss_mask, micro_batches, score_windows, trained_tokens
from rlkit.checks import ConfigError
from rlkit.compat import completion_only_head
from rlkit.completion import Completion
from rlkit.config import RunConfig
from rlkit.engine import Engine, end_token_ids, stable_key
from rlkit.models import Policy
from rlkit.reference import Reference
from rlkit.rollouts import Row, Window, roll_out
from rlkit.session import gradients, save_weights
from rlkit.tools import Tools, calling
from rlkit.vllm_engine import VllmEngine

STATE = "rlkit_state.json"
"""What a resume point holds beyond the files of ``transformers``: the KL coefficient."""


class RolloutTrainer(GRPOTrainer):
    """GRPO on rollouts of ``rlkit.engine``.

    Args:
        problems: training problem rows.
        reward_fns: (name, callable, weight) as from ``rewards.build``.
        on_step: called after each step with its rollouts and its numbers (``loss``, ``grad_norm``,
            ``learning_rate``, ``kl``, ``beta``, ``clip_ratio``, ``rows_trained``,
            ``logp_difference``, ``seconds_score``, ``seconds_step``); returning True stops the run.
            ``logp_difference`` is the largest distance between the engine's log-probability of a
            token and the trainer's, over the ``rows_trained`` rows.
        output_dir: TRL wants one; nothing is written there.
        group_filter: what is left out of baseline and loss, as from ``rewards.build_filter``.
        tools: runs the code that rollouts write, as from ``tools.open_tools``.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Policy,
        tokenizer: PreTrainedTokenizerBase,
        problems: Sequence[Row],
        reward_fns: rewards.RewardFns,
        on_step: Callable[[Window, dict[str, float]], bool],
        output_dir: Path,
        group_filter: filters.GroupFilter | None = None,
        tools: Tools | None = None,
    ) -> None:
        train = config.train
        if config.sampling.engine == "vllm" and importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "engine='vllm': vLLM is not installed here. Install the package with .[gpu] on a "
                "GPU host, or set engine='rlkit'."
            )
        self.run_config = config
        self.policy = model
        self.problems = problems
        self.window: Window | None = None
        self._passes = train.batch_size // train.micro_batch_size
        self._parts: list[Tensors] = []
        self._part: Tensors = {}
        self._reward_fns = list(reward_fns)
        self._group_filter = group_filter
        self.code_tools = tools  # GRPOTrainer has a ``tools`` of its own
        self._on_step = on_step
        self._clock = time.perf_counter()
        self._difference = 0.0
        self._tokens = 0
        self._seconds_score = 0.0
        self._adaptive_beta = train.beta
        reference = Reference(model, resets=train.reference_reset > 0) if train.beta > 0 else None
        self.reference = reference
        super().__init__(
            model=model,
            reward_funcs=[_unused_reward],
            args=trainer_arguments(config, output_dir),
            # TRL insists on a data set; get_train_dataloader does not use it.
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": ""}]}]),
            processing_class=tokenizer,
        )
        self.remove_callback(PrinterCallback)
        if self.accelerator.num_processes > 1:
            raise ConfigError(
                f"{self.accelerator.num_processes} processes: training runs in one process so far. "
                "Start it without accelerate launch or torchrun."
            )
        self.engine = self._make_engine(tokenizer)
        self.prefill = templates.prefill_text(config.task.template, tokenizer)
        if reference is not None and reference.model is not None:
            add_fused_lm_head(reference.model, temperature=config.sampling.temperature)
            self.ref_model = self.accelerator.prepare_model(reference.model, evaluation_mode=True)
        self._packed = (
            forward.supports(model)
            and self.accelerator.device.type == "cpu"
            and not config.model.gradient_checkpointing
        )

    def _make_engine(self, tokenizer: PreTrainedTokenizerBase) -> Engine | VllmEngine:
        policy = self.accelerator.unwrap_model(self.model)
        if self.use_vllm:
            ends = end_token_ids(policy, tokenizer)
            return VllmEngine(
                self.vllm_generation.llm, tokenizer, ends, self.vllm_generation.sync_weights
            )
        return Engine(policy, tokenizer, dtype=torch.bfloat16 if self.args.bf16 else None)

    def _send_telemetry(self) -> None:
        """Nothing about a run leaves the machine."""

    def get_train_dataloader(self) -> DataLoader:
        """One item per forward/backward pass; the rollouts are made in ``_prepare_inputs``."""
        items: Any = list(range(self._passes * self.run_config.train.steps))
        # Lists of one rather than batch_size=None: resuming skips through the batch sampler.
        return DataLoader(items, batch_size=1, collate_fn=lambda picked: {"micro_step": picked[0]})

    def sample(self, rows: Sequence[Row], purpose: str, step: int) -> list[list[Completion]]:
        """``rollouts`` completions for each problem, from streams of ``purpose`` and ``step``."""
        config = self.run_config
        with calling(self.code_tools, self.prefill, config.tools.calls_at(max(1, step))) as loop:
            return self.engine.generate(
                templates.encode(rows, self._tokenizer, config.task.template),
                sampling(config),
                n=config.train.rollouts,
                keys=[stable_key(config.seed, purpose, step, row["problem_id"]) for row in rows],
                prefill=self.prefill,
                tools=loop,
            )

    def _prepare_inputs(self, generation_batch: Mapping[str, Any]) -> Tensors:
        number, index = divmod(int(generation_batch["micro_step"]), self._passes)
        if index == 0:
            self._parts = self._collect(number + 1)
        return self._parts[index]

    def _collect(self, step: int) -> list[Tensors]:
        train = self.run_config.train
        if self.reference is not None:
            if train.reference_reset and step > 1 and (step - 1) % train.reference_reset == 0:
                self.reference.reset()
            self.beta = (
                self._adaptive_beta
                if train.kl_schedule == "adaptive"
                else kl.scheduled(train.kl_schedule, train.beta, step, train.steps)
            )
        window = roll_out(
            self.run_config,
            step,
            self.problems,
            lambda rows: self.sample(rows, "train", step),
            self._reward_fns,
            self._group_filter,
        )
        self.window = window
        self._difference = 0.0
        begun = time.perf_counter()
        rows = [window.problems[g] for g in window.used for _ in range(train.rollouts)]
        batch = self._generate_and_score_completions([dict(row) for row in rows])
        self._seconds_score = time.perf_counter() - begun
        batch["advantages"] = torch.tensor(
            window.advantages[list(window.used)].reshape(-1),
            dtype=torch.float32,
            device=self.accelerator.device,
        )
        kept = torch.tensor(window.counted[list(window.used)].reshape(-1))
        batch["kept"] = kept.to(self.accelerator.device)
        if "old_per_token_logps" in batch:
            self._compare(batch["old_per_token_logps"], batch)
        self._tokens = int(trained_tokens(batch).sum())
        # A KL term and an entropy bonus act on every row.
        drop = train.drop_no_signal and self.beta == 0 and train.entropy_coef == 0
        return micro_batches(
            batch, train.updates_per_batch, train.micro_batch_size, drop_no_signal=drop
        )

    def _used(self) -> tuple[Window, list[Completion]]:
        assert self.window is not None
        window = self.window
        return window, [c for g in window.used for c in window.completions[g]]

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        config = self.run_config
        window, completions = self._used()
        rows = [window.problems[g] for g in window.used]
        ids = templates.encode(rows, self._tokenizer, config.task.template)
        prompt_ids = [p for p in ids for _ in range(config.train.rollouts)]
        completion_ids = [list(c.token_ids) for c in completions]
        kept = window.counted[list(window.used)].reshape(-1)
        masks = [
            loss_mask(c, config.train.mask_truncated) if keep else [0] * len(c.token_ids)
            for c, keep in zip(completions, kept, strict=True)
        ]
        mask = None if all(map(all, masks)) else masks
        logprobs = [list(c.logprobs or [math.nan] * len(c.token_ids)) for c in completions]
        return prompt_ids, completion_ids, mask, completions, logprobs, {}, None, []

    def _calculate_rewards(
        self, inputs: list[Row], prompts: Any, completions: list[Completion], ids: Any
    ) -> torch.Tensor:
        window, _ = self._used()
        flat = torch.tensor(window.rewards[list(window.used)].reshape(-1, 1), dtype=torch.float32)
        return flat.to(self.accelerator.device)

    def _compute_loss(self, model: Any, inputs: Tensors) -> torch.Tensor:
        self._part = inputs
        # TRL takes the mean entropy of each part, and a part of short rows would weigh as much as
        # one of long rows: weigh by tokens, so that the bonus does not depend on the parts.
        # dapo divides by the tokens of the whole batch; the others by rows (not so the bonus).
        scale = 1.0 if self.loss_type == "dapo" else float(inputs["loss_scale"])
        share = float(inputs["token_share"]) / scale
        self.entropy_coef = self.run_config.train.entropy_coef * share
        return super()._compute_loss(model, inputs) * scale

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Without padding where ``rlkit.forward`` can; else cut where all rollouts are scored."""
        if batch_size is None:  # a part of an update, cut already
            logps, entropies, aux = self._score(
                model, input_ids, attention_mask, logits_to_keep, **options
            )
            if self._part and "old_per_token_logps" not in self._part:
                self._compare(logps.detach(), self._part)
            return logps, entropies, aux
        result = input_ids.new_zeros((len(input_ids), logits_to_keep), dtype=torch.float32)
        for rows, window in score_windows(attention_mask, logits_to_keep, batch_size):
            width = window.stop - (input_ids.shape[1] - logits_to_keep)
            part, _, _ = self._score(
                model, input_ids[rows, window], attention_mask[rows, window], width
            )
            result[rows, :width] = part.float()
        return result, None, None

    def _score(
        self, model: Any, ids: torch.Tensor, mask: torch.Tensor, width: int, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if not self._packed:
            return super()._get_per_token_logps_and_entropies(model, ids, mask, width, **options)
        plain = self.accelerator.unwrap_model(model)
        plan = forward.layout(ids, mask, width, plain.lm_head.weight.dtype)
        return *forward.score(plain, plan, self.temperature), None

    def _compare(self, logps: torch.Tensor, batch: Tensors) -> None:
        """Keep the largest distance between the engine's log-probabilities and these."""
        distance = (logps - batch["sampling_per_token_logps"]).abs()[trained_tokens(batch).bool()]
        worst = float(distance.max()) if distance.numel() else 0.0
        if not worst <= self._difference:  # NaN: not known, which must not look like 0
            self._difference = worst

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand the finished step to ``on_step`` (called by Trainer once per step)."""
        collected = {name: list(values) for name, values in self._metrics["train"].items()}
        self._metrics["train"].clear()
        if "loss" not in logs:
            return  # the summary at the end of train()
        window, _ = self._used()
        tokens = [float(trained_tokens(part).sum()) for part in self._parts]

        def per_token(name: str) -> float:
            """Mean over all tokens of the batch; dropped rows would have added 0."""
            values = collected.get(name, [])
            if len(values) != len(tokens) or not self._tokens:
                return math.nan
            return sum(v * n for v, n in zip(values, tokens, strict=True) if n) / self._tokens

        divergence = per_token("kl")
        numbers = {
            "loss": float(logs["loss"]),
            "grad_norm": float(logs["grad_norm"]),
            "learning_rate": float(logs["learning_rate"]),
            "kl": divergence,
            "beta": float(self.beta),
            "clip_ratio": per_token("clip_ratio/region_mean"),
            "rows_trained": sum(len(part["advantages"]) for part in self._parts),
            "logp_difference": self._difference,
            "seconds_score": self._seconds_score,
            "seconds_step": time.perf_counter() - self._clock,
        }
        train = self.run_config.train
        if train.kl_schedule == "adaptive":
            self._adaptive_beta = kl.adapted(
                self._adaptive_beta, divergence, train.kl_target, train.kl_gain
            )
        if self._on_step(window, numbers):
            self.control.should_training_stop = True
        self._clock = time.perf_counter()

    def save_state(self, folder: Path) -> None:
        """Write all that the next step depends on; valid between steps (in ``on_step``)."""
        save_weights(self.policy, self._tokenizer, folder)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / "trainer_state.json"))
        if self.reference is not None:
            self.reference.save(folder)
        (folder / STATE).write_text(json.dumps({"beta": self._adaptive_beta}))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # It warns about the missing head of tied weights, which is no loss.
        logger = logging.getLogger("transformers.trainer")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        finally:
            logger.setLevel(level)

    def run(self, resume: Path | None = None) -> None:
        """Train to the end, or until ``on_step`` stops it.

        Args:
            resume: folder written by ``save_state``; training goes on after its step.
        """
        if resume is not None:
            self._adaptive_beta = json.loads((resume / STATE).read_text())["beta"]
            if self.reference is not None:
                self.reference.load(resume)
        with gradients(), completion_only_head():
            self._clock = time.perf_counter()
            self.train(resume_from_checkpoint=None if resume is None else str(resume))


def _unused_reward(**_: Any) -> list[float | None]:
    raise AssertionError("rewards come from RolloutTrainer._calculate_rewards")
