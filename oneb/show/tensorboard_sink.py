"""A run's charts as TensorBoard event files, in the run directory's ``tensorboard`` folder."""

from __future__ import annotations

import io
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

from oneb.errors import OnebError
from oneb.show.sinks import CHARTED, RecordFile, chart_values, check_installed

FOLDER = "tensorboard"
_PREFIX = "events.out.tfevents."


class TensorBoardSink:
    """Charts for ``tensorboard --logdir RUN_DIRECTORY``: train, eval and analysis rows, over the optimizer step.

    Every row is in the file as soon as it is logged; while the disk is full, rows wait in memory. Where the run goes
    back, a session-start event says from which step on TensorBoard forgets what it has read: so each step is shown
    once. That works through the files' order, which is that of their names; a clock that was set back does not change
    it.

    Args:
        run_dir: the run directory; must exist.
        resume_step: the step that the run continues from; None for a run from step 0.

    Raises:
        OnebError: TensorBoard is not installed, or the folder cannot be written.
    """

    def __init__(self, run_dir: Path, resume_step: int | None = None) -> None:
        check_installed("--tensorboard", "tensorboard", "TensorBoard")
        self.warnings: list[str] = []
        folder = run_dir / FOLDER
        try:
            folder.mkdir(exist_ok=True)
            path = _new_path(folder)
        except OSError as error:
            raise OnebError(f"{folder} cannot be written ({error.strerror or error}); make room or give permission "
                            "there, or leave out --tensorboard") from None
        self._file = RecordFile(path)
        self._append(file_version="brain.Event:2")
        self._forget_from(0 if resume_step is None else resume_step + 1)

    def log(self, row: dict[str, Any]) -> None:
        """Chart a train, eval or analysis row."""
        if row["type"] not in CHARTED:
            return
        values = chart_values(row)
        if "tokens" in row:
            values[f"{row['type']}/tokens"] = row["tokens"]
        known = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._append(step=row["step"], summary={"value": [
            {"tag": name, "simple_value": value} for name, value in known.items()
        ]})

    def rewind(self, step: int) -> None:
        """TensorBoard forgets what is past ``step``."""
        self._forget_from(step + 1)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        if self._file.fault:
            self.warnings.append(f"{self._file.waiting} rows for TensorBoard could not be written "
                                 f"({self._file.fault.strerror}); train.jsonl may have them")

    def _forget_from(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._append(step=step, session_log={"status": SessionLog.START})

    def _append(self, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        framed = io.BytesIO()
        RecordWriter(framed).write(Event(wall_time=time.time(), **event).SerializeToString())
        failing = self._file.fault
        self._file.append(framed.getvalue())
        if self._file.fault and not failing:
            self.warnings.append(f"{self._file.path} cannot be written ({self._file.fault.strerror}): its rows are "
                                 "kept in memory until it can")


def _new_path(folder: Path) -> Path:
    """A file behind all others, made: their names begin with the time, or one more where the clock was set back."""
    taken = [int(path.name.removeprefix(_PREFIX).split(".")[0]) for path in folder.glob(f"{_PREFIX}[0-9]*")]
    number = max([int(time.time()), *(time_ + 1 for time_ in taken)])
    path = folder / f"{_PREFIX}{number:010d}.{socket.gethostname()}.{os.getpid()}.0"
    path.touch()
    return path
