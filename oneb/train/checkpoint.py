"""Checkpoints: whole or absent, tensors and plain containers only, loaded without running code.

A checkpoint exists once its JSON sidecar does, which is written last and carries the file's size and SHA-256. Where a
new checkpoint takes the name of an old one, the old one keeps a second name until the new sidecar is there: whenever
the process is killed, one of the two is whole (:func:`oneb.train.rundir.checkpoints` finds it).
"""

from __future__ import annotations

import math
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oneb.config import ModelConfig, model_differences, model_from_dict
from oneb.errors import OnebError
from oneb.files import fsync_directory, sha256_file, write_json, write_text
from oneb.train.rundir import (
    CheckpointError,
    checkpoints,
    previous_path,
    read_sidecar,
    sidecar_path,
    whole_sidecar,
)

FORMAT = 1


def save_checkpoint(path: Path, contents: dict[str, Any]) -> None:
    """Write ``contents`` (with keys step, tokens, best_val_loss and config) to ``path``, then its sidecar.

    An earlier checkpoint of that name stays valid until the new one is whole, at the end under its
    :func:`~oneb.train.rundir.previous_path`.
    """
    temporary = _temporary(path)
    temporary.unlink(missing_ok=True)  # left by a killed process of the same number, it may be a link
    best = contents["best_val_loss"]
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **contents}, file)
            file.flush()
            os.fsync(file.fileno())
        write_json(_temporary(sidecar_path(path)), {
            "step": contents["step"],
            "tokens": contents["tokens"],
            "sha256": sha256_file(temporary),
            "bytes": temporary.stat().st_size,
            "best_val_loss": best if math.isfinite(best) else None,  # JSON has no infinity
            "model": contents["config"]["model"],
            "optimizer": contents["config"]["optim"]["optimizer"],
            "serial": _next_serial(path.parent),
        })
        _publish(path)
    finally:
        temporary.unlink(missing_ok=True)


def link_checkpoint(source: Path, target: Path) -> None:
    """Make ``target`` the same checkpoint as ``source``: a hard link, or a copy where links do not exist."""
    for old, new in ((source, target), (sidecar_path(source), sidecar_path(target))):
        _temporary(new).unlink(missing_ok=True)  # left by a killed process of the same number, it may be a link
        try:
            os.link(old, _temporary(new))
        except OSError:
            shutil.copyfile(old, _temporary(new))
    _publish(target)


def prune_checkpoints(directory: Path, keep: int) -> None:
    """Remove all whole ``step*.pt`` but the newest ``keep``; 0 keeps all."""
    steps = [path for path in checkpoints(directory)[0] if path.name.startswith("step")]
    for path in steps[keep:] if keep > 0 else ():
        _remove(path)


def _next_serial(directory: Path) -> int:
    return 1 + max((found["serial"] for path in directory.glob("*.pt") if (found := whole_sidecar(path))), default=0)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp{os.getpid()}")


def _publish(path: Path) -> None:
    """Rename a checkpoint's temporary file and sidecar into place, the sidecar last.

    At every instant a file with a sidecar beside it is the file that the sidecar describes.
    """
    _keep_previous(path)
    sidecar_path(path).unlink(missing_ok=True)
    for final in (path, sidecar_path(path)):
        os.replace(_temporary(final), final)
    fsync_directory(path.parent)
    _remove(previous_path(path))


def _keep_previous(path: Path) -> None:
    """Give the checkpoint at ``path`` a second name, if it is whole."""
    previous = previous_path(path)
    if not whole_sidecar(path):
        return
    if whole_sidecar(previous) and sha256_file(path) != read_sidecar(path)["sha256"]:
        return  # this is what the run was continued from
    _remove(previous)
    write_text(sidecar_path(previous), sidecar_path(path).read_text(encoding="utf-8"))
    try:
        os.link(path, previous)
    except OSError:  # fallback: no hard links here, so for a moment the new name is the only one
        os.replace(path, previous)
    fsync_directory(path.parent)


def _remove(path: Path) -> None:
    """Remove a checkpoint, its sidecar last: alone it says nothing."""
    path.unlink(missing_ok=True)
    sidecar_path(path).unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint, tensors mapped from the file on the CPU.

    Raises:
        CheckpointError: it is not there, not whole, not what its sidecar says, or not made of tensors and plain
            containers.
    """
    sidecar = read_sidecar(path)
    if sha256_file(path) != sidecar["sha256"]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in its sidecar; copy it again, or use an "
                              "older checkpoint")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({error.__class__.__name__}: "
                              f"{str(error).splitlines()[0]}); use an older one") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this program (format {FORMAT}); use one that oneb wrote")
    return contents


def load_weights(model: nn.Module, contents: dict[str, Any], wanted: ModelConfig, path: Path) -> None:
    """Copy a checkpoint's weights into ``model``.

    Raises:
        OnebError: naming each difference between the checkpoint's model and ``wanted``.
    """
    differences = model_differences(model_from_dict(contents["config"]["model"]), wanted)
    if differences:
        raise OnebError(f"{path} holds another model than the one asked for: {'; '.join(differences)}. "
                        "Give the run's own options")
    model.load_state_dict(contents["model"])


def rng_state() -> dict[str, Any]:
    """The state of torch's random generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    """Continue torch's random generators; those of GPUs only where there are as many."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_initialized() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
