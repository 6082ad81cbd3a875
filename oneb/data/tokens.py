"""Token files as one long, immutable sequence of ids, checked when opened."""

from __future__ import annotations

import bisect
import glob
import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from oneb.config import BYTE_VOCAB_SIZE, DATA_FORMATS, DEMO_DATA
from oneb.data.formats import SUFFIXES, open_file
from oneb.data.reading import HeldBytes, TokenFile, allow_open_files
from oneb.data.sidecar import Sidecar, is_beside_tokens, read_sidecar, sidecar_path
from oneb.errors import OnebError
from oneb.units import format_count

if TYPE_CHECKING:
    from oneb.data.download import Download

_MAKE_DATA = "python3 prepare_fineweb.py --tokens 100M --output"
_SCAN_TOKENS = 4 * 2**20
_SCAN_QUIET_S = 2.0  # a scan longer than this reports its progress
_FINGERPRINT_BYTES = 64 * 2**10


@dataclass(frozen=True)
class Shard:
    """One token file and what its sidecar says."""

    tokens: TokenFile
    sidecar: Sidecar | None

    @property
    def name(self) -> str:
        """The file's path as messages show it."""
        return self.tokens.name


class Tokens:
    """Every token of some shards, in order, as one immutable sequence.

    The files stay open and are read as they are asked for: one that is renamed or deleted meanwhile is read on.

    Attributes:
        n_tokens: tokens in all shards.
        dtype: an integer type that holds every shard's ids.
        files: their paths, in order (``("demo",)`` for the embedded text).
        encoding: tokenizer name the sidecars give, or None.
        eot: the id that ends documents, if the sidecars give one.
        fingerprint: 16 hex digits that tell data sets apart, whatever the files are called: a hash
            of each file's size, token count, and 64 KiB at its head, middle and tail.
        warnings: what was taken on trust, one sentence each.
        say: told what is waited for, where data is still arriving, by the thread that reads it.
        arrival: what brings the files that were not there when it was opened, if any were not.
    """

    def __init__(self, shards: Sequence[Shard], fingerprint: str, warnings: Sequence[str] = ()) -> None:
        self.files = tuple(shard.name for shard in shards)
        self.fingerprint = fingerprint
        self.warnings = tuple(warnings)
        self.say: Callable[[str], None] = lambda message: None
        self.arrival: Download | None = None
        self.encoding = next((s.sidecar.encoding for s in shards if s.sidecar and s.sidecar.encoding), None)
        self.eot = next((s.sidecar.eot for s in shards if s.sidecar and s.sidecar.eot is not None), None)
        self._shards = tuple(shard.tokens for shard in shards)
        self._starts = (0, *accumulate(len(shard) for shard in self._shards))
        self.n_tokens = self._starts[-1]
        self.dtype = np.result_type(*(shard.dtype for shard in self._shards))

    def __len__(self) -> int:
        return self.n_tokens

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length), 1-D, of ``dtype``.

        Raises:
            IndexError, OnebError: as ``read_into``.
        """
        self._check_range(start, length)
        out = np.empty(length, self.dtype)
        self.read_into(out, start)
        return out

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fill ``out`` (1-D, contiguous, of ``dtype``) with the tokens from ``start`` on.

        Raises:
            IndexError: if the range is not inside the data.
            OnebError: if a file became shorter since it was opened, or its disk failed: which, and where.
        """
        self._check_range(start, len(out))
        shard = bisect.bisect_right(self._starts, start) - 1
        done = 0
        while done < len(out):
            first = start + done - self._starts[shard]
            n_here = min(len(out) - done, len(self._shards[shard]) - first)
            self._shards[shard].read_into(out[done:done + n_here], first)
            done, shard = done + n_here, shard + 1

    def expect(self, starts: Sequence[int], length: int) -> None:
        """``length`` tokens from each of ``starts`` on will be asked for soon: the disk may begin with all of them.

        Raises:
            IndexError: if one of the ranges is not inside the data.
        """
        for start in starts:
            self._check_range(start, length)
            shard = bisect.bisect_right(self._starts, start) - 1
            self._shards[shard].expect(start - self._starts[shard], length)

    def is_here(self, start: int, length: int) -> bool:
        """Whether ``length`` tokens from ``start`` on can be read without waiting for more to arrive."""
        self._check_range(start, length)
        return True

    def wait_for(self, starts: Sequence[int], length: int, cancelled: Callable[[], bool]) -> bool:
        """Wait until ``length`` tokens from each of ``starts`` on are there; False if ``cancelled`` came true before.

        Raises:
            IndexError: if one of the ranges is not inside the data.
            OnebError: they will not come.
        """
        return all(self.is_here(start, length) for start in starts)

    def _check_range(self, start: int, length: int) -> None:
        if not 0 <= start <= start + length <= self.n_tokens:
            raise IndexError(f"tokens [{start}, {start + length}) of {self.n_tokens}")

    def locate(self, offset: int) -> tuple[str, int]:
        """The file that holds the token at ``offset``, and the token's offset in that file."""
        shard = bisect.bisect_right(self._starts, offset, hi=len(self._shards)) - 1
        return self.files[shard], offset - self._starts[shard]


def open_tokens(path: str, data_format: str = "npy", *, vocab_size: int,
                log: Callable[[str], None] | None = None) -> Tokens:
    """Open token files and check them: whole, of one kind, and every id below ``vocab_size``.

    Args:
        path: a file, a folder (its files of that format), a glob (in order of name), or "demo"
            for the embedded text. Write "./demo" for a file of that name.
        data_format: one of ``DATA_FORMATS``.
        vocab_size: ids must lie in [0, vocab_size).
        log: called with progress when reading every token, where no sidecar vouches for the largest id, takes
            more than 2 seconds.

    Raises:
        OnebError: what is missing, cut short, contradictory or out of range, with file and token offset.
    """
    if data_format not in DATA_FORMATS:
        raise OnebError(f"--data-format {data_format!r} is not known; "
                        f"wanted one of {', '.join(DATA_FORMATS)}")
    if path == DEMO_DATA:
        return _open_demo(vocab_size)
    files = _find_files(path, data_format)
    allow_open_files(len(files))
    shards = [Shard(open_file(file, data_format), read_sidecar(file)) for file in files]
    _check_sidecars(shards, vocab_size)
    _check_ids(shards, vocab_size, log)
    tokens = Tokens(shards, _fingerprint(shards), _trust_warnings(shards))
    if tokens.n_tokens < 2:
        raise OnebError(f"{path} holds {tokens.n_tokens} token; wanted at least 2, "
                        "one to read and one to predict")
    return tokens


def _open_demo(vocab_size: int) -> Tokens:
    from oneb.data.demo import DEMO_EOT, demo_tokens

    if vocab_size < BYTE_VOCAB_SIZE:
        raise OnebError(f"--data demo has ids up to {DEMO_EOT}, the model's vocabulary is {vocab_size}; "
                        f"wanted --vocab-size {BYTE_VOCAB_SIZE} or more")
    array = demo_tokens()
    sidecar = Sidecar(tokens=len(array), encoding="bytes", vocab_size=BYTE_VOCAB_SIZE, eot=DEMO_EOT,
                      source="Python's standard library")
    shards = [Shard(TokenFile(DEMO_DATA, HeldBytes(array), array.dtype, 0, len(array)), sidecar)]
    return Tokens(shards, _fingerprint(shards))


# -- Finding the files ---------------------------------------------------------------------------

def _find_files(path: str, data_format: str) -> list[Path]:
    """The files ``path`` stands for, sorted by name."""
    target = Path(path).expanduser()
    if target.is_file():
        return [target]
    if target.is_dir():
        return files_of_folder(target, data_format)
    matches = sorted(Path(match) for match in glob.glob(str(target), recursive=True))
    files = [match for match in matches if match.is_file() and not is_beside_tokens(match.name)]
    if files:
        return files
    if glob.has_magic(path):
        raise OnebError(f"--data {path}: no file matches (looked in {Path.cwd()}). "
                        f"Correct the pattern, or make data with: {_MAKE_DATA} fineweb_100m.npy")
    output = path if path.endswith(".npy") else "fineweb_100m.npy"
    raise OnebError(f"--data {path}: there is no such file, folder or glob (looked for {target.absolute()}). "
                    f"Make it with: {_MAKE_DATA} {output}")


def files_of_folder(folder: Path, data_format: str) -> list[Path]:
    """The token files of that format in a folder, sorted by name.

    Raises:
        OnebError: there are none, or "auto" finds several formats.
    """
    by_suffix: dict[str, list[Path]] = {suffix: [] for suffix in SUFFIXES}
    for file in sorted(folder.iterdir()):
        if file.suffix in by_suffix and file.is_file() and not is_beside_tokens(file.name):
            by_suffix[file.suffix].append(file)
    if data_format == "auto":
        # A .txt beside token files is a readme, so text counts only where nothing else is.
        kinds = [suffix for suffix in SUFFIXES if by_suffix[suffix] and suffix != ".txt"] or [".txt"]
        if len(kinds) > 1:
            raise OnebError(f"{folder} holds several formats ({' '.join(kinds)}); "
                            "name one with --data-format")
        suffix = kinds[0]
    else:
        suffix = ".bin" if data_format == "raw" else f".{data_format}"
    if not by_suffix[suffix]:
        others = [f"{len(files)} {other}" for other, files in by_suffix.items() if files]
        wanted, other = (suffix, "Choose another --data-format, or make") if others else (" ".join(SUFFIXES), "Make")
        raise OnebError(f"{folder} is a folder without {wanted} files (it holds {', '.join(others) or 'none'} of the "
                        f"known formats). {other} data with: {_MAKE_DATA} {folder / 'fineweb_100m.npy'}")
    return by_suffix[suffix]


# -- Checking them -------------------------------------------------------------------------------

def _check_sidecars(shards: Sequence[Shard], vocab_size: int) -> None:
    """That no sidecar contradicts its file, the vocabulary, or another sidecar."""
    encodings: dict[str, str] = {}  # encoding -> first file of that encoding
    for shard in shards:
        sidecar = shard.sidecar
        if sidecar is None:
            continue
        meta = sidecar_path(Path(shard.name))
        if sidecar.tokens is not None and sidecar.tokens != len(shard.tokens):
            raise OnebError(f"{meta} says {sidecar.tokens} tokens but {shard.name} holds {len(shard.tokens)}: "
                            "one of the two is of another file or was cut short. Copy both again, or delete "
                            "the sidecar")
        for key in ("max_id", "eot"):
            value = getattr(sidecar, key)
            if value is not None and value >= (sidecar.vocab_size or value + 1):
                raise OnebError(f"{meta} contradicts itself: {key} {value} is not below vocab_size "
                                f"{sidecar.vocab_size}. Copy it again, or delete it")
        if sidecar.vocab_size is not None and sidecar.vocab_size > vocab_size:
            raise OnebError(f"{shard.name} was made with a vocabulary of {sidecar.vocab_size} (see {meta}), "
                            f"the model has {vocab_size}; wanted --vocab-size {sidecar.vocab_size} or more")
        if sidecar.encoding is not None:
            encodings.setdefault(sidecar.encoding, shard.name)
    if len(encodings) > 1:
        found = ", ".join(f"{encoding} ({name})" for encoding, name in encodings.items())
        raise OnebError(f"the files were made with different tokenizers: {found}; wanted one. "
                        "Give --data only files of one encoding")


def _check_ids(shards: Sequence[Shard], vocab_size: int, log: Callable[[str], None] | None) -> None:
    """That every id lies in [0, vocab_size), reading each file whose sidecar does not vouch for it."""
    unread = [shard for shard in shards if not _vouched(shard, vocab_size)]
    total = sum(len(shard.tokens) for shard in unread)
    done, last_report = 0, time.monotonic()
    for shard in unread:
        buffer = np.empty(min(_SCAN_TOKENS, len(shard.tokens)), shard.tokens.dtype)
        for start in range(0, len(shard.tokens), _SCAN_TOKENS):
            chunk = buffer[:len(shard.tokens) - start]
            shard.tokens.read_into(chunk, start)
            bad = first_bad_id(chunk, vocab_size)
            if bad is not None:
                raise bad_id_error(shard.name, start + bad, int(chunk[bad]), vocab_size)
            done += len(chunk)
            if log is not None and time.monotonic() - last_report > _SCAN_QUIET_S and done < total:
                last_report = time.monotonic()
                log(f"checking token ids: {format_count(done)} of {format_count(total)}")


def _vouched(shard: Shard, vocab_size: int) -> bool:
    # A signed file may hold negative ids, of which max_id says nothing.
    sidecar = shard.sidecar
    return (sidecar is not None and sidecar.tokens is not None and sidecar.max_id is not None
            and sidecar.max_id < vocab_size and shard.tokens.dtype.kind == "u")


def first_bad_id(ids: np.ndarray, vocab_size: int) -> int | None:
    """Where ``ids`` (not empty) first leaves [0, vocab_size), or None."""
    if int(ids.max()) < vocab_size and (ids.dtype.kind == "u" or int(ids.min()) >= 0):
        return None
    return int(np.argmax((ids >= vocab_size) | (ids < 0)))


def bad_id_error(name: str, offset: int, token: int, vocab_size: int) -> OnebError:
    """The error for an id outside the vocabulary at token ``offset`` of file ``name``."""
    return OnebError(f"{name}: token id {token} at token offset {offset} is outside the vocabulary "
                     f"[0, {vocab_size}). The file is damaged, of another --data-format, or of another "
                     "tokenizer (then set --vocab-size to that tokenizer's)")


def _trust_warnings(shards: Sequence[Shard]) -> list[str]:
    warnings = []
    bare = [shard.name for shard in shards if shard.sidecar is None]
    if bare:
        warnings.append(f"{_some_of(bare, shards)} no .meta sidecar, "
                        "so the tokenizer that made the tokens is unknown")
    vague = [shard.name for shard in shards if shard.sidecar and None in
             (shard.sidecar.tokens, shard.sidecar.encoding, shard.sidecar.vocab_size, shard.sidecar.max_id)]
    if vague:
        warnings.append(f"{_some_of(vague, shards)} an old .meta sidecar without all of tokens, encoding, "
                        "vocab_size and max_id, so these could not be checked")
    return warnings


def _some_of(names: Sequence[str], shards: Sequence[Shard]) -> str:
    if len(shards) == 1:
        return f"{names[0]} has"
    return f"{len(names)} of {len(shards)} files (first {names[0]}) have"


# -- Identity ------------------------------------------------------------------------------------

def _fingerprint(shards: Iterable[Shard]) -> str:
    """A hash over each shard's size, token count, and 64 KiB at the head, middle and tail of its file."""
    digest = hashlib.sha256()
    for shard in shards:
        tokens = shard.tokens
        digest.update(f"{tokens.n_bytes} {len(tokens)} ".encode())
        last = max(0, tokens.n_bytes - _FINGERPRINT_BYTES)
        for start in (0, last // 2, last):
            digest.update(tokens.file_bytes(start, _FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]
