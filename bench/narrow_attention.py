#!/usr/bin/env python3
"""Attention of narrow heads: errors against fp64, then milliseconds by tile choice, beside cuDNN's.

    python3 bench/narrow_attention.py --out bench/results/narrow_attention.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from runs import save
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from oneb.kernels import narrow_attention as forward
from oneb.kernels import narrow_attention_backward as backward

HEADS, WIDTH = 32, 12


def main() -> int:
    """Check, measure, print and store; 1 if an error is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, help="tokens over all sequences")
    parser.add_argument("--lengths", type=int, nargs="+", default=(512, 2048, 8192, 16384))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    errors = check()
    print("relative errors, bf16 against fp64:", {name: f"{error:.4f}" for name, error in errors.items()}, flush=True)
    if max(errors.values()) > 0.01:
        return 1
    rows = []
    for length in args.lengths:
        rows.append({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "errors": errors,
                     **measure(args.tokens // length, length)})
        save(args.out, rows)
        print("ms:", {key: value if isinstance(value, int) else round(value, 3) for key, value in rows[-1].items()
                      if isinstance(value, (int, float))}, flush=True)
    return 0


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (B, H, T, D), views of one projection as the model makes it, and a gradient of the output."""
    buffer = torch.randn(batch, length, 3 * HEADS * WIDTH, device="cuda", dtype=torch.bfloat16)
    buffer[..., : HEADS * WIDTH] *= WIDTH**-0.5
    q, k, v = (x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for x in buffer.split(HEADS * WIDTH, -1))
    dout = torch.randn(batch, length, HEADS, WIDTH, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    return q, k, v, dout


def check() -> dict[str, float]:
    """Relative errors of the output and of each gradient."""
    q, k, v, dout = inputs(1, 2048)
    wide = [x.double().detach().requires_grad_() for x in (q, k, v)]
    want = forward.narrow_attention_plain(*wide)
    want.backward(dout.double())
    out, lse = forward.narrow_attention_forward(q, k, v, None, None)
    found = [out, *backward.narrow_attention_backward(dout, q, k, v, None, None, out, lse)[:3]]
    pairs = zip(("out", "dq", "dk", "dv"), found, [want, *(x.grad for x in wide)], strict=True)
    return {name: ((got.double() - right).norm() / right.norm()).item() for name, got, right in pairs}


def measure(batch: int, length: int) -> dict[str, Any]:
    """Milliseconds by tile choice, and the best of them."""
    q, k, v, dout = inputs(batch, length)
    out, lse = forward.narrow_attention_forward(q, k, v, None, None)

    def gradients(deterministic: bool, **tiles: Any) -> Callable[[], Any]:
        return lambda: backward.narrow_attention_backward(dout, q, k, v, None, None, out, lse, deterministic, **tiles)

    by_tiles = {
        "forward": {str(t): ms(lambda t=t: forward.narrow_attention_forward(q, k, v, None, None, t))
                    for t in forward.FORWARD_TILES},
        "backward": {str(t): ms(gradients(False, dkdv_tiles=t)) for t in backward.DKDV_TILES},
        "backward_deterministic": {
            f"{t} {u}": ms(gradients(True, dkdv_tiles=t, dq_tiles=u))
            for t in backward.DKDV_TILES for u in backward.DQ_TILES
        },
    }
    best = {kind: min(times.values()) for kind, times in by_tiles.items()}
    return {"length": length, "tokens": batch * length, **best, **cudnn(q, k, v, dout), "by_tiles": by_tiles}


def cudnn(*tensors: Tensor) -> dict[str, float]:
    """The same by cuDNN, whose heads come in multiples of 8."""
    *leaves, dout = (F.pad(x, (0, -WIDTH % 8)).detach() for x in tensors)
    for leaf in leaves:
        leaf.requires_grad_()
    attend = lambda: F.scaled_dot_product_attention(*leaves, is_causal=True, scale=1.0)  # noqa: E731
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return {"cudnn_forward": ms(attend), "cudnn_both": ms(lambda: torch.autograd.grad(attend(), leaves, dout))}


def ms(work: Callable[[], Any]) -> float:
    """Median milliseconds."""
    return do_bench(work, warmup=10, rep=50, return_mode="median")


if __name__ == "__main__":
    sys.exit(main())
