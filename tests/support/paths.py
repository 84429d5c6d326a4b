"""Defines the paths in the checkout that tests use."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SGLANG_PYTHON = ROOT / ".venv-sglang" / "bin" / "python"  # made by tools/setup_sglang.sh
