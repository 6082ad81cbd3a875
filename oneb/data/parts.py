"""The tokens of one unit: encoded by whichever process takes it, and written once, to where they belong."""

from __future__ import annotations

import contextlib
import fcntl
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from oneb.data.encode import Encoder, pieces
from oneb.data.sources import Skipped
from oneb.data.units import Unit, documents, shard_tokens
from oneb.errors import OnebError

TOKENS, ENDS = "tokens", "ends"  # the files in a job's folder: a .npy in the making, and int64 offsets in it
HEADER_BYTES = 128  # of the .npy
_CHUNK_IDS = 2**16  # ids of short documents that are handled at once: they stay in the processor's cache
_FIRST_IDS = 2**22  # more than most units have; memory that is not written to is not taken


@dataclass(frozen=True)
class Job:
    """What a worker must know to encode units.

    Attributes:
        folder: holds the files that tokens and documents' ends are written to.
        encoding: the tokenizer's name.
        vocabulary: the tokenizer's file for gigatoken, None to go without it.
        eot, vocab_size, dtype: of the ids.
        text_column: of parquet and JSON documents.
        n_files: of the whole input.
    """

    folder: Path
    encoding: str
    vocabulary: Path | None
    eot: int
    vocab_size: int
    dtype: str
    text_column: str
    n_files: int


@dataclass(frozen=True)
class Counts:
    """What a unit holds.

    Attributes:
        documents: that end in it.
        text_bytes: read, as UTF-8; 0 for ready tokens.
    """

    tokens: int
    documents: int
    text_bytes: int
    skipped: Skipped


@dataclass(frozen=True)
class Part:
    """The tokens of a unit.

    Attributes:
        ids: (n,) of the output's dtype, the end-of-text id after each document.
        ends: (documents that end here,) int64, offsets in ``ids`` just behind each document's end.
    """

    ids: np.ndarray
    ends: np.ndarray
    counts: Counts


@dataclass(frozen=True)
class Place:
    """Where a unit's tokens go: behind so many tokens, and documents' ends, those beyond ``room`` tokens nowhere."""

    unit: Unit
    tokens: int
    documents: int
    room: int


@dataclass(frozen=True)
class Placed:
    """What was written of a unit.

    Attributes:
        max_id: -1 if there are no ids.
        ended: the last token ends a document.
    """

    tokens: int
    documents: int
    max_id: int
    ended: bool


def encode_unit(unit: Unit, job: Job, encoder: Encoder | None) -> Part:
    """Read and encode a unit. ``encoder`` may be missing for ready tokens.

    Raises:
        OnebError: what ``documents`` raises; or an id that does not fit the vocabulary.
    """
    skipped = Skipped()
    text_bytes = 0
    if unit.kind == "tokens":
        ids = _shifted(shard_tokens(unit), unit, job)
        check_ids(unit, job, int(ids.max()) if len(ids) else -1)
        ends = np.flatnonzero(ids == job.eot) + 1
        ids = ids.astype(job.dtype, copy=False)
    else:
        assert encoder is not None
        ids, ends, text_bytes = _encode_text(unit, job, encoder, skipped)
    return Part(ids, ends, Counts(len(ids), len(ends), text_bytes, skipped))


def check_ids(unit: Unit, job: Job, max_id: int) -> None:
    """That ids up to ``max_id`` are the tokenizer's."""
    if max_id >= job.vocab_size:
        raise OnebError(f"{unit.path}: the token id {max_id} is outside the vocabulary of {job.vocab_size} of "
                        f"{job.encoding}. A damaged file, or one of another tokenizer")


class _Ids:
    """The ids of a unit's documents in a row, of the output's dtype."""

    def __init__(self, unit: Unit, job: Job) -> None:
        self._unit, self._job = unit, job
        self._ids, self._used = np.empty(_FIRST_IDS, job.dtype), 0
        self._waiting: list[np.ndarray] = []
        self._n_waiting = self._n_eot = 0

    def __len__(self) -> int:
        return self._used + self._n_waiting

    def add(self, ids: np.ndarray) -> None:
        """More ids, of any integer dtype."""
        if len(ids) >= _CHUNK_IDS:
            self._flush()
            self._store(ids)
            return
        self._waiting.append(ids)
        self._n_waiting += len(ids)
        if self._n_waiting >= _CHUNK_IDS:
            self._flush()

    def finish(self, n_ends: int) -> np.ndarray:
        """All of them, (n,); so many end-of-text ids were added, and the text must hold none."""
        self._flush()
        if self._n_eot != n_ends:
            raise OnebError(f"{self._unit.path}: {self._job.encoding} turns some text into the id {self._job.eot}, "
                            "which ends documents; mark that token as special in the tokenizer, or name another in "
                            "tokenizer_config.json")
        return self._ids[:self._used]

    def _flush(self) -> None:
        if self._waiting:
            self._store(np.concatenate(self._waiting))
            self._waiting, self._n_waiting = [], 0

    def _store(self, ids: np.ndarray) -> None:
        check_ids(self._unit, self._job, int(ids.max()))
        self._n_eot += int(np.count_nonzero(ids == self._job.eot))
        end = self._used + len(ids)
        if end > len(self._ids):
            more = np.empty(max(end, 2 * len(self._ids)), self._ids.dtype)
            more[:self._used] = self._ids[:self._used]
            self._ids = more
        self._ids[self._used:end] = ids
        self._used = end


def _encode_text(unit: Unit, job: Job, encoder: Encoder, skipped: Skipped) -> tuple[np.ndarray, np.ndarray, int]:
    ids, ends, text_bytes = _Ids(unit, job), [], 0
    end_of_text = np.array([job.eot], np.uint32)
    for document, ended in documents(unit, job.text_column, skipped):
        text_bytes += len(document)
        for piece in pieces(document, encoder.splits):
            ids.add(encoder.encode(piece))
        if ended:
            ids.add(end_of_text)
            ends.append(len(ids))
    return ids.finish(len(ends)), np.array(ends, np.int64), text_bytes


def _shifted(ids: np.ndarray, unit: Unit, job: Job) -> np.ndarray:
    """Shards begin documents with the end-of-text id; here it ends them, also the last."""
    if unit.file == 0 and unit.index == 0 and ids[:1] == job.eot:
        ids = ids[1:]
    if unit.last and unit.file == job.n_files - 1 and len(ids) and ids[-1] != job.eot:
        ids = np.append(ids, ids.dtype.type(job.eot))
    return ids


class Target:
    """The files of a job's output, open for writing by position.

    While they are, this process holds a shared lock on the tokens, so that nobody takes the files over.
    """

    def __init__(self, folder: Path) -> None:
        self._tokens, self._ends = (os.open(folder / name, os.O_RDWR) for name in (TOKENS, ENDS))
        self._closers = [weakref.finalize(self, os.close, descriptor) for descriptor in (self._tokens, self._ends)]
        with contextlib.suppress(OSError):  # a network disk without locks: then nobody can tell
            fcntl.flock(self._tokens, fcntl.LOCK_SH)

    def write(self, part: Part, place: Place) -> Placed:
        """Put a unit's tokens and documents' ends where they belong.

        Raises:
            OSError: the disk is full, or fails.
        """
        ids, ends = part.ids, part.ends
        if place.room < len(ids):
            ids, ends = ids[:place.room], ends[ends <= place.room]
        _write(self._tokens, ids, HEADER_BYTES + place.tokens * ids.itemsize)
        _write(self._ends, ends + place.tokens, 8 * place.documents)
        ended = len(ends) > 0 and int(ends[-1]) == len(ids)
        return Placed(len(ids), len(ends), int(ids.max()) if len(ids) else -1, ended)

    def close(self) -> None:
        """Let others take the files over."""
        for close in self._closers:
            close()


def _write(descriptor: int, array: np.ndarray, position: int) -> None:
    rest = memoryview(array).cast("B") if len(array) else memoryview(b"")
    while len(rest):
        written = os.pwrite(descriptor, rest, position)
        rest, position = rest[written:], position + written
