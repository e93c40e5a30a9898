"""Where the repository keeps things; every path in the package starts here.

papermill runs in the caller's folder while nbval and JupyterLab run in the notebook's own, so a
relative path would mean three different places.
"""

import os
from pathlib import Path


def root() -> Path:
    """The repository root (the folder that holds ``rlkit/``, ``data/`` and ``notebooks/``)."""
    return Path(__file__).resolve().parent.parent


def data_dir() -> Path:
    """``data/``: shipped models, frozen problem splits, values of the paper."""
    return root() / "data"


def runs_dir() -> Path:
    """Run folders: ``$RLKIT_RUNS`` if set, else ``runs/`` under the repository."""
    configured = os.environ.get("RLKIT_RUNS")
    return Path(configured) if configured else root() / "runs"


def studies_dir() -> Path:
    """Study folders (executed notebooks, state): ``$RLKIT_STUDIES``, else ``studies/``."""
    configured = os.environ.get("RLKIT_STUDIES")
    return Path(configured) if configured else root() / "studies"


def figures_dir() -> Path:
    """Where figures are written: ``$RLKIT_FIGURES`` if set, else ``figures/``."""
    configured = os.environ.get("RLKIT_FIGURES")
    return Path(configured) if configured else root() / "figures"
