"""Trains with each named configuration, one after the other in this process."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_oreal.config import TrainConfig, load_config
from megatron_oreal.train import train


def main() -> None:
    for name in sys.argv[1:]:
        print(name, file=sys.stderr)
        train(load_config(TrainConfig, Path(name)))


if __name__ == "__main__":
    main()
