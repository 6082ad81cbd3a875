"""``--live rich``: a dashboard at the bottom of the terminal, below the lines that stay."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any, TextIO

from oneb.errors import OnebError
from oneb.show.screen import Display, Progress, bar, figures, loss_text, percent_text
from oneb.units import format_count

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.panel import Panel
    from rich.table import Table

_LEVELS = "▁▂▃▄▅▆▇█"
_EVALS_SHOWN = 4
_REDRAWS_A_SECOND = 4


class RichDisplay(Display):
    """The dashboard is composed here, whenever there is news; rich's own thread only draws it and turns the spinner.

    Raises:
        OnebError: rich is not installed.
    """

    def __init__(self, name: str, progress: Progress, stream: TextIO) -> None:
        super().__init__(name, progress, stream)
        try:
            from rich.console import Console
            from rich.live import Live
        except ImportError:
            raise OnebError("--live rich needs the package rich, which is not installed; "
                            "`python3 -m pip install rich`, or leave out --live") from None
        self._status = ""
        self._drawn_at = 0.0
        self._console = Console(file=_Stream(self), highlight=False)
        self._live = Live(console=self._console, refresh_per_second=_REDRAWS_A_SECOND)
        self._live.start()
        self._draw()

    def log(self, row: dict[str, Any]) -> None:
        super().log(row)
        self._draw()

    def status(self, text: str) -> None:
        self._status = text
        self._draw()

    def advance(self, step: int) -> None:
        self.progress.step = step
        if self._status or time.monotonic() - self._drawn_at > 1 / _REDRAWS_A_SECOND:
            self._end_status()
            self._draw()

    def close(self) -> None:
        self._end_status()
        self._draw()
        self._live.stop()

    def _end_status(self) -> None:
        self._status = ""

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def _draw(self) -> None:
        width, encoding = self._console.width, self._console.encoding
        self._live.update(dashboard(self.name, self.progress, self._status, width, encoding), refresh=True)
        self._drawn_at = time.monotonic()


class _Stream:
    """The display's stream as rich writes to it: an error means that the terminal went away, not that the run must."""

    def __init__(self, display: Display) -> None:
        self._display = display

    def write(self, text: str) -> int:
        try:
            return self._display.stream.write(text)
        except OSError:
            self._display.lost = True
            return len(text)

    def flush(self) -> None:
        try:
            self._display.stream.flush()
        except OSError:
            self._display.lost = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._display.stream, name)


def dashboard(name: str, progress: Progress, status: str, width: int, encoding: str) -> Panel:
    """Progress, current figures, the loss so far and the latest evaluations, for a terminal ``width`` columns wide."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.rule import Rule
    from rich.spinner import Spinner

    inner = width - 4  # the border and its padding
    parts: list[RenderableType] = [_progress_line(progress, inner, encoding), _figure_table(progress)]
    if len(progress.losses) > 1:
        first, last = loss_text(progress.losses[0]), loss_text(progress.losses[-1])
        curve = sparkline(progress.losses, inner - len(first) - len(last) - 2)
        parts += [Rule("training loss", style="dim"), f"{first} {curve} {last}"]
    if progress.evals:
        parts += [Rule("evaluations", style="dim"), _eval_table(progress)]
    if status:
        parts.append(Spinner("line", text=status))
    return Panel(Group(*parts), title=name, title_align="left", border_style="blue")


def _progress_line(progress: Progress, width: int, encoding: str) -> RenderableType:
    from rich.text import Text

    shown = figures(progress)
    percent = percent_text(progress) + "  "
    rest = f"  {shown['step'].lstrip()}  {shown.get('eta', 'ETA unknown')}"
    drawn = bar(progress.fraction, max(0, width - len(percent) - len(rest)), encoding)
    return Text.assemble(percent, (drawn, "blue"), rest, no_wrap=True)


def _figure_table(progress: Progress) -> Table:
    """Names over values, in rows of four."""
    from rich.table import Table

    row, latest = progress.train or {}, progress.eval
    known = {
        "loss": loss_text(row["loss"]) if row else None,
        "val loss": loss_text(latest["val_loss"]) if latest else None,
        "best val": loss_text(latest["best_val_loss"]) if latest else None,
        "gradient norm": f"{row['grad_norm']:.3g}" if row else None,
        "tokens/s": format_count(row["tok_s"]) if row and row["tok_s"] is not None else None,
        "MFU": f"{row['mfu']:.1%}" if row.get("mfu") is not None else None,
        "peak memory": f"{row['memory_gib']:.1f} GiB" if row.get("memory_gib") is not None else None,
        "tokens": format_count(row["tokens"]) if row else None,
        "learning rate": f"{row['lr']:.2e}" if row else None,
        "sequence": f"{row['seq_len']}" if row else None,
        "step time": f"{row['step_ms']:.0f} ms" if row and row["step_ms"] is not None else None,
        "skipped": f"{row['skipped']}" if row else None,
    }
    if progress.data:
        known["files of data"] = progress.data
    table = Table.grid(expand=True, padding=(0, 1))
    for _ in range(4):
        table.add_column(ratio=1)
    names = list(known)
    for start in range(0, len(names), 4):
        table.add_row(*(f"[dim]{name}[/]\n{known[name] or '-'}" for name in names[start : start + 4]))
    return table


def _eval_table(progress: Progress) -> Table:
    """The latest evaluations, the newest first."""
    from rich.table import Table

    table = Table.grid(expand=True, padding=(0, 1))
    for _ in range(4):
        table.add_column(ratio=1)
    for row in reversed(progress.evals[-_EVALS_SHOWN:]):
        best = "[green]best[/]" if row["val_loss"] == row["best_val_loss"] else ""
        table.add_row(f"step {row['step']}", f"{format_count(row['tokens'])} tokens", loss_text(row["val_loss"]), best)
    return table


def sparkline(values: list[float], width: int) -> str:
    """The course of ``values`` in at most ``width`` characters, each the mean of an equal share of them.

    The first characters of a run would flatten all others, so what exceeds the 90th percentile is drawn as high.
    """
    width = max(1, min(width, len(values)))
    edges = [len(values) * i // width for i in range(width + 1)]
    means = [statistics.fmean(values[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means), sorted(means)[int(0.9 * (len(means) - 1))]
    span = (high - low) or 1.0
    top = len(_LEVELS) - 1
    return "".join(_LEVELS[min(top, round(top * (mean - low) / span))] for mean in means)
