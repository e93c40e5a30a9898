"""Supervised fine-tuning on prompt/completion documents: ``train_sft(config)`` fills a run folder.

The loss covers the completion and its end token, never the prompt, and not what a tool wrote in it
(``outputs``) unless ``mask_output`` is off, as in the study.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback, set_seed
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from rlkit import environment, models, templates
from rlkit.checks import ConfigError
from rlkit.compat import completion_only_head
from rlkit.config import RunConfig
from rlkit.documents import IGNORED as IGNORED
from rlkit.documents import Document as Document
from rlkit.documents import check_documents as check_documents
from rlkit.documents import encode_documents as encode_documents
from rlkit.documents import read_documents as read_documents
from rlkit.models import Policy
from rlkit.session import Session, data_hash, gradients
from rlkit.start import open_run


def train_sft(
    config: RunConfig,
    *,
    documents: Sequence[Document] | None = None,
    fresh: bool = False,
) -> Path:
    """Fine-tune a policy on documents and record everything in a run folder.

    ``batch_size`` counts documents per update, ``epochs`` passes over them; ``steps`` is not used
    (it follows from both). The other fields of ``TrainConfig`` that shape an update apply.

    Args:
        config: the run.
        documents: rows with ``prompt`` (messages), ``completion`` (text without end token) and, if
            a tool wrote parts of it, ``outputs`` (see ``documents.output_ranges``); default the
            JSONL file ``config.task.documents``.
        fresh: start again even if the run is finished. An existing folder is moved aside, never
            overwritten; an unfinished run (fine-tuning here takes minutes) always starts again.

    Returns:
        The run folder; ``runs.final_checkpoint(folder)`` holds the final weights.

    Raises:
        ConfigError, ModelError: nothing was trained, the text says what to change.
        RunError: the folder is in use or holds another run.
        TrainingError: the loss became NaN.
    """
    chosen = templates.get(config.task.template)
    rows = read_documents(config.task.documents) if documents is None else list(documents)
    check_documents(rows)
    steps = plan_steps(len(rows), config)
    recorder = open_run(
        config,
        environment.describe(seed=config.seed),
        kind="sft",
        max_steps=steps,
        data=data_hash([models.fingerprint(config.model), rows]),
        fresh=fresh,
    )
    if isinstance(recorder, Path):
        return recorder
    with recorder:
        set_seed(config.seed)
        model, tokenizer = models.load_policy(config.model, chat_template=not chosen.plain)
        mask = config.tools.mask_output
        examples = encode_documents(rows, tokenizer, config.task.template, mask_output=mask)
        _check_lengths(examples, model.config.max_position_embeddings)
        session = Session(config, recorder, steps)

        def on_step(row: dict[str, Any]) -> bool:
            session.record(row)
            save = config.train.save_every
            if save and session.step % save == 0 and session.step < steps:
                session.save(model, tokenizer)
            return session.obey()

        trainer = DocumentTrainer(config, model, tokenizer, examples, on_step, recorder.path)
        try:
            with gradients(), completion_only_head():
                trainer.train()
        finally:
            session.display.close()
        session.finish(model, tokenizer)
    return recorder.path


def plan_steps(count: int, config: RunConfig) -> int:
    """Updates needed for ``count`` documents, ``epochs`` times."""
    return math.ceil(count * config.train.epochs / config.train.batch_size)


def plan(lengths: Sequence[int], config: RunConfig) -> list[list[list[int]]]:
    """Document numbers as [step][part][document]: a function of lengths, seed and sizes alone.

    Each epoch has its own order; documents are spread evenly over the steps, so that all steps have
    the same number of parts and none is a small leftover. Inside a step they are sorted by length,
    which changes no sum, so that parts carry little padding.
    """
    orders = [
        np.random.default_rng([config.seed, epoch]).permutation(len(lengths))
        for epoch in range(config.train.epochs)
    ]
    batches = np.array_split(np.concatenate(orders), plan_steps(len(lengths), config))
    parts = config.train.batch_size // config.train.micro_batch_size
    parts = min([parts, *map(len, batches)])  # no part may be empty
    steps = []
    for batch in batches:
        ordered = sorted((int(i) for i in batch), key=lengths.__getitem__)
        steps.append([part.tolist() for part in np.array_split(ordered, parts)])
    return steps


class DocumentTrainer(SFTTrainer):
    """SFTTrainer on encoded documents in our own order, reporting one row per update."""

    def __init__(
        self,
        config: RunConfig,
        model: Policy,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[dict[str, list[int]]],
        on_step: Callable[[dict[str, Any]], bool],
        output_dir: Path,
    ) -> None:
        self._examples = examples
        self._plan = plan([len(e["input_ids"]) for e in examples], config)
        self._on_step = on_step
        self._documents = 0
        self._tokens = 0
        super().__init__(
            model=model,
            args=_arguments(config, len(self._plan), len(self._plan[0]), output_dir),
            # TRL insists on a data set; get_train_dataloader does not use it.
            train_dataset=Dataset.from_list([{"input_ids": [0], "labels": [0]}]),
            processing_class=tokenizer,
        )
        self.remove_callback(PrinterCallback)
        self._clock = time.perf_counter()

    def _send_telemetry(self) -> None:
        """Nothing about a run leaves the machine."""

    def get_train_dataloader(self) -> DataLoader:
        """The parts of every step in order."""
        parts = [part for step in self._plan for part in step]
        examples: Any = self._examples
        return DataLoader(examples, batch_sampler=parts, collate_fn=self.data_collator)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand the finished update to ``on_step`` (called by Trainer once per update)."""
        averages = {name: sum(v) / len(v) for name, v in self._metrics["train"].items() if v}
        self._metrics["train"].clear()
        if "loss" not in logs:
            return
        seconds = time.perf_counter() - self._clock
        done = [self._examples[i] for part in self._plan[self.state.global_step - 1] for i in part]
        self._documents += len(done)
        self._tokens += sum(label != IGNORED for e in done for label in e["labels"])
        row = {
            "step": self.state.global_step,
            "loss": float(logs["loss"]),
            "grad_norm": float(logs["grad_norm"]),
            "learning_rate": float(logs["learning_rate"]),
            "token_accuracy": averages.get("mean_token_accuracy"),
            "entropy": averages.get("entropy"),
            "completions": self._documents,
            "tokens": self._tokens,
            "seconds_train": seconds,
            "seconds_step": seconds,
        }
        if self._on_step(row):
            self.control.should_training_stop = True
        self._clock = time.perf_counter()


def _arguments(config: RunConfig, steps: int, parts: int, output_dir: Path) -> SFTConfig:
    train = config.train
    constant = train.lr_schedule == "constant" and train.warmup_steps > 0
    return SFTConfig(
        output_dir=str(output_dir),
        seed=config.seed,
        max_steps=steps,
        per_device_train_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=parts,
        learning_rate=train.learning_rate,
        lr_scheduler_type="constant_with_warmup" if constant else train.lr_schedule,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        bf16=config.model.dtype == "bfloat16" and torch.cuda.is_available(),
        use_cpu=torch.backends.mps.is_available(),  # Apple's GPUs have no float64, which draws need
        gradient_checkpointing=config.model.gradient_checkpointing,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def _check_lengths(examples: Sequence[dict[str, list[int]]], limit: int) -> None:
    for number, example in enumerate(examples):
        length = len(example["input_ids"])
        if length > limit:
            raise ConfigError(
                f"document {number} has {length} tokens, the model has {limit} positions. Shorten "
                "it or leave it out."
            )
