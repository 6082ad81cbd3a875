"""Counts, sizes and durations as people write them."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneb.errors import OnebError
from oneb.units import format_count, format_duration, format_gib, format_transfer, parse_count

SCALE = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}


@given(st.decimals(min_value=0, max_value=10_000, places=3), st.sampled_from("KMBTkmbt"))
def test_parse_count_is_exact_decimal_arithmetic(number, suffix):
    text = f"{number:f}{suffix}"
    expected = number * Decimal(10) ** SCALE[suffix.upper()]
    if expected >= 1:
        assert parse_count(text) == expected
    else:
        with pytest.raises(OnebError, match="less than one"):
            parse_count(text)


@given(st.integers(1, 10**18))
def test_whole_numbers_are_themselves(number):
    assert parse_count(str(number)) == parse_count(f" {number:,} ") == parse_count(f"{number:_}") == number


@pytest.mark.parametrize(("text", "count"), [("10B", 10**10), ("1.1B", 1_100_000_000), ("2e9", 2 * 10**9),
                                             ("1.5e3K", 1_500_000), (".5M", 500_000), ("100 M", 10**8)])
def test_parse_count_examples(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "B", "-1", "1.0005K", "ten", "1G", "1e", "0", "1.5", "1e999", "nan", "inf"])
def test_what_is_no_count_is_refused_with_an_example(text):
    with pytest.raises(OnebError, match="such as 100M"):
        parse_count(text)


@given(st.integers(0, 10**14))
def test_format_count_is_within_its_last_digit(count):
    text = format_count(count)
    shown = Decimal(text.rstrip("KMBT")) * Decimal(10) ** SCALE[text.lstrip("0123456789.")]
    assert abs(shown - count) <= Decimal(count) / 200
    assert count >= 1000 or shown == count


@pytest.mark.parametrize(("count", "text"), [(964.882, "965"), (999.7, "1000"), (0.5, "0.5"), (12.34, "12.3")])
def test_format_count_of_fractions(count, text):
    assert format_count(count) == text


@given(st.integers(1, 2**50))
def test_format_gib_is_close_and_in_the_largest_fitting_unit(n_bytes):
    number, unit = format_gib(n_bytes).split()
    size = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]
    assert abs(float(number) * size - n_bytes) <= 0.051 * size
    assert n_bytes >= size
    assert unit == "GiB" or n_bytes < 1024 * size


@given(st.floats(0, 10**8))
def test_format_duration_is_within_its_smallest_unit(seconds):
    words = format_duration(seconds).split()
    sizes = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    shown = sum(int(word[:-1]) * sizes[word[-1]] for word in words)
    assert -0.5 <= seconds - shown < sizes[words[-1][-1]] + 0.5


@pytest.mark.parametrize(("seconds", "text"), [(45, "45s"), (59.6, "1m 00s"), (725, "12m 05s"), (12_000, "3h 20m"),
                                               (367_200, "4d 06h")])
def test_format_duration_examples(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("done", "first", "seconds", "expected"), [
    (0, 0, 0.0, "0% of 190.7 MiB"), (100_000_000, 0, 4.0, "50% of 190.7 MiB, 25.0 MB/s, 4s left"),
    (150_000_000, 100_000_000, 2.0, "75% of 190.7 MiB, 25.0 MB/s, 2s left"),
])
def test_format_transfer(done, first, seconds, expected):
    assert format_transfer(done, 200_000_000, first, seconds) == expected
