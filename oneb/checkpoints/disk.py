"""Whether a run can write where it is to, and whether there is room: before it starts, and before each save.

Imports no torch: the launcher asks the same questions.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from oneb.checkpoints.lock import check_unlocked
from oneb.checkpoints.rundir import BEST, LAST, RunDirectory, previous_path, read_sidecar
from oneb.config import Config
from oneb.errors import OnebError
from oneb.planner import Disk, disk_use, settled
from oneb.units import format_gib

_ROW_BYTES = 512  # of train.jsonl
_PLOTS_BYTES = 2**20  # with the summary and the page that shows them


def check_start(config: Config, directory: RunDirectory) -> None:
    """That a run may write in its directory, that nobody else does, and that its checkpoints will find room.

    For before anything is built. Nothing is left there.

    Args:
        config: settled by the device or not: what is still open is counted as little as it can become.

    Raises:
        OnebError: the run cannot start there, with what would help.
    """
    if directory.skip:
        return
    check_unlocked(directory.path)
    there = _existing(directory.path)
    try:
        # More than permissions can say: quotas, and servers that know this user by another name.
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OnebError(f"{directory.path} cannot be written: in {there} no file can be made ({error.strerror}); make "
                        "that possible, or choose another --run-root") from error
    check_room(config, directory, least_disk_use(config))


def least_disk_use(config: Config) -> Disk:
    """What the checkpoints will take, before anything has been measured: not more than they will."""
    if config.optim.optimizer == "auto":
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, optimizer="lion8bit"))
    return disk_use(settled(config))


def check_room(config: Config, directory: RunDirectory, disk: Disk, reclaimed: int = 0,
               to_come: Callable[[Path], int] | None = None) -> None:
    """That the run's checkpoints will find room, beside those that are there already.

    Args:
        disk: their sizes.
        reclaimed: bytes in use now that will not be.
        to_come: bytes that will be in use on the disk of a folder, by something else than checkpoints.

    Raises:
        OnebError: they will not.
    """
    start_step = read_sidecar(directory.resume_from)["step"] if directory.resume_from else 0
    if start_step >= config.train.steps:
        return
    new_files, needed = _still_needed(config, disk, start_step, _present(directory.path))
    there = _existing(directory.path)
    free, others = _free_bytes(there), to_come(there) if to_come else 0
    if free is None or needed <= free + reclaimed - others:
        return
    fixes = ["another --run-root"]
    if config.run.keep_last == 0 and new_files > 1:
        fixes.insert(0, "--keep-last 2")
    if new_files:
        fixes.insert(0, f"a larger --save-every (now {config.run.save_every}, which makes {new_files} more "
                        f"file{'s' * (new_files > 1)})")
    if config.run.save_optim:
        fixes.append("--no-save-optim (the run can then not be resumed exactly)")
    taken = f", of which data that is still to come takes {format_gib(others)}" if others else ""
    raise OnebError(f"the run's checkpoints take {format_gib(needed)} ({format_gib(disk.last_bytes)} each, best.pt "
                    f"{format_gib(disk.best_bytes)}; with its log), and {there} has {format_gib(free + reclaimed)} "
                    f"free{taken}; make room, or give {', or '.join(fixes)}")


def room_for(path: Path, n_bytes: int) -> str | None:
    """Why a new file of ``n_bytes`` cannot be written now, for people; None if it can.

    Args:
        path: the file to be, or its folder.
    """
    folder = path if os.path.isdir(path) else path.parent
    try:
        found = os.statvfs(folder)
    except OSError as error:
        return f"{folder} cannot be reached ({error.strerror})"
    if found.f_flag & os.ST_RDONLY:
        return f"{folder} is on a file system that is mounted read-only"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} gives this user no permission to write"
    if found.f_files and not found.f_favail:
        return f"the disk of {folder} has no room for another file (no inode is free)"
    free = _free_bytes(folder)
    if free is not None and free < n_bytes:
        return f"{folder} has {format_gib(free)} free, and {format_gib(n_bytes)} are needed"
    return None


# ---- parts of these

@dataclass(frozen=True)
class _Present:
    """What is in a run directory: ``step*.pt`` files, and bytes of others that the run will free or fill again."""

    step_files: int
    others_bytes: int


def _present(directory: Path) -> _Present:
    steps, others = {}, {}  # by inode: two names of one file take its room once
    named = [directory / LAST, previous_path(directory / LAST), directory / BEST]
    for found, paths in ((steps, directory.glob("step*.pt")), (others, [*named, *directory.glob(".*.tmp*")])):
        for path in paths:
            if path.is_file():
                status = path.stat()
                found[status.st_dev, status.st_ino] = status.st_size
    return _Present(len(steps), sum(size for file, size in others.items() if file not in steps))


def _still_needed(config: Config, disk: Disk, start_step: int, present: _Present) -> tuple[int, int]:
    """How many more ``step*.pt`` there will be than there are, and bytes that must be free for the fullest moment.

    For a new run these are what :func:`oneb.planner.disk_use` counts, and the log.
    """
    run, steps = config.run, config.train.steps
    still_saved = new_files = steps // run.save_every - start_step // run.save_every if run.save_every else 0
    if run.keep_last > 0:
        new_files = min(still_saved, max(0, run.keep_last - present.step_files))
    # last.pt has room of its own, unless it is the newest step*.pt whenever there are most of these.
    own_last = not run.save_every or steps % run.save_every > 0 or new_files < still_saved
    # And one more: a new file is whole before the one goes that it replaces.
    needed = (new_files + own_last + 1) * disk.last_bytes + disk.best_bytes - present.others_bytes
    # Asked for only once: a disk on which a run may start is one on which it may be resumed.
    log = 0 if start_step else _PLOTS_BYTES + steps // config.log.log_every * _ROW_BYTES
    return new_files, max(needed + log, disk.last_bytes)


def _existing(path: Path) -> Path:
    """``path``, or the folder above it in which it would be made."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _free_bytes(folder: Path) -> int | None:
    """What this user may still write; None where the file system does not tell (network drives, limitless ones)."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else None
