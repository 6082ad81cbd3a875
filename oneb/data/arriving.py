"""Token files of known lengths that may not be there yet: reading from one waits for it."""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from oneb.data.formats import open_file
from oneb.data.reading import TokenFile
from oneb.data.tokens import Shard, Tokens
from oneb.errors import OnebError

if TYPE_CHECKING:
    from oneb.data.download import Download

Cancelled = Callable[[], bool]
Say = Callable[[str], None]


def _never() -> bool:
    return False


class ArrivingFile:
    """A :class:`TokenFile` (uint16, of the llm.c format) that appears under its name when it is whole.

    Args:
        n_tokens: how many of its tokens are used; it may have more.
        download: brings it; None where all files are there.
    """

    dtype = np.dtype("<u2")

    def __init__(self, path: Path, n_tokens: int, download: Download | None) -> None:
        self.name, self.path, self.n_tokens = str(path), path, n_tokens
        self._download = download
        self._file: TokenFile | None = None
        if path.exists():
            self._open()

    def __len__(self) -> int:
        return self.n_tokens

    @property
    def is_here(self) -> bool:
        """Whether reading does not wait."""
        return self._file is not None or self.path.exists()

    def wait(self, cancelled: Cancelled = _never, say: Say | None = None) -> bool:
        """Wait for it, and ``say`` so; False if ``cancelled`` came true before.

        Raises:
            OnebError: it will not come.
        """
        return self.is_here or self._download is None or self._download.wait(self.path.name, cancelled, say)

    def expect(self, start: int, length: int) -> None:
        """Tokens [start, start + length) will be asked for soon; nothing to do for those that are not there."""
        if self.is_here:
            self._open().expect(start, length)

    def read_into(self, out: np.ndarray, start: int) -> None:
        """As :meth:`TokenFile.read_into`; the file has to be there."""
        self._open().read_into(out, start)

    def _open(self) -> TokenFile:
        if self._file is None:
            file = open_file(self.path, "bin")
            if len(file) < self.n_tokens:
                raise OnebError(f"{self.path} holds {len(file)} tokens, wanted {self.n_tokens}; delete it, and it is "
                                "brought again")
            self._file = file
        return self._file


class ArrivingTokens(Tokens):
    """:class:`Tokens` of files that may not be there yet. Whoever reads from those waits for them."""

    def __init__(self, shards: Sequence[Shard], fingerprint: str, say: Say, download: Download | None = None) -> None:
        super().__init__(shards, fingerprint)
        self.say, self.arrival = say, download

    def read_into(self, out: np.ndarray, start: int) -> None:
        """As :meth:`Tokens.read_into`, once the files are there."""
        for file in self._of(start, len(out)):
            file.wait(say=self.say)
        super().read_into(out, start)

    def is_here(self, start: int, length: int) -> bool:
        """Whether reading these tokens does not wait."""
        return all(shard.is_here for shard in self._of(start, length))

    def wait_for(self, starts: Sequence[int], length: int, cancelled: Cancelled) -> bool:
        """As :meth:`Tokens.wait_for`."""
        files = {shard.name: shard for start in starts for shard in self._of(start, length)}
        return all(shard.wait(cancelled) for shard in files.values())

    def _of(self, start: int, length: int) -> Sequence[ArrivingFile]:
        self._check_range(start, length)
        first = bisect.bisect_right(self._starts, start) - 1
        last = bisect.bisect_left(self._starts, start + length)
        return self._shards[first:last]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Whether this process may write to ``folder`` for so long; a lock that ends with the process."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        alone = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = False
        except OSError:  # a network disk without locks: two processes then write the same, each its own temporary
            pass
        yield alone
    finally:
        os.close(descriptor)
