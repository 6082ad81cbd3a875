"""What a run records and shows: rows, the display, TensorBoard, Weights & Biases."""
