"""A token file in the making, in ``X.npy.parts/``: what survives a kill, and how it becomes ``X.npy``."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from oneb.data.growing import GrowingHash
from oneb.data.parts import ENDS, HEADER_BYTES, TOKENS, Counts, Placed
from oneb.data.sidecar import Sidecar, sidecar_path, write_sidecar
from oneb.data.sources import Skipped
from oneb.errors import OnebError
from oneb.files import fsync_directory, write_json

_KEY, _STATE, _FINAL, _LOCK = "key.json", "state.json", "final.json", "lock"
_OFFSETS, _SOURCES = "offsets", "sources"
_SIDECAR = sidecar_path(Path(TOKENS)).name
_TAKE_OVER_SECONDS = 10.0  # for the workers of a killed process to end; they do at once


@dataclass
class FileState:
    """What one file of the input gave."""

    tokens: int = 0
    documents: int = 0  # that end in it
    sha256: str | None = None


@dataclass
class State:
    """How far the output is: everything before (file, unit) is in it."""

    file: int = 0
    unit: int = 0
    tokens: int = 0
    documents: int = 0  # that end in it
    text_bytes: int = 0
    max_id: int = -1
    ended: bool = True  # the last token ends a document
    skipped: Skipped = field(default_factory=Skipped)
    files: list[FileState] = field(default_factory=list)


def parts_folder(output: Path) -> Path:
    """``x.npy`` -> ``x.npy.parts``."""
    return output.with_name(output.name + ".parts")


def index_path(output: Path) -> Path:
    """``x.npy`` -> ``x.npy.idx.npy``, int64 offsets where documents start, and at last where the tokens end."""
    return output.with_name(output.name + ".idx.npy")


def sources_path(output: Path) -> Path:
    """``x.npy`` -> ``x.npy.sources.json``, one entry a file of the input."""
    return output.with_name(output.name + ".sources.json")


class Journal:
    """The folder beside ``output``, of this process alone while it is open.

    Nothing in it is trusted that ``state.json`` does not vouch for; that is written after what it speaks of.

    Args:
        key: options and input, plain JSON: if those of last time were others, the work starts over.
        say: told what happens to work that was there.

    Raises:
        OnebError: another process works on the same output.
    """

    def __init__(self, output: Path, dtype: np.dtype, key: dict[str, Any], say: Callable[[str], None]) -> None:
        self.output, self.folder, self.dtype, self._key, self._say = output, parts_folder(output), dtype, key, say
        self.state = State()
        self.folder.mkdir(exist_ok=True)
        self._lock: int | None = _lock(self.folder, output)
        self._files: list[Any] = []
        self._committing = threading.Lock()
        self._failed: OSError | None = None  # what a commit met
        self._hash: GrowingHash | None = None

    def begin(self, n_tokens: int | None) -> None:
        """Open what was done before, or begin.

        Args:
            n_tokens: that the finished file will hold, where that is known.

        Raises:
            OnebError: a worker of a process that was killed still holds the file.
        """
        old = _read_json(self.folder / _KEY)
        if old is not None and old != self._key:
            self._say(f"{self.folder} holds unfinished work of other options or input "
                      f"({_changes(old, self._key)}): starting over")
        if old != self._key or not self._load():
            self._clear()
            for name in (TOKENS, ENDS):
                (self.folder / name).write_bytes(b"")
            self.state = State()
            self._write_state(asdict(self.state))
            write_json(self.folder / _KEY, self._key)
        self._tokens, self._ends = self._files = [
            open(self.folder / name, "r+b", buffering=0) for name in (TOKENS, ENDS)]  # noqa: SIM115
        with _taken_over(self._tokens.fileno(), self.output):
            for file, size in zip(self._files, (self._tokens_bytes(), 8 * self.state.documents), strict=True):
                file.truncate(size)
        if n_tokens is not None:
            self._hash = GrowingHash(self.folder / TOKENS, npy_header(self.dtype, n_tokens))
            self._hash.extend(self._tokens_bytes())
        if self.state.tokens:
            self._say(f"continuing after {self.state.tokens} tokens")

    def _load(self) -> bool:
        """Read the state; whether the files hold what it says."""
        saved = _read_json(self.folder / _STATE)
        if saved is None:
            return False
        files = [FileState(**entry) for entry in saved.pop("files")]
        self.state = State(**{**saved, "skipped": Skipped(**saved["skipped"]), "files": files})
        wanted = {TOKENS: self._tokens_bytes(), ENDS: 8 * self.state.documents}
        return all((self.folder / name).is_file() and (self.folder / name).stat().st_size >= size
                   for name, size in wanted.items())

    def _tokens_bytes(self) -> int:
        return HEADER_BYTES + self.state.tokens * self.dtype.itemsize

    def _clear(self) -> None:
        (self.folder / _KEY).unlink(missing_ok=True)  # first: without it, the rest counts for nothing
        for path in self.folder.iterdir():
            if path.name != _LOCK:
                path.unlink()

    def append(self, counts: Counts, placed: Placed, file: int, unit: int, *, last: bool) -> None:
        """The tokens of the next unit are in the file. Durable after the next ``commit``."""
        old, source = self.state, self.source(file)
        files = [*old.files, *(FileState() for _ in range(len(old.files), file + 1))]
        files[file] = replace(source, tokens=source.tokens + placed.tokens,
                              documents=source.documents + placed.documents)
        next_file, next_unit = (file + 1, 0) if last else (file, unit + 1)
        # One store, so that an interrupt finds either all of the unit in the state or nothing of it.
        self.state = State(
            file=next_file, unit=next_unit, tokens=old.tokens + placed.tokens,
            documents=old.documents + placed.documents, text_bytes=old.text_bytes + counts.text_bytes,
            max_id=max(old.max_id, placed.max_id), ended=placed.ended if placed.tokens else old.ended,
            skipped=old.skipped + counts.skipped, files=files)
        if self._hash is not None:
            self._hash.extend(self._tokens_bytes())

    def source(self, file: int) -> FileState:
        """What file number ``file`` gave so far."""
        return self.state.files[file] if file < len(self.state.files) else FileState()

    def snapshot(self) -> dict[str, Any]:
        """What is in the files now, for ``commit``."""
        return asdict(self.state)

    def commit(self, snapshot: dict[str, Any]) -> None:
        """Make what there was then survive a kill, and a power cut. Safe in a thread beside ``append``.

        Raises:
            OSError: the disk failed, now or at an earlier call. The system reports lost bytes once, so that a call
                which succeeds after one that failed says nothing.
        """
        with self._committing:
            if self._failed is not None:
                raise self._failed
            try:
                for file in self._files:
                    os.fsync(file.fileno())
                self._write_state(snapshot)
            except OSError as error:
                self._failed = error
                raise

    def _write_state(self, snapshot: dict[str, Any]) -> None:
        write_json(self.folder / _STATE, snapshot)

    # -- The end ---------------------------------------------------------------------------------

    def complete(self) -> None:
        """No more tokens come: the header can be written, and what is not hashed yet is from here on."""
        header = npy_header(self.dtype, self.state.tokens)
        os.pwrite(self._tokens.fileno(), header, 0)
        if self._hash is None or self._hash.header != header:  # fewer than were asked for
            self._stop_hash()
            self._hash = GrowingHash(self.folder / TOKENS, header)
        self._hash.extend(self._tokens_bytes(), whole=True)

    def finish(self, sidecar: Callable[[str], Sidecar], sources: list[dict[str, Any]]) -> Sidecar:
        """Make ``X.npy`` and what lies beside it appear, after ``complete`` and ``commit``.

        Args:
            sidecar: what to say of the file of that SHA-256.
            sources: for ``X.npy.sources.json``.
        """
        assert self._hash is not None
        self.close_files()
        _write_offsets(self.folder / ENDS, self.folder / _OFFSETS, self.state.tokens)
        write_json(self.folder / _SOURCES, sources)
        made = sidecar(self._hash.hexdigest())
        write_sidecar(self.folder / TOKENS, made)
        write_json(self.folder / _FINAL, {"key": self._key, "sidecar": asdict(made)})
        self.publish()
        return made

    def finished(self) -> Sidecar | None:
        """What the sidecar says, if the same work was finished but for its last moments; ``publish`` does these."""
        final = _read_json(self.folder / _FINAL)
        return Sidecar(**final["sidecar"]) if final is not None and final["key"] == self._key else None

    def publish(self) -> None:
        """Move the whole files to their names. Repeating it after a kill at any point does the same."""
        if (self.folder / _FINAL).exists():
            if (self.folder / TOKENS).exists():
                # What is beside an old file goes first: beside the new one, should we be killed here, it would lie.
                for path in (sidecar_path(self.output), index_path(self.output), sources_path(self.output)):
                    path.unlink(missing_ok=True)
            for name, target in ((TOKENS, self.output), (_OFFSETS, index_path(self.output)),
                                 (_SOURCES, sources_path(self.output)), (_SIDECAR, sidecar_path(self.output))):
                if (self.folder / name).exists():
                    os.replace(self.folder / name, target)
            fsync_directory(self.output.parent)
        self._remove()

    def _remove(self) -> None:
        """Remove the folder, what says that the work is done last."""
        last = [_LOCK, _FINAL]
        for name in [path.name for path in self.folder.iterdir() if path.name not in last] + last:
            (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # on network disks, a removed file that somebody has open is still there
            self.folder.rmdir()

    def give_up(self) -> None:
        """Keep what is done for next time; where that is nothing, leave nothing behind."""
        if not self._files:
            if self.folder.is_dir() and {path.name for path in self.folder.iterdir()} <= {_LOCK}:
                self._remove()
            return
        if not self.state.tokens:
            self._remove()
            return
        with contextlib.suppress(OSError):  # a full disk: what was committed before counts
            self.commit(self.snapshot())

    def close_files(self) -> None:
        """Close what is open; the work stays."""
        for file in self._files:
            with contextlib.suppress(OSError):  # a full network disk; what counts was made durable by ``commit``
                file.close()
        self._files = []

    def _stop_hash(self) -> None:
        if self._hash is not None:
            self._hash.stop()
            self._hash = None

    def close(self) -> None:
        """Let others work on the same output."""
        self._stop_hash()
        self.close_files()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextlib.contextmanager
def _taken_over(tokens: int, output: Path) -> Iterator[None]:
    """While the file of this descriptor is no worker's. Those of a process that was killed may not have ended yet."""
    until = time.monotonic() + _TAKE_OVER_SECONDS
    while True:
        try:
            fcntl.flock(tokens, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                raise OnebError(f"worker processes of an earlier command still write {output}, though that command "
                                "has ended; end them (ps shows them under its name), and run this again") from None
            time.sleep(0.02)
        except OSError:
            break  # a network disk without locks: then nobody can tell
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(tokens, fcntl.LOCK_UN)


def _lock(folder: Path, output: Path) -> int:
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OnebError(f"another process prepares {output} at this moment; wait for it, or choose another --output"
                        ) from None
    except OSError:
        pass  # a network disk without locks: then nobody can tell
    return descriptor


def _write_offsets(ends: Path, target: Path, n_tokens: int) -> None:
    """The document index from the raw ends: 0, where each but the last ends, ``n_tokens``."""
    held = np.fromfile(ends, np.int64)
    cut = [n_tokens] if not len(held) or held[-1] != n_tokens else []
    offsets = np.concatenate([[0], held, cut]).astype("<i8")
    with open(target, "wb") as file:
        file.write(npy_header(offsets.dtype, len(offsets)))
        file.write(offsets.tobytes())
        file.flush()
        os.fsync(file.fileno())


def _changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    changed = [name for name in new if old.get(name) != new[name]]
    shown = [f"{name} was {old.get(name)}, is {new[name]}" if name != "input" else "the input's files changed"
             for name in changed]
    return "; ".join(shown)[:300]


def _read_json(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def npy_header(dtype: np.dtype, n_tokens: int) -> bytes:
    """A .npy version 1.0 header for a 1-D array: 128 bytes for any count, so it can be filled in later."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({n_tokens},), }}"
    prefix = b"\x93NUMPY\x01\x00"
    n_text = HEADER_BYTES - len(prefix) - 2
    return prefix + struct.pack("<H", n_text) + text.ljust(n_text - 1).encode("ascii") + b"\n"
