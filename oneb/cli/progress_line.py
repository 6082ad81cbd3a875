"""The progress of preparing data or reading it: one line that changes on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, TextIO

from oneb.show.screen import bar
from oneb.units import format_count, format_duration

if TYPE_CHECKING:
    from oneb.data.assemble import Progress

_LINE_SECONDS = 10.0  # between lines where there is no terminal
_BAR_WIDTH = 24


class ProgressLine:
    """Shows :class:`Progress` on ``stream``; messages between stay."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._terminal = stream, stream.isatty()
        self._started = self._shown = time.monotonic()
        self._first: Progress | None = None
        self._drawn = False

    def update(self, progress: Progress) -> None:
        """Show how far it is."""
        now = time.monotonic()
        if self._first is None:  # rates are of this process: what an earlier one did is no speed
            self._first, self._started = progress, now
        self._show(self._texts(progress, now), progress.fraction, now)

    def read(self, fraction: float) -> None:
        """Show that so much of a file has been read."""
        now = time.monotonic()
        left = format_duration((now - self._started) * (1 - fraction) / fraction)
        self._show(["read", f"{left} left"], fraction, now)

    def say(self, message: str) -> None:
        """A line that stays."""
        self.close()
        print(message, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the stream at the beginning of a line."""
        if self._drawn:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()
            self._drawn = False

    def _show(self, texts: list[str], fraction: float, now: float) -> None:
        percent = f"{int(100 * fraction):>3}%"
        if self._terminal:
            line = "  ".join([percent, bar(fraction, _BAR_WIDTH, self._stream.encoding), *texts])
            self._stream.write("\r\x1b[2K" + line[:shutil.get_terminal_size().columns - 1])
            self._stream.flush()
            self._drawn = True
        elif now - self._shown >= _LINE_SECONDS:
            self._shown = now
            print("  ".join([percent, *texts]), file=self._stream, flush=True)

    def _texts(self, progress: Progress, now: float) -> list[str]:
        assert self._first is not None
        seconds = max(1e-3, now - self._started)
        texts = [f"{format_count(progress.tokens)} tokens"]
        if progress.text_bytes:
            texts.append(f"{(progress.text_bytes - self._first.text_bytes) / 1e6 / seconds:.1f} MB/s of text")
        texts.append(f"{format_count((progress.tokens - self._first.tokens) / seconds)} tokens/s")
        gained = progress.fraction - self._first.fraction
        if gained > 0:
            texts.append(f"{format_duration(seconds * (1 - progress.fraction) / gained)} left")
        if progress.arriving:
            texts.append(f"downloading {progress.arriving}")
        return texts
