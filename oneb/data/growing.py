"""The SHA-256 of a file while it grows, so that none of it has to be read again once it is whole."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

_BLOCK_BYTES = 2**20


class GrowingHash:
    """Reads a file in a thread, behind those who write it.

    Args:
        header: of the file, which may be written last.
    """

    def __init__(self, path: Path, header: bytes) -> None:
        self.header = header
        self._path, self._digest = path, hashlib.sha256(header)
        self._ready = len(header)
        self._whole = self._stopped = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def extend(self, size: int, *, whole: bool = False) -> None:
        """The file's first ``size`` bytes are what they will be; ``whole``: these are all."""
        with self._changed:
            self._ready, self._whole = size, whole
            self._changed.notify()

    def hexdigest(self) -> str:
        """Of the whole file; waits for it.

        Raises:
            OSError: reading failed.
        """
        assert self._whole
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()

    def stop(self) -> None:
        """End, at the next block."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._read()
        except BaseException as error:  # fallback: raised by ``hexdigest``, in the thread that asks
            self._error = error

    def _read(self) -> None:
        buffer, done = memoryview(bytearray(_BLOCK_BYTES)), len(self.header)
        with open(self._path, "rb", buffering=0) as file:
            file.seek(done)
            while (ready := self._wait(done)) > done:
                n_bytes = file.readinto(buffer[:min(_BLOCK_BYTES, ready - done)])
                if not n_bytes:
                    raise OSError(f"{self._path} ends at byte {done}, before byte {ready}: another program cut it")
                self._digest.update(buffer[:n_bytes])
                done += n_bytes

    def _wait(self, done: int) -> int:
        """Up to where to read; ``done`` at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._whole or self._ready > done)
            return done if self._stopped else self._ready
