"""Checks before a run what the run needs from its machines: `megatron-oreal doctor`."""
