"""SIGINT, SIGTERM and SIGHUP ask the loop to stop after the current step; a second one stops at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class StopRequest:
    """Context manager that listens; ``signum`` is the signal that came, or None."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, signal._HANDLER] = {}

    @property
    def exit_code(self) -> int:
        """128 + signal, as shells report it; 0 if none came."""
        return 128 + self.signum if self.signum else 0

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            # nohup has SIGHUP ignored, so that the run outlives its terminal.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise SystemExit(128 + number)
        self.signum = number
