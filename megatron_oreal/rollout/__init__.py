"""Rollout engines: prompts in, samples with their log-probs out, and the policy's weights online."""
