#!/usr/bin/env bash
# Is this GPU machine ready, and how fast? Runs on one GPU for some minutes and writes a report; see tools/gpu/README.md.
#
#     bash tools/gpu_check.sh [--minutes 9] [--out gpu_check] [--wheels DIR] [--work DIR] [--tiny] [STEP ...]
#
# --wheels installs the packages in DIR for this run alone, which needs no network. --work keeps what is installed,
# built and written during the check for a later one. Without a GPU, tiny sizes run, which only show that the check
# works. PYTHON chooses the interpreter; the default is .venv, else python3. Exit code 1: a step failed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

wheels= work= arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --wheels) wheels=${2:?--wheels needs a folder} && shift ;;
        --wheels=*) wheels=${1#*=} ;;
        --work) work=${2:?--work needs a folder} && shift ;;
        --work=*) work=${1#*=} ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}

if [ -n "$work" ]; then
    mkdir -p "$work" && work=$(cd "$work" && pwd)
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
export PYTHONPATH=$work/site:$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg TRITON_CACHE_DIR=$work/triton
if [ -n "$wheels" ]; then
    [ -d "$wheels" ] || { echo "gpu_check: --wheels: there is no folder $wheels" >&2 && exit 2; }
    wheels=$(cd "$wheels" && pwd)
    if mkdir "$work/site" 2>/dev/null; then # else an earlier check installed them
        if compgen -G "$wheels/*.whl" >/dev/null; then
            "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" "$wheels"/*.whl ||
                echo "gpu_check: pip could not install $wheels/*.whl: going on with what the machine has" >&2
        fi
        for archive in "$wheels"/*.tar.xz; do [ ! -f "$archive" ] || tar -xJf "$archive" -C "$work/site"; done
    fi
    arguments=(--wheels "$wheels" "${arguments[@]+"${arguments[@]}"}")
fi
if ! "$python" -c 'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' \
    click torch megatron megatron.core 2>/dev/null; then
    echo "gpu_check: $python lacks torch, megatron-core or click: run tools/setup_env.sh, or give --wheels DIR" >&2
    exit 2
fi
# Everything stays on this machine, whose name and other networks may lead nowhere.
if "$python" -c 'import socket, sys; sys.exit("lo" not in [name for _, name in socket.if_nameindex()])'; then
    export NCCL_SOCKET_IFNAME=lo GLOO_SOCKET_IFNAME=lo
fi
# Transformer Engine compiles some kernels when they are first used, and looks for CUDA's headers there.
if nvcc=$(PATH=$PATH:/usr/local/cuda/bin command -v nvcc); then
    export CUDA_HOME=${CUDA_HOME:-$(dirname "$(dirname "$(readlink -f "$nvcc")")")}
fi
"$python" -W ignore -m tools.gpu.check --work "$work" "${arguments[@]+"${arguments[@]}"}"
