"""The loss head's softmax: cross-entropy of a chunk of logits and its gradient, without autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from oneb.kernels.elementwise_common import warps_for
from oneb.kernels.runtime import jit, runs_fused, tl, triton

_LOG2_E = 1.4426950408889634
# Logits of a row at a time, 8 a thread. Few enough programs then fit on a multiprocessor (2, of 16 warps) that the rows
# at work stay in the L2 cache for their second reading; what hides memory's latency is tiles that are fetched ahead.
_MAX_TILE = 4096
_STAGES = 3


def softmax_cross_entropy_plain(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of a chunk, and its gradient.

    Args:
        logits: (n, padded vocabulary) contiguous, 16 or 32 bits.
        targets: (n,) int64, each below ``vocab_size``.
        vocab_size: tokens that exist; the columns from there on take no part and have gradient 0.

    Returns:
        loss: 0-dim fp32, the sum over rows.
        dlogits: the *sum's* gradient, shaped like ``logits`` and in its dtype.
    """
    columns = torch.arange(logits.shape[1], device=logits.device)
    wide = torch.where(columns < vocab_size, logits.float(), float("-inf"))
    lse = wide.logsumexp(-1, keepdim=True)
    loss = (lse - wide.gather(1, targets[:, None])).sum()
    grad = (wide - lse).exp() - (columns == targets[:, None]).float()
    return loss, grad.to(logits.dtype)


def _softmax_loss_kernel(
    logits_ptr, targets_ptr, losses_ptr,
    WIDTH: tl.constexpr, VOCAB_SIZE: tl.constexpr, LOG2_E: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * WIDTH
    target = tl.load(targets_ptr + row)
    target_logit = tl.load(logits_ptr + target).to(tl.float32)  # before the second loop overwrites it
    # First loop: in base 2, the maximum so far and, lane by lane, the sum of exponentials below it.
    largest = float("-inf")
    sums = tl.zeros((TILE,), tl.float32)
    for start in tl.range(0, WIDTH, TILE, num_stages=STAGES):
        columns = start + tl.arange(0, TILE)
        # Masked at WIDTH, not at VOCAB_SIZE, which is odd: a load may be 16 bytes wide.
        x = tl.load(logits_ptr + columns, mask=columns < WIDTH, other=float("-inf")).to(tl.float32) * LOG2_E
        x = tl.where(columns < VOCAB_SIZE, x, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(x))
        sums = sums * tl.exp2(largest - new_largest) + tl.exp2(x - new_largest)
        largest = new_largest
    lse = largest + tl.log2(tl.sum(sums))
    tl.store(losses_ptr + row, lse / LOG2_E - target_logit)
    for start in range(0, WIDTH, TILE):
        columns = start + tl.arange(0, TILE)
        x = tl.load(logits_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32) * LOG2_E
        grad = tl.where(columns < VOCAB_SIZE, tl.exp2(x - lse), 0.0)
        grad = tl.where(columns == target, grad - 1, grad)
        tl.store(logits_ptr + columns, grad.to(logits_ptr.dtype.element_ty), mask=columns < WIDTH)


_softmax_loss_kernel = jit(_softmax_loss_kernel, do_not_specialize_on_alignment=["targets_ptr"])


def softmax_cross_entropy_fused(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """:func:`softmax_cross_entropy_plain` as one Triton kernel; the gradient *overwrites* ``logits``.

    The loss is summed in a fixed order.
    """
    n_rows, width = logits.shape
    assert logits.is_contiguous()
    assert targets.is_contiguous()
    losses = logits.new_empty(n_rows, dtype=torch.float32)
    tile = min(_MAX_TILE, triton.next_power_of_2(width))
    _softmax_loss_kernel[(n_rows,)](
        logits, targets, losses,
        WIDTH=width, VOCAB_SIZE=vocab_size, LOG2_E=_LOG2_E, TILE=tile, STAGES=_STAGES, num_warps=warps_for(tile, 8),
    )
    return losses.sum(), logits


def softmax_cross_entropy(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """(loss, dlogits) as :func:`softmax_cross_entropy_plain` describes; from the kernel, dlogits is ``logits``."""
    fused = runs_fused(logits)
    return (softmax_cross_entropy_fused if fused else softmax_cross_entropy_plain)(logits, targets, vocab_size)
