"""The input cut into units of work, in an order that depends on the input alone, and the documents of one unit."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from oneb.data.encode import SAFE_CUT
from oneb.data.formats import BIN_HEADER_BYTES, open_file
from oneb.data.sources import Skipped
from oneb.errors import OnebError

UNIT_BYTES = 8 * 2**20  # of text, about: a fraction of a second's work
MAX_LINE_BYTES = 128 * 2**20  # of JSON: decoded, some characters take four bytes each
_SLICES = 8  # at most, of a parquet row group: each decodes those before it, too, so small groups stay whole
_BATCH_BYTES = 2 * 2**20  # decoded from parquet at once
_SEARCH_BYTES = 2**20
_LINE_END = re.compile(rb"\n")


@dataclass(frozen=True)
class Unit:
    """Work for one worker.

    Attributes:
        file: number of the file in the input.
        index: number of the unit in its file.
        path: the file; of a packed one, its lines spooled to disk.
        kind: "parquet" (``start`` and ``stop`` are rows), "jsonl", "lines" (of a packed file) and "txt" (bytes),
            "tokens" (tokens).
        share: of the file; the units' shares sum to 1.
        last: the file's last unit.
    """

    file: int
    index: int
    path: Path
    kind: str
    start: int
    stop: int
    share: float
    last: bool


def plan_units(file: int, path: Path, kind: str, *, text_column: str, splits: bool, spool: Callable[[int], Path],
               skip: int = 0) -> Iterator[Unit]:
    """The units of a file, in order.

    Args:
        splits: a text may be cut at every ``SAFE_CUT``.
        spool: where the lines of a packed file's unit of that index go.
        skip: units that are done: a packed file's are not spooled.
    """
    if kind == "packed":
        yield from _packed_units(file, path, spool, skip)
        return
    if kind == "parquet":
        bounds = _parquet_bounds(path, text_column)
    else:
        size = path.stat().st_size
        if kind == "tokens":
            size = max(0, size - BIN_HEADER_BYTES) // 2
        step = UNIT_BYTES if kind != "txt" or splits else max(1, size)
        bounds = [*range(0, size, step), size] if size else [0, 0]
    total = max(1, bounds[-1])
    pairs = list(zip(bounds[:-1], bounds[1:], strict=True))
    for index, (start, stop) in enumerate(pairs):
        yield Unit(file, index, path, kind, start, stop, (stop - start) / total, index == len(pairs) - 1)


def load_readers(kinds: Iterable[str]) -> None:
    """Import what reading these kinds of files will need: better while there is nothing else to do."""
    if "parquet" in kinds:
        import pyarrow.parquet  # noqa: F401


def _parquet_bounds(path: Path, text_column: str) -> list[int]:
    """Rows where units begin and end: small row groups together, large ones in slices; [0, 0] if unreadable."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as parquet:
            groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
            sizes = [(group.num_rows, _text_bytes(group, text_column)) for group in groups]
    except (OSError, pa.ArrowException) as error:
        _raise_if_disk(path, error)
        return [0, 0]  # the worker will meet the same damage, and count it
    bounds, row, held = [0], 0, 0
    for n_rows, n_bytes in sizes:
        if held and held + n_bytes > UNIT_BYTES:
            bounds.append(row)
            held = 0
        slices = max(1, min(_SLICES, n_rows, n_bytes // (2 * UNIT_BYTES)))
        bounds += [row + n_rows * part // slices for part in range(1, slices)]
        row, held = row + n_rows, held + n_bytes // slices
    return [*bounds, row]


def _text_bytes(group: Any, text_column: str) -> int:
    """Uncompressed bytes of a row group's text."""
    columns = (group.column(number) for number in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_column)


def _packed_units(file: int, path: Path, spool: Callable[[int], Path], skip: int) -> Iterator[Unit]:
    """Lines of a compressed file, unpacked here one unit ahead: nobody can begin in its middle."""
    index, rest, done, damage, ended = 0, b"", 0.0, "", False
    blocks = _unpacked(path)
    while not ended:
        target = spool(index)
        held, share, ended = len(rest), done, True
        with open(target if index >= skip else os.devnull, "wb") as out:
            out.write(rest)
            try:
                for chunk, read in blocks:
                    done = read
                    cut = chunk.rfind(b"\n") + 1 if held + len(chunk) >= UNIT_BYTES else 0
                    out.write(chunk[:cut] if cut else chunk)
                    held += cut or len(chunk)
                    if cut:
                        rest, ended = chunk[cut:], False
                        break
            except EOFError as error:
                damage = str(error)
        if index >= skip and ended and damage:
            damage_note(target).write_text(damage)
        yield Unit(file, index, target, "lines", 0, held, (1.0 if ended else done) - share, ended)
        index += 1


def damage_note(lines: Path) -> Path:
    """Beside the spooled lines of a packed file's last unit: why there are no more."""
    return lines.with_suffix(".damage")


def _unpacked(path: Path) -> Iterator[tuple[bytes, float]]:
    """A compressed file's content in chunks, and how much of the file is read. Raises EOFError where it is damaged."""
    import pyarrow as pa

    compression = "zstd" if path.name.lower().endswith(".zst") else "gzip"
    size = max(1, path.stat().st_size)
    with open(path, "rb") as file, pa.CompressedInputStream(pa.PythonFile(file), compression) as stream:
        while True:
            try:
                chunk = stream.read(_SEARCH_BYTES)
            except (OSError, pa.ArrowException) as error:
                _raise_if_disk(path, error)
                raise EOFError(f"{path}: {_first_line(error)}") from None
            if not chunk:
                return
            yield chunk, file.tell() / size


# -- Documents of a unit -----------------------------------------------------------------------------

def documents(unit: Unit, text_column: str, skipped: Skipped) -> Iterator[tuple[bytes, bool]]:
    """The unit's text as valid UTF-8, and whether a document ends there (of a long ``.txt``, only the last does).

    Raises:
        OnebError: a parquet file without the text column, or a disk that fails.
    """
    readers = {"parquet": _parquet_documents, "jsonl": _json_documents, "lines": _json_documents, "txt": _text_piece}
    try:
        yield from readers[unit.kind](unit, text_column, skipped)
    except OSError as error:
        raise OnebError(f"{unit.path} cannot be read: {error.strerror or error}") from error


def shard_tokens(unit: Unit) -> np.ndarray:
    """Ids (n,) of a unit of ready tokens.

    Raises:
        OnebError: as ``open_file``.
    """
    return open_file(unit.path, "bin").read(unit.start, unit.stop - unit.start)


def _parquet_documents(unit: Unit, text_column: str, skipped: Skipped) -> Iterator[tuple[bytes, bool]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = unit.start
    try:
        # Buffered: page by page, not a whole row group.
        with pq.ParquetFile(unit.path, buffer_size=_SEARCH_BYTES, pre_buffer=False) as parquet:
            _check_column(unit.path, parquet.schema_arrow, text_column)
            for batch in _batches(parquet, unit, text_column):
                texts = batch.column(0)
                texts = texts.dictionary_decode() if pa.types.is_dictionary(texts.type) else texts
                try:
                    texts.validate(full=True)
                    valid = True
                except pa.ArrowInvalid:
                    valid = False
                # Not a cast: that loads pyarrow's functions, a tenth of a second of every worker.
                binary = pa.large_binary() if pa.types.is_large_string(texts.type) else pa.binary()
                for text in texts.view(binary).to_pylist():
                    row += 1
                    if not text:
                        skipped.empty += 1
                    else:
                        yield (text if valid else _mend(text, skipped)), True
    except (OSError, pa.ArrowException) as error:
        _raise_if_disk(unit.path, error)
        # What a damaged page decodes to depends on nothing but its bytes, so this is the same in every run.
        rows = f" from row {row} to {unit.stop}" if unit.stop else ""
        skipped.damage(f"{unit.path}{rows}: {_first_line(error)}")


def _batches(parquet: Any, unit: Unit, text_column: str) -> Iterator[Any]:
    """Record batches of the unit's rows."""
    first = 0
    for number in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(number)
        start, stop = max(unit.start, first), min(unit.stop, first + group.num_rows)
        if start < stop:
            row_bytes = max(1, _text_bytes(group, text_column) // group.num_rows)
            rows = max(1, min(1024, _BATCH_BYTES // row_bytes))
            at = first
            for batch in parquet.iter_batches(rows, row_groups=[number], columns=[text_column], use_threads=False):
                if at + len(batch) > start:
                    yield batch.slice(max(0, start - at), stop - max(start, at))
                at += len(batch)
                if at >= stop:
                    break
        first += group.num_rows


def _check_column(path: Path, schema: Any, text_column: str) -> None:
    import pyarrow as pa

    if text_column not in schema.names:
        raise OnebError(f"{path} has no column {text_column!r}; it has {', '.join(schema.names)}. "
                        "Name the one with text by --text-column of prepare_fineweb.py")
    held = schema.field(text_column).type
    kind = held.value_type if pa.types.is_dictionary(held) else held
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise OnebError(f"{path}: column {text_column!r} holds {held}, wanted text; name another by --text-column of "
                        "prepare_fineweb.py")


def _json_documents(unit: Unit, text_column: str, skipped: Skipped) -> Iterator[tuple[bytes, bool]]:
    with open(unit.path, "rb") as file:
        start, stop = (_cut_at(file, place, _LINE_END) if place else 0 for place in (unit.start, unit.stop))
        file.seek(start)
        while file.tell() < stop and (line := file.readline(MAX_LINE_BYTES)):
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                skipped.too_long += 1
                while (line := file.readline(_SEARCH_BYTES)) and not line.endswith(b"\n"):
                    pass
                continue
            text = _text_of(line, text_column, skipped)
            if text:
                del line
                yield text, True
    note = damage_note(unit.path)
    if unit.kind == "lines" and note.exists():
        skipped.damage(note.read_text())


def _text_of(line: bytes, text_column: str, skipped: Skipped) -> bytes | None:
    """The text of a JSON line, or None (and counted) where there is none."""
    line = line.removeprefix(b"\xef\xbb\xbf").strip()
    if not line:
        return None
    content = _decode(line)  # an invalid byte becomes U+FFFD
    try:
        record: Any = json.loads(content)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        skipped.bad_json += 1
        return None
    text = record.get(text_column)
    if not isinstance(text, str):
        skipped.no_text += 1
        return None
    if not text:
        skipped.empty += 1
        return None
    mended = "\ufffd" in content and not _is_valid(line)
    try:
        document = text.encode()
    except UnicodeEncodeError:  # half of an escaped pair
        document, mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode(), True
    skipped.mended += mended
    return document


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "replace")


def _is_valid(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _text_piece(unit: Unit, text_column: str, skipped: Skipped) -> Iterator[tuple[bytes, bool]]:
    with open(unit.path, "rb") as file:
        start, stop = (_cut_at(file, place, SAFE_CUT) if place else 0 for place in (unit.start, unit.stop))
        file.seek(start)
        text = file.read(stop - start)
    if not text and unit.last and unit.start == 0:
        skipped.empty += 1
    elif text or unit.last:
        yield _mend(text, skipped), unit.last


def _cut_at(file: IO[bytes], place: int, cut: re.Pattern[bytes]) -> int:
    """Where the first match of ``cut`` that ends at ``place`` or later ends; the file's end if there is none."""
    position = place - 1
    while True:
        file.seek(position)
        block = file.read(_SEARCH_BYTES)
        found = cut.search(block)
        if found:
            return position + found.end()
        if len(block) < _SEARCH_BYTES:
            return position + len(block)
        position += len(block) - 1  # SAFE_CUT looks at one byte more


def _mend(text: bytes, skipped: Skipped) -> bytes:
    """``text`` as valid UTF-8."""
    if _is_valid(text):
        return text
    skipped.mended += 1
    return _decode(text).encode()


def _raise_if_disk(path: Path, error: Exception) -> None:
    """A disk that fails is not damage of the file: what is there may be whole another time."""
    if isinstance(error, OSError) and error.errno is not None:
        reason = errno.errorcode.get(error.errno, "")
        raise OnebError(f"{path} cannot be read: {error.strerror or error} {reason}. Run the command again "
                        "once the disk answers; what is done is kept") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
