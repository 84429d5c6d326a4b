"""Computes the gradients of the logits in FP8 (e4m3), and their matrix products."""
