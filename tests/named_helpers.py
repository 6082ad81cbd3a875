"""A Hub on loopback that has ready shards, and machines whose runs name that data."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hub_server import Hub

from oneb.files import read_json_lines

ROOT = Path(__file__).parents[1]
REPO = "kjj0/finewebedu10B-gpt2"
SHARD = 2000
NAME = "fineweb-edu:6K"
N_VAL = 600
GROUPS = (2000, 2000, 1400)  # of 5400 training tokens
FILES = {"val.bin": N_VAL, **{f"train_{number:06d}.bin": size for number, size in enumerate(GROUPS, 1)}}
TEXTS = [f"document {number} " + "word " * (number % 50) for number in range(600)]


def ids(number: int) -> np.ndarray:
    """The tokens of shard ``number``: documents of some 50 tokens; 0 is for validation."""
    drawn = np.random.default_rng(number).integers(0, 50256, SHARD)
    drawn[np.random.default_rng(number).integers(0, SHARD, SHARD // 50)] = 50256
    return drawn.astype("<u2")


def shard(tokens: np.ndarray) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + tokens.tobytes()


def shard_name(number: int) -> str:
    return f"finewebedu_train_{number:06d}.bin" if number else "finewebedu_val_000000.bin"


def parquet(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer)
    return buffer.getvalue()


def ready() -> dict[str, bytes]:
    return {shard_name(number): shard(ids(number)) for number in range(5)}


def hold(hub: Hub, *numbers: int) -> list[threading.Event]:
    """Withhold these shards until their events are set."""
    events = [threading.Event() for _ in numbers]
    hub.held.update(zip(map(shard_name, numbers), events, strict=True))
    return events


# argv: the code to run with the waits between tries shortened, then its own arguments.
PATIENT = ("import sys; from oneb.data import download, hub_failures; from oneb.show import display; "
           "hub_failures._WAITS = (0.1, 0.1); download._PAUSE_S = 0.5; download._REPORT_S = 1.0; "
           "display._WAITING_S = 0.5; code = sys.argv.pop(1); exec(code)")
# argv: data root, name. Prints batch after batch a hash, and then the fingerprint; what is waited for to stderr.
READ = """
import hashlib
from oneb.config import DataConfig
from oneb.data.loader import BatchLoader
from oneb.data.named import open_data
from oneb.data.order import BatchOrder
first_step = 0
def say(text):
    print(text, file=sys.stderr, flush=True)
def waiting(seconds):
    say(f"{seconds:.0f} s: {data.tokens.arrival and data.tokens.arrival.awaited()}")
data = open_data(DataConfig(path=sys.argv[2], data_root=sys.argv[1]), 50257, say)
order = BatchOrder(data.n_train, 3, ((0, 16), (40, 32)), (4, 4), groups=data.groups)
with BatchLoader(data.tokens, order, vocab_size=50257, start_step=first_step, total_steps=220) as loader:
    for _ in range(first_step, 220):
        batch = loader.next(waiting)
        print(hashlib.sha256(batch.tokens.numpy().tobytes()).hexdigest(), flush=True)
print(hashlib.sha256(data.tokens.read(data.n_train, data.n_val).tobytes()).hexdigest())
print(data.tokens.fingerprint, data.n_train, data.n_val, data.groups)
"""
TRAIN = "from oneb.cli.train import main; sys.exit(main(sys.argv[1:]))"
OPTIONS = """--size nano --layers 1 --d-model 32 --n-head 2 --d-ff 64 --device cpu --train-seq-len 32 --block 32
--batch-size 2 --grad-accum 1 --steps 70 --log-every 1 --eval-every 1000 --eval-iters 1 --lr 1e-3 --warmup-steps 2
--live basic --tag x --if-exists resume
"""
OPTIONS = OPTIONS.split()
STEPS_IN_FIRST = GROUPS[0] // 32 // 2


class Machine:
    """A folder with a cache, a data root and runs, whose Hub is ``hub``."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub, self.folder, self.data = hub, folder, folder / "data"
        folder.mkdir(exist_ok=True)

    @property
    def files(self) -> Path:
        return self.data / "fineweb-edu-6K"

    def start(self, code: str, *arguments: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", PATIENT, code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=ROOT, env=self.environment | environment)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **self.hub.environment(self.folder / "home")}

    def read(self, name: str = NAME, **environment: str) -> subprocess.Popen:
        return self.start(READ, str(self.data), name, **environment)

    def train(self, name: str = NAME, *more: str, **environment: str) -> subprocess.Popen:
        return self.start(TRAIN, *self.arguments(name), *more, **environment)

    def arguments(self, name: str = NAME) -> list[str]:
        return ["--data", name, "--data-root", str(self.data), "--run-root", str(self.folder / "runs"), *OPTIONS]

    @property
    def run(self) -> Path:
        return next((self.folder / "runs").glob("x_*"))

    def rows(self, kind: str) -> list[dict[str, Any]]:
        if not (self.folder / "runs").exists() or not list((self.folder / "runs").glob("x_*/train.jsonl")):
            return []
        return [row for row in read_json_lines(self.run / "train.jsonl") if row["type"] == kind]

    def losses(self) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in self.rows("train")}

    def wait_for_step(self, step: int, process: subprocess.Popen) -> None:
        deadline = time.monotonic() + 300
        while step not in self.losses():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, out + err
    return out, err


def read_until(stream: IO[str], text: str) -> str:
    """The lines of a process's output up to the one with ``text`` in it."""
    lines = []
    for line in stream:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"{text!r} is not in: {''.join(lines)}")
