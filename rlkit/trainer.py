"""Reinforcement learning from verifiable rewards: ``train_rl(config)`` fills a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, set_seed

from rlkit import environment, filters, models, preflight, rewards, runs, tasks, templates
from rlkit.arguments import sampling
from rlkit.checks import ConfigError
from rlkit.config import RunConfig
from rlkit.grpo import RolloutTrainer
from rlkit.identity import described
from rlkit.recorder import Recorder
from rlkit.rollouts import Window, rollout_columns, step_metrics
from rlkit.session import Session, data_hash
from rlkit.start import open_run
from rlkit.tools import Executor, open_tools
from rlkit.watchdog import watch

Row = dict[str, Any]


def train_rl(
    config: RunConfig,
    *,
    fresh: bool = False,
    problems: Sequence[Row] | None = None,
    validation: Sequence[Row] | None = None,
    reward_fns: rewards.RewardFns | None = None,
    group_filter: filters.GroupFilter | None = None,
    executor: Executor | None = None,
) -> Path:
    """Train a policy with GRPO (or one of its variants) and record everything in a run folder.

    A finished run of the same configuration is returned at once. An unfinished one (killed, stopped
    or interrupted by Ctrl-C) goes on from its newest resume point, bit-identical to a run that was
    never interrupted on the same machine, versions and threads.

    Args:
        config: the run.
        fresh: start again instead; an existing folder is moved aside, never overwritten.
        problems: training problem rows; default ``config.task``'s train split.
        validation: rows for evaluation during training (``eval_every`` > 0); default the
            validation split of the task.
        reward_fns: rewards of your own as (unique name, callable, weight); default those of
            ``config.reward``. They pass the same self-check; a run is resumed or found finished
            only with the same ones (names, weights, settings and source text).
        group_filter: a group filter of your own (see ``rlkit.filters``); default that of
            ``config.reward``.
        executor: runs the code of rollouts if ``config.tools.tool`` asks for it; default a sandbox
            of its own.

    Returns:
        The run folder; ``runs.final_checkpoint(folder)`` holds the final weights.

    Raises:
        ConfigError, ModelError, PreflightError: nothing was trained, the text says what to change.
        RunError: the folder is in use or holds another run.
        TrainingError: the loss became NaN.
    """
    chosen = templates.get(config.task.template)
    rows = _training_problems(config) if problems is None else list(problems)
    _check_pool(config, rows)
    checked = _validation_problems(config, validation)
    # The rows themselves: a file or hub data set of the same name can hold others another day.
    given: list[Any] = [models.fingerprint(config.model), rows, checked]
    if reward_fns is not None or group_filter is not None:
        given.append(described([reward_fns, group_filter], "reward_fns"))
    paid = list(reward_fns) if reward_fns is not None else rewards.build(config.reward)
    chooser = group_filter or rewards.build_filter(config.reward)
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
        set_seed(config.seed)  # LoRA weights are drawn while the model is loaded
        source = config.model
        if recorder.resume is not None:  # a branch on the hub may have moved on since
            commit = runs.read_environment(recorder.path).get("model_commit")
            source = replace(source, model_revision=commit or source.model_revision)
        model, tokenizer = models.load_policy(source, chat_template=not chosen.plain)
        commit = models.hub_commit(model)
        if commit and recorder.resume is None:
            recorder.environment(model_commit=commit)
        session = RlSession(config, recorder, checked, paid, chooser)
        with open_tools(config.tools, tokenizer, executor) as tools:
            trainer = RolloutTrainer(
                config,
                model,
                tokenizer,
                rows,
                paid,
                session.on_step,
                recorder.path,
                chooser,
                tools,
            )
            try:
                session.begin(trainer, tokenizer, rows)
                trainer.run(recorder.resume)
            finally:
                session.display.close()
        session.finish(model, tokenizer)
    return recorder.path


class RlSession(Session):
    """The steps of an RL run: rollouts, watchdog, evaluation during training."""

    def __init__(
        self,
        config: RunConfig,
        recorder: Recorder,
        validation: Sequence[Row],
        reward_fns: rewards.RewardFns,
        group_filter: filters.GroupFilter | None,
    ) -> None:
        super().__init__(config, recorder, config.train.steps)
        self._reward_fns, self._group_filter = reward_fns, group_filter
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
        if self.recorder.resume is not None:
            self._history = runs.read_metrics_rows(self.recorder.path)
            self._completions = self._history[-1]["completions"]
            self._tokens = self._history[-1]["tokens"]
            self.display.note(f"{config.name}  resumed after step {self.step}")
            return
        findings = preflight.check(
            config,
            tokenizer,
            trainer.engine.end_ids,
            rows,
            self._reward_fns,
            lambda probe: trainer.sample(probe, "probe", 0),
            has_reference=trainer.ref_model is not None or config.model.lora_rank > 0,
            group_filter=self._group_filter,
        )
        for finding in findings:
            self.warn(finding.check, finding.message)
        if config.eval.eval_every:
            self._evaluate(0)

    def on_step(self, window: Window, numbers: Mapping[str, float]) -> bool:
        """Record a finished step; True stops the run."""
        counts = [len(c.token_ids) for group in window.completions for c in group]
        self._completions += len(counts)
        self._tokens += sum(counts)
        rollout_seconds = window.seconds_generate + window.seconds_reward
        called = self.trainer.code_tools is not None
        row = {
            **step_metrics(window, tools=called),
            **numbers,
            "seconds_train": numbers["seconds_step"] - rollout_seconds - numbers["seconds_score"],
            "completions": self._completions,
            "tokens": self._tokens,
        }
        self._history.append(row)
        self.recorder.rollouts(window.step, rollout_columns(window, tools=called))
        self.record(row)
        for warning in watch(self._history):
            self.warn(warning.code, warning.message)
        every, save = self.config.eval.eval_every, self.config.train.save_every
        last = window.step == self.config.train.steps
        if every and (window.step % every == 0 or last):
            self._evaluate(window.step)
        if save and window.step % save == 0 and not last:
            self.save(self.model, self.tokenizer)
        stop = self.obey()
        resume = self.config.train.resume_every
        if resume and not last and (stop or window.step % resume == 0):
            with self.recorder.resume_point(window.step) as folder:
                self.trainer.save_state(folder)
        return stop

    def _evaluate(self, step: int) -> None:
        from rlkit import evaluate  # needs pandas and more; only loaded when used

        rows = self._validation
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
            tools=self.trainer.code_tools,
        )
        evaluate.save(result, self.recorder.path, f"validation-{step:06d}")


def _training_problems(config: RunConfig) -> list[Row]:
    return list(
        tasks.load_problems(
            config.task.task,
            "train",
            config.task.train_problems,
            revision=config.task.task_revision,
        )
    )


def _validation_problems(config: RunConfig, given: Sequence[Row] | None) -> list[Row]:
    """The rows that evaluations during training use; none if there are no evaluations."""
    count = config.eval.eval_problems
    if not config.eval.eval_every:
        return []
    if given is not None:
        return list(given)[:count]
    return list(
        tasks.load_problems(
            config.task.task, "validation", count, revision=config.task.task_revision
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
