"""Fused attention on a real GPU, against fp64: every backend, odd lengths, gradients of the null key and value too."""

import pytest
import torch
from torch.nn.attention import sdpa_kernel

from oneb.kernels.attention import SDP_BACKENDS, causal_attention, choose_backend

pytestmark = pytest.mark.gpu

BACKENDS = [("cudnn", torch.bfloat16), ("flash", torch.bfloat16), ("flash", torch.float16),
            ("efficient", torch.float32), ("efficient", torch.float16)]
# (query heads, key/value heads, tokens, query/key width, value width)
SHAPES = [(4, 4, 128, 64, 64), (8, 2, 257, 64, 64), (4, 4, 1000, 12, 12), (4, 4, 33, 16, 8), (8, 1, 96, 128, 128)]


def naive(q, k, v, null_k, null_v):
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = q @ k.transpose(-1, -2)
    length = q.shape[2]
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    if null_k is not None:
        null_k, null_v = null_k.repeat_interleave(repeats, 0), null_v.repeat_interleave(repeats, 0)
        scores = torch.cat([scores, torch.einsum("bhtd,hd->bht", q, null_k)[..., None]], -1)
        v = torch.cat([v, null_v[None, :, None].expand(v.shape[0], -1, -1, -1)], 2)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize(("shape", "compiled"), [*((shape, False) for shape in SHAPES),
                                               (SHAPES[1], True), (SHAPES[2], True)])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_backend_matches_fp64(backend, dtype, shape, null, compiled):
    if backend == "cudnn" and choose_backend(torch.device("cuda"), torch.bfloat16) != "cudnn":
        pytest.skip("cuDNN attention is for Hopper and later")
    heads, kv_heads, length, width, v_width = shape
    torch.manual_seed(length)
    make = lambda *s, scale=1.0: (torch.randn(*s, device="cuda", dtype=torch.float64) * scale).to(dtype)  # noqa: E731
    # As the model hands them over: (B, T, heads, D) transposed.
    inputs = [make(2, length, heads, width, scale=width**-0.5).transpose(1, 2),
              make(2, length, kv_heads, width).transpose(1, 2), make(2, length, kv_heads, v_width).transpose(1, 2)]
    inputs += [make(kv_heads, width).float(), make(kv_heads, v_width).float()] if null else [None, None]
    ours = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
    wide = [x if x is None else x.detach().double().requires_grad_() for x in inputs]
    dout = make(2, heads, length, v_width)

    torch._dynamo.reset()  # past its limit of recompiles, dynamo would quietly test the plain function
    function = torch.compile(causal_attention, dynamic=False, fullgraph=True) if compiled else causal_attention
    with sdpa_kernel(SDP_BACKENDS[backend]):
        out = function(*ours, backend)
        out.backward(dout)
    expected = naive(*wide)
    expected.backward(dout.double())
    tolerance = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 2e-5}[dtype]
    assert error(out, expected) < tolerance
    for name, got, want in zip(("q", "k", "v", "null_k", "null_v"), ours, wide, strict=True):
        if got is not None:
            assert error(got.grad, want.grad) < 2 * tolerance, name


def error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()
