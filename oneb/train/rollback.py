"""Where a run that went wrong goes back to."""

from __future__ import annotations

from pathlib import Path

from oneb.checkpoints.rundir import checkpoints, is_on_course, read_sidecar
from oneb.train.watch import Verdict


def checkpoints_before(directory: Path, verdict: Verdict, skips: tuple[tuple[int, int], ...]) -> list[Path]:
    """The checkpoints to go back to, the best first; more than one as contents have not been read.

    The newest from before all that ``verdict`` suspects, then those from before what shows it.

    Args:
        skips: data that the run has passed over so far. Checkpoints that have read it are of a course that the run
            has left, and no part of it.
    """
    found = {path: read_sidecar(path) for path in checkpoints(directory)[0]}
    steps = {path: values["step"] for path, values in found.items() if is_on_course(values, skips)}
    fitting = [path for path, step in steps.items() if step <= verdict.shown_step]
    return sorted(fitting, key=lambda path: (steps[path] <= verdict.first_step, steps[path]), reverse=True)
