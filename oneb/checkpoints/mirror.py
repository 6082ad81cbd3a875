"""Checkpoints in a second place (``--save-to``), copied beside the training and verified by reading them back.

The newest two stay there; an older one goes only after a newer one is verified, so that from the first verified
checkpoint on there is always a whole one. With them are copies of the run's small files and of best.pt.
:mod:`oneb.checkpoints.remote` says how it lies there, and brings it back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from oneb.checkpoints.place import BLOCK_BYTES, DamagedError, Moved, Place, Stalled, open_place, watched
from oneb.checkpoints.remote import (
    CHECKPOINT,
    FETCHED,
    RUN_ID,
    STALL_S,
    check_place,
    claim_folder,
    counted,
    fetch_newest,
    is_intact,
    reason,
    whole_checkpoints,
)
from oneb.checkpoints.rundir import BEST, CheckpointError, read_sidecar, sidecar_path
from oneb.files import write_text
from oneb.units import format_gib

__all__ = ["Mirror", "MirrorEvent", "check_place", "fetch_newest"]

KEPT = 2
RETRY_S = (5.0, 300.0)  # between attempts: at first, and at most, doubled each time
FINISH_RETRY_S = 2.0  # once nothing but the copy is waited for
FINISH_ATTEMPTS = 3  # that moved bytes and failed all the same
SAY_EVERY_S = 15.0
CLOSE_S = 2.0
MAX_STUCK = 3  # attempts that wait for something still, although they were given up

_SMALL = (*FETCHED, "config.json")


@dataclass(frozen=True)
class MirrorEvent:
    """What became of a checkpoint's copy: ``name`` is verified or failed."""

    step: int
    name: str
    message: str


class _Copy:
    """A checkpoint that is to be copied, held open: its name may get other content, and its file be removed.

    Raises:
        CheckpointError: it is not whole.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.sidecar = read_sidecar(checkpoint)
        self.values = json.loads(sidecar_path(checkpoint).read_text(encoding="utf-8"))
        self.step: int = self.sidecar["step"]
        self.bytes: int = self.sidecar["bytes"]
        self.file: BinaryIO = open(checkpoint, "rb")  # noqa: SIM115 (closed when it is done)

    def blocks(self) -> Iterator[bytes]:
        """The file, from its start.

        Raises:
            CheckpointError: it is not what its sidecar says; then no copy of it is worth anything.
        """
        digest, offset = hashlib.sha256(), 0
        while block := os.pread(self.file.fileno(), BLOCK_BYTES, offset):
            digest.update(block)
            offset += len(block)
            yield block
        if digest.hexdigest() != self.sidecar["sha256"]:
            raise CheckpointError(f"the checkpoint of step {self.step} on this machine is damaged")


class Mirror:
    """Copies the checkpoints that it is given to a place, in a daemon thread of its own.

    Args:
        place: ``--save-to``: a folder that exists, or an fsspec URL.
        directory: the run directory; its name is the folder's at the place.
        say: prints a line; called within :meth:`poll` and :meth:`finish` only.

    Attributes:
        verified_step: step of the newest checkpoint that was read back from the place and is whole.
    """

    def __init__(self, place: str, directory: Path, *, say: Callable[[str], None]) -> None:
        self.place, self.directory = place.rstrip("/"), Path(directory)
        self.verified_step: int | None = None
        self._say = say
        self._changed = threading.Condition()  # guards what follows
        self._waiting: _Copy | None = None
        self._current: _Copy | None = None
        self._closed = self._finishing = self._hurry = self._small_due = self._lost = False
        self._events: list[MirrorEvent] = []
        self._notes: list[str] = []
        self._moved_bytes, self._moved_at = 0, time.monotonic()
        self._attempts = 0  # since finish was called, those that moved bytes and failed
        # The thread's alone:
        self._failed: tuple[int, str] | None = None  # the failure that was told last
        self._store: Place | None = None
        self._folder: str | None = None
        self._copied: dict[str, Any] = {}
        self._stuck: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    # ---- for the trainer

    def submit(self, checkpoint: Path) -> None:
        """Have ``checkpoint``, which is whole, copied next; one that waits still is replaced by it. Never waits."""
        try:
            copy = _Copy(Path(checkpoint))
        except (CheckpointError, OSError, ValueError) as error:
            with self._changed:
                self._lost = True
                self._events.append(MirrorEvent(self.verified_step or 0, "failed",
                                                f"{checkpoint} cannot be copied: {reason(error)}"))
            return
        with self._changed:
            if self._waiting:
                self._waiting.file.close()
            self._waiting, self._lost = copy, False
            self._changed.notify_all()

    def poll(self) -> list[MirrorEvent]:
        """What has happened since the last call."""
        with self._changed:
            events, self._events = self._events, []
            notes, self._notes = self._notes, []
        for note in notes:
            self._say(note)
        return events

    def finish(self, timeout_s: float) -> bool:
        """Wait until what was submitted last is verified, and copy the run's small files once more.

        False if nothing moved for ``timeout_s`` seconds, or attempts that move bytes fail again and again; what went
        wrong is among the events.
        """
        with self._changed:
            self._finishing = self._hurry = self._small_due = True
            self._attempts, self._moved_at, told_at = 0, time.monotonic(), -SAY_EVERY_S
            self._changed.notify_all()
            while self._waiting or self._current or self._small_due:
                now = time.monotonic()
                if now - self._moved_at > timeout_s or self._attempts >= FINISH_ATTEMPTS:
                    return False
                if (copy := self._current or self._waiting) and now - told_at > SAY_EVERY_S:
                    told_at, done = now, self._moved_bytes / (2 * copy.bytes)  # sent, and read back
                    self._say(f"waiting for the copy of step {copy.step} to {self.place}: {min(done, 1):.0%} of "
                              f"{format_gib(copy.bytes)} sent and read back")
                self._changed.wait(0.2)
            return not self._lost

    def close(self) -> None:
        """Stop. What is on its way is dropped; what is verified stays."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(CLOSE_S)

    # ---- the thread

    def _work(self) -> None:
        wait_s = RETRY_S[0]
        while self._next():
            if not (copy := self._current):
                self._copy_small_files()
                self._small_due = False
                continue
            done = self._attempt(copy)
            with self._changed:
                self._current = None
                if done or self._waiting:
                    copy.file.close()
                    wait_s = RETRY_S[0]
                    continue
                self._waiting = copy
                self._changed.wait_for(lambda c=copy: self._closed or self._hurry or self._waiting is not c,
                                       FINISH_RETRY_S if self._finishing else wait_s)
                self._hurry = False
                wait_s = min(2 * wait_s, RETRY_S[1])

    def _next(self) -> bool:
        """Wait for work; False once there is no more. Without a checkpoint in it the small files are due."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._small_due)
            self._current, self._waiting, self._moved_bytes = self._waiting, None, 0
            return not self._closed

    def _attempt(self, copy: _Copy) -> bool:
        """Whether ``copy`` is done with: verified, or not worth another attempt."""
        try:
            path = self._guarded(lambda moved: self._transfer(copy, moved))
        except Exception as error:  # fallback: told, and tried again
            hopeless = isinstance(error, CheckpointError)
            with self._changed:
                self._lost |= hopeless and not self._waiting
                self._attempts += self._finishing and self._moved_bytes > 0
            self._tell_failed(copy.step, f"step {copy.step} could not be copied to {self.place}: {reason(error)}"
                              + ("" if hopeless else "; it is tried again"))
            return hopeless
        with self._changed:
            self.verified_step = copy.step
            self._events.append(MirrorEvent(copy.step, "verified",
                                            f"step {copy.step} is at {self.place}/{path}, read back and whole"))
        self._failed = None
        try:
            self._guarded(lambda moved: self._prune(path))
        except Exception as error:  # fallback: told; there is only more than there should be
            self._tell_failed(copy.step, f"older checkpoints stay in {self.place}: {reason(error)}")
        self._copy_small_files()
        return True

    def _guarded(self, work: Callable[[Moved], Any]) -> Any:
        """What ``work`` returns, unless it stalls."""
        self._stuck = [thread for thread in self._stuck if thread.is_alive()]
        if len(self._stuck) >= MAX_STUCK:
            raise TimeoutError(f"{MAX_STUCK} earlier attempts wait for an answer still")

        def counting(moved: Moved) -> Any:
            def count(n_bytes: int) -> None:
                moved(n_bytes)
                if self._closed:
                    raise InterruptedError("the run is over")
                with self._changed:
                    self._moved_bytes += n_bytes
                    self._moved_at = time.monotonic()

            return work(count)

        try:
            return watched(counting, STALL_S)
        except Stalled as error:
            self._stuck.append(error.thread)
            raise

    def _transfer(self, copy: _Copy, moved: Moved) -> str:
        """Send, read back, and only then write the sidecar. Gives the path within the place."""
        store, folder = self._home()
        whole = whole_checkpoints(store, folder)
        name = f"step{copy.step:08d}.pt"
        if name in whole and whole[name]["sha256"] != copy.sidecar["sha256"]:
            # The run went back, and came here again. What is there stays until this one is verified.
            name = f"step{copy.step:08d}-{copy.sidecar['serial']}.pt"
        path = f"{folder}/{name}"
        if not (name in whole and is_intact(store, path, copy.sidecar, moved)):
            store.remove(f"{path}.json")
            store.write(path, counted(copy.blocks(), moved))
            if not is_intact(store, path, copy.sidecar, moved):
                raise DamagedError("what was read back is not what was sent")
        # By arrival, since another machine may count its saves from 1.
        arrival = 1 + max((values["arrival"] for values in whole.values()), default=0)
        sidecar = json.dumps({**copy.values, "arrival": arrival}, indent=2).encode()
        store.write(f"{path}.json", [sidecar])
        if b"".join(store.read(f"{path}.json")) != sidecar:
            raise DamagedError("the .json that was read back is not what was sent")
        return path

    def _home(self) -> tuple[Place, str]:
        """The place and the run's folder there, found or made once: a folder that vanishes later is not made again,
        since that is what a drive that is no longer mounted looks like."""
        if self._store is None or self._folder is None:
            own = self.directory / RUN_ID
            if not own.exists():
                write_text(own, secrets.token_hex(8) + "\n")
            store = open_place(self.place)
            folder = claim_folder(store, self.directory.name, own.read_bytes())
            if folder != self.directory.name:
                with self._changed:
                    self._notes.append(f"{self.place}/{self.directory.name} holds another run's checkpoints: this "
                                       f"run's are copied to {self.place}/{folder}")
            with contextlib.suppress(Exception):  # what killed processes left is in nobody's way
                store.remove_unfinished(folder)
            self._store, self._folder = store, folder
        return self._store, self._folder

    def _prune(self, path: str) -> None:
        """Leave the newest whole checkpoints, ``path`` among them. A sidecar goes before its file."""
        store, folder = self._home()
        whole = whole_checkpoints(store, folder)
        newest = sorted(whole, key=lambda name: whole[name]["arrival"], reverse=True)[:KEPT]
        kept = {*newest, path.rpartition("/")[2]}
        for found in sorted(store.names(folder), reverse=True):  # .pt.json comes before .pt
            name = found.removesuffix(".json")
            if CHECKPOINT.fullmatch(name) and name not in kept:
                store.remove(f"{folder}/{found}")

    def _copy_small_files(self) -> None:
        """The small files and best.pt, those that changed. They are not read back."""
        if self._folder is None:
            return
        for name in (*_SMALL, BEST):
            try:
                self._guarded(lambda moved, name=name: self._copy_small(name, moved))
            except Exception as error:  # fallback: told, and copied after the next checkpoint
                self._tell_failed(self.verified_step or 0, f"{name} was not copied to {self.place}: {reason(error)}")
                return

    def _copy_small(self, name: str, moved: Moved) -> None:
        path, store = self.directory / name, self._store
        if not path.exists():
            return
        stat = path.stat()
        state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self._copied.get(name) == state:
            return
        target = f"{self._folder}/{name}"
        if name != BEST:
            store.write(target, [path.read_bytes()])
        else:
            best = _Copy(path)
            with best.file:
                sidecar = json.dumps(best.values, indent=2).encode()
                if f"{name}.json" in store.names(self._folder) and b"".join(store.read(f"{target}.json")) == sidecar:
                    return
                store.remove(f"{target}.json")
                store.write(target, counted(best.blocks(), moved))
                store.write(f"{target}.json", [sidecar])
        self._copied[name] = state

    def _tell_failed(self, step: int, message: str) -> None:
        """Once for a checkpoint and reason, however often it is tried."""
        if self._failed != (step, message):
            self._failed = (step, message)
            with self._changed:
                self._events.append(MirrorEvent(step, "failed", message))
