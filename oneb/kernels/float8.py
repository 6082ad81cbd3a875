"""8-bit floating point for matrix products: casts, transposes and the scaled product itself.

A tensor is stored as ``x * scale`` rounded to fp8, and its product is multiplied by ``1 / scale`` again. Scales are
powers of two, so that scaling never rounds. The formats are ``torch.float8_e4m3fn`` (3 mantissa bits, to 448)
and ``torch.float8_e5m2`` (2 bits, to 57344): Micikevicius et al. 2022, FP8 Formats for Deep Learning (arXiv
2209.05433).

Values beyond the format's range are clamped to it, infinities too. NaN stays NaN, and both NaN and infinities reach
``amax``: kernel and twin compare magnitudes as NaN > inf > finite, which is the order of their bits as integers.

Hopper's and Ada's fp8 tensor cores want both operands contiguous along the summed dimension, so the backward pass
needs transposed copies: of the weight, and of x and dy for the weight gradient. The kernels make them at a byte an
element, four rows by four columns a time in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oneb.config import FP8_MULTIPLE
from oneb.kernels.runtime import jit, runs_fused, tl, triton

_BLOCK = 8192  # elements a program of cast8: 32 a thread, so that four 16-byte loads are in flight
# Bytes a program of the transposing kernels; a row or column of a tile is then whole 128-byte lines.
_TILE = (128, 128)
_WARPS = 4
_EXPONENT_LIMIT = 60  # two inverse scales multiplied stay within fp32


@dataclass(frozen=True)
class Float8Cast:
    """How one tensor becomes fp8: ``(x * scale)`` clamped to the largest finite value of ``dtype``.

    Attributes:
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        scale: 0-dim fp32 device tensor.
        amax: 0-dim fp32 device tensor that the cast raises to max(amax, max |x|), for the scale of later steps.
    """

    dtype: torch.dtype
    scale: Tensor
    amax: Tensor

    @property
    def largest(self) -> float:
        """The largest finite value of ``dtype``."""
        return torch.finfo(self.dtype).max


# ---- scales --------------------------------------------------------------------------------------

def power_of_two_scale(amax: Tensor, largest: Tensor, margin_bits: int = 0) -> Tensor:
    """The largest power of two, over 2**margin_bits, that keeps ``amax * scale <= largest``; exact, wherever it runs.

    Limited to 2**-60 ... 2**60.

    Args:
        amax: fp32, any shape, finite and above 0 (elsewhere the result is finite and means nothing).
        largest: fp32, broadcast against ``amax``; the format's largest value.
        margin_bits: powers of two to leave free above ``amax``.

    Returns:
        fp32, shaped like ``amax``.
    """
    # Exponents are subtracted as integers: log2 and pow round differently from device to device.
    bits, top = amax.contiguous().view(torch.int32), largest.view(torch.int32)
    too_large = (bits & 0x7FFFFF) > (top & 0x7FFFFF)
    exponent = (top >> 23) - (bits >> 23) - too_large.int() - margin_bits
    return ((exponent.clamp(-_EXPONENT_LIMIT, _EXPONENT_LIMIT) + 127) << 23).view(torch.float32)


@torch.no_grad()
def raise_amax(amax: Tensor, x: Tensor) -> None:
    """Raise ``amax`` (0-dim fp32) to max(amax, max |x|) in place; NaN wins."""
    amax.copy_(torch.maximum(amax, x.detach().abs().amax().float()))


# ---- the twins -----------------------------------------------------------------------------------

@torch.no_grad()
def cast8_plain(x: Tensor, cast: Float8Cast) -> Tensor:
    """``x`` in fp8, and ``cast.amax`` raised.

    Args:
        x: bf16, fp16 or fp32; contiguous, any shape.
        cast: the format, the scale and where the amax goes.

    Returns:
        ``cast.dtype``, shaped like ``x``, contiguous.
    """
    raise_amax(cast.amax, x)
    return (x.float() * cast.scale).clamp(-cast.largest, cast.largest).to(cast.dtype)


def transpose8_plain(x8: Tensor) -> Tensor:
    """(N, K) fp8 -> (K, N) fp8, contiguous; N and K multiples of 16."""
    _check_multiples(x8)
    return x8.view(torch.uint8).t().contiguous().view(x8.dtype)


def cast8_transposed_plain(
    x: Tensor, cast: Float8Cast, out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``cast8`` and its transpose: (N, K) -> (N, K), (K, N); N and K multiples of 16; written to ``out`` if given."""
    x8 = cast8_plain(x, cast)
    both = x8, transpose8_plain(x8)
    if out is None:
        return both
    for target, value in zip(out, both, strict=True):
        target.view(torch.uint8).copy_(value.view(torch.uint8))
    return out


def scaled_product_plain(
    a8: Tensor, b8: Tensor, inverse_scale_a: Tensor, inverse_scale_b: Tensor, out_dtype: torch.dtype,
) -> Tensor:
    """``a b^T`` of two fp8 matrices, by way of fp32.

    Args:
        a8: (M, K) fp8, row-major.
        b8: (N, K) fp8, row-major; of the two at most one e5m2.
        inverse_scale_a: 0-dim fp32; what a8 is to be multiplied by.
        inverse_scale_b: 0-dim fp32; what b8 is to be multiplied by.
        out_dtype: torch.bfloat16, torch.float16 or torch.float32.

    Returns:
        (M, N) of ``out_dtype``.
    """
    return (a8.float() * inverse_scale_a @ (b8.float() * inverse_scale_b).T).to(out_dtype)


def _check_multiples(x: Tensor) -> None:
    assert x.is_contiguous()
    assert not any(size % FP8_MULTIPLE for size in x.shape), tuple(x.shape)


# ---- the kernels ---------------------------------------------------------------------------------

@jit
def magnitude_bits(x):
    """|x| of fp32 values as int32 that compare like it, with NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def to_float8(x, scale, LARGEST: tl.constexpr, dtype: tl.constexpr):
    """fp32 ``x * scale``, clamped to +-LARGEST and rounded to the fp8 ``dtype``; NaN stays NaN."""
    return tl.clamp(x * scale, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL).to(dtype)


@jit
def _cast8_kernel(x_ptr, y_ptr, scale_ptr, amax_ptr, n_elements, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    # A stale amax only costs an atomic that raises nothing; nearly all programs need none.
    known = tl.load(amax_ptr)
    scale = tl.load(scale_ptr)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, to_float8(x, scale, LARGEST, y_ptr.dtype.element_ty), mask=mask)
    top = tl.max(magnitude_bits(x), 0)
    if top > known:
        tl.atomic_max(amax_ptr, top, sem="relaxed")


@jit
def _store_transposed(y_ptr, w0, w1, w2, w3, i, m, mask, words_out):
    """Bytes of four rows to their transposed places.

    ``wj`` (I, M) holds row 4 i + j of columns 4 m ... 4 m + 3, a byte each; the output's row 4 m + c has the four rows'
    bytes c side by side.
    """
    even = 0x00FF00FF
    odd = 0xFF00FF00
    a = (w0 & even) | ((w1 & even) << 8)  # columns 0 and 2 of rows 0, 1
    b = ((w0 & odd) >> 8) | (w1 & odd)  # columns 1 and 3
    c = (w2 & even) | ((w3 & even) << 8)
    d = ((w2 & odd) >> 8) | (w3 & odd)
    y = y_ptr + (4 * m).to(tl.int64)[:, None] * words_out + i[None, :]
    mask = tl.trans(mask)
    tl.store(y, tl.trans((a & 0xFFFF) | (c << 16)).to(tl.int32, bitcast=True), mask=mask)
    tl.store(y + words_out, tl.trans((b & 0xFFFF) | (d << 16)).to(tl.int32, bitcast=True), mask=mask)
    tl.store(y + 2 * words_out, tl.trans((a >> 16) | (c & 0xFFFF0000)).to(tl.int32, bitcast=True), mask=mask)
    tl.store(y + 3 * words_out, tl.trans((b >> 16) | (d & 0xFFFF0000)).to(tl.int32, bitcast=True), mask=mask)


@jit
def _transpose8_kernel(x_ptr, y_ptr, words_in, words_out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # A word is four bytes: words_in = K / 4 of a row of x, words_out = N / 4 of a row of y.
    tiles = tl.cdiv(words_in, COLUMNS // 4)
    i = tl.program_id(0) // tiles * (ROWS // 4) + tl.arange(0, ROWS // 4)
    m = tl.program_id(0) % tiles * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
    mask = (i < words_out)[:, None] & (m < words_in)[None, :]
    x = x_ptr + (4 * i).to(tl.int64)[:, None] * words_in + m[None, :]
    w0 = tl.load(x, mask=mask, other=0).to(tl.uint32, bitcast=True)
    w1 = tl.load(x + words_in, mask=mask, other=0).to(tl.uint32, bitcast=True)
    w2 = tl.load(x + 2 * words_in, mask=mask, other=0).to(tl.uint32, bitcast=True)
    w3 = tl.load(x + 3 * words_in, mask=mask, other=0).to(tl.uint32, bitcast=True)
    _store_transposed(y_ptr, w0, w1, w2, w3, i, m, mask, words_out)


@jit
def _byte(x, scale, LARGEST: tl.constexpr, dtype: tl.constexpr):
    return to_float8(x, scale, LARGEST, dtype).to(tl.uint8, bitcast=True).to(tl.uint32)


@jit
def _packed(x, scale, LARGEST: tl.constexpr, dtype: tl.constexpr):
    """fp32 (I, 4 M) -> four fp8 bytes a word, (I, M) uint32."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 4, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    low = _byte(x0, scale, LARGEST, dtype) | (_byte(x1, scale, LARGEST, dtype) << 8)
    high = _byte(x2, scale, LARGEST, dtype) | (_byte(x3, scale, LARGEST, dtype) << 8)
    return low | (high << 16)


@jit
def _cast8_transposed_kernel(
    x_ptr, y_ptr, yt_ptr, scale_ptr, amax_ptr, n_columns, words_in, words_out,
    LARGEST: tl.constexpr, FORMAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    known = tl.load(amax_ptr)
    scale = tl.load(scale_ptr)
    tiles = tl.cdiv(words_in, COLUMNS // 4)
    i = tl.program_id(0) // tiles * (ROWS // 4) + tl.arange(0, ROWS // 4)
    column = tl.program_id(0) % tiles
    k = column * COLUMNS + tl.arange(0, COLUMNS)
    m = column * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
    x_mask = (i < words_out)[:, None] & (k < n_columns)[None, :]
    x = x_ptr + (4 * i).to(tl.int64)[:, None] * n_columns + k[None, :]
    x0 = tl.load(x, mask=x_mask, other=0.0).to(tl.float32)
    x1 = tl.load(x + n_columns, mask=x_mask, other=0.0).to(tl.float32)
    x2 = tl.load(x + 2 * n_columns, mask=x_mask, other=0.0).to(tl.float32)
    x3 = tl.load(x + 3 * n_columns, mask=x_mask, other=0.0).to(tl.float32)
    top = tl.maximum(tl.maximum(magnitude_bits(x0), magnitude_bits(x1)),
                     tl.maximum(magnitude_bits(x2), magnitude_bits(x3)))
    top = tl.max(tl.max(top, 1), 0)
    if top > known:
        tl.atomic_max(amax_ptr, top, sem="relaxed")
    w0 = _packed(x0, scale, LARGEST, FORMAT)
    w1 = _packed(x1, scale, LARGEST, FORMAT)
    w2 = _packed(x2, scale, LARGEST, FORMAT)
    w3 = _packed(x3, scale, LARGEST, FORMAT)
    mask = (i < words_out)[:, None] & (m < words_in)[None, :]
    y = y_ptr + (4 * i).to(tl.int64)[:, None] * words_in + m[None, :]
    tl.store(y, w0.to(tl.int32, bitcast=True), mask=mask)
    tl.store(y + words_in, w1.to(tl.int32, bitcast=True), mask=mask)
    tl.store(y + 2 * words_in, w2.to(tl.int32, bitcast=True), mask=mask)
    tl.store(y + 3 * words_in, w3.to(tl.int32, bitcast=True), mask=mask)
    _store_transposed(yt_ptr, w0, w1, w2, w3, i, m, mask, words_out)


def cast8_fused(x: Tensor, cast: Float8Cast) -> Tensor:
    """``cast8_plain`` as one Triton kernel: the same bits, one pass."""
    assert x.is_contiguous()
    y = torch.empty(x.shape, dtype=cast.dtype, device=x.device)
    n = x.numel()
    _cast8_kernel[(triton.cdiv(n, _BLOCK),)](
        x, y, cast.scale, cast.amax.view(torch.int32), n, LARGEST=cast.largest, BLOCK=_BLOCK, num_warps=8,
    )
    return y


def transpose8_fused(x8: Tensor) -> Tensor:
    """``transpose8_plain`` as one Triton kernel."""
    _check_multiples(x8)
    n, k = x8.shape
    y8 = torch.empty(k, n, dtype=x8.dtype, device=x8.device)
    rows, columns = _TILE
    _transpose8_kernel[(triton.cdiv(n, rows) * triton.cdiv(k, columns),)](
        x8.view(torch.int32), y8.view(torch.int32), k // 4, n // 4, ROWS=rows, COLUMNS=columns, num_warps=_WARPS,
    )
    return y8


def cast8_transposed_fused(
    x: Tensor, cast: Float8Cast, out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``cast8_transposed_plain`` as one Triton kernel: the same bits, one pass."""
    _check_multiples(x)
    n, k = x.shape
    if out is None:
        out = tuple(torch.empty(shape, dtype=cast.dtype, device=x.device) for shape in ((n, k), (k, n)))
    rows, columns = _TILE
    _cast8_transposed_kernel[(triton.cdiv(n, rows) * triton.cdiv(k, columns),)](
        x, out[0].view(torch.int32), out[1].view(torch.int32), cast.scale, cast.amax.view(torch.int32),
        k, k // 4, n // 4, LARGEST=cast.largest, FORMAT=_FORMATS[cast.dtype], ROWS=rows, COLUMNS=columns,
        num_warps=2 * _WARPS,
    )
    return out


_FORMATS = {} if triton is None else {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


def scaled_product_fused(
    a8: Tensor, b8: Tensor, inverse_scale_a: Tensor, inverse_scale_b: Tensor, out_dtype: torch.dtype,
) -> Tensor:
    """``scaled_product_plain`` by cuBLASLt (compute capability 8.9 or later).

    K and N are multiples of 16, and so are the scales' addresses. Sums stay in the tensor cores (about 14 bits on
    Hopper): moving them to fp32 registers every few steps costs up to a fifth of the speed, and takes an error of
    0.3% from sums whose operands were rounded to fp8, 6%.
    """
    return torch._scaled_mm(a8, b8.t(), scale_a=inverse_scale_a, scale_b=inverse_scale_b, out_dtype=out_dtype,
                            use_fast_accum=True)


# ---- the choice ----------------------------------------------------------------------------------

def cast8(x: Tensor, cast: Float8Cast) -> Tensor:
    """See :func:`cast8_plain`."""
    return cast8_fused(x, cast) if runs_fused(x) else cast8_plain(x, cast)


def transpose8(x8: Tensor) -> Tensor:
    """See :func:`transpose8_plain`."""
    return transpose8_fused(x8) if runs_fused(x8) else transpose8_plain(x8)


def cast8_transposed(
    x: Tensor, cast: Float8Cast, out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`cast8_transposed_plain`."""
    return (cast8_transposed_fused if runs_fused(x) else cast8_transposed_plain)(x, cast, out)


def scaled_product(
    a8: Tensor, b8: Tensor, inverse_scale_a: Tensor, inverse_scale_b: Tensor, out_dtype: torch.dtype,
) -> Tensor:
    """See :func:`scaled_product_plain`."""
    product = scaled_product_fused if a8.is_cuda else scaled_product_plain
    return product(a8, b8, inverse_scale_a, inverse_scale_b, out_dtype)
