"""The parts of a block: linear maps, RMSNorm, rotary embedding, SwiGLU.

Weights are cast to the activations' dtype where they are used, so the same modules serve bf16 weights, and fp32
weights with 16-bit arithmetic. Norms and rotations are computed in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneb.kernels.documents import Documents


class Linear(nn.Module):
    """``x @ weight.T`` without bias; weight (out_features, in_features)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * inverse_rms * self.weight.float()).to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202); gate and up projections are one product."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up = Linear(d_model, 2 * d_ff)
        self.down = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Positions(NamedTuple):
    """What blocks know of where tokens stand.

    Attributes:
        cos, sin: RoPE's table for the positions at hand, each (T, G/2) fp32; both None without RoPE.
        documents: within which attention stays and from whose starts RoPE counts, (B, T); None takes a sequence as one.
    """

    cos: Tensor | None
    sin: Tensor | None
    documents: Documents | None = None

    def slice(self, start: int, stop: int) -> Positions:
        """The rows of positions ``start .. stop - 1``."""
        return self if self.cos is None else self._replace(cos=self.cos[start:stop], sin=self.sin[start:stop])

    def angles(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of each token, (T, G/2) or, with documents, (B, T, G/2)."""
        if self.documents is None:
            return self.cos, self.sin
        rows = self.documents.positions
        return self.cos[rows], self.sin[rows]


def rotary_table(width: int, max_seq_len: int, device: torch.device, base: float = 10000.0) -> Positions:
    """RoPE's angles (Su et al. 2021, arXiv 2104.09864) for ``width`` entries a head; Llama's halves are pairs."""
    frequencies = base ** (-torch.arange(0, width, 2, device=device, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(max_seq_len, device=device, dtype=torch.float64), frequencies)
    return Positions(angles.cos().float(), angles.sin().float())


def rotate(x: Tensor, positions: Positions, scale: Tensor | None = None) -> Tensor:
    """Rotate the last G entries of each head of ``x`` (B, T, heads, S + G), after multiplying by ``scale``.

    Scaling and rotation happen in fp32 and round once.
    """
    wide = x.float() if scale is None else x.float() * scale
    if positions.cos is None:
        return wide.to(x.dtype)
    half = positions.cos.shape[-1]
    cos, sin = (angle.unsqueeze(-2) for angle in positions.angles())  # (…, T, 1, G/2)
    sem, a, b = wide.split([x.shape[-1] - 2 * half, half, half], dim=-1)
    return torch.cat([sem, a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
