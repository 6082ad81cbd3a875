"""Stochastic rounding: unbiased, exact where it can be, never infinite; and the noise behind it."""

from __future__ import annotations

import itertools

import pytest
import torch

from oneb.kernels.optimizer_step import element_noise, mix32, rounding_key, stochastic_round

DTYPES = (torch.bfloat16, torch.float16)
CPU = torch.device("cpu")

# Spread over the formats: weights, near one, across a power of two, large, tiny, subnormal in fp16
# (below 6e-5), below fp16's smallest (6e-8), subnormal in bf16 and fp32 (below 1.2e-38).
VALUES = [0.0203, 0.019999, 1.0012345, 1.9999, 0.99999, 3.3e4, 6.1e-5, 5.9e-5, 3.21e-6, 1.23e-7, 4.4e-8, 1e-9]
BF16_VALUES = [*VALUES, 3.3e38, 1.3e-38, 1.1e-38, 3.3e-40, 5e-41]


def rounded_samples(value: float, dtype: torch.dtype, count: int = 1 << 16, seed: int = 0) -> torch.Tensor:
    noise = element_noise(rounding_key(seed, 7, 3), 0, count, CPU)
    return stochastic_round(torch.full((count,), value), dtype, noise)


def neighbours(value: float, dtype: torch.dtype) -> tuple[float, float]:
    """The representable numbers at and above |value|, in fp64, from the formats' definition."""
    mantissa_bits, least_exponent = (7, -126) if dtype == torch.bfloat16 else (10, -14)
    magnitude = abs(torch.tensor(value, dtype=torch.float32).double())
    exponent = max(int(torch.frexp(magnitude).exponent) - 1, least_exponent)
    spacing = 2.0 ** (exponent - mantissa_bits)
    low = float(magnitude) // spacing * spacing
    return low, low + spacing


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.bfloat16, value) for value in BF16_VALUES] + [(torch.float16, value) for value in VALUES],
)
def test_mean_is_the_value(dtype, value, sign):
    exact = torch.tensor(sign * value, dtype=torch.float32).double()
    samples = rounded_samples(sign * value, dtype).double()
    low, high = neighbours(value, dtype)
    assert set((sign * samples).unique().tolist()) <= {low, high}
    chance_up = (sign * exact.item() - low) / (high - low)
    standard_error = (high - low) * (chance_up * (1 - chance_up) / len(samples)) ** 0.5
    # 5 standard errors: one false alarm in two million. The floor is the noise's own resolution.
    tolerance = max(5 * standard_error, (high - low) * 2**-16)
    assert abs(samples.mean() - exact).item() <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_dtype_holds_stays(dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)  # all 65536 bit patterns
    extremes = [torch.full((2**16,), word) for word in (0, 2**32 - 1)]
    for noise in [element_noise(rounding_key(0, 0, 0), 0, 2**16, CPU), *extremes]:
        rounded = stochastic_round(every.float(), dtype, noise)
        numbers = ~every.isnan()
        assert torch.equal(rounded[numbers].view(torch.int16), every[numbers].view(torch.int16))
        assert rounded[~numbers].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_never_becomes_infinite(dtype):
    largest = torch.finfo(dtype).max
    just_above = 65519.0 if dtype == torch.float16 else largest * (1 + 2**-9)
    for value in (just_above, torch.finfo(torch.float32).max):
        for sign in (1, -1):
            assert rounded_samples(sign * value, dtype, 4096).double().unique().tolist() == [sign * largest]


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_and_nan_stay_themselves(dtype):
    # 0x7F800001 is the NaN that plain truncation would turn into infinity.
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    noise = element_noise(1, 0, 3, CPU)
    assert stochastic_round(nans, dtype, noise).isnan().all()
    infinite = torch.tensor([float("inf"), float("-inf"), float("inf")])
    assert torch.equal(stochastic_round(infinite, dtype, noise).float(), infinite)


def test_fp32_passes_through():
    x = torch.randn(10)
    assert torch.equal(stochastic_round(x, torch.float32, element_noise(1, 0, 10, CPU)), x)


def test_hash_is_the_published_one_and_agrees_between_ints_and_tensors():
    def lowbias32(x: int) -> int:  # https://nullprogram.com/blog/2018/07/31/
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    inputs = [0, 1, 2**31, 2**32 - 1, *(i * 2654435761 % 2**32 for i in range(2000))]
    wanted = [lowbias32(x) for x in inputs]
    assert [mix32(x) for x in inputs] == wanted
    assert mix32(torch.tensor(inputs)).tolist() == wanted


# (seed, step, parameter index)
STREAMS = [
    (0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 0, 1), (0, 0, 2), (1, 0, 0), (1337, 19999, 150), (1 << 32, 0, 0),
]
COUNT = 1 << 18


def uniform(stream: tuple[int, int, int], first: int = 0) -> torch.Tensor:
    """Noise scaled to mean 0 and variance 1."""
    noise = element_noise(rounding_key(*stream), first, COUNT, CPU).double()
    return (noise / 2**32 - 0.5) * 12**0.5


@pytest.mark.parametrize("stream", STREAMS)
def test_noise_is_uniform(stream):
    noise = uniform(stream)
    assert abs(noise.mean()) < 5 / COUNT**0.5
    assert abs((noise**2).mean() - 1) < 5 * (0.8 / COUNT) ** 0.5  # the variance of x**2 is 9/5 - 1
    words = element_noise(rounding_key(*stream), 0, COUNT, CPU)
    for bit in range(32):  # fp16 and bf16 compare with different bits
        assert abs((words >> bit & 1).double().mean() - 0.5) < 5 * 0.5 / COUNT**0.5, bit
    counts = torch.bincount(words >> 24, minlength=256).double()
    chi_squared = ((counts - COUNT / 256) ** 2 / (COUNT / 256)).sum()
    assert chi_squared < 255 + 5 * (2 * 255) ** 0.5


def test_noise_is_uncorrelated_between_streams_and_elements():
    limit = 5 / COUNT**0.5
    for one, other in itertools.combinations(STREAMS, 2):
        assert abs((uniform(one) * uniform(other)).mean()) < limit, (one, other)
    noise = uniform(STREAMS[0])
    for lag in (1, 2, 3, 16, 1024, 2048):
        assert abs((noise[lag:] * noise[:-lag]).mean()) < limit, lag


def test_noise_of_one_element_over_steps_is_uniform_and_uncorrelated():
    count = 1 << 14
    for element in (0, 1, 100_000_000):
        words = torch.tensor([mix32(rounding_key(0, step, 5) ^ element) for step in range(count)])
        noise = (words.double() / 2**32 - 0.5) * 12**0.5
        assert abs(noise.mean()) < 5 / count**0.5
        assert abs((noise[1:] * noise[:-1]).mean()) < 5 / count**0.5


def test_noise_is_a_function_of_the_element_wherever_a_chunk_starts():
    key = rounding_key(3, 4, 5)
    assert torch.equal(element_noise(key, 100, 50, CPU), element_noise(key, 0, 150, CPU)[100:])


def test_keys_of_a_run_hardly_ever_meet():
    keys = {rounding_key(1337, step, index) for step in range(200) for index in range(150)}
    assert len(keys) >= 30_000 - 2  # chance meetings in 2**32: 0.1 expected
