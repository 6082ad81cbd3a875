"""Queries and keys inside the fused projection's output: scale, rotate (RoPE, Su et al. 2021, arXiv 2104.09864), split.

The backward pass does the inverse, gathers the three gradients into one tensor, and sums the temperatures' gradient on
the way. No autograd here.

Legend: B batch, T tokens, H query heads, K key/value heads, D entries of a query or key head, of which the last G are
rotated (Llama's halves are pairs), S = D - G, V entries of a value head, W the projection's width: H * D queries (none
with tied queries and keys), then K * D keys, then K * V values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oneb.kernels.elementwise_common import (
    CAST_POINTERS,
    cast_arguments,
    cast_plain,
    finished,
    load_scale,
    raise_amax_to,
    store,
    stored_like,
)
from oneb.kernels.float8 import Float8Cast, magnitude_bits
from oneb.kernels.runtime import jit, runs_fused, tl, triton

_TILE = 1024  # elements of a program's largest tile
_NUM_WARPS = 4  # so 8 elements a thread: one 16-byte load
_GROUPS = 8  # tiles a program takes one after the other; a power of two


# ---- the twins -----------------------------------------------------------------------------------

def rotary_plain(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, scale: Tensor, n_heads: int, n_kv_heads: int,
    head_dim: int, v_head_dim: int, tie_qk: bool, starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled and rotated queries, rotated keys, and values. Queries and keys *overwrite* their part of ``qkv``.

    Args:
        qkv: (B, T, W) contiguous, 16 or 32 bits.
        cos, sin: (T, G/2) fp32, or both None without rotation.
        scale: (D,) or (H, D) fp32, multiplies queries before they are rotated.
        n_heads, n_kv_heads, head_dim, v_head_dim: H, K, D, V.
        tie_qk: queries are made from the keys' part (H = K), into memory of their own.
        starts: (B, T) int32, the positions from which each token's own is counted (its document's start); None is 0.

    Returns:
        q (B, H, T, D), k (B, K, T, D), v (B, K, T, V): views of ``qkv`` with strides of (B, T, heads, entries)
        memory; with ``tie_qk`` q is a view of new memory (B, T, H, D).
    """
    q, k, v = _parts(qkv, n_heads, n_kv_heads, head_dim, v_head_dim, tie_qk)
    source = k if tie_qk else q
    q.copy_(_rotate(source.float() * scale, cos, sin, starts))
    k.copy_(_rotate(k.float(), cos, sin, starts))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def rotary_backward_plain(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor | None, cos: Tensor | None, sin: Tensor | None, scale: Tensor,
    tie_qk: bool, cast: Float8Cast | None = None, starts: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the projection's output, and of the logarithm of a per-head factor in ``scale``.

    Rotations keep dot products, so the latter is the sum of dq * q over a head.

    Args:
        dq, dk, dv: (B, H, T, D), (B, K, T, D), (B, K, T, V); any strides but the last, which is 1.
        q: as the forward pass returned it, strides like dq's; None where no such gradient is wanted.
        cos, sin, scale, tie_qk, starts: as in the forward pass.
        cast: makes dqkv fp8.

    Returns:
        dqkv: (B, T, W) contiguous, in dq's dtype or ``cast.dtype``.
        dlog_temperature: (H,) fp32, or None without ``q``.
    """
    dlog = None if q is None else (dq.float() * q.float()).sum((0, 2, 3))
    inverse = None if sin is None else -sin
    parts = [
        _rotate(dq.transpose(1, 2).float(), cos, inverse, starts) * scale,
        _rotate(dk.transpose(1, 2).float(), cos, inverse, starts), dv.transpose(1, 2).float(),
    ]
    if tie_qk:
        parts[:2] = [parts[0] + parts[1]]
    return cast_plain(torch.cat([part.flatten(2) for part in parts], dim=-1), dq.dtype, cast), dlog


def _parts(
    qkv: Tensor, n_heads: int, n_kv_heads: int, head_dim: int, v_head_dim: int, tie_qk: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, T, H, D), keys (B, T, K, D) and values (B, T, K, V); tied queries are uninitialised memory."""
    assert qkv.is_contiguous()
    assert not tie_qk or n_heads == n_kv_heads
    widths = [0 if tie_qk else n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * v_head_dim]
    q, k, v = qkv.split(widths, dim=-1)
    k, v = k.unflatten(-1, (n_kv_heads, head_dim)), v.unflatten(-1, (n_kv_heads, v_head_dim))
    q = qkv.new_empty(k.shape) if tie_qk else q.unflatten(-1, (n_heads, head_dim))
    return q, k, v


def _rotate(wide: Tensor, cos: Tensor | None, sin: Tensor | None, starts: Tensor | None) -> Tensor:
    """Rotate the last G entries of fp32 (B, T, heads, D)."""
    if cos is None or sin is None:
        return wide
    half = cos.shape[-1]
    sem, a, b = wide.split([wide.shape[-1] - 2 * half, half, half], dim=-1)
    if starts is not None:
        rows = torch.arange(wide.shape[1], device=wide.device) - starts
        cos, sin = cos[rows], sin[rows]  # (B, T, G/2)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (…, T, 1, G/2)
    return torch.cat([sem, a * cos - b * sin, b * cos + a * sin], dim=-1)


# ---- the kernels ---------------------------------------------------------------------------------
# A program takes whole tokens, TOKENS at a time, so that heads narrower than a memory sector are still read side by
# side. A tile's rows are (token, head); its columns are the S unrotated entries, or the first or the second halves.
# Names in _P are padded to powers of two. Queries, keys and values are different programs of one launch.

@jit
def _rows(group, n_tokens, seq_len, HEADS: tl.constexpr, TOKENS: tl.constexpr, HEADS_P: tl.constexpr):
    """(rows, 1) token from the group's first, batch, position, head, and whether the row exists."""
    rows = tl.arange(0, TOKENS * HEADS_P)[:, None]
    local, head = rows // HEADS_P, rows % HEADS_P
    token = group * TOKENS + local
    return local, token // seq_len, token % seq_len, head, (head < HEADS) & (token < n_tokens)


@jit
def _angles(
    cos_ptr, sin_ptr, starts_ptr, token, position, exists, mask, HALF: tl.constexpr, HALF_P: tl.constexpr,
):
    if starts_ptr is not None:
        position -= tl.load(starts_ptr + token, mask=exists, other=0)
    offsets = position * HALF + tl.arange(0, HALF_P)[None, :]
    return tl.load(cos_ptr + offsets, mask=mask, other=0.0), tl.load(sin_ptr + offsets, mask=mask, other=0.0)


@jit
def _query_scales(
    ptr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BY_HEAD: tl.constexpr,
    TOKENS: tl.constexpr, HEADS_P: tl.constexpr, SEM_P: tl.constexpr, HALF_P: tl.constexpr,
):
    """The factors of a tile of unrotated entries, of first halves, and of second halves; ones without ``ptr``."""
    SEM: tl.constexpr = HEAD_DIM - 2 * HALF
    if ptr is None:
        return 1.0, 1.0, 1.0
    else:  # noqa: RET505 -- Triton compiles only the branch that is taken
        sem, pair = tl.arange(0, SEM_P)[None, :], tl.arange(0, HALF_P)[None, :]
        head = tl.arange(0, TOKENS * HEADS_P)[:, None] % HEADS_P
        row = ptr + head * HEAD_DIM * BY_HEAD
        pairs = (head < HEADS) & (pair < HALF)
        return (
            tl.load(row + sem, mask=(head < HEADS) & (sem < SEM), other=0.0),
            tl.load(row + SEM + pair, mask=pairs, other=0.0),
            tl.load(row + SEM + HALF + pair, mask=pairs, other=0.0),
        )


@jit
def _rotate_heads(
    qkv_ptr, q_ptr, cos_ptr, sin_ptr, starts_ptr, query_scale_ptr, program, n_tokens, seq_len, FIRST: tl.constexpr,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BY_HEAD: tl.constexpr,
    TOKENS: tl.constexpr, HEADS_P: tl.constexpr, SEM_P: tl.constexpr, HALF_P: tl.constexpr, GROUPS: tl.constexpr,
):
    """Heads from entry FIRST of a token's row on. Without ``q_ptr`` in place, scaled where there is a scale; with it
    they are keys, rotated in place, and queries made from them go there."""
    SEM: tl.constexpr = HEAD_DIM - 2 * HALF
    sem, pair = tl.arange(0, SEM_P)[None, :], tl.arange(0, HALF_P)[None, :]
    sem_scale, a_scale, b_scale = _query_scales(
        query_scale_ptr, HEADS, HEAD_DIM, HALF, BY_HEAD, TOKENS, HEADS_P, SEM_P, HALF_P)
    for group in range(program * GROUPS, tl.minimum(program * GROUPS + GROUPS, tl.cdiv(n_tokens, TOKENS))):
        local, _, position, head, exists = _rows(group, n_tokens, seq_len, HEADS, TOKENS, HEADS_P)
        start = tl.cast(group, tl.int64) * TOKENS
        source = qkv_ptr + start * WIDTH + (local * WIDTH + FIRST + head * HEAD_DIM)
        target = source
        if q_ptr is not None:
            target = q_ptr + start * (HEADS * HEAD_DIM) + (local * (HEADS * HEAD_DIM) + head * HEAD_DIM)
        if SEM > 0 and query_scale_ptr is not None:
            mask = exists & (sem < SEM)
            x = tl.load(source + sem, mask=mask, other=0.0).to(tl.float32)
            store(target + sem, x * sem_scale, mask, 1.0, 0.0)
        if HALF > 0:
            mask = exists & (pair < HALF)
            token = group * TOKENS + local
            cos, sin = _angles(cos_ptr, sin_ptr, starts_ptr, token, position, exists, mask, HALF, HALF_P)
            a = tl.load(source + SEM + pair, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(source + SEM + HALF + pair, mask=mask, other=0.0).to(tl.float32)
            if q_ptr is not None:
                store(source + SEM + pair, a * cos - b * sin, mask, 1.0, 0.0)
                store(source + SEM + HALF + pair, b * cos + a * sin, mask, 1.0, 0.0)
            a, b = a * a_scale, b * b_scale
            store(target + SEM + pair, a * cos - b * sin, mask, 1.0, 0.0)
            store(target + SEM + HALF + pair, b * cos + a * sin, mask, 1.0, 0.0)


def _rotary_kernel(
    qkv_ptr, q_ptr, cos_ptr, sin_ptr, starts_ptr, query_scale_ptr, n_tokens, seq_len,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BY_HEAD: tl.constexpr, ROLES: tl.constexpr,
    HEADS_P: tl.constexpr, KV_HEADS_P: tl.constexpr, SEM_P: tl.constexpr, HALF_P: tl.constexpr,
    TOKENS: tl.constexpr, KV_TOKENS: tl.constexpr, GROUPS: tl.constexpr, KV_GROUPS: tl.constexpr,
):
    program = tl.program_id(0) // ROLES
    if tl.program_id(0) % ROLES == 0:
        _rotate_heads(
            qkv_ptr, q_ptr, cos_ptr, sin_ptr, starts_ptr, query_scale_ptr, program, n_tokens, seq_len, 0,
            WIDTH, HEADS, HEAD_DIM, HALF, BY_HEAD, TOKENS, HEADS_P, SEM_P, HALF_P, GROUPS)
    else:
        _rotate_heads(
            qkv_ptr, None, cos_ptr, sin_ptr, starts_ptr, None, program, n_tokens, seq_len, HEADS * HEAD_DIM,
            WIDTH, KV_HEADS, HEAD_DIM, HALF, BY_HEAD, KV_TOKENS, KV_HEADS_P, SEM_P, HALF_P, KV_GROUPS)


@jit
def _at(ptr, batch, position, head, strides, ALIGN: tl.constexpr):
    """(rows, 1) pointers to (batch, head, position). Strides count ALIGN entries, so that Triton knows as much."""
    stride_b, stride_h, stride_t = strides
    offsets = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + position.to(tl.int64) * stride_t
    return ptr + offsets * ALIGN


@jit
def _store(ptr, value, mask, scale, bits, LARGEST: tl.constexpr):
    """Store a tile as is or cast; ``bits`` (rows,) keeps each row's largest magnitude."""
    if LARGEST > 0:
        bits = tl.maximum(bits, tl.max(magnitude_bits(value), axis=1))
    store(ptr, value, mask, scale, LARGEST)
    return bits


@jit
def _head_gradients(
    grad_ptr, grad_strides, more_ptr, more_strides, q_ptr, q_strides, cos_ptr, sin_ptr, starts_ptr, query_scale_ptr,
    dqkv_ptr, partial_ptr, scale_ptr, amax_ptr, program, n_tokens, seq_len, FIRST: tl.constexpr,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BY_HEAD: tl.constexpr,
    LARGEST: tl.constexpr, ALIGN: tl.constexpr, TOKENS: tl.constexpr, HEADS_P: tl.constexpr, SEM_P: tl.constexpr,
    HALF_P: tl.constexpr, GROUPS: tl.constexpr,
):
    """Gradients of heads, to entry FIRST of a token's row on; with ``more_ptr`` those of tied keys are added."""
    SEM: tl.constexpr = HEAD_DIM - 2 * HALF
    sem, pair = tl.arange(0, SEM_P)[None, :], SEM + tl.arange(0, HALF_P)[None, :]
    sem_scale, a_scale, b_scale = _query_scales(
        query_scale_ptr, HEADS, HEAD_DIM, HALF, BY_HEAD, TOKENS, HEADS_P, SEM_P, HALF_P)
    scale = load_scale(scale_ptr)
    dots = tl.zeros((TOKENS * HEADS_P,), tl.float32)
    bits = tl.zeros((TOKENS * HEADS_P,), tl.int32)
    for group in range(program * GROUPS, tl.minimum(program * GROUPS + GROUPS, tl.cdiv(n_tokens, TOKENS))):
        local, batch, position, head, exists = _rows(group, n_tokens, seq_len, HEADS, TOKENS, HEADS_P)
        target = dqkv_ptr + tl.cast(group, tl.int64) * TOKENS * WIDTH + (local * WIDTH + FIRST + head * HEAD_DIM)
        grad = _at(grad_ptr, batch, position, head, grad_strides, ALIGN)
        if SEM > 0:
            mask = exists & (sem < SEM)
            x = tl.load(grad + sem, mask=mask, other=0.0).to(tl.float32)
            if q_ptr is not None:
                q = tl.load(_at(q_ptr, batch, position, head, q_strides, ALIGN) + sem, mask=mask, other=0.0)
                dots += tl.sum(x * q.to(tl.float32), axis=1)
            x *= sem_scale
            if more_ptr is not None:
                more = _at(more_ptr, batch, position, head, more_strides, ALIGN)
                x += tl.load(more + sem, mask=mask, other=0.0).to(tl.float32)
            bits = _store(target + sem, x, mask, scale, bits, LARGEST)
        if HALF > 0:
            mask = exists & (pair < SEM + HALF)
            token = group * TOKENS + local
            cos, sin = _angles(cos_ptr, sin_ptr, starts_ptr, token, position, exists, mask, HALF, HALF_P)
            a = tl.load(grad + pair, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(grad + HALF + pair, mask=mask, other=0.0).to(tl.float32)
            if q_ptr is not None:
                q = _at(q_ptr, batch, position, head, q_strides, ALIGN)
                qa, qb = tl.load(q + pair, mask=mask, other=0.0), tl.load(q + HALF + pair, mask=mask, other=0.0)
                dots += tl.sum(a * qa.to(tl.float32) + b * qb.to(tl.float32), axis=1)
            da, db = (a * cos + b * sin) * a_scale, (b * cos - a * sin) * b_scale
            if more_ptr is not None:
                more = _at(more_ptr, batch, position, head, more_strides, ALIGN)
                a = tl.load(more + pair, mask=mask, other=0.0).to(tl.float32)
                b = tl.load(more + HALF + pair, mask=mask, other=0.0).to(tl.float32)
                da, db = da + a * cos + b * sin, db + b * cos - a * sin
            bits = _store(target + pair, da, mask, scale, bits, LARGEST)
            bits = _store(target + HALF + pair, db, mask, scale, bits, LARGEST)
    if q_ptr is not None:
        head = tl.arange(0, HEADS_P)
        partial = tl.sum(tl.reshape(dots, (TOKENS, HEADS_P)), axis=0)
        tl.store(partial_ptr + program * HEADS + head, partial, mask=head < HEADS)
    if LARGEST > 0:
        raise_amax_to(amax_ptr, bits)


def _rotary_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, q_ptr, cos_ptr, sin_ptr, starts_ptr, query_scale_ptr, dqkv_ptr, partial_ptr, scale_ptr,
    amax_ptr, n_tokens, seq_len, dq_b, dq_h, dq_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t, q_b, q_h, q_t,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    VALUE_DIM: tl.constexpr, BY_HEAD: tl.constexpr, TIED: tl.constexpr, LARGEST: tl.constexpr, ALIGN: tl.constexpr,
    HEADS_P: tl.constexpr, KV_HEADS_P: tl.constexpr, SEM_P: tl.constexpr, HALF_P: tl.constexpr, VALUE_P: tl.constexpr,
    TOKENS: tl.constexpr, KV_TOKENS: tl.constexpr, GROUPS: tl.constexpr, KV_GROUPS: tl.constexpr,
):
    dk_strides, dv_strides = (dk_b, dk_h, dk_t), (dv_b, dv_h, dv_t)
    KEYS: tl.constexpr = 0 if TIED else HEADS * HEAD_DIM
    ROLES: tl.constexpr = 2 if TIED else 3
    role, program = tl.program_id(0) % ROLES, tl.program_id(0) // ROLES
    if role == 0:
        _head_gradients(
            dq_ptr, (dq_b, dq_h, dq_t), dk_ptr if TIED else None, dk_strides, q_ptr, (q_b, q_h, q_t),
            cos_ptr, sin_ptr, starts_ptr, query_scale_ptr, dqkv_ptr, partial_ptr, scale_ptr, amax_ptr, program,
            n_tokens, seq_len, 0, WIDTH, HEADS, HEAD_DIM, HALF, BY_HEAD, LARGEST, ALIGN, TOKENS, HEADS_P, SEM_P, HALF_P,
            GROUPS)
    elif role == 1:  # values: heads of which nothing is rotated
        _head_gradients(
            dv_ptr, dv_strides, None, dv_strides, None, dv_strides,
            None, None, None, None, dqkv_ptr, None, scale_ptr, amax_ptr, program, n_tokens, seq_len,
            KEYS + KV_HEADS * HEAD_DIM, WIDTH, KV_HEADS, VALUE_DIM, 0, BY_HEAD, LARGEST, ALIGN, KV_TOKENS, KV_HEADS_P,
            VALUE_P, 1, KV_GROUPS)
    else:
        _head_gradients(
            dk_ptr, dk_strides, None, dk_strides, None, dk_strides,
            cos_ptr, sin_ptr, starts_ptr, None, dqkv_ptr, None, scale_ptr, amax_ptr, program, n_tokens, seq_len,
            KEYS, WIDTH, KV_HEADS, HEAD_DIM, HALF, BY_HEAD, LARGEST, ALIGN, KV_TOKENS, KV_HEADS_P, SEM_P, HALF_P,
            KV_GROUPS)


_STRIDES = [f"{name}_{axis}" for name in ("dq", "dk", "dv", "q") for axis in "bht"]
_rotary_kernel = jit(_rotary_kernel, do_not_specialize=["n_tokens", "seq_len"])
_rotary_backward_kernel = jit(
    _rotary_backward_kernel, do_not_specialize=["n_tokens", "seq_len", *_STRIDES],
    do_not_specialize_on_alignment=list(CAST_POINTERS),
)


def _tile_arguments(heads: int, kv_heads: int, head_dim: int, cos: Tensor | None, scale: Tensor) -> dict[str, int]:
    """The constants that kernels of both directions share."""
    half = 0 if cos is None else cos.shape[-1]
    padded = [triton.next_power_of_2(max(1, n)) for n in (heads, kv_heads, head_dim - 2 * half, half)]
    tokens = max(1, _TILE // (padded[0] * max(padded[2:])))
    wider = min(_GROUPS, max(1, padded[0] // padded[1]))  # fewer heads: more tokens a tile, and fewer tiles
    return {
        "HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "HALF": half, "BY_HEAD": scale.dim() - 1,
        **dict(zip(("HEADS_P", "KV_HEADS_P", "SEM_P", "HALF_P"), padded, strict=True)),
        "TOKENS": tokens, "KV_TOKENS": tokens * wider, "GROUPS": _GROUPS, "KV_GROUPS": _GROUPS // wider,
    }


def rotary_fused(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, scale: Tensor, n_heads: int, n_kv_heads: int,
    head_dim: int, v_head_dim: int, tie_qk: bool, starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`rotary_plain` as one Triton kernel, which leaves values alone."""
    q, k, v = _parts(qkv, n_heads, n_kv_heads, head_dim, v_head_dim, tie_qk)
    tiles = _tile_arguments(n_heads, n_kv_heads, head_dim, cos, scale)
    n_tokens, seq_len = qkv.shape[0] * qkv.shape[1], qkv.shape[1]
    roles = 1 if tie_qk or cos is None else 2  # keys are a role unless queries bring them along or nothing changes them
    n_programs = triton.cdiv(n_tokens, tiles["TOKENS"] * _GROUPS)
    _rotary_kernel[(n_programs * roles,)](
        qkv, q if tie_qk else None, cos, sin, starts, scale, n_tokens, seq_len,
        WIDTH=qkv.shape[2], ROLES=roles, num_warps=_NUM_WARPS, **tiles,
    )
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def rotary_backward_fused(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor | None, cos: Tensor | None, sin: Tensor | None, scale: Tensor,
    tie_qk: bool, cast: Float8Cast | None = None, starts: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`rotary_backward_plain` as one Triton kernel; the temperatures' gradient is summed in a fixed order."""
    batch, heads, seq_len, head_dim = dq.shape
    kv_heads, value_dim = dv.shape[1], dv.shape[3]
    sources = [dq, dk, dv, dq if q is None else q]
    assert all(tensor.stride(-1) == 1 for tensor in sources)
    strides = [tensor.stride(axis) for tensor in sources for axis in (0, 1, 2)]
    align = next(unit for unit in (16, 8, 4, 2, 1) if all(stride % unit == 0 for stride in strides))
    width = (0 if tie_qk else heads * head_dim) + kv_heads * (head_dim + value_dim)
    dqkv = stored_like(dq, (batch, seq_len, width), cast)
    tiles = _tile_arguments(heads, kv_heads, head_dim, cos, scale)
    n_programs = triton.cdiv(batch * seq_len, tiles["TOKENS"] * _GROUPS)
    partial = None if q is None else scale.new_empty(n_programs, heads)
    _rotary_backward_kernel[(n_programs * (2 if tie_qk else 3),)](
        dq, dk, dv, q, cos, sin, starts, scale, dqkv, partial, n_tokens=batch * seq_len, seq_len=seq_len,
        **{name: stride // align for name, stride in zip(_STRIDES, strides, strict=True)},
        WIDTH=width, VALUE_DIM=value_dim, VALUE_P=triton.next_power_of_2(value_dim), TIED=tie_qk, ALIGN=align,
        num_warps=_NUM_WARPS, **tiles, **cast_arguments(cast),
    )
    return finished(dqkv, cast), None if partial is None else partial.sum(0)


def rotary(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, scale: Tensor, n_heads: int, n_kv_heads: int,
    head_dim: int, v_head_dim: int, tie_qk: bool, starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) as :func:`rotary_plain` describes, by the kernel where it runs; overwrites ``qkv``."""
    function = rotary_fused if runs_fused(qkv) else rotary_plain
    return function(qkv, cos, sin, scale, n_heads, n_kv_heads, head_dim, v_head_dim, tie_qk, starts)


def rotary_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor | None, cos: Tensor | None, sin: Tensor | None, scale: Tensor,
    tie_qk: bool, cast: Float8Cast | None = None, starts: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(dqkv, dlog_temperature) as :func:`rotary_backward_plain` describes, by the kernel where it runs."""
    function = rotary_backward_fused if runs_fused(dq) else rotary_backward_plain
    return function(dq, dk, dv, q, cos, sin, scale, tie_qk, cast, starts)
