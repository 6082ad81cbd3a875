#!/usr/bin/env python3
"""The same run by several ways through memory: their losses must agree.

    python3 bench/same_run.py --data books.npy --out bench/results/same_run_h200.json

As the launcher chooses; one sequence at a time; everything recomputed; and with the memory suddenly gone before a step,
as if another process had taken it.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

import torch
from memory import steps

from oneb.bench import results
from oneb.presets import resolve

STEPS = 12
GONE_BEFORE_STEP, LEFT_GIB = 6, 20
WAYS: dict[str, dict[str, Any]] = {
    "as chosen": {}, "as chosen, again": {}, "1 x 16": {"batch_size": 1, "grad_accum": 16},
    "all recomputed": {"grad_checkpoint": "all"}, f"memory gone before step {GONE_BEFORE_STEP}": {},
}


def main() -> int:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--size", default="1b")
    parser.add_argument("--variant", default="decoupled")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit")
    args = parser.parse_args()
    rows = []
    for name, given in WAYS.items():
        config = resolve({"path": args.data, "size": args.size, "variant": args.variant, "train_seq_len": 2048,
                          "steps": 100, "lr": 1e-4, "warmup_steps": 50, **given})
        row = {"way": name, "variant": args.variant, **steps(config, STEPS, take_memory if "gone" in name else none)}
        torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        torch.cuda.empty_cache()
        rows.append(row)
        drift = max(abs(a / b - 1) for a, b in zip(row["losses"], rows[0]["losses"], strict=True))
        print(f"{name:28} {row['chosen']:45} at most {drift:.1e} apart: "
              f"{' '.join(f'{loss:.4f}' for loss in row['losses'])}", flush=True)
    results.save(args.out, rows, command="python3 " + " ".join(sys.argv), commit=args.commit,
                 gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    return 0


def none(_: int) -> None:
    """Nothing happens."""


def take_memory(step: int) -> None:
    """From here on the process may have so much and no more."""
    if step == GONE_BEFORE_STEP:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(LEFT_GIB * 2**30 / torch.cuda.mem_get_info()[1])


if __name__ == "__main__":
    sys.exit(main())
