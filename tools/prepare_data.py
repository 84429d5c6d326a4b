"""Public data sets as JSONL of prompts: `megatron-oreal prepare-data`, without an installed package."""

from megatron_oreal.commands.prepare_data import main

if __name__ == "__main__":
    main()
