"""A run directory as data: the rows of ``train.jsonl`` by type, ``config.json`` and ``plan.json``."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from oneb.errors import OnebError
from oneb.files import read_json_lines

ROWS_FILE = "train.jsonl"
Row = dict[str, Any]

# What rows must hold for the report to be made of them, by type: whole numbers, texts, and numbers by name.
_COUNTS = {
    "meta": ("start_step", "steps", "parameters", "kv_bytes_per_token", "train_tokens", "val_tokens"),
    "train": ("step", "tokens", "seq_len"), "eval": ("step", "tokens"), "analysis": ("step",), "event": ("step",),
}
_TEXTS = {
    "meta": ("variant", "device", "torch", "oneb", "param_dtype", "compute_dtype", "attention_backend", "data",
             "data_fingerprint"),
    "event": ("event", "message"),
}
_TABLES = {"meta": ("flops_per_token",)}
# Far beyond any loss or count, and well within a float.
_LARGEST = 1e30


@dataclass(frozen=True)
class Run:
    """What a run directory holds, in the order in which it was written.

    Attributes:
        path: the directory.
        metas: a ``meta`` row for the start and for each resume.
        train, evals, analyses, events: the rows of each type.
        config, plan: ``config.json`` and ``plan.json``; empty if they are not there.
        notes: what could not be read, for people.
    """

    path: Path
    metas: list[Row]
    train: list[Row]
    evals: list[Row]
    analyses: list[Row]
    events: list[Row]
    config: Row
    plan: Row
    notes: tuple[str, ...]

    @property
    def meta(self) -> Row:
        """The latest ``meta`` row; empty before the first one."""
        return self.metas[-1] if self.metas else {}

    def option(self, section: str, name: str) -> Any:
        """One option of ``config.json``; None if it is not there."""
        values = self.config.get(section)
        return values.get(name) if isinstance(values, dict) else None

    @property
    def name(self) -> str:
        """The run's name: its directory's, which tells runs of one configuration apart."""
        return self.path.resolve().name

    @property
    def tokens(self) -> int:
        """Tokens trained on, as far as rows tell."""
        return max((row["tokens"] for row in (*self.train, *self.evals)), default=0)

    @property
    def step(self) -> int:
        """Optimizer steps done, as far as rows tell."""
        return max((row["step"] for row in (*self.train, *self.evals)), default=0)


class PhaseRows(NamedTuple):
    """Consecutive train rows of one sequence length (tokens)."""

    seq_len: int
    rows: list[Row]


def read_run(run_dir: str | Path) -> Run:
    """Read a run directory.

    Raises:
        OnebError: it is not one, or its ``train.jsonl`` is damaged before the last line.
    """
    path = Path(run_dir)
    if not (path / ROWS_FILE).is_file():
        raise OnebError(_not_a_run(path))
    try:
        rows = read_json_lines(path / ROWS_FILE)
    except (ValueError, RecursionError) as error:
        raise OnebError(f"{error}; every line of it should be one JSON object: remove that line") from None
    whole = [row for row in map(_checked, rows) if row is not None]
    by_type = {kind: [row for row in whole if row["type"] == kind] for kind in _COUNTS}
    notes: list[str] = []
    if len(whole) < len(rows):
        notes.append(f"{len(rows) - len(whole)} rows of {ROWS_FILE} are not as a run writes them, and were left out")
    return Run(
        path=path, metas=by_type["meta"], train=by_type["train"], evals=by_type["eval"],
        analyses=by_type["analysis"], events=by_type["event"],
        config=_read_json(path / "config.json", notes), plan=_read_json(path / "plan.json", notes), notes=tuple(notes),
    )


def phase_rows(train: list[Row]) -> list[PhaseRows]:
    """Train rows in runs of equal sequence length."""
    phases: list[PhaseRows] = []
    for row in train:
        if not phases or phases[-1].seq_len != row["seq_len"]:
            phases.append(PhaseRows(row["seq_len"], []))
        phases[-1].rows.append(row)
    return phases


def known(rows: list[Row], name: str) -> list[float]:
    """The values of ``name`` that are there and are not null."""
    return [row[name] for row in rows if row.get(name) is not None]


def median(rows: list[Row], name: str) -> float | None:
    """The median of :func:`known`; None if nothing is known."""
    values = known(rows, name)
    return statistics.median(values) if values else None


def is_number(value: Any) -> bool:
    """Whether it is a number that a plot or a table can show."""
    return type(value) in (int, float) and -_LARGEST < value < _LARGEST


def printable(text: str) -> str:
    """``text`` with a mark in the place of characters that no text file should hold: controls and half code points."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def _checked(row: Any) -> Row | None:
    """A row as the report can use it; None if it is of no known type, or lacks what rows of its type have."""
    kind = row.get("type") if isinstance(row, dict) else None
    if not isinstance(kind, str) or kind not in _COUNTS:
        return None
    wanted: tuple[tuple[dict[str, tuple[str, ...]], Callable[[Any], bool]], ...] = (
        (_COUNTS, lambda value: type(value) is int and 0 <= value < _LARGEST),
        (_TEXTS, lambda value: isinstance(value, str)),
        (_TABLES, lambda value: isinstance(value, dict) and all(map(is_number, value.values()))),
    )
    if not all(fits(row.get(name)) for names, fits in wanted for name in names.get(kind, ())):
        return None
    if kind in ("train", "eval"):  # measurements, which are numbers or not there
        return {name: value if name == "type" or is_number(value) else None for name, value in row.items()}
    return row


def _read_json(path: Path, notes: list[str]) -> Row:
    if not path.exists():
        notes.append(f"{path.name} is missing")
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return found
    notes.append(f"{path.name} is damaged, and was left out")
    return {}


def _not_a_run(path: Path) -> str:
    fault = f"{path} is not a run directory: it has no {ROWS_FILE}"
    if not path.exists():
        fault = f"{path} does not exist"
    elif path.is_file():
        fault = f"{path} is a file"
    # A folder of runs, or something inside a run: name what was probably meant.
    near = [path.parent] if (path.parent / ROWS_FILE).is_file() else []
    found = [str(p.parent) for p in sorted(path.glob(f"*/{ROWS_FILE}"))] if path.is_dir() else []
    choices = [str(p) for p in near] + found
    hint = f", for instance {', '.join(choices[:3])}" if choices else " (runs/<tag>_<variant>_seed<seed>)"
    return f"{fault}; give the directory of a run{hint}"
