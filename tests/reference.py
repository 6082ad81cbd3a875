"""Attention written out from the definitions, in fp64, a head and a query at a time; shares no code with oneb.model."""

import math

import torch


def rotate_pairs(x, base=10000.0):
    """RoPE by complex multiplication; x (T, width) with the pairs (i, i + width/2)."""
    length, width = x.shape
    half = width // 2
    angles = torch.tensor([[t * base ** (-2 * i / width) for i in range(half)] for t in range(length)], dtype=x.dtype)
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def attention(x, weights, config):
    """Output (B, T, d_model) of one attention layer for x (B, T, d_model), everything fp64.

    weights: the module's parameters by name. Scores are computed separately for the semantic and the geometric part.
    """
    c = config
    sem, geo, v_dim = c.sem_dim // c.n_heads, c.geo_dim // c.n_heads, c.attn_dim // c.n_heads
    qk = sem + geo
    w = weights["qkv.weight"]
    n_q = 0 if c.tie_qk else c.n_heads * qk
    w_q, w_k, w_v = w[:n_q], w[n_q : n_q + c.n_kv_heads * qk], w[n_q + c.n_kv_heads * qk :]
    batches = []
    for xb in x:
        heads = []
        for h in range(c.n_heads):
            kv = h // (c.n_heads // c.n_kv_heads)
            k = xb @ w_k[kv * qk : (kv + 1) * qk].T
            q = k if c.tie_qk else xb @ w_q[h * qk : (h + 1) * qk].T
            v = xb @ w_v[kv * v_dim : (kv + 1) * v_dim].T
            q_geo, k_geo = q[:, sem:], k[:, sem:]
            if c.rope:
                q_geo, k_geo = rotate_pairs(q_geo), rotate_pairs(k_geo)
            temperature = weights["log_temperature"][h].exp() if c.learned_temp else 1.0
            rows = []
            for t in range(len(xb)):
                scores = k_geo[: t + 1] @ q_geo[t] / math.sqrt(geo)
                if sem:
                    scores = scores + k[: t + 1, :sem] @ q[t, :sem] / math.sqrt(sem)
                values = v[: t + 1]
                if c.null_attn:
                    null_k = weights["null_k"][kv]
                    # The null key has no position: the query meets it as it is, rotated.
                    score = null_k[sem:] @ q_geo[t] / math.sqrt(geo)
                    if sem:
                        score = score + null_k[:sem] @ q[t, :sem] / math.sqrt(sem)
                    scores = torch.cat([scores, score[None]])
                    values = torch.cat([values, weights["null_v"][kv][None]])
                p = (scores * temperature).exp()
                rows.append((p / p.sum()) @ values)
            heads.append(torch.stack(rows))
        batches.append(torch.cat(heads, dim=-1) @ weights["out.weight"].T)
    return torch.stack(batches)
