"""The null key's terms beside attention over the real keys, against naive softmax attention in fp64.

On a machine with CUDA the ``gpu`` tests run the kernels there. Without, this file runs itself in a second process
under Triton's interpreter (it must be switched on before Triton is imported), and compiles the kernels for the GPUs
that matter, since the interpreter accepts more than the compiler does.
"""

from __future__ import annotations

import re

import pytest
import torch

from oneb.kernels import null_attention, null_terms, runtime
from oneb.kernels.attention import causal_attention, choose_backend

NAMES = ("dq", "dk", "dv", "dnull_k", "dnull_v")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# One rounding of a result, or of an input (out, dq) that arrives rounded: at most half a unit in the last place each.
TOLERANCE = {BF16: 4e-3, FP16: 5e-4, FP32: 1e-5}
# (B, H, Hkv, T, Dqk, Dv)
SHAPES = [(2, 4, 2, 37, 64, 64), (1, 2, 2, 67, 128, 128), (2, 3, 1, 45, 40, 40), (1, 4, 1, 1, 64, 64),
          (1, 2, 1, 33, 40, 72)]

needs_triton = pytest.mark.skipif(not runtime.triton_available(), reason="Triton is not installed")


# ---- the reference ---------------------------------------------------------------------------------

def naive(q, k, v, null_k=None, null_v=None, null_q=None):
    """(out, lse) of softmax attention written out, in the dtype of ``q``: the null key is one more column of scores.

    With ``null_q`` these queries, instead of ``q``, meet the null key.
    """
    repeats, n_tokens = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    rows = torch.arange(n_tokens, device=q.device)
    scores = (q @ k.transpose(-1, -2)).masked_fill(rows[:, None] < rows, float("-inf"))
    if null_k is not None:
        null_k, null_v = null_k.repeat_interleave(repeats, 0), null_v.repeat_interleave(repeats, 0)
        scores = torch.cat([scores, ((q if null_q is None else null_q) * null_k[:, None]).sum(-1, keepdim=True)], -1)
        v = torch.cat([v, null_v[None, :, None].expand(len(v), -1, -1, -1)], 2)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def wide_gradients(inputs, dout):
    """(out, lse, gradients) in fp64, and the real keys' share of dq."""
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    out, lse = naive(*leaves)
    grads = torch.autograd.grad(out, leaves, dout.double(), retain_graph=True)
    # Queries reach the null score by a path of their own: without it dq is the real keys' share.
    q, k, v, null_k, null_v = leaves
    real_dq, = torch.autograd.grad(naive(q, k, v, null_k, null_v, q.detach())[0], q, dout.double())
    return out.detach(), lse.detach(), grads, real_dq


def rounding_sizes(inputs, dout, out, lse):
    """Norms that, times the relative rounding of ``out``, say how far gradients are off: dscore cancels with it."""
    q, null_k = inputs[0].double(), inputs[3].double()
    null_k = null_k.repeat_interleave(q.shape[1] // len(null_k), 0)[:, None]
    p = ((q * null_k).sum(-1) - lse).exp()
    dscore = (p * (dout.double() * out).norm(dim=-1)).unsqueeze(-1)
    return {"dq": (dscore * null_k).norm(), "dnull_k": (dscore * q).norm(), "dnull_v": 0.0}


def error(got, expected):
    """Relative error in the Frobenius norm."""
    assert torch.isfinite(got).all()
    return ((got.double() - expected).norm() / expected.norm()).item()


def case(batch, heads, kv_heads, n_tokens, width, v_width, dtype, seed, device, scale=1.0):
    """q, k and v as views of one buffer, null key and value, and dout with strides of its own."""
    generator = torch.Generator().manual_seed(seed)
    widths = [heads * width, kv_heads * width, kv_heads * v_width]
    buffer = torch.randn(batch, n_tokens, sum(widths) + 8, generator=generator)  # 8 more: rows are not packed
    buffer[..., : heads * width] *= scale * width**-0.5
    q, k, v, _ = buffer.to(device, dtype).split([*widths, 8], -1)
    q, k, v = (x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    nulls = [torch.randn(kv_heads, n, generator=generator).to(device) for n in (width, v_width)]
    dout = torch.randn(heads, batch, n_tokens, v_width, generator=generator).to(device, dtype).transpose(0, 1)
    return [q, k, v, *nulls], dout


def laid_out(x, order):
    """A copy of (B, H, T, D) in memory of that order of dimensions."""
    back = [order.index(axis) for axis in range(4)]
    return x.permute(order).contiguous().permute(back)


def check(inputs, dout, forward, backward):
    """Both functions, given attention over the real keys from fp64, against attention with the null key in fp64."""
    q, k, v, null_k, null_v = inputs
    dtype = q.dtype
    want, want_lse, grads, real_dq = wide_gradients(inputs, dout)
    out, lse = naive(*(x.double() for x in (q, k, v)))
    out, lse = laid_out(out.to(dtype), (0, 2, 1, 3)), lse.float()
    got, got_lse = forward(q, out, lse, null_k, null_v)
    assert (got.dtype, got_lse.dtype) == (dtype, FP32)
    assert got_lse.is_contiguous()
    assert error(got, want) < TOLERANCE[dtype]
    assert (got_lse - want_lse).abs().max() < 4e-7 * max(4, want_lse.abs().max())

    dq = laid_out(real_dq.to(dtype), (2, 0, 1, 3))
    full = laid_out(want.to(dtype), (0, 2, 1, 3))
    kept = [x.clone() for x in (dout, q, full)]
    found = backward(dout, q, full, want_lse.float(), null_k, null_v, dq)
    expected, sizes = [grads[0], *grads[3:]], rounding_sizes(inputs, dout, want, want_lse)
    assert [x.dtype for x in found] == [dtype, FP32, FP32]
    for name, got, right in zip(("dq", "dnull_k", "dnull_v"), found, expected, strict=True):
        assert got.shape == right.shape, name
        wrong = (got.double() - right).norm() / (right.norm() + sizes[name])
        assert wrong < TOLERANCE[dtype], (name, wrong)
    assert all(torch.equal(x, y) for x, y in zip((dout, q, full), kept, strict=True))


def check_autograd(inputs, dout, backend, attend=causal_attention):
    """The whole operation, with torch's own attention kernel: output and all gradients against fp64."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves, backend)
    found = torch.autograd.grad(out, leaves, dout)
    want, _, grads, _ = wide_gradients(inputs, dout)
    tolerance = TOLERANCE[out.dtype]
    assert error(out, want) < 2 * tolerance
    for name, got, right, leaf in zip(NAMES, found, grads, leaves, strict=True):
        assert (got.dtype, got.shape) == (leaf.dtype, leaf.shape), name
        assert error(got, right) < 5 * tolerance, (name, error(got, right))


# ---- the interpreter, in a second process ----------------------------------------------------------

def run_in_interpreter():
    from tests.interpreter import mend_interpreter

    mend_interpreter()
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN: an element left out would show
    fused = null_terms.null_terms_fused, null_terms.null_terms_backward_fused
    for seed, shape in enumerate(SHAPES):
        check(*case(*shape, (BF16, FP16, FP32)[seed % 3], seed, "cpu"), *fused)
        check(*case(*shape, (FP32, BF16, FP16)[seed % 3], seed + 10, "cpu", scale=(8.0, 30.0)[seed % 2]), *fused)
    inputs, dout = case(*SHAPES[0], BF16, 30, "cpu")
    check([x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in inputs], dout[..., :1].expand_as(dout), *fused)

    # The operation as it runs on a GPU, but for the attention kernel between ours.
    null_terms.runs_fused = lambda x: True
    for seed, dtype in enumerate((BF16, FP32, FP16)):
        check_autograd(*case(*SHAPES[seed], dtype, seed + 20, "cpu"), "cpu")
    print("interpreted")


@needs_triton
def test_kernels_match_fp64_in_the_interpreter():
    from second_process import python

    assert "interpreted" in python("-m", "tests.test_null_terms", TRITON_INTERPRET="1")


# ---- on any machine --------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(2))
def test_twins_match_fp64(shape, dtype, seed):
    check(*case(*shape, dtype, seed, "cpu", scale=1 + 10 * seed),
          null_terms.null_terms_plain, null_terms.null_terms_backward_plain)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(2))
def test_autograd_matches_fp64(shape, seed):
    check_autograd(*case(*shape, FP32, seed, "cpu"), "cpu")


def test_compiled_equals_fp64_and_is_one_graph():
    torch._dynamo.reset()  # past its limit of recompiles, dynamo would quietly test the plain function
    compiled = torch.compile(causal_attention, dynamic=False, fullgraph=True, backend="aot_eager")
    check_autograd(*case(*SHAPES[0], FP32, 5, "cpu"), "cpu", compiled)


def test_compiling_never_meets_the_kernels(monkeypatch):
    """They write in place, which a compiler's graph does not know of."""
    def refuse(*args, **kwargs):
        raise AssertionError("traced")

    monkeypatch.setattr(null_terms, "runs_fused", lambda x: True)
    monkeypatch.setattr(null_terms, "null_terms_fused", refuse)
    monkeypatch.setattr(null_terms, "null_terms_backward_fused", refuse)
    inputs, dout = case(*SHAPES[0], FP32, 6, "cpu")
    with pytest.raises(AssertionError, match="traced"):
        causal_attention(*inputs, "cpu")
    torch._dynamo.reset()
    compiled = torch.compile(causal_attention, dynamic=False, fullgraph=True, backend="aot_eager")
    check_autograd(inputs, dout, "cpu", compiled)


def test_a_second_derivative_is_refused():
    inputs, dout = case(*SHAPES[0], FP32, 7, "cpu")
    q, *rest = (x.detach().requires_grad_() for x in inputs)
    out = null_attention.null_attention(q, *rest, "cpu")
    dq, = torch.autograd.grad(out, q, dout.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_without_triton_the_twins_remain():
    from second_process import python

    code = (
        "import sys; sys.modules['triton'] = None\n"  # makes `import triton` fail
        "import torch; from oneb.kernels.null_terms import null_terms\n"
        "q, out = torch.randn(2, 1, 2, 5, 64).unbind()\n"
        "full, lse = null_terms(q, out, torch.zeros(1, 2, 5), torch.zeros(2, 64), torch.zeros(2, 64))\n"
        "print(torch.allclose(full, out / 2), torch.allclose(lse, torch.tensor(2.0).log()))"
    )
    assert python("-c", code).strip() == "True True"


@needs_triton
@pytest.mark.parametrize(("capability", "dtype"), [(80, "fp16"), (90, "bf16")])
@pytest.mark.parametrize("width", [40, 64, 128])
@pytest.mark.parametrize("name", ["", "_backward"])
def test_kernels_compile_to_wide_loads(name, width, capability, dtype):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(null_terms, f"_null_terms{name}_kernel")
    if not hasattr(kernel, "params"):
        pytest.skip("Triton's interpreter is on in this process")
    padded = triton.next_power_of_2(width)
    n_elements, num_warps = null_terms.TILE
    constants = {
        "HEADS": 8, "KV_HEADS": 2, "QK_WIDTH": width, "V_WIDTH": width, "QK_PADDED": padded, "V_PADDED": padded,
        "ALIGN": 8, "NATIVE": True, "ROWS": n_elements // padded,
    }
    narrow = {"q_ptr", "out_ptr", "dout_ptr", "dq_ptr"}
    signature = {key: ("*" + (dtype if key in narrow else "fp32")) if key.endswith("_ptr") else "i32"
                 for key in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(kernel.arg_names) if key.endswith("_ptr")}
    source = ASTSource(kernel, signature, constants, aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps}).asm["ptx"]
    reads, writes = (4, 1) if name else (2, 1)
    per_thread = n_elements // (32 * num_warps) // 8  # 16-byte accesses of a tile
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= reads * per_thread
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == writes * per_thread


# ---- on a GPU --------------------------------------------------------------------------------------

def backends():
    """cuDNN from Hopper on, and FlashAttention."""
    return {"flash", choose_backend(torch.device("cuda"), BF16)} & {"flash", "cudnn"}


@needs_triton
@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("dtype", [BF16, FP16])
    @pytest.mark.parametrize("shape", [*SHAPES, (2, 8, 8, 1000, 64, 64), (3, 8, 2, 777, 128, 128)])
    def test_kernels_match_fp64(self, shape, dtype):
        for seed in range(3):
            check(*case(*shape, dtype, seed, "cuda", scale=(1.0, 8.0, 30.0)[seed]),
                  null_terms.null_terms_fused, null_terms.null_terms_backward_fused)

    @pytest.mark.parametrize("heads", [(8, 8), (8, 2), (6, 1)])
    @pytest.mark.parametrize("width", [40, 64, 128])
    def test_autograd_matches_fp64(self, heads, width):
        for seed, n_tokens in enumerate((33, 257, 1000, 2047)):
            for backend in backends():
                check_autograd(*case(2, *heads, n_tokens, width, width, BF16, seed, "cuda"), backend)

    @pytest.mark.parametrize("kv_heads", [4, 1])
    def test_compiled_matches_fp64(self, kv_heads):
        for backend in backends():
            torch._dynamo.reset()
            compiled = torch.compile(causal_attention, dynamic=False, fullgraph=True)
            check_autograd(*case(2, 4, kv_heads, 257, 64, 64, BF16, 3, "cuda"), backend, compiled)

    def test_gradients_are_complete_and_repeat_bit_for_bit(self):
        torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN: an element left out would show
        try:
            inputs, dout = case(2, 8, 2, 1031, 64, 64, BF16, 5, "cuda")
            runs = []
            for _ in range(4):
                leaves = [x.detach().requires_grad_() for x in inputs]
                runs.append(torch.autograd.grad(causal_attention(*leaves, "flash"), leaves, dout))
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(one, other) for again in runs[1:] for one, other in zip(runs[0], again, strict=True))

    def test_one_compilation_serves_all_lengths(self):
        def once(n_tokens):
            inputs, dout = case(2, 8, 2, n_tokens, 64, 64, BF16, 5, "cuda")
            leaves = [x.detach().requires_grad_() for x in inputs]
            torch.autograd.grad(causal_attention(*leaves, "flash"), leaves, dout)

        once(257)
        count = runtime.compiled_kernels()
        for n_tokens in (1, 16, 512, 1000):
            once(n_tokens)
        assert runtime.compiled_kernels() == count

    def test_many_heads_and_far_rows(self):
        """More than 65535 heads; and offsets past 2**31 elements from the first row to the last."""
        fused = null_terms.null_terms_fused, null_terms.null_terms_backward_fused
        check(*case(1100, 64, 64, 17, 64, 64, BF16, 2, "cuda"), *fused)
        inputs, dout = case(1, 2, 2, 300, 64, 64, BF16, 3, "cuda")
        far = torch.empty(1, 300, 8_000_000, dtype=BF16, device="cuda")
        q = far[..., -128:].unflatten(-1, (2, 64)).transpose(1, 2)
        q.copy_(inputs[0])
        check([q, *inputs[1:]], dout, *fused)


if __name__ == "__main__":
    assert not hasattr(null_terms._null_terms_kernel, "device_caches"), "Triton's interpreter is off"
    run_in_interpreter()
