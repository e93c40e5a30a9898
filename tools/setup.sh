#!/usr/bin/env bash
# Makes the virtual environment with the tested versions. Called by make; PYTHON and VENV are set
# there. Interrupted at any point, the next call finishes the job: the stamp is written last.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

missing() {
    printf 'set-up stopped: %s\n  On Debian or Ubuntu: apt-get install %s\n' "$1" "$2" >&2
    exit 1
}

command -v git >/dev/null || missing "git is not installed (runs record their commit)." "git"
command -v "$PYTHON" >/dev/null ||
    missing "$PYTHON is not installed. Another interpreter: make PYTHON=python3.12 ..." \
        "python3 python3-venv"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    missing "$("$PYTHON" --version) is too old; Python 3.11 or newer is needed (make PYTHON=...)." \
        "python3.11 python3.11-venv"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    missing "$PYTHON cannot make virtual environments." "python3-venv"

if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "Making $VENV with $("$PYTHON" --version)"
    "$PYTHON" -m venv --clear "$VENV"
fi
pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt)
echo "Installing the tested versions into $VENV (once; a few minutes)"
# torch first and alone: the rest then keeps whichever build of it pip finds here.
"${pip[@]}" torch==2.13.0
"${pip[@]}" --editable '.[dev]'
command -v chromium chromium-browser google-chrome google-chrome-stable >/dev/null ||
    echo "No Chromium: figures are stored without PNG (optional: apt-get install chromium)"
touch "$VENV/.installed"
