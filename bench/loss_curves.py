#!/usr/bin/env python3
"""Train the same run several ways, and compare their losses.

    python3 bench/loss_curves.py --data books.npy --out fp8_loss.json --each "--precision bf16" "--precision fp8" \
      -- --size 1b --steps 160 --lr 1e-4
    python3 bench/loss_curves.py --show fp8_loss.json --plot fp8_loss.png
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from runs import launch, save  # also puts the repository on the path

from oneb.files import read_json_lines


def main() -> int:
    """Run, print and draw; 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run-root", type=Path, default=Path("/tmp/oneb_bench"))
    parser.add_argument("--show", type=Path, help="run nothing: print and draw these results")
    parser.add_argument("--plot", type=Path, help="a PNG of the curves")
    parser.add_argument("--each", nargs="+", default=(), help="what tells the runs apart: launcher options, quoted")
    parser.add_argument("extra", nargs="*", help="what they share: options for the launcher, after --")
    args = parser.parse_args()
    if args.show:
        rows = json.loads(args.show.read_text())["rows"]
    elif args.data and args.out and args.each:
        rows = [run(args, options) for options in args.each]
        save(args.out, rows)
    else:
        parser.error("give --data, --out and --each, or --show")
    for row in rows:
        print(f"{row['name']:32s}", "failed" if row["val_loss"] is None else
              "  ".join(f"step {step}: {loss:.4f}" for step, loss in row["val_loss"].items()))
    if args.plot:
        plot(rows, args.plot)
    return int(any(row["val_loss"] is None for row in rows))


def run(args: argparse.Namespace, options: str) -> dict[str, Any]:
    """One run's losses by step."""
    tag = re.sub(r"\W+", "_", f"loss {options}").strip("_")
    words = ["--data", args.data, "--tag", tag, "--run-root", str(args.run_root), "--if-exists", "error",
             "--log-every", "1", "--no-save-optim", *args.extra, *shlex.split(options)]
    code, _ = launch(words, args.run_root / f"{tag}.log")
    if code:
        return {"name": options, "options": words, "val_loss": None, "train_loss": []}
    (directory,) = args.run_root.glob(f"{tag}_*_seed*")
    rows = read_json_lines(directory / "train.jsonl")
    return {
        "name": options, "options": words,
        "val_loss": {row["step"]: row["val_loss"] for row in rows if row["type"] == "eval"},
        "train_loss": [[row["step"], row["loss"]] for row in rows if row["type"] == "train"],
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Training curves with the validation losses on them; runs of one size (the name's first word) share a panel."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["train_loss"]]
    sizes = [row["name"].split()[0] for row in rows if not row["name"].startswith("-")]
    groups = list(dict.fromkeys(sizes)) or [""]
    figure, panels = plt.subplots(1, len(groups), figsize=(6 * len(groups), 4.2), squeeze=False, layout="constrained")
    for group, panel in zip(groups, panels[0], strict=True):
        for row in rows:
            if group and row["name"].split()[0] != group:
                continue
            steps, losses = zip(*row["train_loss"], strict=True)
            (line,) = panel.plot(steps, losses, linewidth=0.9, alpha=0.8, label=row["name"])
            points = {int(step): loss for step, loss in row["val_loss"].items()}
            panel.plot(points.keys(), points.values(), "o", markersize=5, color=line.get_color())
        panel.set(xlabel="optimizer step", ylabel="loss (nats a token); dots: validation", ylim=(None, 7.5))
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
