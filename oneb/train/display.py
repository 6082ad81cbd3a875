"""What a run shows while it trains: plain lines, one progress line rewritten in place, or a rich dashboard.

Every display is a sink (:class:`oneb.train.sinks.Sink`) that turns rows into text.
"""

from __future__ import annotations

import math
import os
import statistics
import threading
import time
from collections import deque
from typing import Any, TextIO

from oneb.units import format_count, format_duration, format_gib

_PLAIN_WIDTH = 79
_RECENT_ROWS = 20
_REDRAW_S = 0.2
# Plain output is silent between rows; after so long it says that steps are still being made.
_QUIET_S = 30.0
_QUIET_EVENTS = ("warning", "resume", "stopped", "finish", "error")


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
        from oneb.train.dashboard import RichDisplay

        return RichDisplay(name, progress, stream)
    if mode == "auto" and terminal:
        return LineDisplay(name, progress, stream)
    display = PlainDisplay(name, progress, stream)
    if mode == "rich":
        display.message("warning: --live rich needs a terminal; showing plain lines instead")
    return display


class Progress:
    """Where a run stands, from its rows.

    Attributes:
        steps, step: optimizer steps of the whole run, and those done.
        train: the latest train row, or None.
        evals: all evaluation rows of this process.
        losses: the training losses so far, without those that are not finite.
    """

    def __init__(self, steps: int, step: int, total_tokens: int | None) -> None:
        self.steps, self.step, self.total_tokens = steps, step, total_tokens
        self.train: dict[str, Any] | None = None
        self.evals: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self._recent: deque[dict[str, Any]] = deque(maxlen=_RECENT_ROWS)

    @property
    def eval(self) -> dict[str, Any] | None:
        """The latest evaluation row, or None."""
        return self.evals[-1] if self.evals else None

    def take(self, row: dict[str, Any]) -> None:
        """Account for one row."""
        self.step = max(self.step, row.get("step", 0))
        if row["type"] == "eval":
            self.evals.append(row)
        if row["type"] == "train":
            if self.train and self.train["seq_len"] != row["seq_len"]:
                self._recent.clear()  # steps of another length say nothing about the ones to come
            self.train = row
            self._recent.append(row)
            if row["loss"] is not None and math.isfinite(row["loss"]):
                self.losses.append(row["loss"])

    @property
    def fraction(self) -> float:
        """Share of the steps that are done, 0 to 1."""
        return min(1.0, self.step / self.steps)

    def eta_s(self) -> float | None:
        """Seconds of training left at the recent median speed; None before the first train row."""
        if not self._recent:
            return None
        if self.total_tokens is not None:
            tok_s = statistics.median(row["tok_s"] for row in self._recent)
            return max(0, self.total_tokens - self.train["tokens"]) / tok_s
        return (self.steps - self.step) * statistics.median(row["step_ms"] for row in self._recent) / 1e3


class Display:
    """A sink that writes lasting lines for evaluations and events, and leaves train rows to its subclasses.

    Attributes:
        lost: the stream could no longer be written to (its terminal went away); the run goes on unseen.
    """

    def __init__(self, name: str, progress: Progress, stream: TextIO) -> None:
        self.name, self.progress, self.stream = name, progress, stream
        self.lost = False
        self._lock = threading.RLock()

    def log(self, row: dict[str, Any]) -> None:
        """Show one row."""
        with self._lock:
            self.progress.take(row)
            self._end_status()
            if row["type"] == "train":
                self._show_train()
            for line in lasting_lines(row, self.progress):
                self._line(line)

    def message(self, text: str) -> None:
        """Show a line that stays."""
        with self._lock:
            self._end_status()
            self._line(text)

    def status(self, text: str) -> None:
        """Show what is being waited for ("compiling", "evaluating"), until the next row or message."""

    def advance(self, step: int) -> None:
        """``step`` steps are done. For every step: costs a clock reading when there is nothing to redraw."""

    def close(self) -> None:
        """Leave the stream at the beginning of a line."""

    def _show_train(self) -> None:
        """The latest train row, ``self.progress.train``."""

    def _end_status(self) -> None:
        """What was waited for is over."""

    def _line(self, text: str) -> None:
        self._write(text + "\n")

    def _write(self, text: str) -> None:
        if self.lost:
            return
        encoding = self.stream.encoding or "utf-8"
        try:
            self.stream.write(text.encode(encoding, "replace").decode(encoding))
            self.stream.flush()
        except OSError:  # a closed terminal or pipe: nobody is left to tell, and train.jsonl has it all
            self.lost = True


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

    def advance(self, step: int) -> None:
        self.progress.step = step
        if time.monotonic() - self._wrote_at > _QUIET_S:
            with self._lock:
                self._line(f"step {figures(self.progress)['step']}")

    def _show_train(self) -> None:
        names = ("step", "loss", "lr", "tok_s", "mfu", "eta", "skipped", "memory")
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
        with self._lock:
            self._status = (text, time.monotonic())
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
        names = ("step", "loss", "val", "tok_s", "mfu", "lr", "eta", "skipped", "memory")
        rest = fit(shown, names, width - 6)
        room = width - 8 - len(rest)
        drawn = bar(self.progress.fraction, min(room, 30), self.stream.encoding) + "  " if room >= 8 else ""
        return f"{percent}  {drawn}{rest}"


# ---- text

# Figures that a narrow line leaves out, the first to go first.
_DISPENSABLE = ("memory", "lr", "mfu", "val", "skipped", "eta", "tok_s", "loss")


def figures(progress: Progress) -> dict[str, str]:
    """The current figures as short texts by name; those that are not known are missing."""
    texts = {"step": f"{progress.step:>{len(str(progress.steps))}}/{progress.steps}"}
    if progress.eval:
        texts["val"] = f"val {loss_text(progress.eval['val_loss'])}"
    row = progress.train
    if row is None:
        return texts
    texts["loss"] = f"loss {loss_text(row['loss'])}"
    texts["lr"] = f"lr {row['lr']:.1e}"
    texts["tok_s"] = f"{format_count(row['tok_s']):>5} tok/s"
    if row.get("mfu") is not None:
        texts["mfu"] = f"MFU {row['mfu']:.0%}"
    if row.get("memory_gib") is not None:
        texts["memory"] = f"{row['memory_gib']:.1f} GiB"
    if row.get("skipped"):
        texts["skipped"] = f"{row['skipped']} skipped"
    texts["eta"] = f"ETA {format_duration(progress.eta_s())}"
    return texts


def fit(texts: dict[str, str], names: tuple[str, ...], width: int) -> str:
    """The named texts in one line of at most ``width`` columns; those that matter least are left out."""
    shown = [name for name in names if name in texts]
    for name in _DISPENSABLE:
        if len("  ".join(texts[n] for n in shown)) <= width:
            break
        if name in shown:
            shown.remove(name)
    return "  ".join(texts[name] for name in shown)[:width]


def lasting_lines(row: dict[str, Any], progress: Progress) -> list[str]:
    """What a meta, eval or event row leaves on the screen for good."""
    if row["type"] == "meta":
        return meta_lines(row)
    if row["type"] == "eval":
        best = row["best_val_loss"]
        note = "best so far" if row["val_loss"] == best else f"best {loss_text(best)}"
        return [f"step {row['step']}  val loss {loss_text(row['val_loss'])} ({note})  "
                f"after {format_count(row['tokens'])} tokens  [{format_duration(row['eval_s'])}]"]
    if row["type"] == "event":
        kind = f"{row['event']}: " if row["event"] in ("warning", "error") else ""
        return [f"step {row['step']}  {kind}{row['message']}"]
    return []


def meta_lines(row: dict[str, Any]) -> list[str]:
    """What the run is: model, machine, data."""
    return [
        f"{row['name']}: {row['variant']}, {format_count(row['parameters'])} parameters, "
        f"KV cache {format_gib(row['kv_bytes_per_token'])} a token",
        f"{row['device']}: weights {row['param_dtype']}, compute {row['compute_dtype']}, "
        f"attention {row['attention_backend']}, torch {row['torch']}",
        f"{row['data']}: {format_count(row['train_tokens'])} tokens to train on, "
        f"{format_count(row['val_tokens'])} to validate on",
    ]


def loss_text(loss: float | None) -> str:
    """Five digits, so that columns line up: 10.812, 3.4123."""
    return "nan" if loss is None or math.isnan(loss) else f"{loss:#.5g}"


def percent_text(progress: Progress) -> str:
    """Four columns. Rounded down: 100% is the end and nothing before it."""
    return f"{int(100 * progress.fraction):>3}%"


def bar(fraction: float, width: int, encoding: str | None) -> str:
    """A bar of ``width`` columns, ASCII where the stream cannot take more."""
    full, empty = ("━", "─") if (encoding or "").lower().replace("-", "") == "utf8" else ("#", "-")
    done = int(fraction * width)
    return full * done + empty * (width - done)


def terminal_width(stream: TextIO) -> int:
    """Columns of the terminal behind ``stream``, which may have been resized; 80 if it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
