"""The training loop and what it writes: `python -m oneb.train`."""
