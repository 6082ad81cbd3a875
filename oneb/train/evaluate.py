"""Validation loss on tokens that are always the same, whatever the micro-batch and the sequence length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from oneb.data.loader import eval_batches
from oneb.data.order import eval_offsets
from oneb.data.tokens import Tokens
from oneb.model.transformer import Transformer


@dataclass(frozen=True)
class Validation:
    """The validation tail of the data.

    Attributes:
        tokens: all of the data.
        n_train: where the tail begins.
        n_val: tokens in the tail.
        eval_tokens: tokens of it that an evaluation predicts, as far as the tail reaches.
    """

    tokens: Tokens
    n_train: int
    n_val: int
    eval_tokens: int

    def offsets(self, seq_len: int) -> np.ndarray:
        """Where the windows of an evaluation start, int64.

        Raises:
            OnebError: the tail is shorter than one window.
        """
        return eval_offsets(self.n_train, self.n_val, seq_len, self.eval_tokens)

    def loss(self, model: Transformer, seq_len: int, max_rows: int) -> tuple[float, int]:
        """(mean loss in nats a token, tokens predicted) in windows of ``seq_len``.

        At most ``max_rows`` at once, and fewer where the GPU has no memory for so many.
        """
        while True:
            try:
                return self._loss(model, seq_len, max_rows)
            except torch.OutOfMemoryError:
                if max_rows == 1:
                    raise
            # Out of the handler, whose traceback holds the failed pass's tensors.
            torch.cuda.empty_cache()
            max_rows //= 2

    @torch.no_grad()
    def _loss(self, model: Transformer, seq_len: int, max_rows: int) -> tuple[float, int]:
        offsets = self.offsets(seq_len)
        # A number of rows that divides the windows: a shorter last batch would be another compiled graph.
        rows = max(r for r in range(1, max_rows + 1) if len(offsets) % r == 0)
        total = torch.zeros((), device=model.device, dtype=torch.float64 if model.device.type != "mps" else None)
        for batch in eval_batches(self.tokens, offsets, seq_len, rows, model.config.vocab_size):
            total += model.loss(batch.to(model.device)) * rows
        return (total / len(offsets)).item(), len(offsets) * seq_len

    def probe(self, model: Transformer, seq_len: int, rows: int = 2) -> torch.Tensor:
        """At most ``rows`` validation windows (rows, seq_len + 1) on the model's device, int32, for analysis."""
        seq_len = min(seq_len, self.n_val - 1)
        offsets = eval_offsets(self.n_train, self.n_val, seq_len, rows * seq_len)
        return next(eval_batches(self.tokens, offsets, seq_len, rows, model.config.vocab_size)).to(model.device)
