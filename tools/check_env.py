"""Check environment.yml without conda: ``python tools/check_env.py [environment.yml]``.

Keys, channels and conda specs are checked offline; the pip block is resolved by pip as conda would
do it (from a file beside environment.yml). It cannot prove that conda-forge itself solves.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import yaml
from packaging.specifiers import SpecifierSet
from rattler import MatchSpec, Version, VersionSpec
from rattler.exceptions import InvalidMatchSpecError

KEYS = {"name", "channels", "dependencies"}
CHANNELS = ["conda-forge", "nodefaults"]
_MINORS = range(6, 30)
_NO_NETWORK = ("Connection", "Temporary failure in name resolution", "timed out")


class NoNetworkError(RuntimeError):
    """pip could not reach its index, so nothing is known about the pip block."""


def offline_problems(content: Any, requires_python: str) -> list[str]:
    """What is wrong with the parsed file as far as can be told without a network.

    Args:
        content: the parsed YAML.
        requires_python: the ``requires-python`` of pyproject.toml, such as ``>=3.11``.
    """
    if not isinstance(content, dict) or set(content) != KEYS:
        return [f"expected a mapping with exactly the keys {', '.join(sorted(KEYS))}"]
    problems = []
    if content["channels"] != CHANNELS:
        problems.append(f"channels are {content['channels']}; expected {CHANNELS}")
    specs = [entry for entry in content["dependencies"] if isinstance(entry, str)]
    blocks = [entry for entry in content["dependencies"] if not isinstance(entry, str)]
    if len(blocks) != 1 or set(blocks[0]) != {"pip"} or not blocks[0]["pip"]:
        problems.append("expected exactly one block 'pip:' with at least one line")
    matches: dict[str, MatchSpec] = {}
    for spec in specs:
        try:
            match = MatchSpec(spec, strict=True)
        except InvalidMatchSpecError as error:
            problems.append(f"conda spec {spec!r}: {error}")
            continue
        if match.build is not None:
            problems.append(f"conda spec {spec!r} pins a build, which ties it to one platform")
        matches[re.split(r"[^\w.-]", spec, maxsplit=1)[0]] = match
    if "pip" not in matches:
        problems.append("'pip' is not among the conda specs, so conda would add it with a warning")
    if "python" not in matches:
        problems.append("'python' is not among the conda specs")
    else:
        problems += _python_problems(matches["python"], requires_python)
    return problems


def _python_problems(python: MatchSpec, requires_python: str) -> list[str]:
    wanted = SpecifierSet(requires_python)
    spec = VersionSpec(python.version or "*")
    candidates = [f"3.{minor}.0" for minor in _MINORS]
    allowed = [version for version in candidates if spec.matches(Version(version))]
    if not allowed:
        return [f"conda spec {python} matches no Python 3"]
    bad = [version for version in allowed if version not in wanted]
    return [f"conda spec {python} allows {v}; requires-python: {requires_python}" for v in bad[:1]]


def resolve_pip(lines: list[str], folder: Path) -> str:
    """Why pip cannot resolve ``lines`` in ``folder``, or an empty text if it can.

    Raises:
        NoNetworkError: the index could not be reached.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".txt", dir=folder) as requirements:
        requirements.write("\n".join(lines) + "\n")
        requirements.flush()
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--upgrade"]
        done = subprocess.run(
            [*command, "--retries", "1", "-r", requirements.name],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode and any(sign in done.stderr for sign in _NO_NETWORK):
        raise NoNetworkError(done.stderr.strip().splitlines()[-1])
    return done.stderr.strip() if done.returncode else ""


def pip_block(content: Any) -> list[str]:
    """The lines of the pip block."""
    [block] = [entry for entry in content["dependencies"] if not isinstance(entry, str)]
    return [str(line) for line in block["pip"]]


def main() -> int:
    """Print what is wrong; exit code 0 if nothing is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("file", nargs="?", type=Path, default=root / "environment.yml")
    file = parser.parse_args().file
    content = yaml.safe_load(file.read_text())
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    problems = offline_problems(content, project["requires-python"])
    if not problems:
        try:
            problems = [text for text in [resolve_pip(pip_block(content), file.parent)] if text]
        except NoNetworkError as error:
            print(f"pip block not checked, no network: {error}")
    print("\n".join(problems) or f"{file.name}: good")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
