"""Where documents come from: FineWeb-Edu on the Hugging Face Hub, or files of the user's own."""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from oneb.errors import OnebError

INPUT_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".txt")


@dataclass(frozen=True)
class HubDataset:
    """Parquet files of a dataset repository, at one revision for good so that a run can be repeated."""

    repo: str
    revision: str
    pattern: str  # of paths inside the repository


SOURCES = {
    "fineweb-edu": HubDataset("HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
                              "sample/10BT/*.parquet"),
}


@dataclass
class Skipped:
    """Documents left out, by reason; readers count here while they run."""

    empty: int = 0  # no text, or null
    bad_json: int = 0  # lines that are not a JSON object
    no_text: int = 0  # JSON objects without the text column, or where it is not a string

    def __str__(self) -> str:
        reasons = {"empty": self.empty, "not a JSON object": self.bad_json,
                   "without the text column": self.no_text}
        return ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)


# -- The Hub -------------------------------------------------------------------------------------

def hub_documents(dataset: HubDataset, text_column: str, skipped: Skipped,
                  endpoint: str | None = None) -> Iterator[str]:
    """The documents of a Hub dataset in the order of its files, streamed by row group.

    Args:
        endpoint: the Hub's address, by default what huggingface_hub is set to.

    Raises:
        OnebError: if the Hub cannot be reached or does not have the files.
    """
    from huggingface_hub import HfFileSystem
    from huggingface_hub.utils import HfHubHTTPError

    # Its bases include its HTTP library's own error, which is another library in each major version.
    failures = (OSError, *HfHubHTTPError.__bases__)
    fs = HfFileSystem(endpoint=endpoint)
    folder = f"datasets/{dataset.repo}@{dataset.revision}"
    try:
        paths = sorted(fs.glob(f"{folder}/{dataset.pattern}"))
        if not paths:
            raise OnebError(f"{folder} has no files {dataset.pattern} on the Hub; check the revision")
        for path in paths:
            with fs.open(path, "rb") as file:
                yield from _parquet_documents(path, file, text_column, skipped)
    except failures as error:
        raise OnebError(f"the Hugging Face Hub did not deliver {dataset.repo} ({type(error).__name__}: "
                        f"{str(error)[:300]}). Check the network and run the command again, or download the "
                        "files by other means and give them with --input") from error


# -- Local files ---------------------------------------------------------------------------------

def find_inputs(inputs: Sequence[str]) -> list[Path]:
    """The files that paths, folders (searched to the bottom) and globs stand for, in order.

    Raises:
        OnebError: if one of them matches nothing readable, or a file is of no known kind.
    """
    files: list[Path] = []
    for given in inputs:
        target = Path(given).expanduser()
        if target.is_dir():
            found = sorted(path for path in target.rglob("*") if path.is_file() and _kind(path))
        elif target.is_file():
            found = [target]
        else:
            found = [Path(match) for match in sorted(glob.glob(str(target), recursive=True))
                     if Path(match).is_file()]
        if not found:
            raise OnebError(f"--input {given}: nothing to read there (looked for {target.absolute()}); "
                            f"wanted files ending in {', '.join(INPUT_SUFFIXES)}, a folder or a glob of them")
        unknown = next((path for path in found if not _kind(path)), None)
        if unknown is not None:
            raise OnebError(f"--input {unknown}: wanted a file ending in {', '.join(INPUT_SUFFIXES)}")
        files += found
    return files


def file_documents(files: Sequence[Path], text_column: str, skipped: Skipped) -> Iterator[str]:
    """The documents of local files, in order; a ``.txt`` file is one document.

    Raises:
        OnebError: if a file is damaged, not UTF-8, or a parquet file without the text column.
    """
    for path in files:
        kind = _kind(path)
        try:
            if kind == ".parquet":
                with open(path, "rb") as file:
                    yield from _parquet_documents(str(path), file, text_column, skipped)
            elif kind == ".txt":
                yield from _not_empty([path.read_text(encoding="utf-8")], skipped)
            else:
                with gzip.open(path) if kind == ".jsonl.gz" else open(path, "rb") as file:
                    yield from _json_documents(file, text_column, skipped)
        except UnicodeDecodeError as error:
            raise OnebError(f"{path} is not UTF-8 text (byte {error.start}); convert it first, "
                            f"for instance with: iconv -f latin1 -t utf-8 {path}") from None
        except (OSError, EOFError, zlib.error) as error:
            raise OnebError(f"{path} cannot be read to its end ({error}); "
                            "copy or download it again") from error


def _kind(path: Path) -> str | None:
    return next((suffix for suffix in INPUT_SUFFIXES if path.name.lower().endswith(suffix)), None)


def _parquet_documents(name: str, file: IO[bytes], text_column: str, skipped: Skipped) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file, pre_buffer=True)
        if text_column not in parquet.schema_arrow.names:
            columns = ", ".join(parquet.schema_arrow.names)
            raise OnebError(f"{name} has no column {text_column!r}; it has {columns}. "
                            "Name the one with text by --text-column")
        column_type = parquet.schema_arrow.field(text_column).type
        if not (pa.types.is_string(column_type) or pa.types.is_large_string(column_type)):
            raise OnebError(f"{name}: column {text_column!r} holds {column_type}, wanted text; "
                            "name another by --text-column")
        for group in range(parquet.num_row_groups):
            column = parquet.read_row_group(group, columns=[text_column]).column(text_column)
            yield from _not_empty(column.to_pylist(), skipped)
    except pa.ArrowException as error:
        raise OnebError(f"{name} is not a whole parquet file ({error}); "
                        "copy or download it again") from error


def _json_documents(file: IO[bytes], text_column: str, skipped: Skipped) -> Iterator[str]:
    for line in file:
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
        except ValueError:  # not JSON, or not UTF-8
            record = None
        if not isinstance(record, dict):
            skipped.bad_json += 1
        elif not isinstance(record.get(text_column), str):
            skipped.no_text += 1
        else:
            yield from _not_empty([record[text_column]], skipped)


def _not_empty(texts: Sequence[str | None], skipped: Skipped) -> Iterator[str]:
    for text in texts:
        if text:
            yield text
        else:
            skipped.empty += 1
