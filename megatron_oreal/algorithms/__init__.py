"""Algorithms turn groups of judged samples into coefficients and losses. Pure torch: no ranks, files or logs."""
