"""Defines the SGLang engine, which sends requests and weights to servers."""
