"""SwiGLU's elementwise half, silu(gate) * up (Shazeer 2020, arXiv 2002.05202), forward and backward, without autograd.

``gate_up`` is the fused projection's output: each row holds the gate's entries, then the up projection's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oneb.kernels.elementwise_common import (
    CAST_POINTERS,
    CONTIGUOUS,
    cast_arguments,
    cast_plain,
    finished,
    load_scale,
    raise_amax_to,
    store,
    stored_like,
    warps_for,
)
from oneb.kernels.float8 import Float8Cast, magnitude_bits
from oneb.kernels.runtime import jit, runs_fused, tl, triton

_TILE = 4096  # elements a program


def swiglu_plain(gate_up: Tensor, cast: Float8Cast | None = None) -> Tensor:
    """silu(gate) * up.

    Args:
        gate_up: (N, 2F) contiguous, 16 or 32 bits.
        cast: makes the result fp8.

    Returns:
        (N, F) in gate_up's dtype or ``cast.dtype``.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return cast_plain(gate * torch.sigmoid(gate) * up, gate_up.dtype, cast)


def swiglu_backward_plain(dact: Tensor, gate_up: Tensor, cast: Float8Cast | None = None) -> Tensor:
    """The gradient of :func:`swiglu`'s input.

    Args:
        dact: (N, F) gradient of the result, contiguous.
        gate_up: (N, 2F) as the forward pass read it.
        cast: makes the result fp8.

    Returns:
        (N, 2F) in gate_up's dtype or ``cast.dtype``.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    sigmoid, wide = torch.sigmoid(gate), dact.float()
    dgate = wide * up * sigmoid * (1 + gate * (1 - sigmoid))
    return cast_plain(torch.cat([dgate, wide * gate * sigmoid], dim=-1), gate_up.dtype, cast)


@jit
def _tile(n_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of this program's tile: its first row, (ROWS, 1) rows after that, (1, COLUMNS) columns, where they exist."""
    tiles_a_row = (WIDTH + COLUMNS - 1) // COLUMNS  # neighbouring programs share rows, so memory is walked in order
    first = (tl.program_id(0) // tiles_a_row) * ROWS
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.max_contiguous(tl.arange(0, COLUMNS), CONTIGUOUS)[None, :]
    columns += (tl.program_id(0) % tiles_a_row) * COLUMNS
    mask = (rows < n_rows - first) & (columns < WIDTH)
    return first.to(tl.int64), rows, columns, mask


def _swiglu_kernel(
    gate_up_ptr, act_ptr, scale_ptr, amax_ptr, n_rows,
    WIDTH: tl.constexpr, LARGEST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    first, rows, columns, mask = _tile(n_rows, WIDTH, ROWS, COLUMNS)
    source = gate_up_ptr + first * (2 * WIDTH) + (rows * (2 * WIDTH) + columns)
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=mask, other=0.0).to(tl.float32)
    act = gate * tl.sigmoid(gate) * up
    if LARGEST > 0:
        raise_amax_to(amax_ptr, magnitude_bits(act))
    store(act_ptr + first * WIDTH + (rows * WIDTH + columns), act, mask, load_scale(scale_ptr), LARGEST)


def _swiglu_backward_kernel(
    dact_ptr, gate_up_ptr, dgate_up_ptr, scale_ptr, amax_ptr, n_rows,
    WIDTH: tl.constexpr, LARGEST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    first, rows, columns, mask = _tile(n_rows, WIDTH, ROWS, COLUMNS)
    dact = tl.load(dact_ptr + first * WIDTH + (rows * WIDTH + columns), mask=mask, other=0.0).to(tl.float32)
    gate_up_ptr += first * (2 * WIDTH)
    dgate_up_ptr += first * (2 * WIDTH)
    offsets = rows * (2 * WIDTH) + columns
    gate = tl.load(gate_up_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + offsets + WIDTH, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dact * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = dact * gate * sigmoid
    if LARGEST > 0:
        raise_amax_to(amax_ptr, tl.maximum(magnitude_bits(dgate), magnitude_bits(dup)))
    scale = load_scale(scale_ptr)
    store(dgate_up_ptr + offsets, dgate, mask, scale, LARGEST)
    store(dgate_up_ptr + offsets + WIDTH, dup, mask, scale, LARGEST)


_OPTIONS = {"do_not_specialize": ["n_rows"], "do_not_specialize_on_alignment": list(CAST_POINTERS)}
_swiglu_kernel = jit(_swiglu_kernel, **_OPTIONS)
_swiglu_backward_kernel = jit(_swiglu_backward_kernel, **_OPTIONS)


def _tile_shape(width: int) -> tuple[int, int]:
    """Rows and columns of a tile, columns dividing ``width`` with at most 5% to spare where that is possible."""
    for columns in (1024, 512, 256, 128):
        if triton.cdiv(width, columns) * columns <= 1.05 * width:
            break
    return _TILE // columns, columns


def swiglu_fused(gate_up: Tensor, cast: Float8Cast | None = None) -> Tensor:
    """:func:`swiglu_plain` as one Triton kernel."""
    n_rows, width = len(gate_up), gate_up.shape[1] // 2
    assert gate_up.is_contiguous()
    act = stored_like(gate_up, (n_rows, width), cast)
    rows, columns = _tile_shape(width)
    _swiglu_kernel[(triton.cdiv(n_rows, rows) * triton.cdiv(width, columns),)](
        gate_up, act, n_rows=n_rows, WIDTH=width, ROWS=rows, COLUMNS=columns, num_warps=warps_for(_TILE),
        **cast_arguments(cast),
    )
    return finished(act, cast)


def swiglu_backward_fused(dact: Tensor, gate_up: Tensor, cast: Float8Cast | None = None) -> Tensor:
    """:func:`swiglu_backward_plain` as one Triton kernel that reads and writes everything once."""
    n_rows, width = dact.shape
    assert dact.is_contiguous()
    assert gate_up.is_contiguous()
    dgate_up = stored_like(gate_up, gate_up.shape, cast)
    rows, columns = _tile_shape(width)
    _swiglu_backward_kernel[(triton.cdiv(n_rows, rows) * triton.cdiv(width, columns),)](
        dact, gate_up, dgate_up, n_rows=n_rows, WIDTH=width, ROWS=rows, COLUMNS=columns,
        num_warps=warps_for(_TILE), **cast_arguments(cast),
    )
    return finished(dgate_up, cast)


def swiglu(gate_up: Tensor, cast: Float8Cast | None = None) -> Tensor:
    """act as :func:`swiglu_plain` describes, by the kernel where it runs."""
    return (swiglu_fused if runs_fused(gate_up) else swiglu_plain)(gate_up, cast)


def swiglu_backward(dact: Tensor, gate_up: Tensor, cast: Float8Cast | None = None) -> Tensor:
    """dgate_up as :func:`swiglu_backward_plain` describes, by the kernel where it runs."""
    return (swiglu_backward_fused if runs_fused(dact) else swiglu_backward_plain)(dact, gate_up, cast)
