"""Keys and values of the tokens so far, for generation. Its size is what the variants differ in."""

from __future__ import annotations

import torch
from torch import Tensor

from oneb.config import ModelConfig


class LayerCache:
    """One layer's cache: keys (B, K, capacity, D) and values (B, K, capacity, V), filled from the front."""

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (batch, config.n_kv_heads, capacity)
        self.k = torch.empty(*shape, config.qk_head_dim, dtype=dtype, device=device)
        self.v = torch.empty(*shape, config.v_head_dim, dtype=dtype, device=device)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, K, T, ·); returns all that are stored, the new ones last."""
        end = self.length + k.shape[2]
        assert end <= self.k.shape[2], "the cache was made too small for what is generated"
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class KVCache:
    """The caches of all layers."""

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layers = [LayerCache(config, batch, capacity, dtype, device) for _ in range(config.n_layers)]

    @property
    def length(self) -> int:
        """Tokens stored."""
        return self.layers[0].length

    @property
    def n_bytes(self) -> int:
        """Bytes that the stored tokens take."""
        return sum(x[:, :, : self.length].nbytes for layer in self.layers for x in (layer.k, layer.v))
