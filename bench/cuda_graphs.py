#!/usr/bin/env python3
"""What replaying a micro-batch as a CUDA graph would gain over launching its kernels one by one.

    python3 bench/cuda_graphs.py --data books.npy --variant decoupled --out bench/results/cuda_graphs_h200.json

Forward and backward of a micro-batch are captured once; a step replays them, then clips and updates as the trainer
does. Both ways take the same batches, and their losses are compared.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runs import REPOSITORY  # noqa: F401  (puts the repository on the path)
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from oneb.bench import results
from oneb.data.loader import gather
from oneb.kernels.attention import SDP_BACKENDS
from oneb.optim import clip_scale, grad_norm
from oneb.presets import resolve
from oneb.train.setup import Parts, build

STEP_TOKENS = 65536
WARMUP, STEPS = 2, 5


class Stepper:
    """Steps of one run, with or without a graph."""

    def __init__(self, parts: Parts, rows: int, graphed: bool) -> None:
        self.parts, self.rows = parts, rows
        self.device = parts.model.device
        self.static = torch.zeros(rows, parts.order.chunk_len + 1, dtype=torch.int32, device=self.device)
        self.total = torch.zeros((), device=self.device)
        self.accum = STEP_TOKENS // (rows * parts.order.chunk_len)
        self.replay: Callable[[], None] = self.micro_batch
        self.graphed = graphed

    def micro_batch(self) -> None:
        """Forward and backward of the static tokens."""
        loss = self.parts.model.loss(self.static) / self.accum
        loss.backward()
        self.total += loss.detach()

    def capture(self) -> None:
        """After eager steps have compiled and tuned everything, and with gradients in place."""
        gc.collect()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.micro_batch()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.micro_batch()
        self.replay = graph.replay
        self.parts.optimizer.zero_grad(set_to_none=False)

    def step(self, number: int) -> Tensor:
        """One optimizer step; its loss."""
        parts = self.parts
        self.total.zero_()
        tokens = self.tokens(number)
        for rows in tokens.split(self.rows):
            self.static.copy_(rows)
            self.replay()
        norm = grad_norm(parts.optimizer.params)
        parts.optimizer.step(1e-4, number, clip_scale(norm, 1.0))
        parts.optimizer.zero_grad(set_to_none=not self.graphed)
        return self.total.clone()

    def tokens(self, number: int) -> Tensor:
        """The step's batch on the device."""
        order, config = self.parts.order, self.parts.config
        return gather(self.parts.tokens, order.offsets(number), order.seq_len(number), config.model.vocab_size,
                      pin_memory=True).to(self.device, non_blocking=True)


def run(given: dict[str, Any], rows: int, graphed: bool) -> dict[str, Any]:
    """Speed, losses and memory of a few steps."""
    torch.cuda.reset_peak_memory_stats()
    parts = build(resolve({**given, "batch_size": rows, "grad_accum": STEP_TOKENS // (rows * given["train_seq_len"])}),
                  lambda _: None)
    stepper = Stepper(parts, rows, graphed)
    marks, losses = [], []
    with sdpa_kernel(SDP_BACKENDS[parts.backend]):
        for number in range(WARMUP + STEPS):
            if graphed and number == WARMUP:
                stepper.capture()
            if number >= WARMUP:
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()
            losses.append(stepper.step(number))
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
        torch.cuda.synchronize()
    ms = statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False))
    return {"variant": given["variant"], "seq_len": given["train_seq_len"], "batch_size": rows, "graph": graphed,
            "step_ms": ms, "tok_s": STEP_TOKENS / ms * 1e3, "losses": [loss.item() for loss in losses],
            "memory_gib": torch.cuda.max_memory_reserved() / 2**30}


def main() -> int:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--variant", default="decoupled")
    parser.add_argument("--size", default="1b")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 16])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    args = parser.parse_args()
    given = {"path": args.data, "size": args.size, "variant": args.variant, "train_seq_len": args.length, "steps": 100}
    rows = []
    for batch_size in args.batch_sizes:
        for graphed in (False, True):
            row = run(given, batch_size, graphed)
            rows.append(row)
            print(f"{args.variant} {batch_size} x {args.length} {'graph' if graphed else 'eager'}: {row['tok_s']:,.0f} "
                  f"tok/s, {row['memory_gib']:.1f} GiB, losses {row['losses'][-1]:.4f}", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    if args.out:
        results.save(args.out, rows, command="python3 " + " ".join(sys.argv), commit=args.commit,
                     gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
