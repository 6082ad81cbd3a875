"""A block's elementwise kernels and the loss head's softmax against fp64, forward and backward.

Twins run on the CPU in this process, kernels under Triton's interpreter in a second one (it must be switched on before
Triton is imported) and, marked ``gpu``, on CUDA.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oneb.kernels import rms_norm, rotary, runtime, softmax_loss, swiglu
from oneb.kernels.float8 import Float8Cast

HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2)
EPS = 1e-5

needs_triton = pytest.mark.skipif(not runtime.triton_available(), reason="Triton is not installed")


def function(module, name: str, fused: bool):
    return getattr(module, f"{name}_{'fused' if fused else 'plain'}")


def random(*shape: int, seed: int, dtype=torch.float32, device="cpu", size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * size).to(device, dtype)


def rounding(actual: Tensor, exact: Tensor) -> Tensor:
    """By how much ``exact`` may change when it is rounded to ``actual``'s dtype."""
    tiny = 2.0**-25 if actual.dtype == torch.float16 else 0.0  # fp16's spacing stops shrinking at 2**-14
    return exact.abs() * 1.01 * HALF_STEP[actual.dtype] + tiny


def assert_rounded_once(actual: Tensor, exact: Tensor) -> None:
    """``actual`` is ``exact`` (fp64) within fp32 arithmetic's error and one rounding to its dtype."""
    assert actual.shape == exact.shape
    error = (actual.double() - exact).abs()
    allowed = rounding(actual, exact) + exact.abs() * 2e-6 + exact.abs().max() * 1e-6
    assert (error <= allowed).all(), (error - allowed).max()


def assert_summed(actual: Tensor, exact: Tensor) -> None:
    """``actual`` fp32 sums over many terms."""
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), exact, rtol=2e-5, atol=2e-5 * float(exact.abs().max()))


# ---- checks of 16- and 32-bit results, for twin and kernel on any device --------------------------

def check_rms_norm(fused: bool, device: str, dtype: torch.dtype, shape: tuple[int, int], more: bool, seed: int) -> None:
    """``more``: with a delta in the forward, and a gradient past the norm in the backward pass."""
    x, dy, delta, dtotal = (random(*shape, seed=seed + i, dtype=dtype, device=device) for i in range(4))
    weight = random(shape[1], seed=seed + 4, device=device) + 1
    delta, dtotal = (delta, dtotal) if more else (None, None)
    total, y, rstd = function(rms_norm, "rms_norm", fused)(x, weight, EPS, delta)
    if delta is None:
        assert total is x
    else:
        assert_rounded_once(total, x.double() + delta.double())
    wide, wide_weight = total.double().requires_grad_(), weight.double().requires_grad_()
    exact = F.rms_norm(wide, (shape[1],), wide_weight, EPS)
    assert y.dtype == dtype
    assert_rounded_once(y, exact)
    assert_summed(rstd, total.double().square().mean(-1).add(EPS).rsqrt())

    dx, dweight = function(rms_norm, "rms_norm_backward", fused)(dy, total, weight, rstd, dtotal)
    exact_dx, exact_dweight = torch.autograd.grad(exact, (wide, wide_weight), dy.double())
    assert dx.dtype == dtype
    assert_rounded_once(dx, exact_dx if dtotal is None else exact_dx + dtotal.double())
    assert_summed(dweight, exact_dweight)


def check_swiglu(fused: bool, device: str, dtype: torch.dtype, shape: tuple[int, int], seed: int) -> None:
    n_rows, width = shape
    gate_up = random(n_rows, 2 * width, seed=seed, dtype=dtype, device=device, size=2.0)
    gate_up[0, 0], gate_up[-1, width - 1] = 60.0, -60.0  # where sigmoids saturate
    dact = random(n_rows, width, seed=seed + 1, dtype=dtype, device=device)
    wide = gate_up.double().requires_grad_()
    exact = F.silu(wide[:, :width]) * wide[:, width:]
    act = function(swiglu, "swiglu", fused)(gate_up)
    dgate_up = function(swiglu, "swiglu_backward", fused)(dact, gate_up)
    assert act.dtype == dgate_up.dtype == dtype
    assert_rounded_once(act, exact)
    assert_rounded_once(dgate_up, torch.autograd.grad(exact, wide, dact.double())[0])


# (H, K, D, V, G, tied, per-head scale)
HEADS = {
    "plain": (4, 4, 64, 64, 64, False, True),
    "decoupled": (4, 4, 12, 12, 8, False, True),
    "decoupled, tied": (4, 4, 12, 12, 8, True, True),
    "gqa, no temperature": (6, 2, 20, 20, 20, False, False),
    "odd widths": (3, 3, 13, 7, 6, False, True),
    "tied, no temperature": (2, 2, 16, 24, 16, True, False),
    "no rope": (5, 1, 12, 10, 0, False, True),
    "no rope, tied": (3, 3, 12, 12, 0, True, True),
}


def rotary_case(heads: str, dtype: torch.dtype, device: str, batch: int, seq_len: int, seed: int):
    """A projection's output, angles (or None), scale, and the heads' numbers as ``rotary`` takes them."""
    h, k, d, v, g, tied, by_head = HEADS[heads]
    qkv = random(batch, seq_len, (0 if tied else h * d) + k * (d + v), seed=seed, dtype=dtype, device=device)
    angles = random(seq_len, g // 2, seed=seed + 1, device=device, size=3.0)
    cos, sin = (angles.cos(), angles.sin()) if g else (None, None)
    scale = random(*((h, d) if by_head else (d,)), seed=seed + 2, device=device).exp()
    return qkv, cos, sin, scale, (h, k, d, v, tied)


def exact_rotary(wide: Tensor, cos: Tensor | None, sin: Tensor | None, scale: Tensor, heads: tuple, log: Tensor):
    """q, k, v of fp64 ``wide``, where pairs are complex numbers; ``log`` (H,) adds to the scale's logarithm."""
    h, k, d, v, tied = heads
    batch, seq_len, _ = wide.shape
    first = 0 if tied else h * d
    keys = wide[..., first:first + k * d].reshape(batch, seq_len, k, d)
    queries = keys if tied else wide[..., :first].reshape(batch, seq_len, h, d)
    values = wide[..., first + k * d:].reshape(batch, seq_len, k, v)

    def rotated(x: Tensor) -> Tensor:
        if cos is None:
            return x
        half = cos.shape[-1]
        pairs = torch.complex(x[..., d - 2 * half:d - half].contiguous(), x[..., d - half:].contiguous())
        pairs = pairs * torch.complex(cos.double(), sin.double()).unsqueeze(-2)
        return torch.cat([x[..., :d - 2 * half], pairs.real, pairs.imag], dim=-1)

    queries = queries * (scale.double() * log.exp()[:, None])
    return rotated(queries).transpose(1, 2), rotated(keys).transpose(1, 2), values.transpose(1, 2)


def laid_out(exact: Tensor, layout: str, seed: int, dtype: torch.dtype) -> Tensor:
    """A random gradient shaped like ``exact`` (B, heads, T, D), in one of the layouts that attention may return."""
    b, heads, t, d = exact.shape
    if layout == "tokens first":
        return random(b, t, heads, d, seed=seed, dtype=dtype, device=exact.device).transpose(1, 2)
    if layout == "slice":
        return random(b, t, heads, d + 3, seed=seed, dtype=dtype, device=exact.device).transpose(1, 2)[..., 1:d + 1]
    return random(b, heads, t, d, seed=seed, dtype=dtype, device=exact.device)


def check_rotary(
    fused: bool, device: str, dtype: torch.dtype, heads: str, layout: str, seed: int, seq_len=11, documents=False,
) -> None:
    qkv, cos, sin, scale, numbers = rotary_case(heads, dtype, device, 2, seq_len, seed)
    n_heads, tied = numbers[0], numbers[-1]
    wide = qkv.double().requires_grad_()
    log = torch.zeros(n_heads, dtype=torch.float64, device=device, requires_grad=True)
    at = torch.arange(seq_len, device=device)
    starts = torch.stack([at // 4 * 4, (at >= seq_len // 2) * (seq_len // 2)]).int() if documents else None
    exact_angles = (x if x is None or starts is None else x[at - starts] for x in (cos, sin))
    exact = exact_rotary(wide, *exact_angles, scale, numbers, log)
    results = function(rotary, "rotary", fused)(qkv, cos, sin, scale, *numbers, starts=starts)
    for index, (result, reference) in enumerate(zip(results, exact, strict=True)):
        assert result.dtype == dtype
        assert_rounded_once(result, reference)
        in_place = result.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
        assert in_place == (index > 0 or not tied)

    grads = [laid_out(reference, layout, seed + i, dtype) for i, reference in enumerate(exact)]
    backward = function(rotary, "rotary_backward", fused)
    dqkv, dlog = backward(*grads, results[0], cos, sin, scale, tied, starts=starts)
    exact_dqkv, = torch.autograd.grad(exact, wide, [grad.double() for grad in grads], retain_graph=True)
    assert dqkv.dtype == dtype
    assert dqkv.is_contiguous()
    assert_rounded_once(dqkv, exact_dqkv)
    # From the rounded q that is at hand, so the sum is exact for that.
    assert_summed(dlog, (grads[0].double() * results[0].double()).sum((0, 2, 3)))
    exact_dlog, = torch.autograd.grad(exact[0], log, grads[0].double())
    spread = (grads[0].double() * results[0].double()).square().sum((0, 2, 3)).sqrt()
    assert ((dlog - exact_dlog).abs() <= 8 * HALF_STEP[dtype] * spread + 1e-4).all()
    if scale.dim() == 1:  # one scale for all heads: no temperature, so nobody asks for its gradient
        again, none = backward(*grads, None, cos, sin, scale, tied, starts=starts)
        assert none is None
        assert_rounded_once(again, exact_dqkv)  # another kernel: its sums may be contracted otherwise


def check_softmax(
    fused: bool, device: str, dtype: torch.dtype, shape: tuple[int, int, int], size: float, seed: int,
) -> None:
    n_rows, width, vocab_size = shape
    logits = random(n_rows, width, seed=seed, dtype=dtype, device=device, size=size)
    logits[:, vocab_size:] = 1e4  # padding that would win every softmax
    targets = torch.randint(vocab_size, (n_rows,), generator=torch.Generator().manual_seed(seed)).to(device)
    targets[0], targets[-1] = 0, vocab_size - 1
    wide = logits[:, :vocab_size].double().requires_grad_()
    exact = F.cross_entropy(wide, targets, reduction="sum")
    exact_grad, = torch.autograd.grad(exact, wide)
    loss, grad = function(softmax_loss, "softmax_cross_entropy", fused)(logits, targets, vocab_size)
    assert (grad is logits) == fused
    assert loss.dim() == 0
    # Logits of size L know their exponentials to L * 2**-24, whatever is done with them.
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=3e-6, atol=3e-6 * size)
    assert (grad[:, vocab_size:] == 0).all()
    error = (grad[:, :vocab_size].double() - exact_grad).abs()
    assert (error <= rounding(grad, exact_grad) + exact_grad.abs() * 4e-7 * (size + 4) + 1e-7).all()


# ---- checks of fp8 results -----------------------------------------------------------------------

def new_cast(dtype: torch.dtype, scale: float, amax: float, device: str) -> Float8Cast:
    return Float8Cast(dtype, torch.tensor(scale, device=device), torch.tensor(amax, device=device))


def producers(fused: bool, dtype: torch.dtype, device: str, seed: int):
    """Every function that can cast, on random inputs of ``dtype``: cast -> its result; by name."""
    x = random(13, 768, seed=seed, dtype=dtype, device=device)
    weight = random(768, seed=seed + 1, device=device) + 1
    gate_up = random(13, 600, seed=seed + 2, dtype=dtype, device=device)
    dact = random(13, 300, seed=seed + 3, dtype=dtype, device=device)
    large_gate = torch.cat([gate_up[:, :300] * 8, gate_up[:, 300:]], dim=-1)  # the largest gradient is the up half's
    found = {
        "rms_norm": lambda cast: function(rms_norm, "rms_norm", fused)(x, weight, EPS, None, cast)[1],
        "swiglu": lambda cast: function(swiglu, "swiglu", fused)(gate_up, cast),
        "swiglu_backward": lambda cast: function(swiglu, "swiglu_backward", fused)(dact, gate_up, cast),
        "swiglu_backward, up": lambda cast: function(swiglu, "swiglu_backward", fused)(dact, large_gate, cast),
    }
    for heads in ("plain", "decoupled, tied", "gqa, no temperature"):
        qkv, cos, sin, scale, numbers = rotary_case(heads, dtype, device, 2, 5, seed)
        zeros = torch.zeros(numbers[0], dtype=torch.float64, device=device)
        shapes = exact_rotary(qkv.double(), cos, sin, scale, numbers, zeros)
        grads = [laid_out(part, "tokens first", seed + i, dtype) for i, part in enumerate(shapes)]
        q = shapes[0].to(dtype) if scale.dim() == 2 else None
        fixed = (*grads, q, cos, sin, scale, numbers[-1])
        found[f"rotary_backward {heads}"] = (
            lambda cast, fixed=fixed: function(rotary, "rotary_backward", fused)(*fixed, cast)[0]
        )
    return found


def steps(x8: Tensor) -> Tensor:
    """Numbers that grow by one from one fp8 value to the next."""
    bits = x8.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


def check_casts(fused: bool, device: str, seed: int) -> None:
    twins = producers(False, torch.bfloat16, device, seed)
    wide = producers(fused, torch.float32, device, seed)
    for name, produce in producers(fused, torch.bfloat16, device, seed).items():
        # fp32 inputs that bf16 holds would be the same case; so compare fp32 with fp32, bf16 with its twin.
        unscaled = wide[name](None)
        largest = unscaled.abs().max()
        for fp8 in FORMATS:
            for scale in (2.0**6, torch.finfo(fp8).max / float(largest) * 4):  # the second one clamps
                cast = new_cast(fp8, scale, 0.0, device)
                result = wide[name](cast)
                assert result.dtype == fp8
                assert result.is_contiguous()
                torch.testing.assert_close(cast.amax, largest, rtol=1e-6 if device == "cuda" else 0, atol=0)
                expected = (unscaled * cast.scale).clamp(-cast.largest, cast.largest).to(fp8)
                assert_nearly_equal_steps(result, expected)
        fp8 = FORMATS["backward" in name]  # as in training
        raised, kept = new_cast(fp8, 2.0**6, 1e-3, device), new_cast(fp8, 2.0**6, 1e9, device)
        results = produce(raised), produce(kept)
        assert torch.equal(*(result.view(torch.uint8) for result in results))
        assert float(kept.amax) == 1e9
        twin = new_cast(fp8, 2.0**6, 0.0, device)
        assert_nearly_equal_steps(results[0], twins[name](twin))
        torch.testing.assert_close(raised.amax, twin.amax, rtol=3e-6, atol=0)


def assert_nearly_equal_steps(one: Tensor, other: Tensor) -> None:
    """Equal but for at most one of a thousand elements (and two of few) whose fp32 values straddle a boundary."""
    away = (steps(one) - steps(other)).abs()
    assert away.max() <= 1
    assert int((away > 0).sum()) <= max(2, one.numel() // 1000)


def check_bad_values(fused: bool, device: str) -> None:
    """NaN stays NaN and reaches amax; infinity is clamped and reaches amax; other elements are as ever."""
    norm, act = function(rms_norm, "rms_norm", fused), function(swiglu, "swiglu", fused)
    x, weight = random(9, 48, seed=1, device=device), torch.ones(48, device=device)
    x[4, 7] = float("nan")
    cast = new_cast(torch.float8_e4m3fn, 8.0, 0.5, device)
    y = norm(x, weight, EPS, None, cast)[1].float()
    assert cast.amax.isnan()
    assert y[4].isnan().all()
    assert y[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()
    norm(x[:4], weight, EPS, None, cast)
    assert cast.amax.isnan(), "a later call forgot the NaN"
    for fp8 in (torch.float8_e4m3fn, torch.float8_e5m2):
        gate_up = random(5, 40, seed=2, device=device)
        gate_up[3, 2], gate_up[3, 22] = float("inf"), -1.0
        cast = new_cast(fp8, 8.0, 0.5, device)
        values = act(gate_up, cast).float()
        assert cast.amax == float("inf")
        assert values[3, 2] == -cast.largest
        assert values.isfinite().all()


# ---- who runs them -------------------------------------------------------------------------------

def check_wide_results(fused: bool, device: str, dtype: torch.dtype, seed: int) -> None:
    # 13 rows are more than programs run in the interpreter, where a device counts as one multiprocessor.
    for shape in ((1, 64), (13, 768), (5, 1000)):
        check_rms_norm(fused, device, dtype, shape, more=shape[0] != 5, seed=seed)
    for shape in ((1, 1), (7, 1000), (9, 512)):
        check_swiglu(fused, device, dtype, shape, seed=seed)
    for index, heads in enumerate(HEADS):
        layout = ("tokens first", "heads first", "slice")[(index + seed) % 3]
        check_rotary(fused, device, dtype, heads, layout, seed=seed, documents=(index + seed) % 2 == 0)
    for size in (1.0, 30.0):
        check_softmax(fused, device, dtype, (5, 384, 257), size, seed=seed)


def check_everything(fused: bool, device: str, seed: int) -> None:
    for dtype in DTYPES:
        check_wide_results(fused, device, dtype, seed)
    check_casts(fused, device, seed)
    check_bad_values(fused, device)


@pytest.mark.parametrize("seed", range(3))
def test_twins_equal_fp64(seed):
    check_everything(False, "cpu", seed)


@needs_triton
def test_kernels_equal_fp64_in_the_interpreter():
    from second_process import python

    assert "interpreted" in python("-m", "tests.test_kernels_elementwise", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnGpu:
    # Time goes into compiling, for each dtype and width: seeds and lengths cost next to none.
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_kernels_equal_fp64(self, dtype):
        for seed in range(3):
            check_wide_results(True, "cuda", dtype, seed)
        for heads in HEADS:
            check_rotary(True, "cuda", dtype, heads, "tokens first", seed=4, seq_len=1001, documents=True)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_kernels_equal_fp64_at_real_shapes(self, dtype):
        check_rms_norm(True, "cuda", dtype, (5001, 2048), True, seed=1)
        check_swiglu(True, "cuda", dtype, (1003, 5632), seed=2)
        check_softmax(True, "cuda", dtype, (301, 50304, 50257), 3.0, seed=3)
        if dtype == torch.float16:
            check_rotary(True, "cuda", dtype, "plain", "tokens first", seed=4, seq_len=1001)

    def test_casts(self):
        for seed in range(3):
            check_casts(True, "cuda", seed)
        check_bad_values(True, "cuda")

    def test_results_repeat(self):
        x, dy = (random(5000, 2048, seed=i, dtype=torch.bfloat16, device="cuda") for i in range(2))
        weight = random(2048, seed=2, device="cuda")
        total, _, rstd = rms_norm.rms_norm_fused(x, weight, EPS, dy)
        first, second = (rms_norm.rms_norm_backward_fused(dy, total, weight, rstd)[1] for _ in range(2))
        assert torch.equal(first, second)

    def test_another_length_compiles_nothing(self):
        def run(n: int) -> None:
            x = random(n, 256, seed=n, dtype=torch.bfloat16, device="cuda")
            weight = torch.ones(256, device="cuda")
            for index in range(2):  # an amax and a scale anywhere in a larger tensor
                state = torch.ones(4, device="cuda")
                cast = Float8Cast(torch.float8_e4m3fn, state[2 * index], state[2 * index + 1])
                total, _, rstd = rms_norm.rms_norm_fused(x, weight, EPS, x, cast)
                swiglu.swiglu_backward_fused(swiglu.swiglu_fused(x), x, cast)
                qkv, cos, sin, scale, numbers = rotary_case("plain", torch.bfloat16, "cuda", 1, n, seed=n)
                q, k, v = rotary.rotary_fused(qkv, cos, sin, scale, *numbers)
                rotary.rotary_backward_fused(q, k, v, q, cos, sin, scale, False, cast)
            rms_norm.rms_norm_backward_fused(x, total, weight, rstd, x)
            softmax_loss.softmax_cross_entropy_fused(x, torch.zeros(n, dtype=torch.int64, device="cuda"), 250)

        run(1000)
        count = runtime.compiled_kernels()
        for n in (1, 2, 17, 1024, 4099):
            run(n)
        assert runtime.compiled_kernels() == count


if __name__ == "__main__":
    assert not hasattr(swiglu._swiglu_kernel, "device_caches"), "Triton's interpreter is off"
    from tests.interpreter import mend_interpreter

    mend_interpreter()
    check_everything(True, "cpu", seed=0)
    # Several tiles a row and a program, as at real sizes.
    softmax_loss._MAX_TILE = 128
    check_softmax(True, "cpu", torch.float32, (5, 384, 257), 30.0, seed=7)
    rotary._TILE, rotary._GROUPS = 64, 2
    for heads in ("decoupled", "decoupled, tied", "gqa, no temperature"):
        check_rotary(True, "cpu", torch.float32, heads, "slice", seed=8, seq_len=5, documents=heads != "decoupled")
    print("interpreted")
