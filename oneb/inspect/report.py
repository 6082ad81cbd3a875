"""``report.html`` of a run directory: one file, with summary, options and plots in it, to open or send anywhere.

Nothing that the run's files say becomes more than text: every string is escaped, there is no script, and the page
forbids its browser to run or to load anything. No torch.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
from pathlib import Path
from typing import Any

from oneb.config import sections as config_sections
from oneb.files import write_text
from oneb.inspect.rows import Run, printable, read_run
from oneb.inspect.sections import (
    Block,
    Bullets,
    Command,
    Line,
    Link,
    Mono,
    Paragraph,
    Picture,
    Section,
    Table,
    sections,
)
from oneb.schedules import format_seq_schedule

REPORT_FILE = "report.html"

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin-bottom: 0.25rem; }
h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #e5e7eb; padding-bottom: 0.25rem; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: 0.25rem 0.9rem 0.25rem 0; border-bottom: 1px solid #e5e7eb; }
th { color: #6b7280; font-weight: 500; }
code, pre { font: 13px/1.45 ui-monospace, monospace; background: #f6f8fa; border-radius: 4px; }
code { padding: 0.1rem 0.3rem; }
pre { padding: 0.75rem; white-space: pre-wrap; }
li, td, code { white-space: pre-wrap; unicode-bidi: isolate; }
img { max-width: 100%; height: auto; }
"""


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` from what the run has recorded so far and the plots that are there; returns its path.

    Raises:
        OnebError: ``run_dir`` is not a run directory.
    """
    run = read_run(run_dir)
    first, *rest = sections(run)
    body = [f"<h1>{_text(first.title)}</h1>", *(_html(block, run) for block in first.blocks)]
    for section in [*rest, *_options(run)]:
        body.append(f"<h2>{_text(section.title)}</h2>")
        body += [_html(block, run) for block in section.blocks]
    path = run.path / REPORT_FILE
    write_text(path, "\n".join([
        "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(run.name)}</title>", f"<style>{_STYLE}</style>", "</head>", "<body>", *body, "</body>",
        "</html>", ""]))
    return path


def _html(block: Block, run: Run) -> str:
    if isinstance(block, Paragraph):
        return f"<p>{_line(block.line)}</p>"
    if isinstance(block, Bullets):
        return "\n".join(["<ul>", *(f"<li>{_line(line)}</li>" for line in block.lines), "</ul>"])
    if isinstance(block, Table):
        header = "".join(f"<th>{_text(cell)}</th>" for cell in block.header)
        rows = ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in block.rows]
        return "\n".join(["<table>", f"<tr>{header}</tr>", *(f"<tr>{cells}</tr>" for cells in rows), "</table>"])
    if isinstance(block, Command):
        return f"<pre>{_text(block.text)}</pre>"
    assert isinstance(block, Picture)
    data = base64.b64encode((run.path / block.name).read_bytes()).decode()
    return f'<p><img alt="{_text(block.name.removesuffix(".png"))}" src="data:image/png;base64,{data}"></p>'


def _line(line: Line) -> str:
    return "".join(f"<code>{_text(part.text)}</code>" if isinstance(part, Mono) else _text(part.name)
                   if isinstance(part, Link) else _text(part) for part in line)


def _text(text: str) -> str:
    """Text for an element's content or a quoted attribute."""
    return html.escape(printable(text), quote=True)


def _options(run: Run) -> list[Section]:
    """All options of ``config.json``: first those that differ from the defaults, then the others."""
    given, left = [], []
    for section, values in run.config.items():
        if not isinstance(values, dict):
            given.append((str(section), _value(values)))
            continue
        fields = {field.name: field for field in dataclasses.fields(config_sections().get(section, _Unknown))}
        for name, value in values.items():
            field = fields.get(name)
            row = (field.metadata["flag"] if field else f"{section}.{name}", _value(value))
            (left if field and _value(field.default) == row[1] else given).append(row)
    found = [("Options", given), ("Options at their defaults", left)]
    return [Section(title, (Table(("option", "value"), tuple(rows)),)) for title, rows in found if rows]


@dataclasses.dataclass(frozen=True)
class _Unknown:
    """A section that this version of oneb does not have."""


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, (list, tuple)) and len(v) == 2 for v in value):
        return format_seq_schedule(value)
    return value if isinstance(value, str) else json.dumps(value)
