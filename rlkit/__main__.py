"""``python -m rlkit <command>``: study, diagnose, publish, ..."""

from __future__ import annotations

import importlib
import sys

from rlkit.parameters import describe_unknown

COMMANDS = {
    "study": ("rlkit.study", "run the numbered notebooks as one study"),
    "diagnose": ("rlkit.diagnostics", "say whether the reward of a run is being gamed"),
    "publish": ("rlkit.publish", "copy a finished study's outputs and figures into the tree"),
    "figures": ("rlkit.redraw", "draw the PNG of every figure again from its JSON"),
    "readme": ("rlkit.results", "write the published results into README.md"),
    "doctor": ("rlkit.doctor", "say how well this host can cage model-written code"),
    "pretrain": ("rlkit.pretrain", "rebuild the embedded models and print their entry gate"),
}


def main(argv: list[str]) -> int:
    """Hand the arguments to the module of the command; only that one is imported."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m rlkit <command> [options]; every command has --help\n")
        print("\n".join(f"  {name:9} {text}" for name, (_, text) in COMMANDS.items()))
        return 0
    if argv[0] not in COMMANDS:
        print(f"error: {describe_unknown('command', argv[0], COMMANDS)}", file=sys.stderr)
        return 2
    return int(importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
