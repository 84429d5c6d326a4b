#!/usr/bin/env bash
# Sets everything up and runs the quickstart. Arguments go to quickstart.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash tools/setup_env.sh
exec .venv/bin/python examples/quickstart/quickstart.py "$@"
