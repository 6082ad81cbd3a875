"""Time as a user pays for it: since the line was pasted, and a step without its interruptions."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def process_age_s() -> float:
    """Seconds since this process began, the launcher's part included (it becomes the training process).

    From /proc; without one (macOS) the processor time used so far, which is less.
    """
    try:
        # Field 22 of proc(5)'s stat; the name in parentheses before it may hold spaces.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return time.process_time()
    return uptime_s - ticks / os.sysconf("SC_CLK_TCK")


class StepClock:
    """Mean time a step since the last reading, without what :meth:`pause` covers (evaluation, saving).

    Args:
        synchronize: waits until the device has done what it was asked for.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self.restart()

    def restart(self) -> None:
        """Forget the steps so far."""
        self._began = time.perf_counter()
        self._paused_s = 0.0
        self._waited_s = 0.0
        self._steps = 0

    def step(self, waited_s: float) -> None:
        """Count a step that waited ``waited_s`` for its data."""
        self._steps += 1
        self._waited_s += waited_s

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the body's time out, and not that of steps which the device is still busy with."""
        self._synchronize()
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused_s += time.perf_counter() - began

    def read(self) -> tuple[float, float] | None:
        """(seconds a step, seconds waited for data a step) since the last reading, or None without a step; starts anew.

        Only true if the device has finished what it was asked for.
        """
        mean = None
        if self._steps:
            step_s = (time.perf_counter() - self._began - self._paused_s) / self._steps
            mean = (step_s, self._waited_s / self._steps)
        self.restart()
        return mean
