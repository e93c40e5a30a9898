"""What an advantage estimator does to a policy gradient: pure functions for weights and moments.

Without clipping, an on-policy batch gradient is a weighted sum over its rollouts, ``sum_i w_i g_i``
with ``g_i = grad log p(rollout i)``, and the weights follow from rewards and lengths alone. So the
``g_i`` are computed once, and every estimator and group size is evaluated on the same rollouts.
Bias, variance and cosine need only inner products; a count sketch keeps those.

Everything about an *expected* gradient is a mean of products between different, independent blocks
of rollouts: the noise of two blocks is independent, so no noise is squared into a result. With two
blocks this is the split-half correction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rlkit import advantages
from rlkit.seeds import t_quantile
from rlkit.stats import Estimate

Floats = NDArray[np.float64]


# --- weights --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimator:
    """An advantage and how the loss gathers tokens.

    Attributes:
        advantage: a key of ``advantages.METHODS``, or ``reward`` (no baseline).
        gather: ``constant`` divides by the number of rollouts (Dr. GRPO, TRL's ``dr_grpo``, which
            divides by the token budget too), ``token`` by the tokens of the batch (``dapo``),
            ``sequence`` each rollout by its own length first (``grpo``).
        k: > 0 estimates the gradient of pass@k; ``advantage`` must then be ``rloo``.
    """

    advantage: str
    gather: Literal["constant", "token", "sequence"]
    k: int = 0

    def __post_init__(self) -> None:
        known = ("reward", *advantages.METHODS)
        if self.advantage not in known:
            raise ValueError(f"advantage={self.advantage!r}: expected one of {', '.join(known)}")
        if self.gather not in ("constant", "token", "sequence"):
            raise ValueError(f"gather={self.gather!r}: expected constant, token or sequence")
        if self.k < 0 or (self.k and self.advantage != "rloo"):
            raise ValueError(
                f"k={self.k}, advantage={self.advantage!r}: expected k=0, or k >= 1 with 'rloo'"
            )


ESTIMATORS: dict[str, Estimator] = {
    "REINFORCE": Estimator("reward", "constant"),
    "RLOO": Estimator("rloo", "constant"),
    "Dr. GRPO": Estimator("group_mean", "constant"),
    "GRPO": Estimator("group_std", "sequence"),
    "GRPO, token mean": Estimator("group_std", "token"),
    "GRPO, constant": Estimator("group_std", "constant"),
    "RLOO, sequence mean": Estimator("rloo", "sequence"),
    "batch std, token mean": Estimator("batch_std", "token"),
    "REINFORCE++": Estimator("reinforce_pp", "token"),
    "pass@4": Estimator("rloo", "constant", k=4),
}
"""By the names used in the papers: 2402.14740, 2503.20783, 2402.03300, 2503.14476 (token mean),
2508.08221 (batch std), 2501.03262 (with group baseline), 2505.15201 (pass@k). ``GRPO, constant``
and ``RLOO, sequence mean`` are no recipes: they separate what the deviation and what the length
does."""


def pass_at_k_advantages(rewards: ArrayLike, k: int) -> Floats:
    """Advantages [P, G] whose batch gradient is unbiased for the gradient of pass@k.

    ``k * C(wrong others, k-1) / C(G-1, k-1) * (r_i - mean of the others)``: the leave-one-out
    advantage times the chance that k-1 of the other rollouts all fail. The same expectation as
    the transformed rewards of Pass-at-k Policy Optimization (2505.15201: k/n if right, k/n *
    pass@(k-1) of the others if wrong; here the baseline, a function of the others alone, differs).
    k = 1 is RLOO.

    Args:
        rewards: 0 or 1, [P, G]. k: attempts, 1 <= k <= G; and G >= 2.

    Raises:
        ValueError: rewards that are not 0 or 1, or k out of range.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim != 2 or not np.isin(values, (0.0, 1.0)).all():
        raise ValueError("rewards: expected a matrix [P, G] of zeros and ones")
    group = values.shape[1]
    if not 1 <= k <= group or group < 2:
        raise ValueError(f"k={k}: expected 1 <= k <= G={group} and G >= 2")
    others = values.sum(axis=1, keepdims=True) - values
    all_fail = np.array(
        [math.comb(group - 1 - c, k - 1) / math.comb(group - 1, k - 1) for c in range(group)]
    )
    chance: Floats = all_fail[others.astype(int)]
    return k * chance * (values - others / (group - 1))


def weights(rewards: ArrayLike, lengths: ArrayLike, estimator: Estimator) -> Floats:
    """Weight [P, G] of each rollout's ``grad log p`` in the batch's ascent direction.

    Args:
        rewards: [P, G]. lengths: tokens of each rollout [P, G], > 0.

    Raises:
        ValueError: shapes that differ, an empty rollout, or what the advantage refuses.
    """
    values, tokens = np.asarray(rewards, np.float64), np.asarray(lengths, np.float64)
    if values.shape != tokens.shape or values.ndim != 2:
        raise ValueError(f"rewards {values.shape}, lengths {tokens.shape}: expected two [P, G]")
    if not (tokens > 0).all():
        raise ValueError("lengths: every rollout needs at least one token")
    if estimator.k:
        result = pass_at_k_advantages(values, estimator.k)
    elif estimator.advantage == "reward":
        result = values
    else:
        result = advantages.compute(values, estimator.advantage)
    if estimator.gather == "token":
        return result / tokens.sum()
    if estimator.gather == "sequence":
        return result / tokens / values.size
    return result / values.size


def batches(problems: int, rollouts: int, size: int, group: int) -> NDArray[np.int64]:
    """Deal a block of rollouts into batches: indices [batches, P, G] into the flat block.

    The block is [problems, rollouts]; each batch takes ``size // group`` problems with ``group``
    rollouts each, and every rollout is used exactly once.

    Raises:
        ValueError: the block cannot be dealt out without a rest.
    """
    per_batch = size // group
    if size % group or problems % per_batch or rollouts % group:
        raise ValueError(
            f"a block of {problems} problems x {rollouts} rollouts has no batches of {size} in "
            f"groups of {group}: group must divide batch and rollouts, and batch / group the "
            "problems"
        )
    flat = np.arange(problems * rollouts).reshape(
        problems // per_batch, per_batch, rollouts // group, group
    )
    return flat.transpose(0, 2, 1, 3).reshape(-1, per_batch, group)


# --- sketch ---------------------------------------------------------------------------------------


class Sketch:
    """A count sketch of gradients: each parameter adds, with a random sign, to a random bucket.

    Linear, and inner products are kept without bias; the variance of an inner product is at most
    ``(|x|^2 |y|^2 + <x, y>^2) / width`` (feature hashing, 0902.2206). A cosine c of two sketched
    vectors is therefore off by about ``(1 - c^2) / sqrt(width)``.

    Args:
        size: number of parameters. width: length of the sketch. seed: of buckets and signs.
    """

    def __init__(self, size: int, width: int, seed: int = 0) -> None:
        if size < 1 or width < 1:
            raise ValueError(f"size={size}, width={width}: expected positive integers")
        generator = torch.Generator().manual_seed(seed)
        self.width = width
        self.buckets = torch.randint(0, width, (size,), generator=generator)
        self.signs = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1.0

    def add(self, out: Tensor, part: Tensor, start: int) -> None:
        """Add the parameters from ``start`` on, ``part [n, d]``, to sketches ``out [n, width]``."""
        where = slice(start, start + part.shape[1])
        out.index_add_(1, self.buckets[where], part * self.signs[where])

    def __call__(self, vectors: Tensor) -> Tensor:
        """Sketches [n, width] of whole vectors [n, size]."""
        if vectors.ndim != 2 or vectors.shape[1] != len(self.buckets):
            raise ValueError(f"vectors {tuple(vectors.shape)}: expected [n, {len(self.buckets)}]")
        out = vectors.new_zeros(len(vectors), self.width)
        self.add(out, vectors, 0)
        return out


# --- moments --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """What is kept of one estimator: per independent block, over the block's batches.

    Attributes:
        mean: mean batch gradient [S, m]. direction: mean of the batch gradients scaled to length 1
            (0 stays 0) [S, m]. energy: mean squared norm [S]. empty: share of zero gradients [S].
    """

    mean: Floats
    direction: Floats
    energy: Floats
    empty: Floats


def reduce_batches(gradients: Floats) -> tuple[Floats, Floats, float, float]:
    """(mean, direction, energy, empty) of one block's batch gradients [batches, m]."""
    squared = (gradients**2).sum(axis=1)
    norm = np.sqrt(squared)
    unit = gradients / np.where(norm > 0, norm, 1.0)[:, None]
    return gradients.mean(axis=0), unit.mean(axis=0), squared.mean(), float((norm == 0).mean())


def across(products: Floats, keep: NDArray[np.bool_]) -> float:
    """Mean of ``products [S, S]`` over pairs of different blocks among those kept."""
    chosen = products[np.ix_(keep, keep)]
    n = len(chosen)
    return float((chosen.sum() - np.trace(chosen)) / (n * (n - 1)))


def moments(estimator: Blocks, reference: Floats, level: float = 0.95) -> dict[str, Estimate]:
    """Bias, noise and direction of an estimator against the expectation of ``reference``.

    With m_s the mean batch gradient and r_s the reference of block s, and <.,.> averaged over
    pairs s != s' of blocks (so that own noise is in none of them):

    - ``cosine`` of the expectations, <m, r> / sqrt(<m, m> <r, r>); can exceed 1 by noise;
    - ``scale``, <m, r> / <r, r>: the step length relative to the reference's;
    - ``bias``, |m - r| / |r|; a learning rate can take away all but sqrt(1 - cosine^2) of it;
    - ``snr`` of one batch, |E g|^2 / trace of Cov g, with trace = E |g|^2 - <m, m>;
    - ``batch_cosine``: E[cos(g, r)] of one batch, zero gradients counting 0: what a step of fixed
      length gains, in units of the best such step;
    - ``empty``: share of batches with zero gradient.

    Intervals: delete-one jackknife over blocks, t with S - 1 degrees of freedom. ``bias`` is the
    root of an estimate that may fall below 0 and is then 0, as is the lower end of its interval.

    Args:
        estimator: S >= 3 blocks. reference: [S, m] from the same blocks or others of the same
            problems; block s is never compared with block s.
    """
    count = len(reference)
    if count < 3 or estimator.mean.shape != reference.shape:
        raise ValueError(
            f"{estimator.mean.shape} against {reference.shape}: expected the same [S >= 3, m]"
        )
    mm = estimator.mean @ estimator.mean.T
    mr = estimator.mean @ reference.T
    ur = estimator.direction @ reference.T
    rr = reference @ reference.T

    def at(keep: NDArray[np.bool_]) -> dict[str, float]:
        m2, cross, r2 = across(mm, keep), across(mr, keep), across(rr, keep)
        noise = float(estimator.energy[keep].mean()) - m2
        cosine = cross / math.sqrt(m2 * r2) if m2 > 0 and r2 > 0 else math.nan
        return {
            "cosine": cosine,
            "scale": cross / r2,
            "bias": math.sqrt(max(0.0, m2 - 2 * cross + r2) / r2) if r2 > 0 else math.nan,
            "snr": m2 / noise if noise > 0 else math.nan,
            "batch_cosine": across(ur, keep) / math.sqrt(r2) if r2 > 0 else math.nan,
            "empty": float(estimator.empty[keep].mean()),
            "reference_norm": math.sqrt(r2) if r2 > 0 else math.nan,
        }

    found = jackknife(at, count, level)
    bias = found["bias"]
    return {**found, "bias": replace(bias, low=max(0.0, bias.low))}


def batch_gap(one: Blocks, other: Blocks, reference: Floats, level: float = 0.95) -> Estimate:
    """``batch_cosine`` of one estimator minus another's on the same rollouts (see ``moments``)."""
    difference = (one.direction - other.direction) @ reference.T
    products = reference @ reference.T

    def at(keep: NDArray[np.bool_]) -> dict[str, float]:
        squared = across(products, keep)
        norm = math.sqrt(squared) if squared > 0 else math.nan
        return {"gap": across(difference, keep) / norm}

    return jackknife(at, len(reference), level)["gap"]


def jackknife(
    statistic: Callable[[NDArray[np.bool_]], Mapping[str, float]], count: int, level: float = 0.95
) -> dict[str, Estimate]:
    """Estimates with delete-one jackknife intervals; ``statistic`` takes the kept blocks [S]."""
    everything = np.ones(count, dtype=bool)
    whole = statistic(everything)
    without = [statistic(np.arange(count) != s) for s in range(count)]
    found = {}
    for name, value in whole.items():
        values = np.array([part[name] for part in without])
        error = math.sqrt((count - 1) / count * float(((values - values.mean()) ** 2).sum()))
        found[name] = interval(value, error, count, level, "jackknife over blocks")
    return found


def mean_interval(values: ArrayLike, level: float = 0.95) -> Estimate:
    """Mean of independent values [n] with the t interval."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) < 2:
        raise ValueError(f"values {sample.shape}: expected at least two numbers")
    error = float(sample.std(ddof=1)) / math.sqrt(len(sample))
    return interval(float(sample.mean()), error, len(sample), level, "t over batches")


def interval(value: float, error: float, n: int, level: float, method: str) -> Estimate:
    """``value`` plus and minus Student's t (n - 1 degrees of freedom) times ``error``."""
    if math.isnan(value) or math.isnan(error):
        return Estimate(value, math.nan, math.nan, n, level, method)
    half = t_quantile(0.5 + level / 2, n - 1) * error
    return Estimate(value, value - half, value + half, n, level, method)
