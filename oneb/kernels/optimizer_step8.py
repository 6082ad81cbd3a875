"""The optimizer's update with 8-bit state: Triton kernels beside their plain-torch twins.

As :mod:`oneb.kernels.optimizer_step` (one pass, the guard ``grad_scale``, stochastic rounding of weights, twin and
kernel equal in every bit), but each moment is 8-bit codes with one fp32 scale a block of ``STATE_BLOCK`` elements of
the flattened tensor, the last block possibly shorter (block-wise quantisation: Dettmers et al. 2022, arXiv 2110.02861).

* **The codes.** A code c stands for ``c**3 * scale``; the block's largest magnitude gets the largest code (127 of an
  int8 first moment, 255 of a uint8 second). Cubes reach six decades down, linear codes two. In a block of gradients
  over four decades, rounding then adds a seventh of the noise (variance) to Lion's momentum that squares would add; in
  one of equal gradients 1.6 times theirs, 0.8% of the momentum's own. The second moment v is kept as its root, which
  spans half of v's decades.
* **Stochastic rounding.** Where a gradient is small or steady, a step moves its moment by less than half of the
  distance to the next code, and rounding to nearest would freeze it. Codes therefore go up or down at random such that
  the mean is the value. Only a second moment above zero never becomes zero: its update would explode.

The noise is ``optimizer_step``'s, in streams of its own: nothing to save, nothing to resume.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from oneb.kernels.optimizer_step import (
    bias_factors,
    chunks,
    element_noise,
    launch,
    mix32,
    mix32_jit,
    store_rounded_jit,
    write_where_finite,
)
from oneb.kernels.runtime import jit, tl

STATE_BLOCK = 256  # elements that share a scale; divides what a program, and what a twin, takes at a time

_FIRST, _SECOND = 1, 2  # which moment: makes its noise differ from the other's and from the weight's
# Keeps a scale's reciprocal finite; far below what any gradient leaves.
_LEAST_SCALE = 2.0**-100


def n_state_blocks(n_elements: int) -> int:
    """Scales that a moment of ``n_elements`` has."""
    return -(-n_elements // STATE_BLOCK)


# ---- the codes, plain torch ----------------------------------------------------------------------

def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The fp32 values (n,) of codes (n,), int8 or uint8, with scales (n_state_blocks(n),) fp32."""
    code = _blocks(codes.float())
    return (code * code * code * scale[:, None]).view(-1)[: codes.numel()]


def encode(value: Tensor, noise: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(n,) fp32 -> codes (n,) and scales (n_state_blocks(n),) fp32, rounded so that the mean is ``value``.

    Args:
        value: finite; from 0 for uint8, where values above 0 never become 0.
        noise: (n,) as ``element_noise`` gives it.
        dtype: of the codes, torch.int8 or torch.uint8.
    """
    largest = torch.iinfo(dtype).max
    blocks = _blocks(value.abs())
    scale = (blocks.amax(1) * (1 / largest**3)).clamp(min=_LEAST_SCALE)
    units = (blocks * (1 / scale)[:, None]).clamp(max=largest**3).view(-1)[: value.numel()]
    below = _floor_cube_root(units)
    # Midpoints of 2**23 equal parts of 0..1, so that what needs no rounding gets none.
    uniform = ((noise >> 9).float() + 0.5) * 2.0**-23
    gap = 3 * below * (below + 1) + 1  # to the next cube
    code = below + (uniform * gap < units - below * below * below)
    if dtype == torch.uint8:
        code = torch.maximum(code, value > 0)
    return torch.where(value < 0, -code, code).to(dtype), scale


def _blocks(x: Tensor) -> Tensor:
    return pad(x, (0, -x.numel() % STATE_BLOCK)).view(-1, STATE_BLOCK)


def _floor_cube_root(units: Tensor) -> Tensor:
    # 256 cubed is 2**24: all these cubes are exact in fp32, and make the result so, whatever the power's error.
    root = torch.floor(units.pow(1 / 3))
    root = root - (root * root * root > units).float()
    above = root + 1
    return root + (above * above * above <= units).float()


# ---- the twins -----------------------------------------------------------------------------------

def lion8bit_step_plain(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_scale: Tensor, grad_scale: Tensor, *,
    lr: float, betas: tuple[float, float], weight_decay: float, key: int,
) -> None:
    """``lion_step_plain`` in place on 8-bit momentum.

    Args:
        param, grad, grad_scale, lr, betas, weight_decay, key: as in ``lion_step_plain``.
        exp_avg: the momentum's codes, int8; shaped like ``param``, contiguous.
        exp_avg_scale: (n_state_blocks(param.numel()),) fp32.
    """
    beta1, beta2 = betas
    for first, p, g, codes in chunks(param, grad, exp_avg):
        scales = _scales_of(exp_avg_scale, first, p.numel())
        g32, p32, m = g.float() * grad_scale, p.float(), decode(codes, scales)
        update = torch.sign(beta1 * m + (1 - beta1) * g32)
        new_codes, new_scales = encode(beta2 * m + (1 - beta2) * g32, _noise(key, _FIRST, first, p), codes.dtype)
        new_p = p32 - lr * (update + weight_decay * p32)
        write_where_finite(grad_scale, first, key, (p, new_p), (codes, new_codes), (scales, new_scales))


def adamw8bit_step_plain(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_scale: Tensor, exp_avg_sq: Tensor,
    exp_avg_sq_scale: Tensor, grad_scale: Tensor, *,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, n_updates: int, key: int,
) -> None:
    """``adamw_step_plain`` in place on 8-bit moments.

    Args:
        param, grad, grad_scale, lr, betas, eps, weight_decay, n_updates, key: as in ``adamw_step_plain``.
        exp_avg, exp_avg_scale: the first moment, as in ``lion8bit_step_plain``.
        exp_avg_sq: codes of the second moment's root, uint8; shaped like ``param``, contiguous.
        exp_avg_sq_scale: (n_state_blocks(param.numel()),) fp32.
    """
    beta1, beta2 = betas
    mean_factor, root_factor = bias_factors(betas, n_updates)
    for first, p, g, codes, sq_codes in chunks(param, grad, exp_avg, exp_avg_sq):
        scales, sq_scales = (_scales_of(scale, first, p.numel()) for scale in (exp_avg_scale, exp_avg_sq_scale))
        g32, p32, old_root = g.float() * grad_scale, p.float(), decode(sq_codes, sq_scales)
        new_m = beta1 * decode(codes, scales) + (1 - beta1) * g32
        new_v = beta2 * (old_root * old_root) + (1 - beta2) * g32 * g32
        root = new_v.double().sqrt().float()  # as in adamw_step_plain
        update = mean_factor * new_m / (root_factor * root + eps)
        new_p = p32 - lr * (update + weight_decay * p32)
        new_codes, new_scales = encode(new_m, _noise(key, _FIRST, first, p), codes.dtype)
        new_sq_codes, new_sq_scales = encode(root, _noise(key, _SECOND, first, p), sq_codes.dtype)
        write_where_finite(
            grad_scale, first, key, (p, new_p), (codes, new_codes), (scales, new_scales),
            (sq_codes, new_sq_codes), (sq_scales, new_sq_scales),
        )


def _scales_of(scale: Tensor, first: int, count: int) -> Tensor:
    return scale[first // STATE_BLOCK:n_state_blocks(first + count)]


def _noise(key: int, moment: int, first: int, like: Tensor) -> Tensor:
    return element_noise(mix32(key ^ moment), first, like.numel(), like.device)


# ---- the kernels: line by line the twins above ---------------------------------------------------

@jit
def _tile(n_elements, BLOCK: tl.constexpr, STATE_BLOCK: tl.constexpr):
    """A program's elements, (blocks, elements of a block), and its blocks: offsets and masks."""
    block_ids = tl.program_id(0) * (BLOCK // STATE_BLOCK) + tl.arange(0, BLOCK // STATE_BLOCK)
    offsets = block_ids[:, None] * STATE_BLOCK + tl.arange(0, STATE_BLOCK)[None, :]
    return offsets, offsets < n_elements, block_ids, block_ids * STATE_BLOCK < n_elements


@jit
def _load_decoded(codes_ptr, scale_ptr, offsets, mask, block_ids, block_mask):
    code = tl.load(codes_ptr + offsets, mask=mask, other=0).to(tl.float32)
    scale = tl.load(scale_ptr + block_ids, mask=block_mask, other=0.0)
    return code * code * code * scale[:, None]


@jit
def _floor_cbrt(units):
    start = tl.maximum(units, 1.0)
    # A third of a float's bits is nearly its root's (within 3.3%); Newton's step leaves 0.1%, less than 0.2 of a code.
    root = (start.to(tl.uint32, bitcast=True) // 3 + 0x2A5137A0).to(tl.float32, bitcast=True)
    root = tl.floor((2 * root + start / (root * root)) * (1 / 3))
    root -= (root * root * root > units).to(tl.float32)
    above = root + 1
    return root + (above * above * above <= units).to(tl.float32)


@jit
def _store_encoded(
    codes_ptr, scale_ptr, offsets, mask, block_ids, block_mask, value, key,
    MOMENT: tl.constexpr, LEAST_SCALE: tl.constexpr,
):
    dtype: tl.constexpr = codes_ptr.dtype.element_ty
    LARGEST: tl.constexpr = 255.0 if dtype == tl.uint8 else 127.0
    magnitude = tl.abs(value)
    scale = tl.maximum(tl.max(magnitude, axis=1) * (1 / (LARGEST * LARGEST * LARGEST)), LEAST_SCALE)
    reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    units = tl.minimum(magnitude * reciprocal[:, None], LARGEST * LARGEST * LARGEST)
    below = _floor_cbrt(units)
    noise = mix32_jit(offsets.to(tl.uint32) ^ mix32_jit(key.to(tl.uint32, bitcast=True) ^ MOMENT))
    uniform = ((noise >> 9).to(tl.float32) + 0.5) * (2.0**-23)
    gap = 3 * below * (below + 1) + 1
    code = below + (uniform * gap < units - below * below * below).to(tl.float32)
    if dtype == tl.uint8:
        code = tl.maximum(code, (value > 0).to(tl.float32))
    tl.store(codes_ptr + offsets, tl.where(value < 0, -code, code).to(dtype), mask=mask)
    tl.store(scale_ptr + block_ids, scale, mask=block_mask)


def _lion8bit_kernel(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_scale_ptr, grad_scale_ptr, n_elements, key,
    lr, beta1, one_minus_beta1, beta2, one_minus_beta2, weight_decay, BLOCK: tl.constexpr,
    STATE_BLOCK: tl.constexpr = STATE_BLOCK, LEAST_SCALE: tl.constexpr = _LEAST_SCALE,
    FIRST: tl.constexpr = _FIRST,
):
    grad_scale = tl.load(grad_scale_ptr)
    if tl.abs(grad_scale) < float("inf"):
        offsets, mask, block_ids, block_mask = _tile(n_elements, BLOCK, STATE_BLOCK)
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * grad_scale
        p = tl.load(param_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        m = _load_decoded(exp_avg_ptr, exp_avg_scale_ptr, offsets, mask, block_ids, block_mask)
        direction = beta1 * m + one_minus_beta1 * g
        update = (direction > 0).to(tl.float32) - (direction < 0).to(tl.float32)
        _store_encoded(exp_avg_ptr, exp_avg_scale_ptr, offsets, mask, block_ids, block_mask,
                       beta2 * m + one_minus_beta2 * g, key, FIRST, LEAST_SCALE)
        store_rounded_jit(param_ptr, offsets, mask, p - lr * (update + weight_decay * p), key)


def _adamw8bit_kernel(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_scale_ptr, exp_avg_sq_ptr, exp_avg_sq_scale_ptr, grad_scale_ptr,
    n_elements, key,
    lr, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, mean_factor, root_factor,
    BLOCK: tl.constexpr, STATE_BLOCK: tl.constexpr = STATE_BLOCK, LEAST_SCALE: tl.constexpr = _LEAST_SCALE,
    FIRST: tl.constexpr = _FIRST, SECOND: tl.constexpr = _SECOND,
):
    grad_scale = tl.load(grad_scale_ptr)
    if tl.abs(grad_scale) < float("inf"):
        offsets, mask, block_ids, block_mask = _tile(n_elements, BLOCK, STATE_BLOCK)
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * grad_scale
        p = tl.load(param_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        m = _load_decoded(exp_avg_ptr, exp_avg_scale_ptr, offsets, mask, block_ids, block_mask)
        root = _load_decoded(exp_avg_sq_ptr, exp_avg_sq_scale_ptr, offsets, mask, block_ids, block_mask)
        m = beta1 * m + one_minus_beta1 * g
        v = beta2 * (root * root) + one_minus_beta2 * g * g
        root = tl.sqrt_rn(v)
        update = tl.div_rn(mean_factor * m, root_factor * root + eps)
        _store_encoded(exp_avg_ptr, exp_avg_scale_ptr, offsets, mask, block_ids, block_mask,
                       m, key, FIRST, LEAST_SCALE)
        _store_encoded(exp_avg_sq_ptr, exp_avg_sq_scale_ptr, offsets, mask, block_ids, block_mask,
                       root, key, SECOND, LEAST_SCALE)
        store_rounded_jit(param_ptr, offsets, mask, p - lr * (update + weight_decay * p), key)


_lion8bit_kernel = jit(_lion8bit_kernel, do_not_specialize=["key"])
_adamw8bit_kernel = jit(_adamw8bit_kernel, do_not_specialize=["key"])


def lion8bit_step_fused(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_scale: Tensor, grad_scale: Tensor, *,
    lr: float, betas: tuple[float, float], weight_decay: float, key: int,
) -> None:
    """``lion8bit_step_plain`` as one Triton kernel; the same arguments, the same bits."""
    beta1, beta2 = betas
    launch(
        _lion8bit_kernel, param, grad, exp_avg, exp_avg_scale, grad_scale, key=key,
        scalars=(lr, beta1, 1 - beta1, beta2, 1 - beta2, weight_decay),
    )


def adamw8bit_step_fused(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_scale: Tensor, exp_avg_sq: Tensor,
    exp_avg_sq_scale: Tensor, grad_scale: Tensor, *,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, n_updates: int, key: int,
) -> None:
    """``adamw8bit_step_plain`` as one Triton kernel; the same arguments, the same bits."""
    beta1, beta2 = betas
    launch(
        _adamw8bit_kernel, param, grad, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, grad_scale, key=key,
        scalars=(lr, beta1, 1 - beta1, beta2, 1 - beta2, eps, weight_decay, *bias_factors(betas, n_updates)),
    )
