#!/usr/bin/env bash
# Sets everything up and runs the quickstart. Arguments go to quickstart.py; with --engine sglang a real SGLang server,
# in an environment of its own, generates.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash tools/setup_env.sh
case " $* " in *" --engine sglang "* | *" --engine=sglang "*) bash tools/setup_sglang.sh ;; esac
exec .venv/bin/python examples/quickstart/quickstart.py "$@"
