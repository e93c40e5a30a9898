"""The vLLM adapter on a stand-in for vLLM: what is asked for, how answers become Completions."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny import save_tiny_model, tiny_config

from rlkit.checks import ConfigError
from rlkit.streams import Sampling
from rlkit.tokenizer import build_tokenizer
from rlkit.trainer import train_rl
from rlkit.vllm_engine import VllmEngine

TOKENIZER = build_tokenizer()
END = TOKENIZER.eos_token_id


@dataclass
class Params:
    """The fields of ``vllm.SamplingParams`` in use, checked against the real ones where it is."""

    n: int
    seed: int
    temperature: float
    top_p: float
    max_tokens: int
    stop_token_ids: list[int]
    stop: list[str]
    include_stop_str_in_output: bool
    logprobs: int


@dataclass
class Llm:
    """Answers with its seed in digits, and an end token if the budget has room for it."""

    asked: list[tuple[Any, Params]] = field(default_factory=list)

    def generate(self, requests: list[Any], options: list[Params], use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        self.asked += zip(requests, options, strict=True)
        return [SimpleNamespace(outputs=[self.answer(option)]) for option in options]

    def answer(self, option: Params) -> Any:
        ids = [*TOKENIZER(str(option.seed % 1000))["input_ids"], END][: option.max_tokens]
        steps = [{i: SimpleNamespace(logprob=-0.5 * k if k else None)} for k, i in enumerate(ids)]
        return SimpleNamespace(
            token_ids=ids, logprobs=steps, finish_reason="stop" if ids[-1] == END else "length"
        )


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    if "vllm" not in sys.modules:
        module = ModuleType("vllm")
        module.SamplingParams = Params  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vllm", module)


def engine(calls: list[str]) -> tuple[VllmEngine, Llm]:
    llm = Llm()
    return VllmEngine(llm, TOKENIZER, [END], lambda: calls.append("refreshed")), llm


@pytest.mark.usefixtures("vllm")
def test_each_sample_is_a_request_with_its_own_stream() -> None:
    calls: list[str] = []
    made, llm = engine(calls)
    how = Sampling(9, temperature=0.7, top_p=0.9, stop=("x",))
    groups = made.generate([[5, 6], [7]], how, n=3, keys=[11, 12], prefill="<think>")
    assert calls == ["refreshed"]
    assert [request["prompt_token_ids"] for request, _ in llm.asked] == [[5, 6]] * 3 + [[7]] * 3
    options = [option for _, option in llm.asked]
    assert len({option.seed for option in options}) == 6
    assert all(0 <= option.seed < 2**31 for option in options)
    first = options[0]
    assert (first.n, first.temperature, first.top_p, first.max_tokens) == (1, 0.7, 0.9, 9)
    assert (first.stop_token_ids, first.stop) == ([END], ["x"])
    texts = [[c.text for c in group] for group in groups]
    assert texts[1][2] == f"<think>{options[5].seed % 1000}"
    # Two more samples of the first prompt continue its stream; one alone is the same again.
    made.generate([[5, 6]], how, n=2, keys=[11], first_sample=1)
    assert [option.seed for _, option in llm.asked[6:]] == [options[1].seed, options[2].seed]


@pytest.mark.usefixtures("vllm")
def test_answers_become_completions() -> None:
    made, _ = engine([])
    ((whole,),) = made.generate([[5]], Sampling(9), n=1, keys=[1])
    assert whole.stop == "eos"
    assert whole.token_ids[-1] == END
    assert math.isnan(whole.logprobs[0])
    assert whole.logprobs[1:] == tuple(-0.5 * k for k in range(1, len(whole.token_ids)))
    ((cut,),) = made.generate([[5]], Sampling(2), n=1, keys=[1])
    assert (cut.stop, len(cut.token_ids)) == ("length", 2)
    assert whole.text.startswith(cut.text)


@pytest.mark.usefixtures("vllm")
def test_greedy_and_bad_calls() -> None:
    made, llm = engine([])
    made.generate([[5]], Sampling(3, greedy=True), n=1, keys=[1])
    assert llm.asked[0][1].temperature == 0
    with pytest.raises(ValueError, match="use engine='rlkit'"):
        made.generate([[5]], Sampling(3), n=1, keys=[1], tools=object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 keys for 1 prompts"):
        made.generate([[5]], Sampling(3), n=1, keys=[1, 2])


def test_a_run_says_that_vllm_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "vllm" in sys.modules:
        pytest.skip("vLLM is installed")
    monkeypatch.setenv("RLKIT_RUNS", str(tmp_path / "runs"))
    config = tiny_config(save_tiny_model(tmp_path / "tiny"), engine="vllm")
    with pytest.raises(ConfigError, match=r"engine='vllm': vLLM is not installed.*engine='rlkit'"):
        train_rl(config)


def test_the_names_are_those_of_vllm() -> None:
    real = pytest.importorskip("vllm", reason="vLLM is not installed: only on GPU hosts")
    assert set(Params.__dataclass_fields__) <= set(real.SamplingParams.__struct_fields__)
