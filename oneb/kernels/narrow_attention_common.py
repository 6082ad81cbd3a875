"""What the forward and backward kernels of :mod:`oneb.kernels.narrow_attention` share."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from oneb.kernels.runtime import jit, tl, triton

_TUNED_TOKENS = (512, 16384)  # shorter sequences take the first tiles of a table; longer ones share a choice
_L2_SHARE = 24 * 2**20  # bytes of keys and values in flight that should stay in a GPU's L2 cache


@dataclass(frozen=True)
class Tiles:
    """How a kernel is cut: queries and keys of a tile, warps of a program, stages of its load pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        assert 128 % self.queries == 0, "rows are padded to a multiple of 128"


# Kernels see only those globals that are compile-time constants.
constant = (lambda value: value) if tl is None else tl.constexpr
LOG2E = constant(math.log2(math.e))


# ---- in kernels ------------------------------------------------------------------------------------

# Strides and lengths vary at run time: one compilation must serve them all.
plain_integers = partial(jit, do_not_specialize=[
    "q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "g_b", "g_h", "g_t",
    "n_tokens", "n_padded", "n_batch_heads", "heads_together", "tuning_tokens",
])


@jit
def exp2(x, NATIVE: tl.constexpr):
    """2**x. The bare instruction: ``tl.exp2`` guards subnormals, which no probability needs."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:  # noqa: RET505  (Triton compiles only the branch taken)
        return tl.exp2(x)


@jit
def product(a, b, acc, NATIVE: tl.constexpr):
    """``a @ b + acc`` in fp32. Triton's interpreter multiplies the bits of bf16, hence the detour there."""
    if NATIVE:
        return tl.dot(a, b, acc)
    else:  # noqa: RET505
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)


@jit
def head_pointer(pointer, batch, head, batch_stride, head_stride, ALIGN: tl.constexpr):
    """Where a head's rows begin. Strides come divided by ``ALIGN``, so that the compiler sees the alignment."""
    return pointer + (tl.cast(batch, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride) * ALIGN


@jit
def load_rows(
    pointer, first, stride, n_tokens, COUNT: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    ALIGN: tl.constexpr, GUARD: tl.constexpr,
):
    """Rows ``first .. first + COUNT`` of a head, (COUNT, PADDED): zeros past ``WIDTH`` and, guarded, past the end."""
    rows = tl.arange(0, COUNT)[:, None]
    columns = tl.arange(0, PADDED)[None, :]
    pointers = pointer + tl.cast(first, tl.int64) * stride * ALIGN + rows * stride * ALIGN + columns
    if GUARD:
        return tl.load(pointers, mask=(rows < n_tokens - first) & (columns < WIDTH), other=0.0)
    elif WIDTH < PADDED:  # noqa: RET505
        return tl.load(pointers, mask=(rows >= 0) & (columns < WIDTH), other=0.0)
    else:
        return tl.load(pointers)


@jit
def null_key(pointer, kv_head, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """A head's null key or value, fp32: (PADDED,), zeros from ``WIDTH`` on."""
    columns = tl.arange(0, PADDED)
    return tl.load(pointer + kv_head * WIDTH + columns, mask=columns < WIDTH, other=0.0)


@jit
def document_keys(
    starts_ptr, batch, first_row, end, n_tokens, QUERIES: tl.constexpr, KEYS: tl.constexpr, DOCS: tl.constexpr,
):
    """Where the documents of queries ``first_row .. end`` begin, (QUERIES,); the first tile of keys that any of them
    sees; and the first of those before the diagonal that all of them see whole."""
    starts = tl.zeros((QUERIES,), tl.int32)
    lowest, clear = 0, 0
    if DOCS:
        sequence = starts_ptr + tl.cast(batch, tl.int64) * n_tokens
        rows = first_row + tl.arange(0, QUERIES)
        starts = tl.load(sequence + rows, mask=rows < n_tokens, other=0)
        lowest = tl.load(sequence + first_row) // KEYS * KEYS
        clear = tl.minimum(tl.cdiv(tl.load(sequence + end - 1), KEYS) * KEYS, first_row // KEYS * KEYS)
    return starts, lowest, clear


@jit
def document_queries(
    ends_ptr, batch, first_key, below, n_tokens, QUERIES: tl.constexpr, KEYS: tl.constexpr, DOCS: tl.constexpr,
):
    """Where the documents of a tile of keys end, (KEYS,); and of the queries from ``below`` on, up to where all of them
    see all of these keys, and up to where any of them sees any."""
    ends = tl.zeros((KEYS,), tl.int32)
    clear, last = n_tokens, n_tokens
    if DOCS:
        sequence = ends_ptr + tl.cast(batch, tl.int64) * n_tokens
        keys = first_key + tl.arange(0, KEYS)
        ends = tl.load(sequence + keys, mask=keys < n_tokens, other=0)
        clear = tl.maximum(below, tl.load(sequence + first_key) // QUERIES * QUERIES)
        last = tl.load(sequence + tl.minimum(first_key + KEYS, n_tokens) - 1)
    return ends, clear, last


@jit
def seen_keys(starts, first_row, first_key, QUERIES: tl.constexpr, KEYS: tl.constexpr, DOCS: tl.constexpr):
    """(QUERIES, KEYS): the keys that are not later than the query, and not of an earlier document."""
    keys = tl.arange(0, KEYS)[None, :]
    seen = (first_row - first_key + tl.arange(0, QUERIES))[:, None] >= keys
    if DOCS:
        seen &= (starts - first_key)[:, None] <= keys
    return seen


@jit
def place(program, n_tiles, n_batch_heads, heads_together):
    """(tile, batch * heads + head) of a program: tile after tile of as many heads as L2 holds, then the next heads.

    Tile 0 comes first: let it be the longest (which within documents nobody can know).
    """
    first = program // (heads_together * n_tiles) * heads_together
    size = tl.minimum(heads_together, n_batch_heads - first)
    inside = program - first * n_tiles
    return inside // size, first + inside % size


# ---- on the host -----------------------------------------------------------------------------------

def padded_width(width: int) -> int:
    """The width that tensor cores work on: a power of two."""
    return max(16, 1 << (width - 1).bit_length())


def by_width(tables: dict[int, tuple[Tiles, ...]], q: Tensor, v: Tensor) -> tuple[Tiles, ...]:
    """The candidates for heads as wide as the wider of ``q`` and ``v``."""
    return tables[max(min(tables), padded_width(max(q.shape[-1], v.shape[-1])))]


def rows_of(x: Tensor) -> Tensor:
    """``x`` with a contiguous last dimension: itself, as the model hands it over."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def alignment(*tensors: Tensor) -> int:
    """Elements, at most 8 (a 16-byte load), that every row of every tensor is aligned to."""
    steps = [step for x in tensors for step, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    return math.gcd(8, *steps)


def strides(name: str, x: Tensor, align: int) -> dict[str, int]:
    """Kernel arguments for the strides of (B, heads, T, D), in units of ``align`` elements."""
    steps = [step if size > 1 else 0 for step, size in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return {f"{name}_{axis}": step // align for axis, step in zip("bht", steps, strict=True)}


def order(k: Tensor, v: Tensor, heads: int) -> dict[str, int]:
    """Arguments of :func:`place` for programs over ``heads`` heads a sequence."""
    batch, kv_heads, n_tokens, _ = k.shape
    one = n_tokens * (k.shape[-1] + v.shape[-1]) * k.element_size() * kv_heads // heads
    return {"n_batch_heads": batch * heads, "heads_together": max(1, min(batch * heads, _L2_SHARE // max(1, one)))}


def widths(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """The compile-time sizes that every kernel takes."""
    qk_width, v_width = q.shape[-1], v.shape[-1]
    return {
        "HEADS": q.shape[1], "KV_HEADS": k.shape[1], "QK_WIDTH": qk_width, "V_WIDTH": v_width,
        "QK_PADDED": padded_width(qk_width), "V_PADDED": padded_width(v_width),
    }


def is_native(x: Tensor) -> bool:
    """Whether the kernels run on an NVIDIA GPU: its instructions, its tensor cores. If not, in Triton's interpreter."""
    return x.is_cuda and torch.version.hip is None


def launch(
    kernel: Any, table: tuple[Tiles, ...], tiles: Tiles | None, n_programs: Callable[[int, int], int],
    arguments: dict[str, Any], restored: tuple[str, ...] = (),
) -> None:
    """Run ``kernel`` over ``n_programs(queries, keys)`` programs.

    Args:
        tiles: how to cut it; None tries all of ``table`` once for a GPU, a bucket of lengths and the widths, and keeps
            the fastest, on disk too. The first is taken without trying if it is alone, for short sequences, and where
            results must repeat: a choice by the clock may differ from process to process. Within documents the first
            batch's lengths decide.
        restored: pointer arguments that the kernel adds to, which trials must leave as they were.
    """
    least, most = _TUNED_TOKENS
    n_tokens = arguments["n_tokens"]
    if tiles is None and (len(table) == 1 or n_tokens < least or torch.are_deterministic_algorithms_enabled()):
        tiles = table[0]
    # A multiply and an add may round once: scores times log2(e) minus their maximum want exactly that.
    arguments = {**arguments, "enable_fp_fusion": True, "tuning_tokens": min(most, 1 << (n_tokens - 1).bit_length())}
    if tiles is None:
        grid = lambda meta: (n_programs(meta["QUERIES"], meta["KEYS"]),)  # noqa: E731
        _tuned(kernel, table, restored)[grid](**arguments)
    else:
        kernel[(n_programs(tiles.queries, tiles.keys),)](
            **arguments, QUERIES=tiles.queries, KEYS=tiles.keys, num_warps=tiles.warps, num_stages=tiles.stages)


@cache
def _tuned(kernel: Any, table: tuple[Tiles, ...], restored: tuple[str, ...]) -> Any:
    configs = [
        triton.Config({"QUERIES": t.queries, "KEYS": t.keys}, num_warps=t.warps, num_stages=t.stages) for t in table
    ]
    key = ["tuning_tokens", "QK_PADDED", "V_PADDED", "HEADS", "KV_HEADS", "DOCS"]
    options: dict[str, Any] = {"restore_value": list(restored)} if restored else {}
    if "cache_results" in inspect.signature(triton.autotune).parameters:
        options["cache_results"] = True
    return triton.autotune(configs, key, **options)(kernel)
