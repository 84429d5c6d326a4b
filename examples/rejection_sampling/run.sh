#!/usr/bin/env bash
# Rejection-sampling fine-tuning on the quickstart's task: generate, verify, keep correct answers, fine-tune on them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash tools/setup_env.sh
if [ ! -d runs/quickstart/sft/hf ]; then
    .venv/bin/python examples/quickstart/quickstart.py # its warmed-up model is the start
fi
.venv/bin/megatron-oreal eval examples/rejection_sampling/generate.yaml
.venv/bin/python tools/select_data.py responses runs/rejection_sampling/answers/questions/train.jsonl \
    --prompts runs/quickstart/data/train.jsonl --out runs/rejection_sampling/selected.jsonl --per-prompt 2
.venv/bin/megatron-oreal sft examples/rejection_sampling/sft.yaml
.venv/bin/python -c "
from megatron_oreal.observability.metrics import read_metrics
from megatron_oreal.reports.curves import format_table
from pathlib import Path
records = [r for r in read_metrics(Path('runs/rejection_sampling/sft')) if 'eval/heldout/greedy' in r]
rows = [[r['step'], r['eval/heldout/greedy'], r['eval/heldout/pass@1']] for r in records]
print(format_table(rows, ['step', 'greedy pass@1', 'sampled pass@1']))"
