"""Converts whole checkpoints between Hugging Face and Megatron, file to file."""
