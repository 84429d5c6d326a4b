"""Algorithms turn groups of judged samples into coefficients and losses; the code knows no ranks, files or logs."""
