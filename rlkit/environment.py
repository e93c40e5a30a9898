"""What a run ran on: versions, hardware, code state. Written to env.json of the run folder."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from rlkit.paths import root

PACKAGES = (
    "torch", "transformers", "trl", "accelerate", "peft", "datasets", "tokenizers", "numpy",
    "pandas", "pyarrow", "math-verify", "reasoning-gym", "vllm",
)  # fmt: skip


def describe(**extra: Any) -> dict[str, Any]:
    """Versions, hardware, threads and the state of the code, plus ``extra`` (seed, hub commits).

    Nothing about the user: no host name, user name or path.
    """
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": versions(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": devices,
        **git_state(),
        **extra,
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that can change results."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """Model name of the processor; results are bit-identical only on the same one."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as handle:
            for line in handle:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor()


def git_state() -> dict[str, Any]:
    """Commit of the working tree and whether it was changed; None outside a git checkout."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"git_commit": commit, "git_dirty": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": None, "git_dirty": None}


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root()), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return done.stdout.strip()
