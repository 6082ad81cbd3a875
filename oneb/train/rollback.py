"""Where a run that went wrong goes back to."""

from __future__ import annotations

from pathlib import Path

from oneb.train.rundir import checkpoints, read_sidecar
from oneb.train.watch import Verdict


def checkpoint_before(directory: Path, verdict: Verdict) -> Path | None:
    """The newest whole checkpoint from before all that ``verdict`` suspects, or else from before what shows it.

    None where there is neither.
    """
    steps = {path: read_sidecar(path)["step"] for path in checkpoints(directory)[0]}
    for limit in (verdict.first_step, verdict.shown_step):
        if fitting := {path: step for path, step in steps.items() if step <= limit}:
            return max(fitting, key=fitting.__getitem__)
    return None
