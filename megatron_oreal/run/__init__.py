"""Assembles a run. The module run/X.py builds the objects that the package X defines."""
