"""Where a run lives, and whether it may start or continue there. No torch: the launcher asks the same questions."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneb.changes import Change, as_before, changes, known_options, notes, refusal
from oneb.checkpoints.lock import RunLock
from oneb.config import Config, model_differences, model_from_dict
from oneb.errors import OnebError

LAST = "last.pt"
BEST = "best.pt"
_LARGEST_SIDECAR = 2**20  # bytes, of a few thousand


class CheckpointError(OnebError):
    """There is no whole checkpoint at a path."""


@dataclass(frozen=True)
class RunDirectory:
    """The directory a run will write to.

    Attributes:
        path: the directory.
        is_new: nothing is there yet.
        resume_from: checkpoint to continue exactly, or None for a run from step 0.
        older: the run's checkpoints before that one, newest first, for where its content turns out to be damaged.
        skip: there is nothing to do (``--if-exists skip``).
        note: how the choice came about, for people; empty for a new directory.
        lock: that of the process which :func:`claimed` the directory.
    """

    path: Path
    is_new: bool = False
    resume_from: Path | None = None
    older: tuple[Path, ...] = ()
    skip: bool = False
    note: str = ""
    lock: RunLock | None = dataclasses.field(default=None, compare=False, repr=False)


def run_directory(config: Config) -> RunDirectory:
    """Choose the run directory by name, ``--resume`` and ``--if-exists``. Creates nothing.

    Raises:
        OnebError: it exists under ``--if-exists error``, cannot be written to, or has no whole checkpoint to resume.
    """
    path = Path(config.run.root) / config.name
    check_writable(path)
    if not config.run.resume:
        return _for_new_run(path, config.run.if_exists)
    if not config.run.ckpt:
        others = [p.parent for p in sorted(path.parent.glob(f"{path.name}_*/{LAST}")) if _is_suffixed(p.parent, path)]
        if others:
            raise OnebError(f"--resume alone cannot tell which run to continue: there are {path} and "
                            f"{', '.join(map(str, others))}; add --ckpt {others[-1] / LAST}, or that of the other")
        if own := _continued_run(path, "continues"):
            return own
    checkpoint = Path(config.run.ckpt or path / LAST)
    read_sidecar(checkpoint)
    home = checkpoint.parent
    if home.resolve() == path.resolve() or _is_suffixed(home, path):
        return RunDirectory(home, resume_from=checkpoint, note=f" (continues {checkpoint})")
    # Another run's checkpoint: it continues in a directory of this run's name, and never on top of one that is there.
    policy = config.run.if_exists
    chosen = _for_new_run(path, "error" if policy == "resume" else policy)
    return dataclasses.replace(chosen, resume_from=checkpoint, note=f"{chosen.note} (continues {checkpoint})")


def _for_new_run(path: Path, policy: str) -> RunDirectory:
    if not path.exists():
        return RunDirectory(path, is_new=True)
    if policy == "error":
        raise OnebError(f"{path} exists, and may not be written over; choose another --tag or --seed, "
                        "or --if-exists suffix|skip")
    if policy == "skip":
        return RunDirectory(path, skip=True, note=" (exists: skipped)")
    if policy == "resume":
        nothing = RunDirectory(path, note=" (exists, with nothing saved to resume: starts at step 0)")
        return _continued_run(path, "exists: continues") or nothing
    number = 2
    while (candidate := path.with_name(f"{path.name}_{number}")).exists():
        number += 1
    return RunDirectory(candidate, is_new=True, note=f" ({path.name} exists)")


def _continued_run(path: Path, how: str) -> RunDirectory | None:
    """The run in ``path``, continued from its newest whole checkpoint; None where nothing was ever saved.

    Raises:
        CheckpointError: something was saved, and none of it is whole.
    """
    found, faults = checkpoints(path)
    if found:
        note = f" ({how} {'; passed over: '.join([str(found[0]), *faults])})"
        return RunDirectory(path, resume_from=found[0], older=tuple(found[1:]), note=note)
    if faults:
        raise none_whole(path, faults)
    return None


def none_whole(path: Path, faults: list[str]) -> CheckpointError:
    """That none of the checkpoints in ``path`` can be continued, and why not."""
    return CheckpointError(f"no checkpoint in {path} is whole: {'; '.join(faults)}. Copy one there again with its "
                           ".json, or choose another --tag or --seed to train from the start")


def _is_suffixed(directory: Path, path: Path) -> bool:
    """Whether ``directory`` is ``path`` with a number that ``--if-exists suffix`` added."""
    return re.fullmatch(rf"{re.escape(path.name)}_\d+", directory.name) is not None


def check_writable(path: Path) -> None:
    """That a directory can be there, or be made there. Creates nothing.

    Raises:
        OnebError: what is in the way.
    """
    there = path.absolute()
    while True:
        try:
            os.lstat(there)
            break
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            there = there.parent
        except OSError as error:  # a name that is too long, links in a circle, a disk that does not answer
            raise OnebError(f"{path} cannot be used: {error.strerror} ({there}); choose another --run-root") from error
    if os.path.islink(there) and not os.path.exists(there):
        raise OnebError(f"{path} cannot be made: {there} is a link to {os.readlink(there)}, which is not there (is its "
                        "disk mounted?); choose another --run-root")
    if not os.path.isdir(there):
        raise OnebError(f"{path} cannot be made: {there} is a file; choose another --run-root")
    if not os.access(there, os.W_OK | os.X_OK):
        read_only = os.statvfs(there).f_flag & os.ST_RDONLY
        why = "is on a file system that is mounted read-only" if read_only else "gives this user no permission"
        raise OnebError(f"{path} cannot be written: {there} {why}; choose another --run-root")


@contextlib.contextmanager
def claimed(config: Config, directory: RunDirectory) -> Iterator[RunDirectory]:
    """Make the directory and hold it for one process; gives the directory that it became, with its lock.

    A new run whose name was taken since it was chosen is treated as ``--if-exists`` says. What killed processes had
    begun to write there is removed. A lock that another machine left there is watched for a minute.

    Raises:
        OnebError: another process is training there, or the directory cannot be made.
    """
    while not directory.skip:
        try:
            directory.path.mkdir(parents=True, exist_ok=not directory.is_new)
            break
        except OSError as error:
            # Somebody else's, or what is in the way was put there since; the choice is made again, or refused.
            if not isinstance(error, FileExistsError) or not directory.path.is_dir():
                check_writable(directory.path)
                raise OnebError(f"{directory.path} cannot be made: {error.strerror}; choose another --run-root"
                                ) from error
            directory = run_directory(config)
    if directory.skip:
        yield directory
        return
    with RunLock(directory.path) as lock:
        for abandoned in directory.path.glob(".*.tmp*"):
            abandoned.unlink(missing_ok=True)
        yield dataclasses.replace(directory, lock=lock)


def checkpoints(directory: Path) -> tuple[list[Path], list[str]]:
    """The checkpoints in ``directory`` that a run can be continued from, and what is wrong with those that cannot be.

    The newest comes first: by the order in which they were saved, since a run that went back to an earlier checkpoint
    saves earlier steps later. Contents are not read.
    """
    found, faults = [], []
    for path in (directory / LAST, previous_path(directory / LAST), *sorted(directory.glob("step*.pt"))):
        if path.is_file():
            try:
                sidecar = read_sidecar(path)
            except CheckpointError as error:
                faults.append(fault(error))
            else:
                found.append((sidecar["serial"], sidecar["step"], path))
    found.sort(key=lambda entry: entry[:2], reverse=True)
    return [path for _, _, path in found], faults


def is_on_course(sidecar: dict[str, Any], skips: tuple[tuple[int, int], ...]) -> bool:
    """Whether all that a checkpoint has read was read in a run that has passed over ``skips``, too."""
    known = sidecar["skips"]
    return known == skips[:len(known)] and all(sidecar["step"] <= first for first, _ in skips[len(known):])


def fault(error: CheckpointError) -> str:
    """What is wrong, without the advice behind it."""
    return str(error).split(";")[0]


def previous_path(checkpoint: Path) -> Path:
    """Where a checkpoint stays while a new one takes its name."""
    return checkpoint.with_name(f"{checkpoint.stem}.previous{checkpoint.suffix}")


def sidecar_path(checkpoint: Path) -> Path:
    """The JSON file whose presence says that a checkpoint is whole."""
    return checkpoint.with_name(checkpoint.name + ".json")


def read_sidecar(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's sidecar: step, tokens, best_val_loss, sha256, bytes, model, optimizer, config, serial, skips.

    ``serial`` counts the saves into a directory, ``config`` is the whole of the run's by section
    (:func:`oneb.changes.known_options`), ``skips`` the data passed over as pairs (step, batches); 0 and empty where an
    earlier version saved.

    Raises:
        CheckpointError: the checkpoint or its sidecar is not there, is not what its name says, or is of another size.
    """
    if not checkpoint.is_file():
        raise CheckpointError(f"no checkpoint at {checkpoint}; give --ckpt RUN_DIRECTORY/last.pt (same --tag, "
                              "--variant and --seed as the run to continue), or leave out --resume to start a new run")
    sidecar = sidecar_path(checkpoint)
    try:
        with open(sidecar, "rb") as file:
            found = _sidecar_values(file.read(_LARGEST_SIDECAR + 1))
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint} has no {sidecar.name} beside it: its save was cut short, or the file "
                              "was copied alone; copy both files, or use an older checkpoint of the run") from None
    except OSError as error:
        raise CheckpointError(f"{sidecar} cannot be read ({error.strerror}); copy it again, or use an older checkpoint "
                              "of the run") from None
    # Too deep, too many digits, not UTF-8, not JSON, other types: whatever is in a file.
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        raise CheckpointError(f"{sidecar} is damaged; copy it again, or use an older checkpoint of the run") from None
    if (size := checkpoint.stat().st_size) != found["bytes"]:
        raise CheckpointError(f"{checkpoint} has {size:,} bytes, its sidecar says {found['bytes']:,}: it is cut short "
                              "or was overwritten; copy it again, or use an older checkpoint")
    return found


def _sidecar_values(text: bytes) -> dict[str, Any]:
    """What :func:`read_sidecar` returns.

    Raises:
        ValueError, KeyError, TypeError, RecursionError, OverflowError: it is no sidecar.
    """
    if len(text) > _LARGEST_SIDECAR:
        raise ValueError("too large")
    values = json.loads(text.decode("utf-8"))
    options = known_options({"model": values["model"], **values.get("config", {})})
    found = {"model": options["model"], "config": options if "config" in values else {}}
    for name, default in (("step", None), ("tokens", None), ("bytes", None), ("serial", 0)):
        number = values[name] if default is None else values.get(name, default)
        if type(number) is not int or not 0 <= number < 2**63:
            raise ValueError(name)
        found[name] = number
    for name, default in (("sha256", None), ("optimizer", "lion")):  # those that do not say are of lion's time
        found[name] = values[name] if default is None else values.get(name, default)
        if not isinstance(found[name], str) or not (found[name].isalnum() or not found[name]):
            raise ValueError(name)
    skips = values.get("skips", [])
    if type(skips) is not list or any(list(map(type, skip)) != [int, int] for skip in skips):
        raise ValueError("skips")
    found["skips"] = tuple(map(tuple, skips))
    found["best_val_loss"] = best = values["best_val_loss"]
    if best is not None and (type(best) not in (int, float) or not math.isfinite(best)):
        raise ValueError("best_val_loss")
    return found


def whole_sidecar(checkpoint: Path) -> dict[str, Any] | None:
    """:func:`read_sidecar`, or None where there is no whole checkpoint."""
    try:
        return read_sidecar(checkpoint)
    except CheckpointError:
        return None


def continued(config: Config, directory: RunDirectory) -> Config:
    """``config`` with what it leaves open and the run that it continues has decided: lion or lion8bit, the arithmetic.

    Raises:
        OnebError: that run cannot be continued with these options: its model is another, or its optimizer is one that
            nothing but ``--optimizer`` chooses (its weight decay would be another, too); or, without
            ``--allow-change``, the result would be.
    """
    return _continued(config, directory)[0]


def check_resume(config: Config) -> list[str]:
    """Refuse what cannot be continued, or not with these options; returns what will be otherwise than before.

    Raises:
        OnebError: naming every difference that matters.
    """
    directory = run_directory(config)
    if directory.resume_from is None and config.run.ckpt and not directory.skip:
        checkpoint = Path(config.run.ckpt)
        if wrong := _model_fault(checkpoint, read_sidecar(checkpoint), config):
            raise OnebError(wrong)
    return notes(_continued(config, directory)[1])


def _continued(config: Config, directory: RunDirectory) -> tuple[Config, list[Change]]:
    path = directory.resume_from
    if path is None:
        return config, []
    sidecar = read_sidecar(path)
    saved = sidecar["optimizer"]
    if config.optim.optimizer == "auto":
        if saved not in ("auto", "lion", "lion8bit"):
            raise OnebError(f"{path} was trained with --optimizer {saved}, and none was given; give the "
                            f"run's own options, --optimizer {saved} among them")
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, optimizer=saved))
    config = as_before(config, sidecar["config"])
    found = changes(sidecar["config"], config, sidecar["step"])
    faults = [_model_fault(path, sidecar, config), refusal(found, path, config.run.allow_change)]
    if any(faults):
        raise OnebError("\n".join(filter(None, faults)))
    return config, found


def _model_fault(checkpoint: Path, sidecar: dict[str, Any], config: Config) -> str:
    """How a checkpoint's model is another one than that asked for; empty where it is not.

    Raises:
        OnebError: another version saved it.
    """
    differences = model_differences(model_from_dict(sidecar["model"]), config.model)
    if not differences:
        return ""
    return (f"{checkpoint} holds another model than the one asked for: {'; '.join(differences)}. "
            "Give the run's own options, or leave out --ckpt and --resume to train this one from the start")
