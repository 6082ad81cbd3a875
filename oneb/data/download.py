"""Ready shards from the Hugging Face Hub to the files of a named data set, while the run that reads them trains."""

from __future__ import annotations

import os
import signal
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from oneb.data.arriving import locked
from oneb.data.formats import BIN_HEADER_BYTES, BIN_MAGIC, BIN_VERSION, open_file
from oneb.data.hub import HubFile, bytes_to_fetch, cache_disk, can_link, fetch
from oneb.data.hub_failures import Unreachable
from oneb.data.journal import index_path, npy_header
from oneb.data.reading import TokenFile
from oneb.data.sidecar import Sidecar, write_sidecar
from oneb.data.sources import HubDataset
from oneb.errors import OnebError
from oneb.files import atomic_writer, fsync_directory, sha256_file
from oneb.units import format_duration, format_transfer

EOT, VOCAB_SIZE = 50256, 50257  # of GPT-2, whose ids the shards hold
_ITEM_BYTES = 2  # a token
_CHUNK_TOKENS = 4 * 2**20
_POLL_S = 0.2  # how often a waiting thread looks for the file, and for the end of the wait
_LOCK_POLL_S = 0.5
_QUIET_S, _REPORT_S = 1.0, 10.0  # a wait is reported after the first, and again after the second
_PAUSE_S = 60.0  # after a failure that nobody waits for
_NOT_HERE = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}  # these are the main thread's


@dataclass(frozen=True)
class Piece:
    """A file of the data set: the first ``n_tokens`` of a ready shard, or more of it."""

    name: str
    n_tokens: int
    shard: HubFile


class Download:
    """Brings pieces into ``folder``: the first of them first, then from the one that somebody waits for.

    One process does so at a time: others wait for its files, and take over if it ends. Failures of the network count
    only where somebody waits for what they keep away; until then it is tried again.
    """

    def __init__(self, folder: Path, dataset: HubDataset, pieces: Sequence[Piece]) -> None:
        self.folder, self.dataset, self.pieces = folder, dataset, pieces
        self._copies = not can_link(dataset, folder)  # the shards in the Hub's cache are not the data set's files
        self._wanted = 0  # the piece that was waited for last
        self._arriving: tuple[int, int, float, int] | None = None  # piece, bytes at first, since when, bytes now
        self._attempts, self._alone = 0, True  # tries; whether no other process was downloading at the last of them
        self._failed: tuple[int, OnebError] | None = None  # in which attempt, and how
        self._hindrance = ""  # what the piece that is being brought suffers from now
        self._faults: deque[str] = deque()  # for `faults`
        self._last_fault = ""
        self._waiting, self._lock, self._awaited = 0, threading.Lock(), threading.Event()
        self._numbers = {piece.name: number for number, piece in enumerate(pieces)}
        # A daemon: what has arrived is kept, however the process ends.
        self._thread = threading.Thread(target=self._run, name="oneb-download", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wait(self, name: str, cancelled: Callable[[], bool], say: Callable[[str], None] | None = None) -> bool:
        """Wait until the file of that name is there; False if ``cancelled`` came true before.

        Args:
            say: told every now and then what is waited for.

        Raises:
            OnebError: it cannot be had.
        """
        number, began = self._numbers[name], time.monotonic()
        self._wanted, attempts = number, self._attempts
        said = began + _QUIET_S - _REPORT_S
        self._count_waiting(1)
        try:
            while not (self.folder / name).exists():
                if cancelled():
                    return False
                self._raise_failure(attempts)
                if say and time.monotonic() - said > _REPORT_S:
                    said = time.monotonic()
                    say(f"waiting for data: {self.awaited()}")
                time.sleep(_POLL_S)
        finally:
            self._count_waiting(-1)
        return True

    def _count_waiting(self, more: int) -> None:
        with self._lock:
            self._waiting += more
            (self._awaited.set if self._waiting else self._awaited.clear)()

    def missing(self) -> list[Piece]:
        """The files that are not there yet."""
        return [piece for piece in self.pieces if not (self.folder / piece.name).exists()]

    def bytes_to_write(self, folder: Path) -> int:
        """What the files that are not there yet will take on the disk of ``folder``, in the Hub's cache and outside."""
        disk, missing, n_bytes = folder.stat().st_dev, self.missing(), 0
        if cache_disk(self.dataset).stat().st_dev == disk:
            n_bytes += bytes_to_fetch(self.dataset, [piece.shard for piece in missing])
        if self._copies and self.folder.stat().st_dev == disk:
            n_bytes += sum(_ITEM_BYTES * piece.n_tokens for piece in missing)
        return n_bytes

    def faults(self) -> list[str]:
        """What went wrong since the last call while nobody waited, a sentence each."""
        return [self._faults.popleft() for _ in range(len(self._faults))]

    def awaited(self) -> str:
        """The file that was waited for last, and how far it is, or what keeps it away."""
        wanted, hindrance, arriving = self._wanted, self._hindrance, self._arriving
        name = self.pieces[wanted].name
        if hindrance or arriving is None:
            return f"{name}, {hindrance or ('the download begins' if self._alone else 'another process downloads')}"
        current, first, since, now = arriving
        which = "" if current == wanted else f"{self.pieces[current].name} comes before it, "
        far = format_transfer(now, self.pieces[current].shard.size, first, time.monotonic() - since)
        return f"{name}, {which}{far}"

    def _raise_failure(self, attempts: int) -> None:
        """Raise what failed, unless it may have been tried for long before somebody waited, since attempt so and so."""
        if self._failed is None:
            if not self._thread.is_alive():
                raise OnebError(f"a file of {self.folder} is gone that was there; run the command again")
            return
        attempt, error = self._failed
        if attempt > attempts or not isinstance(error, Unreachable):
            raise OnebError(f"the data does not arrive: {error}") from error

    # ---- the thread

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_HERE)
        while (number := self._next()) is not None:
            self._attempts += 1
            try:
                with locked(self.folder) as alone:
                    self._alone = alone
                    if alone:
                        self._bring(number)
                        self._failed = None
                        self._last_fault = ""
                    else:
                        time.sleep(_LOCK_POLL_S)
            except OnebError as error:
                self._fail(error)
            except OSError as error:
                self._fail(OnebError(f"{self.folder} cannot be written: {error.strerror or error}. Make room there, or "
                                     "choose another --data-root"))
            except Exception as error:  # fallback: told to those who wait, who would wait for good
                self._fail(OnebError(f"{type(error).__name__}: {error}"))
                raise

    def _next(self) -> int | None:
        """The piece to bring now: the first, then from the one that is waited for on."""
        n_pieces = len(self.pieces)
        order = [0, *((self._wanted + further) % n_pieces for further in range(n_pieces))]
        return next((number for number in order if not (self.folder / self.pieces[number].name).exists()), None)

    def _bring(self, number: int) -> None:
        piece = self.pieces[number]
        if (self.folder / piece.name).exists():  # of a process that had the lock before
            return

        def progress(n_bytes: int, size: int) -> None:
            before = self._arriving
            first, since = (n_bytes, time.monotonic()) if before is None else before[1:3]
            self._arriving, self._hindrance = (number, first, since, n_bytes), ""

        try:
            for left in self.folder.glob(f".{piece.name}*.tmp*"):  # of a process that was killed
                left.unlink(missing_ok=True)
            shard = fetch(self.dataset, piece.shard, self._hindered, progress)
            place_piece(self.folder / piece.name, piece, shard, self.dataset)
        finally:
            self._arriving, self._hindrance = None, ""

    def _fail(self, error: OnebError) -> None:
        self._failed = self._attempts, error
        if not self._awaited.is_set() and str(error) != self._last_fault:  # once, however often it is tried in vain
            self._last_fault = str(error)
            self._faults.append(f"{error} (the data for the next steps is there; it is tried again every "
                                f"{format_duration(_PAUSE_S)})")
        time.sleep(1.0)  # those who wait hear of it
        self._awaited.wait(_PAUSE_S)

    def _hindered(self, message: str) -> None:
        self._hindrance = message.partition(": ")[2] or message  # without the shard's long name


# -- A shard in the cache becomes a file of the data set --------------------------------------------

def place_piece(target: Path, piece: Piece, shard: Path, dataset: HubDataset) -> None:
    """Have a piece at ``target``, with its document index and sidecar; the token file appears last, and whole.

    It is a second name of the shard in the Hub's cache, where that has hard links to here: it takes no room of its own,
    and stays when the cache is emptied. Else it is a copy, of the tokens that are wanted alone.

    Raises:
        OnebError: the shard is damaged, or holds fewer tokens, or an id that is not GPT-2's.
        OSError: the disk is full, say.
    """
    tokens = open_file(shard, "bin")
    if len(tokens) < piece.n_tokens:
        raise OnebError(f"{shard} holds {len(tokens)} tokens, wanted {piece.n_tokens}; delete it, and it is downloaded "
                        "again")
    temporary = target.with_name(f".{target.name}.tmp{os.getpid()}")
    temporary.unlink(missing_ok=True)  # of a killed process of the same number: it may be a link, not to be written to
    try:
        if not _link(shard.resolve(), temporary):
            _copy(tokens, piece.n_tokens, temporary)
        _describe(temporary, target, shard, f"{dataset.repo}@{piece.shard.revision} {piece.shard.path}", piece)
        os.replace(temporary, target)
        fsync_directory(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _link(shard: Path, name: Path) -> bool:
    """Give the file a second name; False where that cannot be: another disk, or somebody else's file."""
    try:
        with open(shard, "rb") as file:
            os.fsync(file.fileno())  # whoever downloaded it may not have
        os.link(shard, name)
    except OSError:
        return False
    return True


def _copy(tokens: TokenFile, n_tokens: int, name: Path) -> None:
    """Write the first ``n_tokens`` to a file of the same format."""
    with open(name, "wb") as out:
        out.write(struct.pack("<3i", BIN_MAGIC, BIN_VERSION, n_tokens).ljust(BIN_HEADER_BYTES, b"\0"))
        for start in range(0, n_tokens, _CHUNK_TOKENS):
            out.write(tokens.read(start, min(_CHUNK_TOKENS, n_tokens - start)))
        out.flush()
        os.fsync(out.fileno())


def _describe(file: Path, target: Path, shard: Path, source: str, piece: Piece) -> None:
    """Check the ids of ``file``, which is to be ``target``, and write that one's index and sidecar.

    In the shards the end-of-text id begins documents; here it is taken to end the one before.
    """
    tokens = open_file(file, "bin")
    ends, max_id = [], -1
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        ids = tokens.read(start, min(_CHUNK_TOKENS, len(tokens) - start))
        max_id = max(max_id, int(ids.max()))
        if max_id >= VOCAB_SIZE:
            raise OnebError(f"{shard}: the token id {max_id} is outside the vocabulary of {VOCAB_SIZE} of gpt2. A "
                            "damaged file: delete it, and it is downloaded again")
        ends.append(start + 1 + np.flatnonzero(ids == EOT))
    bounds = np.unique(np.concatenate([[0], *ends, [len(tokens)]])).astype("<i8")
    with atomic_writer(index_path(target)) as index:
        index.write(npy_header(bounds.dtype, len(bounds)))
        index.write(bounds)
    write_sidecar(target, Sidecar(
        tokens=len(tokens), documents=len(bounds) - 1, encoding="gpt2", vocab_size=VOCAB_SIZE, eot=EOT, source=source,
        format="bin uint16", sha256=sha256_file(file), max_id=max_id, revision=piece.shard.revision))
