"""Implements `megatron-oreal report`, which writes one page of HTML about runs and their differences."""
