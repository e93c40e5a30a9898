"""What all tests share. One thread: matrices this small gain nothing from two, and lose much where
other processes want the cores. Set before torch is imported, so that child processes do the same.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a two-layer model with random weights; read only."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True, scope="module")
def _small_heap() -> Iterator[None]:
    """Trainer collects garbage at each start; objects of earlier imports need not be walked."""
    gc.freeze()
    yield
    gc.unfreeze()
