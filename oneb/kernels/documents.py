"""Where documents begin and end inside training windows, so that attention stays within them.

The end-of-text id between two documents opens the second, as it opens a prompt when text is generated. No target is
then predicted from another document, and a document's first word is predicted from the opening id alone. Of a document
that began before the window, the window sees what it holds.

Legend: B sequences, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Documents(NamedTuple):
    """The document of each token, by its bounds inside the token's window.

    Attributes:
        starts: (B, T) int32, the position at which it begins, 0 where it began before the window.
        ends: (B, T) int32, the position behind its last one, T where it goes on behind the window.
        bias: for kernels that know no documents, what is added to scores: (B, 1, T, T), or with a null key before the
            others (B, 1, T, 1 + T), 0 or -inf.
    """

    starts: Tensor
    ends: Tensor
    bias: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """(B, T) int32: each token's distance from its document's start."""
        return torch.arange(self.starts.shape[1], device=self.starts.device, dtype=torch.int32) - self.starts

    def with_bias(self, dtype: torch.dtype, null: bool) -> Documents:
        """With a ``bias``, made once for all layers; ``null``: there is a null key, which everybody sees."""
        seen = visible(self)
        bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
        return self._replace(bias=F.pad(bias, (int(null), 0)).unsqueeze(1))


def documents_of(tokens: Tensor, opening: int) -> Documents:
    """The documents in windows (B, T) of ids, each begun by the id ``opening``. Waits for no device."""
    n_tokens = tokens.shape[1]
    at = torch.arange(n_tokens, device=tokens.device)
    opens = tokens == opening
    starts = torch.where(opens, at, 0).cummax(1).values
    # The nearest opening behind each token: a running minimum from the right, without the token itself.
    bounds = torch.where(opens, at, n_tokens)
    behind = torch.cat([bounds[:, 1:], torch.full_like(bounds[:, :1], n_tokens)], dim=1)
    ends = behind.flip(1).cummin(1).values.flip(1)
    return Documents(starts.int(), ends.int())


def visible(documents: Documents) -> Tensor:
    """(B, T, T) bool: whether a query (row) sees a key (column), both of one document and the key not later."""
    at = torch.arange(documents.starts.shape[1], device=documents.starts.device)
    return (at <= at[:, None]) & (at >= documents.starts[:, :, None])
