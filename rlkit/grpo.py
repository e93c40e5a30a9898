"""The one place that touches TRL internals: a GRPOTrainer that samples with our engine.

What it changes, and why (TRL 1.16):

- ``get_train_dataloader`` yields step numbers. The prompts of a step are a function of (seed, step)
  and of nothing else, so evaluation, resuming or a second ``train()`` cannot shift them.
- ``_generate`` samples with ``rlkit.engine`` and keeps the Completion objects; TRL's own decoding
  drops special tokens, which would delete ``<think>``.
- ``_calculate_rewards`` uses rlkit rewards and advantages.
- ``_prepare_inputs`` sorts by length inside an update, splits, and trims the padding of each part.
- ``log`` reports one row per step instead of TRL's averages.
- The LM head scores completion positions only, on CPU too (``rlkit.compat``).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from rlkit import advantages, rewards, templates
from rlkit.batching import Tensors, loss_mask, micro_batches, score_windows, window_indices
from rlkit.checks import ConfigError
from rlkit.compat import completion_only_head
from rlkit.completion import Completion
from rlkit.config import RunConfig
from rlkit.engine import Engine, Sampling, stable_key
from rlkit.models import Policy

Row = dict[str, Any]


@dataclass
class Window:
    """The rollouts of one step; arrays are [P, G] (prompts, completions per prompt)."""

    step: int
    problems: Sequence[Row]
    completions: list[list[Completion]] = field(default_factory=list)
    parts: dict[str, np.ndarray] = field(default_factory=dict)
    rewards: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    advantages: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    correct: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=bool))
    seconds_generate: float = 0.0
    seconds_reward: float = 0.0


class RolloutTrainer(GRPOTrainer):
    """GRPO on rollouts of ``rlkit.engine``.

    Args:
        problems: training problem rows.
        reward_fns: (name, callable, weight) as from ``rewards.build``.
        on_step: called after each step with its rollouts and its numbers (``loss``, ``grad_norm``,
            ``learning_rate``, ``entropy``, ``kl``, ``clip_ratio``, ``seconds_step``); returning
            True stops the run.
        output_dir: TRL wants one; nothing is written there.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Policy,
        tokenizer: PreTrainedTokenizerBase,
        problems: Sequence[Row],
        reward_fns: Sequence[tuple[str, rewards.RewardFn, float]],
        on_step: Callable[[Window, dict[str, float]], bool],
        output_dir: Path,
    ) -> None:
        self.run_config = config
        self.policy = model
        self.problems = problems
        self.prompts_per_step = config.train.batch_size // config.train.rollouts
        self.window = Window(0, [])
        self._passes = config.train.batch_size // config.train.micro_batch_size
        self._parts: list[Tensors] = []
        self._reward_fns = list(reward_fns)
        self._on_step = on_step
        self._clock = time.perf_counter()
        # The weights that training starts from, whatever the model's name says: TRL would reload
        # the reference by name, which is another model after SFT in the same process.
        reference = None
        if config.train.beta > 0 and not isinstance(model, PeftModel):
            reference = copy.deepcopy(model).eval().requires_grad_(False)
        super().__init__(
            model=model,
            reward_funcs=[_unused_reward],
            args=_arguments(config, output_dir),
            # TRL insists on a data set; get_train_dataloader does not use it.
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": ""}]}]),
            processing_class=tokenizer,
        )
        self.remove_callback(PrinterCallback)
        self.engine = Engine(self.accelerator.unwrap_model(self.model), tokenizer)
        self.prefill = templates.prefill_text(config.task.template, tokenizer)
        if self.accelerator.num_processes > 1:
            raise ConfigError(
                f"{self.accelerator.num_processes} processes: training runs in one process so far. "
                "Start it without accelerate launch or torchrun."
            )
        self.beta = config.train.beta
        if reference is not None:
            add_fused_lm_head(reference, temperature=config.sampling.temperature)
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    def _send_telemetry(self) -> None:
        """Nothing about a run leaves the machine."""

    def get_train_dataloader(self) -> DataLoader:
        """One item per forward/backward pass; the rollouts are made in ``_prepare_inputs``."""
        items: Any = [{"micro_step": i} for i in range(self._passes * self.run_config.train.steps)]
        return DataLoader(items, batch_size=None)

    def _prepare_inputs(self, generation_batch: Mapping[str, Any]) -> Tensors:
        number, index = divmod(int(generation_batch["micro_step"]), self._passes)
        if index == 0:
            self._parts = self._collect(number + 1)
        return self._parts[index]

    def _collect(self, step: int) -> list[Tensors]:
        config = self.run_config
        chosen = window_indices(config.seed, step, len(self.problems), self.prompts_per_step)
        self.window = Window(step, [self.problems[i] for i in chosen])
        repeated = [row for row in self.window.problems for _ in range(config.train.rollouts)]
        batch = self._generate_and_score_completions(repeated)
        batch["advantages"] = torch.tensor(
            self.window.advantages.reshape(-1), dtype=torch.float32, device=self.accelerator.device
        )
        return micro_batches(batch, config.train.updates_per_batch, config.train.micro_batch_size)

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        config, window = self.run_config, self.window
        begun = time.perf_counter()
        ids = templates.encode(window.problems, self._tokenizer, config.task.template)
        keys = [
            stable_key(config.seed, "train", window.step, row["problem_id"])
            for row in window.problems
        ]
        window.completions = self.engine.generate(
            ids, sampling(config), n=config.train.rollouts, keys=keys, prefill=self.prefill
        )
        window.seconds_generate = time.perf_counter() - begun
        completions = [c for group in window.completions for c in group]
        masks = [loss_mask(c, config.train.mask_truncated) for c in completions]
        prompt_ids = [p for p in ids for _ in range(config.train.rollouts)]
        completion_ids = [list(c.token_ids) for c in completions]
        mask = None if all(map(all, masks)) else masks
        return prompt_ids, completion_ids, mask, completions, None, {}, None, []

    def _calculate_rewards(
        self, inputs: list[Row], prompts: Any, completions: list[Completion], ids: Any
    ) -> torch.Tensor:
        window, config = self.window, self.run_config
        begun = time.perf_counter()
        total, parts = rewards.score(
            self._reward_fns, completions, inputs, seed=config.seed, step=window.step
        )
        shape = (len(window.problems), config.train.rollouts)
        window.rewards = _matrix(total, shape)
        window.parts = {name: _matrix(values, shape) for name, values in parts.items()}
        window.correct = np.array(
            [rewards.is_correct(c, row) for c, row in zip(completions, inputs, strict=True)]
        ).reshape(shape)
        window.advantages = advantages.compute(window.rewards, config.train.advantage)
        window.seconds_reward = time.perf_counter() - begun
        flat = torch.tensor(window.rewards.reshape(-1, 1), dtype=torch.float32)
        return flat.to(self.accelerator.device)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Also cut padding where all rollouts are scored at once (old and reference policy)."""
        score = super()._get_per_token_logps_and_entropies
        if batch_size is None:  # a part of an update, cut already
            return score(model, input_ids, attention_mask, logits_to_keep, **options)
        logps = input_ids.new_zeros((len(input_ids), logits_to_keep), dtype=torch.float32)
        for rows, window in score_windows(attention_mask, logits_to_keep, batch_size):
            width = window.stop - (input_ids.shape[1] - logits_to_keep)
            part, _, _ = score(model, input_ids[rows, window], attention_mask[rows, window], width)
            logps[rows, :width] = part.float()
        return logps, None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand the finished step to ``on_step`` (called by Trainer once per step)."""
        averages = {name: _mean(values) for name, values in self._metrics["train"].items()}
        self._metrics["train"].clear()
        if "loss" not in logs:
            return  # the summary at the end of train()
        numbers = {
            "loss": float(logs["loss"]),
            "grad_norm": float(logs["grad_norm"]),
            "learning_rate": float(logs["learning_rate"]),
            "entropy": averages.get("entropy", math.nan),
            "kl": averages.get("kl", 0.0),
            "beta": float(self.beta),
            "clip_ratio": averages.get("clip_ratio/region_mean", 0.0),
            "seconds_step": time.perf_counter() - self._clock,
        }
        if self._on_step(self.window, numbers):
            self.control.should_training_stop = True
        self._clock = time.perf_counter()

    def run(self) -> None:
        """Train to the end, or until ``on_step`` stops it."""
        with completion_only_head():
            self._clock = time.perf_counter()
            self.train()


def sampling(config: RunConfig) -> Sampling:
    """How the rollouts of a run are drawn."""
    return Sampling(
        temperature=config.sampling.temperature,
        top_p=config.sampling.top_p,
        max_new_tokens=config.sampling.max_completion_length,
    )


def _arguments(config: RunConfig, output_dir: Path) -> GRPOConfig:
    train = config.train
    accumulation = train.batch_size // train.updates_per_batch // train.micro_batch_size
    schedule: str = train.lr_schedule
    if schedule == "constant" and train.warmup_steps:
        schedule = "constant_with_warmup"  # plain "constant" ignores the warm-up
    return GRPOConfig(
        output_dir=str(output_dir),
        seed=config.seed,
        max_steps=train.steps * train.updates_per_batch,
        per_device_train_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation * train.updates_per_batch,
        num_iterations=1,
        num_generations=train.rollouts,
        max_completion_length=config.sampling.max_completion_length,
        temperature=config.sampling.temperature,
        learning_rate=train.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        loss_type=train.loss_type,
        scale_rewards="none",
        beta=0.0,  # the reference is made here, not by TRL
        use_bias_correction_kl=False,
        epsilon=train.epsilon,
        epsilon_high=train.epsilon_high,
        entropy_coef=train.entropy_coef,
        disable_dropout=True,
        bf16=config.model.dtype == "bfloat16" and torch.cuda.is_available(),
        gradient_checkpointing=config.model.gradient_checkpointing,
        logging_steps=train.updates_per_batch,
        logging_nan_inf_filter=False,  # a NaN loss must be seen
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def _unused_reward(**_: Any) -> list[float | None]:
    raise AssertionError("rewards come from RolloutTrainer._calculate_rewards")


def _matrix(values: Sequence[float | None], shape: tuple[int, int]) -> np.ndarray:
    return np.array([math.nan if v is None else v for v in values], dtype=np.float64).reshape(shape)


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan
