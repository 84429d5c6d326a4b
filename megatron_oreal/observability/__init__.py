"""Reports the state of a run by metrics, progress and TensorBoard, and writes files atomically."""
