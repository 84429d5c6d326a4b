"""Says whether two runs have the same losses and all steps, and exits with 1 where not: ... RUN_A RUN_B."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.test_launch import losses


def main() -> None:
    first, second = (losses(Path(name)) for name in sys.argv[1:3])
    is_whole = [step for step, _ in first] == list(range(len(first))) and len(first) > 0
    sys.exit(0 if first == second and is_whole else 1)


if __name__ == "__main__":
    main()
