"""Load a policy: an embedded model, a folder, the result of a run, or a model of the hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
)
from transformers.utils import logging as hf_logging

from rlkit import runs
from rlkit.checks import did_you_mean
from rlkit.config import ModelConfig
from rlkit.paths import data_dir, root

if TYPE_CHECKING:
    from peft import PeftModel

    Policy = PreTrainedModel | PeftModel
else:
    Policy = "PreTrainedModel | PeftModel"

PROBE = "<think>19+14=33\nWait, 2 * 3</think>" + r"\boxed{33}"
"""Text that a usable tokenizer returns unchanged after encoding and decoding."""

RUN = "run:"
"""Prefix of a model that is the result of a run: ``run:03_rl-base-s0``."""

# What save_pretrained writes as tokenizer_class for a tokenizer that is defined by its file alone.
_FILE_DEFINED = ("PreTrainedTokenizerFast", "TokenizersBackend")
DEFINING = (
    "adapter_config.json", "chat_template.jinja", "config.json", "generation_config.json",
    "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.json",
)  # fmt: skip
"""Files that decide, with the weights, what a model folder samples; its card does not."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


class ModelError(ValueError):
    """A model that cannot be trained or sampled; the text names the folder and the fix."""


def load_policy(
    config: ModelConfig, *, chat_template: bool = True
) -> tuple[Policy, PreTrainedTokenizerBase]:
    """Load the model in evaluation mode and its tokenizer (left padding, pad and end token set).

    Weights are float32 unless LoRA is used with ``dtype="bfloat16"``: full training keeps float32
    master weights under bfloat16 autocast, while frozen LoRA base weights need no such care. A
    checkpoint that holds a LoRA adapter is merged into its base first, so training (and the KL
    reference) starts from the adapted weights.

    Args:
        config: which model, and what of it is trained.
        chat_template: require one; plain-text prompt templates do without.

    Raises:
        ModelError: unknown name, a missing or unusable part of the folder, no chat template.
    """
    source, local = _locate(config.model)
    revision = None if local else config.model_revision
    if local:
        _check_folder(Path(source))
    tokenizer = load_tokenizer(source, revision, chat_template=chat_template)
    frozen_bf16 = config.lora_rank > 0 and config.dtype == "bfloat16" and torch.cuda.is_available()
    dtype = torch.bfloat16 if frozen_bf16 else torch.float32
    model = _load_weights(source, revision, dtype)
    _align(model, tokenizer, config.model)
    policy = _add_lora(model, config) if config.lora_rank > 0 else model
    return policy.eval(), tokenizer


def load_tokenizer(
    source: str, revision: str | None = None, *, chat_template: bool = True
) -> PreTrainedTokenizerBase:
    """Load and check a tokenizer; ``revision`` is used for hub names only.

    AutoTokenizer replaces a tokenizer that is defined by its tokenizer.json alone by the one of
    the model type, which changes the tokens without a word (transformers 5.17); such a folder is
    loaded by its file and compared with it.

    Raises:
        ModelError: no tokenizer, no chat template, no end token, or text does not round-trip.
    """
    folder = Path(source)
    try:
        if folder.is_dir() and _tokenizer_class(folder) in _FILE_DEFINED:
            tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(source)
            expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROBE).ids
            if tokenizer(PROBE, add_special_tokens=False)["input_ids"] != expected:
                raise ModelError(f"the tokenizer of {source!r} differs from its tokenizer.json")
        else:
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main")
    except (OSError, json.JSONDecodeError) as error:
        raise ModelError(f"{source!r} has no usable tokenizer: {error}") from error
    if chat_template and not tokenizer.chat_template:
        raise ModelError(
            f"{source!r} has no chat template, so prompts cannot be built. Add chat_template.jinja "
            "to the folder, or use a plain-text prompt template (template='zero_short')."
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{source!r} has no end token: set eos_token in tokenizer_config.json.")
    text = tokenizer.decode(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    if text != PROBE:
        raise ModelError(
            f"the tokenizer of {source!r} turns {PROBE!r} into {text!r}: rewards would read "
            "another text than the model wrote. Check tokenizer_class in tokenizer_config.json."
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars for reading and writing weights; they clutter notebooks and logs."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def fingerprint(config: ModelConfig) -> str:
    """Short hash of a folder's weights, configuration and tokenizer, to tell a rebuilt model.

    Of weights above 200 MB only names and sizes count; a hub name gives "" (its revision says it).

    Raises:
        ModelError: unknown name.
    """
    source, local = _locate(config.model)
    if not local:
        return ""
    weights = sorted(Path(source).glob("*.safetensors"))
    small = sum(path.stat().st_size for path in weights) <= 200 * 2**20
    others = (path for name in DEFINING for path in Path(source).glob(name))
    digest = hashlib.sha256()
    for path in [*weights, *sorted(others)]:
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        if small or path not in weights:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def is_plain_qwen2(model: object) -> bool:
    """Whether a model's forward pass is exactly the textbook Qwen2: what our own code computes.

    No subclass (it may change the pass), no adapters or quantized weights, no window, no scaled
    rotary positions, no other activation.
    """
    if type(model) is not Qwen2ForCausalLM:
        return False
    linear = [model.lm_head]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        linear += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linear += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return (
        all(type(module) is nn.Linear for module in linear)
        and all(kind == "full_attention" for kind in model.config.layer_types or ())
        and model.config.hidden_act == "silu"
        and model.model.rotary_emb.rope_type == "default"
    )


def hub_commit(model: Policy) -> str | None:
    """The hub commit that the weights came from; None for a folder."""
    commit = getattr(model.config, "_commit_hash", None)
    return str(commit) if commit else None


def _locate(name: str) -> tuple[str, bool]:
    """(folder or hub name, whether it is a folder)."""
    if name.startswith(RUN):
        return str(runs.final_checkpoint(name.removeprefix(RUN))), True
    shipped = data_dir() / "models"
    for folder in (shipped / name, Path(name), root() / name):
        if folder.is_dir():
            return str(folder), True
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return name, False
    names = sorted(path.name for path in shipped.glob("*") if path.is_dir())
    raise ModelError(
        f"model={name!r} is neither a shipped model, a folder, a finished run ('run:name'), nor a "
        "hub name like 'owner/name'. "
        + (did_you_mean(name, names) if names else "Build the shipped models: rlkit pretrain.")
    )


def _check_folder(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    for need, what in (
        (("config.json", "adapter_config.json"), "configuration"),
        (_WEIGHTS, "weights"),
        (("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    ):
        if not names.intersection(need):
            raise ModelError(
                f"model folder {folder.name!r} has no {what}: expected one of {', '.join(need)}. "
                "Save model and tokenizer with save_pretrained into the same folder."
            )


def _load_weights(source: str, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    adapter = Path(source) / "adapter_config.json"
    if adapter.exists():
        from peft import PeftModel

        base = str(json.loads(adapter.read_text())["base_model_name_or_path"])
        model = _load_weights(_locate(base)[0], None, dtype)
        merged = PeftModel.from_pretrained(model, source).merge_and_unload()
        return merged.requires_grad_(True)  # peft had frozen the base
    try:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(
                source, revision=revision or "main", dtype=dtype
            )
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the weights of {source!r} cannot be loaded: {error}") from error


def _tokenizer_class(folder: Path) -> str:
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return ""
    return str(json.loads(path.read_text()).get("tokenizer_class", ""))


def _align(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Make model and tokenizer agree on special tokens; the model's own end tokens are kept."""
    rows = model.config.vocab_size
    if len(tokenizer) > rows:
        raise ModelError(
            f"model={name!r}: the tokenizer has {len(tokenizer)} tokens, the model {rows} "
            "embeddings; they do not belong together"
        )
    declared = model.generation_config.eos_token_id
    ends = declared if isinstance(declared, list) else [] if declared is None else [declared]
    ends = list(dict.fromkeys([int(tokenizer.eos_token_id), *ends]))
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = ends


def _add_lora(model: PreTrainedModel, config: ModelConfig) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # annotated int, used as a number
        lora_dropout=0.0,  # dropout would make the scored policy differ from the sampled one
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, lora)
    # A name, not this machine's path, so that the saved adapter finds its base elsewhere.
    wrapped.peft_config["default"].base_model_name_or_path = config.model
    return wrapped
