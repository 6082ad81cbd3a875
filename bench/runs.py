"""Real runs through the launcher, measured from what they write: shared by the scripts of this folder."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from oneb.files import read_json_lines  # noqa: E402


def launch(words: list[str], log: Path) -> tuple[int, float]:
    """Run ``run_1b_launch.py`` with ``words``, its output into ``log``; returns (exit code, start as unix time)."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with open(log, "w") as output:
        command = [sys.executable, "run_1b_launch.py", *words]
        code = subprocess.run(command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT).returncode
    return code, began


class Meter:
    """Clock (MHz) and power (W) of the first GPU, twice a second, by nvidia-smi."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float, float]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[Meter]:
        """Sample while the body runs; without nvidia-smi there are no samples."""
        query = ["nvidia-smi", "-i", "0", "-lms", "500", "--query-gpu=clocks.sm,power.draw",
                 "--format=csv,noheader,nounits"]
        try:
            process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
        except FileNotFoundError:
            yield self
            return
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        try:
            yield self
        finally:
            process.terminate()
            reader.join()

    def _read(self, process: subprocess.Popen) -> None:
        for line in process.stdout:
            clock, watts = (float(part) for part in line.split(","))
            self.samples.append((time.time(), clock, watts))

    def between(self, start: float, end: float) -> dict[str, float | None]:
        """Median clock and power of the samples from ``start`` to ``end`` (unix times)."""
        inside = [sample for sample in self.samples if start <= sample[0] <= end]
        if not inside:
            return {"clock_mhz": None, "watts": None}
        return {"clock_mhz": statistics.median(s[1] for s in inside), "watts": statistics.median(s[2] for s in inside)}


def figures(run_directory: Path, began: float, meter: Meter | None = None) -> dict[str, Any]:
    """What a finished run reached, from its ``train.jsonl``."""
    rows = read_json_lines(run_directory / "train.jsonl")
    of_type = {kind: [row for row in rows if row["type"] == kind] for kind in ("meta", "train", "eval", "event")}
    meta, train, evals = of_type["meta"][0], of_type["train"], of_type["eval"]
    first = next(row for row in of_type["event"] if row["event"] == "first_step")
    timed = [row for row in train if row["tok_s"]]
    tail = [row["loss"] for row in train[-5:]]
    found = {
        "variant": meta["variant"], "parameters": meta["parameters"], "kv_bytes_per_token": meta["kv_bytes_per_token"],
        "steps": train[-1]["step"], "tokens": train[-1]["tokens"],
        "first_loss": train[0]["loss"], "train_loss": statistics.mean(tail), "train_loss_rows": len(tail),
        "val_loss": evals[-1]["val_loss"] if evals else None,
        "val_losses": {row["step"]: row["val_loss"] for row in evals},
        "tok_s": statistics.median(row["tok_s"] for row in timed) if timed else None,
        "mfu": statistics.median(row["mfu"] for row in timed) if timed and timed[0]["mfu"] else None,
        "data_ms": statistics.median(row["data_ms"] for row in timed) if timed else None,
        "memory_gib": train[-1]["memory_gib"], "skipped": train[-1]["skipped"],
        "first_step_s": first["since_start_s"],
        "recompiles": sum(row["event"] == "recompile" for row in of_type["event"]),
        "attention": meta["attention_backend"], "gpu": meta["device"], "torch": meta["torch"],
    }
    if meter:
        found |= meter.between(began + first["since_start_s"], began + train[-1]["elapsed_s"])
        if found["watts"] and found["tok_s"]:
            found["tokens_per_joule"] = found["tok_s"] / found["watts"]
    return found


def commit() -> str:
    """The checkout's commit, or "unknown" outside git."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def save(path: Path, results: list[dict[str, Any]]) -> None:
    """Store results with the command that made them and the commit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"command": "python3 " + " ".join(sys.argv), "commit": commit(), "results": results}
    path.write_text(json.dumps(record, indent=1) + "\n")


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows as aligned text; ``columns`` maps a key to its format, None shows as a dash."""
    cells = [list(columns)]
    for row in rows:
        cells.append(["-" if row.get(key) is None else format(row[key], spec) for key, spec in columns.items()])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
