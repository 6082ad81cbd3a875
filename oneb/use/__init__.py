"""What a trained checkpoint is for: generating text."""
