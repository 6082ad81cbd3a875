"""One reader a token-file format: each opens a file and finds its tokens, which stay on the disk where they can.

Readers check what can be checked without reading the tokens: that the file is whole, of that
format, and holds integers. Whether the ids fit the vocabulary is ``tokens.py``'s question.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from oneb.data.reading import HeldBytes, OpenFile, TokenFile, cannot_read
from oneb.errors import OnebError

SUFFIXES = {".npy": "npy", ".bin": "bin", ".pt": "pt", ".txt": "txt"}

# llm.c and modded-nanogpt shards: 256 little-endian int32 (magic, version, token count, zeros),
# then uint16 tokens. https://github.com/karpathy/llm.c/blob/master/dev/data/data_common.py
BIN_MAGIC = 20240520
BIN_VERSION = 1
BIN_HEADER_BYTES = 256 * 4

_TOKEN_DTYPES = ("uint16", "uint32", "int32", "int64")
_NPY_HEADER_BYTES = 2**16  # more than numpy writes, or reads, for an array of numbers
_PT_WANTED = "wanted a 1-D integer tensor saved by torch.save"


def open_file(path: Path, data_format: str) -> TokenFile:
    """The tokens of one file, on disk and not loaded (except ``txt``, and ``pt`` of torch before 1.6).

    Args:
        data_format: one of :data:`oneb.config.DATA_FORMATS`; "auto" goes by the suffix, and a ``.bin`` without
            the llm.c magic number is raw uint16.

    Raises:
        OnebError: if the file is not of that format, is cut short, is empty, or holds no integers.
    """
    try:
        file = OpenFile(path)
        if data_format == "auto":
            data_format = _guess_format(path, file)
        tokens = _READERS[data_format](path, file)
    except OSError as error:
        raise cannot_read(path, error) from error
    if tokens.n_tokens == 0:
        raise OnebError(f"{path} holds no tokens; delete it, or make it again")
    return tokens


def _guess_format(path: Path, file: OpenFile) -> str:
    data_format = SUFFIXES.get(path.suffix.lower())
    if data_format is None:
        raise OnebError(f"{path}: the format of a file ending in {path.suffix!r} cannot be guessed "
                        f"(known: {' '.join(SUFFIXES)}); name it with --data-format")
    if data_format == "bin" and not _has_bin_magic(file):
        return "raw"
    return data_format


def _has_bin_magic(file: OpenFile) -> bool:
    return file.read(0, 4) == BIN_MAGIC.to_bytes(4, "little")


def _read_npy(path: Path, file: OpenFile) -> TokenFile:
    dtype, shape, data_start = _npy_header(path, file)
    _check_array(path, dtype.name, shape)
    _check_bytes(path, file.n_bytes - data_start, shape[0], dtype.itemsize, exact=True)
    return TokenFile(str(path), file, dtype, data_start, shape[0])


def _npy_header(path: Path, file: OpenFile) -> tuple[np.dtype, tuple[int, ...], int]:
    """dtype, shape and the byte where the data starts."""
    if file.n_bytes == 0:
        raise OnebError(f"{path} is an empty file; delete it, or make it again")
    # A damaged header may say that it is 4 GiB long.
    head = io.BytesIO(file.read(0, _NPY_HEADER_BYTES))
    try:
        version = np.lib.format.read_magic(head)
        read = {(1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = read(head)
    except Exception as error:  # numpy lets a damaged header's TokenError and others through
        raise OnebError(f"{path} is not a .npy file ({error}); wanted a 1-D array saved by numpy.save. "
                        "If it is another format, name it with --data-format") from error
    return dtype, shape, head.tell()


def _read_bin(path: Path, file: OpenFile) -> TokenFile:
    if not _has_bin_magic(file):
        raise OnebError(f"{path} does not start with the llm.c magic number {BIN_MAGIC}; "
                        "if it is plain uint16 without a header, use --data-format raw")
    n_bytes = file.n_bytes - BIN_HEADER_BYTES
    if n_bytes < 0:
        raise OnebError(f"{path} ends inside its {BIN_HEADER_BYTES}-byte header; copy or download it again")
    _, version, n_tokens = struct.unpack("<3i", file.read(0, 12))
    if version != BIN_VERSION:
        raise OnebError(f"{path} is an llm.c shard of version {version}; "
                        f"wanted version {BIN_VERSION} (uint16 tokens)")
    _check_bytes(path, n_bytes, n_tokens, itemsize=2, exact=True)
    return TokenFile(str(path), file, np.dtype("<u2"), BIN_HEADER_BYTES, n_tokens)


def _read_raw(path: Path, file: OpenFile) -> TokenFile:
    if file.n_bytes % 2:
        raise OnebError(f"{path} has {file.n_bytes} bytes, an odd number; raw uint16 tokens take 2 bytes each. "
                        "It was cut short, or is another format (--data-format)")
    return TokenFile(str(path), file, np.dtype("<u2"), 0, file.n_bytes // 2)


def _read_pt(path: Path, file: OpenFile) -> TokenFile:
    # A damaged pickle may raise nearly anything, IndexError and AttributeError included.
    try:
        zipped = zipfile.is_zipfile(path)  # torch >= 1.6; older files are loaded
        record = _pt_record(path, file) if zipped else None
        value = _load_pt(path, mapped=zipped)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OnebError(f"{path} cannot be loaded as one tensor ({reason}); {_PT_WANTED}") from error
    _check_tensor(path, value)
    dtype, n_tokens = np.dtype(str(value.dtype).removeprefix("torch.")), len(value)
    if record is None:
        return TokenFile(str(path), HeldBytes(value.numpy()), dtype, 0, n_tokens, file)
    start_byte, record_bytes, order = record
    first = value.storage_offset() * dtype.itemsize
    _check_bytes(path, min(record_bytes, file.n_bytes - start_byte) - first, n_tokens, dtype.itemsize)
    return TokenFile(str(path), file, dtype.newbyteorder(order), start_byte + first, n_tokens)


def _pt_record(path: Path, file: OpenFile) -> tuple[int, int, str]:
    """Of the tensor in torch's zip file: the byte where its data starts, how many there are, their byte order.

    The layout: https://github.com/pytorch/pytorch/blob/main/caffe2/serialize/inline_container.h

    Raises:
        ValueError: it is not torch's, or does not hold one tensor.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, as torch never does")
        tensors = [entry for entry in entries if re.fullmatch(r".*/data/\d+", entry.filename)]
        if len(tensors) != 1:
            raise ValueError(f"it holds {len(tensors)} tensors")
        big = any(entry.filename.endswith("/byteorder") and archive.read(entry) == b"big" for entry in entries)
    entry = tensors[0]
    # A local header of 30 bytes, a name and an extra field, whose lengths only it knows, come before the data.
    local = file.read(entry.header_offset, 30)
    if local[:4] != b"PK\3\4":
        raise ValueError("its directory is damaged")
    n_name, n_extra = struct.unpack("<2H", local[26:30])
    return entry.header_offset + 30 + n_name + n_extra, entry.file_size, ">" if big else "<"


def _load_pt(path: Path, *, mapped: bool) -> object:
    import torch

    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _check_tensor(path: Path, value: object) -> None:
    """That what was loaded is a plain row of integers; its data is not looked at."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise OnebError(f"{path} holds a {type(value).__name__}; {_PT_WANTED}")
    _check_array(path, str(value.dtype).removeprefix("torch."), tuple(value.shape))
    if value.layout != torch.strided or value.device.type != "cpu" or not value.is_contiguous():
        raise OnebError(f"{path} holds a tensor whose values are not in a row; save it again with "
                        ".contiguous(), in memory of its own")


def _read_txt(path: Path, file: OpenFile) -> TokenFile:
    words = file.read(0, file.n_bytes).decode("utf-8", errors="replace").split()
    for offset, word in enumerate(words):
        if not (word.isascii() and word.isdigit() and len(word) < 19):
            raise OnebError(f"{path}: {word[:40]!r} at token offset {offset} is not a token id; "
                            "wanted whitespace-separated whole numbers")
    ids = np.array([int(word) for word in words], dtype=np.int64)
    return TokenFile(str(path), HeldBytes(ids), ids.dtype, 0, len(ids), file)


_READERS: dict[str, Callable[[Path, OpenFile], TokenFile]] = {
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
    held = max(0, n_bytes // itemsize)
    if not 0 <= n_tokens * itemsize <= n_bytes:
        raise OnebError(f"{path} is cut short: its header promises {n_tokens} tokens, the file ends at token "
                        f"offset {held}; copy or download it again")
    if exact and n_bytes != n_tokens * itemsize:
        raise OnebError(f"{path}: its header promises {n_tokens} tokens, and {n_bytes - n_tokens * itemsize} bytes "
                        "follow on them; copy or download it again")
