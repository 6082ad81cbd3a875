"""The null key's terms beside attention over the real keys: one pass forward and one backward, each beside its twin.

Shapes: q (B, H, T, Dqk), out and dout (B, H, T, Dv), lse (B, H, T) fp32, null_k (Hkv, Dqk), null_v (Hkv, Dv); H a
multiple of Hkv. :mod:`oneb.kernels.null_attention` derives the formulas and says where ``out``, ``lse`` and ``dq``
come from.

The kernels move every tensor as large as q once: 3 of them forward (q, out in and out), 5 backward (q, dout, out, dq
in and out). The twins, run as they read, make a dozen passes, most of them over fp32 copies.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from oneb.kernels.narrow_attention_common import (
    LOG2E,
    alignment,
    exp2,
    head_pointer,
    is_native,
    null_key,
    rows_of,
    strides,
)
from oneb.kernels.runtime import jit, runs_fused, tl, triton

TILE = (4096, 4)  # elements of a program's tile and its warps: 32 a thread are four 16-byte loads of a 16-bit tensor


# ---- the twins -----------------------------------------------------------------------------------

def null_terms_plain(q: Tensor, out: Tensor, lse: Tensor, null_k: Tensor, null_v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention over the real keys -> the same over the real keys and the null key.

    Args:
        q: queries, scaled beforehand, any floating dtype.
        out: attention over the real keys, in q's dtype. The kernel overwrites it.
        lse: log-sum-exp of the real keys' scores. The kernel overwrites it.
        null_k, null_v: any floating dtype.

    Returns:
        full_out: like ``out``.
        full_lse: (B, H, T) fp32, the log-sum-exp of all scores.
    """
    null_k, null_v = _per_query_head(null_k, q), _per_query_head(null_v, q)
    score = _null_scores(q, null_k)
    full_lse = torch.logaddexp(lse, score)
    kept = (lse - full_lse).exp().unsqueeze(-1)
    taken = (score - full_lse).exp().unsqueeze(-1)
    return (out.float() * kept + null_v[:, None] * taken).to(out.dtype), full_lse


def null_terms_backward_plain(
    dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, null_k: Tensor, null_v: Tensor, dq: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The null key's share of the gradients.

    Args:
        dout: gradient of ``full_out``.
        q, null_k, null_v: as in the forward pass.
        out, lse: ``full_out`` and ``full_lse`` as :func:`null_terms` returned them.
        dq: the real keys' share of the queries' gradient, like ``q``. The kernel overwrites it.

    Returns:
        dq: like ``dq``, the null key's share added.
        dnull_k, dnull_v: like ``null_k`` and ``null_v``, but fp32.
    """
    n_kv_heads = null_k.shape[0]
    null_k, null_v = _per_query_head(null_k, q), _per_query_head(null_v, q)
    wide = dout.float()
    p = (_null_scores(q, null_k) - lse).exp()  # (B, H, T): probability of the null key
    dscore = p * (wide * (null_v[:, None] - out.float())).sum(-1)
    dq = (dq.float() + dscore.unsqueeze(-1) * null_k[:, None]).to(dq.dtype)
    dnull_k = (dscore.unsqueeze(-1) * q.float()).sum((0, 2))
    dnull_v = (p.unsqueeze(-1) * wide).sum((0, 2))
    # Query heads that share a null key add up: (H, D) -> (Hkv, D).
    dnull_k, dnull_v = (d.unflatten(0, (n_kv_heads, -1)).sum(1) for d in (dnull_k, dnull_v))
    return dq, dnull_k, dnull_v


def _per_query_head(null: Tensor, q: Tensor) -> Tensor:
    """(Hkv, D) -> (H, D) fp32."""
    return null.float().repeat_interleave(q.shape[1] // null.shape[0], dim=0)


def _null_scores(q: Tensor, null_k: Tensor) -> Tensor:
    """Each query's score with its head's null key, fp32 (B, H, T)."""
    return (q.float() * null_k[:, None]).sum(-1)


# ---- the kernels: a program takes a tile of rows of one head -------------------------------------

# Strides and lengths vary at run time: one compilation must serve them all.
_plain_integers = partial(
    jit, do_not_specialize=[*(f"{name}_{axis}" for name in "qogd" for axis in "bht"), "n_tokens"])


@jit
def _place(n_tokens, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """(batch, head, rows (ROWS,)) of this program. Heads first: neighbours share pages of memory."""
    program = tl.program_id(0)
    n_tiles = tl.cdiv(n_tokens, ROWS)
    rows = program // HEADS % n_tiles * ROWS + tl.arange(0, ROWS)
    return program // HEADS // n_tiles, program % HEADS, rows


@jit
def _row_pointers(
    pointer, batch, head, rows, columns, batch_stride, head_stride, row_stride, ALIGN: tl.constexpr,
):
    """(ROWS, columns) pointers into one head. Strides come divided by ``ALIGN``."""
    base = head_pointer(pointer, batch, head, batch_stride, head_stride, ALIGN)
    return base + rows.to(tl.int64)[:, None] * row_stride * ALIGN + columns[None, :]


@_plain_integers
def _null_terms_kernel(
    q_ptr, out_ptr, lse_ptr, null_k_ptr, null_v_ptr, q_b, q_h, q_t, o_b, o_h, o_t, n_tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, QK_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    QK_PADDED: tl.constexpr, V_PADDED: tl.constexpr, ALIGN: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr,
):
    batch, head, rows = _place(n_tokens, HEADS, ROWS)
    kv_head = head // (HEADS // KV_HEADS)
    inside = rows < n_tokens
    columns, v_columns = tl.arange(0, QK_PADDED), tl.arange(0, V_PADDED)
    mask, v_mask = inside[:, None] & (columns < QK_WIDTH)[None, :], inside[:, None] & (v_columns < V_WIDTH)[None, :]
    q_at = _row_pointers(q_ptr, batch, head, rows, columns, q_b, q_h, q_t, ALIGN)
    out_at = _row_pointers(out_ptr, batch, head, rows, v_columns, o_b, o_h, o_t, ALIGN)
    lse_at = lse_ptr + (tl.cast(batch, tl.int64) * HEADS + head) * n_tokens + rows
    q = tl.load(q_at, mask=mask, other=0.0)
    out = tl.load(out_at, mask=v_mask, other=0.0)
    lse = tl.load(lse_at, mask=inside, other=0.0)

    null_k = null_key(null_k_ptr, kv_head, QK_WIDTH, QK_PADDED)
    null_v = null_key(null_v_ptr, kv_head, V_WIDTH, V_PADDED)
    score = tl.sum(q.to(tl.float32) * null_k[None, :], 1)
    top = tl.maximum(lse, score)
    kept = exp2((lse - top) * LOG2E, NATIVE)
    taken = exp2((score - top) * LOG2E, NATIVE)
    total = kept + taken
    full_out = out.to(tl.float32) * (kept / total)[:, None] + (taken / total)[:, None] * null_v[None, :]
    tl.store(out_at, full_out.to(out_ptr.dtype.element_ty), mask=v_mask)
    tl.store(lse_at, top + tl.log(total), mask=inside)


@_plain_integers
def _null_terms_backward_kernel(
    dout_ptr, q_ptr, out_ptr, lse_ptr, null_k_ptr, null_v_ptr, dq_ptr, partial_ptr,
    g_b, g_h, g_t, q_b, q_h, q_t, o_b, o_h, o_t, d_b, d_h, d_t, n_tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, QK_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    QK_PADDED: tl.constexpr, V_PADDED: tl.constexpr, ALIGN: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr,
):
    batch, head, rows = _place(n_tokens, HEADS, ROWS)
    kv_head = head // (HEADS // KV_HEADS)
    inside = rows < n_tokens
    columns, v_columns = tl.arange(0, QK_PADDED), tl.arange(0, V_PADDED)
    mask, v_mask = inside[:, None] & (columns < QK_WIDTH)[None, :], inside[:, None] & (v_columns < V_WIDTH)[None, :]
    q_at = _row_pointers(q_ptr, batch, head, rows, columns, q_b, q_h, q_t, ALIGN)
    dout_at = _row_pointers(dout_ptr, batch, head, rows, v_columns, g_b, g_h, g_t, ALIGN)
    out_at = _row_pointers(out_ptr, batch, head, rows, v_columns, o_b, o_h, o_t, ALIGN)
    dq_at = _row_pointers(dq_ptr, batch, head, rows, columns, d_b, d_h, d_t, ALIGN)
    # All loads before the first sum has to be waited for.
    q = tl.load(q_at, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_at, mask=v_mask, other=0.0).to(tl.float32)
    out = tl.load(out_at, mask=v_mask, other=0.0).to(tl.float32)
    dq = tl.load(dq_at, mask=mask, other=0.0).to(tl.float32)
    lse_at = lse_ptr + (tl.cast(batch, tl.int64) * HEADS + head) * n_tokens + rows
    lse = tl.load(lse_at, mask=inside, other=0.0)  # past the end q and dout are zeros, and every sum's term is

    null_k = null_key(null_k_ptr, kv_head, QK_WIDTH, QK_PADDED)
    null_v = null_key(null_v_ptr, kv_head, V_WIDTH, V_PADDED)
    p = exp2((tl.sum(q * null_k[None, :], 1) - lse) * LOG2E, NATIVE)
    dscore = p * tl.sum(dout * (null_v[None, :] - out), 1)
    dq += dscore[:, None] * null_k[None, :]
    tl.store(dq_at, dq.to(dq_ptr.dtype.element_ty), mask=mask)
    # (programs, QK_PADDED + V_PADDED): summed by the caller, in the same order every time
    partial_at = partial_ptr + tl.cast(tl.program_id(0), tl.int64) * (QK_PADDED + V_PADDED)
    tl.store(partial_at + columns, tl.sum(dscore[:, None] * q, 0))
    tl.store(partial_at + QK_PADDED + v_columns, tl.sum(p[:, None] * dout, 0))


def null_terms_fused(
    q: Tensor, out: Tensor, lse: Tensor, null_k: Tensor, null_v: Tensor, tile: tuple[int, int] = TILE
) -> tuple[Tensor, Tensor]:
    """:func:`null_terms_plain` as one Triton kernel, in place over ``out`` and ``lse``."""
    q, out, lse = rows_of(q), rows_of(out), lse.contiguous()
    shape = _shape({"q": q, "o": out}, null_k, null_v, tile)
    _null_terms_kernel[(_n_programs(q, shape),)](q_ptr=q, out_ptr=out, lse_ptr=lse, **shape)
    return out, lse


def null_terms_backward_fused(
    dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, null_k: Tensor, null_v: Tensor, dq: Tensor,
    tile: tuple[int, int] = TILE,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`null_terms_backward_plain` as one Triton kernel, in place over ``dq``; a second one sums partial sums."""
    dout, q, out, dq, lse = rows_of(dout), rows_of(q), rows_of(out), rows_of(dq), lse.contiguous()
    shape = _shape({"g": dout, "q": q, "o": out, "d": dq}, null_k, null_v, tile)
    n_programs, qk_padded = _n_programs(q, shape), shape["QK_PADDED"]
    partial = torch.empty(n_programs, qk_padded + shape["V_PADDED"], dtype=torch.float32, device=q.device)
    _null_terms_backward_kernel[(n_programs,)](
        dout_ptr=dout, q_ptr=q, out_ptr=out, lse_ptr=lse, dq_ptr=dq, partial_ptr=partial, **shape)
    n_kv_heads, group = null_k.shape[0], q.shape[1] // null_k.shape[0]
    summed = partial.view(-1, n_kv_heads, group, partial.shape[1]).sum((0, 2))  # (Hkv, both widths)
    return dq, summed[:, : shape["QK_WIDTH"]], summed[:, qk_padded:][:, : shape["V_WIDTH"]]


def _shape(tensors: dict[str, Tensor], null_k: Tensor, null_v: Tensor, tile: tuple[int, int]) -> dict[str, Any]:
    """The arguments that both kernels take: sizes, the null key and value, and each tensor's strides by its letter."""
    q, (n_elements, num_warps) = tensors["q"], tile
    (heads, n_tokens, qk_width), (n_kv_heads, v_width) = q.shape[1:], null_v.shape
    assert heads % n_kv_heads == 0, f"{heads} query heads on {n_kv_heads} null keys"
    align = alignment(*tensors.values())
    padded = [triton.next_power_of_2(width) for width in (qk_width, v_width)]
    return {
        "null_k_ptr": null_k.float().contiguous(), "null_v_ptr": null_v.float().contiguous(), "n_tokens": n_tokens,
        **{key: value for name, x in tensors.items() for key, value in strides(name, x, align).items()},
        "HEADS": heads, "KV_HEADS": n_kv_heads, "QK_WIDTH": qk_width, "V_WIDTH": v_width,
        "QK_PADDED": padded[0], "V_PADDED": padded[1], "ALIGN": align, "NATIVE": is_native(q),
        "ROWS": max(1, n_elements // max(padded)), "num_warps": num_warps,
    }


def _n_programs(q: Tensor, shape: dict[str, Any]) -> int:
    return q.shape[0] * q.shape[1] * -(-q.shape[2] // shape["ROWS"])


# ---- which of the two ----------------------------------------------------------------------------

def null_terms(q: Tensor, out: Tensor, lse: Tensor, null_k: Tensor, null_v: Tensor) -> tuple[Tensor, Tensor]:
    """(full_out, full_lse) as :func:`null_terms_plain` describes, by the kernel where it runs."""
    return (null_terms_fused if _runs_fused(q) else null_terms_plain)(q, out, lse, null_k, null_v)


def null_terms_backward(
    dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, null_k: Tensor, null_v: Tensor, dq: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dnull_k, dnull_v) as :func:`null_terms_backward_plain` describes, by the kernel where it runs."""
    function = null_terms_backward_fused if _runs_fused(q) else null_terms_backward_plain
    return function(dout, q, out, lse, null_k, null_v, dq)


def _runs_fused(q: Tensor) -> bool:
    # torch.compile fuses the twins by itself, and must not see memory overwritten behind its back.
    return not torch.compiler.is_compiling() and runs_fused(q)
