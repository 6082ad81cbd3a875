"""What a run records, sent to everything that listens: ``train.jsonl``, the display, W&B, TensorBoard."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oneb.checkpoints.rundir import RunDirectory, read_sidecar
from oneb.config import Config
from oneb.inspect.plots import write_plots
from oneb.inspect.report import write_report
from oneb.inspect.summary import write_summary
from oneb.schedules import tokens_before
from oneb.show.display import make_display
from oneb.show.screen import Display
from oneb.show.sinks import JsonlSink, Sink, check_installed
from oneb.show.tensorboard_sink import TensorBoardSink
from oneb.show.wandb_sink import WandbSink


def check_sinks(config: Config) -> None:
    """Refuse, before anything is built, what this machine cannot log to.

    Raises:
        OnebError: a package that an option needs is not installed.
    """
    if config.log.wandb:
        check_installed("--wandb", "wandb", "the W&B client")
    if config.log.tensorboard:
        check_installed("--tensorboard", "tensorboard", "TensorBoard")


class Recorder:
    """Sends each row to every sink. For one thread: the loop's."""

    def __init__(self, directory: Path, display: Display, sinks: list[Sink]) -> None:
        self.directory = directory
        self.display = display
        self.sinks = sinks
        self._step = 0  # of the latest row
        self._evaluated: set[int] = set()  # steps whose evaluation is recorded

    def log(self, row: dict[str, Any]) -> None:
        """Record one row of ``train.jsonl``.

        A checkpoint is saved before the evaluation of its step, so a run that goes back to it may evaluate again: that
        row is shown, and not recorded twice.
        """
        self._step = row.get("step", row.get("start_step", self._step))
        again = row["type"] == "eval" and row["step"] in self._evaluated
        for sink in [self.display] if again else self.sinks:
            sink.log(row)
        if row["type"] == "eval":
            self._evaluated.add(row["step"])
        self._tell(self.sinks)

    def rewind(self, step: int) -> None:
        """The run goes back to ``step``, in this process: later rows come again, and those there are set aside."""
        for sink in self.sinks:
            sink.rewind(step)
        self._evaluated = {there for there in self._evaluated if there <= step}
        self._tell(self.sinks)

    def status(self, text: str) -> None:
        """Show, and do not record, what is being waited for."""
        self.display.status(text)

    def waiting(self, text: str, seconds: float) -> None:
        """Show, and do not record, what the loop has been waiting for so long; to be called about once a second."""
        self.display.waiting(text, seconds)

    def arrived(self, n_files: int, of: int) -> None:
        """Show, and do not record, how many files of the data are there, until all are."""
        self.display.progress.data = f"{n_files}/{of}" if n_files < of else None

    def advance(self, step: int) -> None:
        """Show, and do not record, that ``step`` steps are done."""
        self.display.advance(step)

    def refresh_report(self, step: int) -> None:
        """Redraw the plots, the summary and the report from what is recorded so far."""
        try:
            write_plots(self.directory)
            write_summary(self.directory)
            write_report(self.directory)
        except Exception as error:  # fallback: a run of days must not end because of a picture of it
            self.warn(step, f"the report could not be written ({type(error).__name__}: {error}); "
                      f"`oneb report {self.directory}` tries again")

    def warn(self, step: int, message: str) -> None:
        """Record and show something that is not as it was meant to be, and that the run goes on without."""
        self.log({"type": "event", "step": step, "event": "warning", "message": message})

    def add(self, sink: Sink) -> None:
        """Send rows to ``sink`` as well, and its warnings to all."""
        if isinstance(sink, JsonlSink):
            self.sinks.insert(0, sink)  # the record comes before what is made of it
            self._evaluated |= sink.evaluated
        else:
            self.sinks.append(sink)
        self._tell([sink])

    def remove(self, sink: Sink) -> None:
        """Close ``sink``, which gets no more rows; what it has to say of that goes to the others."""
        self.sinks.remove(sink)
        sink.close()
        self._tell([sink])

    def _tell(self, sinks: list[Sink]) -> None:
        for sink in sinks:
            told, sink.warnings = list(sink.warnings), []
            for message in told:
                self.warn(self._step, message)


@contextlib.contextmanager
def open_recorder(config: Config, directory: RunDirectory) -> Iterator[Recorder]:
    """The sinks that ``config`` asks for; closed when the run ends, whatever ends it."""
    resume_step = read_sidecar(directory.resume_from)["step"] if directory.resume_from else None
    train = config.train
    with contextlib.ExitStack() as stack:
        display = make_display(
            config.log.live, steps=train.steps, start_step=resume_step or 0, name=directory.path.name,
            stream=sys.stdout, total_tokens=tokens_before(train.phases, train.steps, train.sequences),
        )
        recorder = Recorder(directory.path, display, [])

        def opened(sink: Any) -> Any:
            stack.callback(recorder.remove, sink)
            recorder.add(sink)
            return sink

        opened(display)
        rows = opened(JsonlSink(directory.path / "train.jsonl", resume_step))
        if config.log.wandb:
            recorder.status("connecting to W&B")
            opened(WandbSink(config, directory.path, rows.newest_step))
        if config.log.tensorboard:
            opened(TensorBoardSink(directory.path, resume_step))
        yield recorder
