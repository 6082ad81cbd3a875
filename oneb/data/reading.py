"""Tokens of one file, read by position.

Not through a mapping: where the file shrinks or its disk fails under one, the kernel ends the process (SIGBUS), and
nothing can be saved. A read that fails is an error like any other. It also leaves other threads running while it
waits for the disk, and a page fault does not.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Protocol

import numpy as np

from oneb.errors import OnebError

_OTHER_FILES = 512  # descriptors that everything but the data may need
_CONTINUE = "put the same file there again; a run that was training on it continues with --resume"


class Bytes(Protocol):
    """Something of ``n_bytes`` bytes to read from."""

    n_bytes: int

    def expect(self, start: int, length: int) -> None:
        """These bytes will be asked for soon."""

    def read_into(self, out: np.ndarray, start: int) -> int:
        """Fill ``out`` (contiguous) from byte ``start`` on; returns the bytes read, fewer where the end comes first."""


class OpenFile:
    """A file that stays open: it may be renamed, replaced or deleted meanwhile, and still reads as what it was.

    Raises:
        OSError: it cannot be opened or, later, read.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self.n_bytes = os.fstat(self._descriptor).st_size

    def expect(self, start: int, length: int) -> None:
        """Have the kernel begin to read; it does not wait for the disk."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._descriptor, start, length, os.POSIX_FADV_WILLNEED)

    def read_into(self, out: np.ndarray, start: int) -> int:
        """As :class:`Bytes` says; safe in several threads at once."""
        target, done = out.view(np.uint8), 0
        # The kernel may give less than was asked for (2 GiB at most) without being at the end.
        while done < len(target) and (n_bytes := os.preadv(self._descriptor, [target[done:]], start + done)):
            done += n_bytes
        return done

    def read(self, start: int, length: int) -> bytes:
        """At most ``length`` bytes from byte ``start`` on, fewer where the file ends before."""
        out = np.empty(max(0, min(length, self.n_bytes - start)), np.uint8)
        return out[:self.read_into(out, start)].tobytes()


class HeldBytes:
    """An array's bytes, in memory."""

    def __init__(self, array: np.ndarray) -> None:
        self._bytes = np.ascontiguousarray(array).view(np.uint8)
        self.n_bytes = len(self._bytes)

    def expect(self, start: int, length: int) -> None:
        """As :class:`Bytes` says: nothing to do."""

    def read_into(self, out: np.ndarray, start: int) -> int:
        """As :class:`Bytes` says."""
        found = self._bytes[start:start + out.nbytes]
        out.view(np.uint8)[:len(found)] = found
        return len(found)


class TokenFile:
    """The tokens of one file.

    Args:
        name: its path as messages show it.
        source: where the tokens are, in a row.
        dtype: of one of them.
        start_byte: where in ``source`` the first one is.
        n_tokens: how many there are.
        file: the file as it is, where ``source`` is what was read out of it.
    """

    def __init__(self, name: str, source: Bytes, dtype: np.dtype, start_byte: int, n_tokens: int,
                 file: Bytes | None = None) -> None:
        self.name, self.dtype, self.n_tokens = name, dtype, n_tokens
        self._source, self._start_byte, self._itemsize = source, start_byte, dtype.itemsize
        self._file = file or source

    def __len__(self) -> int:
        return self.n_tokens

    @property
    def n_bytes(self) -> int:
        """Size of the file when it was opened."""
        return self._file.n_bytes

    def expect(self, start: int, length: int) -> None:
        """Tokens [start, start + length) will be asked for soon."""
        self._source.expect(self._start_byte + start * self._itemsize, length * self._itemsize)

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length), 1-D, of the file's dtype.

        Raises:
            OnebError: as :meth:`read_into`.
        """
        out = np.empty(length, self.dtype)
        self.read_into(out, start)
        return out

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fill ``out`` (1-D, contiguous, any integer dtype that holds the ids) with the tokens from ``start`` on.

        Raises:
            OnebError: the file became shorter since it was opened, or its disk failed.
        """
        if out.dtype != self.dtype:
            out[:] = self.read(start, len(out))
            return
        first = self._start_byte + start * self._itemsize
        try:
            n_bytes = self._source.read_into(out, first)
        except OSError as error:
            raise OnebError(f"{self.name} cannot be read any more, at token offset {start} (byte {first}): "
                            f"{error.strerror or error}. Look after its disk, or copy it to another; {_CONTINUE}"
                            ) from error
        if n_bytes < out.nbytes:
            held = start + n_bytes // self._itemsize
            raise OnebError(f"{self.name} now ends before token offset {held} (byte {first + n_bytes}); it had "
                            f"{self.n_tokens} tokens when it was opened, and was cut short or overwritten since; "
                            f"{_CONTINUE}")

    def file_bytes(self, start: int, length: int) -> bytes:
        """At most so many bytes of the file as it is.

        Raises:
            OnebError: its disk failed.
        """
        out = np.empty(max(0, min(length, self.n_bytes - start)), np.uint8)
        try:
            return out[:self._file.read_into(out, start)].tobytes()
        except OSError as error:
            raise cannot_read(self.name, error) from error


def cannot_read(name: str | Path, error: OSError) -> OnebError:
    """The error for a file that cannot be opened, or be read as a whole."""
    return OnebError(f"{name} cannot be read: {error.strerror or error}")


def allow_open_files(n_files: int) -> None:
    """Let this process have so many more files open, as far as the system's hard limit goes."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n_files + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
