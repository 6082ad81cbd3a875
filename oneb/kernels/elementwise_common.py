"""What the elementwise kernels share: the cast where a value is stored, and how many programs and warps run.

With a :class:`Float8Cast` a result is fp8 from the start: its 16-bit value never exists.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from oneb.kernels.float8 import Float8Cast, cast8_plain, to_float8
from oneb.kernels.runtime import jit, tl, triton

# An amax and its scale are elements of larger tensors: their alignment must not compile a kernel anew.
CAST_POINTERS = ("scale_ptr", "amax_ptr")
# Columns a thread takes at most: 16 bytes of a 16-bit tensor. Triton would take 16 for the sake of an fp8 result, and
# each load would then use every other 16 bytes.
CONTIGUOUS = tl.constexpr(8) if triton else 8


def cast_plain(value: Tensor, dtype: torch.dtype, cast: Float8Cast | None) -> Tensor:
    """Round fp32 ``value`` to ``dtype``, or cast it to fp8 and raise ``cast.amax``, as :func:`cast8_plain` does."""
    return value.to(dtype) if cast is None else cast8_plain(value, cast)


def cast_arguments(cast: Float8Cast | None) -> dict[str, Any]:
    """Kernel arguments that say what a stored value becomes."""
    if cast is None:
        return {"scale_ptr": None, "amax_ptr": None, "LARGEST": 0.0}
    return {"scale_ptr": cast.scale, "amax_ptr": cast.amax.view(torch.int32), "LARGEST": cast.largest}


def stored_like(x: Tensor, shape: tuple[int, ...], cast: Float8Cast | None) -> Tensor:
    """The uninitialised output of a kernel; give it to :func:`finished` afterwards."""
    if cast is None:
        return x.new_empty(shape)
    # Triton's interpreter rounds wrongly to fp8, so off CUDA torch does it.
    return x.new_empty(shape, dtype=cast.dtype if x.is_cuda else torch.float32)


def finished(out: Tensor, cast: Float8Cast | None) -> Tensor:
    """A kernel's output in the dtype that was asked for."""
    return out if cast is None else out.to(cast.dtype)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def resident_programs(x: Tensor, warps: int, num_warps: int, tasks: int) -> int:
    """How many programs share ``tasks`` in a loop so that each multiprocessor runs ``warps`` warps of them."""
    return max(1, min(tasks, _multiprocessors(x.device) * max(1, warps // num_warps)))


def warps_for(elements: int, elements_a_thread: int = 16) -> int:
    """Warps of a program that holds ``elements``: 16 of them a thread are two 16-byte loads of a 16-bit tensor."""
    return max(1, min(16, elements // (32 * elements_a_thread)))


# ---- in kernels ----------------------------------------------------------------------------------

@jit
def load_scale(scale_ptr):
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    return scale


@jit
def store(ptr, value, mask, scale, LARGEST: tl.constexpr):
    """Store fp32 ``value`` rounded to the pointer's dtype, or cast to fp8 where LARGEST is given."""
    if LARGEST > 0:
        value = to_float8(value, scale, LARGEST, ptr.dtype.element_ty)
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@jit
def raise_amax_to(amax_ptr, bits):
    """Raise an amax to the largest of ``magnitude_bits``; one atomic, and none where another program was higher."""
    top = tl.max(bits)
    if top > tl.load(amax_ptr):  # stale at worst, which costs an atomic that raises nothing
        tl.atomic_max(amax_ptr, top, sem="relaxed")
