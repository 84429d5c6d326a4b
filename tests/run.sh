#!/usr/bin/env bash
# Sets everything up and runs the tests. Arguments go to pytest; --slow adds the slow tests, --gpu runs those for CUDA,
# --sglang installs SGLang into .venv-sglang first: without it, tests against real servers are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
arguments=()
for argument in "$@"; do
    if [ "$argument" = --sglang ]; then
        bash tools/setup_sglang.sh
    else
        arguments+=("$argument")
    fi
done
bash tools/setup_env.sh
# The kernels for GPUs are tested in Triton's interpreter; torch for CUDA brings it along.
if [ "$(uname -s)" = Linux ] && ! .venv/bin/python -c 'import triton' 2>/dev/null; then
    .venv/bin/python -m pip install --quiet triton==3.9.0
fi
export OMP_NUM_THREADS=1 # distributed tests start several processes on a few cores
exec .venv/bin/python -m pytest ${arguments[@]+"${arguments[@]}"}
