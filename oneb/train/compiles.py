"""What a run compiles, counted, so that nothing is ever compiled in the middle of it unseen."""

from __future__ import annotations

import torch
from torch._dynamo.utils import counters

from oneb.kernels.runtime import compiled_kernels
from oneb.model.transformer import Transformer


def compile_model(model: Transformer, mode: str, n_lengths: int) -> None:
    """Compile ``model`` in place for a run that trains at ``n_lengths`` sequence lengths.

    Each length has graphs for training and for evaluation; dynamo's default limit would silently leave the later
    phases of a long schedule uncompiled.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 4 * n_lengths)
    model.compile(mode)


def compilations() -> int:
    """Graphs of torch.compile and Triton kernels made ready so far in this process."""
    return counters["stats"]["unique_graphs"] + compiled_kernels()
