"""Changes to TRL's behaviour that need a patch, each in a context that undoes it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import trl.trainer.utils as trl_utils


@contextlib.contextmanager
def completion_only_head() -> Iterator[None]:
    """Make TRL's fused LM head score only completion positions on CPU, as it does on GPUs.

    Off CUDA, TRL 1.16 projects every position, prompts and padding included, because that suits
    compilers with static shapes (trl/trainer/utils.py, ``_fused_forward``). Values are identical.
    """
    name = "_use_triton"
    original = getattr(trl_utils, name, None)
    if original is None:
        warnings.warn(
            "trl.trainer.utils._use_triton is gone: this TRL version may score every position on "
            "CPU, which is slower but correct. Look at _fused_forward.",
            stacklevel=2,
        )
        yield
        return
    setattr(trl_utils, name, lambda device: True)
    try:
        yield
    finally:
        setattr(trl_utils, name, original)
