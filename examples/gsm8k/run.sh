#!/usr/bin/env bash
# GSM8K from its own files to a trained model of 10M parameters, on two CPU cores. Argument: the folder of
# train.jsonl and test.jsonl (or gsm8k_train.jsonl and gsm8k_test.jsonl), or the hub's name, openai/gsm8k.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [ $# -ne 1 ]; then
    echo "usage: bash examples/gsm8k/run.sh FOLDER_OR_HUB_NAME" >&2
    exit 2
fi
bash tools/setup_env.sh
if [ ! -d runs/gsm8k/data/model ]; then
    .venv/bin/python examples/gsm8k/prepare.py --gsm8k-dir "$1" --out runs/gsm8k/data
fi
.venv/bin/megatron-oreal sft examples/gsm8k/tiny_sft.yaml
.venv/bin/megatron-oreal train examples/gsm8k/tiny.yaml
