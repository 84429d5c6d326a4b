"""Makes judged samples: sends prompts to an engine, collects responses with their log-probs, and verifies them."""
