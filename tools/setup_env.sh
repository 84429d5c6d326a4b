#!/usr/bin/env bash
# Makes .venv in the repository's root and installs the package for development, unless that was done before.
# PYTHON chooses the interpreter that .venv is made with. REQUIRE_HASHES=1 installs only files whose SHA-256 is in
# tools/requirements.txt, into a new .venv; torch, whose builds differ, and the package itself are not among them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

base_python=${PYTHON:-python3}
python=.venv/bin/python
stamp=.venv/.installed

exec 9<.
if command -v flock >/dev/null; then flock 9; fi # two callers at once: the second waits for the first

check_version() {
    if ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "setup_env: $1 is $("$1" --version 2>&1 | tail -n 1); Python >= 3.10 is needed: $2" >&2
        exit 2
    fi
}

if [ -x "$python" ]; then
    check_version "$python" "remove .venv and choose another with PYTHON=..."
else
    check_version "$base_python" "choose another with PYTHON=..."
fi
hashed=.venv/.hashed
if [ "${REQUIRE_HASHES:-0}" = 1 ] && [ -e "$stamp" ] && [ ! -e "$hashed" ]; then
    echo "setup_env: REQUIRE_HASHES=1: .venv holds files that were installed without hashes; remove .venv first" >&2
    exit 2
fi
# Without pip, .venv was left half made: making it again completes it.
if ! "$python" -m pip --version >/dev/null 2>&1; then
    echo "setup_env: making .venv"
    "$base_python" -m venv .venv
fi

# The path is part of the key, because an editable install of a copied checkout points to the original.
key=$({ pwd -P; cat setup.py; } | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
    exit 0
fi
echo "setup_env: installing into .venv"
# First and by itself, so that no other requirement chooses the build of torch.
if ! "$python" -c 'import torch' 2>/dev/null; then
    "$python" -m pip install --quiet torch==2.13.0
fi
if [ "${REQUIRE_HASHES:-0}" = 1 ]; then
    # Nothing is left to be fetched afterwards but what builds the package itself.
    "$python" -m pip install --quiet --require-hashes --no-deps -r tools/requirements.txt
    touch "$hashed"
fi
"$python" -m pip install --quiet -e '.[dev]'
echo "$key" >"$stamp"
