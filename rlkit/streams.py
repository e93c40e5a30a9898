"""Random streams and the draw of a token: which randomness a rollout uses, and how.

Draw t of sample j of a problem is a counter-based function of (key, j, t) instead of a global
random state, so rollouts do not change when evaluation is switched on and any one of them can be
made again alone. t is the place of the token in the response: a token that a tool forces uses up
its number too, so a response does not depend on when the tool answered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Keys = NDArray[np.uint64]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int
    """Token budget of one response; >= 1."""
    temperature: float = 1.0
    """Softmax temperature; > 0. Ignored when greedy."""
    top_p: float = 1.0
    """Nucleus mass in (0, 1]."""
    greedy: bool = False
    """Take the most likely token; the lower id wins an exact tie."""
    stop: tuple[str, ...] = ()
    """Texts that end a response, for models without an end token for a turn. The response keeps the
    text and counts as ended by the policy (``eos``)."""
    banned: tuple[str, ...] = ()
    """Tokens that hold one of these texts are never drawn; log-probabilities are of the policy
    without them. ``("`",)`` closes the way to write a fenced block."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: expected an integer >= 1")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}: expected a number > 0; for greedy decoding set "
                "greedy=True"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a number in (0, 1]")
        # A bare string would pass as a sequence of one-letter stops.
        for name in ("stop", "banned"):
            texts = getattr(self, name)
            if not isinstance(texts, tuple) or not all(isinstance(s, str) and s for s in texts):
                raise ValueError(
                    f"{name}={texts!r}: expected a tuple of non-empty strings, such as ('\\n\\n',)"
                )


def stable_key(run_seed: int, purpose: str, step: int, problem_id: str) -> int:
    """64-bit key of a problem's random stream, the same on every machine and Python version."""
    text = f"{run_seed}|{purpose}|{step}|{problem_id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _mix(x: Keys) -> Keys:
    """splitmix64's output function (Steele et al. 2014): a bijection that spreads every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def row_streams(keys: Sequence[int], n: int, first_sample: int) -> Keys:
    """Stream of each row [len(keys) * n]: rows of a prompt next to each other."""
    samples = np.arange(first_sample, first_sample + n, dtype=np.uint64)
    per_key = np.asarray(keys, dtype=np.uint64)[:, None]
    return _mix(per_key + _mix((samples[None, :] + np.uint64(1)) * GOLDEN)).reshape(-1)


def uniforms(streams: Keys, draw: int | NDArray[np.int64]) -> NDArray[np.float64]:
    """Draw number ``draw`` (one for all or one each) of each stream, in [0, 1) with 53 bits."""
    # At least an array of one: numpy wraps arrays in silence, as wanted here, but not scalars.
    counter = np.atleast_1d(np.asarray(draw)).astype(np.uint64) + np.uint64(1)
    bits = _mix(streams + counter * GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def pick_tokens(
    logits: Tensor, sampling: Sampling, uniform: NDArray[np.float64]
) -> tuple[Tensor, Tensor]:
    """Choose a token per row: ``logits [rows, V]`` -> (tokens [rows], log-probabilities [rows]).

    Log-probabilities are of the temperature-scaled policy, before the nucleus cut (what the trainer
    scores). Sampling inverts the cumulative distribution in float64.
    """
    logits = logits.float()
    if not sampling.greedy and sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    logprobs = logits.log_softmax(-1)
    if sampling.greedy:
        tokens = logprobs.argmax(-1)
    else:
        weights = logprobs.double().exp()
        if sampling.top_p < 1:
            weights = _nucleus(weights, sampling.top_p)
        cumulative = weights.cumsum(-1)
        target = torch.as_tensor(uniform, device=logits.device)[:, None] * cumulative[:, -1:]
        # right=True skips tokens of weight zero even when the draw is exactly 0.
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of tokens whose mass reaches ``top_p``."""
    ordered, index = weights.sort(dim=-1, descending=True, stable=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return weights.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), 0.0)
