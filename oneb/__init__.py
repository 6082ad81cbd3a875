"""oneb: one copy/paste that starts a real ~1B-parameter pretraining run on a single CUDA GPU."""

__version__ = "0.1.0"
