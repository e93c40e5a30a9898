from __future__ import annotations

import dataclasses
import json

import pytest

from rlkit import config
from rlkit.config import ConfigError, RunConfig, TrainConfig, flat, profiles, resolve


def test_precedence_is_default_profile_parameter() -> None:
    assert TrainConfig().steps == 60
    assert resolve("tiny-smoke").train.steps == 3
    assert resolve("tiny-smoke", steps=7).train.steps == 7
    assert resolve("tiny-smoke").train.epsilon == TrainConfig().epsilon


@pytest.mark.parametrize("profile", sorted(profiles()))
def test_every_profile_resolves_and_survives_json(profile: str) -> None:
    made = resolve(profile, seed=3)
    assert made.name == f"{profile}-s3"
    assert RunConfig.from_json(made.to_json()) == made
    assert resolve(profile, **flat(made)) == made


def test_leaf_names_are_unique() -> None:
    leaves = [f.name for kind in config.STAGES.values() for f in dataclasses.fields(kind)]
    assert len({*leaves, "name", "seed"}) == len(leaves) + 2
    assert set(flat(resolve("tiny"))) == {*leaves, "name", "seed"}


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"learing_rate": 1e-4}, ["'learing_rate'", "Did you mean learning_rate"]),
        ({"steps": "3"}, ["steps='3'", "type int", "got str"]),
        ({"steps": True}, ["steps=True", "type int", "got bool"]),
        ({"steps": 3.0}, ["steps=3.0", "type int", "got float"]),
        ({"learning_rate": "1e-4"}, ["learning_rate='1e-4'", "type float"]),
        ({"mask_truncated": 1}, ["mask_truncated=1", "type bool"]),
        ({"loss_type": "ppo"}, ["loss_type='ppo'", "'dapo'"]),
        ({"batch_size": 100}, ["batch_size=100", "multiple of rollouts=16", "Use 96"]),
        ({"micro_batch_size": 48}, ["micro_batch_size=48", "divisor"]),
        ({"temperature": 0}, ["temperature=0", "> 0", "Greedy"]),
        ({"reward": "random"}, ["reward='random'", "allow_exploitable"]),
        ({"false_positive": 0.1}, ["false_positive=0.1", "allow_exploitable"]),
        ({"false_negative": 1.5, "allow_exploitable": True}, ["false_negative=1.5", "[0, 1]"]),
        (
            {"false_positive": 0.1, "reward": "rrl", "allow_exploitable": True},
            ["false_positive=0.1", "reward='rrl'"],
        ),
        ({"overlong_weight": 1.0}, ["overlong_weight=1.0", "[0, 1)"]),
        ({"repetition_weight": -0.1}, ["repetition_weight=-0.1", "[0, 1)"]),
        (
            {"overlong_weight": 0.5, "repetition_weight": 0.3, "failing_code_weight": 0.2},
            ["_weight=1.0", "a sum below 1"],
        ),
        ({"call_cost_weight": 1.0}, ["call_cost_weight=1.0", "[0, 1)"]),
        ({"call_cost_weight": -0.1}, ["call_cost_weight=-0.1", "[0, 1)"]),
        (
            {"failing_code_weight": 0.5, "call_cost_weight": 0.5},
            ["failing_code_weight + call_cost_weight=1.0", "a sum below 1"],
        ),
        ({"tool": "ruby"}, ["tool='ruby'", "'python'"]),
        ({"max_calls": 0}, ["max_calls=0", ">= 1"]),
        ({"first_calls": 5}, ["first_calls=5", "at most max_calls=4"]),
        ({"calls_every": 0}, ["calls_every=0", ">= 1"]),
        ({"tool_seconds": 0.0}, ["tool_seconds=0.0", "0.01 to 3600"]),
        ({"tool_characters": 3}, ["tool_characters=3", ">= 4"]),
        (
            {"tool_format": "still3", "tool_state": "session"},
            ["tool_state='session'", "'fresh' with tool_format='still3'"],
        ),
        ({"tool": "python", "engine": "vllm"}, ["engine='vllm'", "'rlkit' with a tool"]),
        ({"repetition_ngram": 0}, ["repetition_ngram=0", ">= 1"]),
        (
            {"overlong_weight": 0.5, "overlong_cache": 200},
            ["overlong_cache=200", "max_completion_length=128"],
        ),
        ({"group_filter": "QS"}, ["group_filter='QS'", "'qs'"]),
        ({"train_problems": 4}, ["train_problems=4", "at least", "8"]),
        ({"name": "a/b"}, ["name='a/b'"]),
        ({"seed": -1}, ["seed=-1"]),
    ],
)
def test_bad_parameters_say_what_is_wrong(params: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("tiny", **params)
    for word in words:
        assert word in str(caught.value)


def test_unknown_profile_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean .*qwen2.5-7b"):
        resolve("qwen-7b")
    with pytest.raises(ConfigError, match=r"Known: .*tiny-smoke"):
        resolve("zzz")


def test_an_integer_serves_as_a_number() -> None:
    made = resolve("tiny", learning_rate=1, temperature=1)
    assert type(made.train.learning_rate) is float
    assert made == resolve("tiny", learning_rate=1.0, temperature=1.0)
    assert made.to_json() == resolve("tiny", learning_rate=1.0, temperature=1.0).to_json()


def test_micro_batch_follows_the_batch_unless_given() -> None:
    assert resolve("tiny", batch_size=40, rollouts=8).train.micro_batch_size == 40
    assert resolve("tiny", batch_size=320).train.micro_batch_size == 80
    assert resolve("tiny", updates_per_batch=16).train.micro_batch_size == 8
    assert (
        resolve("tiny", batch_size=256).train.micro_batch_size
        == resolve("tiny").train.micro_batch_size
    )
    with pytest.raises(ConfigError, match="micro_batch_size=128"):
        resolve("tiny", batch_size=96, micro_batch_size=128)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["train"].update(stepz=3), ["'stepz'", "TrainConfig", "steps"]),
        (lambda d: d.update(trian={}), ["'trian'", "train"]),
        (lambda d: d.pop("name"), ["name"]),
        (lambda d: d.update(model=3), ["model=3", "JSON object"]),
    ],
)
def test_config_json_is_read_strictly(change: object, words: list[str]) -> None:
    data = json.loads(resolve("tiny").to_json())
    change(data)  # type: ignore[operator]
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_json(json.dumps(data))
    for word in words:
        assert word in str(caught.value)


def test_a_torn_config_json_is_reported() -> None:
    with pytest.raises(ConfigError, match="not valid JSON"):
        RunConfig.from_json(resolve("tiny").to_json()[:-20])


def test_the_call_budget_grows_from_the_first_to_the_last() -> None:
    def calls(*steps: int, **params: object) -> list[int]:
        tools = resolve("tiny", **params).tools
        return [tools.calls_at(step) for step in steps]

    assert calls(1, 10**6) == [4, 4]
    grown = {"first_calls": 2, "max_calls": 4, "calls_every": 100}
    assert calls(1, 100, 101, 200, 201, 10**6, **grown) == [2, 2, 3, 3, 4, 4]
    assert calls(1, 2, 3, first_calls=1, max_calls=2, calls_every=1) == [1, 2, 2]
    assert calls(1, 7, first_calls=3, max_calls=3, calls_every=1) == [3, 3]
