"""The engine against ``generate`` of transformers, against a full forward pass, and its streams."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from rlkit.decode import ModuleDecoder, Qwen2Decoder, make_decoder
from rlkit.engine import Engine, Sampling, pick_tokens, row_streams, stable_key, uniforms
from rlkit.tokenizer import build_tokenizer

PROMPTS = ["Compute 19+14.", "Evaluate 47+85-19+62-38.", "Compute 1."]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """Random weights with grouped-query attention; large enough logits to have clear winners."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).eval()


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in texts]


def reference(model, tokenizer, prompt: list[int], budget: int) -> list[int]:
    """transformers' own greedy continuation, cut after the end token."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=budget,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )[0, len(prompt) :].tolist()
    end = tokenizer.eos_token_id
    return output[: output.index(end) + 1] if end in output else output


@pytest.mark.parametrize("decoder", [Qwen2Decoder, ModuleDecoder])
def test_greedy_equals_transformers_generate(model, tokenizer, decoder, monkeypatch) -> None:
    monkeypatch.setattr("rlkit.engine.make_decoder", decoder)
    prompts = ids_of(tokenizer, PROMPTS)
    sampling = Sampling(max_new_tokens=40, greedy=True)
    found = Engine(model, tokenizer).generate(prompts, sampling, n=1, keys=[0, 1, 2])
    for prompt, (completion,) in zip(prompts, found, strict=True):
        assert list(completion.token_ids) == reference(model, tokenizer, prompt, 40)


def test_plain_qwen2_uses_the_fused_decoder(model) -> None:
    assert isinstance(make_decoder(model), Qwen2Decoder)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_equal_a_full_forward_pass(model, tokenizer, temperature) -> None:
    prompts = ids_of(tokenizer, PROMPTS)
    sampling = Sampling(max_new_tokens=30, temperature=temperature)
    groups = Engine(model, tokenizer).generate(prompts, sampling, n=5, keys=[7, 8, 9])
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            ids = torch.tensor([prompt + list(completion.token_ids)])
            with torch.no_grad():
                logits = model(ids).logits[0, len(prompt) - 1 : -1] / temperature
            expected = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
            assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=2e-5)


def test_rollout_is_the_same_alone_and_in_any_batch(model, tokenizer) -> None:
    prompts = ids_of(tokenizer, PROMPTS)
    engine = Engine(model, tokenizer)
    sampling = Sampling(max_new_tokens=30)
    together = engine.generate(prompts, sampling, n=6, keys=[1, 2, 3])
    small = Engine(model, tokenizer, max_rows=4).generate(prompts, sampling, n=6, keys=[1, 2, 3])
    assert [[c.token_ids for c in g] for g in together] == [[c.token_ids for c in g] for g in small]
    alone = engine.generate(prompts[1:2], sampling, n=1, keys=[2], first_sample=4)
    assert alone[0][0].token_ids == together[1][4].token_ids


def test_different_keys_and_samples_give_different_rollouts(model, tokenizer) -> None:
    prompts = ids_of(tokenizer, PROMPTS[1:2]) * 2
    groups = Engine(model, tokenizer).generate(prompts, Sampling(20), n=4, keys=[1, 2])
    assert len({c.token_ids for group in groups for c in group}) == 8


def test_generation_leaves_the_global_random_state_and_mode_alone(model, tokenizer) -> None:
    model.train()
    before = torch.get_rng_state()
    Engine(model, tokenizer).generate([[5, 6]], Sampling(5), n=2, keys=[1])
    assert torch.equal(before, torch.get_rng_state()) and model.training
    model.eval()


def test_stop_reasons_and_end_token(model, tokenizer) -> None:
    groups = Engine(model, tokenizer).generate(
        ids_of(tokenizer, PROMPTS), Sampling(12, temperature=3.0), n=64, keys=[1, 2, 3]
    )
    completions = [c for group in groups for c in group]
    assert {c.stop for c in completions} == {"eos", "length"}
    for c in completions:
        assert (c.token_ids[-1] == tokenizer.eos_token_id) == (c.stop == "eos")
        assert c.stop == "eos" or len(c.token_ids) == 12
        assert "<|end|>" not in c.text


def test_prefill_is_shown_in_the_text_but_not_generated(model, tokenizer) -> None:
    engine = Engine(model, tokenizer)
    prompt = tokenizer("Compute 19+14.<think>")["input_ids"]
    (plain,) = engine.generate([prompt], Sampling(6, greedy=True), n=1, keys=[0])[0]
    (shown,) = engine.generate(
        [prompt], Sampling(6, greedy=True), n=1, keys=[0], prefill="<think>"
    )[0]
    assert shown.token_ids == plain.token_ids
    assert shown.text == "<think>" + plain.text


def test_uniform_draws_are_uniform_and_independent() -> None:
    streams = row_streams([stable_key(0, "train", s, "p") for s in range(500)], 4, 0)
    draws = np.stack([uniforms(streams, t) for t in range(50)])
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 4 / np.sqrt(12 * draws.size)
    for a, b in ((draws[:-1], draws[1:]), (draws[:, :-1], draws[:, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)


def test_stable_key_is_fixed_for_ever() -> None:
    assert stable_key(0, "train", 1, "chain:1+2") == 5308312154548278928


def test_sampling_frequencies_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).repeat(20000, 1)
    draws = uniforms(row_streams(list(range(20000)), 1, 0), 0)
    tokens, logprobs = pick_tokens(logits, Sampling(1), draws)
    shares = torch.bincount(tokens, minlength=4) / 20000
    expected = logits[0].softmax(-1)
    assert torch.all(
        (shares - expected).abs() < 4 * (expected * (1 - expected) / 20000).sqrt() + 1e-9
    )
    assert torch.allclose(logprobs, expected.log()[tokens])


def test_nucleus_keeps_the_smallest_sufficient_set() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(4000, 1)
    draws = uniforms(row_streams(list(range(4000)), 1, 0), 0)
    tokens, _ = pick_tokens(logits, Sampling(1, top_p=0.75), draws)
    assert set(tokens.tolist()) == {0, 1}
    only_best, _ = pick_tokens(logits, Sampling(1, top_p=0.01), draws)
    assert set(only_best.tolist()) == {0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompts=[], keys=[], n=1), "prompts is empty"),
        (dict(prompts=[[1]], keys=[1, 2], n=1), "2 keys for 1 prompts"),
        (dict(prompts=[[1], []], keys=[1, 2], n=1), "no tokens"),
        (dict(prompts=[[1]], keys=[1], n=0), "n=0"),
        (dict(prompts=[[1] * 250], keys=[1], n=1), "lower max_completion_length to 6"),
    ],
)
def test_bad_calls_are_refused(model, tokenizer, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(model, tokenizer).generate(sampling=Sampling(20), **arguments)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(max_new_tokens=1, temperature=0.0), "greedy=True"),
        (dict(max_new_tokens=1, top_p=0.0), "top_p=0.0"),
    ],
)
def test_bad_sampling_is_refused(values, name) -> None:
    with pytest.raises(ValueError, match=name):
        Sampling(**values)
