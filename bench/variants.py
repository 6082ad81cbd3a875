#!/usr/bin/env python3
"""Train every attention variant at the 1B shape for some steps, and compare losses, speed and memory.

    python3 bench/variants.py --data books.npy --out bench/results/variants_h200.json
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from runs import figures, launch, save

from oneb.bench.meter import Meter
from oneb.bench.results import table

VARIANTS = ("baseline", "gqa", "gqa_kv2", "bottleneck", "decoupled")
COLUMNS = {
    "variant": "", "parameters": ",", "kv_bytes_per_token": ",", "train_loss": ".3f", "val_loss": ".3f",
    "tok_s": ",.0f", "mfu": ".1%", "memory_gib": ".1f", "first_step_s": ".1f", "clock_mhz": ".0f", "watts": ".0f",
    "tokens_per_joule": ".1f", "skipped": "", "recompiles": "",
}


def main() -> int:
    """Run and print; 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--grad-accum", type=int, default=4)
    parser.add_argument("--run-root", type=Path, default=Path("/tmp/oneb_bench"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("extra", nargs="*", help="further options for the launcher, after --")
    args = parser.parse_args()
    results, failed = [], False
    for variant in args.variants:
        words = ["--data", args.data, "--variant", variant, "--train-seq-len", str(args.seq_len),
                 "--batch-size", str(args.batch_size), "--grad-accum", str(args.grad_accum), "--steps", str(args.steps),
                 "--warmup-steps", str(max(1, args.steps // 10)), "--eval-every", str(max(1, args.steps // 2)),
                 "--log-every", "5", "--run-root", str(args.run_root), "--no-save-optim", *args.extra]
        log = args.run_root / f"{variant}.log"
        shutil.rmtree(args.run_root / f"oneb_{variant}_seed1337", ignore_errors=True)
        meter = Meter()
        with meter.running():
            code, began = launch(words, log)
        if code:
            failed = True
            print(f"{variant}: exit code {code}\n" + "\n".join(log.read_text().splitlines()[-30:]), flush=True)
            continue
        run = args.run_root / f"oneb_{variant}_seed1337"
        results.append({"options": words, **figures(run, began, meter)})
        save(args.out, results)
        print(table(results[-1:], COLUMNS), flush=True)
        for checkpoint in run.glob("*.pt"):
            checkpoint.unlink()
    print("\n" + table(results, COLUMNS))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
