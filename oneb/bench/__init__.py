"""Measures the real training step, what the hardware could do at best, and what a roofline predicts."""
