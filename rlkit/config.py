"""Configuration of a run: the stages of ``rlkit.stages`` under one name and seed.

Leaf names are unique over all stages, so a notebook's ``parameters`` cell stays flat and
``resolve(profile, **parameters)`` knows where each value belongs. Precedence: field default <
profile (``profiles.yaml``) < explicit parameter.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from rlkit.checks import ConfigError as ConfigError
from rlkit.checks import check_types, require, require_known
from rlkit.stages import EvalConfig as EvalConfig
from rlkit.stages import ModelConfig as ModelConfig
from rlkit.stages import RewardConfig as RewardConfig
from rlkit.stages import SamplingConfig as SamplingConfig
from rlkit.stages import TaskConfig as TaskConfig
from rlkit.stages import TrainConfig as TrainConfig
from rlkit.tool_config import ToolConfig as ToolConfig

PROFILES_FILE = Path(__file__).with_name("profiles.yaml")


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
    tools: ToolConfig = field(default_factory=ToolConfig)
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
        budget = self.sampling.max_completion_length
        require(
            self.reward.overlong_weight == 0 or self.reward.overlong_cache <= budget,
            "overlong_cache",
            self.reward.overlong_cache,
            f"at most max_completion_length={budget}",
        )
        require(
            self.tools.tool == "none" or self.sampling.engine == "rlkit",
            "engine",
            self.sampling.engine,
            "'rlkit' with a tool",
            "vLLM keeps no cache between a block and its output.",
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
    "tools": ToolConfig,
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


@functools.cache
def profiles() -> Mapping[str, Mapping[str, Any]]:
    """The profiles of ``profiles.yaml``: name to flat parameters; read once."""
    return MappingProxyType(yaml.safe_load(PROFILES_FILE.read_text(encoding="utf-8")))


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
