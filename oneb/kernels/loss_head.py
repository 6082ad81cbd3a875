"""Output head and cross-entropy in one, chunk by chunk: the logits of all tokens never exist at once.

The gradients are computed in the forward pass, while a chunk's logits are at hand, so that nothing is kept or
recomputed for the backward pass: the idea of Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024,
arXiv 2410.10989). The weight's gradient accumulates over the chunks in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from oneb.accounting import HEAD_CHUNK_TOKENS
from oneb.kernels.softmax_loss import softmax_cross_entropy


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Mean cross-entropy over tokens, a fp32 scalar.

    Args:
        hidden: (N, d), in the compute dtype.
        weight: (padded vocabulary, d); rows from ``vocab_size`` on are padding and never win the softmax.
        targets: (N,) token ids, any integer dtype.
        vocab_size: tokens that exist.
    """
    targets = targets.long()
    if torch.is_grad_enabled():
        return _HeadLoss.apply(hidden, weight, targets, vocab_size)
    weight = weight.to(hidden.dtype)
    chunks = zip(hidden.split(HEAD_CHUNK_TOKENS), targets.split(HEAD_CHUNK_TOKENS), strict=True)
    # The gradient is not wanted; but making it overwrites the logits, where a loss alone would widen a copy of them.
    losses = [softmax_cross_entropy(F.linear(h, weight), t, vocab_size)[0] for h, t in chunks]
    return torch.stack(losses).sum() / len(targets)


def head_loss_twin(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """The same function in plain torch, with all logits in memory."""
    logits = F.linear(hidden, weight.to(hidden.dtype))[:, :vocab_size]
    return F.cross_entropy(logits.float(), targets.long())


class _HeadLoss(torch.autograd.Function):
    """Keeps gradients of the *summed* loss, whose size does not depend on N: fp16 could not hold them divided by it."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size):
        stored_dtype, weight = weight.dtype, weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        dhidden = torch.empty_like(hidden)
        dweight = None
        for start in range(0, len(hidden), HEAD_CHUNK_TOKENS):
            rows = slice(start, start + HEAD_CHUNK_TOKENS)
            chunk_loss, dlogits = softmax_cross_entropy(F.linear(hidden[rows], weight), targets[rows], vocab_size)
            loss += chunk_loss
            torch.mm(dlogits, weight, out=dhidden[rows])
            product = dlogits.t() @ hidden[rows]
            del dlogits  # or the next chunk's logits would be made beside it
            if len(hidden) <= HEAD_CHUNK_TOKENS:
                dweight = product  # a single chunk needs no fp32 accumulator
            elif dweight is None:
                dweight = product.float()
            else:
                dweight += product
            del product
        ctx.save_for_backward(dhidden, dweight)
        ctx.stored_dtype = stored_dtype
        return loss / len(hidden)

    @staticmethod
    def backward(ctx, grad):
        dhidden, dweight = ctx.saved_tensors
        scale = grad / len(dhidden)
        return (dhidden * scale).to(dhidden.dtype), (dweight * scale).to(ctx.stored_dtype), None, None
