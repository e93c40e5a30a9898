"""``python -m rlkit doctor``: what this host offers to model-written code, and what it lacks."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Sequence

from rlkit.sandbox import Info, IsolationError, PythonExecutor
from rlkit.sandbox.cage import landlock_abi

MEANING = {
    "A": "own namespaces, landlock, system-call filter, limits",
    "B": "landlock, system-call filter, limits; each child a user of its own; file names visible",
    "C": "landlock, system-call filter, limits; file names visible",
    "D": "no landlock in this kernel",
}
LAYERS = {
    "namespaces": "files, processes and network of their own (bubblewrap)",
    "uid": "each child a user of its own (needs root)",
    "chroot": "an empty root folder (needs root)",
    "landlock": "no file but the interpreter's libraries, no TCP, no signals to others",
    "seccomp": "only harmless system calls",
    "rlimits": "CPU, memory, stack, descriptors",
}


def host() -> dict[str, str]:
    """Facts about this machine that decide about isolation, by name."""
    user = "root" if os.geteuid() == 0 else f"user {os.geteuid()}"
    abi = landlock_abi()
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "kernel": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "runs as": f"{user}, {len(os.sched_getaffinity(0))} usable cores",
        "landlock": f"version {abi}" if abi else "none (Linux 5.13 or newer, lsm=landlock at boot)",
        "bubblewrap": shutil.which("bwrap") or "not installed (apt-get install bubblewrap)",
    }


def report(info: Info) -> list[str]:
    """Lines about the isolation that holds here, and why nothing stronger does."""
    lines = [f"level {info.level}: {MEANING[info.level]}"]
    for layer, meaning in LAYERS.items():
        lines.append(f"  {'yes' if layer in info.layers else ' no'}  {layer:10} {meaning}")
    lines.append(f"  names and sizes of files {'hidden' if info.hides_names else 'visible'}")
    lines += [f"not taken: {why}" for why in info.rejected]
    return lines


def main(argv: Sequence[str]) -> int:
    """Print the facts, the level, and one run; 1 if code can only run where it reads files."""
    parser = argparse.ArgumentParser(prog="python -m rlkit doctor", description=__doc__)
    parser.parse_args(argv)
    print("\n".join(f"{name:10}  {value}" for name, value in host().items()) + "\n")
    try:
        with PythonExecutor(isolation="D", allow_degraded=True) as executor:
            print("\n".join(report(executor.info)))
            result = executor.run("import sympy\nx = sympy.Symbol('x')\nsympy.solve(x**2 - 2)")
    except IsolationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\nsympy.solve(x**2 - 2) in a fresh child: {result.echo} ({result.wall_seconds:.3f} s)")
    return 0 if executor.info.level != "D" or executor.info.hides_names else 1
