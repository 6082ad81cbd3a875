"""Results as files and tables: what was measured, by which command, on what."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from oneb.config import device_defaults
from oneb.errors import OnebError
from oneb.files import write_text
from oneb.gpus import Gpu, find_gpu
from oneb.presets import SIZES, resolve
from oneb.roofline import table_speed
from oneb.units import format_count

Row = dict[str, Any]
REPOSITORY = Path(__file__).resolve().parents[2]

# Classes of GPU time, in the order of the tables (oneb.bench.breakdown says what belongs to each).
CLASSES = {
    "gemm": "GEMM", "attention": "attn", "elementwise": "elem", "fp8_casts": "fp8 casts", "loss": "loss",
    "optimizer": "optim", "grad_accumulation": "accum", "other": "other", "idle": "idle",
}
# Column -> format, as :func:`table` takes them; :func:`shown` makes a row of them.
COLUMNS = {
    "variant": "", "parameters": ".2f", "length": ",", "precision": "", "micro-batch": "", "recomputed": "",
    "tok/s": ",.0f", "expected": ",.0f", "roofline": ",.0f", "MFU": ".1%", "ms/step": ",.1f",
    **{f"{name} %": ".1f" for name in CLASSES.values()}, "data ms": ".2f", "peak GiB": ".1f",
    "first step s": ".1f", "MHz": ".0f", "W": ".0f", "tok/J": ".1f",
}


def commit() -> str:
    """The checkout's commit, with "-dirty" where files differ from it, or "unknown" outside git."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=REPOSITORY,
                              capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def save(path: Path, rows: Sequence[Row], *, command: str, **facts: Any) -> None:
    """Store rows with the command that made them, the commit (unless among ``facts``) and the date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    facts["commit"] = facts.get("commit") or commit()
    head = json.dumps({"command": command, **facts, "date": date}, indent=1)
    # A row a line: a dozen of them stay readable, and a change of one shows as such.
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    write_text(path, f'{head.removesuffix("}").rstrip()},\n "rows": [\n{lines}\n ]\n}}\n')


def load(path: Path) -> dict[str, Any]:
    """What :func:`save` wrote.

    Raises:
        OnebError: the file is not there, or is something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OnebError(f"no results at {path}; `oneb bench --out {path}` makes them") from None
    except ValueError as error:
        raise OnebError(f"{path} is not JSON ({error}); give a file that `oneb bench --out` wrote") from None
    rows = record.get("rows") if isinstance(record, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "seq_len" in row for row in rows):
        raise OnebError(f"{path} holds no rows of `oneb bench`; give a file that its --out wrote")
    return record


def with_expected(record: dict[str, Any]) -> dict[str, Any]:
    """The record of :func:`load`, with ``expected_tok_s`` worked out in rows that were stored without it."""
    gpu = find_gpu(record.get("gpu") or "")
    for row in record["rows"]:
        if gpu and not row.get("error"):
            row.setdefault("expected_tok_s", _expected(row, gpu))
    return record


def _expected(row: Row, gpu: Gpu) -> float | None:
    """Expected tokens a second of a measured row (:func:`oneb.roofline.table_speed`), from its own options."""
    try:
        config = resolve({
            "max_seq_len": max(SIZES[row["size"]][-1], row["seq_len"]), **row["options"],
            "size": row["size"], "variant": row["variant"], "train_seq_len": row["seq_len"], "path": row["data"],
            "null_attn": row["null_attn"], "precision": row["precision"], "device": "cuda",
        })
    except (KeyError, TypeError, OnebError):  # fallback: options of another version are not ours to interpret
        return None
    train = device_defaults(config.train, "cuda", gpu.has_bf16)
    speed = table_speed(dataclasses.replace(config, train=train), gpu)
    return speed(row["seq_len"], row["batch_size"], row["grad_accum"], _recomputed_layers(row, config.model.n_layers))


def _recomputed_layers(row: Row, n_layers: int) -> int:
    """As the row says; before it did, recomputation was a switch."""
    return row.get("recomputed_layers", n_layers if row["train"]["grad_checkpoint"] is True else 0)


def shown(row: Row) -> Row:
    """A row's figures under the titles of :data:`COLUMNS`; what was not measured is left out."""
    titles = {
        "variant": "variant", "length": "seq_len", "precision": "precision", "micro-batch": "batch_size",
        "tok/s": "tok_s", "MFU": "mfu", "ms/step": "step_ms", "data ms": "data_ms", "peak GiB": "memory_gib",
        "first step s": "first_step_s", "MHz": "clock_mhz", "W": "watts", "tok/J": "tokens_per_joule",
    }
    cells = {title: row.get(name) for title, name in titles.items()}
    if row.get("null_attn"):
        cells["variant"] += " + null"
    if row.get("parameters"):
        cells["parameters"] = format(row["parameters"] / 1e9, ".2f") + "B" if row["parameters"] > 5e7 \
            else format(row["parameters"] / 1e6, ".2f") + "M"
    cells["recomputed"] = row.get("recomputed_layers") or None
    cells["expected"] = row.get("expected_tok_s")
    cells["roofline"] = (row.get("predicted") or {}).get("tok_s")
    shares = (row.get("breakdown") or {}).get("share") or {}
    cells |= {f"{title} %": 100 * shares[name] for name, title in CLASSES.items() if name in shares}
    return cells


def table(rows: Sequence[Row], columns: Mapping[str, str], *, markdown: bool = False) -> str:
    """Rows as aligned text or as a Markdown table; ``columns`` maps a key to its format, None shows as a dash.

    A text where a number was expected is shown as it is.
    """
    cells = [list(columns)]
    for row in rows:
        cells.append([_cell(row.get(key), spec) for key, spec in columns.items()])
    if markdown:
        lines = ["| " + " | ".join(line) + " |" for line in cells]
        return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any, spec: str) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else format(value, spec)


def report(rows: Sequence[Row], *, markdown: bool = False) -> str:
    """The table of all rows that were measured, and below it what failed, and kernels that no pattern knows."""
    measured = [row for row in rows if not row.get("error")]
    cells = [shown(row) for row in measured]
    columns = {title: spec for title, spec in COLUMNS.items() if any(row.get(title) is not None for row in cells)}
    blocks = [table(cells, columns, markdown=markdown)] if measured else []
    notes = [f"failed: {name(row)}: {row['error']}" for row in rows if row.get("error")]
    for row in measured:
        unknown = (row.get("breakdown") or {}).get("largest_unknown")
        if unknown:
            notes.append(f"unknown kernel: {name(row)}: {unknown['ms']:.2f} ms a step in {unknown['name'][:120]}")
    if notes:
        blocks.append("\n".join(f"- {note}" if markdown else note for note in notes))
    return "\n\n".join(blocks)


def name(row: Row) -> str:
    """Which point of the bench a row is, for people."""
    batch = row.get("batch_size") or row.get("asked_batch_size")
    return f"{row['variant']} {row['seq_len']} {row['precision']} micro-batch {batch}"


def line(row: Row) -> str:
    """A row in one line, as it is shown while the bench runs."""
    if row.get("error"):
        return f"{name(row)}: failed: {row['error']}"
    parts = [f"{format_count(row['tok_s'])} tok/s"]
    if row.get("expected_tok_s"):
        parts.append(f"expected {format_count(row['expected_tok_s'])}")
    if row.get("predicted"):
        parts.append(f"roofline {format_count(row['predicted']['tok_s'])}")
    if row.get("mfu"):
        parts.append(f"MFU {row['mfu']:.1%}")
    parts.append(f"{row['step_ms']:.1f} ms a step")
    if row.get("breakdown"):
        shares = row["breakdown"]["share"]
        parts.append(f"products {shares['gemm']:.0%}, attention {shares['attention']:.0%}, idle {shares['idle']:.1%}")
    if row.get("memory_gib"):
        parts.append(f"{row['memory_gib']:.1f} GiB")
    return f"{name(row)}: {', '.join(parts)}"
