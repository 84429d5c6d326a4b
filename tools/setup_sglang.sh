#!/usr/bin/env bash
# Makes .venv-sglang in the repository's root: the SGLang server for a machine without a GPU, beside the trainer's .venv.
# PYTHON chooses the interpreter (>= 3.11). On a GPU machine install SGLang as its documentation says instead, and name
# its interpreter in rollout.sglang.python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

base_python=${PYTHON:-python3}
python=.venv-sglang/bin/python
stamp=.venv-sglang/.installed

exec 9<.
if command -v flock >/dev/null; then flock 9; fi # two callers at once: the second waits for the first

if ! "$base_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "setup_sglang: $base_python is $("$base_python" --version 2>&1 | tail -n 1); Python >= 3.11 is needed: choose another with PYTHON=..." >&2
    exit 2
fi
key=$({ pwd -P; cat tools/setup_sglang.sh; } | "$base_python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
    exit 0
fi
if ! "$python" -m pip --version >/dev/null 2>&1; then
    echo "setup_sglang: making .venv-sglang"
    "$base_python" -m venv .venv-sglang
fi
echo "setup_sglang: installing into .venv-sglang"
# First and by itself, so that no other requirement chooses the build of torch.
if ! "$python" -c 'import torch' 2>/dev/null; then
    "$python" -m pip install --quiet torch==2.13.0
fi
"$python" -m pip install --quiet numpy transformers==5.19.0 tokenizers==0.23.2
# Without its requirements: they ask for CUDA packages. Those that the server imports on a CPU follow.
"$python" -m pip install --quiet --no-deps sglang==0.5.23 sglang-router==0.3.2 compressed-tensors==0.18.0 \
    blobfile torchvision==0.28.0
"$python" -m pip install --quiet aiohttp fastapi 'uvicorn>=0.51' uvloop orjson 'pyzmq>=25.1.2' psutil pybase64 pydantic \
    python-multipart requests setproctitle msgspec ninja partial_json_parser prometheus-client interegular IPython einops \
    pillow regex sentencepiece==0.2.1 tiktoken tqdm watchfiles xxhash zstandard distro openai==2.8.0 openai-harmony==0.0.4 \
    scipy packaging gguf 'python-dateutil<3' llguidance xgrammar==0.2.7 apache-tvm-ffi==0.1.11 nvidia-ml-py easydict \
    loguru lxml pycryptodomex dill datasets jsonschema soundfile
echo "$key" >"$stamp"
