"""Whether a token file is what its sidecar and index say, and what is in it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from oneb.data.formats import open_file
from oneb.data.journal import index_path
from oneb.data.reading import TokenFile
from oneb.data.sidecar import Sidecar, read_sidecar
from oneb.data.tokenizer import Tokenizer
from oneb.errors import OnebError
from oneb.files import sha256_file

_COMPARED = ("sha256", "tokens", "documents", "max_id")
_CHUNK_TOKENS = 4 * 2**20
_MAX_VOCABULARY = 2**20  # ids that are counted one by one


@dataclass(frozen=True)
class Statistics:
    """What the ids of a file are.

    Attributes:
        counts: (vocab_size,) how often each id occurs.
        ends: (documents that end,) int64 offsets just behind each end-of-text id; empty if that is not known.
        longest_zeros: ids 0 in a row: many are a file that was never filled.
    """

    tokens: int
    counts: np.ndarray
    ends: np.ndarray
    longest_zeros: int

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, its end-of-text id with it; the last may be cut."""
        bounds = self.ends if len(self.ends) and self.ends[-1] == self.tokens else np.append(self.ends, self.tokens)
        return np.diff(bounds, prepend=0)


def statistics(tokens: TokenFile, eot: int | None,
               progress: Callable[[float], None] = lambda fraction: None) -> Statistics:
    """Read all of a token file once.

    Args:
        progress: called several times a second with how much of it is read.

    Raises:
        OnebError: if its ids are none, or its disk fails.
    """
    counts = np.zeros(0, np.int64)
    ends = []
    run = longest = 0
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        ids = tokens.read(start, min(_CHUNK_TOKENS, len(tokens) - start))
        if int(ids.min()) < 0 or int(ids.max()) >= _MAX_VOCABULARY:
            raise OnebError(f"{tokens.name}: ids from {ids.min()} to {ids.max()} near token offset {start} are no "
                            "token ids; the file is damaged or of another format")
        here = np.bincount(ids, minlength=len(counts))
        here[:len(counts)] += counts
        counts = here
        if eot is not None:
            ends.append(np.flatnonzero(ids == eot) + start + 1)
        run, longest = _zeros(ids, run, longest)
        progress((start + len(ids)) / len(tokens))
    found = np.concatenate(ends) if ends else np.empty(0, np.int64)
    return Statistics(len(tokens), counts, found.astype(np.int64), longest)


def _zeros(ids: np.ndarray, run: int, longest: int) -> tuple[int, int]:
    """The zeros in a row at the end of ``ids``, with ``run`` before them, and the longest so far."""
    zeros = np.flatnonzero(ids == 0)  # most files have few
    begins = np.flatnonzero(np.diff(zeros, prepend=-2) > 1)
    runs = np.diff(begins, append=len(zeros))
    if len(zeros) and zeros[0] == 0:
        runs[0] += run
    return int(runs[-1]) if len(zeros) and zeros[-1] == len(ids) - 1 else 0, max(longest, int(runs.max(initial=0)))


def verify(path: Path, progress: Callable[[float], None] = lambda fraction: None) -> Statistics:
    """Read a prepared file again and compare it with what is said of it, but for what :func:`unsaid` names.

    Args:
        progress: as for :func:`statistics`.

    Raises:
        OnebError: naming the first thing that is not so.
    """
    if not path.is_file():
        raise OnebError(f"{path}: there is no such file; wanted a token file that has its .meta beside it")
    sidecar = read_sidecar(path)
    if sidecar is None:
        raise OnebError(f"{path} has no sidecar {path}.meta, so there is nothing to compare it with")
    if len(unsaid(sidecar)) == len(_COMPARED):
        raise OnebError(f"{path}.meta says nothing that could be compared with {path} (wanted {', '.join(_COMPARED)}): "
                        "copy the one that belongs to it")
    found = _read_and_hash(path, sidecar, progress)
    said = {"tokens": sidecar.tokens, "max_id": sidecar.max_id, "documents": sidecar.documents}
    held = {"tokens": found.tokens, "max_id": int(np.flatnonzero(found.counts)[-1]), "documents": len(found.lengths)}
    for name, value in said.items():
        if value is not None and value != held[name]:
            raise OnebError(f"{path}.meta says {name}: {value}, {path} has {held[name]}: one of the two is of another "
                            "file. Copy both again, or make them again with --force")
    index = index_path(path)
    if index.exists():
        _check_index(path, np.load(index, mmap_mode="r"), found)
    return found


def _read_and_hash(path: Path, sidecar: Sidecar, progress: Callable[[float], None]) -> Statistics:
    """The statistics of a file that has its sidecar's SHA-256."""
    stopped, trouble, found = threading.Event(), None, None
    with ThreadPoolExecutor(1) as thread:  # hashing lets go of Python's lock
        digest = thread.submit(sha256_file, path, stopped.is_set) if sidecar.sha256 else None
        try:
            try:
                found = statistics(open_file(path, "auto"), sidecar.eot, progress)
            except OnebError as error:  # of a damaged file the hash tells more
                trouble = error
            if digest is not None and digest.result() != sidecar.sha256:
                raise OnebError(f"{path} does not have the SHA-256 that {path}.meta gives ({sidecar.sha256}): it was "
                                "damaged or changed. Copy it again, or make it again with --force")
        finally:
            stopped.set()
    if found is None:
        assert trouble is not None
        raise trouble
    return found


def unsaid(sidecar: Sidecar) -> list[str]:
    """What a sidecar, perhaps an old one, does not say of its file, so that it cannot be compared."""
    return [name for name in _COMPARED if getattr(sidecar, name) is None]


def _check_index(path: Path, index: np.ndarray, found: Statistics) -> None:
    expected = np.cumsum(np.concatenate([[0], found.lengths]))
    if index.shape != expected.shape or not np.array_equal(index, expected):
        same = min(len(index), len(expected))
        wrong = np.flatnonzero(np.asarray(index[:same]) != expected[:same])
        where = f"document {wrong[0]}" if len(wrong) else f"its length, {len(index)} for {len(expected)}"
        raise OnebError(f"{index_path(path)} does not fit {path}, first at {where}. Copy both again, or make them "
                        "again with --force")


def fits(tokenizer: Tokenizer, sidecar: Sidecar | None, n_ids: int) -> bool:
    """Whether ids below ``n_ids``, of a file with this sidecar, can be the tokenizer's."""
    other = sidecar is not None and sidecar.tokenizer_sha256 not in (None, tokenizer.sha256)
    return n_ids <= tokenizer.vocab_size and not other


def samples(tokens: TokenFile, tokenizer: Tokenizer, n_samples: int, n_tokens: int,
            seed: int = 0) -> list[tuple[int, str]]:
    """``n_samples`` places of a file, spread over it, each with its offset and its ``n_tokens`` ids as text."""
    length = min(n_tokens, len(tokens))
    chance = np.random.default_rng(seed)
    places = [0, *sorted(chance.integers(0, len(tokens) - length + 1, n_samples - 1).tolist())][:n_samples]
    return [(place, tokenizer.decode(tokens.read(place, length))) for place in places]
