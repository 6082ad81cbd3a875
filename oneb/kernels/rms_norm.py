"""RMSNorm with the residual addition before it (Zhang & Sennrich 2019, arXiv 1910.07467), forward and backward.

Functions here, and in the sibling files for a block's other elementwise work, are raw: autograd knows nothing of them.
Arithmetic is fp32 and rounds once, at the store.
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
    resident_programs,
    store,
    stored_like,
    warps_for,
)
from oneb.kernels.float8 import Float8Cast, magnitude_bits
from oneb.kernels.runtime import jit, runs_fused, tl, triton

# ---- the twins -----------------------------------------------------------------------------------

def rms_norm_plain(
    x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None, cast: Float8Cast | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add ``delta`` to the residual stream and normalise the sum.

    Args:
        x: (N, d) contiguous, 16 or 32 bits.
        weight: (d,), any floating dtype.
        eps: added to the mean square.
        delta: (N, d) contiguous, or None for nothing to add.
        cast: makes ``y`` fp8.

    Returns:
        total: (N, d) x + delta rounded to x's dtype; ``x`` itself without ``delta``.
        y: (N, d) total * rstd * weight, in x's dtype or ``cast.dtype``.
        rstd: (N,) fp32, 1 / sqrt(mean(total**2) + eps).
    """
    total = x if delta is None else (x.float() + delta.float()).to(x.dtype)
    wide = total.float()
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    return total, cast_plain(wide * rstd[:, None] * weight.float(), x.dtype, cast), rstd


def rms_norm_backward_plain(
    dy: Tensor, total: Tensor, weight: Tensor, rstd: Tensor, dtotal: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`rms_norm`'s input and weight.

    Args:
        dy: (N, d) gradient of ``y``, contiguous.
        total, rstd: as the forward pass returned them.
        weight: (d,).
        dtotal: (N, d) gradient that reaches ``total`` past the norm, or None.

    Returns:
        dx: (N, d) in total's dtype, the gradient of ``x`` and of ``delta`` alike.
        dweight: (d,) fp32.
    """
    wide_dy, normed = dy.float(), total.float() * rstd[:, None]
    scaled = wide_dy * weight.float()
    dx = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd[:, None]
    if dtotal is not None:
        dx += dtotal.float()
    return dx.to(total.dtype), (wide_dy * normed).sum(0)


# ---- the kernels: a program takes every n-th row, and keeps weight and partial sums in registers --

def _rms_norm_kernel(
    x_ptr, delta_ptr, weight_ptr, total_ptr, y_ptr, rstd_ptr, scale_ptr, amax_ptr, n_rows, eps,
    WIDTH: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):
    columns = tl.max_contiguous(tl.arange(0, BLOCK), CONTIGUOUS)
    mask = columns < WIDTH
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    scale = load_scale(scale_ptr)
    largest_bits = tl.zeros((BLOCK,), tl.int32)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * WIDTH
        total = tl.load(x_ptr + start + columns, mask=mask, other=0.0)
        if delta_ptr is not None:
            delta = tl.load(delta_ptr + start + columns, mask=mask, other=0.0)
            total = (total.to(tl.float32) + delta.to(tl.float32)).to(total.dtype)
            tl.store(total_ptr + start + columns, total, mask=mask)
        total = total.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(total * total) / WIDTH + eps)
        tl.store(rstd_ptr + row, rstd)
        y = total * rstd * weight
        if LARGEST > 0:
            largest_bits = tl.maximum(largest_bits, magnitude_bits(y))
        store(y_ptr + start + columns, y, mask, scale, LARGEST)
    if LARGEST > 0:
        raise_amax_to(amax_ptr, largest_bits)


def _rms_norm_backward_kernel(
    dy_ptr, total_ptr, weight_ptr, rstd_ptr, dtotal_ptr, dx_ptr, partial_ptr, n_rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):
    columns = tl.max_contiguous(tl.arange(0, BLOCK), CONTIGUOUS)
    mask = columns < WIDTH
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * WIDTH
        dy = tl.load(dy_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
        total = tl.load(total_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
        if dtotal_ptr is not None:  # loaded before the row's sum has to be waited for
            dtotal = tl.load(dtotal_ptr + start + columns, mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + row)
        normed = total * rstd
        dweight += dy * normed
        scaled = dy * weight
        dx = (scaled - normed * (tl.sum(scaled * normed) / WIDTH)) * rstd
        if dtotal_ptr is not None:
            dx += dtotal.to(tl.float32)
        store(dx_ptr + start + columns, dx, mask, 1.0, 0.0)
    tl.store(partial_ptr + tl.program_id(0) * WIDTH + columns, dweight, mask=mask)


_rms_norm_kernel = jit(
    _rms_norm_kernel, do_not_specialize=["n_rows"], do_not_specialize_on_alignment=list(CAST_POINTERS),
)
_rms_norm_backward_kernel = jit(_rms_norm_backward_kernel, do_not_specialize=["n_rows"])


def rms_norm_fused(
    x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None, cast: Float8Cast | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`rms_norm_plain` as one Triton kernel that reads ``x`` and ``delta`` once."""
    n_rows, width = x.shape
    assert x.is_contiguous()
    assert delta is None or delta.is_contiguous()
    total = x if delta is None else torch.empty_like(x)
    y, rstd = stored_like(x, x.shape, cast), x.new_empty(n_rows, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    num_warps = warps_for(block)
    _rms_norm_kernel[(resident_programs(x, 24, num_warps, n_rows),)](
        x, delta, weight, total, y, rstd, n_rows=n_rows, eps=float(eps),
        WIDTH=width, BLOCK=block, num_warps=num_warps, **cast_arguments(cast),
    )
    return total, finished(y, cast), rstd


def rms_norm_backward_fused(
    dy: Tensor, total: Tensor, weight: Tensor, rstd: Tensor, dtotal: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`rms_norm_backward_plain` as one Triton kernel; dweight is summed in a fixed order."""
    n_rows, width = total.shape
    assert dy.is_contiguous()
    assert total.is_contiguous()
    assert dtotal is None or dtotal.is_contiguous()
    block = triton.next_power_of_2(width)
    num_warps = warps_for(block)
    n_programs = resident_programs(dy, 16, num_warps, n_rows)
    dx, partial = torch.empty_like(total), rstd.new_empty(n_programs, width)
    _rms_norm_backward_kernel[(n_programs,)](
        dy, total, weight, rstd, dtotal, dx, partial, n_rows, WIDTH=width, BLOCK=block, num_warps=num_warps,
    )
    return dx, partial.sum(0)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None, cast: Float8Cast | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, y, rstd) as :func:`rms_norm_plain` describes, by the kernel where it runs."""
    return (rms_norm_fused if runs_fused(x) else rms_norm_plain)(x, weight, eps, delta, cast)


def rms_norm_backward(
    dy: Tensor, total: Tensor, weight: Tensor, rstd: Tensor, dtotal: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(dx, dweight) as :func:`rms_norm_backward_plain` describes, by the kernel where it runs."""
    return (rms_norm_backward_fused if runs_fused(dy) else rms_norm_backward_plain)(dy, total, weight, rstd, dtotal)
