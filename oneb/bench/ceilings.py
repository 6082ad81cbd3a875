"""What the hardware reaches at best, where the step runs: products at the model's own shapes, copies, launches.

Each is run for a fraction of a second with random data: a power-capped card lowers its clock under real numbers, and
after a while, as it does in training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from oneb.kernels.float8 import scaled_product
from oneb.roofline import Ceilings, Gemm
from oneb.train.device import Device

_COPY_BYTES = 2 * 2**30
_HOST_COPY_BYTES = 64 * 2**20
_TINY_KERNELS = 300

Cache = dict[tuple, float]


def measure_ceilings(
    found: list[Gemm], device: Device, dtype: torch.dtype, seconds: float, cache: Cache,
    exponentials_per_s: float | None = None,
) -> Ceilings:
    """Rates of all products, and of the machine.

    Args:
        found: the products of a micro-batch.
        dtype: of those that are not fp8.
        seconds: how long each is kept up.
        cache: rates by shape that were measured before in this process; filled.
        exponentials_per_s: handed on.
    """
    rates = {}
    for product in found:
        key = (product.phase, product.m, product.n, product.k, product.eight_bit, dtype)
        if key not in cache:
            call = _product8(product, device.torch) if product.eight_bit else _product16(product, device.torch, dtype)
            cache[key] = 2 * product.m * product.n * product.k / _sustained(call, seconds, device)
        rates[product.name, product.phase] = cache[key]
    if "bytes" not in cache:
        cache["bytes"] = _copy_bytes_per_s(device, seconds)
        cache["kernel"], cache["launch"] = _launch_seconds(device)
    return Ceilings(rates, cache["bytes"], cache["kernel"], cache["launch"], exponentials_per_s)


def _product16(product: Gemm, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """The product as autograd calls it: y = x w^T, dx = dy w, dw = dy^T x, with row-major operands."""
    m, n, k = product.m, product.n, product.k
    a = _random((k, m) if product.phase == "wgrad" else (m, k), device, dtype)
    b = _random((n, k) if product.phase == "forward" else (k, n), device, dtype)
    a, b = a.t() if product.phase == "wgrad" else a, b.t() if product.phase == "forward" else b
    out = torch.empty(m, n, device=device, dtype=dtype)
    return lambda: torch.mm(a, b, out=out)


def _product8(product: Gemm, device: torch.device) -> Callable[[], object]:
    """The product as ``Product8`` (oneb.kernels.products) calls it."""
    a = _random((product.m, product.k), device, torch.float8_e4m3fn)
    b = _random((product.n, product.k), device, torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    return lambda: scaled_product(a, b, one, one, torch.bfloat16)


def _random(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    wide = torch.bfloat16 if dtype.itemsize == 1 else dtype
    return torch.randn(shape, device=device, dtype=wide).to(dtype)


def _copy_bytes_per_s(device: Device, seconds: float) -> float:
    size = _COPY_BYTES if device.is_cuda else _HOST_COPY_BYTES
    if device.is_cuda:
        size = min(size, torch.cuda.mem_get_info()[0] // 4)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device.torch)
    target = torch.empty_like(source)
    return 2 * size / _sustained(lambda: target.copy_(source), seconds, device)


def _launch_seconds(device: Device) -> tuple[float, float]:
    """(seconds a kernel that does nothing in a full queue, seconds to queue it); off CUDA there is no queue: (0, 0)."""
    if not device.is_cuda:
        return 0.0, 0.0
    tiny, large = torch.zeros((), device=device.torch), torch.empty(2**28, device=device.torch)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):  # the first round warms up
        device.synchronize()
        for _ in range(30):  # the device is busy while the host fills the queue
            large.zero_()
        began.record()
        start = time.perf_counter()
        for _ in range(_TINY_KERNELS):
            tiny.add_(1.0)
        queued = time.perf_counter() - start
        ended.record()
        device.synchronize()
    return began.elapsed_time(ended) / 1e3 / _TINY_KERNELS, queued / _TINY_KERNELS


def _sustained(call: Callable[[], object], seconds: float, device: Device) -> float:
    """Mean seconds of ``call``, over about ``seconds`` of it."""
    _timed(call, 1, device)
    once = _timed(call, 2, device)
    return _timed(call, min(100_000, max(2, math.ceil(seconds / once))), device)


def _timed(call: Callable[[], object], times: int, device: Device) -> float:
    if not device.is_cuda:
        start = time.perf_counter()
        for _ in range(times):
            call()
        device.synchronize()
        return max(1e-9, time.perf_counter() - start) / times
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(times):
        call()
    ended.record()
    device.synchronize()
    return max(1e-9, began.elapsed_time(ended) / 1e3) / times
