"""torch.compile for a run: a graph for each sequence length, counted, so that a recompile never goes unseen."""

from __future__ import annotations

import torch
from torch._dynamo.utils import counters

from oneb.model.transformer import Transformer


def compile_model(model: Transformer, mode: str, n_lengths: int) -> None:
    """Compile ``model`` in place for a run that trains at ``n_lengths`` sequence lengths.

    Each length has graphs for training and for evaluation; dynamo's default limit would silently leave the later
    phases of a long schedule uncompiled.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 4 * n_lengths)
    model.compile(mode)


def compiled_graphs() -> int:
    """Graphs compiled so far in this process."""
    return counters["stats"]["unique_graphs"]
