"""Algorithms: from groups of judged samples to coefficients and losses. Pure torch: no ranks, no files, no logging."""
