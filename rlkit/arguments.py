"""A RunConfig in the terms of the engine and of TRL."""

from __future__ import annotations

from pathlib import Path

import torch
from trl.trainer.grpo_config import GRPOConfig

from rlkit.config import RunConfig
from rlkit.engine import Sampling


def sampling(config: RunConfig) -> Sampling:
    """How the rollouts of a run are drawn."""
    return Sampling(
        temperature=config.sampling.temperature,
        top_p=config.sampling.top_p,
        max_new_tokens=config.sampling.max_completion_length,
    )


def trainer_arguments(config: RunConfig, output_dir: Path) -> GRPOConfig:
    """The arguments of TRL's trainer that stand for ``config``; what rlkit does itself is off."""
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
        use_vllm=config.sampling.engine == "vllm",
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=config.sampling.vllm_memory,
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
        use_bias_correction_kl=train.kl_estimator == "k3_corrected",
        epsilon=train.epsilon,
        epsilon_high=train.epsilon_high,
        entropy_coef=train.entropy_coef,
        disable_dropout=True,
        bf16=config.model.dtype == "bfloat16" and torch.cuda.is_available(),
        use_cpu=torch.backends.mps.is_available(),  # Apple's GPUs have no float64, which draws need
        gradient_checkpointing=config.model.gradient_checkpointing,
        logging_steps=train.updates_per_batch,
        logging_nan_inf_filter=False,  # a NaN loss must be seen
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
