"""Where a run's rows go: ``train.jsonl``, which is the run's record, and what all such places share."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
from collections import deque
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from oneb.errors import OnebError
from oneb.files import atomic_writer, read_json_lines

# Rows that become charts, and the prefix of their names there.
CHARTED = ("train", "eval", "analysis")


class Sink(Protocol):
    """Takes every row of a run, in order, from one thread.

    Attributes:
        warnings: what went wrong and did not end the run, for the recorder to take out and record.
    """

    warnings: list[str]

    def log(self, row: dict[str, Any]) -> None:
        """Take one row; its ``type`` is meta, train, eval, analysis or event."""

    def rewind(self, step: int) -> None:
        """The run goes back to ``step``: what was logged of later steps does not count, and they come again."""

    def close(self) -> None:
        """Write out what is held back. Nothing is logged afterwards."""


def check_installed(option: str, package: str, name: str) -> None:
    """Refuse an ``option`` whose ``package``, which people call ``name``, this machine does not have.

    Raises:
        OnebError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise OnebError(f"{option} needs {name}, which is not installed; `python3 -m pip install {package}`, or leave "
                        f"out {option}")


def finite(value: Any) -> Any:
    """``value`` with every NaN and infinity in it replaced by None, which JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return value


def chart_values(row: dict[str, Any]) -> dict[str, float]:
    """A row's values as scalars by name, without step and tokens: ``{"type": "train", "loss": 3.0}`` ->
    ``{"train/loss": 3.0}``. Dicts by key, lists by layer, and a layer's values by head as their mean."""
    values: dict[str, float] = {}
    for name, value in row.items():
        if name not in ("type", "step", "tokens"):
            _flatten(f"{row['type']}/{name}", value, values)
    return values


def _flatten(name: str, value: Any, into: dict[str, float]) -> None:
    if isinstance(value, dict):
        for key, entry in value.items():
            _flatten(f"{name}/{key}", entry, into)
    elif isinstance(value, (list, tuple)):
        for layer, entry in enumerate(value):
            mean = sum(entry) / len(entry) if isinstance(entry, (list, tuple)) else entry
            _flatten(f"{name}/layer_{layer:02d}", mean, into)
    elif isinstance(value, (int, float)):
        into[name] = value


class RecordFile:
    """A file that whole records are appended to, each handed to the system as soon as it is given.

    A record that cannot be written (the disk is full, or gone) waits in memory with what comes behind it, and all of
    it is tried again with the next one. What was written of it is cut off: the file ends with a whole record.

    Attributes:
        fault: why records are waiting; None when all are written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fault: OSError | None = None
        self._waiting: deque[bytes | Callable[[], None]] = deque()
        self._file: FileIO | None = None
        self._end: int | None = None  # of the last whole record

    @property
    def waiting(self) -> int:
        """Records that are not written yet."""
        return sum(isinstance(entry, bytes) for entry in self._waiting)

    def append(self, record: bytes) -> None:
        """Write ``record``, after what waits."""
        self._waiting.append(record)
        self.flush()

    def replace(self, action: Callable[[], None]) -> None:
        """Once all that was given before is written, and before what comes after: put another file in its place."""
        self._waiting.append(action)
        self.flush()

    def flush(self) -> None:
        """Try to write what waits."""
        try:
            while self._waiting:
                if isinstance(entry := self._waiting[0], bytes):
                    self._write(entry)
                else:
                    self._let_go()
                    entry()
                    self._end = None
                self._waiting.popleft()
            self.fault = None
        except OSError as error:
            self.fault = error
            with contextlib.suppress(OSError):  # else before the next record
                self._cut_torn_end()
            self._let_go()

    def close(self) -> None:
        """Try once more to write what waits, and close the file."""
        self.flush()
        self._let_go()

    def _write(self, record: bytes) -> None:
        if self._file is None:
            # After a fault it is opened anew: the folder may have been away, or be a network's.
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by _let_go)
            self._end = self._file.tell() if self._end is None else self._end
            self._cut_torn_end()
        left = memoryview(record)
        while left:  # a disk that fills up takes a part first, and refuses the next one
            left = left[self._file.write(left):]
        self._end = self._file.tell()

    def _cut_torn_end(self) -> None:
        if self._file and self._end is not None and os.fstat(self._file.fileno()).st_size > self._end:
            self._file.truncate(self._end)

    def _let_go(self) -> None:
        if self._file:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None


class JsonlSink:
    """One JSON object a line, each on disk as soon as it is logged.

    While the disk is full, rows wait in memory; the run goes on, and is warned once.

    Args:
        path: ``train.jsonl``; made if it is not there.
        resume_step: the optimizer step that the run continues from; None for a run from step 0. What an earlier
            attempt wrote past that step is moved to ``train.cut-<n>.jsonl`` beside it, since this run writes
            those steps again.

    Attributes:
        newest_step: the highest step that any attempt has recorded; -1 for none.
        evaluated: the steps whose evaluation was recorded and stays.

    Raises:
        OnebError: the file is damaged before its last line, or cannot be written.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.warnings: list[str] = []
        self.newest_step = -1
        self.evaluated: set[int] = set()
        self._file = RecordFile(self.path)
        try:
            if self.path.exists():
                self._cut(-1 if resume_step is None else resume_step)
            self.path.touch()
        except OSError as error:
            raise OnebError(f"{self.path} cannot be written ({error.strerror or error}); make room or give "
                            "permission there, or choose another --run-root") from None

    def log(self, row: dict[str, Any]) -> None:
        """Append one row. NaN and infinities become null."""
        self._tell_of(lambda: self._file.append(_line(row)))

    def rewind(self, step: int) -> None:
        """Move the rows past ``step`` to ``train.cut-<n>.jsonl``."""
        def cut() -> None:
            try:
                self._cut(step)
            except OnebError as error:  # the run is under way, and more than its record
                self.warnings.append(f"rows past step {step} stay: {error}")

        self._tell_of(lambda: self._file.replace(cut))

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        if self._file.fault:
            self.warnings.append(f"{self._file.waiting} rows of {self.path} could not be written "
                                 f"({self._file.fault.strerror}) and are lost")

    def _tell_of(self, work: Callable[[], None]) -> None:
        """Do ``work``, and warn when writing begins to fail, or works again."""
        before, waited = self._file.fault, self._file.waiting
        work()
        fault = self._file.fault
        if fault and not before:
            self.warnings.append(f"{self.path.name} cannot be written ({fault.strerror}): rows are kept in memory "
                                 "until it can")
        elif before and not fault:
            self.warnings.append(f"{self.path.name} can be written again: the {waited} rows kept in memory are in it")

    def _cut(self, last_step: int) -> None:
        try:
            rows = read_json_lines(self.path)
        except ValueError as error:
            raise OnebError(f"{error}; every line of it should be one JSON object: remove that line "
                            "to continue the run") from None
        if odd := next((n for n, row in enumerate(rows, 1) if not _is_row(row)), None):
            raise OnebError(f"{self.path}: line {odd} is no row of a run; remove that line to continue the run")
        kept = [row for row in rows if _step_of(row) <= last_step]
        cut = [row for row in rows if _step_of(row) > last_step]
        self.newest_step = max([self.newest_step, *map(_step_of, rows)])
        self.evaluated = {_step_of(row) for row in kept if row["type"] == "eval"}
        if cut:
            # First the copy, then the cut: a kill between the two loses nothing.
            _write_lines(_free_name(self.path), cut)
            _write_lines(self.path, kept)
        else:
            _end_whole(self.path)


def _is_row(row: Any) -> bool:
    """Whether it is an object with a type and a whole number of steps."""
    if not isinstance(row, dict) or not isinstance(row.get("type"), str):
        return False
    return type(_step_of(row)) is int


def _step_of(row: dict[str, Any]) -> int:
    # A meta row stands before the steps that it describes.
    return row.get("start_step" if row["type"] == "meta" else "step", 0)


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(finite(row), allow_nan=False) + "\n").encode()


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_writer(path) as file:
        file.writelines(_line(row) for row in rows)


def _end_whole(path: Path) -> None:
    """Cut off what a kill left of the last line, which must not run into the next one. In place: needs no room."""
    with open(path, "r+b") as file:
        text = file.read()
        last = text.splitlines(keepends=True)[-1] if text else b"\n"
        try:
            json.loads(last.strip() or b"0")
        except ValueError:
            file.truncate(len(text) - len(last))
        else:
            if not last.endswith(b"\n"):
                file.write(b"\n")


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.stem}.cut-{number}{path.suffix}")).exists():
        number += 1
    return candidate
