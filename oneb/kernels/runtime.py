"""Triton, where it is installed: the one import that every kernel file shares.

Each kernel stands beside a plain-torch twin of the same signature, ``name_fused`` and ``name_plain``; ``name`` picks
by :func:`runs_fused`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch on macOS and Windows comes without Triton; the twins need none
    triton = tl = None


def triton_available() -> bool:
    """Whether the kernels can be called at all (they also need CUDA, or Triton's interpreter)."""
    return triton is not None


def runs_fused(x: Tensor) -> bool:
    """Whether the kernel, rather than its twin, works on ``x``."""
    return x.is_cuda and triton is not None


_kernels: list[Any] = []


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """``triton.jit``; without Triton the function itself, which then is never called."""
    if triton is None:
        return function
    _kernels.append(triton.jit(function, **options))
    return _kernels[-1]


def compiled_kernels() -> int:
    """Variants (of dtype, width, alignment) of our kernels made ready so far in this process, over all devices."""
    caches = [cache for kernel in _kernels for cache in getattr(kernel, "device_caches", {}).values()]
    return sum(len(variants) for variants, *_ in caches)
