#!/usr/bin/env python3
"""Run every launcher line of a guide for 20 steps, on the data given instead of its own.

    python3 bench/guide.py docs/LAUNCH_1B.md --data books.npy --out bench/results/guide_h200.json

Lines keep every option of theirs but the data and the length: ``--steps 20``, or as many tokens where the line asks
for tokens. A line that resumes gets a run of 10 steps to continue. Lines whose schedule grows are run once more with
the growth moved into the 20 steps (marked "compressed"). Lines that only plan or rehearse are left out, and nothing is
rehearsed.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from runs import figures, launch, save

from oneb.bench.results import table

STEPS = 20
COLUMNS = {"line": "", "status": "", "steps": "", "first_loss": ".2f", "train_loss": ".2f", "val_loss": ".2f",
           "tok_s": ",.0f", "memory_gib": ".1f", "first_step_s": ".1f", "recompiles": "", "options": ""}


def lines_of(guide: Path) -> list[list[str]]:
    """The launcher's options of each command in the guide's code blocks, without repeats."""
    text = re.sub(r"\\+\n", " ", guide.read_text(encoding="utf-8"))
    found = re.findall(r"^[ !]*python\w* run_1b_launch\.py (.*)$", text, flags=re.MULTILINE)
    lines = [shlex.split(line, comments=True) for line in found]
    runs = [line for line in lines if not {"--gpu", "--rehearse", "--budget"} & {*line}]
    return [list(words) for words in dict.fromkeys(tuple(w for w in line if w != "--run") for line in runs)]


def shortened(words: list[str], data: str, root: Path) -> list[str]:
    """The line for 20 steps on other data, writing below ``root``."""
    words = list(words) if "--data" in words else [*words, "--data", ""]
    words[words.index("--data") + 1] = data
    if "--ckpt" in words:
        at = words.index("--ckpt") + 1
        words[at] = str(root / Path(words[at]).relative_to("runs"))
    if "--target-tokens" in words:
        schedule = words[words.index("--seq-schedule") + 1] if "--seq-schedule" in words else "1024@0"
        words[words.index("--target-tokens") + 1] = str(STEPS * 16 * int(schedule.split("@")[0]))
    else:
        words += ["--steps", str(STEPS)]
    if "--save-to" in words:
        place = root / "copies"
        place.mkdir(parents=True)
        words[words.index("--save-to") + 1] = str(place)
    if "--wandb" in words:
        words += ["--wandb-mode", "offline"]
    return [*words, "--run-root", str(root), "--log-every", "5"]


def compressed(words: list[str]) -> list[str] | None:
    """The same line with all phases of its schedule inside 20 steps, or None if it has but one."""
    if "--seq-schedule" not in words:
        return None
    at = words.index("--seq-schedule") + 1
    lengths = [entry.split("@")[0] for entry in words[at].split(",")]
    starts = [STEPS * i // len(lengths) for i in range(len(lengths))]
    words = [*words[:at], ",".join(f"{n}@{s}" for n, s in zip(lengths, starts, strict=True)), *words[at + 1:]]
    if "--target-tokens" in words:
        cut = words.index("--target-tokens")
        words = [*words[:cut], *words[cut + 2:], "--steps", str(STEPS)]
    return words


def run_line(name: str, words: list[str], root: Path) -> dict[str, Any]:
    """Run one line; returns its figures or how it failed."""
    if "--resume" in words:
        first = [word for word in words if word not in ("--resume",)]
        at = first.index("--ckpt")
        first = [*first[:at], *first[at + 2:]]
        first[first.index("--steps") + 1] = str(STEPS // 2)
        launch(first, root / "first.log")
        words = [*words, "--allow-change"]  # its cosine ended with its fewer steps
    code, began = launch(words, root / "log")
    shown = {"line": name, "options": shlex.join(words)}
    runs = [path.parent for path in root.glob("*/train.jsonl")]
    if code or len(runs) != 1:
        print(f"{name}: exit code {code}\n" + "\n".join((root / "log").read_text().splitlines()[-25:]), flush=True)
        return {**shown, "status": f"exit {code}"}
    result = {**shown, "status": "ok", **figures(runs[0], began)}
    shutil.rmtree(root)
    print(f"{name}: ok", flush=True)
    return result


def main() -> int:
    """Run and print; 1 if a line failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("guide", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--jobs", type=int, default=1, help="lines at once on the one GPU (speeds then mean little)")
    parser.add_argument("--run-root", type=Path, default=Path("/tmp/oneb_guide"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    shutil.rmtree(args.run_root, ignore_errors=True)
    tasks = []
    for number, line in enumerate(lines_of(args.guide), 1):
        root = args.run_root / str(number)
        words = shortened(line, args.data, root)
        tasks.append((str(number), words, root))
        if denser := compressed(words):
            root = args.run_root / f"{number}c"
            denser[denser.index("--run-root") + 1] = str(root)
            tasks.append((f"{number} compressed", denser, root))
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda task: run_line(*task), tasks))
    save(args.out, results)
    print(table(results, COLUMNS))
    return int(any(result["status"] != "ok" for result in results))


if __name__ == "__main__":
    sys.exit(main())
