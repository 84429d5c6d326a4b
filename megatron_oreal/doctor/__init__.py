"""Checks what a run needs of its machines, before the run: `megatron-oreal doctor`."""
