"""``oneb bench``: how fast a step is, where its time goes, and how fast it could be.

The parent, which imports no torch, starts a process for each row, so that nothing of one is left for the next.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oneb.bench import results
from oneb.bench.parent import RANDOM_TOKENS, Parent
from oneb.bench.points import (
    GROWTH_BATCH_SIZES,
    GROWTH_LENGTH,
    GROWTH_LENGTHS,
    OWN_OPTIONS,
    Point,
    Settings,
    grid,
)
from oneb.bench.results import Row
from oneb.cli.guard import reports_mistakes
from oneb.cli.launch import find_interpreter
from oneb.cli.options import OptionParser, add_config_options, argument, count
from oneb.config import DEMO_DATA, PRECISIONS, VARIANTS, TrainConfig, whole_or_auto
from oneb.errors import OnebError
from oneb.inspect.growth import write_growth
from oneb.presets import DEFAULT_SIZE, SIZES

_ALL_VARIANTS = ("baseline", "gqa", "gqa_kv2", "bottleneck", "decoupled")
_EPILOG = """\
examples:
  oneb bench --out results.json                                          every variant, 2048 tokens, bf16
  oneb bench --variants baseline decoupled --lengths 2048 8192 --precisions bf16 fp8 --out results.json
  oneb bench --grow --variants baseline decoupled --gpus 0,1 --out growth.json
  oneb bench --grow length --variants decoupled --precisions fp8 --out growth_fp8.json
  oneb bench --show growth.json growth_fp8.json --plots pictures         several files, one picture an axis
  oneb bench --show results.json --markdown
  oneb bench --out results.json -- --optimizer adamw --grad-checkpoint     further options of the launcher
"""
# A point of --grow is one of a dozen in its process; its ceilings are measured for a shorter time.
_GROW_CEILING_S = 0.1



def build_parser() -> argparse.ArgumentParser:
    """The options of ``oneb bench``."""
    parser = OptionParser(
        prog="oneb bench", usage="oneb bench [options] --out FILE [-- launcher options]", allow_abbrev=False,
        description="Measure real training steps, where their time goes, and what the hardware could do at best.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--variants", nargs="+", choices=VARIANTS, default=_ALL_VARIANTS, help="attention variants (default: all)")
    add("--lengths", nargs="+", type=_positive, default=(2048,), metavar="TOKENS", help="sequence lengths (2048)")
    add("--precisions", nargs="+", choices=PRECISIONS, default=("bf16",), help="arithmetic (bf16)")
    add("--batch-size", nargs="+", type=argument(whole_or_auto), default=(None,), metavar="N",
        help="sequences a micro-batch; auto (the default): as a run chooses it, to fit and to be fast")
    add("--batch-tokens", type=count, default=Settings.batch_tokens, metavar="COUNT",
        help="tokens an optimizer step, by accumulation (65536)")
    add("--size", choices=tuple(SIZES), default=DEFAULT_SIZE, help=f"shape preset ({DEFAULT_SIZE})")
    add("--null-attn", action="store_true", help="with a null key and value")
    add("--device", choices=TrainConfig.__dataclass_fields__["device"].metadata["choices"], default="cuda",
        help="where to train (cuda)")
    add("--data", metavar="DATA", help="token file (default: one of random tokens, written for this bench)")
    add("--steps", type=_positive, default=Settings.steps, help="timed steps (20)")
    add("--warmup", type=_positive, default=Settings.warmup, help="steps before them (5)")
    add("--ceiling-seconds", type=float, metavar="S", help="how long each ceiling is measured; 0: not (0.3)")
    add("--no-profile", action="store_true", help="no breakdown by kernels")
    add("--grow", nargs="?", const="both", choices=("length", "batch", "both"), help="length: "
        f"{GROWTH_LENGTHS[0]} to {GROWTH_LENGTHS[-1]} tokens; batch: micro-batches {GROWTH_BATCH_SIZES[0]} to "
        f"{GROWTH_BATCH_SIZES[-1]} at {GROWTH_LENGTH}; both if neither is named; several points share a process")
    add("--gpus", metavar="LIST", help="one child at a time on each of these, as CUDA_VISIBLE_DEVICES has them: 0,1")
    add("--timeout", type=float, default=900.0, metavar="S", help="longest time of a child (900)")
    add("--commit", help="what was measured, where there is no git")
    add("--out", type=Path, metavar="FILE", help="results, as JSON")
    add("--plots", type=Path, metavar="FOLDER", help="draw growth plots there (--grow: beside --out)")
    add("--show", nargs="+", type=Path, metavar="FILE", help="measure nothing: print these results")
    add("--markdown", action="store_true", help="print a Markdown table")
    add("--one", action="store_true", help=argparse.SUPPRESS)  # a child: measures all it is asked for in this process
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


@reports_mistakes
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or show; returns the exit code: 0, 1 if a row failed, 2 for a user's mistake."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    own, further = words[:cut], words[cut + 1:]
    args = build_parser().parse_args(own)
    if args.show:
        return _show(args)
    if args.out is None:
        raise OnebError("--out says where the results go, and is missing; add --out results.json")
    settings = _settings(args, further)
    tasks = _tasks(args)
    if args.one:
        return _measure(args, [point for task in tasks for point in task], settings, further)
    return _in_children(args, further, settings, tasks)


def _settings(args: argparse.Namespace, further: list[str]) -> Settings:
    parser = OptionParser(prog="oneb bench", allow_abbrev=False)
    add_config_options(parser)
    given = vars(parser.parse_args(further))
    flags = {action.dest: action.option_strings[0] for action in parser._actions}
    for name in given:
        if name in OWN_OPTIONS:
            instead = f"give {OWN_OPTIONS[name]} before the --" if OWN_OPTIONS[name] else "leave it out"
            raise OnebError(f"{flags[name]} is for the bench to decide; {instead}")
    ceiling_s = args.ceiling_seconds
    if ceiling_s is None:
        ceiling_s = _GROW_CEILING_S if args.grow else Settings.ceiling_s
    if args.data and args.data != DEMO_DATA and "*" not in args.data and not Path(args.data).exists():
        raise OnebError(f"--data {args.data} is not there; leave --data out to measure on random tokens")
    return Settings(
        size=args.size, device=args.device, data=args.data or RANDOM_TOKENS, null_attn=args.null_attn,
        batch_tokens=args.batch_tokens, steps=args.steps, warmup=args.warmup,
        profile=not (args.no_profile or args.grow), ceiling_s=ceiling_s, given=given,
    )


def _tasks(args: argparse.Namespace) -> list[list[Point]]:
    if not args.grow:
        return [[point] for point in grid(args.variants, args.lengths, args.precisions, args.batch_size)]
    tasks = []
    for variant in dict.fromkeys(args.variants):
        for precision in dict.fromkeys(args.precisions):
            if args.grow != "batch":
                tasks.append(grid([variant], GROWTH_LENGTHS, [precision], [None]))
            if args.grow != "length":
                tasks.append(grid([variant], [GROWTH_LENGTH], [precision], GROWTH_BATCH_SIZES))
    return tasks


def _in_children(args: argparse.Namespace, further: list[str], settings: Settings, tasks: list[list[Point]]) -> int:
    parent = Parent(
        tasks, settings, out=args.out, command=_command(args, further), commit=args.commit or results.commit(),
        interpreter=find_interpreter(), further=further, timeout_s=args.timeout, random_tokens=args.data is None,
    )
    whole = parent.run(_places(args.gpus))
    if parent.rows:
        print(f"\n{results.report(parent.rows, markdown=args.markdown)}\n\nresults: {args.out}")
        if args.grow or args.plots:
            _draw([results.load(args.out)], args.plots or args.out.parent)
    if not whole:
        print("stopped; what was measured until then is in the results", file=sys.stderr)
        return 130
    return int(any(row["error"] for row in parent.rows))


def _places(gpus: str | None) -> list[dict[str, str]]:
    """The environment of each GPU's children: this process's own, with the package on its path."""
    paths = [str(results.REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if gpus is None:
        return [environment]
    names = [name.strip() for name in gpus.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise OnebError(f"--gpus {gpus!r} is not a list of different GPUs; write them as 0,1")
    return [{**environment, "CUDA_VISIBLE_DEVICES": name} for name in names]


def _measure(args: argparse.Namespace, points: list[Point], settings: Settings, further: list[str]) -> int:
    # As a training process has it: segments that grow in place. Read when torch first allocates.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        import torch  # noqa: F401
    except ImportError:
        raise OnebError(f"{sys.executable} has no PyTorch; `bash quickstart.sh` sets everything up, or install the "
                        "build for your machine") from None
    from oneb.bench.measure import Bench

    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="oneb_bench_") as folder:
        bench = Bench(settings, Path(folder))
        for point in points:
            rows.append(bench.row(point))
            results.save(args.out, rows, command=_command(args, further), commit=args.commit, **bench.facts())
            print(results.line(rows[-1]), flush=True)
    return int(any(row["error"] for row in rows))


def _command(args: argparse.Namespace, further: list[str]) -> str:
    """What a reader types to get these results: only what differs from the defaults."""
    words = ["oneb", "bench"]
    defaults = vars(build_parser().parse_args([]))
    for name, value in vars(args).items():
        if value == defaults[name] or name in ("one", "commit"):
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            values = value if isinstance(value, (list, tuple)) else [value]
            words += ["auto" if entry is None else str(entry) for entry in values]
    return shlex.join(words + (["--", *further] if further else []))


def _show(args: argparse.Namespace) -> int:
    records = [results.with_expected(results.load(path)) for path in args.show]
    for path, record in zip(args.show, records, strict=True):
        about = [record.get(key) for key in ("gpu", "commit", "date")]
        print(f"{path}: {', '.join(str(part) for part in about if part)}; {record['command']}")
    rows = [row for record in records for row in record["rows"]]
    print(f"\n{results.report(rows)}")
    if args.markdown:
        print(f"\n{results.report(rows, markdown=True)}")
    if args.plots:
        _draw(records, args.plots)
    return 0


def _draw(records: Sequence[dict[str, Any]], folder: Path) -> None:
    for path in write_growth(records, folder):
        print(path)
