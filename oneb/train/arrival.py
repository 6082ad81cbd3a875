"""How the data of a run arrives, shown and recorded while it trains."""

from __future__ import annotations

import time

from oneb.data.tokens import Tokens
from oneb.show.recorder import Recorder
from oneb.train.clock import process_age_s
from oneb.units import format_duration

_LOOK_S = 1.0


class Arrival:
    """For the loop: what it waits for, how many files are there, and when all of them are.

    Args:
        tokens: what the run reads, perhaps before it is there.
    """

    def __init__(self, tokens: Tokens, recorder: Recorder) -> None:
        self._download, self._recorder = tokens.arrival, recorder
        tokens.say = recorder.status  # an evaluation reads in the loop's own thread, and waits there
        self._looked_at = float("-inf")

    def waiting(self, seconds: float) -> None:
        """Show what the next step has been waiting for so long."""
        awaited = f": {self._download.awaited()}" if self._download else ""
        self._recorder.waiting(f"waiting for data{awaited}", seconds)

    def look(self, step: int) -> None:
        """Show how many files are there; record, once, that all of them are, and what went wrong since the last look.

        For every step: does nothing more than once a second.
        """
        download = self._download
        if download is None or time.monotonic() - self._looked_at < _LOOK_S:
            return
        self._looked_at = time.monotonic()
        for fault in download.faults():
            self._recorder.warn(step, fault)
        n_files, missing = len(download.pieces), len(download.missing())
        self._recorder.arrived(n_files - missing, n_files)
        if not missing:
            self._download = None
            seconds = process_age_s()
            self._recorder.log({
                "type": "event", "step": step, "event": "data_complete", "files": n_files, "since_start_s": seconds,
                "message": f"all {n_files} files of {download.folder} are there, {format_duration(seconds)} after the "
                           "command was given",
            })
