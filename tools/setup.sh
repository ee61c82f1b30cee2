#!/usr/bin/env bash
# Builds .venv from requirements/cpu.lock and installs this checkout into it (editable). `make setup` runs it.
#   PYTHON=python3.11   the interpreter to build .venv with (default: the first suitable one found)
# .venv/.setup-state holds the hash of what .venv was built from, or "unfinished": an unfinished set-up starts over, a changed
# lock or pyproject.toml updates in place, and an unchanged one returns at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv state=.venv/.setup-state log=.venv/setup.log lock=requirements/cpu.lock
key=$(cat "$lock" pyproject.toml tools/setup.sh | sha256sum | cut -d' ' -f1)
[ "$(cat "$state" 2>/dev/null || true)" != "$key" ] || exit 0

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
suitable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null; }

find_python() { # prints the interpreter to use
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3}; do
    if suitable "$candidate"; then
      "$candidate" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$candidate has no venv module (on Debian and Ubuntu: the package python3-venv, or python3.11-venv for python3.11)"
      echo "$candidate" && return
    fi
  done
  die "Python 3.11 to 3.14 is needed: ${PYTHON:-no python3} is not one (choose with PYTHON=/path/to/python3.11)"
}

pip_install() { # pip's words go to the log, a counter to the terminal
  local line n=0
  "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@" 2>&1 | tee -a "$log" | while IFS= read -r line; do
    case $line in
      Collecting* | Processing* | Requirement\ already*) n=$((n + 1)) && [ $((n % 20)) -ne 0 ] || say "  $n packages" ;;
      Installing\ collected*) say "  unpacking" ;;
    esac
  done
}

trap 'say "interrupted"; exit 130' INT TERM # pip swallows the signal: without this the next step would run
if [ "$(cat "$state" 2>/dev/null || true)" = unfinished ]; then
  say "the last set-up did not finish: starting over"
  rm -rf "$venv"
fi
if [ ! -e "$venv/bin/python" ]; then
  python=$(find_python)
  say "1/4 $venv with $("$python" --version)"
  mkdir -p "$venv" && echo unfinished >"$state"
  "$python" -m venv "$venv"
else
  say "1/4 $venv exists: updating it"
  echo unfinished >"$state"
fi
trap 'tail -n 8 "$log" >&2; die "failed; the whole log is in $log"' ERR
: >"$log"

torch=$(grep '^torch==' "$lock")
say "2/4 $torch"
if ! pip_install --no-deps "$torch+cpu"; then
  say "  no CPU build of torch in pip's indexes: taking the default one, maybe several GB (PIP_EXTRA_INDEX_URL can add an index)"
  pip_install "$torch" # with its dependencies: a CUDA build does not load without them
fi

say "3/4 $(grep -c '==' "$lock") packages of $lock"
pip_install --no-deps -r "$lock"
pip_install --no-deps --no-build-isolation --editable .

say "4/4 checking that vLLM loads"
"$venv/bin/python" tools/check_env.py 2>>"$log"
echo "$key" >"$state"
say "done"
