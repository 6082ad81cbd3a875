"""Causal attention in which every query may also attend to one null key/value: fused, O(T) memory, exact gradients.

Shapes: q (B, H, T, Dqk), k (B, Hkv, T, Dqk), v (B, Hkv, T, Dv), null_k (Hkv, Dqk), null_v (Hkv, Dv); H a multiple
of Hkv. Scores are plain dot products: scale queries beforehand.

How. A fused kernel returns ``out`` and its log-sum-exp ``lse`` over the real keys. With the null score ``s``,

    full_lse = logaddexp(lse, s),   full_out = out * exp(lse - full_lse) + null_v * exp(s - full_lse)

is the softmax over the real keys and the null key. The trap is the backward: the gradient that reaches ``lse``
is dropped or refused by the fused kernels. It is not needed. FlashAttention's backward (Dao 2023, arXiv
2307.08691, algorithm 2) rebuilds ``p = exp(score - lse)`` and ``dscore = p * (dout @ v - rowsum(dout * out))``
from the ``out`` and ``lse`` that it is given; given the *full* ones, these are exactly the probabilities and score
gradients of the real keys inside the full softmax. Only the null key's own terms remain, one row each:
:mod:`oneb.kernels.null_terms`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.autograd.function import once_differentiable

from oneb.kernels.null_terms import null_terms, null_terms_backward

aten = torch.ops.aten
# What a fused forward keeps for its backward besides out and lse: its (unused, dropout-free) random state.
State = tuple[Tensor, ...]


def null_attention(q: Tensor, k: Tensor, v: Tensor, null_k: Tensor, null_v: Tensor, backend: str) -> Tensor:
    """Attention output (B, H, T, Dv), by the fused kernel named ``backend`` or, without one, by the twin.

    Args:
        backend: "cudnn", "flash" or "cpu"; any other name takes the twin, which is fused too where SDPA is.
    """
    if backend not in _FORWARD:
        return null_attention_twin(q, k, v, null_k, null_v)
    return _NullAttention.apply(q, k, v, null_k, null_v, backend)


def null_attention_twin(q: Tensor, k: Tensor, v: Tensor, null_k: Tensor, null_v: Tensor) -> Tensor:
    """The same function in plain torch: the null key stands before the sequence as a token that all others see.

    A dummy query keeps the square causal mask; its output is dropped. Runs on every device and backend of SDPA.
    """
    batch = q.shape[0]
    k = torch.cat([null_k.to(k.dtype).expand(batch, -1, -1).unsqueeze(2), k], dim=2)
    v = torch.cat([null_v.to(v.dtype).expand(batch, -1, -1).unsqueeze(2), v], dim=2)
    q = F.pad(q, (0, 0, 1, 0))
    shared = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=shared)[:, :, 1:]


class _NullAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, null_k, null_v, backend):
        out, lse, state = _FORWARD[backend](q, k, v)
        out, lse = null_terms(q, out, lse, null_k, null_v)
        ctx.save_for_backward(q, k, v, null_k, null_v, out, lse, *state)
        ctx.backend = backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, null_k, null_v, out, lse, *state = ctx.saved_tensors
        if torch.compiler.is_compiling():
            dq, dk, dv = _fused_backward(dout, q, k, v, out, lse, state, ctx.backend)
        else:
            dq, dk, dv = _BACKWARD[ctx.backend](dout, q, k, v, out, lse.contiguous(), state)
        dq, dnull_k, dnull_v = null_terms_backward(dout, q, out, lse, null_k, null_v, dq)
        return dq, dk, dv, dnull_k.to(null_k.dtype), dnull_v.to(null_v.dtype), None


@library.custom_op("oneb::fused_attention_backward", mutates_args=())
def _fused_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, state: list[Tensor], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) by the fused kernel, each laid out like its input: what ``torch.compile`` calls.

    An operator of its own because of ``lse``: the kernels take it for contiguous without looking, and the compiler,
    which computes it, lays it out as it likes. Inside an operator ``contiguous`` is done, not assumed. Uncompiled,
    nobody has to know the layout beforehand, and a copy of the gradients is saved.
    """
    grads = _BACKWARD[backend](dout, q, k, v, out, lse.contiguous(), state)
    dq, dk, dv = (
        grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)
        for grad, x in zip(grads, (q, k, v), strict=True)
    )
    return dq, dk, dv


@_fused_backward.register_fake
def _(dout, q, k, v, out, lse, state, backend):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


# The fused kernels of torch, each as forward (q, k, v) -> (out, lse (B, H, T), state) and
# backward (dout, q, k, v, out, lse, state) -> (dq, dk, dv). Causal, no dropout, scale 1.


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, State]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=1.0)
    return out, lse, ()


def _cpu_backward(dout, q, k, v, out, lse, state):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, True, scale=1.0)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, State]:
    result = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=1.0)
    return result[0], result[1].squeeze(-1), (result[6], result[7])


def _cudnn_backward(dout, q, k, v, out, lse, state):
    length = q.shape[2]
    return aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse.unsqueeze(-1), *state, None, None, None, length, length, 0.0, True, scale=1.0
    )


def _flash_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, State]:
    result = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=1.0)
    return result[0], result[1], (result[6], result[7])


def _flash_backward(dout, q, k, v, out, lse, state):
    length = q.shape[2]
    return aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, None, None, length, length, 0.0, True, *state, scale=1.0
    )


_FORWARD = {"cpu": _cpu_forward, "cudnn": _cudnn_forward, "flash": _flash_forward}
_BACKWARD = {"cpu": _cpu_backward, "cudnn": _cudnn_backward, "flash": _flash_backward}
