"""Learning rate and sequence length as pure functions of the step: resume needs no scheduler state.

A sequence schedule is a tuple of phases ``(start_step, seq_len)``, sorted, the first at step 0.
Steps count from 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TypeAlias

from oneb.errors import OnebError

Phases: TypeAlias = "tuple[tuple[int, int], ...]"

LR_SCHEDULES = ("constant", "cosine", "linear", "wsd")
# Share of the run that wsd spends decaying: Hägele et al. 2024 (arXiv 2405.18392) find 10-20% enough.
WSD_DECAY_FRACTION = 0.2

_ENTRY = re.compile(r"\s*(\d{1,18})\s*@\s*(\d{1,18})\s*")


def parse_seq_schedule(text: str) -> Phases:
    """``"1024@0,2048@10000"`` -> ``((0, 1024), (10000, 2048))``.

    Raises:
        OnebError: naming every entry that is malformed, repeated or out of order.
    """
    faults, phases = [], []
    for entry in text.split(","):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            faults.append(f"{entry.strip()[:80]!r} is not LENGTH@STEP (for example 1024@0)")
            continue
        seq_len, start = int(match[1]), int(match[2])
        if seq_len < 1:
            faults.append(f"{entry.strip()!r} has no length; write at least 1@{start}")
        elif phases and start <= phases[-1][0]:
            faults.append(f"{entry.strip()!r} starts at or before the entry ahead of it "
                          f"(step {phases[-1][0]}); write the steps in rising order")
        else:
            phases.append((start, seq_len))
    if faults:
        raise OnebError(f"--seq-schedule {text!r}: " + "; ".join(faults))
    return tuple(phases)


def format_seq_schedule(phases: Phases) -> str:
    """The inverse of :func:`parse_seq_schedule`."""
    return ",".join(f"{seq_len}@{start}" for start, seq_len in phases)


def seq_len_at(phases: Phases, step: int) -> int:
    """Sequence length, in tokens, of the given step."""
    return next(seq_len for start, seq_len in reversed(phases) if start <= step)


def reached(phases: Phases, steps: int) -> Phases:
    """The phases that a run of ``steps`` steps gets to."""
    return tuple(phase for phase in phases if phase[0] < steps)


def tokens_before(phases: Phases, step: int, sequences: Callable[[int], int]) -> int:
    """Tokens trained on in steps ``0 .. step - 1``, with ``sequences(seq_len)`` sequences a step."""
    ends = [start for start, _ in phases[1:]] + [step]
    return sum(
        max(0, min(end, step) - start) * seq_len * sequences(seq_len)
        for (start, seq_len), end in zip(phases, ends, strict=True)
    )


def steps_for_tokens(phases: Phases, target_tokens: int, sequences: Callable[[int], int]) -> int:
    """The smallest number of steps that trains on at least ``target_tokens``; ``sequences`` as in tokens_before."""
    done = 0
    for (start, seq_len), following in zip(phases, (*phases[1:], None), strict=True):
        per_step = seq_len * sequences(seq_len)
        steps = -(-(target_tokens - done) // per_step)
        if following is None or start + steps <= following[0]:
            return start + steps
        done += (following[0] - start) * per_step
    raise AssertionError("a schedule has at least one phase")


def lr_at(step: int, *, schedule: str, peak_lr: float, min_lr: float, warmup_steps: int, steps: int) -> float:
    """Learning rate of the update at ``step``.

    Linear warm-up over ``warmup_steps``, then: ``constant``; ``cosine`` (Loshchilov & Hutter 2017, arXiv
    1608.03983) or ``linear`` down to ``min_lr`` at the last step; ``wsd``: constant, then ``1 - sqrt`` decay
    over the last fifth of the run (Hägele et al. 2024, arXiv 2405.18392).
    """
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak_lr
    start = warmup_steps
    if schedule == "wsd":
        # At least one interval, so that the shortest run ends at min_lr too.
        start = max(warmup_steps, min(steps - 2, steps - round(steps * WSD_DECAY_FRACTION)))
    # The last update (steps - 1) has progress 1; past the end the rate stays at its minimum.
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - 1 - start)))
    left = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "wsd": 1 - math.sqrt(progress),
    }[schedule]
    return min_lr + (peak_lr - min_lr) * left
