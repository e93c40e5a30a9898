"""The engine's interface, stop texts, number formats and random streams.

That tokens and log-probabilities are right is tested in ``test_engine_exact.py``.
"""

import numpy as np
import pytest
import torch
from tiny import grouped_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.cache_utils import DynamicLayer

from rlkit.decode import GrowingLayer, ModuleDecoder, make_decoder
from rlkit.engine import (
    Engine,
    GenerationError,
    Sampling,
    pick_tokens,
    row_streams,
    stable_key,
    uniforms,
)
from rlkit.models import is_plain_qwen2
from rlkit.qwen2_decoder import Qwen2Decoder
from rlkit.stop_texts import StopTexts
from rlkit.tokenizer import build_tokenizer

SMALL = dict(
    vocab_size=142, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2,
)  # fmt: skip
PROMPTS = ["Compute 19+14.", "Evaluate 47+85-19+62-38.", "Compute 1."]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """Random weights with grouped-query attention; large enough logits to have clear winners."""
    return grouped_model(tokenizer, positions=256, spread=0.3)


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in texts]


def test_plain_qwen2_uses_the_fused_decoder(model) -> None:
    assert isinstance(make_decoder(model), Qwen2Decoder)


def test_whatever_differs_from_the_textbook_runs_its_own_forward_pass(tokenizer) -> None:
    for change in (
        dict(hidden_act="gelu"),
        dict(use_sliding_window=True, sliding_window=8, max_window_layers=0),
        dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    ):
        other = Qwen2ForCausalLM(Qwen2Config(**{**SMALL, **change}))
        assert not is_plain_qwen2(other), change
        assert isinstance(make_decoder(other), ModuleDecoder)
    plain = Qwen2ForCausalLM(Qwen2Config(**SMALL))
    assert is_plain_qwen2(plain)
    plain.model.layers[0].mlp.down_proj = torch.nn.Sequential(plain.model.layers[0].mlp.down_proj)
    assert not is_plain_qwen2(plain)


def test_rollout_is_the_same_alone_and_in_any_batch(model, tokenizer) -> None:
    prompts = ids_of(tokenizer, PROMPTS)
    engine = Engine(model, tokenizer)
    sampling = Sampling(max_new_tokens=30)
    together = engine.generate(prompts, sampling, n=6, keys=[1, 2, 3])
    small = Engine(model, tokenizer, max_rows=4).generate(prompts, sampling, n=6, keys=[1, 2, 3])
    assert [[c.token_ids for c in g] for g in together] == [[c.token_ids for c in g] for g in small]
    alone = engine.generate(prompts[1:2], sampling, n=1, keys=[2], first_sample=4)
    assert alone[0][0].token_ids == together[1][4].token_ids


@pytest.mark.parametrize(("most", "n"), [(1, 3), (4, 6), (5, 2), (7, 7), (100, 6)])
def test_no_more_rows_are_decoded_at_once_than_allowed(
    model, tokenizer, monkeypatch, most: int, n: int
) -> None:
    """Also where one group alone is larger. Equal prompts are read once; groups stay whole."""
    read, held = [], []

    class Watched(Qwen2Decoder):
        def read(self, chunks):
            read.append([tuple(chunk) for chunk in chunks])
            return super().read(chunks)

        def step(self, tokens):
            held.append(len(tokens))
            return super().step(tokens)

    monkeypatch.setattr("rlkit.engine.make_decoder", Watched)
    first, second = ids_of(tokenizer, PROMPTS[:2])
    prompts, keys = [first, second, first], [1, 2, 3]
    groups = Engine(model, tokenizer, max_rows=most).generate(prompts, Sampling(9), n=n, keys=keys)
    assert [len(group) for group in groups] == [n] * 3
    assert max(held) == min(most - most % n or most, 3 * n)
    assert all(len(set(chunks)) == len(chunks) for chunks in read)
    monkeypatch.undo()
    free = Engine(model, tokenizer).generate(prompts, Sampling(9), n=n, keys=keys)
    assert [[c.token_ids for c in g] for g in groups] == [[c.token_ids for c in g] for g in free]


def test_a_cache_that_grows_holds_what_dynamic_layer_holds() -> None:
    """And is moved a few times only, not at every token."""
    rng = torch.Generator().manual_seed(0)
    ours, theirs = GrowingLayer(), DynamicLayer()
    rows, buffers = 3, set()
    for number in range(200):
        new = [torch.randn(rows, 2, 5 if number == 0 else 1, 4, generator=rng) for _ in "kv"]
        found, expected = ours.update(*new), theirs.update(*new)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length() == number + 5
        buffers.add(ours.buffers["keys"].data_ptr())
        if number in (0, 60, 61, 150):
            kept = torch.tensor([0, 0, 1, 2, 2] if number == 0 else range(rows - 1))
            rows = len(kept)
            for layer in (ours, theirs):
                layer.batch_select_indices(kept)
    # 10 slots, moved once for each of the four selections and as often as 205 needs doubling.
    assert len(buffers) <= 1 + 4 + 5


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


def test_every_end_token_of_the_model_ends_a_response(tokenizer) -> None:
    """Instruct models name two in their generation config."""
    other = grouped_model(tokenizer, positions=64, spread=0.3)
    more = tokenizer("7")["input_ids"][0]
    other.generation_config.eos_token_id = [tokenizer.eos_token_id, more]
    groups = Engine(other, tokenizer).generate(
        ids_of(tokenizer, PROMPTS), Sampling(12, temperature=3.0), n=64, keys=[1, 2, 3]
    )
    ended = [c.token_ids[-1] for group in groups for c in group if c.stop == "eos"]
    assert set(ended) == {tokenizer.eos_token_id, more}
    assert not any(more in c.token_ids[:-1] for group in groups for c in group)


@pytest.mark.parametrize("greedy", [True, False])
def test_a_broken_model_is_refused(tokenizer, greedy) -> None:
    broken = grouped_model(tokenizer, positions=64, spread=0.3)
    with torch.no_grad():
        broken.model.norm.weight[3] = float("nan")
    with pytest.raises(GenerationError, match=r"NaN.*earlier checkpoint"):
        Engine(broken, tokenizer).generate([[5, 6]], Sampling(4, greedy=greedy), n=2, keys=[1])


def test_prefill_is_shown_in_the_text_but_not_generated(model, tokenizer) -> None:
    engine = Engine(model, tokenizer)
    prompt = tokenizer("Compute 19+14.<think>")["input_ids"]
    (plain,) = engine.generate([prompt], Sampling(6, greedy=True), n=1, keys=[0])[0]
    (shown,) = engine.generate(
        [prompt], Sampling(6, greedy=True), n=1, keys=[0], prefill="<think>"
    )[0]
    assert shown.token_ids == plain.token_ids
    assert shown.text == "<think>" + plain.text


def test_a_response_ends_with_the_token_that_completes_a_stop_text(model, tokenizer) -> None:
    """Same tokens as without, cut at the first place where the decoded text holds a stop."""
    engine = Engine(model, tokenizer)
    prompts, keys = ids_of(tokenizer, PROMPTS), [1, 2, 3]
    free = [c for g in engine.generate(prompts, Sampling(60), n=32, keys=keys) for c in g]
    texts = [c.text for c in free]
    # Stops of one, two and three tokens that occur, taken from the responses themselves.
    stop = (texts[0][7], texts[1][3:5], tokenizer.decode(list(free[2].token_ids[10:13])))
    sampling = Sampling(60, stop=stop)
    cut = [c for g in engine.generate(prompts, sampling, n=32, keys=keys) for c in g]
    early = 0
    for whole, short in zip(free, cut, strict=True):
        ids = list(whole.token_ids)
        ends = [
            t for t in range(1, len(ids) + 1) if any(s in tokenizer.decode(ids[:t]) for s in stop)
        ]
        expected = ids[: ends[0]] if ends else ids
        assert list(short.token_ids) == expected
        assert short.stop == ("eos" if ends else whole.stop)
        if ends and expected[-1] != tokenizer.eos_token_id:
            assert any(s in short.text for s in stop), "the text keeps the stop"
            early += 1
    assert early > 20


def test_a_stop_text_in_the_prompt_or_across_its_end_does_not_count(model, tokenizer) -> None:
    engine = Engine(model, tokenizer)
    (free,) = engine.generate([[5, 6]], Sampling(4, greedy=True), n=1, keys=[0])[0]
    first = tokenizer.decode([free.token_ids[0]])
    prompt_end = tokenizer.decode([6])
    for stop in (prompt_end + first, tokenizer.decode([5, 6])):
        assert stop not in free.text
        sampling = Sampling(4, greedy=True, stop=(stop,))
        (found,) = engine.generate([[5, 6]], sampling, n=1, keys=[0])[0]
        assert found.token_ids == free.token_ids


def test_stop_texts_of_another_call_are_not_remembered(model, tokenizer) -> None:
    engine = Engine(model, tokenizer)
    (free,) = engine.generate([[5, 6]], Sampling(8, greedy=True), n=1, keys=[0])[0]
    for place in (1, 3):
        stop = tokenizer.decode([free.token_ids[place]])
        sampling = Sampling(8, greedy=True, stop=(stop,))
        (found,) = engine.generate([[5, 6]], sampling, n=1, keys=[0])[0]
        assert found.text == free.text[: free.text.index(stop) + len(stop)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a few of several bytes that begin or end inside a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    merges = [("Ċ", "Ċ"), ("x", "Ã"), ("Ġ", "b")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("one\n\ntwo", "\n\n"),
        ("one\n\n\ntwo", "\n\n\n"),
        ("caffè é la", "é"),
        ("axé b c", "é b"),
        ("日本語", "本"),
        ("end: b", " b"),
        ("a b ", "b "),
    ],
)
def test_stop_texts_are_found_wherever_tokens_cut_them(text, stop) -> None:
    tokenizer = byte_tokenizer()
    finder = StopTexts((stop,), tokenizer, len(tokenizer) + 3)
    ids = tokenizer(text)["input_ids"]
    ends = [t for t in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:t])]
    for t in range(1, ends[0] + 1):
        tail = ids[max(0, t - finder.window) : t]
        assert (bool(finder.may_end[ids[t - 1]]) and finder.found(tail)) == (t == ends[0])


def test_a_stop_text_after_a_character_that_a_byte_fallback_gives_up() -> None:
    """Such decoders turn a whole run of bytes into U+FFFD if its first character is cut."""
    vocab = {f"<0x{i:02X}>": i for i in range(256)}
    vocab |= {text: 256 + i for i, text in enumerate(["<unk>", "<end>", "a", "b", "?"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<end>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", pad_token="<end>", unk_token="<unk>"
    )
    finder = StopTexts(("\n",), tokenizer, len(tokenizer))
    for text in ("本?本本\nb", "a本\n", "é\n", "本本本\n"):
        ids = [i for c in text for i in ([vocab[c]] if c in vocab else list(c.encode()))]
        assert tokenizer.decode(ids) == text
        end = ids.index(10) + 1
        for t in range(1, end + 1):
            found = finder.may_end[ids[t - 1]] and finder.found(ids[max(0, t - finder.window) : t])
            assert bool(found) == (t == end), (text, t)


@pytest.mark.parametrize("decoder", [Qwen2Decoder, ModuleDecoder])
def test_generation_in_bfloat16_leaves_the_model_in_float32(
    model, tokenizer, decoder, monkeypatch
) -> None:
    monkeypatch.setattr("rlkit.engine.make_decoder", decoder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = Engine(model, tokenizer, dtype=torch.bfloat16)
    prompts = ids_of(tokenizer, PROMPTS)
    groups = engine.generate(prompts, Sampling(24), n=4, keys=[1, 2, 3])
    errors, usual = [], []
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            ids = torch.tensor([[*prompt, *completion.token_ids]])
            assert completion.token_ids and ids.min() >= 0 and ids.max() < len(tokenizer)
            scores = []
            for bfloat16 in (False, True):
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                    logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
                scores.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0])
            errors.append((torch.tensor(completion.logprobs) - scores[0]).abs())
            usual.append((scores[1] - scores[0]).abs())
    error, expected = torch.cat(errors), torch.cat(usual)
    assert error.max() > 1e-4, "not computed in bfloat16"
    # As far from float32 as the autocast pass of transformers is.
    assert 0.5 * expected.mean() < error.mean() < 1.5 * expected.mean()
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name])


def test_draws_may_have_a_number_for_each_stream() -> None:
    streams = row_streams([3, 4], 3, 0)
    numbers = np.array([0, 5, 2, 0, 5, 900])
    each = uniforms(streams, numbers)
    assert each.tolist() == [uniforms(streams, int(t))[i] for i, t in enumerate(numbers)]


def test_uniform_draws_are_uniform_and_independent() -> None:
    streams = row_streams([stable_key(0, "train", s, "p") for s in range(500)], 4, 0)
    draws = np.stack([uniforms(streams, t) for t in range(50)])
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 4 / np.sqrt(12 * draws.size)
    for a, b in ((draws[:-1], draws[1:]), (draws[:, :-1], draws[:, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)


def test_stable_key_is_fixed_for_ever() -> None:
    assert stable_key(0, "train", 1, "chain:1+2") == 5308312154548278928


def test_draws_are_fixed_for_ever() -> None:
    """Published rollouts can be made again only with these very numbers."""
    streams = row_streams([stable_key(0, "train", 1, "chain:1+2")], 2, first_sample=3)
    assert streams.tolist() == [1202376975228208299, 16096974290992741967]
    assert uniforms(streams, 0).tolist() == [0.5202285117537683, 0.3640571184134457]
    assert uniforms(streams, 700).tolist() == [0.34877011897276045, 0.8615013523063287]


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


def test_logprobs_are_of_the_policy_that_the_trainer_scores() -> None:
    """Tempered, but before the nucleus cut; greedy decoding knows no temperature."""
    logits = torch.tensor([[1.0, 0.5, -1.0, -2.0]]).repeat(500, 1)
    draws = uniforms(row_streams(list(range(500)), 1, 0), 0)
    for top_p in (1.0, 0.7):
        tokens, logprobs = pick_tokens(logits, Sampling(1, temperature=1.7, top_p=top_p), draws)
        assert torch.allclose(logprobs, (logits[0] / 1.7).log_softmax(-1)[tokens])
        assert len(set(tokens.tolist())) == (4 if top_p == 1 else 2)
    tokens, logprobs = pick_tokens(logits, Sampling(1, temperature=1.7, greedy=True), draws)
    assert torch.allclose(logprobs, logits[0].log_softmax(-1)[0].expand(500))
    assert set(tokens.tolist()) == {0}


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
        (dict(prompts=[[1] * 256], keys=[1], n=1), "256 positions; leave the prompt out"),
    ],
)
def test_bad_calls_are_refused(model, tokenizer, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(model, tokenizer).generate(sampling=Sampling(20), **arguments)


def test_room_for_no_row_is_refused(model, tokenizer) -> None:
    with pytest.raises(ValueError, match="max_rows=0"):
        Engine(model, tokenizer, max_rows=0)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(max_new_tokens=1, temperature=0.0), "greedy=True"),
        (dict(max_new_tokens=1, top_p=0.0), "top_p=0.0"),
        (dict(max_new_tokens=1, stop="###"), "stop='###'"),
        (dict(max_new_tokens=1, stop=("",)), "non-empty strings"),
    ],
)
def test_bad_sampling_is_refused(values, name) -> None:
    with pytest.raises(ValueError, match=name):
        Sampling(**values)
