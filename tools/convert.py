"""Checkpoints from Hugging Face to Megatron and back: `megatron-oreal convert`, without an installed package."""

from megatron_oreal.commands.convert import main

if __name__ == "__main__":
    main()
