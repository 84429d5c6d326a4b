"""Starts SGLang servers, watches them and ends them."""
