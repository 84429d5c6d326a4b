"""Writes a random model, ten examples and a configuration: python -m tests.slurm.task FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.test_launch import write_run


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    for name, parallel in (("tensor", {"tensor": 2}), ("data", {"data": 2})):
        write_run(folder, name, parallel=parallel, num_steps=150)


if __name__ == "__main__":
    main()
