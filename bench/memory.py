#!/usr/bin/env python3
"""Peak GPU memory of real steps against what the plan predicts, and the speed of these steps against the plan's.

    python3 bench/memory.py --data books.npy --out bench/results/memory_h200.json
    python3 bench/memory.py --show bench/results/memory_h200.json

A point is a run of a few optimizer steps of two micro-batches. Its peak is the process's, the CUDA context included;
nothing else may use the GPU meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runs import REPOSITORY  # noqa: F401  (puts the repository on the path)
from torch.nn.attention import sdpa_kernel

from oneb.bench import results
from oneb.checkpoints.rundir import RunDirectory
from oneb.config import VARIANTS, Config, device_defaults
from oneb.data.loader import Batch, gather
from oneb.gpus import find_gpu
from oneb.kernels.attention import SDP_BACKENDS
from oneb.memory import step_memory
from oneb.presets import resolve
from oneb.roofline import table_speed
from oneb.show.display import make_display
from oneb.show.recorder import Recorder
from oneb.train.resume import StartingPoint
from oneb.train.setup import build
from oneb.train.signals import StopRequest
from oneb.train.trainer import Trainer

STEPS = 3  # the first compiles and tunes
MICRO_BATCHES = 2


def main() -> int:
    """Measure or show; 1 if a point ran out of memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data")
    add("--size", default="1b")
    add("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    add("--lengths", nargs="+", type=int, default=(512, 2048, 8192))
    add("--tokens", nargs="+", type=int, default=(8192,), help="tokens a micro-batch, but at least one sequence (8192)")
    add("--layers", nargs="+", default=("none", "11", "all"), help="recomputed layers (none 11 all)")
    add("--optimizers", nargs="+", default=("lion", "adamw", "lion8bit"))
    add("--precisions", nargs="+", default=("bf16",))
    add("--out", type=Path)
    add("--commit")
    add("--show", nargs="+", type=Path, help="measure nothing: print these results against what is predicted now")
    args = parser.parse_args()
    if args.show:
        rows = [row for path in args.show for row in json.loads(path.read_text())["rows"]]
        show(rows)
        return 0
    if not (args.data and args.out):
        parser.error("give --data and --out, or --show")
    rows = []
    grid = itertools.product(args.variants, args.precisions, args.lengths, args.tokens, args.layers, args.optimizers)
    for point in grid:
        rows.append(measure(args, *point))
        print(json.dumps(rows[-1]), flush=True)
    results.save(args.out, rows, command="python3 " + " ".join(sys.argv), commit=args.commit,
                 gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    show(rows)
    return int(any(row["error"] for row in rows))


def configuration(row: dict[str, Any], **given: Any) -> Config:
    """The run of a point."""
    return resolve({
        "size": row["size"], "variant": row["variant"], "train_seq_len": row["seq_len"], "precision": row["precision"],
        "max_seq_len": max(2048, row["seq_len"]), "batch_size": row["batch_size"], "grad_accum": MICRO_BATCHES,
        "grad_checkpoint": row["layers"], "optimizer": row["optimizer"], "steps": 100, **given,
    })


def measure(args: argparse.Namespace, variant: str, precision: str, seq_len: int, tokens: int, layers: str,
            optimizer: str) -> dict[str, Any]:
    """One point: GiB of tensors, of torch's allocator and of the process at their peaks, and tokens a second."""
    row = {"size": args.size, "variant": variant, "precision": precision, "seq_len": seq_len,
           "batch_size": max(1, tokens // seq_len), "layers": layers, "optimizer": optimizer, "error": None}
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        row |= steps(configuration(row, path=args.data))
    except torch.OutOfMemoryError as error:
        row["error"] = str(error).splitlines()[0]
    gc.collect()
    torch.cuda.empty_cache()
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def steps(config: Config, n_steps: int = STEPS, before: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """Real steps of the trainer, its run directory aside; ``before`` is called before each, with its number."""
    parts = build(config, lambda _: None)
    order, train = parts.order, parts.config.train
    (seq_len,) = {length for _, length in train.phases}
    display = make_display("off", steps=n_steps, start_step=0, name="", stream=sys.stdout, total_tokens=None)
    marks, losses = [], []
    with StopRequest() as stop, sdpa_kernel(SDP_BACKENDS[parts.backend]):
        recorder = Recorder(Path("unused"), display, [])
        trainer = Trainer(parts, RunDirectory(Path("unused"), is_new=True), recorder, stop, StartingPoint())
        for step in range(n_steps):
            before(step)
            rows = gather(parts.tokens, order.offsets(step), seq_len, config.model.vocab_size, pin_memory=True)
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
            losses.append(trainer.train_step(Batch(step, rows, seq_len))[0])
            trainer.step += 1
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    fastest_ms = min(a.elapsed_time(b) for a, b in zip(marks[1:], marks[2:], strict=False))
    return {
        "tensors_gib": torch.cuda.max_memory_allocated() / 2**30, "outside_gib": outside / 2**30,
        "allocator_gib": torch.cuda.max_memory_reserved() / 2**30,
        "process_gib": (torch.cuda.max_memory_reserved() + outside) / 2**30,
        "tok_s": train.sequences(seq_len) * seq_len / fastest_ms * 1e3, "gpu": parts.device.name,
        "losses": [loss.item() for loss in losses], "chosen": trainer.fit.at(seq_len).described(),
        "optimizer": trainer.fit.optimizer, "fits": trainer.fit.fits,
    }


def predicted(row: dict[str, Any]) -> tuple[dict[str, int], float | None]:
    """(bytes by part, tokens a second), as a plan would have them now."""
    config = configuration(row, path="demo", vocab_size=50257)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=50257),
                                 train=device_defaults(config.train, "cuda"))
    layers = config.train.recomputed_layers(config.model.n_layers)
    memory = step_memory(config, row["seq_len"], row["batch_size"], layers, optimizer=row["optimizer"])
    gpu = find_gpu(row["gpu"])
    speed = gpu and table_speed(config, gpu)(row["seq_len"], row["batch_size"], MICRO_BATCHES, layers)
    return memory, speed


def show(rows: list[dict[str, Any]]) -> None:
    """A line a point, and the largest errors."""
    memory_errors, speed_errors = [], []
    print(f"{'variant':10} {'prec':4} {'length':>6} {'batch':>5} {'layers':>6} {'optimizer':9} {'tensors':>8} "
          f"{'process':>8} {'predicted':>9} {'error':>7} {'tok/s':>8} {'expected':>8} {'error':>7}")
    for row in rows:
        name = (f"{row['variant']:10} {row['precision']:4} {row['seq_len']:6} {row['batch_size']:5} {row['layers']:>6} "
                f"{row['optimizer']:9}")
        if row["error"]:
            print(name, row["error"])
            continue
        memory, speed = predicted(row)
        gib = sum(memory.values()) / 2**30
        error = gib / row["process_gib"] - 1
        memory_errors.append(error)
        speed_errors.append(speed / row["tok_s"] - 1)
        print(f"{name} {row['tensors_gib']:8.2f} {row['process_gib']:8.2f} {gib:9.2f} {error:+7.1%} "
              f"{row['tok_s']:8,.0f} {speed:8,.0f} {speed_errors[-1]:+7.1%}")
    if memory_errors:
        print(f"{len(memory_errors)} points; memory predicted {min(memory_errors):+.1%} to {max(memory_errors):+.1%}, "
              f"speed {min(speed_errors):+.1%} to {max(speed_errors):+.1%}")


if __name__ == "__main__":
    sys.exit(main())
