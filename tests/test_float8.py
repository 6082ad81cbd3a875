"""fp8 casts, transposes and products, and their Triton kernels against the twins, bit for bit.

As in ``test_optim_fused``, the kernels run under Triton's interpreter in a second process where there is no GPU, and
are compiled for the GPUs that have fp8.
"""

from __future__ import annotations

import pytest
import torch

from oneb.kernels import float8
from oneb.kernels.float8 import Float8Cast, power_of_two_scale
from oneb.kernels.runtime import triton_available

FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2)
WIDE = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((16, 16), (48, 80), (144, 272))
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}

needs_triton = pytest.mark.skipif(not triton_available(), reason="Triton is not installed")


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """Normal values over many binades, so that some underflow and some are clamped at scale 1."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randint(-12, 9, shape, generator=generator)
    return (torch.randn(shape, generator=generator) * 2.0**spread).to(dtype).to(device)


def cast_for(dtype: torch.dtype, scale: float = 1.0, device: str = "cpu", amax: float = 0.0) -> Float8Cast:
    return Float8Cast(dtype, torch.tensor(scale, device=device), torch.tensor(amax, device=device))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bits, whatever NaN's are: those differ between devices."""
    nan = one.float().isnan()
    return torch.equal(nan, other.float().isnan()) and torch.equal(one.float()[~nan], other.float()[~nan])


# ---- casts and scales ----------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(1,), (7, 13), (33, 127)])
@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("scale", [1.0, 2.0**-7, 2.0**11])
def test_a_cast_rounds_to_the_nearest_and_clamps(dtype, wide, shape, scale):
    """Against a search among the format's own 256 values, in fp64."""
    x = random(shape, wide, seed=len(shape))
    cast = cast_for(dtype, scale)
    y = float8.cast8(x, cast).double().flatten()
    grid = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    grid = grid[grid.isfinite()]
    exact = x.double().flatten() * scale
    nearest = (exact[:, None] - grid).abs().min(1).values
    assert torch.equal((y - exact).abs(), nearest)
    assert y.abs().max() <= LARGEST[dtype] == cast.largest
    assert cast.amax == x.float().abs().max()


def test_amax_is_raised_and_never_lowered():
    x = random((16, 16), torch.bfloat16)
    largest = x.float().abs().max()
    for start in (0.0, float(largest) / 2, float(largest) * 2):
        cast = cast_for(torch.float8_e4m3fn, amax=start)
        float8.cast8(x, cast)
        assert cast.amax == max(start, largest)


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_is_not_finite_cannot_be_missed(dtype):
    for bad in ("nan", "inf", "-inf"):
        x = random((16, 32), torch.bfloat16)
        x[3, 5] = float(bad)
        cast = cast_for(dtype)
        y = float8.cast8(x, cast)
        assert not cast.amax.isfinite()
        assert y.float().isnan().sum() == (bad == "nan")


@pytest.mark.parametrize("margin", [0, 1, 3])
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_scale_is_the_largest_power_of_two_that_fits(dtype, margin):
    amax = random((4096,), torch.float32, seed=margin).abs() + 2.0**-30
    edges = LARGEST[dtype] * 2.0 ** torch.arange(-20, 20)
    amax = torch.cat([amax, edges, edges.nextafter(torch.tensor(torch.inf)), edges.nextafter(torch.tensor(0.0))])
    scale = power_of_two_scale(amax, torch.tensor(LARGEST[dtype]), margin)
    assert (torch.frexp(scale).mantissa == 0.5).all()
    headroom = LARGEST[dtype] / 2**margin
    assert (amax.double() * scale.double() <= headroom).all()
    assert (amax.double() * scale.double() * 2 > headroom).all()


def test_a_scale_stays_usable_for_any_amax():
    amax = torch.tensor([0.0, 1e-45, 1e-38, 3e38, torch.inf, torch.nan])
    scale = power_of_two_scale(amax, torch.tensor(448.0))
    assert scale.isfinite().all()
    assert ((scale * scale).isfinite() & (1 / scale * (1 / scale) > 0)).all()


# ---- transposes and products ---------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FORMATS)
def test_transposes_are_exact(dtype, shape):
    x = random(shape, torch.bfloat16)
    x8 = float8.cast8(x, cast_for(dtype))
    assert same_bits(float8.transpose8(x8), x8.view(torch.uint8).t().contiguous().view(dtype))
    cast = cast_for(dtype)
    both = float8.cast8_transposed(x, cast)
    assert same_bits(both[0], x8)
    assert same_bits(both[1], float8.transpose8(x8))
    assert cast.amax == x.float().abs().max()
    given = tuple(torch.empty_like(tensor) for tensor in both)
    assert float8.cast8_transposed(x, cast, out=given) is given
    assert same_bits(given[0], both[0])
    assert same_bits(given[1], both[1])


def product_error(m: int, n: int, k: int, dtype: torch.dtype, out: torch.dtype, device: str) -> float:
    """Relative error of a product against fp64 on the same fp8 operands: the casts' own error is not in it."""
    generator = torch.Generator().manual_seed(m + n + k)
    a, b = (torch.randn(rows, k, generator=generator).bfloat16().to(device) for rows in (m, n))
    scale_a, scale_b = 2.0**-3, 2.0**4
    a8, b8 = float8.cast8(a, cast_for(dtype, scale_a, device)), float8.cast8(b, cast_for(FORMATS[0], scale_b, device))
    inverse = [torch.tensor(1 / scale, device=device) for scale in (scale_a, scale_b)]
    y = float8.scaled_product(a8, b8, *inverse, out)
    assert y.dtype == out
    assert y.shape == (m, n)
    exact = (a8.double() / scale_a) @ (b8.double() / scale_b).T
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("out", "bound"), [
    (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11), (torch.float32, 1e-5),
])
def test_a_product_is_exact_up_to_its_rounding(dtype, out, bound):
    assert product_error(37, 48, 80, dtype, out, "cpu") < bound


# ---- kernels against twins -----------------------------------------------------------------------

def compare(device: str, shapes: tuple[tuple[int, int], ...], wides: tuple[torch.dtype, ...]) -> None:
    for wide in wides:
        for dtype in FORMATS:
            for shape in shapes:
                compare_one(device, shape, wide, dtype, special=None)
        for special in (float("nan"), float("inf")):
            compare_one(device, shapes[0], wide, FORMATS[0], special)


def compare_one(device: str, shape: tuple[int, int], wide: torch.dtype, dtype: torch.dtype, special: float | None):
    x = random(shape, wide, seed=sum(shape), device=device)
    if special is not None:
        x[1, 3] = special
    casts = [cast_for(dtype, 2.0**3, device, amax=0.25) for _ in range(3)]
    plain, fused = float8.cast8_plain(x, casts[0]), float8.cast8_fused(x, casts[1])
    both = float8.cast8_transposed_fused(x, casts[2])
    assert same(plain, fused), (shape, wide, dtype)
    assert same(plain, both[0]), (shape, wide, dtype)
    assert same_bits(both[1], float8.transpose8_plain(both[0])), (shape, wide, dtype)
    assert same_bits(float8.transpose8_fused(fused), float8.transpose8_plain(fused)), (shape, wide, dtype)
    for cast in casts[1:]:
        assert same(cast.amax, casts[0].amax), (cast.amax, casts[0].amax)
    flat = x.flatten()[: x.numel() - 3]  # an odd size, with a tail
    assert same(float8.cast8_plain(flat, casts[0]), float8.cast8_fused(flat, casts[1]))


def make_interpreter_round() -> None:
    """Let Triton's interpreter round fp32 to fp8 as a GPU does.

    Its own conversion drops the carry out of the mantissa (1.95 becomes 1.0 instead of 2.0), rounds ties up and makes a
    number of e4m3's NaN (Triton 3.6 to 3.9).
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    formats = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
    original = interpreter._convert_float

    def convert(values, source, target, rounding):
        if source == tl.float32 and target in formats:
            return torch.from_numpy(np.array(values)).to(formats[target]).view(torch.uint8).numpy()
        return original(values, source, target, rounding)

    interpreter._convert_float = convert


@needs_triton
def test_kernels_equal_twins_in_the_interpreter():
    from second_process import python

    assert "interpreted" in python("-m", "tests.test_float8", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("capability", [89, 90])  # L4, L40S and RTX 4090; H100 and H200
@pytest.mark.parametrize("name", ["_cast8_kernel", "_cast8_transposed_kernel", "_transpose8_kernel"])
def test_kernels_compile_to_wide_accesses(name, capability):
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(float8, name)
    if not hasattr(kernel, "params"):
        pytest.skip("Triton's interpreter is on in this process")
    constants = {"LARGEST": 448.0, "BLOCK": 8192, "FORMAT": tl.float8e4nv, "ROWS": 128, "COLUMNS": 128}
    types = {"x_ptr": "*bf16", "y_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "amax_ptr": "*i32", "yt_ptr": "*i32"}
    if name != "_cast8_kernel":
        types["y_ptr"] = "*i32"
    if name == "_transpose8_kernel":
        types["x_ptr"] = "*i32"
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    constants = {n: value for n, value in constants.items() if n in kernel.arg_names}
    # What Triton knows at the real shapes: addresses and sizes are multiples of 16.
    divisible = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n not in constants}
    source = ASTSource(kernel, signature, constants, divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    ptx = compiled.asm["ptx"]
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx
    assert compiled.asm["cubin"]
    if name != "_transpose8_kernel":
        assert "cvt.rn.satfinite.e4m3x2" in ptx


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnGpu:
    def test_kernels_equal_twins(self):
        # Triton 3.6 casts by way of fp16 on Ada, which holds bf16 times a power of two exactly, but not fp32.
        wides = WIDE if torch.cuda.get_device_capability() >= (9, 0) else WIDE[:2]
        compare("cuda", (*SHAPES, (1040, 4112), (4096, 1152)), wides)

    def test_offsets_beyond_32_bits(self):
        n, k = 2**17 + 16, 2**14
        x8 = torch.randint(0, 120, (n, k), dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
        turned = float8.transpose8(x8)
        for row in (0, n // 2, n - 1):
            assert torch.equal(turned.view(torch.uint8)[:, row], x8.view(torch.uint8)[row])
        wide = x8.to(torch.bfloat16)
        cast = cast_for(torch.float8_e4m3fn, device="cuda")
        assert same_bits(float8.cast8(wide, cast), x8)
        assert cast.amax == wide.amax()
        both = float8.cast8_transposed(wide, cast)
        assert same_bits(both[0], x8)
        assert same_bits(both[1], turned)

    @pytest.mark.parametrize("dtype", FORMATS)
    @pytest.mark.parametrize("shape", [(2048, 6144, 2048), (2048, 2048, 11264), (2048, 1152, 16384), (17, 48, 80)])
    @pytest.mark.parametrize("out", [torch.bfloat16, torch.float16, torch.float32])
    def test_product_equals_fp64(self, shape, dtype, out):
        rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}[out]
        # The tensor cores' own sums: about 14 bits until they are moved to fp32 registers.
        assert product_error(*shape, dtype, out, "cuda") < rounding + 2.0**-7


if __name__ == "__main__":
    assert not hasattr(float8._cast8_kernel, "device_caches"), "Triton's interpreter is off"
    make_interpreter_round()
    compare("cpu", SHAPES[:2], WIDE)
    # Several tiles either way: a second a comparison, and of what is read and stored only the dtype differs.
    compare_one("cpu", SHAPES[2], torch.bfloat16, FORMATS[0], special=None)
    compare_one("cpu", SHAPES[2], torch.float32, FORMATS[1], special=None)
    print("interpreted")
