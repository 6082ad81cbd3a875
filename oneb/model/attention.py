"""One attention module for every variant.

Legend: B batch, T tokens, H query heads, K key/value heads, S and G semantic and geometric entries a head,
D = S + G, V value entries a head.

A variant is a set of widths (:class:`oneb.config.ModelConfig`). Each head scores

    q_sem . k_sem / sqrt(S)  +  q_geo . k_geo / sqrt(G),

where only the geometric part is rotated; the two divisors are folded into the query, so that one fused attention
call over the concatenated entries computes the sum. S = 0 gives baseline, gqa and bottleneck.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from oneb.accounting import qkv_widths
from oneb.config import ModelConfig
from oneb.kernels.attention import cached_attention, causal_attention
from oneb.kernels.documents import Documents
from oneb.model.kv_cache import LayerCache
from oneb.model.layers import Linear, Positions, rotate


class Attention(nn.Module):
    """Causal self-attention (B, T, d_model) -> (B, T, d_model)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backend = "math"  # the trainer sets what choose_backend found
        self.qkv = Linear(config.d_model, sum(qkv_widths(config)))
        self.out = Linear(config.attn_dim, config.d_model)
        if config.learned_temp:
            # exp(0) = 1: training starts at the usual scale.
            self.log_temperature = nn.Parameter(torch.zeros(config.n_heads))
        if config.null_attn:
            # A zero key scores 0 against every query and its zero value adds nothing: a neutral start.
            self.null_k = nn.Parameter(torch.zeros(config.n_kv_heads, config.qk_head_dim))
            self.null_v = nn.Parameter(torch.zeros(config.n_kv_heads, config.v_head_dim))
            self.null_k.no_weight_decay = self.null_v.no_weight_decay = True

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """Attend; with ``cache``, the cached tokens come first and ``x`` is appended to them."""
        q, k, v = self.project(x, positions)
        if cache is None:
            y = self.attend(q, k, v, positions.documents)
        else:
            y = cached_attention(q, *cache.append(k, v), *self.null()).transpose(1, 2).flatten(2)
        return self.out(y)  # (B, T, H * V) -> (B, T, d_model)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        """Causal attention of what :meth:`project` gives, heads side by side: (B, T, H * V)."""
        y = causal_attention(q, k, v, *self.null(), self.backend, documents)  # (B, H, T, V)
        return y.transpose(1, 2).flatten(2)

    def project(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled and rotated queries (B, H, T, D), rotated keys (B, K, T, D), values (B, K, T, V)."""
        c = self.config
        q, k, v = self.qkv(x).split(qkv_widths(c), dim=-1)
        k = k.unflatten(-1, (c.n_kv_heads, c.qk_head_dim))  # (B, T, K, D)
        v = v.unflatten(-1, (c.n_kv_heads, c.v_head_dim))  # (B, T, K, V)
        q = k if c.tie_qk else q.unflatten(-1, (c.n_heads, c.qk_head_dim))  # (B, T, H, D)
        q, k = rotate(q, positions, scale=self.query_scale(x.device)), rotate(k, positions)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def null(self) -> tuple[Tensor | None, Tensor | None]:
        """The null key (K, D) and value (K, V), or (None, None)."""
        return (self.null_k, self.null_v) if self.config.null_attn else (None, None)

    def query_scale(self, device: torch.device) -> Tensor:
        """What multiplies queries before they are rotated, fp32.

        1/sqrt(S) and 1/sqrt(G) by entry, (D,); with a learned temperature s times exp(s) by head, (H, D).
        """
        c = self.config
        sem = torch.full((c.sem_head_dim,), c.sem_head_dim**-0.5 if c.sem_head_dim else 1.0, device=device)
        geo = torch.full((c.geo_head_dim,), c.geo_head_dim**-0.5, device=device)
        scale = torch.cat([sem, geo])
        return scale * self.log_temperature.float().exp()[:, None] if c.learned_temp else scale
