"""Prompts, supervised examples and tokens: from files to what the engines and models take."""
