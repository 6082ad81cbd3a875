"""Gradient norm and clipping, wholly on the device: no step ever waits for a number to come back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def grad_norm(params: Iterable[Tensor], inv_scale: Tensor | float = 1.0) -> Tensor:
    """L2 norm of all gradients together, accumulated in fp32: a 0-dim fp32 tensor.

    Args:
        params: the parameters, on one device; those without a gradient count as zero.
        inv_scale: 1 / loss scale, so that the norm is that of the true gradient.

    Returns:
        The norm; inf or NaN as soon as one gradient is (or if the sum of squares passes fp32's range).
    """
    params = list(params)
    assert params, "grad_norm needs at least one parameter"
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for param in params:
        if param.grad is not None:
            by_dtype[param.grad.dtype].append(param.grad)
    # foreach's one-launch path wants a single dtype; without `dtype` a bf16 gradient gets a bf16 norm.
    norms = [
        norm for grads in by_dtype.values() for norm in torch._foreach_norm(grads, 2.0, dtype=torch.float32)
    ]
    if not norms:
        return torch.zeros((), device=params[0].device)
    return torch.linalg.vector_norm(torch.stack(norms)) * inv_scale


def clip_scale(norm: Tensor, max_norm: float, inv_scale: Tensor | float = 1.0) -> Tensor:
    """The optimizer's ``grad_scale``: clip coefficient / loss scale, or NaN (= skip) for a bad norm.

    The coefficient is min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it
    (Pascanu et al. 2013, arXiv 1211.5063).

    Args:
        norm: from ``grad_norm``; 0-dim fp32.
        max_norm: 0 = no clipping; a norm that is not finite still skips the step.
        inv_scale: 1 / loss scale.

    Returns:
        0-dim fp32 tensor.
    """
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else torch.ones_like(norm)
    return (coefficient * inv_scale).masked_fill(~torch.isfinite(norm), torch.nan)
