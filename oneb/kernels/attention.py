"""Causal attention for every variant: one call, the best fused kernel of the machine, any head width.

Shapes: q (B, H, T, Dqk), k (B, Hkv, T, Dqk), v (B, Hkv, T, Dv); H a multiple of Hkv. Queries are scaled beforehand.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from oneb.config import DOCUMENT_HEAD_DIM, NARROW_HEAD_DIM
from oneb.kernels.documents import Documents
from oneb.kernels.narrow_attention import narrow_attention
from oneb.kernels.null_attention import null_attention
from oneb.kernels.runtime import triton_available

# Fused kernels read heads in 16-byte rows, and want queries, keys and values equally wide.
_HEAD_MULTIPLE = 8
# Kernels that share key/value heads among query heads by themselves.
_NATIVE_GQA = ("cudnn", "flash")

SDP_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cpu": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
    "narrow": SDPBackend.MATH,  # our own kernel: SDPA is not asked
}


def choose_backend(
    device: torch.device, dtype: torch.dtype, head_dim: int = 64, deterministic: bool = False, doc_mask: bool = False
) -> str:
    """Name of the fastest fused attention here: a key of :data:`SDP_BACKENDS`.

    Our own kernel for narrow heads, from Ampere on; else cuDNN on Hopper and later (1.5-1.7x FlashAttention 2 there),
    FlashAttention 2 on Ampere and Ada, the memory-efficient kernel on older cards and in fp32, and no fused kernel
    on mps.

    Args:
        head_dim: the wider of query and value heads. cuDNN trains heads up to 128 wide, FlashAttention up to 256.
        deterministic: leave cuDNN out. Its backward adds up in whatever order blocks finish, and torch cannot ask it
            for another; the others obey ``torch.use_deterministic_algorithms``.
        doc_mask: attention stays within documents. Our own kernel ("narrow") does that for heads up to 128 wide, and
            passes over what is hidden; where it does not run, the memory-efficient kernel is given a bias.
    """
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        return "math"
    major, _ = torch.cuda.get_device_capability(device)
    if dtype == torch.float32 or major < 8 or head_dim > 256:
        return "efficient"
    if head_dim <= (DOCUMENT_HEAD_DIM if doc_mask else NARROW_HEAD_DIM) and triton_available():
        return "narrow"
    if doc_mask:
        return "efficient"
    cudnn = major >= 9 and head_dim <= 128 and not deterministic and cudnn_attention_runs(device, dtype)
    return "cudnn" if cudnn else "flash"


def cudnn_attention_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether cuDNN's attention works here, by trying it: another cuDNN on the library path makes it fail."""
    if not torch.backends.cudnn.is_available():
        return False
    x = torch.ones(1, 1, 64, 64, device=device, dtype=dtype)
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            F.scaled_dot_product_attention(x, x, x, is_causal=True)
    except RuntimeError:
        return False  # fallback: FlashAttention 2, and the run's notes say so
    return True


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, null_k: Tensor | None, null_v: Tensor | None, backend: str,
    documents: Documents | None = None,
) -> Tensor:
    """Causal softmax attention, (B, H, T, Dv); with a null key/value (Hkv, D·) if one is given.

    Args:
        backend: from :func:`choose_backend`. Without a null key, or with documents, torch's own dispatcher picks the
            kernel, if it is not ours; the trainer restricts it to the same backend.
        documents: within which attention stays, (B, T); with their ``bias``, but for our own kernel.
    """
    if backend == "narrow":
        return narrow_attention(q, k, v, null_k, null_v, documents)
    width = v.shape[-1]
    wide = -(-max(q.shape[-1], width) // _HEAD_MULTIPLE) * _HEAD_MULTIPLE
    q, k, v, null_k, null_v = (_pad_heads(x, wide) for x in (q, k, v, null_k, null_v))
    if k.shape[1] != q.shape[1] and backend not in _NATIVE_GQA:
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        if null_k is not None:
            null_k, null_v = null_k.repeat_interleave(repeats, dim=0), null_v.repeat_interleave(repeats, dim=0)
    if documents is not None:
        assert documents.bias is not None
        out = _biased_attention(q, k, v, null_k, null_v, documents.bias)
    elif null_k is not None:
        out = null_attention(q, k, v, null_k, null_v, backend)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=k.shape[1] != q.shape[1])
    return out[..., :width]


def _biased_attention(
    q: Tensor, k: Tensor, v: Tensor, null_k: Tensor | None, null_v: Tensor | None, bias: Tensor
) -> Tensor:
    """By SDPA with a bias (B, 1, T, T) for scores, (B, 1, T, 1 + T) with a null key, which stands before the others."""
    if null_k is not None:
        k, v = (torch.cat([null.to(x.dtype).expand(len(x), -1, -1).unsqueeze(2), x], dim=2)
                for null, x in ((null_k, k), (null_v, v)))
    return F.scaled_dot_product_attention(q, k, v, bias, scale=1.0, enable_gqa=k.shape[1] != q.shape[1])


def _pad_heads(x: Tensor | None, width: int) -> Tensor | None:
    """Zeros up to ``width``: they add nothing to scores, and padded outputs are dropped."""
    return x if x is None or x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def cached_attention(q: Tensor, k: Tensor, v: Tensor, null_k: Tensor | None, null_v: Tensor | None) -> Tensor:
    """Attention of the last ``Tq`` positions over ``Tk >= Tq`` cached keys, (B, H, Tq, Dv), in plain torch.

    For generation, where a step has few queries and memory traffic is the cache.
    """
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = q.float() @ k.float().transpose(-1, -2)  # (B, H, Tq, Tk)
    n_queries, n_keys = scores.shape[-2:]
    future = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).triu(n_keys - n_queries + 1)
    scores = scores.masked_fill(future, float("-inf"))
    if null_k is not None:
        null_k, null_v = null_k.repeat_interleave(repeats, dim=0), null_v.repeat_interleave(repeats, dim=0)
        null_score = (q.float() * null_k.float()[:, None]).sum(-1, keepdim=True)
        scores = torch.cat([null_score, scores], dim=-1)
        v = torch.cat([null_v.to(v.dtype).expand(v.shape[0], -1, -1).unsqueeze(2), v], dim=2)
    return (scores.softmax(-1) @ v.float()).to(q.dtype)
