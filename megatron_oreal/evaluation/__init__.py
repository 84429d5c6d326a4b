"""Evaluates a model: between training steps, and on benchmarks."""
