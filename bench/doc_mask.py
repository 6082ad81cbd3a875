#!/usr/bin/env python3
"""Attention within documents: this repository's kernel beside what torch has for it, at the 1B shapes.

    python3 bench/doc_mask.py --data books.npy --out bench/results/doc_mask.json

Windows are of real data, cut into documents of ``--mean`` tokens on average (FineWeb-Edu's have about 1000), their
lengths exponentially distributed. Each way's output and gradients are compared with naive attention in fp64 (on a
shorter window) before it is timed. Ways:

    whole        causal attention that ignores documents: cuDNN's, or our kernel's for narrow heads
    ours         our kernel, within documents
    varlen       FlashAttention 2 over packed sequences (torch's ``_flash_attention_forward``), which wants their number
                 on the host
    flex         torch's FlexAttention, compiled, with the making of its block mask
    mask         SDPA's memory-efficient kernel with a (B, 1, T, T) mask
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from runs import save
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from oneb.config import NARROW_HEAD_DIM
from oneb.data.sidecar import read_sidecar
from oneb.kernels import narrow_attention as forward
from oneb.kernels.documents import Documents, documents_of, visible
from oneb.kernels.narrow_attention import narrow_attention

# name: (query heads, key heads, width).
SHAPES = {"baseline": (32, 32, 64), "gqa": (32, 8, 64), "decoupled": (32, 32, 12)}
TOKENS = 32768


def varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    batch, heads, length, width = q.shape
    firsts = documents.starts == torch.arange(length, device=q.device)
    bounds = torch.cat([firsts.flatten().nonzero().flatten(), torch.tensor([batch * length], device=q.device)]).int()
    longest = int((documents.ends - documents.starts).max())
    rows = [x.transpose(1, 2).reshape(batch * length, -1, width) for x in (q, k, v)]
    out = torch.ops.aten._flash_attention_forward(
        *rows, bounds, bounds, longest, longest, 0.0, True, False, scale=1.0)[0]
    return out.view(batch, length, heads, width).transpose(1, 2)


def masked(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, visible(documents).unsqueeze(1), scale=1.0)


def flex(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, length = documents.starts.shape
    starts, seen = flex_mask(batch, length, q.device)
    starts.copy_(documents.starts)
    block_mask = compiled(create_block_mask)(seen, batch, None, length, length, device=str(q.device))
    return compiled(flex_attention)(q, k, v, block_mask=block_mask, scale=1.0, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def flex_mask(batch: int, length: int, device: torch.device) -> tuple[Tensor, Callable]:
    """A mask and the documents' starts that it reads, always the same: for another function flex compiles anew."""
    starts = torch.zeros(batch, length, dtype=torch.int32, device=device)

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (key >= starts[b, query])

    return starts, seen


@functools.cache
def compiled(function: Callable) -> Callable:
    """``function`` compiled, once."""
    return torch.compile(function, dynamic=False)


def whole(q: Tensor, k: Tensor, v: Tensor, _: Documents) -> Tensor:
    if q.shape[-1] <= NARROW_HEAD_DIM:
        return narrow_attention(q, k, v)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=q.shape[1] != k.shape[1])


def ours(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    return narrow_attention(q, k, v, documents=documents)


WAYS = {"whole": whole, "ours": ours, "varlen": varlen, "flex": flex, "mask": masked}


def inputs(batch: int, length: int, heads: int, kv_heads: int, width: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v as the model lays them out, and the output's gradient."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(n: int) -> Tensor:
        x = torch.randn(batch, length, n, width, generator=generator, device="cuda")
        return x.to(torch.bfloat16).transpose(1, 2)

    q, k, v = (random(n).mul(width**-0.25 if n_th < 2 else 1.0).detach().requires_grad_()
               for n_th, n in enumerate((heads, kv_heads, kv_heads)))
    return [q, k, v], random(heads)


def results(way: Callable, tensors: list[Tensor], dout: Tensor, documents: Documents) -> list[Tensor]:
    """Output and gradients."""
    for x in tensors:
        x.grad = None
    out = way(*tensors, documents)
    out.backward(dout)
    return [out.detach(), *(x.grad for x in tensors)]


def errors(way: Callable, shape: tuple[int, int, int], ids: np.ndarray, eot: int) -> list[float]:
    """Relative errors of output, dq, dk, dv against fp64, in one window of 1024 tokens."""
    documents = documents_of(torch.from_numpy(ids[None, :1024]).cuda(), eot)
    tensors, dout = inputs(1, 1024, *shape)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    want_out = forward.narrow_attention_plain(*wide, documents=documents if way is not whole else None)
    want_out.backward(dout.double())
    want = [want_out.detach(), *(x.grad for x in wide)]
    found = results(way, tensors, dout, documents)
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, want, strict=True)]


def milliseconds(function: Callable[[], Any], repeats: int = 10) -> float:
    """The median of CUDA-event times, after three runs."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def rows_of(name: str, length: int, ids: np.ndarray, eot: int, ways: list[str]) -> list[dict[str, Any]]:
    """Forward, and forward with backward, of every way at one shape."""
    shape = SHAPES[name]
    batch = TOKENS // length
    windows = torch.from_numpy(ids[:TOKENS].reshape(batch, length)).cuda()
    documents = documents_of(windows, eot)
    mean = (documents.positions + 1).float().mean().item()  # keys that a query sees, of (length + 1) / 2 without mask
    tensors, dout = inputs(batch, length, *shape)
    rows = []
    for way in ways:
        function = WAYS[way]
        row = {"shape": name, "length": length, "way": way, "keys_seen": mean if way != "whole" else (length + 1) / 2}
        try:
            row["errors"] = errors(function, shape, ids, eot)
            with torch.no_grad():
                row["forward_ms"] = milliseconds(lambda function=function: function(*tensors, documents))
            row["both_ms"] = milliseconds(lambda function=function: results(function, tensors, dout, documents))
        except Exception as error:  # fallback: the others are still worth measuring; the row says what failed
            row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
        print(row, flush=True)
        rows.append(row)
    return rows


def tile_rows(name: str, length: int, ids: np.ndarray, eot: int) -> list[dict[str, Any]]:
    """Milliseconds of each candidate tiling of our kernels."""
    from oneb.kernels import narrow_attention_backward as backward

    batch, (heads, kv_heads, width) = TOKENS // length, SHAPES[name]
    documents = documents_of(torch.from_numpy(ids[:TOKENS].reshape(batch, length)).cuda(), eot)
    tensors, dout = inputs(batch, length, heads, kv_heads, width)
    q, k, v = (x.detach() for x in tensors)
    out, lse = forward.narrow_attention_forward(q, k, v, None, None, documents)
    padded = max(32, 1 << (width - 1).bit_length())
    rows = []
    for kernel, table in (("tiles", forward.FORWARD_TILES), ("dkdv_tiles", backward.DKDV_TILES)):
        for tiles in table[padded]:
            if kernel == "tiles":
                ms = milliseconds(lambda t=tiles: forward.narrow_attention_forward(q, k, v, None, None, documents, t))
            else:
                ms = milliseconds(lambda t=tiles: backward.narrow_attention_backward(
                    dout, q, k, v, None, None, out, lse, documents, dkdv_tiles=t))
            rows.append({"shape": name, "length": length, "kernel": kernel, "tiles": str(tiles), "ms": ms})
            print(rows[-1], flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a .npy of prepare_fineweb.py")
    parser.add_argument("--mean", type=int, default=1000, help="tokens a document; 0: as they are")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--tiles", action="store_true", help="also every candidate tiling")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # of flex: lengths, head counts, with and without gradients
    sidecar = read_sidecar(arguments.data)
    if sidecar is None or sidecar.eot is None:
        raise SystemExit(f"{arguments.data} has no sidecar that names what ends documents")
    ids = np.load(arguments.data)[:TOKENS].astype(np.int64)
    if arguments.mean:
        ids[ids == sidecar.eot] = 0
        ids[np.random.default_rng(0).random(TOKENS) < 1 / arguments.mean] = sidecar.eot
    rows = []
    for name in SHAPES:
        for length in arguments.lengths:
            ways = [way for way in arguments.ways if way in ("whole", "ours") or SHAPES[name][2] % 8 == 0]
            rows += rows_of(name, length, ids, sidecar.eot, ways)
            if arguments.tiles:
                rows += tile_rows(name, length, ids, sidecar.eot)
    if arguments.out:
        save(arguments.out, rows, gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    for row in rows:
        if "both_ms" in row:
            print(f"{row['shape']:<10} {row['length']:>6} {row['way']:<8} {row['keys_seen']:8.0f} keys  "
                  f"forward {row['forward_ms']:7.3f} ms  both {row['both_ms']:7.3f} ms  "
                  f"errors {max(row['errors']):.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
