"""Whether the two sides compute the same gradient on the same rollouts."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _clock import patched
from _script import scripted
from _stock import SIDES, Setup, Side, Stock, start, trainer
from torch import Tensor
from transformers import TrainerCallback


@dataclass(frozen=True)
class Gap:
    """How far the gradients of the two sides are apart on the same rollouts.

    Attributes:
        whole: norm of the difference over the norm of the stock gradient, all parameters together.
        worst: the largest such quotient of a single parameter; name: that parameter.
    """

    whole: float
    worst: float
    name: str


class _Captured(Exception):
    """Ends a run before its first update."""


class _Capture(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise _Captured


def gradient_gap(setup: Setup, stock: Stock, folder: Path) -> Gap:
    """Compare the gradients of step 1 on the rollouts that our side drew.

    Advantages are the group mean's deviations: the z-score of the two sides divides by std + 1e-6
    (ours) and std + 1e-4 (TRL), which alone makes a difference of up to 3e-4. Nothing is clipped,
    and both sides compute in float32.

    Raises:
        RuntimeError: the sides saw different prompts or rewards, or the gradient is zero.
    """
    config = setup.config
    train = replace(config.train, advantage="group_mean", max_grad_norm=1e9)
    exact = replace(config, train=train, model=replace(config.model, dtype="float32"))
    setup = replace(setup, config=exact)
    gradients: dict[Side, dict[str, Tensor]] = {}
    prompts: list[list[int]] = []
    completions: list[list[int]] = []
    scores: dict[Side, Tensor] = {}

    for side in SIDES:
        made, _ = trainer(side, setup, replace(stock, bf16=False), folder)
        model = made.accelerator.unwrap_model(made.model)
        generate, score = made._generate, made._calculate_rewards

        def drawn(*args: Any, generate: Any = generate) -> Any:
            result = generate(*args)
            prompts.extend(result[0])
            completions.extend(result[1])
            return result

        def given(prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
            if prompt_ids != prompts:
                raise RuntimeError("the two sides see different prompts")
            return completions, None

        def scored(*args: Any, side: Side = side, score: Any = score) -> Tensor:
            scores[side] = score(*args)
            return scores[side]

        seam = ("_generate", drawn) if side == "ours" else ("_generate_single_turn", given)
        made.add_callback(_Capture())
        with (
            patched(made, *seam),
            patched(made, "_calculate_rewards", scored),
            scripted(model, setup.lengths, config.seed),
            contextlib.suppress(_Captured),
        ):
            start(made)
        gradients[side] = {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in model.named_parameters()
        }
        # One model at a time: trainers are full of cycles, and weights may be gigabytes.
        del made, model, generate, score, drawn, given, scored, seam
        gc.collect()
    if not torch.equal(scores["ours"], scores["stock"]):
        raise RuntimeError("the two sides give different rewards to the same rollouts")
    return _gap(gradients["ours"], gradients["stock"])


def _gap(ours: dict[str, Tensor], stock: dict[str, Tensor]) -> Gap:
    if ours.keys() != stock.keys():
        raise RuntimeError(f"parameters differ: {sorted(ours.keys() ^ stock.keys())}")
    norms = {name: float(value.norm()) for name, value in stock.items()}
    apart = {name: float((ours[name] - value).norm()) for name, value in stock.items()}
    whole = float(np.linalg.norm(list(norms.values())))
    if whole == 0:
        raise RuntimeError("the gradient is zero: no group of rollouts has two different rewards")
    quotients = {name: apart[name] / norm for name, norm in norms.items() if norm > 0}
    name = max(quotients, key=lambda key: quotients[key])
    return Gap(float(np.linalg.norm(list(apart.values()))) / whole, quotients[name], name)
