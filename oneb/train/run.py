"""A whole run: from what was asked for, through every check that can be made beforehand, to the exit code."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch.nn.attention import sdpa_kernel

from oneb.checkpoints.disk import check_room, check_start, least_disk_use
from oneb.checkpoints.lock import check_unlocked
from oneb.checkpoints.mirror import Mirror
from oneb.checkpoints.remote import check_place, fetch_newest
from oneb.checkpoints.rundir import RunDirectory, check_writable, checkpoints, claimed, continued, run_directory
from oneb.config import Config
from oneb.files import read_json_lines
from oneb.kernels.attention import SDP_BACKENDS
from oneb.show.recorder import check_sinks, open_recorder
from oneb.train.resume import StartingPoint, restore
from oneb.train.setup import Parts, build
from oneb.train.signals import StopRequest
from oneb.train.trainer import Trainer


def train(config: Config) -> int:
    """Run ``config`` to its end, or until a signal; returns the exit code.

    Raises:
        OnebError: a mistake in what was asked for, before the first step wherever it can be known then.
    """
    bring_back(config)
    chosen = run_directory(config)
    print(f"run directory: {chosen.path}{chosen.note}", flush=True)
    if chosen.skip:
        return 0
    # Nothing is written before it is known that the run can start.
    config = continued(config, chosen)
    check_start(config, chosen)
    check_sinks(config)
    parts = build(config, print)
    # --optimizer auto has been decided, and how much of the data is still to come is known.
    arrival = parts.tokens.arrival
    check_room(parts.config, chosen, least_disk_use(parts.config), to_come=arrival and arrival.bytes_to_write)
    start = restore(parts, chosen)
    chosen = dataclasses.replace(chosen, resume_from=start.checkpoint)  # an older one, where the newest is damaged
    if _is_finished(config, chosen, start):
        print(f"nothing to do: {chosen.resume_from} has done {start.step} of {config.train.steps} steps")
        return 0
    with claimed(config, chosen) as directory, StopRequest() as stop:
        if directory != chosen:
            print(f"run directory: {directory.path}{directory.note}", flush=True)
        if not directory.skip:
            _run(parts, directory, stop, start)
        return stop.exit_code


def _is_finished(config: Config, directory: RunDirectory, start: StartingPoint) -> bool:
    """Whether nothing is left to do. The evaluation at the end is, where its row is missing from the run's own."""
    if start.step != config.train.steps:
        return start.step > config.train.steps
    try:
        rows = read_json_lines(directory.path / "train.jsonl")
    except (OSError, ValueError):  # fallback: without a record nobody can say that something is missing from it
        return True
    return any((row.get("type"), row.get("step")) == ("eval", start.step) for row in rows)


def bring_back(config: Config) -> None:
    """See that ``--save-to`` works; where a run is to be continued that is only there, fetch its newest checkpoint.

    Raises:
        OnebError: it does not work, or nothing there is whole.
    """
    run = config.run
    if not run.save_to:
        return
    check_place(run.save_to)
    directory = Path(run.root) / config.name
    continues = run.resume and not run.ckpt or run.if_exists == "resume"
    if continues and not checkpoints(directory)[0]:
        check_writable(directory)
        check_unlocked(directory)
        fetch_newest(run.save_to, directory, print)


def _run(parts: Parts, directory: RunDirectory, stop: StopRequest, start: StartingPoint) -> None:
    config = parts.config
    with open_recorder(config, directory) as recorder, sdpa_kernel(SDP_BACKENDS[parts.backend]):
        mirror = Mirror(config.run.save_to, directory.path, say=recorder.status) if config.run.save_to else None
        trainer = Trainer(parts, directory, recorder, stop, start, mirror)
        try:
            trainer.describe()
            try:
                trainer.run()
            except Exception as error:
                trainer.rescue(error)
                raise
            trainer.finish()
        finally:
            trainer.saver.close()
