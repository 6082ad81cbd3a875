"""A place for copies of files, a folder or an object store, behind the few calls that the mirror needs.

Names are relative to the place: ``run/step00000100.pt``. Every call may block for as long as the network or the mount
does: call them through :func:`watched`. Errors are OSError, or what the store's client raises.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

from oneb.errors import OnebError
from oneb.files import fsync_directory

# A block is what is read, sent and counted as progress at once: an S3 part (of which an object has 10,000 at most).
BLOCK_BYTES = 16 * 2**20
# Blocks of an object under way at once when it is read.
READ_AHEAD = 4
# A mount gets what was written so far to its disk this often, so that the last fsync is not a long silence.
SYNC_BYTES = 256 * 2**20
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 20.0
# Of one request, by the client itself; whole copies are tried again by the mirror.
REQUEST_ATTEMPTS = 3
# A request that sends a block, all attempts together. The client's timeouts are for answers: where a server, or a
# network that is gone, takes no more of what is sent, nothing else ends it.
REQUEST_S = 90.0

Moved = Callable[[int], None]  # told how many bytes were sent or read
T = TypeVar("T")


class DamagedError(OSError):
    """A file at the place is not what was put there."""


class Place(Protocol):
    """A folder or an object store."""

    def make(self, folder: str) -> None:
        """Make a folder in the place, where it is not there and folders exist at all."""

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder; none where there is no such folder."""

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""

    def read(self, name: str) -> Iterator[bytes]:
        """A file's blocks, from the place itself and not from a cache of this machine.

        Raises:
            DamagedError: the store itself says that they are not what was put there.
        """

    def write(self, name: str, blocks: Iterable[bytes]) -> None:
        """Make or replace a file, at once when all of it has arrived; if it fails nothing has changed."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def remove_unfinished(self, folder: str) -> None:
        """Remove what killed processes have left of files that they were writing to a folder."""


def open_place(place: str) -> Place:
    """The place of that path or URL; nothing of it is read yet.

    Raises:
        OnebError: the package that its kind of URL needs is not installed.
    """
    if "://" not in place or place.startswith(("file://", "local://")):
        return _Folder(Path(place.split("://")[-1]).expanduser().absolute())
    protocol = place.split("://")[0]
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        options["config_kwargs"] = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S,
                                    "retries": {"total_max_attempts": REQUEST_ATTEMPTS}}
    try:
        import fsspec

        filesystem, root = fsspec.core.url_to_fs(place, **options)
    except (ImportError, ValueError) as error:
        package = "s3fs" if protocol in ("s3", "s3a") else f"fsspec and its package for {protocol}://"
        raise OnebError(f"--save-to {place} needs {package} ({str(error).splitlines()[0]}); `python3 -m pip install "
                        f"{'s3fs' if package == 's3fs' else 'fsspec …'}`, or give a folder") from None
    return _Store(filesystem, root)


class _Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def make(self, folder: str) -> None:
        # Never the place itself: where a drive is not mounted, that would be a folder on this machine's own disk.
        (self.path / folder).mkdir(exist_ok=True)

    def names(self, folder: str) -> list[str]:
        if not self.path.is_dir():
            raise FileNotFoundError(f"there is no folder {self.path}")
        try:
            return sorted(os.listdir(self.path / folder))
        except FileNotFoundError:
            return []

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def read(self, name: str) -> Iterator[bytes]:
        with open(self.path / name, "rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while block := file.read(BLOCK_BYTES):
                yield block

    def write(self, name: str, blocks: Iterable[bytes]) -> None:
        target = self.path / name
        if not target.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {target.parent} (is the drive mounted?)")
        temporary = target.with_name(f".{target.name}.tmp{secrets.token_hex(4)}")
        try:
            with open(temporary, "xb") as file:
                unsynced = 0
                for block in blocks:
                    file.write(block)
                    unsynced += len(block)
                    if unsynced >= SYNC_BYTES:
                        file.flush()
                        os.fsync(file.fileno())
                        unsynced = 0
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # some mounts have no fsync of directories
            fsync_directory(target.parent)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def remove_unfinished(self, folder: str) -> None:
        for path in (self.path / folder).glob(".*.tmp????????"):
            path.unlink(missing_ok=True)


class _Store:
    """An fsspec file system whose files are written at once when they are closed, as S3's are."""

    def __init__(self, filesystem: Any, root: str) -> None:
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        if self._is_s3():
            filesystem.retries = 2  # times REQUEST_ATTEMPTS
            # fsspec takes `timeout` out of any synchronous call. Sending goes through this one.
            filesystem.call_s3 = functools.partial(filesystem.call_s3, timeout=REQUEST_S)

    def make(self, folder: str) -> None:
        pass

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(PurePosixPath(path).name for path in self.filesystem.ls(self._path(folder), detail=False))
        except FileNotFoundError:
            return []

    def size(self, name: str) -> int:
        return int(self.filesystem.info(self._path(name))["size"])

    def read(self, name: str) -> Iterator[bytes]:
        path, size = self._path(name), self.size(name)
        starts = range(0, size, BLOCK_BYTES)
        for first in range(0, len(starts), READ_AHEAD):
            some = list(starts[first : first + READ_AHEAD])
            ends = [min(start + BLOCK_BYTES, size) for start in some]
            # Its other way of telling errors, to raise them, is not in all versions.
            for block in self.filesystem.cat_ranges([path] * len(some), some, ends, on_error="return"):
                if isinstance(block, BaseException):
                    if "Checksum" in type(block).__name__:  # the store's own, which some have for small objects
                        raise DamagedError(f"its checksum there is wrong: {block}")
                    raise block
                yield block

    def write(self, name: str, blocks: Iterable[bytes]) -> None:
        file = self.filesystem.open(self._path(name), "wb", block_size=BLOCK_BYTES)
        try:
            for block in blocks:
                file.write(block)
            file.close()
        except BaseException:
            # Closing, which the collector would do, too, puts what has arrived so far in place as if it were all.
            with contextlib.suppress(Exception):
                file.discard()
            with contextlib.suppress(AttributeError):
                file.closed = True
            raise

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.rm_file(self._path(name))

    def remove_unfinished(self, folder: str) -> None:
        """Parts of an upload that never ended are paid for, and no listing shows them."""
        if not self._is_s3():
            return
        bucket, _, key = self._path(folder).partition("/")
        found = self.filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/")
        for upload in found.get("Uploads", ()):
            if upload["Key"].startswith(f"{key}/"):
                self.filesystem.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"],
                                        UploadId=upload["UploadId"])

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _is_s3(self) -> bool:
        return "s3" in self.filesystem.protocol


class Stalled(OSError):
    """Nothing moved for too long; ``thread`` is the one that still waits for it."""

    def __init__(self, limit_s: float, thread: threading.Thread) -> None:
        super().__init__(f"nothing moved for {limit_s:.0f}s")
        self.thread = thread


class _Task(threading.Thread):
    def __init__(self, work: Callable[[Moved], Any]) -> None:
        super().__init__(name="mirror-io", daemon=True)
        self.work = work
        self.result: Any = None
        self.error: BaseException | None = None
        self.abandoned = False
        self.moved_at = time.monotonic()

    def run(self) -> None:
        try:
            self.result = self.work(self.moved)
        except BaseException as error:  # fallback: raised where the work is waited for
            self.error = error

    def moved(self, n_bytes: int) -> None:
        if self.abandoned:
            raise InterruptedError("given up")
        self.moved_at = time.monotonic()


def watched(work: Callable[[Moved], T], limit_s: float) -> T:
    """What ``work(moved)`` returns or raises, in a thread that is left behind once it has not moved for too long.

    A request that never ends or a mount that is gone cannot be interrupted, only left alone; the thread ends at its
    next ``moved(n_bytes)``.

    Args:
        work: calls ``moved`` after every block.
        limit_s: the longest time, in seconds, without such a call.

    Raises:
        Stalled: that time has passed.
    """
    task = _Task(work)
    task.start()
    while task.is_alive():
        left = limit_s - (time.monotonic() - task.moved_at)
        if left <= 0:
            task.abandoned = True
            raise Stalled(limit_s, task)
        task.join(left)
    if task.error is not None:
        raise task.error
    return task.result
