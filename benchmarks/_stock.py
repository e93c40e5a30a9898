"""The two sides of a comparison: ``rlkit.grpo.RolloutTrainer`` and TRL's own ``GRPOTrainer``.

Both start from the same weights and see the same problems in the same order with the same rewards;
both are timed by the same clock, which wraps the methods that the two have in common. The stock
side is TRL as it is: nothing of it is replaced, except that a run with scripted lengths forces the
end token on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from _clock import Clock, Step, Timed
from _script import Lengths, scripted
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from rlkit import engine, grpo, rewards, templates
from rlkit.batching import window_indices
from rlkit.completion import Completion
from rlkit.config import RunConfig
from rlkit.models import Policy

Row = dict[str, Any]
Side = Literal["ours", "stock"]
Model = tuple[Policy, PreTrainedTokenizerBase]
AfterStep = Callable[[int, PreTrainedModel, PreTrainedTokenizerBase], bool]
"""(number of the finished step, model, tokenizer) -> whether to stop; its time is not counted."""
SIDES: tuple[Side, Side] = ("ours", "stock")


@dataclass(frozen=True)
class Setup:
    """What both sides share.

    Attributes:
        config: the run; one update per step, loss ``dapo``, advantage ``group_std`` or
            ``group_mean``, no KL.
        problems: the training pool.
        make: loads the model and its tokenizer, with the same weights at every call.
        reward_fns: (name, callable, weight) as from ``rewards.build``.
        lengths: the script of the rollouts' lengths, None where the model ends them itself.
    """

    config: RunConfig
    problems: Sequence[Row]
    make: Callable[[], Model]
    reward_fns: Sequence[tuple[str, rewards.RewardFn, float]]
    lengths: Lengths | None = None


@dataclass(frozen=True)
class Stock:
    """Settings of the stock side that do not change what is computed, only how fast."""

    micro_batch: int
    """Completions per forward and backward pass."""
    bf16: bool
    """bfloat16 autocast over float32 weights."""

    def __str__(self) -> str:
        return f"{self.micro_batch} per pass, {'bfloat16' if self.bf16 else 'float32'}"


def trainer(
    side: Side, setup: Setup, stock: Stock, folder: Path
) -> tuple[GRPOTrainer, PreTrainedTokenizerBase]:
    """A trainer of one side on freshly loaded weights."""
    set_seed(setup.config.seed)
    model, tokenizer = setup.make()
    if side == "ours":
        ours = grpo.RolloutTrainer(
            setup.config, model, tokenizer, setup.problems, setup.reward_fns,
            lambda window, numbers: False, folder,
        )  # fmt: skip
        return ours, tokenizer
    made = GRPOTrainer(
        model=model,
        reward_funcs=[_stock_reward(setup, model, tokenizer)],
        args=_stock_arguments(setup.config, stock, folder),
        train_dataset=_stock_dataset(setup),
        processing_class=tokenizer,
    )
    made.remove_callback(PrinterCallback)
    return made, tokenizer


def run(
    side: Side,
    setup: Setup,
    stock: Stock,
    folder: Path,
    after_step: AfterStep | None = None,
    **clocked: Any,
) -> list[Step]:
    """Train one side for ``setup.config.train.steps`` steps, fewer if ``after_step`` says so.

    ``clocked`` are options of ``Clock``.

    Raises:
        RuntimeError: a rollout did not end where ``setup.lengths`` wants it.
    """
    made, tokenizer = trainer(side, setup, stock, folder)
    model = made.accelerator.unwrap_model(made.model)
    clock = Clock(
        lambda step: after_step is not None and after_step(step, model, tokenizer), **clocked
    )
    seed = setup.config.seed
    # Our side draws and scores in one call, before TRL asks for either.
    ours: Sequence[Timed] = (
        (grpo, "roll_out", "reward", None),
        (made, "sample", "generation", None),
    )
    with clock.watch(made, ours if side == "ours" else ()), scripted(model, setup.lengths, seed):
        start(made)
    if setup.lengths is not None:
        for number, step in enumerate(clock.steps, start=1):
            if step.completions != setup.lengths(seed, number).tolist():
                raise RuntimeError(f"{side}, step {number}: the lengths are not the scripted ones")
    return clock.steps


def start(made: GRPOTrainer) -> None:
    """Run the training loop."""
    if isinstance(made, grpo.RolloutTrainer):
        made.run()
    else:
        made.train()


def _stock_dataset(setup: Setup) -> Dataset:
    config = setup.config
    prompts = config.train.batch_size // config.train.rollouts
    order = [
        index
        for step in range(1, config.train.steps + 1)
        for index in window_indices(config.seed, step, len(setup.problems), prompts)
    ]
    template = templates.get(config.task.template)
    if template.plain:
        raise ValueError(f"template={template.name!r}: the stock side needs a chat template")
    questions = [setup.problems[index]["prompt"][-1]["content"] for index in order]
    return Dataset.from_list(
        [
            {"prompt": template.messages(question), "index": index}
            for question, index in zip(questions, order, strict=True)
        ]
    )


def _stock_reward(
    setup: Setup, model: Policy, tokenizer: PreTrainedTokenizerBase
) -> Callable[..., list[float | None]]:
    ends = engine.end_token_ids(model, tokenizer)
    prefill = templates.prefill_text(setup.config.task.template, tokenizer)

    def reward(
        completion_ids: list[list[int]], index: list[int], trainer_state: Any, **_: Any
    ) -> list[float | None]:
        completions = [
            Completion.from_ids(
                ids,
                tokenizer,
                stop="eos" if ids[-1] in ends else "length",
                prefill=prefill,
                end_ids=ends,
            )
            for ids in completion_ids
        ]
        rows = [setup.problems[i] for i in index]
        step = trainer_state.global_step + 1
        values, _parts = rewards.score(
            setup.reward_fns, completions, rows, seed=setup.config.seed, step=step
        )
        return values

    return reward


def _stock_arguments(config: RunConfig, stock: Stock, folder: Path) -> GRPOConfig:
    train = config.train
    scales = {"group_std": "group", "group_mean": "none"}
    if train.advantage not in scales or train.updates_per_batch != 1 or train.beta:
        raise ValueError(
            f"advantage={train.advantage!r}, updates_per_batch={train.updates_per_batch}, beta="
            f"{train.beta}: the comparison knows {sorted(scales)}, one update per step and no KL"
        )
    return GRPOConfig(
        output_dir=str(folder),
        seed=config.seed,
        max_steps=train.steps,
        per_device_train_batch_size=stock.micro_batch,
        gradient_accumulation_steps=train.batch_size // stock.micro_batch,
        num_generations=train.rollouts,
        max_completion_length=config.sampling.max_completion_length,
        temperature=config.sampling.temperature,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_schedule,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        loss_type=train.loss_type,
        scale_rewards=scales[train.advantage],
        beta=0.0,
        epsilon=train.epsilon,
        epsilon_high=train.epsilon_high,
        disable_dropout=True,
        bf16=stock.bf16,
        use_cpu=not torch.cuda.is_available(),  # TRL refuses bf16 on a CPU it did not ask for
        gradient_checkpointing=False,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
