"""What all displays share: where the run stands, the lines that stay, and figures as text."""

from __future__ import annotations

import math
import statistics
import threading
from collections import deque
from typing import Any, TextIO

from oneb.units import format_count, format_duration, format_gib

_RECENT_ROWS = 20


class Progress:
    """Where a run stands, from its rows.

    Attributes:
        steps, step: optimizer steps of the whole run, and those done.
        train: the latest train row, or None.
        evals: all evaluation rows of this process.
        losses: the training losses so far, without those that are not finite.
        data: how many files of the data are there ("3/11"), while it arrives.
    """

    def __init__(self, steps: int, step: int, total_tokens: int | None) -> None:
        self.steps, self.step, self.total_tokens = steps, step, total_tokens
        self.train: dict[str, Any] | None = None
        self.evals: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.data: str | None = None
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
            if row["tok_s"] is not None:  # a row whose only step compiled has no speed
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
        warnings: empty, as nothing here goes wrong that a display could show.
    """

    def __init__(self, name: str, progress: Progress, stream: TextIO) -> None:
        self.name, self.progress, self.stream = name, progress, stream
        self.lost = False
        self.warnings: list[str] = []
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

    def waiting(self, text: str, seconds: float) -> None:
        """Show what has been waited for so long; called about once a second."""
        self.status(text)

    def advance(self, step: int) -> None:
        """``step`` steps are done. For every step: costs a clock reading when there is nothing to redraw."""

    def rewind(self, step: int) -> None:
        """The run went back to ``step``."""
        with self._lock:
            self.progress.step = step
            self.progress.evals = [row for row in self.progress.evals if row["step"] <= step]

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


# ---- text

# Figures that a narrow line leaves out, the first to go first.
_DISPENSABLE = ("memory", "lr", "mfu", "data", "val", "skipped", "eta", "tok_s", "loss")


def figures(progress: Progress) -> dict[str, str]:
    """The current figures as short texts by name; those that are not known are missing."""
    texts = {"step": f"{progress.step:>{len(str(progress.steps))}}/{progress.steps}"}
    if progress.eval:
        texts["val"] = f"val {loss_text(progress.eval['val_loss'])}"
    if progress.data:
        texts["data"] = f"data {progress.data}"
    row = progress.train
    if row is None:
        return texts
    texts["loss"] = f"loss {loss_text(row['loss'])}"
    texts["lr"] = f"lr {row['lr']:.1e}"
    if row["tok_s"] is not None:
        texts["tok_s"] = f"{format_count(row['tok_s']):>5} tok/s"
    if row.get("mfu") is not None:
        texts["mfu"] = f"MFU {row['mfu']:.0%}"
    if row.get("memory_gib") is not None:
        texts["memory"] = f"{row['memory_gib']:.1f} GiB"
    if row.get("skipped"):
        texts["skipped"] = f"{row['skipped']} skipped"
    if (eta_s := progress.eta_s()) is not None:
        texts["eta"] = f"ETA {format_duration(eta_s)}"
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
        kind = f"{row['event']}: " if row["event"] == "warning" else ""
        return [f"step {row['step']}  {kind}{row['message']}"]
    return []


def meta_lines(row: dict[str, Any]) -> list[str]:
    """What the run is: model, machine, data."""
    products = "fp8 products, " if row.get("precision") == "fp8" else ""
    return [
        f"{row['name']}: {row['variant']}, {format_count(row['parameters'])} parameters, "
        f"KV cache {format_gib(row['kv_bytes_per_token'])} a token",
        f"{row['device']}: weights {row['param_dtype']}, {products}compute {row['compute_dtype']}, "
        f"attention {row['attention_backend']}, torch {row['torch']}",
        f"{row['data']}: {format_count(row['train_tokens'])} tokens to train on, "
        f"{format_count(row['val_tokens'])} to validate on"
        + (", attention within documents" if row.get("doc_mask") else ""),
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
