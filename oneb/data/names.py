"""Data named on the command line, ``--data fineweb-edu:1B``: what of, how much, and where it lies."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from oneb.data.sources import READY_TOKENS, SOURCES
from oneb.errors import OnebError
from oneb.units import format_count, format_gib, parse_count

MANIFEST = "dataset.json"  # in the folder: which ready shards it is made of
VALIDATION = "val.bin"
WHOLE = "train.npy"  # in the folder: all of it in one file, where there are no ready shards
SHARD_TOKENS = 10**8  # of a ready shard: only for what is said before the Hub has been asked
_NAME = re.compile(r"(?P<source>[\w.-]+(/[\w.-]+)?(@[\w./-]+)?):(?P<count>\d[\w.,]*|\w*)")
# FineWeb-Edu's sample/10BT: 14 files of 2.15 GB, 10B tokens.
_TEXT_BYTES_A_TOKEN = 3.0


@dataclass(frozen=True)
class DataName:
    """A source of tokens and how many of it.

    Attributes:
        source: a key of ``SOURCES``, or owner/name[@revision] of a data set on the Hugging Face Hub.
        n_tokens: for training and validation together.
    """

    source: str
    n_tokens: int

    def __str__(self) -> str:
        return f"{self.source}:{_exactly(self.n_tokens)}"

    def folder(self, root: str) -> Path:
        """Where it lies: ``data/fineweb-edu-1B``, however the count was written."""
        return Path(root).expanduser() / f"{self.source.replace('/', '--')}-{_exactly(self.n_tokens)}"

    def to_do(self, root: str) -> str | None:
        """What is still to be brought, in words and without asking anybody; None where all of it is there."""
        folder = self.folder(root)
        if (folder / WHOLE).exists():
            return None
        if self.source not in READY_TOKENS:
            size = f", about {format_gib(_TEXT_BYTES_A_TOKEN * self.n_tokens)}" if self.source in SOURCES else ""
            return (f"the text of {self.source}{size} is downloaded and tokenized before the first step, into "
                    f"{folder} ({format_gib(2 * self.n_tokens)})")
        names = [name for name, _ in manifest_files(folder)] or [
            VALIDATION, *map(train_name, range(1, 1 + -(-self.n_tokens // SHARD_TOKENS)))]
        missing = sum(not (folder / name).exists() for name in names)
        if not missing:
            return None
        some = f" ({len(names) - missing} of {len(names)} files are there)" if missing < len(names) else ""
        return (f"about {format_gib(2 * SHARD_TOKENS * missing)} of ready tokens from "
                f"{READY_TOKENS[self.source].repo} are downloaded into {folder}{some} while the run trains; it begins "
                f"when the first {format_count(SHARD_TOKENS)} are there")


def parse_name(path: str) -> DataName | None:
    """What ``--data`` names; None where it is a path.

    Raises:
        OnebError: it looks like a name and is none.
    """
    if Path(path).expanduser().exists():
        return None
    if path in SOURCES:
        raise OnebError(f"--data {path}: how many tokens? Wanted for instance --data {path}:1B")
    match = _NAME.fullmatch(path)
    if match is None:
        return None
    source = match["source"]
    if "/" not in source.partition("@")[0] and source not in SOURCES:
        raise OnebError(f"--data {path}: {source!r} is not a file, nor a name that is known; wanted a path, or "
                        f"SOURCE:TOKENS with one of {', '.join(SOURCES)}, or owner/name of a dataset with parquet "
                        f"files on the Hugging Face Hub; for instance --data {next(iter(SOURCES))}:1B")
    try:
        n_tokens = parse_count(match["count"])
    except OnebError as error:
        raise OnebError(f"--data {path}: {error}; wanted SOURCE:TOKENS, for instance {source}:1B") from None
    if n_tokens < 2:
        raise OnebError(f"--data {path}: wanted at least 2 tokens, one to read and one to predict")
    return DataName(source, n_tokens)


def train_name(number: int) -> str:
    """1 -> "train_000001.bin"."""
    return f"train_{number:06d}.bin"


def named_folder(path: str) -> Path | None:
    """The folder of a named data set of ready shards that ``path`` leads to; None where it leads elsewhere."""
    try:
        folder = Path(path).expanduser()
        return folder if (folder / MANIFEST).is_file() else None
    except (OSError, RuntimeError):  # too long a name; another user's home that is not there
        return None


def manifest_files(folder: Path) -> list[tuple[str, int]]:
    """Name and tokens of each file that the manifest lists; none where there is no manifest, or a damaged one."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return [(str(file["name"]), int(file["tokens"])) for file in files]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _exactly(count: int) -> str:
    """1_500_000_000 -> "1.5B": at most one decimal, else all digits."""
    for unit, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit and count % (unit // 10) == 0:
            whole, tenth = divmod(count // (unit // 10), 10)
            return f"{whole}.{tenth}{suffix}" if tenth else f"{whole}{suffix}"
    return str(count)
