"""What a run shows while it trains: plain lines, one progress line rewritten in place, or a rich dashboard.

Every display is a sink (:class:`oneb.show.sinks.Sink`) that turns rows into text.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any, TextIO

from oneb.show.screen import Display, Progress, bar, figures, fit, percent_text
from oneb.units import format_duration

_PLAIN_WIDTH = 79
_REDRAW_S = 0.2
# Plain output is silent between rows; after so long it says that steps are still being made.
_QUIET_S = 30.0
_WAITING_S = 10.0  # the same while the next step waits for something
_QUIET_EVENTS = ("warning", "resume", "stopped", "finish")


def make_display(
    mode: str, *, steps: int, start_step: int, name: str, stream: TextIO, total_tokens: int | None = None
) -> Display:
    """The display that ``--live`` asks for.

    Args:
        mode: ``auto``: a progress line in a terminal, plain lines elsewhere; ``basic``: plain lines; ``rich``: a
            dashboard (plain lines where there is no terminal); ``off``: no progress, but evaluations and warnings.
        steps: optimizer steps of the whole run.
        start_step: steps done before this process (a resumed run).
        name: the run's name.
        stream: where to write.
        total_tokens: tokens of the whole run. With it the time left counts tokens, which stays right when the
            sequence length grows; without it, steps.

    Raises:
        OnebError: ``rich`` is asked for and not installed.
    """
    progress = Progress(steps=steps, step=start_step, total_tokens=total_tokens)
    terminal = stream.isatty()
    if mode == "off":
        return QuietDisplay(name, progress, stream)
    if mode == "rich" and terminal:
        from oneb.show.dashboard import RichDisplay

        return RichDisplay(name, progress, stream)
    if mode == "auto" and terminal:
        return LineDisplay(name, progress, stream)
    display = PlainDisplay(name, progress, stream)
    if mode == "rich":
        display.message("warning: --live rich needs a terminal; showing plain lines instead")
    return display


class QuietDisplay(Display):
    """``--live off``: evaluations, warnings, and how the run begins and ends."""

    def log(self, row: dict[str, Any]) -> None:
        if row["type"] != "event" or row["event"] in _QUIET_EVENTS:
            super().log(row)


class PlainDisplay(Display):
    """One line a train row, 79 columns at most: for logs, notebooks and CI."""

    def __init__(self, name: str, progress: Progress, stream: TextIO) -> None:
        super().__init__(name, progress, stream)
        self._wrote_at = time.monotonic()

    def status(self, text: str) -> None:
        with self._lock:
            self._line(f"{text} …")

    def waiting(self, text: str, seconds: float) -> None:
        if time.monotonic() - self._wrote_at > _WAITING_S:
            self.status(text)

    def advance(self, step: int) -> None:
        self.progress.step = step
        if time.monotonic() - self._wrote_at > _QUIET_S:
            with self._lock:
                self._line(f"step {figures(self.progress)['step']}")

    def _show_train(self) -> None:
        names = ("step", "loss", "lr", "tok_s", "mfu", "eta", "data", "skipped", "memory")
        self._line("step " + fit(figures(self.progress), names, _PLAIN_WIDTH - len("step ")))

    def _write(self, text: str) -> None:
        super()._write(text)
        self._wrote_at = time.monotonic()


class LineDisplay(Display):
    """One line that is rewritten in place, below the lines that stay; it counts the seconds of what is waited for."""

    def __init__(self, name: str, progress: Progress, stream: TextIO) -> None:
        super().__init__(name, progress, stream)
        self._shown = ""
        self._drawn_at = 0.0
        self._status: tuple[str, float] | None = None  # text, since when
        self._closed = threading.Event()
        self._ticker: threading.Thread | None = None

    def status(self, text: str) -> None:
        self.waiting(text, 0.0)

    def waiting(self, text: str, seconds: float) -> None:
        with self._lock:
            self._status = (text, time.monotonic() - seconds)
            self._draw()
        if self._ticker is None:
            self._ticker = threading.Thread(target=self._tick, name="oneb-display", daemon=True)
            self._ticker.start()

    def advance(self, step: int) -> None:
        self.progress.step = step
        if self._status or time.monotonic() - self._drawn_at > _REDRAW_S:
            with self._lock:
                self._end_status()
                self._draw()

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            self._end_status()
            if self._shown:
                self._shown = ""
                self._write("\n")

    def _tick(self) -> None:
        while not self._closed.wait(1.0):
            with self._lock:
                if self._status:
                    self._draw()

    def _show_train(self) -> None:
        self._draw()

    def _end_status(self) -> None:
        self._status = None

    def _line(self, text: str) -> None:
        redraw, shown = bool(self._shown), len(self._shown)
        self._shown = ""
        self._write(("\r" if shown else "") + text.ljust(shown) + "\n")
        if redraw:
            self._draw()

    def _draw(self) -> None:
        line = self._compose(terminal_width(self.stream) - 1)
        # Spaces instead of an escape code wipe what was longer: notebooks show the codes.
        self._write("\r" + line.ljust(len(self._shown)))
        self._shown, self._drawn_at = line, time.monotonic()

    def _compose(self, width: int) -> str:
        shown = figures(self.progress)
        shown["step"] = shown["step"].lstrip()  # rewritten in place, there is no column to line up with
        percent = percent_text(self.progress)
        if self._status:
            text, since = self._status
            shown["status"] = f"{text} … {format_duration(time.monotonic() - since)}"
            return f"{percent}  {fit(shown, ('step', 'loss', 'status'), width - 6)}"
        names = ("step", "loss", "val", "tok_s", "mfu", "lr", "eta", "data", "skipped", "memory")
        rest = fit(shown, names, width - 6)
        room = width - 8 - len(rest)
        drawn = bar(self.progress.fraction, min(room, 30), self.stream.encoding) + "  " if room >= 8 else ""
        return f"{percent}  {drawn}{rest}"


def terminal_width(stream: TextIO) -> int:
    """Columns of the terminal behind ``stream``, which may have been resized; 80 if it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
