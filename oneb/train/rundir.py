"""Where a run lives, and whether it may start or continue there. No torch: the launcher asks the same questions."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneb.config import Config, model_differences, model_from_dict
from oneb.errors import OnebError

LAST = "last.pt"
BEST = "best.pt"


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
    """

    path: Path
    is_new: bool = False
    resume_from: Path | None = None
    older: tuple[Path, ...] = ()
    skip: bool = False
    note: str = ""


def run_directory(config: Config) -> RunDirectory:
    """Choose the run directory by name, ``--resume`` and ``--if-exists``. Creates nothing.

    Raises:
        OnebError: it exists under ``--if-exists error``, cannot be written to, or has no whole checkpoint to resume.
    """
    path = Path(config.run.root) / config.name
    _check_writable(path)
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


def _check_writable(path: Path) -> None:
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise OnebError(f"{path} cannot be made: {there} is a file; choose another --run-root")
    if not os.access(there, os.W_OK):
        raise OnebError(f"{path} cannot be written: no permission in {there}; choose another --run-root")


@contextlib.contextmanager
def claimed(config: Config, directory: RunDirectory) -> Iterator[RunDirectory]:
    """Make the directory and hold it for one process; gives the directory that it became.

    A new run whose name was taken since it was chosen is treated as ``--if-exists`` says. What killed processes had
    begun to write there is removed.

    Raises:
        OnebError: another process is training there.
    """
    import fcntl

    while not directory.skip:
        try:
            directory.path.mkdir(parents=True, exist_ok=not directory.is_new)
            break
        except FileExistsError:
            directory = run_directory(config)
    if directory.skip:
        yield directory
        return
    with open(directory.path / ".lock", "w") as lock:
        try:
            # Goes with the process, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OnebError(f"another process is training in {directory.path}; wait for it or stop it, or choose "
                            "another --tag or --seed") from None
        for abandoned in directory.path.glob(".*.tmp*"):
            abandoned.unlink()
        yield directory


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
    """A checkpoint's sidecar: step, tokens, best_val_loss, sha256, bytes, model, optimizer, serial.

    ``serial`` counts the saves into a directory; 0 where an earlier version saved.

    Raises:
        CheckpointError: the checkpoint or its sidecar is not there, is not what its name says, or is of another size.
    """
    if not checkpoint.is_file():
        raise CheckpointError(f"no checkpoint at {checkpoint}; give --ckpt RUN_DIRECTORY/last.pt (same --tag, "
                              "--variant and --seed as the run to continue), or leave out --resume to start a new run")
    sidecar = sidecar_path(checkpoint)
    try:
        values = json.loads(sidecar.read_text(encoding="utf-8"))
        found = {key: values[key] for key in ("tokens", "best_val_loss", "sha256", "model")}
        found |= {"step": int(values["step"]), "bytes": int(values["bytes"]), "serial": int(values.get("serial", 0))}
        found["optimizer"] = values.get("optimizer", "lion")  # those that do not say are of lion's time
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint} has no {sidecar.name} beside it: its save was cut short, or the file "
                              "was copied alone; copy both files, or use an older checkpoint of the run") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{sidecar} is damaged; copy it again, or use an older checkpoint of the run") from None
    if (size := checkpoint.stat().st_size) != found["bytes"]:
        raise CheckpointError(f"{checkpoint} has {size:,} bytes, its sidecar says {found['bytes']:,}: it is cut short "
                              "or was overwritten; copy it again, or use an older checkpoint")
    return found


def whole_sidecar(checkpoint: Path) -> dict[str, Any] | None:
    """:func:`read_sidecar`, or None where there is no whole checkpoint."""
    try:
        return read_sidecar(checkpoint)
    except CheckpointError:
        return None


def continued(config: Config, directory: RunDirectory) -> Config:
    """``config`` with what it leaves open and the run that it continues has decided: lion or lion8bit.

    Raises:
        OnebError: that run's optimizer is one that nothing but ``--optimizer`` chooses. Its weight decay would be
            another, too.
    """
    if directory.resume_from is None or config.optim.optimizer != "auto":
        return config
    saved = read_sidecar(directory.resume_from)["optimizer"]
    if saved not in ("auto", "lion", "lion8bit"):
        raise OnebError(f"{directory.resume_from} was trained with --optimizer {saved}, and none was given; give the "
                        f"run's own options, --optimizer {saved} among them")
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, optimizer=saved))


def check_resume(config: Config) -> None:
    """Refuse a checkpoint whose model is another shape than the one asked for.

    Raises:
        OnebError: naming every difference.
    """
    checkpoint = Path(config.run.ckpt) if config.run.ckpt else run_directory(config).resume_from
    if checkpoint is None:
        return
    differences = model_differences(model_from_dict(read_sidecar(checkpoint)["model"]), config.model)
    if differences:
        raise OnebError(f"{checkpoint} holds another model than the one asked for: {'; '.join(differences)}. "
                        "Give the run's own options, or leave out --ckpt and --resume to train this one from the start")
