"""Checkpoints of known content, and processes that copy one after the other and are killed."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from oneb.checkpoints import mirror, place
from oneb.checkpoints.rundir import read_sidecar

MB = 2**20
PART = 5 * MB  # the smallest that S3 takes
PATIENCE_S = 120.0  # no step of a test takes so long that does not hang


def save(directory: Path, step: int, n_bytes: int = 100_000, serial: int | None = None, seed: int = 0) -> bytes:
    """``last.pt`` in the run directory, as the saver leaves it: a new file under the name, the sidecar last."""
    content = random.Random(f"{step} {seed}").randbytes(n_bytes)
    directory.mkdir(parents=True, exist_ok=True)
    last, sidecar = directory / "last.pt", directory / "last.pt.json"
    sidecar.unlink(missing_ok=True)
    (directory / "new").write_bytes(content)
    os.replace(directory / "new", last)
    sidecar.write_text(json.dumps({
        "step": step, "tokens": 8 * step, "best_val_loss": None, "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": n_bytes, "model": {"width": 8}, "optimizer": "lion", "serial": step if serial is None else serial}))
    return content


def content(step: int, n_bytes: int) -> bytes:
    """What :func:`save` writes."""
    return random.Random(f"{step} 0").randbytes(n_bytes)


def copy_for_ever(where: str, run: Path, step: int, n_bytes: int) -> None:
    """Save and copy, save and copy; each step is printed once it is verified."""
    place.BLOCK_BYTES = mirror.BLOCK_BYTES = PART
    one = mirror.Mirror(where, run, say=print)
    while True:
        save(run, step, n_bytes)
        one.submit(run / "last.pt")
        while one.verified_step != step:
            time.sleep(0.001)
            assert all(event.name == "verified" for event in one.poll())
        print(step, flush=True)
        step += 1


def names(events) -> list[tuple[int, str]]:
    return [(event.step, event.name) for event in events]


def until(condition, seconds: float = PATIENCE_S):
    """What ``condition()`` gives once it is true."""
    limit = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < limit, "it never came"
        time.sleep(0.01)
    return value


def copied(mirrors, where: str, run: Path, *steps: int) -> dict[int, bytes]:
    one = mirrors(where, run)
    contents = {}
    for step in steps:
        contents[step] = save(run, step)
        one.submit(run / "last.pt")
        assert one.finish(PATIENCE_S), one.poll()
    one.close()
    return contents


def killed_while_copying(where: str, tmp_path: Path, kills: int, n_bytes: int, longest_s: float, seed: int) -> int:
    """Processes that copy one checkpoint after the other, each killed at a random moment and followed by the next.

    After each kill the place must give a checkpoint no older than the last that was reported as verified, bitwise.
    Returns the number of kills that left something half done.
    """
    rng, run, start, torn = random.Random(seed), tmp_path / "run", 1, 0
    for kill in range(kills):
        process = subprocess.Popen(
            [sys.executable, __file__, where, run, str(start), str(n_bytes)],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
        reported = int(process.stdout.readline() or 0)
        time.sleep(rng.uniform(0, longest_s))
        process.send_signal(signal.SIGKILL)
        reported = int(([str(reported), *process.stdout.read().split()])[-1])
        process.wait()
        assert reported >= start
        fetched = tmp_path / f"machine{kill}" / "run"
        assert mirror.fetch_newest(where, fetched, print)
        step = read_sidecar(fetched / "last.pt")["step"]
        assert reported <= step <= reported + 1
        assert (fetched / "last.pt").read_bytes() == content(step, n_bytes)
        torn += read_sidecar(fetched / "last.pt")["step"] == reported
        start = step + 1
    return torn


if __name__ == "__main__":
    copy_for_ever(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
