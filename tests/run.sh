#!/usr/bin/env bash
# Sets everything up and runs the tests. Arguments go to pytest; --slow adds the slow tests, --gpu runs those for CUDA.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
export OMP_NUM_THREADS=1 # distributed tests start several processes on a few cores
exec .venv/bin/python -m pytest "$@"
