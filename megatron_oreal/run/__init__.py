"""Assembles a run. The module run/X.py builds what the package X defines."""
