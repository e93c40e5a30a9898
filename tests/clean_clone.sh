#!/usr/bin/env bash
# Proves the two commands of the README on a fresh clone with a new virtual environment.
#
#   tests/clean_clone.sh [make test] [make study]     (default: both, study first)
#
# Clones the committed HEAD into an empty folder and runs there with an environment that holds
# nothing but PATH, a new HOME and pip's own settings. Installation is timed apart.
set -uo pipefail

repository=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/home"

# A version manager's shim needs the old HOME: use the interpreter behind it.
python=$(python3 -c 'import sys; print(sys.executable)')
clean=(env -i "HOME=$scratch/home" "PATH=$(dirname "$python"):/usr/local/bin:/usr/bin:/bin"
    LANG=C.UTF-8)
while IFS= read -r setting; do clean+=("$setting"); done \
    < <(env | grep -iE '^(PIP_[A-Z_]+|SSL_CERT_[A-Z]+|https?_proxy|no_proxy)=')
for settings in "${XDG_CONFIG_HOME:-$HOME/.config}/pip/pip.conf" "$HOME/.pip/pip.conf"; do
    [ -z "${PIP_CONFIG_FILE:-}" ] && [ -f "$settings" ] && clean+=("PIP_CONFIG_FILE=$settings")
done

git clone --quiet "$repository" "$scratch/rlkit" || exit 1
cd "$scratch/rlkit" || exit 1
failed=0

step() { # limit in seconds (0: none), then the command
    local limit=$1 begun=$SECONDS took
    shift
    if ! "${clean[@]}" "$@" >"$scratch/log" 2>&1; then
        tail -n 40 "$scratch/log"
        echo "FAIL  $*  (after $((SECONDS - begun)) s)"
        failed=1
        return
    fi
    took=$((SECONDS - begun))
    if [ "$limit" -gt 0 ] && [ "$took" -gt "$limit" ]; then
        echo "FAIL  $*  took $took s; at most $limit s expected"
        failed=1
    else
        echo "PASS  $*  $took s"
    fi
}

step 0 make setup
step 5 make setup # a second call starts at once
[ -n "$(git status --porcelain)" ] && { echo "FAIL  set-up changed the tree"; failed=1; }
commands=("$@")
[ ${#commands[@]} -eq 0 ] && commands=("make study" "make test")
for command in "${commands[@]}"; do
    case $command in
        *study*) limit=480 ;;
        *) limit=900 ;;
    esac
    # shellcheck disable=SC2086  # the words of a command
    step "$limit" $command
done
if [ -n "$(git status --porcelain)" ]; then
    git status --short
    echo "FAIL  the commands changed tracked files"
    failed=1
fi
[ $failed -eq 0 ] && echo "PASS  clean clone" || echo "FAIL  clean clone"
exit $failed
