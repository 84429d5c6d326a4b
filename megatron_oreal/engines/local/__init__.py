"""The local engine generates in the trainer's own processes."""
