"""Causal attention for heads too narrow for the fused kernels of others, and for wider ones within documents.

Shapes: q (B, H, T, Dqk), k (B, Hkv, T, Dqk), v (B, Hkv, T, Dv), bf16 or fp16, the last dimension contiguous, any other
strides; null_k (Hkv, Dqk), null_v (Hkv, Dv), fp32; H a multiple of Hkv; 1 <= Dqk, Dv <= 128, padded to a power of two
from 16 on. Scores are plain dot products: scale queries beforehand. With a null key every query may also attend to it.

With documents (:mod:`oneb.kernels.documents`) a query sees no key before its document's start. Tiles in which no query
sees a key are never visited, so that attention costs what the documents' lengths cost; tiles that one document
fills need no mask.

Up to 32 entries tensor cores idle, and the exponential is the bound (16 a clock on an SM of a Hopper GPU). So the
forward spends next to nothing else on a score: no mask below the diagonal; row sums by tensor cores, as a product
with ones; and no running maximum. The softmax needs a maximum only to stay in range, and bf16 has the range of fp32:
a tile of queries first takes exponentials as they are, then looks at its row sums. If one of them left the safe
range, the tile is done again with the online maximum of FlashAttention (Dao et al. 2022, arXiv 2205.14135).
The log-sum-exp is that of the rounded exponentials, like ``out``: within 2**-8 (bf16) of the exact one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oneb.config import DOCUMENT_HEAD_DIM
from oneb.kernels.documents import Documents, visible
from oneb.kernels.narrow_attention_backward import narrow_attention_backward
from oneb.kernels.narrow_attention_common import (
    LOG2E,
    Tiles,
    alignment,
    by_width,
    constant,
    document_keys,
    exp2,
    head_pointer,
    is_native,
    launch,
    load_rows,
    null_key,
    order,
    place,
    plain_integers,
    product,
    rows_of,
    seen_keys,
    strides,
    widths,
)
from oneb.kernels.runtime import jit, runs_fused, tl

__all__ = [
    "Tiles", "narrow_attention", "narrow_attention_backward", "narrow_attention_forward",
    "narrow_attention_plain",
]

# Candidates by the padded width of heads, the best guess first: each costs a compilation in a cold start.
FORWARD_TILES = {
    32: (Tiles(64, 64, 2, 3), Tiles(64, 32, 2, 3), Tiles(128, 32, 4, 2)),
    64: (Tiles(64, 32, 4, 3), Tiles(128, 64, 4, 3)),
    128: (Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2)),
}
# Row sums between which exponentials taken without a maximum are exact enough: single terms below 2**-126 vanish,
# at most 2**-66 of a sum each, and a sum of values weighted by up to 2**100 stays finite.
_LEAST_SUM = constant(2.0**-60)
_LARGEST_SUM = constant(2.0**100)
_NO_SCORE = constant(-1e30)  # below any score, and finite: a tile may hide all of its keys from a query


# ---- kernels ---------------------------------------------------------------------------------------

@jit
def _forward_keys(
    acc, total, top, q, kh, vh, k_t, v_t, starts, first_row, first, last, n_tokens,
    V_WIDTH: tl.constexpr, QK_WIDTH: tl.constexpr, V_PADDED: tl.constexpr, ALIGN: tl.constexpr, NATIVE: tl.constexpr,
    KEYS: tl.constexpr, DOCS: tl.constexpr, MASKED: tl.constexpr, ONLINE: tl.constexpr,
):
    """Weighted values (QUERIES, V_PADDED), row sums (QUERIES, 8 equal columns), maxima, with keys ``first .. last``."""
    QUERIES: tl.constexpr = q.shape[0]
    ones = tl.full((KEYS, 8), 1.0, tl.float32).to(q.dtype)
    for start in range(first, last, KEYS):
        k = load_rows(kh, start, k_t, n_tokens, KEYS, QK_WIDTH, q.shape[1], ALIGN, MASKED)
        v = load_rows(vh, start, v_t, n_tokens, KEYS, V_WIDTH, V_PADDED, ALIGN, MASKED)
        scores = product(q, tl.trans(k), None, NATIVE) * LOG2E
        if MASKED:
            scores = tl.where(seen_keys(starts, first_row, start, QUERIES, KEYS, DOCS), scores, float("-inf"))
        if ONLINE:
            higher = tl.maximum(top, tl.max(scores, 1))
            shrink = exp2(top - higher, NATIVE)[:, None]
            acc *= shrink
            total *= shrink
            top = higher
            p = exp2(scores - top[:, None], NATIVE)
        else:
            p = exp2(scores, NATIVE)
        p = p.to(q.dtype)
        acc = product(p, v, acc, NATIVE)
        total = product(p, ones, total, NATIVE)
    return acc, total, top


@plain_integers
def _narrow_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, null_k_ptr, null_v_ptr, starts_ptr, out_ptr, lse_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, n_tokens, n_batch_heads, heads_together, tuning_tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, QK_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    QK_PADDED: tl.constexpr, V_PADDED: tl.constexpr, ALIGN: tl.constexpr, NULL: tl.constexpr, DOCS: tl.constexpr,
    NATIVE: tl.constexpr, ONLINE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    """One tile of queries of one head. ``ONLINE``: with the running maximum at once (fp16 has no range to spare)."""
    n_tiles = tl.cdiv(n_tokens, QUERIES)
    from_last, batch_head = place(tl.program_id(0), n_tiles, n_batch_heads, heads_together)
    first_row = (n_tiles - 1 - from_last) * QUERIES
    batch = batch_head // HEADS
    head = batch_head % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    rows = first_row + tl.arange(0, QUERIES)
    v_columns = tl.arange(0, V_PADDED)[None, :]

    qh = head_pointer(q_ptr, batch, head, q_b, q_h, ALIGN)
    kh = head_pointer(k_ptr, batch, kv_head, k_b, k_h, ALIGN)
    vh = head_pointer(v_ptr, batch, kv_head, v_b, v_h, ALIGN)
    q = load_rows(qh, first_row, q_t, n_tokens, QUERIES, QK_WIDTH, QK_PADDED, ALIGN, True)
    diagonal = first_row // KEYS * KEYS
    end = tl.minimum(first_row + QUERIES, n_tokens)
    starts, lowest, clear = document_keys(starts_ptr, batch, first_row, end, n_tokens, QUERIES, KEYS, DOCS)

    null_score = tl.full((QUERIES,), _NO_SCORE, tl.float32)
    null_v = tl.zeros((V_PADDED,), tl.float32)
    if NULL:
        null_k = null_key(null_k_ptr, kv_head, QK_WIDTH, QK_PADDED)
        null_v = null_key(null_v_ptr, kv_head, V_WIDTH, V_PADDED)
        null_score = tl.sum(q.to(tl.float32) * null_k[None, :], 1) * LOG2E

    acc = tl.zeros((QUERIES, V_PADDED), tl.float32)
    total = tl.zeros((QUERIES, 8), tl.float32)
    top = tl.zeros((QUERIES,), tl.float32)
    in_range = False
    if not ONLINE:
        if DOCS:
            acc, total, top = _forward_keys(
                acc, total, top, q, kh, vh, k_t, v_t, starts, first_row, lowest, clear, n_tokens,
                V_WIDTH, QK_WIDTH, V_PADDED, ALIGN, NATIVE, KEYS, DOCS, True, False)
        acc, total, top = _forward_keys(
            acc, total, top, q, kh, vh, k_t, v_t, starts, first_row, clear, diagonal, n_tokens,
            V_WIDTH, QK_WIDTH, V_PADDED, ALIGN, NATIVE, KEYS, DOCS, False, False)
        acc, total, top = _forward_keys(
            acc, total, top, q, kh, vh, k_t, v_t, starts, first_row, diagonal, end, n_tokens,
            V_WIDTH, QK_WIDTH, V_PADDED, ALIGN, NATIVE, KEYS, DOCS, True, False)
        if NULL:
            null_p = exp2(null_score, NATIVE)[:, None]
            acc += null_p * null_v[None, :]
            total += null_p
        in_range = (tl.min(tl.min(total, 1), 0) > _LEAST_SUM) & (tl.max(tl.max(total, 1), 0) < _LARGEST_SUM)
    if not in_range:
        acc = tl.zeros((QUERIES, V_PADDED), tl.float32)
        total = tl.zeros((QUERIES, 8), tl.float32)
        top = null_score
        if NULL:
            acc += null_v[None, :]
            total += 1.0
        acc, total, top = _forward_keys(
            acc, total, top, q, kh, vh, k_t, v_t, starts, first_row, lowest, end, n_tokens,
            V_WIDTH, QK_WIDTH, V_PADDED, ALIGN, NATIVE, KEYS, DOCS, True, True)
    row_sum = tl.max(total, 1)

    inside = rows < n_tokens
    tl.store(lse_ptr + tl.cast(batch_head, tl.int64) * n_tokens + rows, (top + tl.log2(row_sum)) / LOG2E, mask=inside)
    at = tl.cast(batch, tl.int64) * n_tokens + rows
    pointers = out_ptr + (at[:, None] * HEADS + head) * V_WIDTH + v_columns
    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(pointers, out, mask=inside[:, None] & (v_columns < V_WIDTH))


# ---- on the host -----------------------------------------------------------------------------------

def narrow_attention(
    q: Tensor, k: Tensor, v: Tensor, null_k: Tensor | None = None, null_v: Tensor | None = None,
    documents: Documents | None = None, deterministic: bool | None = None,
) -> Tensor:
    """Attention output (B, H, T, Dv), a view of contiguous (B, T, H, Dv) memory, in the dtype of ``q``.

    Args:
        documents: within which attention stays, (B, T).
        deterministic: whether a second run gives the same gradients bit for bit (about a third slower); None obeys
            ``torch.use_deterministic_algorithms``.
    """
    if not runs_fused(q):
        return narrow_attention_plain(q, k, v, null_k, null_v, documents)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return _NarrowAttention.apply(q, k, v, null_k, null_v, documents, deterministic)


class _NarrowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, null_k, null_v, documents, deterministic):
        out, lse = narrow_attention_forward(q, k, v, null_k, null_v, documents)
        ctx.save_for_backward(q, k, v, null_k, null_v, out, lse)
        ctx.documents, ctx.deterministic = documents, deterministic
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, null_k, null_v, out, lse = ctx.saved_tensors
        dq, dk, dv, dnull_k, dnull_v = narrow_attention_backward(
            dout, q, k, v, null_k, null_v, out, lse, ctx.documents, deterministic=ctx.deterministic)
        if null_k is not None:
            dnull_k, dnull_v = dnull_k.to(null_k.dtype), dnull_v.to(null_v.dtype)
        return dq, dk, dv, dnull_k, dnull_v, None, None


def narrow_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, null_k: Tensor | None, null_v: Tensor | None,
    documents: Documents | None = None, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse): as :func:`narrow_attention`, and the log-sum-exp of all scores, the null key's too: (B, H, T) fp32.

    Args:
        tiles: fixed tiles instead of tuned ones.
    """
    batch, heads, n_tokens, qk_width = q.shape
    v_width = v.shape[-1]
    assert max(qk_width, v_width) <= DOCUMENT_HEAD_DIM, f"heads {qk_width} and {v_width} wide"
    assert heads % k.shape[1] == 0, f"{heads} query heads on {k.shape[1]} key heads"
    assert q.dtype in (torch.bfloat16, torch.float16), f"the kernel works on 16-bit inputs, not {q.dtype}"
    assert q.dtype == k.dtype == v.dtype, f"mixed dtypes: {q.dtype}, {k.dtype}, {v.dtype}"
    for bounds in documents[:2] if documents else ():
        assert bounds.shape == (batch, n_tokens), f"documents of {tuple(bounds.shape)}"
        assert bounds.is_contiguous()
        assert bounds.dtype == torch.int32
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    align = alignment(q, k, v)
    out = torch.empty(batch, n_tokens, heads, v_width, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, n_tokens, dtype=torch.float32, device=q.device)
    if null_k is not None:
        null_k, null_v = null_k.float().contiguous(), null_v.float().contiguous()
    launch(
        _narrow_attention_forward_kernel, by_width(FORWARD_TILES, q, v), tiles,
        lambda queries, _: batch * heads * -(-n_tokens // queries),
        {
            "q_ptr": q, "k_ptr": k, "v_ptr": v, "null_k_ptr": null_k, "null_v_ptr": null_v, "out_ptr": out,
            "starts_ptr": documents and documents.starts, "DOCS": documents is not None, "lse_ptr": lse,
            **strides("q", q, align), **strides("k", k, align), **strides("v", v, align),
            **order(k, v, heads), **widths(q, k, v), "n_tokens": n_tokens, "ALIGN": align,
            "NULL": null_k is not None, "NATIVE": is_native(q), "ONLINE": q.dtype == torch.float16,
        })
    return out.transpose(1, 2), lse


def narrow_attention_plain(
    q: Tensor, k: Tensor, v: Tensor, null_k: Tensor | None = None, null_v: Tensor | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """The same function in plain torch: a naive softmax in fp32 (fp64 for fp64 inputs), O(T**2) memory, any device."""
    dtype, wide = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    repeats, n_tokens = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (x.to(wide).repeat_interleave(repeats, 1) for x in (k, v))
    scores = q.to(wide) @ k.transpose(-1, -2)  # (B, H, T, T)
    if documents is None:
        seen = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=q.device).tril()
    else:
        seen = visible(documents).unsqueeze(1)
    scores = scores.masked_fill(~seen, float("-inf"))
    if null_k is None:
        return (scores.softmax(-1) @ v).to(dtype)
    null_k, null_v = (x.to(wide).repeat_interleave(repeats, 0) for x in (null_k, null_v))
    null_scores = torch.einsum("bhtd,hd->bht", q.to(wide), null_k)
    p = torch.cat([null_scores.unsqueeze(-1), scores], -1).softmax(-1)
    return (p[..., 1:] @ v + p[..., :1] * null_v.unsqueeze(1)).to(dtype)
