"""Documents to a token file: ``X.npy`` and its sidecar ``X.npy.meta``."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np

from oneb.data.sidecar import Sidecar, sidecar_path, write_sidecar
from oneb.data.tokenizer import Tokenizer
from oneb.errors import OnebError
from oneb.files import atomic_writer, sha256_file
from oneb.units import format_gib

_BATCH_CHARS = 4 * 2**20  # text handed to the tokenizer at once: enough to keep all cores busy
_HEADER_BYTES = 128


@dataclass(frozen=True)
class Prepared:
    """What was written."""

    path: Path
    sidecar: Sidecar  # its `tokens` is the true count
    short_by: int  # tokens asked for that the input did not have


def check_output(output: Path, n_tokens: int | None, *, force: bool = False) -> None:
    """Look at everything about ``output`` that could fail after an hour of tokenizing.

    Raises:
        OnebError: if it is not a .npy path, exists already without ``force``, or the disk is too small.
    """
    if output.suffix != ".npy":
        raise OnebError(f"--output {output}: wanted a file name ending in .npy")
    if output.exists() and not force:
        raise OnebError(f"--output {output} exists already. Use it as it is, choose another name, "
                        "or replace it with --force")
    folder = output.parent
    if not folder.is_dir():
        raise OnebError(f"--output {output}: there is no folder {folder.absolute()}; create it with: "
                        f"mkdir -p {folder}")
    needed, free = 2 * (n_tokens or 0), shutil.disk_usage(folder).free  # uint16, as both tokenizers write
    if needed > free:
        raise OnebError(f"--output {output}: {n_tokens} tokens take {format_gib(needed)}, the disk has "
                        f"{format_gib(free)} free; ask for fewer --tokens or write to another disk")


def prepare(documents: Iterable[str], tokenizer: Tokenizer, output: Path, *, source: str,
            n_tokens: int | None = None, force: bool = False,
            progress: Callable[[int, int], None] = lambda tokens, text_bytes: None) -> Prepared:
    """Tokenize ``documents`` into ``output``, the end-of-text id after each.

    The file appears under its name only when whole, then the sidecar.

    Args:
        source: where the documents come from, for the sidecar.
        n_tokens: exactly so many tokens, the last document cut; None takes all documents.
        progress: called with the tokens and bytes of text added since the last call.

    Raises:
        OnebError: as ``check_output``; or if there is no text at all.
    """
    check_output(output, n_tokens, force=force)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    with atomic_writer(output) as file:
        written, n_documents, max_id = _write_tokens(file, documents, tokenizer, dtype, n_tokens, progress)
        # The old sidecar goes first: beside the new file, should we be killed here, it would be a lie.
        sidecar_path(output).unlink(missing_ok=True)
    sidecar = Sidecar(tokens=written, documents=n_documents, encoding=tokenizer.name,
                      vocab_size=tokenizer.vocab_size, eot=tokenizer.eot, source=source,
                      format=f"npy {dtype.name}", sha256=sha256_file(output), max_id=max_id)
    write_sidecar(output, sidecar)
    return Prepared(output, sidecar, short_by=0 if n_tokens is None else n_tokens - written)


def _write_tokens(file: IO[bytes], documents: Iterable[str], tokenizer: Tokenizer, dtype: np.dtype,
                  n_tokens: int | None, progress: Callable[[int, int], None]) -> tuple[int, int, int]:
    """Write the whole .npy; returns tokens, documents and the largest id."""
    file.write(npy_header(dtype, 0))  # its length does not depend on the count, known at the end
    written, n_documents, max_id = 0, 0, 0
    for texts in _batched(documents):
        ids = _encode_documents(tokenizer, texts, dtype)
        if n_tokens is not None:
            ids = ids[:n_tokens - written]
        file.write(ids.tobytes())
        written += len(ids)
        # Text never encodes to eot, so each is a document's end; the last document may be cut.
        n_documents += int(np.count_nonzero(ids == tokenizer.eot)) + int(ids[-1] != tokenizer.eot)
        max_id = max(max_id, int(ids.max()))
        progress(len(ids), sum(len(text.encode("utf-8", errors="replace")) for text in texts))
        if written == n_tokens:
            break
    if written == 0:
        raise OnebError("the input holds no text: every document was empty or without the text column. "
                        "Check --input and --text-column")
    file.seek(0)
    file.write(npy_header(dtype, written))
    return written, n_documents, max_id


def _batched(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    n_chars = 0
    for text in documents:
        batch.append(text)
        n_chars += len(text)
        if n_chars >= _BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def _encode_documents(tokenizer: Tokenizer, texts: list[str], dtype: np.dtype) -> np.ndarray:
    """All documents in a row, (n,), each followed by the end-of-text id."""
    end = [tokenizer.eot]
    pieces = chain.from_iterable((ids, end) for ids in tokenizer.encode_batch(texts))
    return np.fromiter(chain.from_iterable(pieces), dtype)


def npy_header(dtype: np.dtype, n_tokens: int) -> bytes:
    """A .npy version 1.0 header for a 1-D array: 128 bytes for any count, so it can be filled in later."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({n_tokens},), }}"
    prefix = b"\x93NUMPY\x01\x00"
    n_text = _HEADER_BYTES - len(prefix) - 2
    return prefix + struct.pack("<H", n_text) + text.ljust(n_text - 1).encode("ascii") + b"\n"
