"""What a run records, sent to everything that listens: ``train.jsonl``, the display, W&B."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oneb.config import Config
from oneb.inspect.plots import write_plots
from oneb.inspect.summary import write_summary
from oneb.schedules import tokens_before
from oneb.train.display import make_display
from oneb.train.rundir import RunDirectory, read_sidecar
from oneb.train.screen import Display
from oneb.train.sinks import JsonlSink, Sink, WandbSink


class Recorder:
    """Sends each row to every sink."""

    def __init__(self, directory: Path, display: Display, sinks: list[Sink]) -> None:
        self.directory = directory
        self.display = display
        self.sinks = sinks

    def log(self, row: dict[str, Any]) -> None:
        """Record one row of ``train.jsonl``."""
        for sink in self.sinks:
            sink.log(row)

    def status(self, text: str) -> None:
        """Show, and do not record, what is being waited for."""
        self.display.status(text)

    def advance(self, step: int) -> None:
        """Show, and do not record, that ``step`` steps are done."""
        self.display.advance(step)

    def refresh_report(self, step: int) -> None:
        """Redraw the plots and the summary from what is recorded so far."""
        try:
            write_plots(self.directory)
            write_summary(self.directory)
        except Exception as error:  # fallback: a run of days must not end because of a picture of it
            self.warn(step, f"the report could not be written ({type(error).__name__}: {error}); "
                      f"`oneb report {self.directory}` tries again")

    def warn(self, step: int, message: str) -> None:
        """Record and show something that is not as it was meant to be, and that the run goes on without."""
        self.log({"type": "event", "step": step, "event": "warning", "message": message})


@contextlib.contextmanager
def open_recorder(config: Config, directory: RunDirectory) -> Iterator[Recorder]:
    """The sinks that ``config`` asks for; closed when the run ends, whatever ends it."""
    resume_step = read_sidecar(directory.resume_from)["step"] if directory.resume_from else None
    train = config.train
    with contextlib.ExitStack() as stack:
        def opened(sink: Any) -> Any:
            stack.callback(sink.close)
            return sink

        display = opened(make_display(
            config.log.live, steps=train.steps, start_step=resume_step or 0, name=directory.path.name,
            stream=sys.stdout, total_tokens=tokens_before(train.phases, train.steps, train.sequences),
        ))
        sinks: list[Sink] = [opened(JsonlSink(directory.path / "train.jsonl", resume_step)), display]
        recorder = Recorder(directory.path, display, sinks)
        if config.log.wandb:
            recorder.status("connecting to W&B")
            charts = opened(WandbSink(config, directory.path))
            sinks.append(charts)
            if charts.warning:
                recorder.warn(resume_step or 0, charts.warning)
        yield recorder
