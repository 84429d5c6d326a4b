"""Defines the local engine, which generates in the trainer's own processes."""
