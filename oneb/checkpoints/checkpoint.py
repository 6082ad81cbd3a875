"""Checkpoints: whole or absent, tensors and plain containers only, loaded without running code.

A checkpoint exists once its JSON sidecar does, which is written last and carries the file's size and SHA-256. Where a
new checkpoint takes the name of an old one, the old one keeps a second name until the new sidecar is there: whenever
the process is killed, one of the two is whole (:func:`oneb.checkpoints.rundir.checkpoints` finds it).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from oneb.checkpoints.contents import check_archive, check_types, refuse_faults, tensor_faults
from oneb.checkpoints.rundir import (
    LAST,
    CheckpointError,
    checkpoints,
    is_on_course,
    previous_path,
    read_sidecar,
    sidecar_path,
    whole_sidecar,
)
from oneb.config import ModelConfig, model_differences, model_from_dict
from oneb.errors import OnebError
from oneb.files import fsync_directory, sha256_file, write_json, write_text

FORMAT = 1
_HASHED_ASIDE = 2**18  # bytes; less is hashed sooner than a thread has begun


def save_checkpoint(path: Path, contents: dict[str, Any]) -> None:
    """Write ``contents`` (with keys step, tokens, best_val_loss and config) to ``path``, then its sidecar.

    An earlier checkpoint of that name stays valid until the new one is whole, at the end under its
    :func:`~oneb.checkpoints.rundir.previous_path`.
    """
    temporary = _temporary(path)
    temporary.unlink(missing_ok=True)  # left by a killed process of the same number, it may be a link
    best = contents["best_val_loss"]
    try:
        digest = _write(temporary, {"format": FORMAT, **contents})
        write_json(_temporary(sidecar_path(path)), {
            "step": contents["step"],
            "tokens": contents["tokens"],
            "sha256": digest,
            "bytes": temporary.stat().st_size,
            "best_val_loss": best if math.isfinite(best) else None,  # JSON has no infinity
            "model": contents["config"]["model"],
            "optimizer": contents["config"]["optim"]["optimizer"],
            "config": contents["config"],
            "serial": _next_serial(path.parent),
            "skips": contents.get("skips") or [],
        })
        _publish(path)
    finally:
        for left in (temporary, _temporary(sidecar_path(path))):
            left.unlink(missing_ok=True)


def _write(path: Path, contents: dict[str, Any]) -> str:
    """Write ``contents`` through to the disk; returns the SHA-256 of what was meant to be written.

    Raises:
        OSError: the disk's.
    """
    with open(path, "wb") as file, ThreadPoolExecutor(1) as pool, _without_crc32():
        hashing = _HashingFile(file, pool)
        torch.save(contents, hashing)
        if hashing.error:
            raise hashing.error
        file.flush()
        os.fsync(file.fileno())
    return hashing.digest.hexdigest()


class _HashingFile:
    """Hashes what it writes, at the same time.

    Attributes:
        error: the first failure to write; what comes after it is dropped. Raised out of here, torch.save would end in
            another error that does not say why.
    """

    def __init__(self, file: IO[bytes], pool: ThreadPoolExecutor) -> None:
        self.digest = hashlib.sha256()
        self.error: OSError | None = None
        self._file, self._pool = file, pool

    def write(self, data: memoryview) -> int:
        """Take all of ``data``, bytes."""
        if self.error is None:
            hashed = self._pool.submit(self.digest.update, data) if len(data) > _HASHED_ASIDE else None
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
            if hashed:
                hashed.result()
            else:
                self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back here."""


@contextlib.contextmanager
def _without_crc32() -> Iterator[None]:
    """The zip file's own checksums left out: the SHA-256 says more, and torch holds the GIL while it computes them."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


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
    """Remove all whole ``step*.pt`` but the newest ``keep``; 0 keeps all.

    Those of a course that the run has left are of no use to it, and go first.
    """
    last = whole_sidecar(directory / LAST)
    skips = last["skips"] if last else ()
    steps = [path for path in checkpoints(directory)[0] if path.name.startswith("step")]
    kept = [path for path in steps if is_on_course(read_sidecar(path), skips)][:keep]
    for path in steps if keep > 0 else ():
        if path not in kept:
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
    """The contents of a checkpoint, tensors mapped from the file on the CPU; None for what its version did not save.

    Raises:
        CheckpointError: it is not there, not whole, not what its sidecar says, not made of tensors and plain
            containers, or a field of it is of another type than it should be.
    """
    sidecar = read_sidecar(path)
    if sha256_file(path) != sidecar["sha256"]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in its sidecar; copy it again, or use an "
                              "older checkpoint")
    check_archive(path)
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what its unpickler raises for a file that nobody has saved has no end
        reason = str(error).splitlines() or [""]
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({error.__class__.__name__}: {reason[0][:200]}); "
                              "use an older one") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this program (format {FORMAT}); use one that oneb wrote")
    contents = {"format": FORMAT, **check_types(contents, path)}
    if contents["step"] != sidecar["step"]:
        raise CheckpointError(f"{path} is of step {contents['step']}, its sidecar says {sidecar['step']}; copy both "
                              "files again, or use an older checkpoint")
    return contents


def load_weights(model: nn.Module, contents: dict[str, Any], wanted: ModelConfig, path: Path) -> None:
    """Copy a checkpoint's weights into ``model``.

    Raises:
        OnebError: naming each difference between the checkpoint's model and ``wanted``.
        CheckpointError: its weights are not those of its model; nothing has changed then.
    """
    check_weights(model, contents, wanted, path)
    model.load_state_dict(contents["model"])


def check_weights(model: nn.Module, contents: dict[str, Any], wanted: ModelConfig, path: Path) -> None:
    """That :func:`load_weights` would do it; raises what it raises."""
    differences = model_differences(model_from_dict(contents["config"]["model"]), wanted)
    if differences:
        raise OnebError(f"{path} holds another model than the one asked for: {'; '.join(differences)}. "
                        "Give the run's own options")
    refuse_faults(path, tensor_faults(contents["model"], model.state_dict(), any_float=True))


def rng_state() -> dict[str, Any]:
    """The state of torch's random generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    """Continue torch's random generators; those of GPUs only where there are as many."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_initialized() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
