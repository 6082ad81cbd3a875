#!/usr/bin/env python3
"""What a kill -9, a SIGTERM and a save cost a run, and whether it is then the run that never stopped, bit for bit.

    python3 bench/interruptions.py --out bench/results/interruptions_h200.json -- \\
        --data books.npy --variant baseline --train-seq-len 2048 --deterministic

One run is left alone. The other is killed, resumed, asked to stop, and resumed again; all by the same command.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from runs import REPOSITORY, save

from oneb.bench.results import table
from oneb.files import read_json_lines
from oneb.units import GIB

# The second save is under way when the run is asked to stop: as long as that can take.
STEPS, SAVE_EVERY, KILL_AT, STOP_AT = 80, 25, 47, 58
COLUMNS = {"figure": "", "value": ".6g", "unit": ""}


class Run:
    """One run directory, and the processes that train in it one after another."""

    def __init__(self, root: Path, options: list[str]) -> None:
        self.root = root
        self.words = [*options, "--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--keep-last", "1",
                      "--log-every", "1", "--eval-every", "0", "--warmup-steps", "5", "--run-root", str(root),
                      "--if-exists", "resume", "--run", "--no-rehearse"]
        self.starts: list[float] = []  # time.monotonic

    def start(self) -> subprocess.Popen:
        """Begin or continue."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.starts.append(time.monotonic())
        with open(self.root / f"{len(self.starts)}.log", "w") as log:
            return subprocess.Popen([sys.executable, "run_1b_launch.py", *self.words], cwd=REPOSITORY, stdout=log,
                                    stderr=subprocess.STDOUT)

    def ended(self, process: subprocess.Popen, wanted: int) -> None:
        """Wait for the end; anything but ``wanted`` as exit code ends the measurement."""
        if (code := process.wait()) != wanted:
            log = (self.root / f"{len(self.starts)}.log").read_text().splitlines()[-25:]
            raise SystemExit(f"exit code {code}, wanted {wanted}\n" + "\n".join(log))

    @property
    def directory(self) -> Path | None:
        """The run directory, once it is there."""
        return next((path.parent for path in self.root.glob("*/train.jsonl")), None)

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Rows of ``train.jsonl``."""
        if self.directory is None:
            return []
        return [row for row in read_json_lines(self.directory / "train.jsonl") if row["type"] == kind]

    def wait_for(self, process: subprocess.Popen, step: int) -> None:
        """Wait until ``step`` is logged."""
        while max((row["step"] for row in self.rows("train")), default=0) < step:
            if process.poll() is not None:
                self.ended(process, -1)
            time.sleep(0.05)


def measure(root: Path, options: list[str]) -> list[dict[str, Any]]:
    """Both runs; what was found."""
    found: list[dict[str, Any]] = []

    def note(figure: str, value: float, unit: str = "s", **details: Any) -> None:
        found.append({"figure": figure, "value": value, "unit": unit, **details})

    whole, cut = Run(root / "whole", options), Run(root / "cut", options)
    whole.ended(whole.start(), 0)
    _note_saves(whole, note)

    process = cut.start()
    cut.wait_for(process, KILL_AT)
    if not any(row["event"] == "checkpoint" for row in cut.rows("event")):
        raise SystemExit(f"nothing was saved by step {KILL_AT}: this disk is too slow for so short a run")
    process.kill()
    cut.ended(process, -signal.SIGKILL)
    lost = cut.rows("train")[-1]["step"]
    process = cut.start()
    cut.wait_for(process, lost + 1)
    resumed = [row for row in cut.rows("event") if row["event"] == "resume"][-1]["step"]
    note("steps lost by kill -9", lost - resumed, "steps", save_every=SAVE_EVERY)
    first = [row for row in cut.rows("event") if row["event"] == "first_step"][-1]
    note("from the command to the first resumed step", first["since_start_s"], first_step_s=first["seconds"])
    cut.wait_for(process, STOP_AT)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    cut.ended(process, 128 + signal.SIGTERM)
    note("from SIGTERM to the exit", time.monotonic() - began)
    cut.ended(cut.start(), 0)
    resumed = [row for row in cut.rows("event") if row["event"] == "resume"][-1]["step"]
    note("step after SIGTERM", resumed, "steps")
    _compare(whole, cut, note)
    return found


def _note_saves(run: Run, note: Any) -> None:
    """What saving in the background cost the steps beside it."""
    saves = [row for row in run.rows("event") if row["event"] == "checkpoint"]
    took = {row["step"]: row["step_ms"] / 1e3 for row in run.rows("train") if row["step_ms"]}
    usual = statistics.median(took.values())
    note("a step", usual)
    note("a checkpoint", saves[0]["bytes"] / GIB, "GiB")
    for row in saves[:-1]:  # the last one is waited for
        beside = [step for step in took if row["step"] < step <= row["step"] + -(-row["seconds"] // usual) + 1]
        note(f"save after step {row['step']}: written in", row["seconds"])
        note(f"save after step {row['step']}: steps waited for the copy", row["waited_s"])
        note(f"save after step {row['step']}: all that steps took longer", sum(took[s] - usual for s in beside),
             steps=len(beside))


def _compare(whole: Run, cut: Run, note: Any) -> None:
    import torch

    losses = [{row["step"]: row["loss"] for row in run.rows("train")} for run in (whole, cut)]
    states = [torch.load(run.directory / "last.pt", map_location="cpu", weights_only=True, mmap=True)
              for run in (whole, cut)]
    note("losses that differ", sum(losses[0][step] != losses[1].get(step) for step in losses[0]), "steps",
         largest=max(abs(losses[0][step] - losses[1][step]) for step in losses[0]), of=len(losses[0]))
    a, b = (state["model"] for state in states)
    note("weights that differ", sum(not torch.equal(a[name], b[name]) for name in a), "tensors", of=len(a))
    a, b = (state["optimizer"]["state"] for state in states)
    note("optimizer state that differs",
         sum(not torch.equal(a[name][key], b[name][key]) for name in a for key in a[name]), "tensors", of=len(a))


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-root", type=Path, default=Path("/tmp/oneb_interruptions"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("options", nargs="+", help="options of the run, after --")
    args = parser.parse_args()
    shutil.rmtree(args.run_root, ignore_errors=True)
    found = measure(args.run_root, args.options)
    meta = Run(args.run_root / "whole", []).rows("meta")[0]
    shutil.rmtree(args.run_root)
    save(args.out, found, gpu=meta["device"], torch=meta["torch"], options=args.options)
    print(table(found, COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
