"""Losses that went wrong: every step's values to the host without waiting, and when to go back because of them.

The remedy is PaLM's (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1): start again from a checkpoint before the
spike and pass over the batches seen shortly before it and during it. They skipped 200-500 batches from a checkpoint
about 100 steps before the spike, about 20 times, and the same batches did no harm elsewhere: it takes that data and
those weights together. Here a run does the same by itself; :class:`LossWatch` says when and which steps.

The last 128 losses as the measure of the next one are OLMo's (SkipStepOptimizer in OLMo-core, with mean and standard
deviation); median and MAD (Rousseeuw and Croux 1993) are not moved by the outliers that they are to find.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oneb.errors import OnebError
from oneb.optim.loss_scale import MIN_SCALE

WINDOW_STEPS = 128
MIN_READINGS = 64
# Readings above the threshold that make a spike; a lower one takes back FORGIVEN of them. Going back costs up to
# --save-minutes and one of --max-rollbacks, waiting costs these few steps: a spike that passes by itself gets the time
# to. tests/test_watch.py has the rates.
SPIKE_STEPS = 20
FORGIVEN = 2
SKIP_STEPS = 10
# The batches before a spike are those whose updates made it: two time constants of the momentum that enters an update
# (0.9 in AdamW and Lion, 10 steps).
LEAD_STEPS = 20
# The least standard deviation that is believed, nats a token. Batches of millions of tokens differ by less, and less
# than ten times that is no reason to go back.
MIN_SIGMA = 0.03
_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_ORDINARY_Z = 2.0  # a loss below this is no part of a spike's rise
_MAX_OUTSTANDING = 64


@dataclass(frozen=True)
class Reading:
    """What one step said.

    Attributes:
        step: counted from 0.
        seq_len: T.
        loss: the batch's mean, nats a token.
        norm: of the gradients, before clipping.
        scale: the loss scale after the step; 1 where losses are not scaled.
    """

    step: int
    seq_len: int
    loss: float
    norm: float
    scale: float = 1.0

    @property
    def skipped(self) -> bool:
        """Whether the update was left out, since loss or gradients were not finite."""
        return not (math.isfinite(self.loss) and math.isfinite(self.norm))


class Readings:
    """Every step's values, brought to the host without the host ever waiting for the device.

    On CUDA a step's values are copied into page-locked memory behind the step's work, with an event behind the copy; on
    other devices they are read at once. Readings leave in the order of their steps.

    Args:
        device: where the values are.
        max_outstanding: copies under way at a time; one more waits for the oldest, which is long done unless the host
            is that many steps ahead of the device.
    """

    def __init__(self, device: torch.device, max_outstanding: int = _MAX_OUTSTANDING) -> None:
        self._here: list[Reading] = []
        self._under_way: deque[tuple[int, int, int]] = deque()  # step, seq_len, row of the page-locked memory
        self._rows: Tensor | None = None
        if device.type == "cuda":
            self._unscaled = torch.ones((), device=device)
            self._rows = torch.empty((max_outstanding, 3), pin_memory=True)
            self._events = [torch.cuda.Event() for _ in range(max_outstanding)]
            self._free = deque(range(max_outstanding))

    def add(self, step: int, seq_len: int, loss: Tensor, norm: Tensor, scale: Tensor | None = None) -> None:
        """Take a step's values, 0-dim fp32 tensors that may change once this has returned.

        Args:
            scale: the loss scale after the step (``LossScaler.scale``); None where losses are not scaled.
        """
        if self._rows is None:
            self._here.append(Reading(step, seq_len, loss.item(), norm.item(), 1.0 if scale is None else scale.item()))
            return
        if not self._free:
            self._take_oldest()
        row = self._free.popleft()
        # The stack is made, read and given back on one stream, in that order: none of it needs waiting for.
        values = torch.stack([loss, norm, self._unscaled if scale is None else scale])
        self._rows[row].copy_(values, non_blocking=True)
        self._events[row].record()
        self._under_way.append((step, seq_len, row))

    def arrived(self, wait: bool = False) -> list[Reading]:
        """The readings that are here and were not given out before, in order; with ``wait`` all that were added."""
        while self._under_way and (wait or self._events[self._under_way[0][2]].query()):
            self._take_oldest()
        here, self._here = self._here, []
        return here

    def _take_oldest(self) -> None:
        step, seq_len, row = self._under_way.popleft()
        self._events[row].synchronize()
        self._here.append(Reading(step, seq_len, *self._rows[row].tolist()))
        self._free.append(row)


@dataclass(frozen=True)
class Verdict:
    """What went wrong, and the steps whose batches are to be passed over.

    Attributes:
        first_step: the first of them, ``LEAD_STEPS`` before the first that showed it: go back to this step or further.
        last_step: the last of them, the step that decided it.
        shown_step: the first step whose own values were wrong. A checkpoint between ``first_step`` and this one is
            second best: it holds updates of suspected batches.
        reason: for people.
    """

    first_step: int
    last_step: int
    shown_step: int
    reason: str


class LossWatch:
    """Decides from the readings alone, in their order, when a run should go back.

    - A *spike*: 20 losses more than ``zscore`` robust standard deviations above what was usual in the 128 before them
      at the same sequence length; those that high are not taken into the 128. A lower loss takes back two of the 20.
      Judged after warm-up, and from the 65th reading of a length on; a new length begins anew.
    - *Skipped updates*: 10 in a row, not counting those that lower the loss scale on its way to its minimum.

    A skipped update says nothing of the loss: it neither prolongs nor ends a rise.

    Args:
        zscore: threshold; 0 = no spikes are looked for.
        warmup_steps: steps of lr warm-up.
        chunk_len: tokens that ``BatchOrder`` reads window by window over consecutive steps. One odd document makes the
            losses of all its windows high, so where they are several a spike must last that much longer.
    """

    def __init__(self, zscore: float, *, warmup_steps: int = 0, chunk_len: int = 0) -> None:
        self.zscore, self.warmup_steps, self.chunk_len = zscore, warmup_steps, chunk_len
        self._start_length(0)
        self._skips = 0  # in a row, the end of it at the smallest loss scale
        self._first_skipped = -1

    def _start_length(self, seq_len: int) -> None:
        self._seq_len = seq_len
        self._recent: deque[float] = deque(maxlen=WINDOW_STEPS)  # losses that were not above the threshold
        self._high = 0  # readings above the threshold, less those taken back
        self._rise: int | None = None  # the step at which the loss left the ordinary
        self._z = 0.0  # of the last loss that was judged

    @property
    def calm(self) -> bool:
        """Whether nothing looked wrong lately, so that a checkpoint may be saved; False only for a while."""
        return self._first_skipped < 0 and (self.zscore == 0 or self._z < self.zscore / 2) and not self._high

    def add(self, reading: Reading) -> Verdict | None:
        """Take the next step's reading; a verdict if it is time to go back (and then to load the state saved there)."""
        if reading.seq_len != self._seq_len:
            self._start_length(reading.seq_len)
        if reading.skipped:
            return self._add_skipped(reading)
        self._skips, self._first_skipped = 0, -1
        return self._add_loss(reading) if self.zscore else None

    def _add_skipped(self, reading: Reading) -> Verdict | None:
        if self._first_skipped < 0:
            self._first_skipped = reading.step
        self._skips += reading.scale <= MIN_SCALE
        if self._skips < SKIP_STEPS:
            return None
        return self._verdict(self._first_skipped, reading.step,
                             f"loss or gradients were not finite in all steps from {self._first_skipped} to "
                             f"{reading.step}, and their updates were skipped")

    def _add_loss(self, reading: Reading) -> Verdict | None:
        if reading.step < self.warmup_steps or len(self._recent) < MIN_READINGS:
            self._recent.append(reading.loss)
            return None
        usual, sigma = self._usual()
        self._z = (reading.loss - usual) / sigma
        if self._z < _ORDINARY_Z and not self._high:
            self._rise = None
        elif self._rise is None:
            self._rise = reading.step
        if self._z <= self.zscore:
            self._high = max(0, self._high - FORGIVEN)
            self._recent.append(reading.loss)
            return None
        self._high += 1
        if self._high < self.patience(reading.seq_len):
            return None
        shown = self._rise if self._rise is not None else reading.step
        return self._verdict(shown, reading.step,
                             f"the loss, about {usual:.4g} with a standard deviation of {sigma:.2g}, rose at step "
                             f"{shown} and stayed above {usual + self.zscore * sigma:.4g}; at step {reading.step} it "
                             f"is {reading.loss:.4g}")

    def patience(self, seq_len: int) -> int:
        """Readings above the threshold that make a spike."""
        return SPIKE_STEPS + max(0, self.chunk_len // seq_len - 1)

    def _verdict(self, shown: int, last: int, reason: str) -> Verdict:
        return Verdict(max(0, shown - LEAD_STEPS), last, shown, reason)

    def _usual(self) -> tuple[float, float]:
        """What the loss was lately, and its standard deviation around its trend.

        The trend is the line through the medians of the older and the newer half of the losses remembered, so that a
        falling loss does not pass for a noisy one. The lower of the medians is what was usual: where the loss falls the
        newer one, where it rises the older one, which is behind a slow rise by 64 to 128 steps.
        """
        losses = list(self._recent)
        half = len(losses) // 2
        older, newer = _median(losses[:half]), _median(losses[half:])
        slope = (newer - older) / (len(losses) / 2)  # the halves' centres are so far apart
        line = older - slope * (half - 1) / 2
        distances = [abs(loss - line - slope * number) for number, loss in enumerate(losses)]
        return min(older, newer), max(_MAD_TO_SIGMA * _median(distances), MIN_SIGMA)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Numbers and one list of them: what the readings so far leave behind."""
        return {"seq_len": self._seq_len, "recent": list(self._recent), "high": self._high,
                "rise": -1 if self._rise is None else self._rise, "z": self._z, "skips": self._skips,
                "first_skipped": self._first_skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``.

        Raises:
            OnebError: it is not what ``state_dict()`` gives.
        """
        wanted = self.state_dict()
        if not isinstance(state, dict) or {key: type(value) for key, value in state.items()} != \
                {key: type(value) for key, value in wanted.items()} or \
                not all(type(loss) is float and math.isfinite(loss) for loss in state["recent"]) or \
                not math.isfinite(state["z"]) or len(state["recent"]) > WINDOW_STEPS:
            raise OnebError("the losses that the checkpoint remembers are not those of a run: it is from another "
                            "program or damaged, resume from an older one")
        self._start_length(state["seq_len"])
        self._recent.extend(state["recent"])
        self._high, self._z = state["high"], state["z"]
        self._rise = None if state["rise"] < 0 else state["rise"]
        self._skips, self._first_skipped = state["skips"], state["first_skipped"]


def _median(values: list[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2
