#!/usr/bin/env python3
"""How fast batches are read from disk, and what memory that takes.

    python3 bench/loader.py --folder /disk/with/10/GB --out bench/results/loader_2cores.json

The real :class:`oneb.data.loader.BatchLoader`, with the trainer's prefetch and steps of 65,536 tokens, in the order in
which training reads: random windows without replacement, of 10% of a billion tokens. Before a cold row the kernel drops
the files' pages (``posix_fadvise``); ``mincore`` has to find none of them, and the row's reads from the disk
(``/proc/self/io``) have to be at least what its tokens take. The warm row reads the same tokens again, and next to
nothing from the disk. What lies below the kernel, a disk's or a host's own cache, cannot be dropped; so reads of 4 KiB
at random places, one after the other, are measured beside it.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import platform
import re
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from runs import save

from oneb.bench.results import table
from oneb.config import GPT2_VOCAB_SIZE
from oneb.data.arriving import ArrivingFile, ArrivingTokens
from oneb.data.formats import BIN_HEADER_BYTES, BIN_MAGIC, BIN_VERSION
from oneb.data.loader import BatchLoader
from oneb.data.order import BatchOrder
from oneb.data.sidecar import Sidecar, write_sidecar
from oneb.data.tokens import Shard, Tokens, open_tokens

STEP_TOKENS = 65_536
PREFETCH = 4  # the trainer's
LENGTHS = (1024, 2048, 8192)
SHARD_TOKENS = 10**8
SHARDS = 10
ROW_TOKENS = 10**8
SPARSE_TOKENS = 10**10
SPARSE_READ_BYTES = 2 * 2**30
SMALL_READS = 4000

# What is read -> files of how many tokens, their suffix and type, and whether in the order of named data.
LAYOUTS: dict[str, tuple[int, str, str, bool]] = {
    "one .npy": (SHARDS * SHARD_TOKENS, ".npy", "<u2", False),
    "one .npy, uint32": (SHARDS * SHARD_TOKENS, ".npy", "<u4", False),
    "10 shards .npy": (SHARD_TOKENS, ".npy", "<u2", False),
    "10 shards .npy, uint32": (SHARD_TOKENS, ".npy", "<u4", False),
    "10 shards .bin": (SHARD_TOKENS, ".bin", "<u2", False),
    "10 shards .bin, as named data": (SHARD_TOKENS, ".bin", "<u2", True),
}


# -- Files ---------------------------------------------------------------------------------------

def header(suffix: str, dtype: str, n_tokens: int) -> bytes:
    """What comes before the ids."""
    if suffix == ".bin":
        return struct.pack("<3i", BIN_MAGIC, BIN_VERSION, n_tokens).ljust(BIN_HEADER_BYTES, b"\0")
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({n_tokens},), }}".ljust(117) + "\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode()


def write_tokens(path: Path, dtype: str, n_tokens: int, seed: int) -> None:
    """Random GPT-2 ids, written through to the disk."""
    chance, left = np.random.default_rng(seed), n_tokens
    with open(path, "wb") as out:
        out.write(header(path.suffix, dtype, n_tokens))
        while left:
            ids = chance.integers(0, GPT2_VOCAB_SIZE, min(left, 10**7), np.uint16)
            out.write(ids.astype(dtype))
            left -= len(ids)
        os.fsync(out.fileno())
    vouch(path, n_tokens)


def vouch(path: Path, n_tokens: int) -> None:
    """A sidecar, so that opening does not read all ids first."""
    write_sidecar(path, Sidecar(
        tokens=n_tokens, documents=1, encoding="gpt2", vocab_size=GPT2_VOCAB_SIZE, eot=GPT2_VOCAB_SIZE - 1,
        source="random", format="random", sha256="-", max_id=GPT2_VOCAB_SIZE - 1))


def drop_pages(files: Sequence[Path]) -> None:
    """Have the kernel forget what it holds of ``files``.

    Raises:
        SystemExit: it still holds more than a thousandth of their pages.
    """
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    held = max(held_share(file) for file in files)
    if held > 1e-3:
        raise SystemExit(f"the page cache is not cold: {held:.1%} of a file's pages are in memory")


def held_share(file: Path) -> float:
    """Share of the file's pages that are in the page cache, by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        address = ctypes.addressof(start := ctypes.c_char.from_buffer(mapped))
        failed = libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), pages)
        del start  # else the mapping cannot be closed
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return float(np.mean(np.frombuffer(pages, np.uint8) & 1))


def disk_bytes() -> int:
    """What this process has had read from disks so far."""
    return int(re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.M)[1])


# -- Speed ---------------------------------------------------------------------------------------

def measure_layout(name: str, folder: Path, rows: list[dict[str, Any]]) -> None:
    """Cold and warm rows of a layout at each length, its files made before and removed afterwards."""
    n_tokens, suffix, dtype, in_turn = LAYOUTS[name]
    files = [folder / f"{number:02d}{suffix}" for number in range(SHARDS * SHARD_TOKENS // n_tokens)]
    try:
        for seed, file in enumerate(files):
            write_tokens(file, dtype, n_tokens, seed)
        for seq_len in LENGTHS:
            tokens = open_layout(folder, files, in_turn)
            groups = tuple(n_tokens for _ in files) if in_turn else ()
            order = BatchOrder(tokens.n_tokens, 1, ((0, seq_len),), (STEP_TOKENS // seq_len,), groups=groups)
            drop_pages(files)
            for cache in ("cold", "warm"):
                row = {"data": name, "seq_len": seq_len, "cache": cache, **measure(tokens, order)}
                check(row, cache)
                print(f"{name:<32} {seq_len:>5} {cache}: {row['tok_s'] / 1e6:7.2f}M tokens/s, "
                      f"{row['disk_mb']:7.1f} MB from the disk", flush=True)
                rows.append(row)
        if n_tokens > SHARD_TOKENS:
            drop_pages(files)
            rows.append({"data": name, "seq_len": None, "cache": "cold, reads of 4 KiB", **small_reads(files[0])})
    finally:
        for file in folder.iterdir():
            file.unlink()


def open_layout(folder: Path, files: Sequence[Path], in_turn: bool) -> Tokens:
    """The files as ``--data FOLDER`` opens them, or as named data does."""
    if not in_turn:
        return open_tokens(str(folder), "auto", vocab_size=GPT2_VOCAB_SIZE)
    return ArrivingTokens([Shard(ArrivingFile(file, SHARD_TOKENS, None), None) for file in files], "-", print)


def measure(tokens: Tokens, order: BatchOrder) -> dict[str, float]:
    """Read ``ROW_TOKENS`` tokens, beginning at step 0."""
    steps = ROW_TOKENS // STEP_TOKENS
    disk, processor, began = disk_bytes(), time.process_time(), time.perf_counter()
    with BatchLoader(tokens, order, vocab_size=GPT2_VOCAB_SIZE, start_step=0, total_steps=steps,
                     prefetch=PREFETCH) as loader:
        for _ in loader:
            pass
    seconds = time.perf_counter() - began
    return {"tok_s": steps * STEP_TOKENS / seconds, "mb_s": steps * STEP_TOKENS * tokens.dtype.itemsize / seconds / 1e6,
            "seconds": seconds, "processor_seconds": time.process_time() - processor,
            "token_mb": steps * STEP_TOKENS * tokens.dtype.itemsize / 1e6, "disk_mb": (disk_bytes() - disk) / 1e6}


def check(row: dict[str, Any], cache: str) -> None:
    """That the row is what it is called.

    Raises:
        SystemExit: it is not.
    """
    read, held = row["disk_mb"], row["token_mb"]
    # Kernels give pages back that were not used for a while, also where memory is plenty.
    if (read < 0.95 * held) if cache == "cold" else (read > 0.3 * held):
        raise SystemExit(f"{row['data']} {row['seq_len']}: {read:.0f} MB came from the disk for {held:.0f} MB of "
                         f"tokens with a {cache} page cache")


def small_reads(file: Path) -> dict[str, float]:
    """What the disk does by itself: 4 KiB at random places of ``file``, one read after the other."""
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    places = np.random.default_rng(0).choice(file.stat().st_size // 4096, SMALL_READS, replace=False) * 4096
    began = time.perf_counter()
    for place in places.tolist():
        os.pread(descriptor, 4096, place)
    seconds = time.perf_counter() - began
    os.close(descriptor)
    return {"reads_s": SMALL_READS / seconds, "mb_s": SMALL_READS * 4096 / seconds / 1e6}


# -- Memory --------------------------------------------------------------------------------------

def measure_memory(folder: Path) -> dict[str, Any]:
    """Resident memory of this process, in MiB, while it reads windows from all over a sparse file of 20 GB."""
    file, seq_len = folder / "sparse.npy", 2048
    with open(file, "wb") as out:
        out.write(header(".npy", "<u2", SPARSE_TOKENS))
        out.truncate(out.tell() + 2 * SPARSE_TOKENS)
    vouch(file, SPARSE_TOKENS)
    tokens = open_tokens(str(file), vocab_size=GPT2_VOCAB_SIZE)
    order = BatchOrder(SPARSE_TOKENS, 1, ((0, seq_len),), (STEP_TOKENS // seq_len,))
    steps = -(-SPARSE_READ_BYTES // (2 * STEP_TOKENS))
    before = memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the largest from now on
    with BatchLoader(tokens, order, vocab_size=GPT2_VOCAB_SIZE, start_step=0, total_steps=steps,
                     prefetch=PREFETCH) as loader:
        for _ in loader:
            pass
        largest, after = memory_mib("VmHWM"), memory_mib("VmRSS")
    offsets = np.concatenate([order.offsets(step) for step in range(steps)])
    file.unlink()
    return {"data": "sparse .npy of 20 GB", "seq_len": seq_len, "windows": len(np.unique(offsets)),
            "window_mb": len(np.unique(offsets)) * 2 * seq_len / 1e6, "first_offset": int(offsets.min()),
            "last_offset": int(offsets.max()), "rss_before_mib": before, "rss_largest_mib": largest,
            "rss_after_mib": after}


def memory_mib(name: str) -> float:
    """A line of ``/proc/self/status``."""
    return int(re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the files, which are removed again: 5 GB")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    work = arguments.folder / f"loader-{os.getpid()}"
    work.mkdir(parents=True)
    import torch  # counted before, not as the loader's memory

    memory = measure_memory(work)  # first: nothing else has been in this process's memory
    rows: list[dict[str, Any]] = []
    for name in arguments.layouts:
        measure_layout(name, work, rows)
    work.rmdir()
    print(f"\n{os.cpu_count()} cores, load {load:.2f} before\n")
    print(table(rows, {"data": "", "seq_len": "", "cache": "", "tok_s": ",.0f", "mb_s": ".1f", "seconds": ".2f",
                       "processor_seconds": ".2f", "token_mb": ".0f", "disk_mb": ".0f", "reads_s": ",.0f"}))
    print("\n" + "\n".join(f"{name}: {value}" for name, value in memory.items()))
    if arguments.out:
        save(arguments.out, [*rows, memory], cores=os.cpu_count(), load=load, python=platform.python_version(),
             torch=torch.__version__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
