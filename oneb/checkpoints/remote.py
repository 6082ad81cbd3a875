"""What a place (``--save-to``) holds of a run, and bringing it back to a machine that has nothing.

``<run directory's name>/step00000100.pt`` counts once ``step00000100.pt.json`` is beside it, which is written after the
checkpoint's bytes have been read back and had the right SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from oneb.checkpoints.place import DamagedError, Moved, Place, open_place, watched
from oneb.checkpoints.rundir import LAST, sidecar_path
from oneb.errors import OnebError
from oneb.files import write_json, write_text
from oneb.units import format_gib

# Nothing arrived for so long: the attempt is given up, and another made.
STALL_S = 120.0
CHECK_S = 60.0
FETCH_ATTEMPTS = 2

CHECKPOINT = re.compile(r"step\d{8,12}(-\d+)?\.pt")
# Whose folder it is. A run of the same name that was started from step 0 elsewhere gets a folder of its own.
RUN_ID = "mirror_id.txt"
FETCHED = ("train.jsonl", "wandb_id.txt")

T = TypeVar("T")


def check_place(place: str) -> None:
    """Write, read, list and remove a small file there. Takes a minute at most.

    Raises:
        OnebError: that cannot be done, and what to do about it.
    """
    store = open_place(place)
    name, content = f"oneb_probe_{secrets.token_hex(4)}", secrets.token_bytes(64)

    def probe(moved: Moved) -> None:
        store.write(name, [content])
        try:
            if b"".join(store.read(name)) != content or name not in store.names(""):
                raise DamagedError("a file that was written there is not found there again")
        finally:
            store.remove(name)

    try:
        watched(probe, CHECK_S)
    except Exception as error:
        raise OnebError(f"--save-to {place} cannot be used: {reason(error)}; {_advice(place, error)}") from error


def fetch_newest(place: str, directory: Path, say: Callable[[str], None]) -> Path | None:
    """Bring the run's newest whole checkpoint from a place to ``directory``, as last.pt; None where it has none.

    For a machine that has nothing of the run. Its train.jsonl and W&B id come along.

    Raises:
        OnebError: the place cannot be read, none of what it has is whole, or it has two runs of this name.
    """
    store, directory, place = open_place(place), Path(directory), place.rstrip("/")
    try:
        folder, names = _attempted(lambda moved: _find_run(store, place, directory))
        whole = _attempted(lambda moved: whole_checkpoints(store, folder))
        faults = [f"{name} has no .json that can be read" for name in names
                  if CHECKPOINT.fullmatch(name) and name not in whole]
        for name in sorted(whole, key=lambda known: whole[known]["arrival"], reverse=True):
            say(f"fetching {place}/{folder}/{name} ({format_gib(whole[name]['bytes'])})")
            began = time.monotonic()
            try:
                _attempted(lambda moved, name=name: _download(store, f"{folder}/{name}", whole[name], directory, moved))
            except (DamagedError, FileNotFoundError) as error:
                faults.append(f"{name}: {reason(error)}")
                say(f"passed over {place}/{folder}/{name}: {reason(error)}")
                continue
            for small in (*FETCHED, RUN_ID):
                if small in names and not (directory / small).exists():
                    content = _attempted(lambda moved, small=small: b"".join(store.read(f"{folder}/{small}")))
                    write_text(directory / small, content.decode("utf-8", "replace"))
            say(f"fetched step {whole[name]['step']} in {time.monotonic() - began:.0f}s; its SHA-256 is right")
            return directory / LAST
    except OnebError:
        raise
    except Exception as error:
        raise OnebError(f"the run's checkpoints in {place} cannot be fetched: {reason(error)}; "
                        f"{_advice(place, error)}, or leave out --save-to to start without them") from error
    if faults:
        raise OnebError(f"no checkpoint in {place}/{folder} is whole: {'; '.join(faults)}. Remove that folder to train "
                        "from the start")
    check_place(place)  # nothing is found in a place that cannot be used, either
    return None


def claim_folder(store: Place, name: str, run_id: bytes) -> str:
    """The folder of the run with that id, or the first of ``name``, ``name_2``, … that no run has used, now its own."""
    for folder in _folders(name):
        names = store.names(folder)
        if RUN_ID in names:
            if b"".join(store.read(f"{folder}/{RUN_ID}")) == run_id:
                return folder
        elif not any(map(CHECKPOINT.fullmatch, names)):
            store.make(folder)
            store.write(f"{folder}/{RUN_ID}", [run_id])
            return folder
    raise AssertionError("there is always another number")


def whole_checkpoints(store: Place, folder: str) -> dict[str, dict[str, Any]]:
    """Sidecars of the verified checkpoints in a folder, by the checkpoint's name.

    ``arrival`` in them counts the checkpoints that arrived, which says which is the newest.
    """
    names = store.names(folder)
    found = {}
    for name in names:
        if CHECKPOINT.fullmatch(name) and f"{name}.json" in names:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # not JSON, or not ours: not whole
                values = json.loads(b"".join(store.read(f"{folder}/{name}.json")))
                values.update(step=int(values["step"]), bytes=int(values["bytes"]), sha256=str(values["sha256"]),
                              arrival=int(values["arrival"]))
                found[name] = values
    return found


def is_intact(store: Place, path: str, sidecar: dict[str, Any], moved: Moved) -> bool:
    """Whether the bytes at the place, all of them read, are the ones that the sidecar describes."""
    if store.size(path) != sidecar["bytes"]:
        return False
    digest = hashlib.sha256()
    for block in counted(store.read(path), moved):
        digest.update(block)
    return digest.hexdigest() == sidecar["sha256"]


def counted(blocks: Iterator[bytes], moved: Moved) -> Iterator[bytes]:
    """``blocks``, each counted once it was taken: one that cannot be sent has not moved."""
    for block in blocks:
        yield block
        moved(len(block))


def reason(error: BaseException) -> str:
    """An error in one line, the same one each time: without the names of temporary files."""
    name = type(error).__name__
    text = str(getattr(error, "strerror", None) or error).strip()
    text = text or ("no answer in time" if "Timeout" in name else "failed")
    return f"{text.splitlines()[0].rstrip('.')} ({name})"


def _folders(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}_{number}"
        number += 1


def _find_run(store: Place, place: str, directory: Path) -> tuple[str, list[str]]:
    """The run's folder at the place, and the names of what is in it."""
    own = (directory / RUN_ID).read_bytes() if (directory / RUN_ID).exists() else None
    used = []
    for folder in _folders(directory.name):
        names = store.names(folder)
        if own and RUN_ID in names and b"".join(store.read(f"{folder}/{RUN_ID}")) == own:
            return folder, names
        if not names:
            break
        if any(map(CHECKPOINT.fullmatch, names)):
            used.append((folder, names))
    if len(used) > 1:
        raise OnebError(f"{place} has several runs of this name: {', '.join(folder for folder, _ in used)}; remove or "
                        f"rename those that are not to be continued, and name the other {directory.name}")
    return used[0] if used else (directory.name, [])


def _attempted(work: Callable[[Moved], T]) -> T:
    """What ``work`` returns, or raises at the last attempt."""
    for _ in range(FETCH_ATTEMPTS - 1):
        with contextlib.suppress(Exception):
            return watched(work, STALL_S)
    return watched(work, STALL_S)


def _download(store: Place, path: str, sidecar: dict[str, Any], directory: Path, moved: Moved) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{LAST}.tmp{os.getpid()}"
    digest = hashlib.sha256()
    try:
        with open(temporary, "wb") as file:
            for block in counted(store.read(path), moved):
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != sidecar["sha256"]:
            raise DamagedError("its SHA-256 is not the one in its sidecar")
        os.replace(temporary, directory / LAST)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(sidecar_path(directory / LAST), sidecar)


def _advice(place: str, error: BaseException) -> str:
    if "://" not in place:
        return "give a folder that exists and can be written to (a drive must be mounted first)"
    if "Credentials" in type(error).__name__:
        return "give this machine credentials (for S3: aws configure, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
    if isinstance(error, FileNotFoundError):
        return "make the bucket first, or correct its name"
    if isinstance(error, PermissionError):
        return "allow these credentials to list, read, write and delete there"
    return "correct it, or the network and endpoint (for S3: AWS_ENDPOINT_URL, AWS_DEFAULT_REGION)"
