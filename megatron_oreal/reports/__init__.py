"""Draws and prints what finished runs have measured, and what an objective optimises."""
