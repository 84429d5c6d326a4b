"""Parallel layout and collectives; imports torch alone."""
