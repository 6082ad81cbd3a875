"""``summary.md`` of a run directory: what was trained, how well, how fast, and how to go on. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from oneb.files import write_text
from oneb.inspect.rows import printable, read_run
from oneb.inspect.sections import (
    Block,
    Bullets,
    Command,
    Line,
    Link,
    Mono,
    Paragraph,
    Picture,
    Table,
    sections,
    training_seconds,
)

__all__ = ["SUMMARY_FILE", "training_seconds", "write_summary"]

SUMMARY_FILE = "summary.md"


def write_summary(run_dir: str | Path) -> Path:
    """Write ``summary.md`` from what the run has recorded so far; returns its path.

    Raises:
        OnebError: ``run_dir`` is not a run directory.
    """
    run = read_run(run_dir)
    parts = []
    for number, section in enumerate(sections(run)):
        parts.append(f"{'##' if number else '#'} {_text(section.title)}")
        parts += map(_markdown, section.blocks)
    path = run.path / SUMMARY_FILE
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def _markdown(block: Block) -> str:
    if isinstance(block, Paragraph):
        return _line(block.line)
    if isinstance(block, Bullets):
        return "\n".join(f"- {_line(line)}" for line in block.lines)
    if isinstance(block, Table):
        rows = [block.header, ("---",) * len(block.header), *(map(_text, row) for row in block.rows)]
        # A row of dashes stands close together: |---|---|
        return "\n".join(f"|{'|'.join(cells)}|" if cells[0] == "---" else f"| {' | '.join(cells)} |"
                         for cells in map(tuple, rows))
    if isinstance(block, Command):
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
        return f"{fence}bash\n{printable(block.text)}\n{fence}"
    assert isinstance(block, Picture)
    return f"![{block.name.removesuffix('.png')}]({block.name})"


def _line(line: Line) -> str:
    return "".join(_mono(part.text) if isinstance(part, Mono) else f"[{part.name}]({part.name})"
                   if isinstance(part, Link) else _text(part) for part in line)


def _text(text: str) -> str:
    """One line, with nothing in it that Markdown would make a tag, a link, a picture, code or a cell of."""
    return re.sub(r"([\\`<\[|])", r"\\\1", _one_line(text))


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", printable(text))


def _mono(text: str) -> str:
    text = _one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"
