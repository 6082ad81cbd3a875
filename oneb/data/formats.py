"""One reader a token-file format: each gives a 1-D integer array that maps the file where it can.

Readers check what can be checked without reading the tokens: that the file is whole, of that
format, and holds integers. Whether the ids fit the vocabulary is ``tokens.py``'s question.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from oneb.errors import OnebError

SUFFIXES = {".npy": "npy", ".bin": "bin", ".pt": "pt", ".txt": "txt"}

# llm.c and modded-nanogpt shards: 256 little-endian int32 (magic, version, token count, zeros),
# then uint16 tokens. https://github.com/karpathy/llm.c/blob/master/dev/data/data_common.py
BIN_MAGIC = 20240520
BIN_VERSION = 1
BIN_HEADER_BYTES = 256 * 4

_TOKEN_DTYPES = ("uint16", "uint32", "int32", "int64")


def read_tokens(path: Path, data_format: str) -> np.ndarray:
    """The tokens of one file, 1-D, mapped and not loaded (except ``txt``).

    Args:
        data_format: one of :data:`oneb.config.DATA_FORMATS`; "auto" goes by the suffix, and a ``.bin`` without
            the llm.c magic number is raw uint16.

    Raises:
        OnebError: if the file is not of that format, is cut short, is empty, or holds no integers.
    """
    if data_format == "auto":
        data_format = _guess_format(path)
    try:
        array = _READERS[data_format](path)
    except OSError as error:
        raise OnebError(f"{path} cannot be read: {error.strerror or error}") from error
    if array.size == 0:
        raise OnebError(f"{path} holds no tokens; delete it, or make it again")
    return array


def _guess_format(path: Path) -> str:
    data_format = SUFFIXES.get(path.suffix.lower())
    if data_format is None:
        raise OnebError(f"{path}: the format of a file ending in {path.suffix!r} cannot be guessed "
                        f"(known: {' '.join(SUFFIXES)}); name it with --data-format")
    if data_format == "bin" and not _has_bin_magic(path):
        return "raw"
    return data_format


def _has_bin_magic(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == BIN_MAGIC.to_bytes(4, "little")


def _read_npy(path: Path) -> np.ndarray:
    dtype, shape, data_start = _npy_header(path)
    _check_array(path, dtype.name, shape)
    _check_bytes(path, path.stat().st_size - data_start, shape[0], dtype.itemsize)
    return _map(path, dtype, data_start, shape[0])


def _npy_header(path: Path) -> tuple[np.dtype, tuple[int, ...], int]:
    """dtype, shape and the byte where the data starts."""
    with open(path, "rb") as file:
        if path.stat().st_size == 0:
            raise OnebError(f"{path} is an empty file; delete it, or make it again")
        try:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, _, dtype = read(file)
        except Exception as error:  # numpy lets a damaged header's TokenError and others through
            raise OnebError(f"{path} is not a .npy file ({error}); wanted a 1-D array saved by numpy.save. "
                            "If it is another format, name it with --data-format") from error
        return dtype, shape, file.tell()


def _read_bin(path: Path) -> np.ndarray:
    if not _has_bin_magic(path):
        raise OnebError(f"{path} does not start with the llm.c magic number {BIN_MAGIC}; "
                        "if it is plain uint16 without a header, use --data-format raw")
    n_bytes = path.stat().st_size - BIN_HEADER_BYTES
    if n_bytes < 0:
        raise OnebError(f"{path} ends inside its {BIN_HEADER_BYTES}-byte header; copy or download it again")
    _, version, n_tokens = np.fromfile(path, "<i4", count=3).tolist()
    if version != BIN_VERSION:
        raise OnebError(f"{path} is an llm.c shard of version {version}; "
                        f"wanted version {BIN_VERSION} (uint16 tokens)")
    _check_bytes(path, n_bytes, n_tokens, itemsize=2, exact=True)
    return _map(path, np.dtype("<u2"), BIN_HEADER_BYTES, n_tokens)


def _read_raw(path: Path) -> np.ndarray:
    n_bytes = path.stat().st_size
    if n_bytes % 2:
        raise OnebError(f"{path} has {n_bytes} bytes, an odd number; raw uint16 tokens take 2 bytes each. "
                        "It was cut short, or is another format (--data-format)")
    return _map(path, np.dtype("<u2"), 0, n_bytes // 2)


def _read_pt(path: Path) -> np.ndarray:
    import torch

    # Only the zip container (torch >= 1.6) can be mapped; older files are loaded. A damaged pickle
    # may raise nearly anything, IndexError and AttributeError included.
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OnebError(f"{path} cannot be loaded as one tensor ({reason}); "
                        "wanted a 1-D integer tensor saved by torch.save") from error
    if not isinstance(value, torch.Tensor):
        raise OnebError(f"{path} holds a {type(value).__name__}; "
                        "wanted a 1-D integer tensor saved by torch.save")
    _check_array(path, str(value.dtype).removeprefix("torch."), tuple(value.shape))
    return value.detach().numpy()


def _read_txt(path: Path) -> np.ndarray:
    words = path.read_text(encoding="utf-8", errors="replace").split()
    for offset, word in enumerate(words):
        if not (word.isascii() and word.isdigit() and len(word) < 19):
            raise OnebError(f"{path}: {word[:40]!r} at token offset {offset} is not a token id; "
                            "wanted whitespace-separated whole numbers")
    return np.array([int(word) for word in words], dtype=np.int64)


_READERS: dict[str, Callable[[Path], np.ndarray]] = {
    "npy": _read_npy, "bin": _read_bin, "raw": _read_raw, "pt": _read_pt, "txt": _read_txt,
}


def _check_array(path: Path, dtype_name: str, shape: tuple[int, ...]) -> None:
    if dtype_name not in _TOKEN_DTYPES:
        raise OnebError(f"{path} holds {dtype_name}; wanted token ids as {', '.join(_TOKEN_DTYPES)}")
    if len(shape) != 1:
        raise OnebError(f"{path} has shape {shape}; wanted one dimension, all tokens in a row. "
                        "Save it again with .reshape(-1)")


def _check_bytes(path: Path, n_bytes: int, n_tokens: int, itemsize: int, exact: bool = False) -> None:
    """That a header's count fits the bytes behind it."""
    held = n_bytes // itemsize
    if not 0 <= n_tokens * itemsize <= n_bytes:
        raise OnebError(f"{path} is cut short: its header promises {n_tokens} tokens, the file ends at token "
                        f"offset {held}; copy or download it again")
    if exact and n_bytes != n_tokens * itemsize:
        raise OnebError(f"{path}: its header promises {n_tokens} tokens but {held} follow; "
                        "copy or download it again")


def _map(path: Path, dtype: np.dtype, start_byte: int, n_tokens: int) -> np.ndarray:
    if n_tokens == 0:
        return np.empty(0, dtype)  # an empty range cannot be mapped
    return np.memmap(path, dtype, mode="r", offset=start_byte, shape=(n_tokens,))
