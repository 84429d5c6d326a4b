"""Matrix products in FP8, and the check that their log-probs are good enough."""
