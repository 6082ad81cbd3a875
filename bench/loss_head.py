#!/usr/bin/env python3
"""The loss head against its rivals: time, memory and error of loss and gradients at the 1B shape.

    python3 bench/loss_head.py --out bench/results/loss_head_h200.json

Liger-Kernel takes part where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from runs import REPOSITORY  # noqa: F401  (puts the repository on the path)
from torch import Tensor

from oneb.bench import results
from oneb.kernels.loss_head import head_loss

D_MODEL, VOCABULARY, PADDED = 2048, 50257, 50304
CHUNK = 8192

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Ours."""
    return head_loss(hidden, weight, targets, VOCABULARY)


def all_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Plain torch, every logit in memory."""
    return F.cross_entropy(F.linear(hidden, weight)[:, :VOCABULARY].float(), targets)


def _chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight)[:, :VOCABULARY].float(), targets, reduction="sum")


def compiled_chunks() -> Head:
    """torch.compile of a chunk, recomputed in the backward pass."""
    compiled = torch.compile(_chunk_loss, dynamic=False)

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        losses = [torch.utils.checkpoint.checkpoint(compiled, h, weight, t, use_reentrant=False)
                  for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)]
        return torch.stack(losses).sum() / len(targets)

    return head


def heads() -> dict[str, Head]:
    """Name -> loss of (hidden (N, d), weight (V, d), targets (N,))."""
    found: dict[str, Head] = {"ours": ours, "compiled chunks": compiled_chunks(), "all logits": all_logits}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        for name, options in {"Liger": {}, "Liger, fp32 dW": {"accum_dtype": torch.float32}}.items():
            liger = LigerFusedLinearCrossEntropyLoss(**options)
            found[name] = lambda hidden, weight, targets, liger=liger: liger(weight[:VOCABULARY], hidden, targets)
    own = getattr(F, "linear_cross_entropy", None)
    if own:
        found["torch's own"] = lambda hidden, weight, targets: own(hidden, weight[:VOCABULARY], targets)
    return found


def inputs(n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states, weights and targets, bf16 on the GPU."""
    torch.manual_seed(0)
    hidden = torch.randn(n_tokens, D_MODEL, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(PADDED, D_MODEL, device="cuda") * 0.02).bfloat16().requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (n_tokens,), device="cuda")


def gradients(head: Head, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dhidden, dweight)."""
    loss = head(hidden, weight, targets)
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


def errors(head: Head, n_tokens: int = 12288) -> list[float]:
    """Relative errors of loss, dhidden and dweight against fp32."""
    hidden, weight, targets = inputs(n_tokens)
    wide = (hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_())
    wanted = gradients(all_logits, *wide, targets)
    got = gradients(head, hidden, weight, targets)
    return [((g.float() - w).norm() / w.norm()).item() for g, w in zip(got, wanted, strict=True)]


def measure(head: Head, n_tokens: int, repeats: int) -> tuple[float, float]:
    """(median ms of forward and backward, GiB that they take beside the inputs and the gradients)."""
    args = inputs(n_tokens)
    gradients(head, *args)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        gradients(head, *args)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    made = sum(tensor.numel() * tensor.element_size() for tensor in args[:2])
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before - made) / 2**30


def main() -> int:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    rows = []
    for name, head in heads().items():
        try:
            loss, dhidden, dweight = errors(head)
            ms, gib = measure(head, args.tokens, args.repeats)
        except Exception as error:  # fallback: a rival that cannot run is a row that says why
            print(f"{name:18s} {type(error).__name__}: {str(error).splitlines()[0]}")
            rows.append({"name": name, "error": f"{type(error).__name__}: {error}"})
            continue
        rows.append({"name": name, "tokens": args.tokens, "ms": ms, "gib": gib, "loss_error": loss,
                     "dhidden_error": dhidden, "dweight_error": dweight})
        print(f"{name:18s} {ms:7.2f} ms  {gib:6.2f} GiB  errors: loss {loss:.1e}, dhidden {dhidden:.1e}, "
              f"dweight {dweight:.1e}", flush=True)
        torch.cuda.empty_cache()
    if args.out:
        results.save(args.out, rows, command="python3 " + " ".join(sys.argv), commit=args.commit,
                     gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
