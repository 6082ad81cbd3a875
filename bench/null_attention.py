#!/usr/bin/env python3
"""What the null token costs beside heads wider than 32: milliseconds of attention with and without it, one layer.

    python3 bench/null_attention.py --out bench/results/null_attention.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runs import results
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from triton.testing import do_bench, do_bench_cudagraph

from oneb.kernels import narrow_attention, null_terms
from oneb.kernels.attention import SDP_BACKENDS, causal_attention, choose_backend

HEADS, WIDTH = 32, 64
TILES = ((4096, 4), (2048, 4), (8192, 8), (4096, 2), (8192, 4), (16384, 8))
COLUMNS = {
    "kv_heads": "", "backend": "", "forward": ".3f", "forward null": ".3f", "both": ".3f", "both null": ".3f",
    "added": ".3f", "kernel forward": ".3f", "TB/s": ".2f", "kernel backward": ".3f", "TB/s back": ".2f",
}


def main() -> int:
    """Check, measure, print and store; 1 if an error is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=(32, 8))
    parser.add_argument("--backend", choices=("cudnn", "flash"), help="default: what training takes here")
    parser.add_argument("--commit", help="the commit measured, where the files came without git")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    backend = args.backend or choose_backend(torch.device("cuda"), torch.bfloat16, WIDTH)
    rows = []
    for kv_heads in args.kv_heads:
        errors = check(kv_heads, backend)
        print(f"{kv_heads} key heads, relative errors, bf16 against fp64:",
              {name: f"{error:.4f}" for name, error in errors.items()}, flush=True)
        if max(errors.values()) > 0.02:
            return 1
        rows.append({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "batch": args.batch,
                     "length": args.length, "heads": HEADS, "head_dim": WIDTH, "kv_heads": kv_heads,
                     "backend": backend, "errors": errors, **measure(args.batch, args.length, kv_heads, backend)})
        results.save(args.out, rows, command="python3 " + " ".join(sys.argv), commit=args.commit)
    print("milliseconds a layer and micro-batch:\n" + results.table(rows, COLUMNS))
    for row in rows:
        print(f"{row['kv_heads']} key heads, ms of our kernels by (elements, warps) of a tile: {row['by_tile']}")
    return 0


def inputs(batch: int, length: int, kv_heads: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v (B, heads, T, D), views of one projection as the model makes it, nulls, and the output's gradient."""
    widths = [HEADS * WIDTH, kv_heads * WIDTH, kv_heads * WIDTH]
    buffer = torch.randn(batch, length, sum(widths), device="cuda", dtype=torch.bfloat16)
    buffer[..., : widths[0]] *= WIDTH**-0.5
    qkv = [x.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for x in buffer.split(widths, -1)]
    nulls = [torch.randn(kv_heads, WIDTH, device="cuda") for _ in range(2)]
    dout = torch.randn(batch, length, HEADS, WIDTH, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    return [*qkv, *nulls], dout


def check(kv_heads: int, backend: str) -> dict[str, float]:
    """Relative errors of the output and of each gradient, with the null key, at an odd length."""
    tensors, dout = inputs(1, 1023, kv_heads)
    leaves, wide = ([x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
                    for dtype in (None, torch.float64))
    out = causal_attention(*leaves, backend)
    want = narrow_attention.narrow_attention_plain(*wide)
    found = [out, *torch.autograd.grad(out, leaves, dout)]
    expected = [want, *torch.autograd.grad(want, wide, dout.double())]
    names = ("out", "dq", "dk", "dv", "dnull_k", "dnull_v")
    return {name: ((got.double() - right).norm() / right.norm()).item()
            for name, got, right in zip(names, found, expected, strict=True)}


def measure(batch: int, length: int, kv_heads: int, backend: str) -> dict[str, Any]:
    """Milliseconds of attention with and without null token, and of our kernels by tile."""
    tensors, dout = inputs(batch, length, kv_heads)
    *qkv, null_k, null_v = leaves = [x.detach().requires_grad_() for x in tensors]

    def plain() -> Tensor:
        return causal_attention(*qkv, None, None, backend)

    def null() -> Tensor:
        return causal_attention(*qkv, null_k, null_v, backend)

    with sdpa_kernel(SDP_BACKENDS[backend]):
        found = {
            "forward": ms(plain), "forward null": ms(null),
            "both": ms(lambda: torch.autograd.grad(plain(), qkv, dout)),
            "both null": ms(lambda: torch.autograd.grad(null(), leaves, dout)),
        }
    by_tile = {str(tile): kernels(tensors, dout, tile) for tile in TILES}
    forward, backward = by_tile[str(null_terms.TILE)]
    terabytes = dout.nbytes / 1e12
    return {
        **found, "added": found["both null"] - found["both"], "kernel forward": forward, "kernel backward": backward,
        "TB/s": 3 * terabytes / (forward / 1e3), "TB/s back": 5 * terabytes / (backward / 1e3), "by_tile": by_tile,
    }


def kernels(tensors: list[Tensor], dout: Tensor, tile: tuple[int, int]) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward kernel, the latter with the sum of its partial sums."""
    q, _, _, null_k, null_v = tensors
    out, dq, lse = torch.randn_like(dout), torch.randn_like(dout), torch.randn(q.shape[:3], device="cuda")
    works = (
        lambda: null_terms.null_terms_fused(q, out, lse, null_k, null_v, tile),
        lambda: null_terms.null_terms_backward_fused(dout, q, out, lse, null_k, null_v, dq, tile),
    )
    # As short as a launch takes the host: only a graph keeps the GPU busy.
    forward, backward = (do_bench_cudagraph(work, return_mode="median") for work in works)
    return forward, backward


def ms(work: Callable[[], Any]) -> float:
    """Median milliseconds."""
    return do_bench(work, warmup=10, rep=100, return_mode="median")


if __name__ == "__main__":
    sys.exit(main())
