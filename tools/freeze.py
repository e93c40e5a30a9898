"""Print the versions installed here as constraints: ``python tools/freeze.py > constraints.txt``.

Local versions (``+cpu``), addresses and paths are left out, so the file is valid on any machine,
and so is the project itself.
"""

from __future__ import annotations

import re
from importlib.metadata import distributions

HEADER = """\
# Versions that passed all tests together (Python 3.11, Linux). Set-up installs exactly these.
# Written by: python tools/freeze.py > constraints.txt
"""
LEFT_OUT = {"rlkit", "pip", "setuptools", "wheel"}


def constraints(installed: dict[str, str]) -> str:
    """``name==version`` lines, sorted, with public versions only."""
    lines = [
        f"{name}=={version.partition('+')[0]}"
        for name, version in sorted(installed.items())
        if name not in LEFT_OUT
    ]
    return HEADER + "\n".join(lines) + "\n"


def normalised(name: str) -> str:
    """The name as package indexes spell it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    print(constraints({normalised(d.name): d.version for d in distributions()}), end="")
