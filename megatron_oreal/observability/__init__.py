"""Reports what a run does: metrics, progress, TensorBoard; and writes files that are whole or absent."""
