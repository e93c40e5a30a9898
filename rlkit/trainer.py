"""Reinforcement learning from verifiable rewards: ``train_rl(config)`` fills a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase, set_seed

from rlkit import advantages, environment, models, preflight, rewards, tasks, templates
from rlkit.checks import ConfigError
from rlkit.completion import Completion
from rlkit.config import RunConfig
from rlkit.engine import stable_key
from rlkit.grpo import RolloutTrainer, Window, sampling
from rlkit.recorder import Recorder, open_run
from rlkit.session import Session, data_hash
from rlkit.watchdog import watch

Row = dict[str, Any]


def train_rl(
    config: RunConfig,
    *,
    fresh: bool | Literal["unfinished"] = False,
    problems: Sequence[Row] | None = None,
    validation: Sequence[Row] | None = None,
) -> Path:
    """Train a policy with GRPO (or one of its variants) and record everything in a run folder.

    A finished run of the same configuration is returned at once. After an error or Ctrl-C the
    folder stays readable and says so in its status.

    Args:
        config: the run.
        fresh: see ``recorder.open_run``; an existing folder is never overwritten.
        problems: training problem rows; default ``config.task``'s train split.
        validation: rows for evaluation during training (``eval_every`` > 0); default the
            validation split of the task.

    Returns:
        The run folder; ``runs.final_checkpoint(folder)`` holds the final weights.

    Raises:
        ConfigError, ModelError, PreflightError: nothing was trained, the text says what to change.
        RunError: the folder is in use or holds another run.
        TrainingError: the loss became NaN.
    """
    chosen = templates.get(config.task.template)
    given = [models.fingerprint(config.model), problems, validation]
    recorder = open_run(
        config,
        environment.describe(seed=config.seed),
        max_steps=config.train.steps,
        data=data_hash(given),
        fresh=fresh,
    )
    if isinstance(recorder, Path):
        return recorder
    with recorder:
        rows = _training_problems(config) if problems is None else list(problems)
        _check_pool(config, rows)
        set_seed(config.seed)  # LoRA weights are drawn while the model is loaded
        model, tokenizer = models.load_policy(config.model, chat_template=not chosen.plain)
        commit = models.hub_commit(model)
        if commit:
            recorder.environment(environment.describe(seed=config.seed, model_commit=commit))
        session = RlSession(config, recorder, validation)
        trainer = RolloutTrainer(
            config,
            model,
            tokenizer,
            rows,
            rewards.build(config.reward),
            session.on_step,
            recorder.path,
        )
        try:
            session.begin(trainer, tokenizer, rows)
            trainer.run()
        finally:
            session.display.close()
        session.finish(model, tokenizer)
    return recorder.path


class RlSession(Session):
    """The steps of an RL run: rollouts, watchdog, evaluation during training."""

    def __init__(
        self, config: RunConfig, recorder: Recorder, validation: Sequence[Row] | None
    ) -> None:
        super().__init__(config, recorder, config.train.steps)
        self._validation = validation
        self._history: list[dict[str, Any]] = []
        self._completions = 0
        self._tokens = 0

    def begin(
        self, trainer: RolloutTrainer, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]
    ) -> None:
        """Check before step 1, and evaluate the starting point if asked to evaluate at all."""
        self.trainer, self.model, self.tokenizer = trainer, trainer.policy, tokenizer
        config = self.config
        findings = preflight.check(
            config,
            tokenizer,
            trainer.engine.end_ids,
            rows,
            rewards.build(config.reward),
            self._probe,
            has_reference=trainer.ref_model is not None or config.model.lora_rank > 0,
        )
        for finding in findings:
            self.warn(finding.check, finding.message)
        if config.eval.eval_every:
            if self._validation is None:
                self._validation = tasks.load_problems(
                    config.task.task,
                    "validation",
                    config.eval.eval_problems,
                    revision=config.task.task_revision,
                )
            self._evaluate(0)

    def on_step(self, window: Window, numbers: Mapping[str, float]) -> bool:
        """Record a finished step; True stops the run."""
        counts = [len(c.token_ids) for group in window.completions for c in group]
        self._completions += len(counts)
        self._tokens += sum(counts)
        rollout_seconds = window.seconds_generate + window.seconds_reward
        row = {
            **step_metrics(window),
            **numbers,
            "seconds_train": numbers["seconds_step"] - rollout_seconds,
            "completions": self._completions,
            "tokens": self._tokens,
        }
        self._history.append(row)
        self.recorder.rollouts(window.step, rollout_columns(window))
        self.record(row)
        for warning in watch(self._history):
            self.warn(warning.code, warning.message)
        every, save = self.config.eval.eval_every, self.config.train.save_every
        last = window.step == self.config.train.steps
        if every and (window.step % every == 0 or last):
            self._evaluate(window.step)
        if save and window.step % save == 0 and not last:
            self.save(self.model, self.tokenizer)
        return self.obey()

    def _probe(self, rows: Sequence[Row]) -> list[list[Completion]]:
        return self.trainer.engine.generate(
            templates.encode(rows, self.tokenizer, self.config.task.template),
            sampling(self.config),
            n=self.config.train.rollouts,
            keys=[stable_key(self.config.seed, "probe", 0, row["problem_id"]) for row in rows],
            prefill=self.trainer.prefill,
        )

    def _evaluate(self, step: int) -> None:
        from rlkit import evaluate  # needs pandas and more; only loaded when used

        rows = list(self._validation or ())[: self.config.eval.eval_problems]
        result = evaluate.evaluate(
            self.trainer.engine,
            rows,
            prompts=templates.encode(rows, self.tokenizer, self.config.task.template),
            sampling=sampling(self.config),
            n=self.config.eval.eval_samples,
            run_seed=self.config.seed,
            purpose="validation",
            step=step,
            greedy=True,
            prefill=self.trainer.prefill,
        )
        evaluate.save(result, self.recorder.path, f"validation-{step:06d}")


def step_metrics(window: Window) -> dict[str, Any]:
    """The figures of one step that follow from its rollouts alone; absent means are None.

    Accuracy is answer equivalence with the end reached, never the gated reward. Lengths are in
    tokens, over all, right and wrong completions.
    """
    flat = [c for group in window.completions for c in group]
    correct = window.correct.reshape(-1)
    lengths = np.array([len(c.token_ids) for c in flat], dtype=np.float64)
    known = ~np.isnan(window.rewards)
    row: dict[str, Any] = {
        "step": window.step,
        "reward": _mean(window.rewards[known]),
        "reward_std": float(window.rewards[known].std()) if known.any() else None,
    }
    for name, part in window.parts.items():
        row[f"rewards/{name}/mean"] = _mean(part[~np.isnan(part)])
    groups_right = window.correct.all(axis=1)
    groups_wrong = ~window.correct.any(axis=1)
    row |= {
        "accuracy": _mean(correct.astype(np.float64)),
        "completion_ratio": sum(c.reached_end for c in flat) / len(flat),
        "length_mean": _mean(lengths),
        "length_right": _mean(lengths[correct]),
        "length_wrong": _mean(lengths[~correct]),
        "reasoning_rate": sum(bool(c.reasoning) for c in flat) / len(flat),
        "groups_all_right": int(groups_right.sum()),
        "groups_all_wrong": int(groups_wrong.sum()),
        "groups_mixed": int((~groups_right & ~groups_wrong).sum()),
        "groups_no_signal": int(advantages.flat_groups(window.rewards).sum()),
        "seconds_generate": window.seconds_generate,
        "seconds_reward": window.seconds_reward,
    }
    return row


def rollout_columns(window: Window) -> dict[str, list[Any]]:
    """The rollouts of one step as columns, one row per completion, groups in order."""
    prompts, rollouts = window.rewards.shape
    flat = [c for group in window.completions for c in group]
    rows = [row for row in window.problems for _ in range(rollouts)]
    return {
        "step": [window.step] * len(flat),
        "group": [g for g in range(prompts) for _ in range(rollouts)],
        "sample": [s for _ in range(prompts) for s in range(rollouts)],
        "problem_id": [row["problem_id"] for row in rows],
        "text": [c.text for c in flat],
        "reasoning": [bool(c.reasoning) for c in flat],
        "answer": [c.answer or "" for c in flat],
        "gold": [str(row["answer"]) for row in rows],
        "correct": window.correct.reshape(-1).tolist(),
        "stop": [c.stop for c in flat],
        "n_tokens": [len(c.token_ids) for c in flat],
        "reward": window.rewards.reshape(-1).tolist(),
        **{f"reward_{k}": part.reshape(-1).tolist() for k, part in window.parts.items()},
        "advantage": window.advantages.reshape(-1).tolist(),
    }


def _training_problems(config: RunConfig) -> list[Row]:
    return list(
        tasks.load_problems(
            config.task.task,
            "train",
            config.task.train_problems,
            revision=config.task.task_revision,
        )
    )


def _check_pool(config: RunConfig, rows: Sequence[Row]) -> None:
    prompts = config.train.batch_size // config.train.rollouts
    if not rows:
        raise ConfigError("the training problems are empty. Check task and its train split.")
    if len(rows) < prompts:
        raise ConfigError(
            f"{len(rows)} training problems, but each step needs batch_size / rollouts = {prompts} "
            "different ones. Raise train_problems, or lower batch_size."
        )
    ids = {row["problem_id"] for row in rows}
    if len(ids) < len(rows):
        raise ConfigError(
            f"{len(rows) - len(ids)} training problems repeat a problem_id; equal ids would draw "
            "equal samples. Remove the duplicates."
        )


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None
