"""SIGINT, SIGTERM and SIGHUP ask the loop to stop after the current step; a second one ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

# Who started us may pass on a Ctrl-C that the terminal has sent to us as well: still the first one.
_SAME_REQUEST_S = 1.0
_SHOW_CURSOR = b"\x1b[?25h"


class Stopped(BaseException):
    """A signal came while the loop was :meth:`~StopRequest.interruptible`."""


class StopRequest:
    """Context manager that listens; ``signum`` is the signal that came, or None.

    The second signal works at any time, in the middle of a computation or of a write: a thread hears of it, and not the
    interpreter's main loop.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.signum: int | None = None
        self._interruptible = False
        self._previous: dict[int, signal._HANDLER] = {}

    @property
    def exit_code(self) -> int:
        """128 + signal, as shells report it; 0 if none came."""
        return 128 + self.signum if self.signum else 0

    @contextlib.contextmanager
    def interruptible(self, when: bool = True) -> Iterator[None]:
        """Work that may be broken off at any point, as it changes nothing that is saved.

        Raises:
            Stopped: a signal has come, before or within.
        """
        before, self._interruptible = self._interruptible, when
        try:
            if when and self.signum is not None:
                raise Stopped
            yield
        finally:
            self._interruptible = before

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            # nohup has SIGHUP ignored, so that the run outlives its terminal.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, name="oneb-signals", daemon=True)
        self._listener.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write_end)
        self._listener.join()
        os.close(self._read_end)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first = self.signum is None
        self.signum = self.signum or number
        if first and self._interruptible:
            raise Stopped

    def _listen(self) -> None:
        """End the process at the second signal. Python's C handler writes each signal's number to the pipe."""
        first_at: float | None = None
        while received := os.read(self._read_end, 1):
            number, now = received[0], time.monotonic()
            if number not in self._previous:
                continue
            if first_at is None:
                first_at = now
            elif now - first_at > _SAME_REQUEST_S:
                if sys.stderr.isatty():
                    os.write(2, _SHOW_CURSOR)
                os.write(2, b"\nstopped at once by a second signal: the last checkpoint stays as it was\n")
                os._exit(128 + number)
