"""The packed pass against the padded forward pass of ``transformers``: values and gradients."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlkit import forward, models, tasks, templates
from rlkit.config import ModelConfig
from rlkit.engine import Engine, Sampling

VALUE = 1e-5  # largest difference of a log-probability or an entropy, in nats
GRADIENT = 1e-4  # of each parameter, relative to its norm
PAD = 0

Rows = Sequence[tuple[Sequence[int], Sequence[int]]]
"""(prompt, completion) of each row."""


def random_model(**config: object) -> Qwen2ForCausalLM:
    """Two layers, four heads over two keys and values, untied head; weights large enough to tell
    a wrong mask, position or bias from a right one."""
    settings: dict[str, object] = {
        "vocab_size": 101,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
    }
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**{**settings, **config})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.15)
    return model


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    return random_model()


def padded(rows: Rows) -> tuple[Tensor, Tensor, int]:
    """Ids and mask [rows, prompt width + completion width] as the trainer hands them over."""
    before, after = max(len(p) for p, _ in rows), max(1, *(len(c) for _, c in rows))
    ids = torch.full((len(rows), before + after), PAD)
    mask = torch.zeros_like(ids)
    for i, (prompt, completion) in enumerate(rows):
        span = slice(before - len(prompt), before + len(completion))
        ids[i, span] = torch.tensor([*prompt, *completion])
        mask[i, span] = 1
    return ids, mask, after


def from_transformers(
    model: Qwen2ForCausalLM, ids: Tensor, mask: Tensor, width: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [rows, width] by the definition; padding holds nonsense."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1] / temperature
    logps = logits.log_softmax(-1)
    entropies = -(logps.exp() * logps).sum(-1)
    return logps.gather(-1, ids[:, -width:, None])[..., 0], entropies


def gradients(model: Qwen2ForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    assert all(g is not None for g in found)
    return dict(zip(names, found, strict=True))


def assert_equal_passes(model: Qwen2ForCausalLM, rows: Rows, temperature: float = 1.0) -> None:
    ids, mask, width = padded(rows)
    plan = forward.layout(ids, mask, width, model.lm_head.weight.dtype)
    kept = mask[:, -width:].bool()
    ours = forward.score(model, plan, temperature)
    theirs = from_transformers(model, ids, mask, width, temperature)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, *kept.shape, generator=generator)
    for name, weight, a, b in zip(("logp", "entropy"), weights, ours, theirs, strict=True):
        assert a.shape == kept.shape == b.shape
        assert torch.equal(a[~kept], torch.zeros(int((~kept).sum()))), f"{name} of padding"
        assert (a - b)[kept].abs().max() < VALUE, name
        got = gradients(model, (a * weight)[kept].sum())
        expected = gradients(model, (b * weight)[kept].sum())
        for parameter, value in expected.items():
            assert value.norm() > 0, parameter
            apart = (got[parameter] - value).norm() / value.norm()
            assert apart < GRADIENT, f"d {name} / d {parameter}: {apart:.1e}"


def spread(seed: int, prompts: Sequence[int], lengths: Sequence[int], group: int) -> Rows:
    """Random rows; ``group`` rows share each prompt."""
    draw = random.Random(seed)
    texts = [[draw.randrange(1, 101) for _ in range(n)] for n in prompts]
    return [
        (texts[i // group], [draw.randrange(1, 101) for _ in range(n)])
        for i, n in enumerate(lengths)
    ]


CASES: dict[str, Rows] = {
    "groups": spread(0, [7, 5, 9], [4, 6, 5, 3, 8, 7, 6, 4, 5, 5, 2, 9], 4),
    "all prompts differ": spread(1, [3, 9, 5, 6, 4], [4, 6, 2, 5, 3], 1),
    "only the end token": spread(2, [4, 6], [1, 1, 1, 1], 2),
    "end tokens among others": spread(3, [4, 6], [1, 7, 3, 1], 2),
    "rows without a token": spread(4, [4, 6, 3], [0, 5, 4, 0, 0, 0], 2),
    "one row": spread(5, [6], [5], 1),
    "one row, one token": spread(6, [6], [1], 1),
    "several buckets": spread(7, [5, 30, 12], [40, 1, 2, 19, 9, 35, 4, 60, 3], 3),
    "equal prompts in two groups": spread(8, [6], [3, 5, 4, 2], 4) + spread(8, [6], [3, 5], 2),
    "a prompt that starts another": [([5, 6, 7], [8, 9, 3]), ([5, 6, 7, 8], [9, 3]), ([5], [6, 7])],
    "prompt of one token": spread(9, [1, 1, 8], [5, 1, 3, 0, 6, 2], 2),
    "equal rows": spread(10, [4], [5], 1) * 3,
    "the pad token as text": [([5, PAD, 7], [PAD, 9, 3]), ([5, PAD, 7], [8, PAD])],
}


@pytest.mark.parametrize("rows", CASES.values(), ids=CASES)
def test_equals_the_padded_pass(model: Qwen2ForCausalLM, rows: Rows) -> None:
    assert_equal_passes(model, rows)


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.4])
def test_temperature_divides_the_logits(model: Qwen2ForCausalLM, temperature: float) -> None:
    assert_equal_passes(model, CASES["several buckets"], temperature)


@pytest.mark.parametrize(
    "config",
    [
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"rms_norm_eps": 0.3},
        {"head_dim": 16},
    ],
    ids=str,
)
def test_other_shapes_of_model(config: dict[str, object]) -> None:
    other = random_model(**config)
    assert forward.supports(other)
    assert_equal_passes(other, CASES["groups"], 1.2)


def test_a_window_of_the_embedded_model() -> None:
    """Real prompts, completions sampled by the engine at the temperature they are scored at."""
    policy, tokenizer = models.load_policy(ModelConfig(model="tiny-base"))
    assert forward.supports(policy)
    problems = tasks.load_problems("chain", "train", 4)
    prompts = templates.encode(problems, tokenizer, "question")
    drawn = Engine(policy, tokenizer).generate(
        prompts, Sampling(max_new_tokens=40, temperature=1.2), n=4, keys=range(4)
    )
    rows = [(p, c.token_ids) for p, group in zip(prompts, drawn, strict=True) for c in group]
    assert len({len(c) for _, c in rows}) > 4
    assert_equal_passes(policy, rows, 1.2)  # type: ignore[arg-type]
    ids, mask, width = padded(rows)
    plan = forward.layout(ids, mask, width, torch.float32)
    with torch.no_grad():
        logps, _ = forward.score(policy, plan, 1.2)  # type: ignore[arg-type]
    for row, completion in zip(logps, (c for group in drawn for c in group), strict=True):
        assert completion.logprobs is not None
        sampled = torch.tensor(completion.logprobs)
        assert (row[: len(sampled)] - sampled).abs().max() < VALUE


@pytest.mark.parametrize("rows", CASES.values(), ids=CASES)
def test_each_token_is_computed_once(rows: Rows) -> None:
    ids, mask, width = padded(rows)
    plan = forward.layout(ids, mask, width, torch.float32)
    unique = {tuple(prompt) for prompt, _ in rows}
    expected = sum(map(len, unique)) + sum(max(len(c) - 1, 0) for _, c in rows)
    assert len(plan.ids) == len(plan.positions) == expected
    assert len(plan.sources) == len(plan.targets) == sum(len(c) for _, c in rows)
    assert plan.shape == (len(rows), width)
    queries = [b.queries.flatten()[b.valid] for b in plan.buckets]
    assert torch.equal(torch.cat(queries), torch.arange(expected))  # all, in packed order


def test_buckets_bound_the_padding_of_attention() -> None:
    rows = CASES["several buckets"]
    ids, mask, width = padded(rows)
    plan = forward.layout(ids, mask, width, torch.float32)
    prompts, *completions = plan.buckets
    assert prompts.queries.shape[0] == 3
    assert [b.queries.shape[0] for b in completions] == [3, 1, 1, 2, 1]  # 59 39 34, 18, 8, 3 2, 1
    for bucket in completions:
        real = torch.zeros(bucket.queries.numel(), dtype=torch.bool)
        real[bucket.valid] = True
        own = real.view_as(bucket.queries).sum(1)
        assert own.max() == bucket.queries.shape[1]
        assert own.min() >= forward.SHORTEST * own.max()


def test_no_row_sees_another_row(model: Qwen2ForCausalLM) -> None:
    """Other tokens in one row change the scores of that row alone, to the last bit."""
    rows = [*CASES["several buckets"]]
    for chosen in range(len(rows)):
        prompt, completion = rows[chosen]
        changed = [*rows]
        changed[chosen] = (prompt, [1 + token % 100 for token in completion])
        with torch.no_grad():
            before, after = (
                torch.stack(forward.score(model, forward.layout(*padded(r), torch.float32), 1.0))
                for r in (rows, changed)
            )
        others = [i for i in range(len(rows)) if i != chosen]
        assert torch.equal(before[:, others], after[:, others])
        assert not torch.equal(before[0, chosen], after[0, chosen])


def test_no_token_sees_a_later_one(model: Qwen2ForCausalLM) -> None:
    rows = CASES["several buckets"]
    ids, mask, width = padded(rows)
    with torch.no_grad():
        before, _ = forward.score(model, forward.layout(ids, mask, width, torch.float32), 1.0)
        for place in range(4, 8):
            later = ids.clone()
            later[:, -width + place] = 1 + later[:, -width + place] % 100
            plan = forward.layout(later, mask, width, torch.float32)
            after, _ = forward.score(model, plan, 1.0)
            assert torch.equal(before[:, :place], after[:, :place])
            assert not torch.equal(before[:, place], after[:, place])


def test_what_lies_under_padding_is_never_read(model: Qwen2ForCausalLM) -> None:
    ids, mask, width = padded(CASES["rows without a token"])
    other = ids.where(mask.bool(), torch.full_like(ids, 77))
    with torch.no_grad():
        a, b = (
            torch.stack(forward.score(model, forward.layout(i, mask, width, torch.float32), 1.0))
            for i in (ids, other)
        )
    assert torch.equal(a, b)


def test_a_part_without_any_completion_token_adds_zero(model: Qwen2ForCausalLM) -> None:
    ids, mask, width = padded([([4, 5], []), ([6], [])])
    logps, entropies = forward.score(model, forward.layout(ids, mask, width, torch.float32), 1.0)
    assert torch.equal(logps, torch.zeros(2, 1))
    assert torch.equal(entropies, torch.zeros(2, 1))
    for gradient in torch.autograd.grad(logps.sum(), model.parameters(), allow_unused=True):
        assert gradient is None or not gradient.any()


def test_the_model_is_left_as_it_was(model: Qwen2ForCausalLM) -> None:
    before = copy.deepcopy(model.state_dict())
    ids, mask, width = padded(CASES["groups"])
    forward.score(model, forward.layout(ids, mask, width, torch.float32), 1.0)[0].sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.zero_grad()


class Subclass(Qwen2ForCausalLM):
    pass


def test_only_plain_models_are_supported(model: Qwen2ForCausalLM) -> None:
    assert forward.supports(model)
    assert not forward.supports(Subclass(model.config))
    assert not forward.supports(torch.nn.Linear(2, 2))
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(copy.deepcopy(model), lora)
    assert not forward.supports(wrapped)
    assert not forward.supports(wrapped.base_model.model)  # a plain class with adapters inside
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    assert not forward.supports(random_model(**window))
    assert not forward.supports(random_model(**{**window, "max_window_layers": 1}))
    for kind, more in (
        ("linear", {}),
        ("dynamic", {}),
        ("yarn", {"original_max_position_embeddings": 64}),
    ):
        rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **more}
        assert not forward.supports(random_model(rope_parameters=rope)), kind


def test_weights_in_bfloat16_are_as_exact_as_in_transformers(model: Qwen2ForCausalLM) -> None:
    rng = random.Random(3)
    rows = [
        ([rng.randrange(1, 101) for _ in range(5)], [rng.randrange(1, 101) for _ in range(length)])
        for length in (9, 4, 1)
    ]
    ids, mask, width = padded(rows)
    low = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        exact, _ = from_transformers(model, ids, mask, width, 1.0)
        usual, _ = from_transformers(low, ids, mask, width, 1.0)
        found, _ = forward.score(low, forward.layout(ids, mask, width, torch.bfloat16), 1.0)
    real = mask[:, -width:].bool()
    error, expected = ((x.float() - exact)[real].abs().mean() for x in (found, usual))
    assert 0 < error < 2 * expected
