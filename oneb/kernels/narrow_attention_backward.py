"""Backward kernels of :mod:`oneb.kernels.narrow_attention`; shapes as there.

Gradients follow FlashAttention 2 (Dao 2023, arXiv 2307.08691, algorithm 2): probabilities are rebuilt as
``p = exp(score - lse)``, and ``dscore = p * (dout @ v - delta)`` with ``delta = rowsum(dout * out)``.

One program owns a tile of keys and walks over the queries, on *transposed* scores ``k @ q.T``: tensor-core results
then feed the dv and dk products straight from registers. dq is either added to a fp32 buffer with atomics in the same
pass (one exponential a score; sums depend on the order in which programs finish), or computed by a second kernel that
owns tiles of queries (two exponentials a score; the same bits every time).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oneb.kernels.documents import Documents
from oneb.kernels.narrow_attention_common import (
    LOG2E,
    Tiles,
    alignment,
    by_width,
    constant,
    document_keys,
    document_queries,
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
from oneb.kernels.runtime import jit, tl

# Candidates by the padded width of heads, the best guess first: each costs a compilation in a cold start.
DKDV_TILES = {
    32: (Tiles(32, 128, 2, 3), Tiles(64, 64, 2, 3), Tiles(32, 64, 2, 3)),
    64: (Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 3), Tiles(64, 128, 8, 2)),
    128: (Tiles(64, 64, 8, 2), Tiles(32, 64, 4, 2)),
}
DQ_TILES = {
    32: (Tiles(128, 32, 4, 2), Tiles(64, 32, 2, 2)),
    64: (Tiles(128, 64, 4, 2), Tiles(64, 64, 4, 2)),
    128: (Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 2)),
}
_ROWS = 128  # rows that the row-wise kernel takes, and the multiple that its outputs are padded to
# Minus the lse of rows past the end, where packed: probabilities vanish there, and bf16 holds it.
_VANISH = constant(-1e30)


@jit
def _pack(x, extra, columns, PADDED: tl.constexpr):
    """Rows of ``x`` whose last three columns add up to ``extra`` (fp32) within 2**-24 of it."""
    high = extra.to(x.dtype)
    rest = extra - high.to(tl.float32)
    middle = rest.to(x.dtype)
    low = (rest - middle.to(tl.float32)).to(x.dtype)
    x = tl.where(columns == PADDED - 3, high[:, None], x)
    x = tl.where(columns == PADDED - 2, middle[:, None], x)
    return tl.where(columns == PADDED - 1, low[:, None], x)


@plain_integers
def _narrow_attention_rows_kernel(
    dout_ptr, q_ptr, null_k_ptr, null_v_ptr, out_ptr, lse_ptr,
    lse2_ptr, delta_ptr, dq_ptr, dnull_ptr, packed_q_ptr, packed_dout_ptr,
    g_b, g_h, g_t, q_b, q_h, q_t, n_tokens, n_padded,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, QK_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    QK_PADDED: tl.constexpr, V_PADDED: tl.constexpr, ALIGN: tl.constexpr, NULL: tl.constexpr, DQ: tl.constexpr,
    PACKED: tl.constexpr, ROWS: tl.constexpr,
):
    """Per query: lse in base 2 (infinite past the end, so that probabilities vanish), delta, and the null key's terms.

    With ``DQ`` it begins the fp32 dq with the null key's term, or with zeros. With ``PACKED`` it writes queries and
    dout in padded rows whose last three columns hold -lse and -delta.
    """
    program = tl.program_id(0)
    head = program % HEADS  # heads first: neighbours share memory lines
    n_tiles = n_padded // ROWS
    tile = program // HEADS % n_tiles
    batch = program // HEADS // n_tiles
    first = tile * ROWS
    rows = first + tl.arange(0, ROWS)
    inside = rows < n_tokens
    qk_columns = tl.arange(0, QK_PADDED)
    v_columns = tl.arange(0, V_PADDED)
    row_base = (tl.cast(batch, tl.int64) * HEADS + head) * n_tokens
    padded_base = (tl.cast(batch, tl.int64) * HEADS + head) * n_padded

    g = head_pointer(dout_ptr, batch, head, g_b, g_h, ALIGN)
    narrow_dout = load_rows(g, first, g_t, n_tokens, ROWS, V_WIDTH, V_PADDED, ALIGN, True)
    dout = narrow_dout.to(tl.float32)
    o = out_ptr + (tl.cast(batch, tl.int64) * n_tokens * HEADS + head) * V_WIDTH
    out = load_rows(o, first, HEADS * V_WIDTH, n_tokens, ROWS, V_WIDTH, V_PADDED, 1, True).to(tl.float32)
    delta = tl.sum(dout * out, 1)
    lse = tl.load(lse_ptr + row_base + rows, mask=inside, other=float("inf"))
    lse2 = lse * LOG2E
    tl.store(lse2_ptr + padded_base + rows, lse2)
    tl.store(delta_ptr + padded_base + rows, delta)

    narrow_q = load_rows(
        head_pointer(q_ptr, batch, head, q_b, q_h, ALIGN), first, q_t, n_tokens, ROWS, QK_WIDTH, QK_PADDED, ALIGN, True)
    if PACKED:
        places = (padded_base + rows)[:, None]
        packed = _pack(narrow_q, tl.where(inside, -lse, _VANISH), qk_columns[None, :], QK_PADDED)
        tl.store(packed_q_ptr + places * QK_PADDED + qk_columns[None, :], packed)
        packed = _pack(narrow_dout, -delta, v_columns[None, :], V_PADDED)
        tl.store(packed_dout_ptr + places * V_PADDED + v_columns[None, :], packed)
    dq = tl.zeros((ROWS, QK_PADDED), tl.float32)
    if NULL:
        kv_head = head // (HEADS // KV_HEADS)
        null_k = null_key(null_k_ptr, kv_head, QK_WIDTH, QK_PADDED)
        null_v = null_key(null_v_ptr, kv_head, V_WIDTH, V_PADDED)
        q = narrow_q.to(tl.float32)
        p = tl.exp2(tl.sum(q * null_k[None, :], 1) * LOG2E - lse2)
        dscore = p * (tl.sum(dout * null_v[None, :], 1) - delta)
        dq = dscore[:, None] * null_k[None, :]
        # (programs, QK_PADDED + V_PADDED): summed by the caller, in the same order every time
        partial_ptr = dnull_ptr + tl.cast(program, tl.int64) * (QK_PADDED + V_PADDED)
        tl.store(partial_ptr + qk_columns, tl.sum(dscore[:, None] * q, 0))
        tl.store(partial_ptr + QK_PADDED + v_columns, tl.sum(p[:, None] * dout, 0))
    if DQ:
        d = dq_ptr + (tl.cast(batch, tl.int64) * n_tokens * HEADS + head) * QK_WIDTH
        pointers = d + tl.cast(rows, tl.int64)[:, None] * (HEADS * QK_WIDTH) + qk_columns[None, :]
        tl.store(pointers, dq, mask=inside[:, None] & (qk_columns[None, :] < QK_WIDTH))


@jit
def _dkdv_queries(
    dk, dv, k, v, q, g, lse2_ptr, delta_ptr, dq_ptr, q_t, g_t, ends, first_key, first, last, n_tokens,
    HEADS: tl.constexpr, QK_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, Q_ALIGN: tl.constexpr, DQ: tl.constexpr,
    NATIVE: tl.constexpr, PACKED: tl.constexpr, QUERIES: tl.constexpr, DOCS: tl.constexpr, MASKED: tl.constexpr,
):
    """dk and dv (fp32) with the terms of queries ``first .. last`` added; with ``DQ``, dq too, by atomics."""
    KEYS: tl.constexpr = k.shape[0]
    QK_PADDED: tl.constexpr = k.shape[1]
    V_PADDED: tl.constexpr = v.shape[1]
    columns = tl.arange(0, QK_PADDED)
    for start in range(first, last, QUERIES):
        rows = start + tl.arange(0, QUERIES)
        if PACKED:
            queries = load_rows(q, start, q_t, n_tokens, QUERIES, QK_PADDED, QK_PADDED, Q_ALIGN, False)
            dout = load_rows(g, start, g_t, n_tokens, QUERIES, V_PADDED, V_PADDED, Q_ALIGN, False)
            scores = product(k, tl.trans(queries), None, NATIVE) * LOG2E  # (KEYS, QUERIES)
        else:
            queries = load_rows(q, start, q_t, n_tokens, QUERIES, QK_WIDTH, QK_PADDED, Q_ALIGN, True)
            dout = load_rows(g, start, g_t, n_tokens, QUERIES, V_WIDTH, V_PADDED, Q_ALIGN, True)
            scores = product(k, tl.trans(queries), None, NATIVE) * LOG2E - tl.load(lse2_ptr + rows)[None, :]
        if MASKED:
            seen = (start - first_key + tl.arange(0, QUERIES))[None, :] >= tl.arange(0, KEYS)[:, None]
            if DOCS:
                seen &= rows[None, :] < ends[:, None]
            scores = tl.where(seen, scores, float("-inf"))
        p = exp2(scores, NATIVE)
        dv = product(p.to(v.dtype), dout, dv, NATIVE)
        dp = product(v, tl.trans(dout), None, NATIVE)
        if not PACKED:
            dp -= tl.load(delta_ptr + rows)[None, :]
        dscore = (p * dp).to(k.dtype)
        dk = product(dscore, queries, dk, NATIVE)
        if DQ:
            dq = product(tl.trans(dscore), k, None, NATIVE)
            pointers = dq_ptr + tl.cast(rows, tl.int64)[:, None] * (HEADS * QK_WIDTH) + columns[None, :]
            inside = (rows[:, None] < n_tokens) & (columns[None, :] < QK_WIDTH)
            tl.atomic_add(pointers, dq, mask=inside, sem="relaxed")
    return dk, dv


@plain_integers
def _narrow_attention_dkdv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, ends_ptr, lse2_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr,
    g_b, g_h, g_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    n_tokens, n_padded, n_batch_heads, heads_together, tuning_tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, QK_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    QK_PADDED: tl.constexpr, V_PADDED: tl.constexpr, ALIGN: tl.constexpr, Q_ALIGN: tl.constexpr, DQ: tl.constexpr,
    DOCS: tl.constexpr, NATIVE: tl.constexpr, PACKED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    """dk and dv of one tile of keys, over all queries that see it; with ``DQ``, its share of dq as well.

    With ``PACKED`` queries and dout come as :func:`_narrow_attention_rows_kernel` packs them. Three columns of ones
    beside keys and values then make the tensor cores subtract lse and delta, which otherwise costs a quarter of the
    instructions.
    """
    tile, batch_head = place(tl.program_id(0), tl.cdiv(n_tokens, KEYS), n_batch_heads, heads_together)
    batch = batch_head // KV_HEADS
    kv_head = batch_head % KV_HEADS
    GROUP: tl.constexpr = HEADS // KV_HEADS
    first_key = tile * KEYS

    kh = head_pointer(k_ptr, batch, kv_head, k_b, k_h, ALIGN)
    vh = head_pointer(v_ptr, batch, kv_head, v_b, v_h, ALIGN)
    k = load_rows(kh, first_key, k_t, n_tokens, KEYS, QK_WIDTH, QK_PADDED, ALIGN, True)
    v = load_rows(vh, first_key, v_t, n_tokens, KEYS, V_WIDTH, V_PADDED, ALIGN, True)
    if PACKED:
        one = tl.full((1, 1), 1.0, tl.float32).to(k.dtype)
        k = tl.where(tl.arange(0, QK_PADDED)[None, :] >= QK_PADDED - 3, one, k)
        v = tl.where(tl.arange(0, V_PADDED)[None, :] >= V_PADDED - 3, one, v)
    dk = tl.zeros((KEYS, QK_PADDED), tl.float32)
    dv = tl.zeros((KEYS, V_PADDED), tl.float32)
    diagonal = first_key // QUERIES * QUERIES
    below = tl.minimum(tl.cdiv(first_key + KEYS, QUERIES) * QUERIES, n_tokens)
    ends, clear, last = document_queries(ends_ptr, batch, first_key, below, n_tokens, QUERIES, KEYS, DOCS)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        row_base = (tl.cast(batch, tl.int64) * HEADS + head) * n_padded
        q = head_pointer(q_ptr, batch, head, q_b, q_h, Q_ALIGN)
        g = head_pointer(dout_ptr, batch, head, g_b, g_h, Q_ALIGN)
        dq = dq_ptr + (tl.cast(batch, tl.int64) * n_tokens * HEADS + head) * QK_WIDTH
        dk, dv = _dkdv_queries(
            dk, dv, k, v, q, g, lse2_ptr + row_base, delta_ptr + row_base, dq, q_t, g_t, ends, first_key,
            diagonal, below, n_tokens, HEADS, QK_WIDTH, V_WIDTH, Q_ALIGN, DQ, NATIVE, PACKED, QUERIES, DOCS, True)
        dk, dv = _dkdv_queries(
            dk, dv, k, v, q, g, lse2_ptr + row_base, delta_ptr + row_base, dq, q_t, g_t, ends, first_key,
            below, clear, n_tokens, HEADS, QK_WIDTH, V_WIDTH, Q_ALIGN, DQ, NATIVE, PACKED, QUERIES, DOCS, False)
        if DOCS:
            dk, dv = _dkdv_queries(
                dk, dv, k, v, q, g, lse2_ptr + row_base, delta_ptr + row_base, dq, q_t, g_t, ends, first_key,
                clear, last, n_tokens, HEADS, QK_WIDTH, V_WIDTH, Q_ALIGN, DQ, NATIVE, PACKED, QUERIES, DOCS, True)
    keys = tl.cast(batch, tl.int64) * n_tokens + first_key + tl.arange(0, KEYS)
    inside = (first_key + tl.arange(0, KEYS) < n_tokens)[:, None]
    columns = tl.arange(0, QK_PADDED)[None, :]
    pointers = dk_ptr + (keys[:, None] * KV_HEADS + kv_head) * QK_WIDTH + columns
    tl.store(pointers, dk.to(dk_ptr.dtype.element_ty), mask=inside & (columns < QK_WIDTH))
    columns = tl.arange(0, V_PADDED)[None, :]
    pointers = dv_ptr + (keys[:, None] * KV_HEADS + kv_head) * V_WIDTH + columns
    tl.store(pointers, dv.to(dv_ptr.dtype.element_ty), mask=inside & (columns < V_WIDTH))


@jit
def _dq_keys(
    dq, q, dout, kh, vh, k_t, v_t, lse2, delta, starts, first_row, first, last, n_tokens,
    QK_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, ALIGN: tl.constexpr, NATIVE: tl.constexpr,
    KEYS: tl.constexpr, DOCS: tl.constexpr, MASKED: tl.constexpr,
):
    """dq (fp32) with the terms of keys ``first .. last`` added."""
    QUERIES: tl.constexpr = q.shape[0]
    QK_PADDED: tl.constexpr = q.shape[1]
    V_PADDED: tl.constexpr = dout.shape[1]
    for start in range(first, last, KEYS):
        k = load_rows(kh, start, k_t, n_tokens, KEYS, QK_WIDTH, QK_PADDED, ALIGN, MASKED)
        v = load_rows(vh, start, v_t, n_tokens, KEYS, V_WIDTH, V_PADDED, ALIGN, MASKED)
        scores = product(q, tl.trans(k), None, NATIVE) * LOG2E - lse2[:, None]  # (QUERIES, KEYS)
        if MASKED:
            scores = tl.where(seen_keys(starts, first_row, start, QUERIES, KEYS, DOCS), scores, float("-inf"))
        p = exp2(scores, NATIVE)
        dscore = p * (product(dout, tl.trans(v), None, NATIVE) - delta[:, None])
        dq = product(dscore.to(k.dtype), k, dq, NATIVE)
    return dq


@plain_integers
def _narrow_attention_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, null_k_ptr, null_v_ptr, starts_ptr, lse2_ptr, delta_ptr, dq_ptr,
    g_b, g_h, g_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    n_tokens, n_padded, n_batch_heads, heads_together, tuning_tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, QK_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    QK_PADDED: tl.constexpr, V_PADDED: tl.constexpr, ALIGN: tl.constexpr, NULL: tl.constexpr, DOCS: tl.constexpr,
    NATIVE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    """dq of one tile of queries, over all keys that they see."""
    n_tiles = tl.cdiv(n_tokens, QUERIES)
    from_last, batch_head = place(tl.program_id(0), n_tiles, n_batch_heads, heads_together)
    first_row = (n_tiles - 1 - from_last) * QUERIES
    batch = batch_head // HEADS
    head = batch_head % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    rows = first_row + tl.arange(0, QUERIES)

    qh = head_pointer(q_ptr, batch, head, q_b, q_h, ALIGN)
    gh = head_pointer(dout_ptr, batch, head, g_b, g_h, ALIGN)
    kh = head_pointer(k_ptr, batch, kv_head, k_b, k_h, ALIGN)
    vh = head_pointer(v_ptr, batch, kv_head, v_b, v_h, ALIGN)
    q = load_rows(qh, first_row, q_t, n_tokens, QUERIES, QK_WIDTH, QK_PADDED, ALIGN, True)
    dout = load_rows(gh, first_row, g_t, n_tokens, QUERIES, V_WIDTH, V_PADDED, ALIGN, True)
    row_base = tl.cast(batch_head, tl.int64) * n_padded
    lse2 = tl.load(lse2_ptr + row_base + rows)
    delta = tl.load(delta_ptr + row_base + rows)
    columns = tl.arange(0, QK_PADDED)
    dq = tl.zeros((QUERIES, QK_PADDED), tl.float32)
    if NULL:
        null_k = null_key(null_k_ptr, kv_head, QK_WIDTH, QK_PADDED)
        null_v = null_key(null_v_ptr, kv_head, V_WIDTH, V_PADDED)
        p = tl.exp2(tl.sum(q.to(tl.float32) * null_k[None, :], 1) * LOG2E - lse2)
        dscore = p * (tl.sum(dout.to(tl.float32) * null_v[None, :], 1) - delta)
        dq = dscore[:, None] * null_k[None, :]
    diagonal = first_row // KEYS * KEYS
    end = tl.minimum(first_row + QUERIES, n_tokens)
    starts, lowest, clear = document_keys(starts_ptr, batch, first_row, end, n_tokens, QUERIES, KEYS, DOCS)
    if DOCS:
        dq = _dq_keys(
            dq, q, dout, kh, vh, k_t, v_t, lse2, delta, starts, first_row, lowest, clear, n_tokens,
            QK_WIDTH, V_WIDTH, ALIGN, NATIVE, KEYS, DOCS, True)
    dq = _dq_keys(
        dq, q, dout, kh, vh, k_t, v_t, lse2, delta, starts, first_row, clear, diagonal, n_tokens,
        QK_WIDTH, V_WIDTH, ALIGN, NATIVE, KEYS, DOCS, False)
    dq = _dq_keys(
        dq, q, dout, kh, vh, k_t, v_t, lse2, delta, starts, first_row, diagonal, end, n_tokens,
        QK_WIDTH, V_WIDTH, ALIGN, NATIVE, KEYS, DOCS, True)
    at = tl.cast(batch, tl.int64) * n_tokens + rows
    pointers = dq_ptr + (at[:, None] * HEADS + head) * QK_WIDTH + columns[None, :]
    inside = (rows[:, None] < n_tokens) & (columns[None, :] < QK_WIDTH)
    tl.store(pointers, dq.to(dq_ptr.dtype.element_ty), mask=inside)


# ---- on the host -----------------------------------------------------------------------------------

def narrow_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, null_k: Tensor | None, null_v: Tensor | None, out: Tensor,
    lse: Tensor, documents: Documents | None = None, deterministic: bool = False, dkdv_tiles: Tiles | None = None,
    dq_tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dq, dk, dv, dnull_k, dnull_v), the first three (B, heads, T, D) views of contiguous (B, T, heads, D) memory.

    Args:
        dout: like ``out``, any strides.
        out, lse: as the forward returned them.
        documents: as it got them.
        deterministic: the same bits every time, through a second kernel, instead of atomics for dq.
        dkdv_tiles, dq_tiles: fixed tiles instead of tuned ones.
    """
    (batch, heads, n_tokens, qk_width), kv_heads, v_width = q.shape, k.shape[1], v.shape[-1]
    dout, q, k, v = (rows_of(x) for x in (dout, q, k, v))
    align = alignment(dout, q, k, v)
    dk = torch.empty(batch, n_tokens, kv_heads, qk_width, dtype=k.dtype, device=q.device)
    dv = torch.empty(batch, n_tokens, kv_heads, v_width, dtype=v.dtype, device=q.device)
    dq_dtype = q.dtype if deterministic else torch.float32
    dq = torch.empty(batch, n_tokens, heads, qk_width, dtype=dq_dtype, device=q.device)
    shape = {
        **widths(q, k, v), "ALIGN": align, "n_tokens": n_tokens, "n_padded": -(-n_tokens // _ROWS) * _ROWS,
        "dq_ptr": dq,
    }
    nulls = {"null_k_ptr": null_k, "null_v_ptr": null_v, "NULL": null_k is not None}
    if null_k is not None:
        nulls |= {"null_k_ptr": null_k.float().contiguous(), "null_v_ptr": null_v.float().contiguous()}
    queries = {"q_ptr": q, "dout_ptr": dout, **strides("q", q, align), **strides("g", dout, align)}
    rows, packed, dnulls = _per_row(queries, nulls, shape, out, lse, not deterministic)

    common = {
        **shape, **rows, "k_ptr": k, "v_ptr": v, **strides("k", k, align), **strides("v", v, align),
        "NATIVE": is_native(q), "DOCS": documents is not None,
    }
    launch(
        _narrow_attention_dkdv_kernel, by_width(DKDV_TILES, q, v), dkdv_tiles,
        lambda _, keys: batch * kv_heads * -(-n_tokens // keys),
        {**common, **(packed or {**queries, "Q_ALIGN": align}), **order(k, v, kv_heads), "dk_ptr": dk, "dv_ptr": dv,
         "ends_ptr": documents and documents.ends, "DQ": not deterministic, "PACKED": packed is not None},
        restored=() if deterministic else ("dq_ptr",))
    if deterministic:
        launch(
            _narrow_attention_dq_kernel, by_width(DQ_TILES, q, v), dq_tiles,
            lambda queries, _: batch * heads * -(-n_tokens // queries),
            {**common, **queries, **order(k, v, heads), **nulls, "starts_ptr": documents and documents.starts})
    return dq.to(q.dtype).transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), *dnulls


def _per_row(
    queries: dict[str, Any], nulls: dict[str, Any], shape: dict[str, Any], out: Tensor, lse: Tensor, begin_dq: bool
) -> tuple[dict[str, Any], dict[str, Any] | None, tuple[Tensor | None, Tensor | None]]:
    """Run the row-wise kernel: lse and delta as kernels want them, packed queries if they fit, the null's gradients."""
    q, n_padded, heads, kv_heads = queries["q_ptr"], shape["n_padded"], shape["HEADS"], shape["KV_HEADS"]
    qk_padded, v_padded = shape["QK_PADDED"], shape["V_PADDED"]
    batch = q.shape[0]
    lse2, delta = (torch.empty(batch, heads, n_padded, dtype=torch.float32, device=q.device) for _ in range(2))
    # lse and delta travel as the last three columns, if spare, of queries and dout; fp16 has not delta's range.
    spare = min(qk_padded - shape["QK_WIDTH"], v_padded - shape["V_WIDTH"])
    fits = spare >= 3 and q.dtype == torch.bfloat16
    packed_q = packed_dout = partials = packed = None
    if fits:
        packed_q, packed_dout = (q.new_empty(batch, heads, n_padded, width) for width in (qk_padded, v_padded))
        packed = {"q_ptr": packed_q, "dout_ptr": packed_dout, "Q_ALIGN": 8,
                  **strides("q", packed_q, 8), **strides("g", packed_dout, 8)}
    n_programs = batch * heads * (n_padded // _ROWS)
    if nulls["NULL"]:
        partials = torch.empty(n_programs, qk_padded + v_padded, dtype=torch.float32, device=q.device)
    rows = {"lse2_ptr": lse2, "delta_ptr": delta}
    _narrow_attention_rows_kernel[(n_programs,)](
        **queries, **nulls, **shape, **rows, out_ptr=out, lse_ptr=lse, dnull_ptr=partials, packed_q_ptr=packed_q,
        packed_dout_ptr=packed_dout, DQ=begin_dq, PACKED=fits, ROWS=_ROWS, num_warps=4)
    if partials is None:
        return rows, packed, (None, None)
    summed = partials.view(batch, -1, kv_heads, heads // kv_heads, qk_padded + v_padded).sum((0, 1, 3))
    return rows, packed, (summed[:, : shape["QK_WIDTH"]], summed[:, qk_padded:][:, : shape["V_WIDTH"]])
