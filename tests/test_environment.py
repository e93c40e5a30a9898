"""environment.yml, pyproject.toml and constraints.txt agree and can be installed."""

import copy
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import check_env
import freeze
import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def environment():
    return yaml.safe_load((ROOT / "environment.yml").read_text())


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def resolve(lines: list[str], folder: Path) -> str:
    try:
        return check_env.resolve_pip(lines, folder)
    except check_env.NoNetworkError as error:
        pytest.skip(f"the package index cannot be reached: {error}")


def test_environment_file_is_good(environment):
    assert check_env.offline_problems(environment, PROJECT["requires-python"]) == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("python=3.11", "python=3.9", "requires-python"),
        ("python=3.11", "python>=3.10", "requires-python"),
        ("python=3.11", "python=2.7", "no Python 3"),
        ("python=3.11", "python 3.11.* h123_0", "pins a build"),
        ("python=3.11", "python 3.11 =", "conda spec"),
        ("pip>=24", "pips>=24", "'pip' is not"),
    ],
)
def test_a_wrong_conda_spec_is_named(environment, old, new, complaint):
    environment["dependencies"] = [
        new if entry == old else entry for entry in environment["dependencies"]
    ]
    problems = check_env.offline_problems(environment, PROJECT["requires-python"])
    assert any(complaint in problem for problem in problems), problems


@pytest.mark.parametrize(
    "change",
    [
        {"channels": ["defaults"]},
        {"prefix": "somewhere"},
        {"dependencies": ["python=3.11", "pip"]},
        {"dependencies": ["python=3.11", "pip", {"pip": []}]},
    ],
)
def test_a_wrong_schema_is_named(environment, change):
    content = copy.deepcopy(environment) | change
    assert check_env.offline_problems(content, PROJECT["requires-python"])


def test_pip_block_resolves(environment):
    assert resolve(check_env.pip_block(environment), ROOT) == ""


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("rlkit-no-such-package-0c1f==1.0", "rlkit-no-such-package-0c1f"),
        ("numpy==0.0.1", "numpy"),
    ],
)
def test_a_pip_block_that_cannot_resolve_fails(tmp_path, line, complaint):
    assert complaint in resolve([line], tmp_path)


def test_every_tested_dependency_is_pinned():
    groups = [PROJECT["dependencies"]]
    groups += [PROJECT["optional-dependencies"][name] for name in ("dev", "slurm", "tasks")]
    for text in [line for group in groups for line in group]:
        requirement = Requirement(text)
        name = freeze.normalised(requirement.name)
        assert name in pinned(), f"{name} has no version in constraints.txt"
        assert pinned()[name] in requirement.specifier, f"{name}: {pinned()[name]}"


def test_constraints_hold_public_versions_only():
    for name, version in pinned().items():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert re.fullmatch(r"[0-9]+(\.[0-9a-z]+)*", version), f"{name}=={version}"


def test_freeze_drops_local_versions_and_the_project():
    text = freeze.constraints({"torch": "2.13.0+cpu", "rlkit": "0.1.0", "abc": "1.0"})
    assert [line for line in text.splitlines() if "==" in line] == ["abc==1.0", "torch==2.13.0"]


def test_setup_names_a_python_that_is_too_old(tmp_path):
    """The script stops with the packages to install; nothing is created."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    old = tmp_path / "python3.8"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(
        [tmp_path / "tools" / "setup.sh"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(old), "VENV": "venv"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Python 3.8.1 is too old" in done.stderr
    assert "apt-get install" in done.stderr
    assert not (tmp_path / "venv").exists()
