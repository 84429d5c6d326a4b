"""Reads prompts and supervised examples from files, and turns them into what engines and models take."""
