"""Rollouts of a frozen policy and the gradient of each; used by ``benchmarks/estimators.py``."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from rlkit import paths, rewards
from rlkit.config import ModelConfig, RewardConfig
from rlkit.engine import Engine, Sampling, stable_key
from rlkit.estimators import ESTIMATORS, Estimator, Floats, Sketch, weights
from rlkit.models import fingerprint, load_policy
from rlkit.tasks import Row, training_stream
from rlkit.templates import encode

BATCH = 128
"""Rollouts of one batch gradient, whatever the group size."""
CLIP = 0.2
"""Probability ratios of stale rollouts are clipped to 1 +- this."""
DRIFT_STEP = 0.01
"""Length of a drift step; the parameters of the embedded models have a norm of 69."""
ROWS = 64
"""Rollouts whose gradients are held at once: 64 x 0.66M parameters are 170 MB."""


@dataclass(frozen=True)
class Setting:
    """One frozen policy and the distribution its rollouts come from.

    Attributes:
        temperature: of the rollouts and of the policy whose gradient is taken.
        drift: steps of length ``DRIFT_STEP`` along RLOO batch gradients, taken from the shipped
            checkpoint before anything is measured.
        stale: rollouts come from the shipped checkpoint instead of the drifted policy.
        problems, rollouts: of a block. budget: tokens per response. width: of the sketch.
    """

    model: str = "tiny-base"
    task: str = "edge"
    temperature: float = 1.0
    drift: int = 0
    stale: bool = False
    seed: int = 0
    problems: int = 64
    rollouts: int = 64
    budget: int = 200
    width: int = 8192

    def __post_init__(self) -> None:
        if self.stale and not self.drift:
            raise ValueError("stale=True needs drift >= 1: rollouts of the same policy are fresh")

    @property
    def label(self) -> dict[str, Any]:
        """What tells a row of the table from the rows of other settings."""
        names = ("model", "task", "temperature", "drift", "stale", "seed")
        return {name: asdict(self)[name] for name in names}

    def folder(self) -> Path:
        """Where the blocks lie; another model under the same name gets another folder."""
        name = "-".join(str(value) for value in astuple(self)).replace("/", "_")
        weights_hash = fingerprint(ModelConfig(model=self.model))[:8]
        return paths.runs_dir() / "estimators" / f"{name}-{weights_hash}"


@dataclass(frozen=True)
class Rollouts:
    """Rollouts of P problems, flat [P * G]: ids, prompt lengths, rewards, sampling log-probs."""

    sequences: list[list[int]]
    prompt: list[int]
    logprobs: list[list[float]]
    rewards: Floats
    lengths: Floats


class Bench:
    """A frozen policy, the policy its rollouts come from, and gradients of rollouts."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        policy = ModelConfig(model=setting.model)
        self.model, self.tokenizer = load_policy(policy)
        self.model.set_attn_implementation("eager")  # the fused kernel has no vmap rule
        self.parameters = list(self.model.parameters())
        self.size = sum(p.numel() for p in self.parameters)
        self.reward_fns = rewards.build(RewardConfig())
        self.engine = Engine(self.model, self.tokenizer)
        for step in range(setting.drift):
            batch = self.roll(f"drift-{step}", BATCH // 16, 16)
            self.move(self.direction(batch, ESTIMATORS["RLOO"]), DRIFT_STEP)
        if setting.stale:
            self.engine = Engine(load_policy(policy)[0], self.tokenizer)

    def problems(self, purpose: str, n: int) -> list[Row]:
        """``n`` problems of the training distribution, others for each purpose and seed."""
        stream = training_stream(self.setting.task, f"estimators/{self.setting.seed}/{purpose}")
        return list(itertools.islice(stream, n))

    def roll(self, purpose: str, problems: int, rollouts: int) -> Rollouts:
        """Fresh rollouts; the same purpose draws the same problems with the same random numbers."""
        setting = self.setting
        rows = self.problems(purpose, problems)
        ids = encode(rows, self.tokenizer)
        keys = [stable_key(setting.seed, purpose, 0, row["problem_id"]) for row in rows]
        sampling = Sampling(setting.budget, temperature=setting.temperature)
        groups = self.engine.generate(ids, sampling, n=rollouts, keys=keys)
        flat = [c for group in groups for c in group]
        repeated = [row for row in rows for _ in range(rollouts)]
        total, _ = rewards.score(self.reward_fns, flat, repeated)
        return Rollouts(
            [ids[i // rollouts] + list(c.token_ids) for i, c in enumerate(flat)],
            [len(ids[i // rollouts]) for i in range(len(flat))],
            [list(c.logprobs or ()) for c in flat],
            np.array(total, dtype=np.float64).reshape(problems, rollouts),
            np.array([float(len(c.token_ids)) for c in flat]).reshape(problems, rollouts),
        )

    def parts(self, batch: Rollouts) -> list[tuple[list[int], Tensor, Tensor, Tensor]]:
        """Rollouts of like length: (rows, ids [n, T], mask [n, T], sampling log-probs [n, T])."""
        order = sorted(range(len(batch.sequences)), key=lambda row: len(batch.sequences[row]))
        found = []
        for at in range(0, len(order), ROWS):
            rows = order[at : at + ROWS]
            longest = len(batch.sequences[rows[-1]])
            ids = torch.full((len(rows), longest), int(self.tokenizer.pad_token_id or 0))
            mask, old = torch.zeros(2, len(rows), longest)
            for i, row in enumerate(rows):
                end = len(batch.sequences[row])
                ids[i, :end] = torch.tensor(batch.sequences[row])
                mask[i, batch.prompt[row] : end] = 1.0
                old[i, batch.prompt[row] : end] = torch.tensor(batch.logprobs[row])
            found.append((rows, ids, mask, old))
        return found

    def logprobs(self, values: dict[str, Tensor] | None, ids: Tensor) -> Tensor:
        """Log-probability of each token given those before it, [n, T]; 0 at the first."""
        length = ids.shape[1]
        # Rows are padded on the right, where nothing before a token is padding.
        causal = torch.full((length, length), -torch.inf).triu(1)[None, None]
        options = {"input_ids": ids, "attention_mask": causal, "use_cache": False}
        output = (
            self.model(**options)
            if values is None
            else functional_call(self.model, values, args=(), kwargs=options)
        )
        scores = (output.logits[:, :-1] / self.setting.temperature).log_softmax(-1)
        chosen = scores.gather(-1, ids[:, 1:, None])[..., 0]
        return torch.nn.functional.pad(chosen, (1, 0))

    def direction(self, batch: Rollouts, estimator: Estimator) -> Tensor:
        """The estimator's batch gradient [D] (ascent)."""
        weight = torch.tensor(weights(batch.rewards, batch.lengths, estimator).reshape(-1))
        total = torch.zeros(self.size)
        for rows, ids, mask, _ in self.parts(batch):
            row_sums = (self.logprobs(None, ids) * mask).sum(1)
            loss = (row_sums * weight[rows].float()).sum()
            total += torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, self.parameters)])
        return total

    def move(self, gradient: Tensor, length: float) -> None:
        """One step of ``length`` along a gradient; none if it is zero."""
        norm = float(gradient.norm())
        if norm > 0:
            with torch.no_grad():
                start = torch.nn.utils.parameters_to_vector(self.parameters)
                self.set(start + gradient * (length / norm))

    def set(self, vector: Tensor) -> None:
        """Copy a vector [D] into the parameters."""
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(vector.clone(), self.parameters)

    @contextlib.contextmanager
    def moved(self, gradient: Tensor, length: float) -> Iterator[None]:
        """A policy one step away, and back after that."""
        start = torch.nn.utils.parameters_to_vector(self.parameters).detach().clone()
        self.move(gradient, length)
        try:
            yield
        finally:
            self.set(start)

    def sketch(
        self, batch: Rollouts, sketch: Sketch | None, exact: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Floats]:
        """Sketched gradients of all rollouts, exact weighted sums, sequence log-ratios.

        Args:
            sketch: None for the sums alone.
            exact: weights [k, N] of sums that are also wanted exactly.

        Returns:
            name -> [N, width]: ``plain``, the gradient of the summed log-probabilities; for stale
            rollouts also ``up`` and ``down``, each token weighted by its probability ratio unless
            clipping stops it for a positive (negative) advantage. Then sums [k, D] of ``plain``,
            and log p(rollout) - log p_behaviour(rollout) [N].
        """
        count = len(batch.sequences)
        names = ("plain", "up", "down") if self.setting.stale else ("plain",)
        width = sketch.width if sketch else 0
        found = {name: torch.zeros(count, width) for name in names}
        sums, ratios = torch.zeros(len(exact), self.size), np.zeros(count)
        values = {name: p.detach() for name, p in self.model.named_parameters()}

        def total(values: dict[str, Tensor], ids: Tensor, weight: Tensor) -> Tensor:
            return (self.logprobs(values, ids[None])[0] * weight).sum()

        gradients = vmap(grad(total), in_dims=(None, 0, 0))
        for rows, ids, mask, old in self.parts(batch):
            token_weights = {"plain": mask}
            if self.setting.stale:
                with torch.no_grad():
                    change = (self.logprobs(None, ids) - old) * mask
                ratios[rows] = change.sum(1).double().numpy()
                ratio = change.exp() * mask
                token_weights["up"] = ratio * (ratio <= 1 + CLIP)
                token_weights["down"] = ratio * (ratio >= 1 - CLIP)
            for name in names:
                out, start = torch.zeros(len(rows), width), 0
                for gradient in gradients(values, ids, token_weights[name]).values():
                    flat = gradient.reshape(len(rows), -1)
                    if sketch:
                        sketch.add(out, flat, start)
                    if name == "plain":
                        sums[:, start : start + flat.shape[1]] += exact[:, rows] @ flat
                    start += flat.shape[1]
                found[name][rows] = out
        return found, sums, ratios
