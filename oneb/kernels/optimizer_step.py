"""One optimizer update of one parameter tensor: a Triton kernel beside its plain-torch twin.

An update reads the weight, its gradient and the fp32 state once and writes them once; eager torch
would pass over memory about ten times. Kernel and twin agree bit for bit, so either may resume the
other's run. Two things they share:

* **The guard.** ``grad_scale`` is a 0-dim fp32 device tensor that multiplies the gradient. Where it
  is not finite, weight and state stay untouched: a bad step is skipped without asking the device.
* **Stochastic rounding.** At |w| = 0.02 neighbouring bf16 values are 1.2e-4 apart, so most updates
  would round back to the old weight. A 16-bit weight instead rounds up with a probability equal to
  the fraction it would lose, which is right on average (Gupta et al. 2015, arXiv 1502.02551). The
  noise is a pure function of (seed, step, parameter, element): nothing to save, nothing to resume, and
  replicas of a model on several GPUs round alike.

All arithmetic is fp32. Weight decay is applied as the papers write it, ``p - lr * (update + wd * p)``:
``p * (1 - lr * wd)`` would round ``1 - lr * wd`` to fp32, wrong by several percent once lr * wd < 1e-6.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from oneb.kernels.runtime import jit, tl, triton

_BLOCK = 1024  # elements a program; 8 a thread, so that a thread's bf16 load is 16 bytes
_CHUNK = 2**24  # elements the twins take at a time: bounds their temporaries to about 1 GiB
_UINT32 = 0xFFFFFFFF


# ---- noise ---------------------------------------------------------------------------------------

def mix32(x):  # no annotations: Triton would take their names for globals of a kernel
    """A bijective 32-bit hash: unsigned 32-bit value in, the same out.

    The "lowbias32" finaliser found by Chris Wellons (hash-prospector, 2018,
    nullprogram.com/blog/2018/07/31). This one definition runs on Python ints, on int64 tensors (whose
    product wraps, leaving the low 32 bits right) and, compiled below, on Triton's uint32.
    """
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def rounding_key(seed: int, step: int, parameter_index: int) -> int:
    """The noise stream of one parameter at one step, as an unsigned 32-bit int.

    Args:
        seed: the run's seed, up to 64 bits.
        step: the run's optimizer step.
        parameter_index: the parameter's place in the model.
    """
    key = 0
    for part in (seed, seed >> 32, step, parameter_index):
        # The golden ratio's fraction keeps zeros from meeting mix32's fixed point, mix32(0) = 0.
        key = mix32((key ^ (part & _UINT32)) + 0x9E3779B9 & _UINT32)
    return key


def element_noise(key: int, first: int, count: int, device: torch.device) -> Tensor:
    """Noise of elements ``first .. first + count``: (count,) int64 holding uniform 32-bit values."""
    return mix32(torch.arange(first, first + count, device=device) ^ key)


# ---- stochastic rounding, plain torch ------------------------------------------------------------

def stochastic_round(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """fp32 -> bf16 or fp16, up or down at random so that the mean is ``x``; fp32 passes through.

    Values that ``dtype`` holds exactly stay as they are, infinities and NaNs too. Finite values beyond
    the largest finite one become that one, never infinity.

    Args:
        x: fp32, any shape.
        dtype: torch.bfloat16, torch.float16 or torch.float32.
        noise: as ``element_noise`` gives it, shaped like ``x``.
    """
    if dtype == torch.float32:
        return x
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    grid_round = _round_magnitude_bf16 if dtype == torch.bfloat16 else _round_magnitude_fp16
    rounded = grid_round(magnitude, noise) | (bits ^ magnitude)
    return torch.where(magnitude < 0x7F800000, rounded, bits).view(torch.float32).to(dtype)


def _round_magnitude_bf16(magnitude: Tensor, noise: Tensor) -> Tensor:
    # bf16 is the upper half of fp32: adding noise below it carries with the wanted probability.
    carried = (magnitude + (noise >> 16).int()) & -0x10000
    return carried.clamp(max=0x7F7F0000)


def _round_magnitude_fp16(magnitude: Tensor, noise: Tensor) -> Tensor:
    # fp16 drops 13 bits, and more below 2**-14 where its spacing stays 2**-24; so measure in spacings.
    spacing = (magnitude & 0x7F800000).clamp(min=113 << 23) - (10 << 23)
    steps = magnitude.view(torch.float32) * ((254 << 23) - spacing).view(torch.float32)
    below = torch.floor(steps)
    carry = (noise >> 8).float() * 2.0**-24 < steps - below
    rounded = (below + carry) * spacing.view(torch.float32)
    return rounded.clamp(max=65504.0).view(torch.int32)


# ---- the twins -----------------------------------------------------------------------------------

def lion_step_plain(
    param: Tensor, grad: Tensor, exp_avg: Tensor, grad_scale: Tensor, *,
    lr: float, betas: tuple[float, float], weight_decay: float, key: int,
) -> None:
    """Lion in place: Chen et al. 2023 (arXiv 2302.06675), algorithm 2; sign(0) = 0.

    Args:
        param: bf16, fp16 or fp32; contiguous, any shape.
        grad: any of these dtypes; shaped like ``param``, contiguous.
        exp_avg: the momentum, fp32; shaped like ``param``, contiguous.
        grad_scale: 0-dim fp32 factor on the gradient; not finite = change nothing.
        lr: learning rate of this step.
        betas: of the update's direction, and of the momentum.
        weight_decay: decoupled, multiplied by ``lr``.
        key: from ``rounding_key``.
    """
    beta1, beta2 = betas
    for first, p, g, m in chunks(param, grad, exp_avg):
        g32, p32 = g.float() * grad_scale, p.float()
        update = torch.sign(beta1 * m + (1 - beta1) * g32)
        new_m = beta2 * m + (1 - beta2) * g32
        new_p = p32 - lr * (update + weight_decay * p32)
        write_where_finite(grad_scale, first, key, (p, new_p), (m, new_m))


def adamw_step_plain(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad_scale: Tensor, *,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, n_updates: int, key: int,
) -> None:
    """AdamW in place: Loshchilov & Hutter 2019 (arXiv 1711.05101), the update of torch.optim.AdamW.

    Args:
        param, grad, exp_avg, grad_scale, lr, weight_decay, key: as in ``lion_step_plain``.
        exp_avg_sq: the second moment, fp32; shaped like ``param``, contiguous.
        betas: of the first and the second moment.
        eps: added to the square root of the bias-corrected second moment.
        n_updates: how many updates the moments will have seen after this one, from 1; the bias
            corrections are 1 - beta ** n_updates.
    """
    beta1, beta2 = betas
    mean_factor, root_factor = bias_factors(betas, n_updates)
    for first, p, g, m, v in chunks(param, grad, exp_avg, exp_avg_sq):
        g32, p32 = g.float() * grad_scale, p.float()
        new_m = beta1 * m + (1 - beta1) * g32
        new_v = beta2 * v + (1 - beta2) * g32 * g32
        # By way of fp64: MKL's fp32 root on CPUs is often a bit off, and the kernel's is exactly rounded.
        root = new_v.double().sqrt().float()
        update = mean_factor * new_m / (root_factor * root + eps)
        new_p = p32 - lr * (update + weight_decay * p32)
        write_where_finite(grad_scale, first, key, (p, new_p), (m, new_m), (v, new_v))


def bias_factors(betas: tuple[float, float], n_updates: int) -> tuple[float, float]:
    """What turns m into its bias-corrected mean, and sqrt(v) into its bias-corrected root."""
    return 1 / (1 - betas[0] ** n_updates), (1 - betas[1] ** n_updates) ** -0.5


def chunks(*tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """(index of the first element, a flat view of each tensor) for every ``_CHUNK`` elements."""
    flat = [tensor.view(-1) for tensor in tensors]
    for first in range(0, flat[0].numel(), _CHUNK):
        yield first, *(tensor[first:first + _CHUNK] for tensor in flat)


def write_where_finite(
    grad_scale: Tensor, first: int, key: int, weight: tuple[Tensor, Tensor], *states: tuple[Tensor, Tensor],
) -> None:
    """Copy each (old, new) pair's new into its old, the weight rounded, unless the step is skipped."""
    old, new = weight
    noise = element_noise(key, first, old.numel(), old.device)
    keep = torch.isfinite(grad_scale)
    for target, value in ((old, stochastic_round(new, old.dtype, noise)), *states):
        target.copy_(torch.where(keep, value, target))


# ---- the kernels: line by line the twins above ---------------------------------------------------

mix32_jit = jit(mix32)  # for kernels


@jit
def _round_bf16(magnitude, noise):
    carried = (magnitude + (noise >> 16)) & 0xFFFF0000
    return tl.minimum(carried, 0x7F7F0000)


@jit
def _round_fp16(magnitude, noise):
    spacing = tl.maximum(magnitude & 0x7F800000, 113 << 23) - (10 << 23)
    steps = magnitude.to(tl.float32, bitcast=True) * ((254 << 23) - spacing).to(tl.float32, bitcast=True)
    below = tl.floor(steps)
    carry = (noise >> 8).to(tl.float32) * (2.0**-24) < steps - below
    rounded = (below + carry.to(tl.float32)) * spacing.to(tl.float32, bitcast=True)
    return tl.minimum(rounded, 65504.0).to(tl.uint32, bitcast=True)


@jit
def store_rounded_jit(param_ptr, offsets, mask, value, key):
    """Store fp32 values as ``stochastic_round`` makes them, with the noise of their elements."""
    dtype: tl.constexpr = param_ptr.dtype.element_ty
    if dtype != tl.float32:
        noise = mix32_jit(offsets.to(tl.uint32) ^ key.to(tl.uint32, bitcast=True))
        bits = value.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        if dtype == tl.bfloat16:
            rounded = _round_bf16(magnitude, noise)
        else:
            rounded = _round_fp16(magnitude, noise)
        rounded |= bits ^ magnitude
        value = tl.where(magnitude < 0x7F800000, rounded, bits).to(tl.float32, bitcast=True)
    tl.store(param_ptr + offsets, value.to(dtype), mask=mask)


def _lion_kernel(
    param_ptr, grad_ptr, exp_avg_ptr, grad_scale_ptr, n_elements, key,
    lr, beta1, one_minus_beta1, beta2, one_minus_beta2, weight_decay, BLOCK: tl.constexpr,
):
    grad_scale = tl.load(grad_scale_ptr)
    if tl.abs(grad_scale) < float("inf"):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < n_elements
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * grad_scale
        p = tl.load(param_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(exp_avg_ptr + offsets, mask=mask, other=0.0)
        direction = beta1 * m + one_minus_beta1 * g
        update = (direction > 0).to(tl.float32) - (direction < 0).to(tl.float32)
        tl.store(exp_avg_ptr + offsets, beta2 * m + one_minus_beta2 * g, mask=mask)
        store_rounded_jit(param_ptr, offsets, mask, p - lr * (update + weight_decay * p), key)


def _adamw_kernel(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, grad_scale_ptr, n_elements, key,
    lr, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, mean_factor, root_factor,
    BLOCK: tl.constexpr,
):
    grad_scale = tl.load(grad_scale_ptr)
    if tl.abs(grad_scale) < float("inf"):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < n_elements
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * grad_scale
        p = tl.load(param_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        m = beta1 * tl.load(exp_avg_ptr + offsets, mask=mask, other=0.0) + one_minus_beta1 * g
        v = beta2 * tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0.0) + one_minus_beta2 * g * g
        # IEEE root and quotient: Triton's plain ones are approximate, and the twin's are not.
        update = tl.div_rn(mean_factor * m, root_factor * tl.sqrt_rn(v) + eps)
        tl.store(exp_avg_ptr + offsets, m, mask=mask)
        tl.store(exp_avg_sq_ptr + offsets, v, mask=mask)
        store_rounded_jit(param_ptr, offsets, mask, p - lr * (update + weight_decay * p), key)


# The key differs at every step and must not compile a kernel anew; n_elements may specialise, as
# knowing it divisible by 16 is what lets masked loads be wide.
_lion_kernel = jit(_lion_kernel, do_not_specialize=["key"])
_adamw_kernel = jit(_adamw_kernel, do_not_specialize=["key"])


def lion_step_fused(
    param: Tensor, grad: Tensor, exp_avg: Tensor, grad_scale: Tensor, *,
    lr: float, betas: tuple[float, float], weight_decay: float, key: int,
) -> None:
    """``lion_step_plain`` as one Triton kernel; the same arguments, the same bits."""
    beta1, beta2 = betas
    launch(
        _lion_kernel, param, grad, exp_avg, grad_scale, key=key,
        scalars=(lr, beta1, 1 - beta1, beta2, 1 - beta2, weight_decay),
    )


def adamw_step_fused(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad_scale: Tensor, *,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, n_updates: int, key: int,
) -> None:
    """``adamw_step_plain`` as one Triton kernel; the same arguments, the same bits."""
    beta1, beta2 = betas
    launch(
        _adamw_kernel, param, grad, exp_avg, exp_avg_sq, grad_scale, key=key,
        scalars=(lr, beta1, 1 - beta1, beta2, 1 - beta2, eps, weight_decay, *bias_factors(betas, n_updates)),
    )


def launch(kernel: Any, *tensors: Tensor, key: int, scalars: tuple[float, ...]) -> None:
    """Run an update's kernel over all elements of ``tensors[0]``, a block of them a program."""
    n_elements = tensors[0].numel()
    assert n_elements <= 2**31 - _BLOCK, "offsets in the kernel are 32-bit"
    if n_elements == 0:
        return
    # As a signed int the key is always Triton's i32; unsigned, half of all keys would be i64.
    signed_key = key - (key >> 31 << 32)
    kernel[(triton.cdiv(n_elements, _BLOCK),)](
        *tensors, n_elements, signed_key, *map(float, scalars),
        BLOCK=_BLOCK, enable_fp_fusion=False,  # a * b + c rounds twice, as the twin's does
    )
