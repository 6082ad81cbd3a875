"""What is measured: variants x lengths x precisions x micro-batches, and the run that each of them is. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from oneb.config import Config
from oneb.presets import SIZES, resolve

GROWTH_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
GROWTH_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
GROWTH_LENGTH = 2048  # tokens a sequence where the micro-batch grows
# Steps that the profiler sees: one that fills the queue again, and those that count.
PROFILE_LEAD_IN, PROFILE_STEPS = 1, 2

# Launcher options that the bench decides itself, and how it is told to.
OWN_OPTIONS = {
    "variant": "--variants", "phases": "--lengths", "train_seq_len": "--lengths", "precision": "--precisions",
    "batch_size": "--batch-size", "grad_accum": "--batch-tokens", "batch_tokens": "--batch-tokens",
    "steps": "--steps", "target_tokens": "--steps", "size": "--size", "path": "--data", "device": "--device",
    "null_attn": "--null-attn", "root": "", "tag": "", "eval_every": "", "save_every": "", "resume": "", "ckpt": "",
    "if_exists": "",
}


@dataclass(frozen=True)
class Point:
    """One row of the results. ``batch_size`` is in sequences a micro-batch; None leaves it to :mod:`oneb.fit`."""

    variant: str
    seq_len: int
    precision: str
    batch_size: int | None = None

    def to_row(self) -> dict[str, Any]:
        """The columns that tell points apart."""
        return {"variant": self.variant, "seq_len": self.seq_len, "precision": self.precision,
                "asked_batch_size": "auto" if self.batch_size is None else self.batch_size}


@dataclass(frozen=True)
class Settings:
    """What all points share.

    Attributes:
        size: shape preset.
        device: as ``--device`` of a run.
        data: token file.
        null_attn: with a null key and value.
        batch_tokens: tokens an optimizer step, as near as whole micro-batches come to it from below.
        steps: timed steps.
        warmup: steps before them, which are not timed; the first compiles.
        profile: whether a profiled window follows the timed steps.
        ceiling_s: seconds that each ceiling is measured for; 0 = ceilings are not measured.
        given: further options of the launcher, by field name.
    """

    size: str = "1b"
    device: str = "cuda"
    data: str = "demo"
    null_attn: bool = False
    batch_tokens: int = 65536
    steps: int = 20
    warmup: int = 5
    profile: bool = True
    ceiling_s: float = 0.3
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of a point's run."""
        return self.warmup + self.steps + (PROFILE_LEAD_IN + PROFILE_STEPS if self.profile else 0)


def grid(variants: Sequence[str], lengths: Sequence[int], precisions: Sequence[str],
         batch_sizes: Sequence[int | None]) -> list[Point]:
    """Every combination, without repeats, the variant changing slowest."""
    combinations = itertools.product(variants, lengths, precisions, batch_sizes)
    return list(dict.fromkeys(Point(*combination) for combination in combinations))


def configuration(point: Point, settings: Settings, root: str) -> Config:
    """The run that ``point`` is, writing below ``root``. A micro-batch that the point leaves open stays so.

    Raises:
        ConfigErrors: options that do not go together.
    """
    sequences = settings.batch_tokens // point.seq_len
    return resolve({
        "max_seq_len": max(SIZES[settings.size][-1], point.seq_len), "live": "basic",
        **settings.given,
        "size": settings.size, "variant": point.variant, "train_seq_len": point.seq_len,
        "null_attn": settings.null_attn, "path": settings.data, "device": settings.device,
        "batch_size": point.batch_size, "grad_accum": max(1, sequences // (point.batch_size or 1)),
        "steps": settings.total_steps, "eval_every": 0, "save_every": 0, "root": root, "tag": "bench",
        "precision": point.precision,
    })
