"""How many tokens ``--data`` holds and of what vocabulary, from its name, headers, sidecars and file sizes alone.

Needs no numpy, and reads nothing through.
"""

from __future__ import annotations

import ast
import glob
from pathlib import Path

from oneb.config import DEMO_DATA
from oneb.data.names import manifest_files, named_folder, parse_name
from oneb.data.sidecar import is_beside_tokens, read_sidecar
from oneb.errors import OnebError

_NPY_MAGIC = b"\x93NUMPY"
_BIN_HEADER_BYTES = 1024


def count_tokens(path: str, data_format: str) -> int | None:
    """Tokens of a file, a folder, a glob or a name; None where that cannot be told from outside. Checks nothing.

    Raises:
        OnebError: it looks like a name and is none.
    """
    if path == DEMO_DATA:
        return None
    if (name := parse_name(path)) is not None:
        return name.n_tokens
    if (folder := named_folder(path)) is not None:
        return sum(n_tokens for _, n_tokens in manifest_files(folder)) or None
    try:
        counts = [_tokens_of(file, data_format) for file in _files(path, data_format)]
    except OSError:
        return None  # the training process says why it cannot be read
    return sum(counts) if counts and None not in counts else None


def vocabulary(path: str, data_format: str) -> int:
    """The ids of these files lie below it, their sidecars say; 0 where none says so."""
    try:
        sidecars = [read_sidecar(file) for file in _files(path, data_format)]
    except (OSError, OnebError):
        return 0  # the training process says what is wrong with it
    return max((sidecar.vocab_size or 0 for sidecar in sidecars if sidecar), default=0)


def _files(path: str, data_format: str) -> list[Path]:
    """The token files of a path: a file, a folder or a glob."""
    target = Path(path).expanduser()
    if target.is_dir():
        suffix = {"raw": ".bin", "auto": ".npy"}.get(data_format, f".{data_format}")
        files = sorted(target.glob(f"*{suffix}"))
    elif target.is_file():
        files = [target]
    else:
        files = [Path(name) for name in glob.glob(str(target), recursive=True)]
    return [file for file in files if file.is_file() and not is_beside_tokens(file.name)]


def _tokens_of(file: Path, data_format: str) -> int | None:
    kind = file.suffix.removeprefix(".") if data_format == "auto" else data_format
    size = file.stat().st_size
    if kind == "raw":
        return size // 2
    if kind == "bin":
        return max(0, size - _BIN_HEADER_BYTES) // 2
    return _npy_length(file) if kind == "npy" else None


def _npy_length(file: Path) -> int | None:
    """The first dimension in a ``.npy`` header (format 1 or 2, numpy.lib.format); None if it is not one."""
    with open(file, "rb") as opened:
        start = opened.read(8)
        if start[:6] != _NPY_MAGIC or len(start) < 8:
            return None
        length = int.from_bytes(opened.read(2 if start[6] == 1 else 4), "little")
        try:
            (tokens,) = ast.literal_eval(opened.read(min(length, 2**16)).decode("latin-1"))["shape"]
        except (SyntaxError, ValueError, KeyError, TypeError):
            return None  # the training process says what is wrong with it
    return tokens
