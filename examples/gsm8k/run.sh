#!/usr/bin/env bash
# GSM8K from its own files to a trained model of 10M parameters, on two CPU cores. Argument: the folder of
# train.jsonl and test.jsonl (or gsm8k_train.jsonl and gsm8k_test.jsonl), or the hub's name, openai/gsm8k.
set -euo pipefail
fail() {
    echo "run.sh: $1" >&2
    exit 2
}
if [ $# -ne 1 ] || [ -z "$1" ]; then
    fail "usage: bash examples/gsm8k/run.sh FOLDER_OR_HUB_NAME"
fi
source=$1
if [ -d "$source" ]; then
    source=$(cd "$source" && pwd) # a path below the folder that the command was typed in
elif [[ "$source" == /* || "$source" == .* || "$source" == ~* || "$source" != */* ]]; then
    fail "$source is no folder; give the folder of train.jsonl and test.jsonl, or the hub's name, openai/gsm8k"
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
data=runs/gsm8k/data
if [ -d "$data/model" ] && [ -f "$data/source" ] && [ "$(cat "$data/source")" != "$source" ]; then
    fail "$data was made of $(cat "$data/source"); remove runs/gsm8k to begin again with $source"
fi
bash tools/setup_env.sh
if [ -d "$data/model" ]; then
    echo "run.sh: going on with $data"
else
    mkdir -p "$data"
    echo "$source" >"$data/source"
    .venv/bin/python examples/gsm8k/prepare.py --gsm8k-dir "$source" --out "$data"
fi
.venv/bin/megatron-oreal sft examples/gsm8k/tiny_sft.yaml
.venv/bin/megatron-oreal train examples/gsm8k/tiny.yaml
