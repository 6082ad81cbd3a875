#!/usr/bin/env python3
"""Is a resumed run the run that never stopped, bit for bit, on this GPU? And are two equal runs equal?

    python3 bench/resume.py --out bench/results/resume_h200.json -- --data books.npy --size medium --variant gqa
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from runs import launch, save

from oneb.bench.results import table
from oneb.files import read_json_lines

COLUMNS = {"compared": "", "steps": "", "losses": "", "weights": "", "largest_loss_difference": ".2e"}


def main() -> int:
    """Run and print; 1 if anything differs."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--run-root", type=Path, default=Path("/tmp/oneb_resume"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("options", nargs="+", help="options of the run, after --")
    args = parser.parse_args()
    shutil.rmtree(args.run_root, ignore_errors=True)

    def trained(name: str, *lengths: int) -> Path:
        for number, steps in enumerate(lengths):
            words = [*args.options, "--steps", str(steps), "--log-every", "1", "--eval-every", "0",
                     "--warmup-steps", "1", "--lr-schedule", "constant", "--run-root", str(args.run_root / name)]
            log = args.run_root / f"{name}{number}.log"
            code, _ = launch([*words, *(["--resume"] if number else [])], log)
            if code:
                raise SystemExit(f"{name}: exit code {code}\n" + "\n".join(log.read_text().splitlines()[-25:]))
        return next((args.run_root / name).glob("*/train.jsonl")).parent

    def losses(run: Path) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in read_json_lines(run / "train.jsonl") if row["type"] == "train"}

    def weights(run: Path) -> dict[str, torch.Tensor]:
        return torch.load(run / "last.pt", map_location="cpu", weights_only=True, mmap=True)["model"]

    whole = trained("whole", args.steps)
    results = []
    for name, other in (("same run again", trained("again", args.steps)),
                        ("stopped halfway and resumed", trained("cut", args.steps // 2, args.steps))):
        a, b, wa, wb = losses(whole), losses(other), weights(whole), weights(other)
        results.append({
            "compared": name, "steps": len(a), "losses": "equal" if a == b else "DIFFER",
            "weights": "equal" if all(torch.equal(wa[key], wb[key]) for key in wa) else "DIFFER",
            "largest_loss_difference": max(abs(a[step] - b[step]) for step in a), "options": args.options,
        })
    shutil.rmtree(args.run_root)
    save(args.out, results)
    print(table(results, COLUMNS))
    return int(any("DIFFER" in (result["losses"], result["weights"]) for result in results))


if __name__ == "__main__":
    sys.exit(main())
