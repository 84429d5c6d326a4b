"""Sends the policy's weights to SGLang servers."""
