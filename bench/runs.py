"""Real runs through the launcher, measured from what they write: shared by the scripts of this folder."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from oneb.bench import results  # noqa: E402
from oneb.bench.meter import Meter, with_energy  # noqa: E402
from oneb.files import read_json_lines  # noqa: E402


def launch(words: list[str], log: Path) -> tuple[int, float]:
    """Start the run of ``words`` by ``run_1b_launch.py``, without a rehearsal, its output into ``log``.

    Returns:
        (exit code, start as unix time).
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with open(log, "w") as output:
        command = [sys.executable, "run_1b_launch.py", *words, "--run", "--no-rehearse"]
        code = subprocess.run(command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT).returncode
    return code, began


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
        window = meter.between(began + first["since_start_s"], began + train[-1]["elapsed_s"])
        found |= with_energy(window, found["tok_s"])
    return found


def save(path: Path, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Store rows with the command that made them, the commit, the date, and what else is to be said of all of them."""
    results.save(path, rows, command="python3 " + " ".join(sys.argv), **facts)
