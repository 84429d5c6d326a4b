"""Defines one interface for generation engines, and the engines: the local engine and SGLang servers."""
