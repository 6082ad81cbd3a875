"""Where the GPU's time goes: kernels of a profiled window, sorted into classes by their names."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from oneb.bench.results import CLASSES

# A device copy of this many bytes ends each step of the window: nothing else copies a prime number of bytes.
MARK_BYTES = 10_007


class Pattern(NamedTuple):
    """Kernels whose name ``regex`` finds belong to ``kind``, a key of :data:`oneb.bench.results.CLASSES`."""

    kind: str
    regex: str
    note: str


# The first pattern that is found decides.
PATTERNS: tuple[Pattern, ...] = (
    Pattern("optimizer", r"_(lion|adamw)(8bit)?_kernel|_muon", "the fused updates"),
    Pattern("optimizer", r"multi_tensor_apply|LpNorm|lpnorm|Norm\w*Ops", "gradient norm, by foreach"),
    Pattern("fp8_casts", r"cast8|transpose8", "casts that nothing could fuse; operands turned for weight gradients"),
    Pattern("attention", r"narrow_attention|null_terms", "ours"),
    Pattern("attention", r"cudnn|sdpa", "cuDNN's, with its helpers (dot_do_o, convert_dq)"),
    Pattern("attention", r"flash|fmha|flex_attention|flex_decoding",
            "FlashAttention, memory-efficient: their names hold 'cutlass', so they stand before the products"),
    Pattern("gemm", r"nvjet|gemm|cublas|cutlass|splitK|xmma|gemv|_scaled_mm",
            "cuBLAS and CUTLASS, with their split-K sums; the output head's products are among them"),
    Pattern("loss", r"softmax|SoftMax|logsumexp|nll_loss|cross_entropy",
            "loss head beside its products; a compiled kernel is named after what it fuses"),
    Pattern("elementwise", r"rms_norm|swiglu|rotary", "ours"),
    Pattern("elementwise", r"triton_(poi|per|red|tem|for)_", "torch.compile's: norms, rotations, SwiGLU, residuals"),
    Pattern("grad_accumulation", r"CUDAFunctor_add|CUDAFunctorOnSelf_add|AddFunctor",
            "eager additions: autograd sums the micro-batches' gradients, the loss head its own. An eager residual "
            "has the same name, and counts here, too"),
    Pattern("elementwise", r"at::native::|at_cuda_detail|cub::|elementwise_kernel|reduce_kernel|krn_partial",
            "the rest of eager torch: embedding and its gradient, sums of partial results, casts, scales"),
    Pattern("other", r"^Memcpy|^Memset", "the batch's way to the GPU, the logged scalars' way back"),
)
_COMPILED = [(pattern.kind, re.compile(pattern.regex)) for pattern in PATTERNS]
_DEVICE_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")


def classify(name: str) -> str | None:
    """The class of a kernel, or None if no pattern knows its name."""
    return next((kind for kind, regex in _COMPILED if regex.search(name)), None)


class Profile:
    """Records the device's kernels between :meth:`start` and :meth:`stop` into a trace file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._marks = [torch.zeros(MARK_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2)]

    def start(self) -> None:
        """The device should be idle: what is queued already would count."""
        self._profiler.start()

    def mark(self) -> None:
        """The end of a step, as the device comes to it."""
        self._marks[0].copy_(self._marks[1])

    def stop(self) -> None:
        """Waits for the device, and writes the trace."""
        torch.cuda.synchronize()
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(self.path))


def breakdown(path: Path, *, lead_in: int, steps: int, micro_batches: int) -> dict[str, Any] | None:
    """Device time a step by class, from a trace with a mark after each of ``lead_in + steps`` steps.

    Only what runs after the first ``lead_in`` marks counts: the queue is full by then, as in a long run. Without
    the marks (``marked`` is False) the whole window counts, from its first kernel to its last.

    Returns:
        ``wall_ms`` a step; ``ms`` a step by class, "idle" being the time without any kernel; ``share`` of wall time;
        ``kernels`` a micro-batch; ``largest_unknown`` kernel (name, ms a step) among "other", or None; ``marked``.
        None if the profiler saw no kernel: some containers forbid it.
    """
    events = sorted(_device_events(path), key=lambda event: event["ts"])
    if not events:
        return None
    marks = [event for event in events if _is_mark(event)]
    marked = len(marks) == lead_in + steps and lead_in > 0
    if marked:
        start, end = _end(marks[lead_in - 1]), marks[-1]["ts"]
    else:
        start, end, steps = events[0]["ts"], max(map(_end, events)), lead_in + steps
    inside = [event for event in events if start <= event["ts"] < end and not _is_mark(event)]
    totals: dict[str, float] = defaultdict(float)
    unknown: dict[str, float] = defaultdict(float)
    for event in inside:
        kind = classify(event["name"])
        totals[kind or "other"] += event["dur"]
        if kind is None:
            unknown[event["name"]] += event["dur"]
    totals["idle"] = (end - start) - _busy(inside)
    largest = max(unknown, key=unknown.__getitem__, default=None)
    per_step = {kind: totals[kind] / 1e3 / steps for kind in CLASSES}
    wall = (end - start) / 1e3 / steps
    return {
        "wall_ms": wall, "ms": per_step, "share": {kind: ms / wall for kind, ms in per_step.items()},
        "kernels": len(inside) / steps / micro_batches, "marked": marked,
        "largest_unknown": largest and {"name": largest, "ms": unknown[largest] / 1e3 / steps},
    }


def _device_events(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8", errors="replace") as file:
        trace = json.load(file)
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and event.get("cat") in _DEVICE_EVENTS:
            yield event


def _is_mark(event: dict[str, Any]) -> bool:
    return event["cat"] == "gpu_memcpy" and event.get("args", {}).get("bytes") == MARK_BYTES


def _end(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]


def _busy(events: list[dict[str, Any]]) -> float:
    """Time covered by at least one of the events, which are sorted by start."""
    covered, reached = 0.0, float("-inf")
    for event in events:
        covered += max(0.0, _end(event) - max(event["ts"], reached))
        reached = max(reached, _end(event))
    return covered
