#!/usr/bin/env python3
"""Preparing data: this repository's command beside the straightforward loop over ``tiktoken.encode_ordinary``.

    python3 bench/prepare.py --books ../shared/data/books --out bench/results/prepare.json

All ways read the same parquet files, one after the other in one run: the books as they are, and ``--megabytes`` of text
made from them (each copy of a book has its words moved about, so that no text repeats). The tokens of all ways must be
the same, to the last one.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from runs import REPOSITORY, save

LOOP = """
import sys
import numpy as np, pyarrow.parquet as pq, tiktoken
encoding = tiktoken.get_encoding("gpt2")
ids = []
written = 0
out = np.lib.format.open_memmap(sys.argv[2], "w+", np.uint16, (int(sys.argv[3]),))
for path in sorted(__import__("pathlib").Path(sys.argv[1]).glob("*.parquet")):
    parquet = pq.ParquetFile(path)
    for group in range(parquet.num_row_groups):
        for text in parquet.read_row_group(group, columns=["text"])["text"].to_pylist():
            ids += encoding.encode_ordinary(text)
            ids.append(encoding.eot_token)
        out[written:written + len(ids)] = ids
        written += len(ids)
        ids.clear()
out.flush()
"""


def make_texts(books: Path, folder: Path, megabytes: int) -> None:
    """Parquet files of about 100 MB of text each: books whose sentences are dealt out anew, some words misspelt."""
    texts = [text for path in sorted(books.glob("*.parquet")) for text in pq.read_table(path)["text"].to_pylist()]
    chance = random.Random(0)
    total = number = 0
    while total < megabytes * 10**6:
        made, held = [], 0
        while held < min(100, megabytes) * 10**6:
            sentences = [sentence for text in chance.sample(texts, 3) for sentence in text.split(". ")]
            chance.shuffle(sentences)
            text = ". ".join(sentences[:len(sentences) // 3])
            words = text.split(" ")
            for place in chance.sample(range(len(words)), len(words) // 200):
                words[place] += chance.choice("abcdefghijklmnopqrstuvwxyz")
            made.append(" ".join(words))
            held += len(made[-1].encode())
        pq.write_table(pa.table({"text": made}), folder / f"{number:03d}.parquet", row_group_size=1000,
                       compression="zstd")
        total += held
        number += 1


def text_bytes(folder: Path) -> int:
    """UTF-8 bytes of all texts."""
    return sum(len(text.encode()) for path in sorted(folder.glob("*.parquet"))
               for batch in pq.ParquetFile(path).iter_batches(256, columns=["text"]) for text in batch[0].to_pylist())


def measure(command: list[str]) -> tuple[float, float, float]:
    """Seconds, processor seconds of all its processes, and the largest memory in MiB of any one of them, sampled."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                parent = psutil.Process(process.pid)
                members = [parent, *parent.children(recursive=True)]
                peak = max([peak, *(member.memory_info().rss for member in members)])
            except psutil.Error:
                pass
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, error = process.communicate()
    seconds = time.monotonic() - started
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{command[:3]} failed:\n{error}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak / 2**20


def tokens_sha256(path: Path) -> str:
    """Of the ids alone: two headers may be of another length."""
    return hashlib.sha256(np.load(path, mmap_mode="r").tobytes()).hexdigest()


def compare(name: str, folder: Path, work: Path, workers: list[int], rounds: int) -> list[dict]:
    """Every way of preparing ``folder``; the fastest of ``rounds``, alternating so that a busy moment hits all."""
    n_bytes = text_bytes(folder)
    best: dict[str, tuple[float, float, float]] = {}
    hashes: dict[str, str] = {}
    n_tokens = 0
    for _ in range(rounds):
        ways = {f"oneb, {count} process{'es' * (count > 1)}": count for count in workers}
        for way, count in ways.items():
            output = work / "ours.npy"
            took = measure([sys.executable, str(REPOSITORY / "prepare_fineweb.py"), "--input", str(folder), "--force",
                            "--output", str(output), "--workers", str(count)])
            n_tokens = len(np.load(output, mmap_mode="r"))
            hashes[way] = tokens_sha256(output)
            best[way] = min(best.get(way, took), took)
        took = measure([sys.executable, "-c", LOOP, str(folder), str(work / "loop.npy"), str(n_tokens)])
        hashes["loop"] = tokens_sha256(work / "loop.npy")
        best["loop"] = min(best.get("loop", took), took)
    if len(set(hashes.values())) != 1:
        raise SystemExit(f"{name}: the tokens differ: {hashes}")
    rows = [{"input": name, "way": way, "text_mb": n_bytes / 1e6, "tokens": n_tokens, "seconds": seconds,
             "processor_seconds": processor, "mb_s": n_bytes / 1e6 / seconds, "tokens_s": n_tokens / seconds,
             "peak_mib": peak, "times": best["loop"][0] / seconds} for way, (seconds, processor, peak) in best.items()]
    for row in rows:
        print(f"{name:<16} {row['way']:<18} {row['text_mb']:8.1f} MB {row['seconds']:7.2f} s "
              f"({row['processor_seconds']:6.2f} s of processor) {row['mb_s']:7.1f} MB/s "
              f"{row['tokens_s'] / 1e6:6.2f}M tokens/s {row['peak_mib']:6.0f} MiB {row['times']:6.1f}x", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="folder of parquet files with a column text")
    parser.add_argument("--megabytes", type=int, default=500, help="of text made from them (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        made = work / "made"
        made.mkdir()
        rows = compare("books", arguments.books, work, arguments.workers, arguments.rounds)
        if arguments.megabytes:
            make_texts(arguments.books, made, arguments.megabytes)
            rows += compare(f"{arguments.megabytes} MB of them", made, work, arguments.workers, arguments.rounds)
    if arguments.out:
        save(arguments.out, rows, cores=os.cpu_count(), load=os.getloadavg()[0], python=platform.python_version())
    return 0


if __name__ == "__main__":
    sys.exit(main())
