"""``python -m rlkit figures``: PNG files for studies that ran where no Chromium was installed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlkit import paths
from rlkit.display import regenerate


def main(argv: Sequence[str] | None = None) -> int:
    """Draw NAME.png beside every NAME.json; without Chromium that is said and nothing fails."""
    parser = argparse.ArgumentParser(prog="rlkit figures", description=(__doc__ or "").strip())
    parser.add_argument("folder", nargs="?", type=Path, help="default: figures/")
    folder = parser.parse_args(argv).folder or paths.figures_dir()
    if not folder.is_dir():
        print(f"error: {folder} is not a folder", file=sys.stderr)
        return 2
    try:
        drawn = regenerate(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(drawn)} of {len(list(folder.glob('*.json')))} figures drawn in {folder.name}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
