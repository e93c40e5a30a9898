"""The engine's interface on vLLM, for rollouts of real models on GPUs (``engine="vllm"``).

Every sample is a request of its own with a seed from the same streams as ``rlkit.engine``, so a
rollout does not depend on the number of samples or on evaluation. vLLM computes in other kernels
and batches: its tokens are not those of ``rlkit.engine``, and its log-probabilities differ from the
trainer's. The trainer logs the largest difference of each step, and TRL corrects for it with
importance weights (its ``vllm_importance_sampling_correction``). With ``top_p`` below 1 they are
those after the nucleus cut, unlike the engine's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlkit.completion import Completion
from rlkit.engine import check_call
from rlkit.streams import Sampling, row_streams
from rlkit.toolloop import ToolLoop

SEEDS = 2**31
"""vLLM seeds a torch generator per request; seeds below this are accepted everywhere."""


class VllmEngine:
    """Generates responses with a ``vllm.LLM``.

    Args:
        llm: made with ``logprobs_mode="processed_logprobs"``, so that log-probabilities are those
            of the tempered policy (TRL makes it so).
        tokenizer: of the policy.
        end_ids: ids that end a response.
        refresh: called before each generation; brings the policy's weights into ``llm``.
    """

    def __init__(
        self,
        llm: Any,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Sequence[int],
        refresh: Callable[[], None],
    ) -> None:
        self.llm = llm
        self.tokenizer = tokenizer
        self.end_ids = tuple(end_ids)
        self._refresh = refresh

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        n: int,
        keys: Sequence[int],
        first_sample: int = 0,
        prefill: str = "",
        tools: ToolLoop | None = None,
    ) -> list[list[Completion]]:
        """Draw ``n`` responses to each prompt; arguments and result as ``Engine.generate``.

        Raises:
            ValueError: a tool loop, which needs the key-value cache between calls.
        """
        if tools is not None:
            raise ValueError("tools: vLLM has no loop that keeps its cache; use engine='rlkit'")
        if sampling.banned:
            raise ValueError(f"banned={sampling.banned!r}: not supported with engine='vllm'")
        check_call(prompts, n, keys)
        from vllm import SamplingParams  # only on GPU hosts

        self._refresh()
        seeds = [int(stream) % SEEDS for stream in row_streams(keys, n, first_sample)]
        requests = [{"prompt_token_ids": list(p)} for p in prompts for _ in range(n)]
        options = [
            SamplingParams(
                n=1,
                seed=seed,
                temperature=0.0 if sampling.greedy else sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=list(self.end_ids),
                stop=list(sampling.stop),
                include_stop_str_in_output=True,
                logprobs=0,
            )
            for seed in seeds
        ]
        outputs = self.llm.generate(requests, options, use_tqdm=False)
        flat = [self._completion(output.outputs[0], prefill) for output in outputs]
        return [flat[i : i + n] for i in range(0, len(flat), n)]

    def _completion(self, sample: Any, prefill: str) -> Completion:
        ids = list(sample.token_ids)
        logprobs = [step[token].logprob for step, token in zip(sample.logprobs, ids, strict=True)]
        return Completion.from_ids(
            ids,
            self.tokenizer,
            stop="eos" if sample.finish_reason == "stop" else "length",
            prefill=prefill,
            end_ids=self.end_ids,
            # vLLM writes NaN as None; TRL leaves such tokens uncorrected.
            logprobs=[math.nan if value is None else value for value in logprobs],
        )
