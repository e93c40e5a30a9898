"""Checks before step 1: what would make a run learn nothing, found in a second instead of an hour.

Every finding names what was seen, the likely cause and the parameter to change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlkit import advantages, filters, rewards, templates
from rlkit.completion import Completion
from rlkit.config import RunConfig
from rlkit.exploits import RewardError, check_reward

Row = dict[str, Any]
RewardFns = rewards.RewardFns
Sample = Callable[[Sequence[Row]], list[list[Completion]]]

PROBE_PROBLEMS = 8
"""Problems of the probe generation; each is sampled ``rollouts`` times."""
REWARD_PROBLEMS = 3


@dataclass(frozen=True)
class Finding:
    """One problem found; an ``error`` stops the run, a ``warning`` is recorded and shown."""

    level: Literal["error", "warning"]
    check: str
    message: str


class PreflightError(ValueError):
    """The run cannot work as configured; the text lists every error found."""


def check(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Sequence[int],
    problems: Sequence[Row],
    reward_fns: RewardFns,
    sample: Sample,
    *,
    has_reference: bool,
    group_filter: filters.GroupFilter | None = None,
) -> list[Finding]:
    """All findings for a run that is about to start.

    Args:
        config: the run.
        tokenizer: the policy's tokenizer.
        end_ids: ids that end a response (the model's generation configuration).
        problems: training problems; the first few are used.
        reward_fns: (name, callable, weight) as from ``rewards.build``.
        sample: draws ``rollouts`` completions for each of the given problems.
        has_reference: whether a reference model exists.
        group_filter: what is left out of baseline and loss, as from ``rewards.build_filter``.

    Raises:
        PreflightError: at least one finding is an error.
    """
    findings = [
        *_prompts(config, tokenizer, problems),
        *_end(tokenizer, end_ids),
        *_budget(config, tokenizer, problems),
        *_rewards(config, problems, reward_fns),
        *_reference(config, has_reference),
    ]
    if not any(f.level == "error" for f in findings):
        probe = list(problems[:PROBE_PROBLEMS])
        findings += probe_findings(config, probe, sample(probe), reward_fns, group_filter)
    errors = [f.message for f in findings if f.level == "error"]
    if errors:
        raise PreflightError("This run cannot work as configured:\n- " + "\n- ".join(errors))
    return findings


def _prompts(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Row]
) -> list[Finding]:
    row = problems[0]
    ids = templates.encode([row], tokenizer, config.task.template)[0]
    question = str(row["prompt"][-1]["content"])
    text = str(tokenizer.decode(ids))
    if question not in text:
        return [
            Finding(
                "error",
                "template",
                f"the question {question!r} is not in the encoded prompt {text!r}. Likely cause: "
                "the tokenizer does not know its characters. Use another model or task.",
            )
        ]
    if text == question:
        return [
            Finding(
                "warning",
                "template",
                f"the prompt is the bare question {question!r}: no template was applied. Check "
                f"template={config.task.template!r} and the model's chat template.",
            )
        ]
    return []


def _end(tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> list[Finding]:
    if tokenizer.eos_token_id in end_ids:
        return []
    return [
        Finding(
            "error",
            "end_token",
            f"the end token {tokenizer.eos_token!r} (id {tokenizer.eos_token_id}) does not end a "
            f"response; only {list(end_ids)} do, so responses would run to the budget. Set "
            "eos_token_id in the model's generation_config.json.",
        )
    ]


def _budget(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Row]
) -> list[Finding]:
    budget = config.sampling.max_completion_length
    text = rf"\boxed{{{problems[0]['answer']}}}"
    need = len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
    if need <= budget:
        return []
    return [
        Finding(
            "error",
            "budget",
            f"max_completion_length={budget} cannot hold even the bare answer {text!r} and the end "
            f"token ({need} tokens), so no response can be right. Raise max_completion_length.",
        )
    ]


def _rewards(config: RunConfig, problems: Sequence[Row], reward_fns: RewardFns) -> list[Finding]:
    def total(completions: Sequence[Completion], rows: Sequence[Any]) -> rewards.Values:
        return rewards.score(reward_fns, completions, rows, **rewards.facts(config, 0))[0]

    try:
        exploits = check_reward(total, problems[:REWARD_PROBLEMS])
    except RewardError as error:
        return [Finding("error", "reward", str(error))]
    if not exploits:
        return []
    kinds = ", ".join(dict.fromkeys(e.kind for e in exploits))
    allowed = config.reward.allow_exploitable
    return [
        Finding(
            "warning" if allowed else "error",
            "reward",
            f"the reward pays what it should not ({len(exploits)} probes: {kinds}; for example "
            f"{exploits[0]}). "
            + (
                "Recorded, since allow_exploitable is set."
                if allowed
                else "Use reward='accuracy' with a format rule, or set allow_exploitable=True if "
                "that is what you study."
            ),
        )
    ]


def _reference(config: RunConfig, has_reference: bool) -> list[Finding]:
    if config.train.beta == 0 or has_reference:
        return []
    return [
        Finding(
            "error",
            "reference",
            f"beta={config.train.beta} needs a reference model, and there is none. Set beta=0, or "
            "report this as a defect.",
        )
    ]


def probe_findings(
    config: RunConfig,
    problems: Sequence[Row],
    completions: list[list[Completion]],
    reward_fns: RewardFns,
    group_filter: filters.GroupFilter | None = None,
) -> list[Finding]:
    """What the probe generation [P][G] shows: responses that end, and groups with variance."""
    findings = []
    flat = [c for group in completions for c in group]
    budget = config.sampling.max_completion_length
    ended = sum(c.reached_end for c in flat) / len(flat)
    if ended == 0:
        findings.append(
            Finding(
                "error" if config.reward.reward == "accuracy" else "warning",
                "budget",
                f"none of {len(flat)} probe completions ended within max_completion_length="
                f"{budget}, so all would score 0. Raise max_completion_length; if the model never "
                "writes its end token, train it with SFT first.",
            )
        )
    elif ended < 0.7:
        findings.append(
            Finding(
                "warning",
                "budget",
                f"only {ended:.0%} of {len(flat)} probe completions ended within "
                f"max_completion_length={budget}; the rest score 0 whatever they say. Raise "
                "max_completion_length.",
            )
        )
    rows = [row for row, group in zip(problems, completions, strict=True) for _ in group]
    try:
        values, _ = rewards.score(reward_fns, flat, rows, **rewards.facts(config, 0))
    except RewardError as error:
        return [*findings, Finding("error", "reward", str(error))]
    shape = (len(problems), len(completions[0]))
    matrix = np.array([float("nan") if v is None else v for v in values]).reshape(shape)
    if ended > 0 and advantages.flat_groups(matrix).all():
        best = max((v for v in values if v is not None), default=0.0)
        cause = (
            "the task is solved already. Choose harder problems (task)."
            if best > 0
            else "too hard for this model, or its responses miss the format rule "
            f"(format={config.reward.format!r}). Raise rollouts or temperature, choose an easier "
            "task, or start from an SFT model."
        )
        findings.append(
            Finding(
                "warning",
                "variance",
                f"all rewards within each of {len(problems)} probe groups are equal, so the first "
                f"steps may carry no gradient. Likely cause: {cause}",
            )
        )
    elif ended > 0:
        try:
            kept = filters.apply(group_filter, matrix, completions, problems)
        except filters.FilterError as error:
            return [*findings, Finding("error", "group_filter", str(error))]
        if advantages.flat_groups(np.where(kept, matrix, np.nan)).all():
            findings.append(
                Finding(
                    "warning",
                    "group_filter",
                    f"group_filter={config.reward.group_filter!r} leaves no group with different "
                    f"rewards among {len(problems)} probe groups ({kept.mean():.0%} of "
                    "completions kept), so the first steps may carry no gradient. Raise rollouts "
                    "or batch_size, or set refill_rounds.",
                )
            )
    return findings
