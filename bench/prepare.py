#!/usr/bin/env python3
"""Preparing data: this repository's command, by source, tokenizer and processes, beside a straightforward loop.

    python3 bench/prepare.py --books ../shared/data/books --rounds 3 --out bench/results/prepare_2cores.json
    python3 bench/prepare.py --books ../shared/data/books --megabytes 0 --source-megabytes 0 --tokens-1b
    python3 bench/prepare.py --books books --megabytes 2000 --source-megabytes 0 --workers 1 2 4 8 16 --no-loop

The loop is the one over ``tiktoken.encode_ordinary`` that one would write first; for a tokenizer.json it is over the
tokenizers package's batches, for which that uses all cores. All ways read the same files in one
run: the books as they are, and ``--megabytes`` of text made from them (each copy of a book has its words moved about,
so that no text repeats). They take turns, so that a busy moment meets all; the fastest of ``--rounds`` counts. The
tokens of all ways must be the same, to the last one.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from prepare_inputs import make_shards, make_sources, make_texts, text_bytes, texts_of, train_tokenizer
from runs import REPOSITORY, save

# The plain loops; argv: folder of parquet files, output, tokens, tokenizer.json.
GPT2 = """
import tiktoken
encoding = tiktoken.get_encoding("gpt2")
eot = encoding.eot_token
def encode(texts):
    return map(encoding.encode_ordinary, texts)
"""
TOKENIZER_FILE = """
from tokenizers import Tokenizer
encoding = Tokenizer.from_file(sys.argv[4])
encoding.encode_special_tokens = True
eot = encoding.token_to_id("<|endoftext|>")
def encode(texts):
    return (encoded.ids for encoded in encoding.encode_batch_fast(texts, add_special_tokens=False))
"""
LOOP = """
import sys
import numpy as np, pyarrow.parquet as pq
{encoder}
ids = []
written = 0
out = np.lib.format.open_memmap(sys.argv[2], "w+", np.uint16, (int(sys.argv[3]),))
for path in sorted(__import__("pathlib").Path(sys.argv[1]).glob("*.parquet")):
    parquet = pq.ParquetFile(path)
    for group in range(parquet.num_row_groups):
        for document in encode(parquet.read_row_group(group, columns=["text"])["text"].to_pylist()):
            ids += document
            ids.append(eot)
        out[written:written + len(ids)] = ids
        written += len(ids)
        ids.clear()
out.flush()
"""
BILLION = 10**9
BILLION_MEGABYTES = 4250  # of the books' text hold so many tokens
SHARD_TOKENS = 200_000_000


@dataclass(frozen=True)
class Took:
    """What a command took: seconds, processor seconds of all its processes, MiB of the largest of these."""

    seconds: float
    processor: float
    peak: float


def measure(command: list[str]) -> Took:
    """Run a command to its end. Memory is read from /proc, where there is one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    peak = 0.0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max([peak, *map(peak_mib, family(process.pid))])
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, error = process.communicate()
    seconds = time.monotonic() - started
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{command[:3]} failed:\n{error}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Took(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak)


def family(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(member for child in below for member in family(int(child)))]


def peak_mib(pid: int) -> float:
    """The most memory that a process had so far."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


def tokens_sha256(path: Path) -> str:
    """Of the ids alone: two headers may be of another length."""
    digest, ids = hashlib.sha256(), np.load(path, mmap_mode="r")
    for start in range(0, len(ids), 2**24):
        digest.update(ids[start:start + 2**24].tobytes())
    return digest.hexdigest()


def prepare(source: Path, output: Path, workers: int, *options: str) -> Took:
    """This repository's command, onto a name that is free: removing an old file takes time, too."""
    for old in output.parent.glob(output.name + "*"):
        old.unlink()
    return measure([sys.executable, str(REPOSITORY / "prepare_fineweb.py"), "--input", str(source), "--output",
                    str(output), "--workers", str(workers), *options])


def fastest(takes: list[Took]) -> Took:
    """The fastest run, with the most memory of any."""
    best = min(takes, key=lambda took: took.seconds)
    return Took(best.seconds, best.processor, max(took.peak for took in takes))


def row(source: str, tokenizer: str, way: str, processes: int, n_bytes: int, n_tokens: int, took: Took) -> dict:
    """A line of the table, printed. ``n_bytes`` of text, 0 where there is none."""
    made = {"input": source, "tokenizer": tokenizer, "way": way, "processes": processes, "text_mb": n_bytes / 1e6,
            "tokens": n_tokens, "seconds": took.seconds, "processor_seconds": took.processor,
            "mb_s": n_bytes / 1e6 / took.seconds, "tokens_s": n_tokens / took.seconds, "peak_mib": took.peak}
    print(f"{source:<16} {tokenizer:<15} {way:<5} {processes:>2} {n_bytes / 1e6:8.1f} MB {took.seconds:7.2f} s "
          f"({took.processor:6.2f} s of processor) {made['mb_s']:7.1f} MB/s {made['tokens_s'] / 1e6:6.2f}M tokens/s "
          f"{took.peak:6.0f} MiB", flush=True)
    return made


def compare(name: str, folder: Path, work: Path, workers: list[int], rounds: int, *, loop: bool,
            tokenizer: Path | None = None) -> list[dict]:
    """Every way of preparing a folder of parquet files; the rows also say how many ``times`` the loop's speed.

    Args:
        tokenizer: a tokenizer.json; None is GPT-2's.
    """
    options = ["--tokenizer", str(tokenizer)] if tokenizer else []
    code = LOOP.format(encoder=TOKENIZER_FILE if tokenizer else GPT2)
    takes: dict[int, list[Took]] = {}  # by processes; the loop's are under 0
    hashes: dict[int, str] = {}
    output, n_tokens = work / "ours.npy", 0
    for _ in range(rounds):
        for count in workers:
            takes.setdefault(count, []).append(prepare(folder, output, count, *options))
            n_tokens = len(np.load(output, mmap_mode="r"))
            hashes[count] = tokens_sha256(output)
        if loop:
            target = work / "loop.npy"
            target.unlink(missing_ok=True)
            takes.setdefault(0, []).append(
                measure([sys.executable, "-c", code, str(folder), str(target), str(n_tokens), str(tokenizer)]))
            hashes[0] = tokens_sha256(target)
    if len(set(hashes.values())) != 1:
        raise SystemExit(f"{name}: the tokens differ: {hashes}")
    best = {count: fastest(found) for count, found in takes.items()}
    n_bytes = text_bytes(folder)
    used = tokenizer.name if tokenizer else "gpt2"
    rows = [row(name, used, "oneb" if count else "loop", count or 1, n_bytes, n_tokens, took)
            for count, took in best.items()]
    for made in rows:
        made["of_one_process"] = best[workers[0]].seconds / made["seconds"]
        if loop:
            made["times"] = best[0].seconds / made["seconds"]
    print("".join(f"  {made['processes']}: {made['of_one_process']:.2f} x {workers[0]} process"
                  + (f", {made['times']:.1f} x the loop" if loop else "") for made in rows if made["way"] == "oneb"),
          flush=True)
    return rows


def by_source(texts: list[str], work: Path, workers: list[int], rounds: int, *, loop: bool) -> list[dict]:
    """Each kind of file with GPT-2's tokenizer; parquet with the others, too."""
    train_tokenizer(texts[:max(1, len(texts) // 30)], work / "tokenizer.json")
    folders = make_sources(texts, work)
    n_bytes = sum(len(text.encode()) for text in texts)
    cases = [(kind, "gpt2", folder, n_bytes) for kind, folder in folders.items()]
    cases.append(("parquet", "bytes", folders["parquet"], n_bytes))
    prepare(folders["parquet"], work / "tokens.npy", workers[-1])
    shards = work / "bin"
    shards.mkdir()
    make_shards(work / "tokens.npy", shards, SHARD_TOKENS, SHARD_TOKENS // 2)
    cases.append(("ready tokens", "gpt2", shards, 0))
    takes: dict[tuple[int, int], list[Took]] = {}
    hashes: dict[int, set[str]] = {}
    lengths: dict[int, int] = {}
    for _ in range(rounds):
        for case, (_, tokenizer, folder, _) in enumerate(cases):
            for count in workers:
                takes.setdefault((case, count), []).append(
                    prepare(folder, work / "ours.npy", count, "--tokenizer", tokenizer))
                hashes.setdefault(case, set()).add(tokens_sha256(work / "ours.npy"))
                lengths[case] = len(np.load(work / "ours.npy", mmap_mode="r"))
    same = [hashes[case] for case, (kind, tokenizer, *_) in enumerate(cases)
            if tokenizer == "gpt2" and kind.startswith(("parquet", "jsonl"))]
    if any(len(found) != 1 for found in hashes.values()) or any(found != same[0] for found in same):
        raise SystemExit(f"the tokens differ: {hashes}")
    rows = [row(kind, tokenizer, "oneb", count, n_bytes, lengths[case], fastest(takes[case, count]))
            for case, (kind, tokenizer, _, n_bytes) in enumerate(cases) for count in workers]
    return rows + compare("parquet", folders["parquet"], work, workers, rounds, loop=loop,
                          tokenizer=work / "tokenizer.json")


def billion(books: Path, work: Path, workers: list[int]) -> list[dict]:
    """A file of 1B tokens, and reading it again with --verify."""
    folder = work / "billion"
    folder.mkdir()
    make_texts(books, folder, BILLION_MEGABYTES)
    n_bytes = text_bytes(folder)
    rows = []
    for count in workers:
        took = prepare(folder, work / "1b.npy", count, "--tokens", str(BILLION))
        n_tokens = len(np.load(work / "1b.npy", mmap_mode="r"))
        rows.append(row("1B tokens", "gpt2", "oneb", count, n_bytes, n_tokens, took))
        assert n_tokens == BILLION
    took = measure([sys.executable, str(REPOSITORY / "prepare_fineweb.py"), "--verify", str(work / "1b.npy")])
    return [*rows, row("1B --verify", "gpt2", "oneb", 1, 0, BILLION, took)]


def made_texts(arguments: argparse.Namespace, work: Path) -> Path:
    """The folder of text to compare on: made now, or the one that was kept."""
    folder = arguments.made or work / "made"
    if not folder.exists():
        folder.mkdir(parents=True)
        make_texts(arguments.books, folder, arguments.megabytes)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="folder of parquet files with a column text")
    parser.add_argument("--megabytes", type=int, default=500,
                        help="of text made from them, 0 to leave the comparison out (default: %(default)s)")
    parser.add_argument("--made", type=Path, help="folder to keep that text in; made before, it is used as it is")
    parser.add_argument("--source-megabytes", type=int, default=150,
                        help="of text for the rows by source and tokenizer, 0 to leave them out (default: %(default)s)")
    parser.add_argument("--tokens-1b", action="store_true", help="also make a file of 1B tokens (needs 6 GB of disk)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--no-loop", action="store_true", help="leave the loop out: 12 MB/s")
    parser.add_argument("--folder", type=Path, help="for what is made and written (default: the system's)")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {load:.1f}")
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        work, workers, rounds = Path(name), arguments.workers, arguments.rounds
        loop = not arguments.no_loop
        if arguments.megabytes:
            rows += compare("books", arguments.books, work, workers, rounds, loop=loop)
            made = made_texts(arguments, work)
            rows += compare(f"{arguments.megabytes} MB of them", made, work, workers, rounds, loop=loop)
        if arguments.source_megabytes:
            sources = work / "sources"
            sources.mkdir()
            if not arguments.megabytes:
                arguments.megabytes = arguments.source_megabytes
            texts = list(texts_of(made_texts(arguments, work), arguments.source_megabytes * 10**6))
            rows += by_source(texts, sources, workers, rounds, loop=loop)
            shutil.rmtree(sources)
        if arguments.tokens_1b:
            rows += billion(arguments.books, work, workers)
    if arguments.out:
        save(arguments.out, rows, cores=os.cpu_count(), load=load, python=platform.python_version())
    return 0


if __name__ == "__main__":
    sys.exit(main())
