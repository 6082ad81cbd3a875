"""Attention for narrow heads against naive softmax attention in fp64, forward and backward.

On a machine with CUDA the ``gpu`` tests run the kernels there. Without, this file runs itself in a second process
under Triton's interpreter (it must be switched on before Triton is imported), and compiles the kernels for the GPUs
that matter, since the interpreter accepts more than the compiler does.
"""

from __future__ import annotations

import pytest
import torch

from oneb.kernels import narrow_attention as narrow
from oneb.kernels import narrow_attention_backward, runtime
from oneb.kernels.documents import documents_of
from oneb.kernels.narrow_attention import Tiles

NAMES = ("dq", "dk", "dv", "dnull_k", "dnull_v")
OUT_TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 7e-4}
GRAD_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1.4e-3}
# Row sums add probabilities as the values' product sees them, rounded to 16 bits: half a unit in the last place.
LSE_TOLERANCE = {torch.bfloat16: 2**-8 + 1e-4, torch.float16: 2**-11 + 1e-4}
SMALL = {"tiles": Tiles(32, 16, 4, 1)}
SMALL_BACKWARD = {"dkdv_tiles": Tiles(16, 32, 4, 1), "dq_tiles": Tiles(32, 16, 4, 1)}

needs_triton = pytest.mark.skipif(not runtime.triton_available(), reason="Triton is not installed")


# ---- the reference ---------------------------------------------------------------------------------

def naive(q, k, v, null_k, null_v, documents=None):
    """Softmax attention written out, in the dtype of the inputs: the null key is one more column of scores."""
    repeats, n_tokens = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = q @ k.transpose(-1, -2)
    rows = torch.arange(n_tokens, device=q.device)
    scores = scores.masked_fill(rows[:, None] < rows, float("-inf"))
    if documents is not None:
        of_another = documents.starts[:, :, None] != documents.starts[:, None]
        scores = scores.masked_fill(of_another[:, None], float("-inf"))
    if null_k is not None:
        null_k, null_v = (x.to(q.dtype).repeat_interleave(repeats, 0) for x in (null_k, null_v))
        scores = torch.cat([scores, (q * null_k[:, None]).sum(-1, keepdim=True)], -1)
        v = torch.cat([v, null_v[None, :, None].expand(len(v), -1, -1, -1)], 2)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def gradients(inputs, dout, dtype, documents=None):
    """(out, lse, gradients) of the naive attention in ``dtype``."""
    leaves = [x if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    out, lse = naive(*leaves, documents)
    out.backward(dout.to(dtype))
    return out.detach(), lse.detach(), [x if x is None else x.grad for x in leaves]


def error(got, expected):
    """Relative error in the Frobenius norm."""
    return ((got.double() - expected).norm() / expected.norm()).item()


def case(heads, kv_heads, n_tokens, width, v_width, dtype, null, seed, device, scale=1.0, batch=2):
    """q, k and v as slices of one buffer, null key and value, and dout as a view with strides of its own."""
    torch.manual_seed(seed)
    widths = [heads * width, kv_heads * width, kv_heads * v_width]
    buffer = torch.randn(batch, n_tokens, sum(widths) + 4)  # 4 more columns: rows are not packed
    buffer[..., : heads * width] *= scale * width**-0.5
    q, k, v, _ = buffer.to(device, dtype).split([*widths, 4], -1)
    q, k, v = (x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    nulls = [torch.randn(kv_heads, n).to(device) for n in (width, v_width)] if null else [None, None]
    dout = torch.randn(heads, batch, n_tokens, v_width).to(device, dtype).transpose(0, 1)
    return [q, k, v, *nulls], dout


def cut(batch, n_tokens, mean, seed, device):
    """Documents of about ``mean`` tokens, cut anew in each sequence."""
    generator = torch.Generator().manual_seed(seed)
    tokens = (torch.rand(batch, n_tokens, generator=generator) < 1 / mean).long()
    return documents_of(tokens.to(device), 1)


def check(inputs, dout, deterministic, forward=None, backward=None, documents=None):
    """Everything the raw functions return, against fp64 and against the error that plain 16-bit arithmetic makes."""
    dtype = dout.dtype
    out, lse = narrow.narrow_attention_forward(*inputs, documents, **(forward or {}))
    grads = narrow.narrow_attention_backward(
        dout, *inputs, out, lse, documents, deterministic=deterministic, **(backward or {}))
    want_out, want_lse, want_grads = gradients(inputs, dout, torch.float64, documents)
    rough_out, _, rough_grads = gradients(inputs, dout, dtype, documents)
    assert out.dtype == dtype
    assert out.transpose(1, 2).is_contiguous()
    assert error(out, want_out) < OUT_TOLERANCE[dtype]
    assert error(out, want_out) < 1.3 * max(error(rough_out, want_out), 2**-10 * OUT_TOLERANCE[dtype])
    assert (lse - want_lse).abs().max() < LSE_TOLERANCE[dtype]
    single = dout.shape[2] == 1 and inputs[3] is None  # one key: the scores' gradients are exactly zero
    for name, got, want, rough in zip(NAMES, grads, want_grads, rough_grads, strict=True):
        if want is None:
            assert got is None
            continue
        assert torch.isfinite(got).all(), name
        if single and name in ("dq", "dk"):
            assert got.abs().max() < 0.1, name
            continue
        limit = min(GRAD_TOLERANCE[dtype], max(1.5 * error(rough, want), 0.6 * GRAD_TOLERANCE[dtype]))
        assert error(got, want) < limit, (name, error(got, want), error(rough, want))


def check_large_scores(inputs, dout, deterministic, forward=None, backward=None, documents=None):
    """One-hot softmax rows: gradients cancel, so errors are measured against the terms that cancel."""
    dtype = dout.dtype
    out, lse = narrow.narrow_attention_forward(*inputs, documents, **(forward or {}))
    grads = narrow.narrow_attention_backward(
        dout, *inputs, out, lse, documents, deterministic=deterministic, **(backward or {}))
    want_out, want_lse, want_grads = gradients(inputs, dout, torch.float64, documents)
    assert error(out, want_out) < OUT_TOLERANCE[dtype]
    assert error(lse, want_lse) < 1e-5
    row = (dout.double().abs() * want_out.abs()).sum(-1, keepdim=True)  # (B, H, T, 1): what delta cancels
    terms = {"dq": row * inputs[1].double().abs().mean(), "dk": row * inputs[0].double().abs()}
    for name, got, want in zip(NAMES[:3], grads, want_grads, strict=False):
        assert torch.isfinite(got).all(), name
        size = want.norm() + terms[name].norm() if name in terms else want.norm()
        assert (got.double() - want).norm() < GRAD_TOLERANCE[dtype] * size, name


# ---- the interpreter, in a second process ----------------------------------------------------------

def run_in_interpreter():
    from tests.interpreter import mend_interpreter

    mend_interpreter()
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN: an element left out would show
    bf16, fp16 = torch.bfloat16, torch.float16
    small = {"forward": SMALL, "backward": SMALL_BACKWARD}
    shapes = [  # batch, H, Hkv, T, Dqk, Dv; the packed layout wants bf16 and three spare columns in both widths
        (2, 2, 2, 45, 12, 12, bf16, True), (1, 4, 2, 33, 12, 16, fp16, True), (1, 2, 1, 50, 24, 8, bf16, False),
        (1, 1, 1, 1, 12, 12, bf16, True), (1, 1, 1, 17, 5, 32, bf16, False), (1, 2, 1, 32, 16, 16, bf16, True),
    ]
    for seed, (batch, *shape) in enumerate(shapes):
        for deterministic in (False, True) if seed < 3 else (seed % 2 == 0,):
            check(*case(*shape, seed, "cpu", batch=batch), deterministic, **small)
    for seed, scale in enumerate((30.0, 3e3)):  # scores around 100 and 1e4: past the range that needs no maximum
        check_large_scores(*case(1, 1, 45, 12, 12, bf16, seed == 1, seed, "cpu", scale), False, **small)
    inputs, dout = case(2, 2, 17, 12, 12, bf16, True, 7, "cpu", batch=1)
    strided = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in inputs[:3]]
    check([*strided, *inputs[3:]], dout, False, **small)
    compare_regimes("cpu", small)
    # Documents shorter and longer than tiles; lengths that end inside tiles; the range past which maxima are kept.
    shapes = [  # H, Hkv, T, Dqk, Dv, dtype, null, mean length
        (2, 2, 150, 12, 12, bf16, False, 9), (2, 1, 133, 12, 16, bf16, True, 70), (1, 1, 97, 8, 8, fp16, False, 20),
        (2, 2, 96, 40, 64, bf16, True, 30), (1, 1, 45, 100, 12, bf16, False, 11),
    ]
    for seed, (*shape, mean) in enumerate(shapes):
        inputs, dout = case(*shape, seed, "cpu", batch=2)
        check(inputs, dout, seed % 2 == 0, **small, documents=cut(2, shape[2], mean, seed + 6, "cpu"))
    for deterministic in (False, True):
        inputs, dout = case(1, 1, 70, 12, 12, bf16, False, 3, "cpu", 30.0)
        check_large_scores(inputs, dout, deterministic, **small, documents=cut(2, 70, 15, 3, "cpu"))
        for dtype in (bf16, fp16):
            check_only_what_is_seen_is_read(dtype, deterministic)
    print("interpreted")


def check_only_what_is_seen_is_read(dtype, deterministic):
    """Of two documents one is NaN: what a tile of it gave, were it visited, no mask would take away."""
    tokens = torch.zeros(1, 128, dtype=torch.long)
    tokens[:, 64] = 1
    documents = documents_of(tokens, 1)
    for broken, whole in ((slice(64), slice(64, None)), (slice(64, None), slice(64))):
        (q, k, v, _, _), dout = case(1, 1, 128, 12, 12, dtype, False, 0, "cpu", batch=1)
        q, k, v, dout = (x.clone() for x in (q, k, v, dout))
        for x in (k, v) if broken.start is None else (q, dout):
            x[:, :, broken] = float("nan")
        out, lse = narrow.narrow_attention_forward(q, k, v, None, None, documents, **SMALL)
        grads = narrow.narrow_attention_backward(
            dout, q, k, v, None, None, out, lse, documents, deterministic=deterministic, **SMALL_BACKWARD)
        for name, x in zip(("out", *NAMES), (out, *grads[:3]), strict=False):
            assert torch.isfinite(x[:, :, whole]).all(), (name, broken)


def compare_regimes(device, small):
    """Scores that all rise by a constant leave the softmax as it is, while the row sums cross every limit."""
    for shift in (-120.0, -41.6, -41.5, 0.0, 69.3, 69.4, 88.0, 120.0):
        inputs, _ = case(1, 1, 45, 12, 12, torch.bfloat16, False, 3, device, batch=1)
        q, k, v = (x.clone() for x in inputs[:3])
        q[..., 0], k[..., 0] = 1.0, torch.tensor(shift).bfloat16()
        out, lse = narrow.narrow_attention_forward(q, k, v, None, None, **small["forward"])
        want, want_lse = naive(q.double(), k.double(), v.double(), None, None)
        assert error(out, want) < OUT_TOLERANCE[torch.bfloat16], shift
        assert (lse - want_lse).abs().max() < LSE_TOLERANCE[torch.bfloat16], shift


@needs_triton
def test_kernels_match_fp64_in_the_interpreter():
    from second_process import python

    assert "interpreted" in python("-m", "tests.test_narrow_attention", TRITON_INTERPRET="1")


# ---- on any machine --------------------------------------------------------------------------------

@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("mean", [None, 5, 20])
def test_twin_matches_fp64(null, mean):
    inputs, dout = case(4, 2, 37, 12, 9, torch.float32, null, mean or 0, "cpu")
    documents = None if mean is None else cut(2, 37, mean, mean, "cpu")
    leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
    out = narrow.narrow_attention(*leaves, documents)  # off CUDA: the twin
    out.backward(dout)
    want_out, _, want_grads = gradients(inputs, dout, torch.float64, documents)
    assert error(out, want_out) < 1e-6
    for leaf, want in zip(leaves, want_grads, strict=True):
        assert want is None or error(leaf.grad, want) < 1e-5


def test_without_triton_the_twin_remains():
    from second_process import python

    code = (
        "import sys; sys.modules['triton'] = None\n"  # makes `import triton` fail
        "import torch; from oneb.kernels.narrow_attention import narrow_attention\n"
        "q, k, v = torch.randn(3, 1, 2, 5, 12).unbind()\n"
        "print(torch.allclose(narrow_attention(q, k, v)[:, :, 0], v[:, :, 0]))"
    )
    assert python("-c", code).strip() == "True"


@needs_triton
@pytest.mark.parametrize(("capability", "dtype", "width"), [(80, "fp16", 12), (90, "bf16", 12), (90, "bf16", 64)])
@pytest.mark.parametrize("name", ["forward", "dkdv", "dq", "rows"])
def test_kernels_compile(name, capability, dtype, width):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    home = narrow if name == "forward" else narrow_attention_backward
    kernel = getattr(home, f"_narrow_attention_{name}_kernel")
    if not hasattr(kernel, "params"):
        pytest.skip("Triton's interpreter is on in this process")
    constants = {
        "HEADS": 4, "KV_HEADS": 4, "QK_WIDTH": width, "V_WIDTH": width, "QK_PADDED": max(16, width),
        "V_PADDED": max(16, width), "ALIGN": 4, "NULL": True, "NATIVE": True, "ONLINE": dtype == "fp16",
        "DQ": name != "dq", "QUERIES": 64, "KEYS": 32, "ROWS": 128, "PACKED": (dtype, width) == ("bf16", 12),
        "Q_ALIGN": 4, "DOCS": width == 64,
    }
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    wide = {"lse_ptr", "lse2_ptr", "delta_ptr", "dnull_ptr", "null_k_ptr", "null_v_ptr"}
    signature = {key: f"*{dtype}" if key.endswith("_ptr") else "i32" for key in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr") | dict.fromkeys(wide & set(kernel.arg_names), "*fp32")
    signature |= {key: "*i32" for key in ("starts_ptr", "ends_ptr") if key in kernel.arg_names}
    if "dq_ptr" in signature and name != "dq":
        signature["dq_ptr"] = "*fp32"
    source = ASTSource(kernel, signature, constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}).asm["ptx"]
    if name != "rows":
        assert "mma" in ptx  # tensor cores, not a loop of multiply-adds


# ---- on a GPU --------------------------------------------------------------------------------------

# Tuning compiles every candidate: one test does it, the others take the first. A variant of a kernel is also compiled
# for each set of widths and heads, so what need not vary is H = Hkv = 4, Dqk = Dv = 12.
TABLES = {
    "tiles": narrow.FORWARD_TILES, "dkdv_tiles": narrow_attention_backward.DKDV_TILES,
    "dq_tiles": narrow_attention_backward.DQ_TILES,
}


def first(width):
    """The first tiles for heads padded to ``width``."""
    tiles = {name: table[width][0] for name, table in TABLES.items()}
    return {"forward": {"tiles": tiles.pop("tiles")}, "backward": tiles}


FIRST = first(32)


@needs_triton
@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize(("heads", "kv_heads", "width", "v_width", "dtype", "null"), [
        (4, 4, 12, 12, torch.bfloat16, True), (4, 4, 12, 12, torch.bfloat16, False),
        (4, 4, 12, 12, torch.float16, True), (6, 1, 12, 12, torch.bfloat16, True),
        (2, 2, 16, 16, torch.bfloat16, False), (2, 2, 12, 16, torch.bfloat16, True),
        (2, 2, 32, 32, torch.bfloat16, True), (2, 2, 32, 32, torch.float16, False),
        (4, 2, 24, 8, torch.bfloat16, False), (3, 3, 7, 1, torch.float16, True),
    ])
    def test_matches_fp64(self, heads, kv_heads, width, v_width, dtype, null):
        for seed, n_tokens in enumerate((1, 17, 128, 257, 1000, 2048)):
            inputs, dout = case(heads, kv_heads, n_tokens, width, v_width, dtype, null, seed, "cuda")
            for deterministic in (False, True):
                check(inputs, dout, deterministic, **FIRST)

    @pytest.mark.parametrize("null", [False, True])
    def test_large_scores(self, null):
        for scale in (30.0, 300.0, 3e3):
            for seed, n_tokens in enumerate((33, 257, 1000)):
                inputs, dout = case(4, 4, n_tokens, 12, 12, torch.bfloat16, null, seed, "cuda", scale)
                check_large_scores(inputs, dout, deterministic=seed == 1, **FIRST)

    def test_both_range_regimes(self):
        compare_regimes("cuda", FIRST)

    @pytest.mark.parametrize(("kernel", "deterministic"), [
        ("tiles", False), ("dkdv_tiles", False), ("dkdv_tiles", True), ("dq_tiles", True),
    ])
    def test_every_candidate_and_the_choice_among_them(self, kernel, deterministic):
        inputs, dout = case(4, 4, 777, 12, 12, torch.bfloat16, True, 1, "cuda")
        for tiles in (*TABLES[kernel][32], None):  # None: tuned, in which dq must not be added to twice
            check(inputs, dout, deterministic, **{
                side: {name: tiles if name == kernel else best for name, best in given.items()}
                for side, given in FIRST.items()})

    @pytest.mark.parametrize(("heads", "kv_heads", "width", "v_width", "dtype", "null"), [
        (4, 4, 12, 12, torch.bfloat16, True), (4, 4, 12, 12, torch.float16, False),
        (4, 2, 64, 64, torch.bfloat16, True), (2, 2, 64, 64, torch.float16, False),
        (2, 1, 96, 128, torch.bfloat16, True),
    ])
    def test_documents(self, heads, kv_heads, width, v_width, dtype, null):
        tiles = first({12: 32, 64: 64, 96: 128}[width])
        for seed, (n_tokens, mean) in enumerate(((17, 5), (257, 40), (1000, 300), (2048, 700), (2048, 1e9))):
            inputs, dout = case(heads, kv_heads, n_tokens, width, v_width, dtype, null, seed, "cuda")
            for deterministic in (False, True):
                check(inputs, dout, deterministic, **tiles, documents=cut(2, n_tokens, mean, seed, "cuda"))

    @pytest.mark.parametrize("width", [64, 128])
    def test_every_candidate_for_documents(self, width):
        inputs, dout = case(2, 2, 777, width, width, torch.bfloat16, False, 1, "cuda")
        documents, padded = cut(2, 777, 150, 1, "cuda"), max(32, width)
        for kernel, table in TABLES.items():
            for tiles in (*table[padded], None):
                check(inputs, dout, kernel == "dq_tiles", documents=documents, **{
                    side: {name: tiles if name == kernel else best for name, best in given.items()}
                    for side, given in first(padded).items()})

    def test_gradients_are_complete_and_repeat_bit_for_bit(self):
        torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN: an element left out would show
        try:
            inputs, dout = case(4, 4, 1031, 12, 12, torch.bfloat16, True, 5, "cuda")
            for deterministic in (False, True):
                check(inputs, dout, deterministic, **FIRST)
            out, lse = narrow.narrow_attention_forward(*inputs, **FIRST["forward"])
            initial, *more = (
                narrow.narrow_attention_backward(dout, *inputs, out, lse, deterministic=True, **FIRST["backward"])
                for _ in range(6))
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(one, other) for again in more for one, other in zip(initial, again, strict=True))

    @pytest.mark.parametrize("null", [False, True])
    def test_autograd(self, null):
        inputs, dout = case(4, 4, 300, 12, 12, torch.bfloat16, null, 9, "cuda")  # too short to be tuned
        leaves = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
        documents = cut(2, 300, 60, 1, "cuda") if null else None
        narrow.narrow_attention(*leaves, documents).backward(dout)
        _, _, want = gradients(inputs, dout, torch.float64, documents)
        for leaf, grad in zip(leaves, want, strict=True):
            assert grad is None or error(leaf.grad, grad) < GRAD_TOLERANCE[torch.bfloat16]

    def test_many_heads_and_far_rows(self):
        """More than 65535 heads; and offsets past 2**31 elements from the first row to the last."""
        check(*case(64, 64, 17, 12, 12, torch.bfloat16, True, 2, "cuda", batch=1100), deterministic=False)
        wide = torch.randn(1, 300, 8_000_000, dtype=torch.bfloat16, device="cuda")
        q, k, v = (wide[..., -96:].split(32, -1)[i][..., :24].unflatten(-1, (2, 12)).transpose(1, 2) for i in range(3))
        check([q * 0.3, k, v, None, None], torch.randn_like(v), deterministic=False)


if __name__ == "__main__":
    assert not hasattr(narrow._narrow_attention_forward_kernel, "device_caches"), "Triton's interpreter is off"
    run_in_interpreter()
