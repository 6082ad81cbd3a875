"""Files that are whole or absent: atomic writes, hashes, JSON lines that survive a torn end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

_HASH_CHUNK = 8 * 2**20


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Write beside ``path``, fsync, then rename over it: readers see the old file or the whole new one.

    The temporary file is removed if the body raises.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def fsync_directory(directory: str | os.PathLike) -> None:
    """Make a rename in ``directory`` survive a power cut (a no-op where directories cannot be opened)."""
    with contextlib.suppress(PermissionError, IsADirectoryError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Atomically replace ``path`` with ``text`` (UTF-8)."""
    with atomic_writer(path, "w") as file:
        file.write(text)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Atomically replace ``path`` with indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sha256_file(path: str | os.PathLike, cancelled: Callable[[], bool] = lambda: False) -> str:
    """Hex SHA-256 of a file, read in chunks; of a part of it once ``cancelled`` says so."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while (chunk := file.read(_HASH_CHUNK)) and not cancelled():
            digest.update(chunk)
    return digest.hexdigest()


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a torn last line (a kill mid-write) is left out.

    Raises:
        ValueError: if a line other than the last is not JSON.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):  # the latter where it is nested too deep
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is not JSON: {line[:80]!r}") from None
    return rows
