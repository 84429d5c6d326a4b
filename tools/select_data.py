"""Training data from the answers of an evaluation: `megatron-oreal select-data`, without an installed package."""

from megatron_oreal.commands.select_data import main

if __name__ == "__main__":
    main()
