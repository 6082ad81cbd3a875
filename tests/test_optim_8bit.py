"""8-bit optimizer state: codes against a quantiser written down a second time in fp64, and training as with fp32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import mse_loss

from oneb.kernels import optimizer_step, optimizer_step8
from oneb.kernels.optimizer_step import element_noise, rounding_key
from oneb.kernels.optimizer_step8 import STATE_BLOCK, decode, encode, n_state_blocks
from oneb.optim import build_optimizer, clip_scale, grad_norm

CPU = torch.device("cpu")
DTYPES = (torch.int8, torch.uint8)
LARGEST = {torch.int8: 127, torch.uint8: 255}
ONE = torch.tensor(1.0)


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return element_noise(rounding_key(seed, 3, 1), 0, count, CPU)


def neighbours(values: torch.Tensor, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """fp64 numbers that the codes have at or below, and above, each |value|: cubes, a block of 256 after another."""
    magnitudes = np.abs(values.double().numpy())
    low, high = np.empty_like(magnitudes), np.empty_like(magnitudes)
    for first in range(0, len(magnitudes), 256):
        block = magnitudes[first:first + 256]
        grid = np.linspace(0, 1, LARGEST[dtype] + 1) ** 3 * block.max()
        above = np.searchsorted(grid, block, side="right").clip(1, len(grid) - 1)
        low[first:first + 256], high[first:first + 256] = grid[above - 1], grid[above]
    return low, high


def spread_values(n: int, seed: int, decades: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (-decades * torch.rand(n, generator=generator))
    values = torch.randn(n, generator=generator) * sizes
    values[::29] = 0
    return values


# ---- the codes -----------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "decades", "size"), [
    (1, 0, 1), (7, 1, 1e-3), (255, 2, 1e4), (256, 0, 1e-20), (257, 4, 1), (5000, 6, 1e10), (70_001, 3, 1e-9),
])
def test_a_value_becomes_one_of_its_neighbours(dtype, n, decades, size):
    values = spread_values(n, n, decades) * size
    if dtype == torch.uint8:
        values = values.abs()
    codes, scale = encode(values, noise(n), dtype)
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (dtype, (n,), torch.float32, (-(-n // 256),))
    decoded = decode(codes, scale).double().numpy()
    assert (np.sign(decoded) * np.sign(values.numpy()) >= 0).all()
    low, high = neighbours(values, dtype)
    distance = np.minimum(np.abs(np.abs(decoded) - low), np.abs(np.abs(decoded) - high))
    # fp32 puts a scale off by its own rounding, and so the border of two codes, on whose other side a value may be.
    assert (distance <= 1e-6 * high).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_mean_is_the_value(dtype, seed):
    repeats = 4096
    values = spread_values(STATE_BLOCK, seed, 4).abs()
    values[7] = values.max()  # gets the largest code
    if dtype == torch.int8:
        values[::2] *= -1
    else:  # below the first code but not 0, a value becomes the first
        values[(values > 0) & (values < values.max() / 255**3)] = 0
    codes, scale = encode(values.repeat(repeats), noise(repeats * STATE_BLOCK, seed), dtype)
    decoded = decode(codes, scale).double().view(repeats, STATE_BLOCK)
    low, high = (torch.from_numpy(x) for x in neighbours(values, dtype))
    chance = ((values.double().abs() - low) / (high - low)).clamp(0, 1)
    deviation = (high - low) * (chance * (1 - chance) / repeats).sqrt()
    # 6 standard errors; where the chance is tiny the law is Poisson's, and a count or two are no surprise.
    tolerance = 6 * deviation + 10 * (high - low) / repeats * (chance * repeats < 1) + 1e-6 * values.abs()
    error = decoded.mean(0) - values.double()
    assert (error.abs() <= tolerance).all()
    # Over all values the errors, in standard errors, are a normal sample: neither biased nor too small.
    usual = (chance > 0.01) & (chance < 0.99)
    z = (error * values.double().sign())[usual] / deviation[usual]
    assert len(z) > 100
    assert abs(z.mean()) < 5 / len(z) ** 0.5
    assert 0.7 < z.std() < 1.3


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_codes_hold_stay(dtype):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127 if dtype == torch.int8 else 0, LARGEST[dtype] + 1, (50 * 256,), generator=generator)
    codes[::256] = LARGEST[dtype]
    scale = 10 ** (-12 * torch.rand(50, generator=generator))
    codes = codes.to(dtype)
    again, new_scale = encode(decode(codes, scale), noise(50 * 256), dtype)
    torch.testing.assert_close(new_scale, scale, rtol=3e-7, atol=0)
    assert (again != codes).float().mean() < 1e-3  # fp32 has rounded the values in between
    torch.testing.assert_close(decode(again, new_scale), decode(codes, scale), rtol=0.05, atol=0)


def test_a_second_moment_above_zero_never_becomes_zero():
    roots = torch.zeros(256 * 64)
    roots[::256], roots[1::256], roots[2::256] = 1.0, 1e-12, 1e-30
    for seed in range(5):
        codes, _ = encode(roots, noise(len(roots), seed), torch.uint8)
        assert (codes[1::256] == 1).all()
        assert (codes[2::256] == 1).all()
        assert (codes[3::256] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_stay_finite(dtype):
    for value in (0.0, 1e-45, 1e-38, 1e-30, 3e38):
        values = torch.full((300,), value)
        codes, scale = encode(values, noise(300), dtype)
        decoded = decode(codes, scale)
        assert scale.isfinite().all()
        assert (scale > 0).all()
        torch.testing.assert_close(decoded, values, rtol=1e-6, atol=1e-23)


FLOATS = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)


@given(st.lists(FLOATS, min_size=1, max_size=520), st.integers(0, 99))
def test_any_values_are_kept_within_a_code(given_values, seed):
    values = torch.tensor(given_values)
    for dtype in DTYPES:
        wanted = values if dtype == torch.int8 else values.abs()
        decoded = decode(*encode(wanted, noise(len(values), seed), dtype)).double()
        low, high = (torch.from_numpy(x) for x in neighbours(wanted, dtype))
        # A scale is at least 2**-100, which the smallest values feel.
        assert ((decoded - wanted.double()).abs() <= (high - low) * 1.00001 + 1e-6 * wanted.abs() + 1e-22).all()


def test_floor_of_the_cube_root_is_exact():
    codes = torch.arange(256.0)
    cubes = codes**3
    for nudged, wanted in ((cubes, codes), (torch.nextafter(cubes, cubes + 1), codes),
                           (torch.nextafter(cubes[1:], cubes[:-1]), codes[:-1])):
        assert torch.equal(optimizer_step8._floor_cube_root(nudged), wanted)


def test_chunks_make_no_difference(monkeypatch):
    def stepped() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        n = 256 * 9 + 31
        case = [torch.randn(n, generator=generator).bfloat16(), torch.randn(n, generator=generator)]
        for dtype in DTYPES:
            case += [torch.zeros(n, dtype=dtype), torch.zeros(n_state_blocks(n))]
        for step in range(3):
            optimizer_step8.adamw8bit_step_plain(
                *case, ONE, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, n_updates=step + 1, key=step)
        return case

    whole = stepped()
    monkeypatch.setattr(optimizer_step, "_CHUNK", 512)
    for one, other in zip(whole, stepped(), strict=True):
        assert torch.equal(one, other)


# ---- training ------------------------------------------------------------------------------------

@pytest.fixture
def nearest(monkeypatch):
    """Call it to make codes round to the nearest from then on."""
    def half(key, first, count, device):
        return torch.full((count,), 2**31, device=device)

    return lambda: monkeypatch.setattr(optimizer_step8, "element_noise", half)


def quadratic_loss(kind: str, betas: tuple[float, float], steps: int = 600) -> float:
    """What is left of 64 x 255 parabolas of curvatures from 0.01 to 1, exact gradients, next to one large noisy one."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(64, 256, generator=generator) * 0.1
    curvature = 10 ** (-2 * torch.rand(64, 256, generator=generator))
    weight = nn.Parameter(torch.zeros(64, 256))
    optimizer = build_optimizer([("w", weight)], kind=kind, betas=betas, weight_decay=0.0, seed=0)
    for step in range(steps):
        weight.grad = curvature * (weight.detach() - target)
        weight.grad[:, 0] = torch.randn(64, generator=generator).sign()  # the block's absmax hardly falls
        optimizer.step(1e-3 * (1 - step / steps), step, ONE)
    return (curvature * (weight.detach() - target) ** 2)[:, 1:].mean().item()


@pytest.mark.parametrize(("kind", "betas"), [("lion", (0.9, 0.99)), ("adamw", (0.9, 0.95))])
def test_small_gradients_beside_large_ones_are_followed_only_with_stochastic_rounding(kind, betas, nearest):
    exact = quadratic_loss(kind, betas)
    stochastic = quadratic_loss(f"{kind}8bit", betas)
    nearest()
    frozen = quadratic_loss(f"{kind}8bit", betas)
    assert stochastic == pytest.approx(exact, rel=0.06)  # measured: 1.02 (Lion), 1.01 (AdamW)
    assert frozen > 4 * exact  # measured: 8.7 (Lion), 19 (AdamW)


def network_losses(kind: str, betas: tuple[float, float], seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    """(300,) losses of a network that learns another's outputs from inputs of very different sizes."""
    torch.manual_seed(0)
    width, steps = 64, 300
    sizes = 10 ** (-2 * torch.rand(width))
    inputs = torch.randn(256, width)
    targets = torch.relu(inputs @ torch.randn(width, width) * 0.05) @ torch.randn(width, 64) * 0.05
    inputs = inputs * sizes
    params = {"up": nn.Parameter((torch.randn(width, width) * 0.03).to(dtype)),
              "down": nn.Parameter((torch.randn(width, 64) * 0.03).to(dtype))}
    optimizer = build_optimizer(params.items(), kind=kind, betas=betas, weight_decay=0.1, seed=seed)
    assert all(("exp_avg_scale" in state) == ("8bit" in kind) for state in optimizer.state_dict()["state"].values())
    losses = []
    for step in range(steps):
        loss = mse_loss(torch.relu(inputs @ params["up"].float().t()) @ params["down"].float(), targets)
        loss.backward()
        optimizer.step(1e-3 * (1 - step / steps), step, clip_scale(grad_norm(optimizer.params), 1.0))
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize(("kind", "betas", "dtype"), [
    ("lion", (0.95, 0.98), torch.float32), ("lion", (0.95, 0.98), torch.bfloat16),
    ("adamw", (0.9, 0.95), torch.bfloat16), ("adamw", (0.9, 0.999), torch.float32),
])
def test_a_network_trains_as_with_fp32_state(kind, betas, dtype):
    exact = network_losses(kind, betas, dtype=dtype)
    assert exact[-1] < 0.5 * exact[0], "the problem must be one where training shows"
    for seed in (0, 1):
        coded = network_losses(f"{kind}8bit", betas, seed, dtype)
        assert (coded / exact - 1).abs().max() < 0.02  # measured: at most 0.006
