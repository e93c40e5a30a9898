"""The reference policy of the KL term: the weights that training starts from, or a later copy.

TRL would load the reference by the model's name, which is another model after SFT in the same
process; so it is copied here, before anything is trained. For LoRA the reference is the model with
its adapter switched off, or, once it can be replaced, a second frozen adapter called ``ref`` (the
name that TRL looks for).
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from rlkit.models import Policy

FILE = "reference.safetensors"
ADAPTER = "ref"


class Reference:
    """A frozen copy of ``policy`` as it is now.

    Args:
        policy: the model in training.
        resets: whether ``reset`` will be called; then LoRA needs a second adapter.

    Attributes:
        model: the copy; None for LoRA, where the policy itself holds its reference.
    """

    def __init__(self, policy: Policy, *, resets: bool) -> None:
        self._policy = policy
        self._resets = resets
        self.model: PreTrainedModel | None = None
        if not isinstance(policy, PeftModel):
            self.model = copy.deepcopy(policy).eval().requires_grad_(False)
        elif resets:
            policy.add_adapter(ADAPTER, policy.peft_config["default"])
            policy.set_adapter("default")
            for name, parameter in policy.named_parameters():
                if f".{ADAPTER}." in name:
                    parameter.requires_grad_(False)
            self.reset()

    def reset(self) -> None:
        """Replace the reference by the present policy."""
        if self.model is not None:
            self.model.load_state_dict(self._policy.state_dict())
        else:
            weights = get_peft_model_state_dict(self._policy, adapter_name="default")
            set_peft_model_state_dict(self._policy, weights, adapter_name=ADAPTER)

    def save(self, folder: Path) -> None:
        """Write the reference, if it can differ from the start, into ``folder``."""
        if self._resets:
            save_file(self._weights(), folder / FILE)

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote."""
        if not self._resets:
            return
        weights = load_file(folder / FILE)
        if self.model is None:
            set_peft_model_state_dict(self._policy, weights, adapter_name=ADAPTER)
            return
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                own[name].copy_(value)

    def _weights(self) -> dict[str, Tensor]:
        # named_parameters gives tied weights once, as safetensors wants them.
        found = (
            dict(self.model.named_parameters())
            if self.model is not None
            else get_peft_model_state_dict(self._policy, adapter_name=ADAPTER)
        )
        return {name: value.detach().contiguous().cpu() for name, value in found.items()}
