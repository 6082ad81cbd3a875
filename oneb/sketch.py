"""The learning rate and the sequence schedule over a run, drawn in text."""

from __future__ import annotations

from oneb.config import Config
from oneb.schedules import lr_at, reached

_BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII = "  ..:::##"
# What the axes are made of: the corner, where a later phase begins, along, and up.
_LINES, _ASCII_LINES = "└┴─│", "++-|"


def sketch(config: Config, *, width: int = 60, height: int = 5, plain: bool = False) -> list[str]:
    """The learning rate as a curve over the steps, the phases of the sequence schedule under it, and their steps.

    Args:
        width: characters a line, at most.
        height: lines of the curve.
        plain: ASCII only.
    """
    optim, steps = config.optim, config.train.steps
    corner, joint, along, up = _ASCII_LINES if plain else _LINES
    labels = [f"{optim.lr:g}", *[""] * (height - 2), "0"]
    indent = max(map(len, labels)) + 1
    columns = width - indent - 1
    rates = [
        lr_at(min(steps - 1, (2 * column + 1) * steps // (2 * columns)), schedule=optim.lr_schedule, peak_lr=optim.lr,
              min_lr=optim.min_lr, warmup_steps=optim.warmup_steps, steps=steps)
        for column in range(columns)
    ]
    rows = _bars([rate / optim.lr for rate in rates], height, _ASCII if plain else _BLOCKS)
    drawn = [f"{label:>{indent - 1}} {up}{row}".rstrip() for label, row in zip(labels, rows, strict=True)]
    phases = reached(config.train.phases, steps)
    starts = [start * columns // steps for start, _ in phases]
    axis, below = "", ""
    for (first, seq_len), start, end in zip(phases, starts, [*starts[1:], columns], strict=True):
        named = _fitting(f"{seq_len} tokens", f"{seq_len}", room=end - start - 1)
        axis += ((joint if axis else corner) + named).ljust(end - start, along)[:end - start]
        below = _place(below, start, f"{first:,}")
    end = f"{steps:,}"
    below = _place(below, columns + 1 - len(end), end)
    return [*drawn, " " * indent + axis + along, " " * indent + below]


def _bars(shares: list[float], height: int, blocks: str) -> list[str]:
    """Upright bars of ``shares`` of the whole height, from the top line down; what is above 0 is seen."""
    eighths = [max(share > 0, round(share * height * 8)) for share in shares]
    return ["".join(blocks[max(0, min(8, level - 8 * row))] for level in eighths) for row in reversed(range(height))]


def _fitting(*texts: str, room: int) -> str:
    """The first of ``texts`` that fits; none of them: nothing."""
    return next((text for text in texts if len(text) <= room), "")


def _place(line: str, column: int, text: str) -> str:
    """``line`` with ``text`` at ``column``, or as it is if there is something already, or less than a space before."""
    if line and len(line) >= column:
        return line
    return line.ljust(column) + text
