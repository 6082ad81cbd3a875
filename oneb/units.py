"""Quantities as people write them: "10B" tokens, "1h 20m", GiB."""

from __future__ import annotations

import re

from oneb.errors import OnebError

GIB = 2**30

_COUNT_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = re.compile(r"(\d+(?:\.\d+)?|\.\d+)(?:e(\d{1,2}))?\s*([KMBT]?)", re.IGNORECASE)
_LONGEST = 100  # characters, and more than any count needs


def parse_count(text: str) -> int:
    """``"10B"`` -> 10_000_000_000. Also ``"100M"``, ``"1.5B"``, ``"2e9"``, ``"1_000"``, ``"4096"``.

    Suffixes are decimal (K = 1000), as token budgets are quoted in papers.

    Raises:
        OnebError: if the text is not a positive whole number of things.
    """
    match = _COUNT.fullmatch(text.strip().replace("_", "").replace(",", ""))
    if len(text) > _LONGEST:
        text, match = f"{text[:40]}…", None
    if match is None:
        raise OnebError(f"{text!r} is not a count; write a whole number such as 100M, 1.5B or 4096")
    mantissa, exponent, suffix = match.groups()
    # Integer arithmetic throughout: float("1.1") * 10**9 would be off by one.
    whole, _, fraction = mantissa.partition(".")
    scale = 10 ** int(exponent or 0) * _COUNT_SUFFIXES[suffix.upper()]
    value, remainder = divmod(int((whole or "0") + fraction) * scale, 10 ** len(fraction))
    if remainder or value < 1:
        raise OnebError(f"{text!r} is {'less than one' if value < 1 else 'not a whole number'}; "
                        "write a whole number such as 100M, 1.5B or 4096")
    if value >= 2**63:
        raise OnebError(f"{text!r} is more than there can be of anything here; "
                        "write a whole number such as 100M, 1.5B or 4096")
    return value


def format_count(count: float) -> str:
    """1_234_567_890 -> "1.23B"; three significant digits, and whole numbers exact below 1000."""
    for suffix in ("T", "B", "M", "K"):
        size = _COUNT_SUFFIXES[suffix]
        if abs(count) >= size:
            scaled = count / size
            decimals = 2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0
            return f"{scaled:.{decimals}f}{suffix}"
    return f"{count:.0f}" if abs(count) >= 100 else f"{count:.3g}"


def format_gib(n_bytes: float) -> str:
    """Bytes -> "12.3 GiB" (or MiB / KiB when small)."""
    for suffix, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n_bytes) >= size:
            return f"{n_bytes / size:.1f} {suffix}"
    return f"{n_bytes:.0f} B"


def format_duration(seconds: float) -> str:
    """Seconds -> "45s", "12m 05s", "3h 20m", "4d 06h"."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m {total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h {total % 3600 // 60:02d}m"
    return f"{total // 86400}d {total % 86400 // 3600:02d}h"


def format_dollars(dollars: float) -> str:
    """3.716 -> "$3.72", 1234.5 -> "$1,234"."""
    return f"${dollars:.2f}" if dollars < 100 else f"${dollars:,.0f}"


def format_transfer(done: int, size: int, first: int, seconds: float) -> str:
    """How far a transfer of ``size`` bytes is that began at byte ``first`` so many seconds ago.

    ``"34% of 190.7 MiB, 25.0 MB/s, 5s left"``
    """
    text = f"{done / max(1, size):.0%} of {format_gib(size)}"
    if done > first and seconds > 0:
        rate = (done - first) / seconds
        text += f", {rate / 1e6:.1f} MB/s, {format_duration((size - done) / rate)} left"
    return text
