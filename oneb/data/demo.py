"""The embedded data set ``--data demo``: text that every Python already has, so nothing is downloaded.

It is the source of Python's own standard library, as bytes: ids 0-255 are bytes, 256 ends a file.
About eleven million tokens; it differs between Python versions, so losses on it compare only within one.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from oneb.errors import OnebError

DEMO_EOT = 256

# Installed packages differ between machines; tests and toy programs are poor prose.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__",
                              "idlelib", "lib2to3", "turtledemo", "ensurepip"})


def demo_tokens() -> np.ndarray:
    """The demo's tokens, uint16 (n_tokens,), the same on every call.

    Raises:
        OnebError: if this Python comes without its library's source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    end = np.array([DEMO_EOT], np.uint16)
    pieces: list[np.ndarray] = []
    for path in _shuffled(_source_files(root), root):
        data = path.read_bytes()
        if data:
            pieces += [np.frombuffer(data, np.uint8).astype(np.uint16), end]
    if not pieces:
        raise OnebError(f"--data demo: this Python has no library source under {root}; "
                        "give --data a token file made by prepare_fineweb.py")
    return np.concatenate(pieces)


def _source_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _shuffled(paths: Iterator[Path], root: Path) -> list[Path]:
    """In an order that is fixed but mixes packages, so that the validation tail is a fair sample."""
    return sorted(paths, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())
