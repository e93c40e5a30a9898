"""Configuration of a run: one frozen dataclass per stage, checked when it is made.

Leaf names are unique over all stages, so a notebook's ``parameters`` cell stays flat and
``resolve(profile, **parameters)`` knows where each value belongs. Precedence: field default <
profile (``profiles.yaml``) < explicit parameter.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from rlkit.checks import ConfigError as ConfigError
from rlkit.checks import check_types, require, require_known

LossType = Literal["grpo", "dr_grpo", "dapo"]
Advantage = Literal["group_std", "group_mean", "batch_std", "rloo", "reinforce_pp"]
PROFILES_FILE = Path(__file__).with_name("profiles.yaml")


@dataclass(frozen=True)
class ModelConfig:
    """Which policy, and what of it is trained."""

    model: str = "tiny-base"
    """A name in data/models, ``run:<name>`` (a finished run), a folder, or a hub name."""
    model_revision: str = "main"
    """Hub revision; the resolved commit is recorded in env.json. Ignored for folders."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of forward passes. Master weights are float32 in full training either way."""
    lora_rank: int = 0
    """Rank of LoRA adapters on all linear layers; 0 trains every weight."""
    lora_alpha: float = 32.0
    """LoRA scale numerator (scale = alpha / rank); > 0."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about 30 % more time."""

    def __post_init__(self) -> None:
        check_types(self)
        require(bool(self.model), "model", self.model, "a model name or folder")
        require(self.lora_rank >= 0, "lora_rank", self.lora_rank, "an integer >= 0")
        require(self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "a number > 0")


@dataclass(frozen=True)
class TaskConfig:
    """Which problems, and how they become prompts."""

    task: str = "chain"
    """``chain``, ``edge``, ``large``, a .jsonl/.parquet file, or a hub data set by name."""
    task_revision: str = "main"
    """Hub revision of the data set; ignored for embedded tasks and files."""
    template: str = "question"
    """Prompt template: ``question``, ``boxed``, ``zero_short``, ``zero_long``, ``code``."""
    train_problems: int = 4096
    """Problems in the training pool; >= 1. Embedded tasks draw them from a seeded index range."""
    documents: str = ""
    """SFT only: JSONL file with ``prompt`` (messages) and ``completion`` (text) per row."""

    def __post_init__(self) -> None:
        check_types(self)
        require(bool(self.task), "task", self.task, "a task name or file")
        require(self.train_problems >= 1, "train_problems", self.train_problems, "an integer >= 1")


@dataclass(frozen=True)
class SamplingConfig:
    """How rollouts are drawn during training and sampled evaluation."""

    temperature: float = 1.0
    """Softmax temperature of rollouts; > 0. The study recommends 1.2 (section 3.1.1)."""
    top_p: float = 1.0
    """Nucleus mass in (0, 1]. Below 1 the scored policy differs from the sampled one."""
    max_completion_length: int = 128
    """Token budget of a response; >= 1. Responses that hit it count as truncated."""

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.temperature > 0,
            "temperature",
            self.temperature,
            "a number > 0",
            "Greedy decoding is an evaluation mode, not a rollout temperature.",
        )
        require(0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        require(
            self.max_completion_length >= 1,
            "max_completion_length",
            self.max_completion_length,
            "an integer >= 1",
        )


@dataclass(frozen=True)
class RewardConfig:
    """What a rollout is worth."""

    reward: Literal["accuracy", "random", "format"] = "accuracy"
    """``accuracy``: 1 if right and ended, gated by the format rule; ``random``: a fair coin (null
    test); ``format``: 1 if well formed, right or wrong (exploitable on purpose)."""
    format: Literal["boxed", "zero", "none"] = "boxed"
    """Format gate on accuracy: ``boxed`` (embedded default), ``zero`` (the study's five
    conditions), ``none``."""
    allow_exploitable: bool = False
    """Run although the self-check found a wrong answer that scores; shown on every figure."""

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.reward == "accuracy" or self.allow_exploitable,
            "reward",
            self.reward,
            "'accuracy' unless allow_exploitable is true",
            "A reward that pays wrong answers needs allow_exploitable=True.",
        )


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation. Counts of completions, not of prompts, unless said."""

    steps: int = 60
    """Optimizer windows, each with fresh rollouts; >= 1."""
    batch_size: int = 128
    """Completions per step; divisible by rollouts."""
    rollouts: int = 16
    """Completions per prompt (group size G); >= 2."""
    micro_batch_size: int = 128
    """Completions per forward/backward pass; divides batch_size / updates_per_batch."""
    updates_per_batch: int = 1
    """Optimizer updates per rollout batch; 1 is on-policy."""
    learning_rate: float = 3e-4
    """Peak AdamW rate; > 0. About 3e-4 below 1M parameters, 1e-6 for 1B and more."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Shape from the peak down to 0 at the last step (constant: no decay)."""
    warmup_steps: int = 0
    """Linear warm-up from 0, in optimizer updates; >= 0."""
    weight_decay: float = 0.0
    """AdamW decay; >= 0."""
    max_grad_norm: float = 1.0
    """Gradient norm clip; > 0."""
    loss_type: LossType = "dapo"
    """Aggregation: ``grpo`` mean per sequence, ``dr_grpo`` fixed divisor, ``dapo`` token mean."""
    advantage: Advantage = "group_mean"
    """``group_std`` (GRPO z-score), ``group_mean`` (Dr. GRPO), ``batch_std`` (group mean, batch
    std), ``rloo`` (leave-one-out baseline), ``reinforce_pp`` (group mean, then batch z-score)."""
    beta: float = 0.0
    """KL coefficient (k3 term in the loss); >= 0. 0 loads no reference model."""
    epsilon: float = 0.2
    """Lower clip range of the ratio, in (0, 1)."""
    epsilon_high: float = 0.2
    """Upper clip range, > 0; 0.28 is DAPO's clip-higher."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus; >= 0."""
    mask_truncated: bool = False
    """Leave truncated completions out of the loss (DAPO overlong filtering)."""
    epochs: int = 1
    """SFT only: passes over the documents; >= 1."""
    save_every: int = 0
    """Checkpoint interval in steps; 0 keeps only the final weights."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "batch_size", "micro_batch_size", "updates_per_batch", "epochs"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        require(self.rollouts >= 2, "rollouts", self.rollouts, "an integer >= 2 (a group)")
        require(
            self.batch_size % self.rollouts == 0,
            "batch_size",
            self.batch_size,
            f"a multiple of rollouts={self.rollouts}",
            f"Use {max(1, round(self.batch_size / self.rollouts)) * self.rollouts}.",
        )
        per_update, rest = divmod(self.batch_size, self.updates_per_batch)
        require(
            rest == 0 and per_update % self.micro_batch_size == 0,
            "micro_batch_size",
            self.micro_batch_size,
            f"a divisor of batch_size / updates_per_batch = "
            f"{self.batch_size}/{self.updates_per_batch}",
        )
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a number > 0")
        for name in ("warmup_steps", "weight_decay", "beta", "entropy_coef", "save_every"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "a number >= 0")
        require(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "a number > 0")
        require(0 < self.epsilon < 1, "epsilon", self.epsilon, "a number in (0, 1)")
        require(self.epsilon_high > 0, "epsilon_high", self.epsilon_high, "a number > 0")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training. Always on validation problems; test is for the notebooks."""

    eval_every: int = 0
    """Steps between evaluations; 0 evaluates never during training."""
    eval_problems: int = 128
    """Validation problems per evaluation; >= 1."""
    eval_samples: int = 4
    """Samples per problem of the sampled evaluation; >= 1."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.eval_every >= 0, "eval_every", self.eval_every, "an integer >= 0")
        require(self.eval_problems >= 1, "eval_problems", self.eval_problems, "an integer >= 1")
        require(self.eval_samples >= 1, "eval_samples", self.eval_samples, "an integer >= 1")


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run; written to config.json of its folder."""

    name: str
    """Run folder, ``<notebook>-<arm>-s<seed>``; letters, digits, ``.``, ``_``, ``-``."""
    seed: int = 0
    """Master seed of problems, sampling and initialisation; 0 <= seed < 2**31."""
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        check_types(self)
        good = bool(self.name) and all(c.isalnum() or c in "._-" for c in self.name)
        require(good, "name", self.name, "letters, digits, '.', '_' and '-' only")
        require(0 <= self.seed < 2**31, "seed", self.seed, "an integer in [0, 2**31)")
        prompts = self.train.batch_size // self.train.rollouts
        require(
            self.task.train_problems >= prompts,
            "train_problems",
            self.task.train_problems,
            f"at least batch_size / rollouts = {prompts}",
            "A step needs that many different prompts.",
        )

    def to_json(self) -> str:
        """Canonical JSON; ``RunConfig.from_json`` inverts it exactly."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """Read a config.json.

        Raises:
            ConfigError: not a JSON object, an unknown key, a missing name, or a value out of range.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"not valid JSON ({error}); expected a config.json") from error
        require(isinstance(data, dict), "config", data, "a JSON object")
        require_known(data, [f.name for f in fields(cls)], "key of RunConfig")
        require("name" in data, "name", None, "a run name", "Add the key 'name'.")
        parts: dict[str, Any] = {}
        for stage, kind in STAGES.items():
            if stage not in data:
                continue
            values = data[stage]
            require(isinstance(values, dict), stage, values, "a JSON object")
            require_known(values, [f.name for f in fields(kind)], f"key of {kind.__name__}")
            parts[stage] = kind(**values)
        return cls(**{**data, **parts})


STAGES: dict[str, type] = {
    "model": ModelConfig,
    "task": TaskConfig,
    "sampling": SamplingConfig,
    "reward": RewardConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
}
"""Stage name (field of RunConfig) to its dataclass."""


def _leaves() -> dict[str, str]:
    """Leaf name to the stage it belongs to (empty for name and seed). Leaf names must be unique."""
    owners = {"name": "", "seed": ""}
    for stage, kind in STAGES.items():
        for leaf in fields(kind):
            if leaf.name in owners:
                raise ConfigError(
                    f"field {leaf.name!r} of {kind.__name__} also exists in "
                    f"{owners[leaf.name] or 'RunConfig'}; parameters are flat, so rename one"
                )
            owners[leaf.name] = stage
    return owners


LEAVES = _leaves()
"""Parameter name to stage; every parameter that ``resolve`` accepts."""


def profiles() -> dict[str, dict[str, Any]]:
    """The profiles of ``profiles.yaml``: name to flat parameters."""
    return dict(yaml.safe_load(PROFILES_FILE.read_text(encoding="utf-8")))


def resolve(profile: str, **params: Any) -> RunConfig:
    """Build a configuration from a profile and flat parameters.

    Precedence: field default < profile < parameter. ``micro_batch_size`` only says how much fits
    in memory, so unless it is given itself it is lowered to the largest divisor of
    ``batch_size / updates_per_batch`` that does not exceed the profile's value. ``name`` defaults
    to ``<profile>-s<seed>``.

    Raises:
        ConfigError: unknown profile or parameter (with the nearest names), or a bad value.
    """
    known = profiles()
    require_known([profile], known, "profile")
    require_known(known[profile], LEAVES, f"parameter in profile {profile!r}")
    require_known(params, LEAVES, "parameter")
    merged = {**known[profile], **params}
    merged.setdefault("name", f"{profile}-s{merged.get('seed', 0)}")
    if "micro_batch_size" not in params:
        _fit_micro_batch(merged)
    parts: dict[str, dict[str, Any]] = {stage: {} for stage in STAGES}
    top: dict[str, Any] = {}
    for key, value in merged.items():
        (parts[LEAVES[key]] if LEAVES[key] else top)[key] = value
    return RunConfig(**top, **{stage: kind(**parts[stage]) for stage, kind in STAGES.items()})


def _fit_micro_batch(values: dict[str, Any]) -> None:
    defaults = TrainConfig()
    batch, updates, micro = (
        values.get(key, getattr(defaults, key))
        for key in ("batch_size", "updates_per_batch", "micro_batch_size")
    )
    if not all(type(value) is int and value >= 1 for value in (batch, updates, micro)):
        return  # left for TrainConfig, which says what is wrong
    per_update = batch // updates
    values["micro_batch_size"] = next(
        (size for size in range(min(micro, per_update), 0, -1) if per_update % size == 0), 1
    )


def flat(config: RunConfig) -> dict[str, Any]:
    """All parameters by leaf name, ``name`` and ``seed`` first; ``resolve`` accepts each."""
    values: dict[str, Any] = {"name": config.name, "seed": config.seed}
    for stage in STAGES:
        values.update(asdict(getattr(config, stage)))
    return values
