"""The tokens of one unit as a small file: written by whichever process encoded it, appended by the one that waits."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from oneb.data.encode import Encoder, pieces
from oneb.data.sources import Skipped
from oneb.data.units import Unit, documents, shard_tokens
from oneb.errors import OnebError

_HEADER_BYTES = 2**20  # longer than any first line


@dataclass(frozen=True)
class Job:
    """What a worker must know to encode units.

    Attributes:
        key: identifies options and input; parts of another key are not read.
        folder: where parts go.
        encoding: the tokenizer's name.
        ranks: GPT-2's vocabulary for gigatoken, None to go without it.
        eot, vocab_size, dtype: of the ids.
        text_column: of parquet and JSON documents.
        n_files: of the whole input.
    """

    key: str
    folder: Path
    encoding: str
    ranks: Path | None
    eot: int
    vocab_size: int
    dtype: str
    text_column: str
    n_files: int


@dataclass(frozen=True)
class Part:
    """The tokens of a unit.

    Attributes:
        ids: (n,) of the output's dtype, the end-of-text id after each document.
        ends: (documents that end here,) int64, offsets in ``ids`` just behind each document's end.
        max_id: -1 if there are no ids.
        text_bytes: read, as UTF-8; 0 for ready tokens.
    """

    ids: np.ndarray
    ends: np.ndarray
    max_id: int
    text_bytes: int
    skipped: Skipped


def part_path(job: Job, file: int, index: int) -> Path:
    """Where the part of a unit lies."""
    return job.folder / f"{job.key}-{file:06d}-{index:06d}.part"


def encode_unit(unit: Unit, job: Job, encoder: Encoder) -> Part:
    """Read and encode a unit.

    Raises:
        OnebError: what ``documents`` raises; or an id that does not fit the vocabulary.
    """
    skipped = Skipped()
    if unit.kind == "tokens":
        ids = _shifted(shard_tokens(unit), unit, job)
        ends, text_bytes = np.flatnonzero(ids == job.eot) + 1, 0
    else:
        ids, ends, text_bytes = _encode_text(unit, job, encoder, skipped)
    max_id = int(ids.max()) if len(ids) else -1
    if max_id >= job.vocab_size:
        raise OnebError(f"{unit.path}: the token id {max_id} is outside the vocabulary of {job.vocab_size} of "
                        f"{job.encoding}. A damaged file, or one of another tokenizer")
    return Part(ids.astype(job.dtype, copy=False), ends, max_id, text_bytes, skipped)


def _encode_text(unit: Unit, job: Job, encoder: Encoder, skipped: Skipped) -> tuple[np.ndarray, np.ndarray, int]:
    arrays, ends, n_ids, text_bytes = [], [], 0, 0
    end_of_text = np.array([job.eot], np.uint32)
    for document, ended in documents(unit, job.text_column, skipped):
        text_bytes += len(document)
        for piece in pieces(document, encoder.splits):
            arrays.append(encoder.encode(piece))
            n_ids += len(arrays[-1])
        if ended:
            arrays.append(end_of_text)
            n_ids += 1
            ends.append(n_ids)
    ids = np.concatenate(arrays) if arrays else np.empty(0, np.uint32)
    if np.count_nonzero(ids == job.eot) != len(ends):
        raise OnebError(f"{unit.path}: {job.encoding} turns some text into the id {job.eot}, which ends documents; "
                        "mark that token as special in the tokenizer, or name another in tokenizer_config.json")
    return ids, np.array(ends, np.int64), text_bytes


def _shifted(ids: np.ndarray, unit: Unit, job: Job) -> np.ndarray:
    """Shards begin documents with the end-of-text id; here it ends them, also the last."""
    if unit.file == 0 and unit.index == 0 and ids[:1] == job.eot:
        ids = ids[1:]
    if unit.last and unit.file == job.n_files - 1 and len(ids) and ids[-1] != job.eot:
        ids = np.append(ids, ids.dtype.type(job.eot))
    return ids


def write_part(path: Path, part: Part) -> None:
    """Write atomically, but without waiting for the disk: a torn part is found out by its checksum."""
    body = part.ends.tobytes() + part.ids.tobytes()
    header = {"ids": len(part.ids), "ends": len(part.ends), "dtype": part.ids.dtype.name, "max_id": part.max_id,
              "text_bytes": part.text_bytes, "skipped": asdict(part.skipped), "crc32": zlib.crc32(body)}
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        file.write(body)
    os.replace(temporary, path)


def read_part(path: Path) -> Part | None:
    """The part at ``path``, or None if there is none, or not a whole one."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.readline(_HEADER_BYTES))
            body = file.read()
    except (FileNotFoundError, ValueError):
        return None
    if zlib.crc32(body) != header["crc32"]:
        return None
    ends = np.frombuffer(body, np.int64, header["ends"])
    ids = np.frombuffer(body, header["dtype"], header["ids"], offset=ends.nbytes)
    return Part(ids, ends, header["max_id"], header["text_bytes"], Skipped(**header["skipped"]))
