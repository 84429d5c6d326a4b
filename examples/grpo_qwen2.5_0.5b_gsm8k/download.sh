#!/usr/bin/env bash
# Fetches Qwen2.5-0.5B-Instruct and GSM8K from the hub, and writes the questions as prompts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash tools/setup_env.sh
.venv/bin/hf download Qwen/Qwen2.5-0.5B-Instruct --local-dir models/Qwen2.5-0.5B-Instruct
for split in train test; do
    .venv/bin/megatron-oreal prepare-data gsm8k --input openai/gsm8k --config main --split "$split" --out "data/gsm8k_$split.jsonl"
done
