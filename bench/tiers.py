#!/usr/bin/env python3
"""What the launcher chooses by itself on cards of less memory, how much that really takes, and how fast it is.

    python3 bench/tiers.py --data books.npy --out bench/results/tiers_h200.json
    python3 bench/tiers.py --show bench/results/tiers_h200.json

Smaller cards are imitated by --vram-limit-gib, the CUDA context included; the arithmetic stays as fast as this card's.
All rows of a variant and a length train on the same batches, so their losses tell whether the choices change the run.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from memory import steps

from oneb.bench import results
from oneb.errors import OnebError
from oneb.presets import resolve

CAPS = (None, 80, 48, 40, 24, 16, 12, 8)
LONG_CAPS = (None, 80, 48, 40, 24)  # 8192 tokens


def main() -> int:
    """Measure or show; 1 if a row ended above its cap."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data")
    add("--size", default="1b")
    add("--variants", nargs="+", default=("baseline", "decoupled"))
    add("--out", type=Path)
    add("--commit")
    add("--show", nargs="+", type=Path)
    args = parser.parse_args()
    if args.show:
        rows = [row for path in args.show for row in json.loads(path.read_text())["rows"]]
    elif args.data and args.out:
        rows = [measure(args, variant, seq_len, cap) for variant in args.variants
                for seq_len, caps in ((2048, CAPS), (8192, LONG_CAPS)) for cap in caps]
        results.save(args.out, rows, command="python3 " + " ".join(sys.argv), commit=args.commit,
                     gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    else:
        parser.error("give --data and --out, or --show")
    return show(rows)


def measure(args: argparse.Namespace, variant: str, seq_len: int, cap: int | None) -> dict[str, Any]:
    """Three steps as the launcher's defaults have them, with a cap on memory."""
    torch.cuda.reset_peak_memory_stats()
    row = {"variant": variant, "seq_len": seq_len, "cap_gib": cap, "error": None}
    given = {"vram_limit_gib": float(cap)} if cap else {}
    try:
        row |= steps(resolve({"path": args.data, "size": args.size, "variant": variant, "train_seq_len": seq_len,
                              "max_seq_len": max(2048, seq_len), **given}))
    except (OnebError, torch.OutOfMemoryError) as error:
        row["error"] = str(error).splitlines()[0]
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)
    print(json.dumps(row), flush=True)
    return row


def show(rows: list[dict[str, Any]]) -> int:
    """A line a row, as Markdown."""
    print("| variant, tokens | cap GiB | optimizer | chosen | peak GiB | tok/s | of the uncapped | losses of 3 steps |")
    print("|---|---|---|---|---|---|---|---|")
    whole: dict[tuple[str, int], float] = {}
    over = 0
    for row in rows:
        name, cap = f"{row['variant']}, {row['seq_len']}", row["cap_gib"] or "-"
        if row["error"]:
            print(f"| {name} | {cap} | {row['error']} |")
            over += 1
            continue
        uncapped = whole.setdefault((row["variant"], row["seq_len"]), row["tok_s"])
        losses = " ".join(f"{loss:.4f}" for loss in row["losses"])
        print(f"| {name} | {cap} | {row['optimizer']} | {row['chosen']} | {row['process_gib']:.2f} | "
              f"{row['tok_s'] / 1e3:.1f}k | {row['tok_s'] / uncapped:.0%} | {losses} |")
        over += bool(row["cap_gib"]) and row["process_gib"] > row["cap_gib"]
    return int(over > 0)


if __name__ == "__main__":
    sys.exit(main())
