"""What may be prepared: local files, datasets of the Hugging Face Hub; and what is left out on the way."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from oneb.errors import OnebError

# Longest first: ".jsonl.gz" is no ".gz".
KINDS = {
    ".parquet": "parquet", ".jsonl": "jsonl", ".jsonl.gz": "packed", ".jsonl.zst": "packed", ".txt": "txt",
    ".bin": "tokens",
}
INPUT_SUFFIXES = tuple(KINDS)
_EXAMPLES = 20  # damaged places that are kept word for word


@dataclass(frozen=True)
class HubDataset:
    """Files of a dataset repository, at one revision for good so that a run can be repeated."""

    repo: str
    revision: str
    pattern: str  # of paths inside the repository


SOURCES = {
    "fineweb-edu": HubDataset("HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
                              "sample/10BT/*.parquet"),
    "fineweb": HubDataset("HuggingFaceFW/fineweb", "main", "sample/10BT/*.parquet"),
}
# GPT-2 tokens of the same text, 100M a file: https://huggingface.co/kjj0
READY_TOKENS = {
    "fineweb-edu": HubDataset("kjj0/finewebedu10B-gpt2", "main", "finewebedu_train_*.bin"),
    "fineweb": HubDataset("kjj0/fineweb10B-gpt2", "main", "fineweb_train_*.bin"),
}


@dataclass(frozen=True)
class InputFile:
    """One file to read, wherever it lies.

    Attributes:
        name: as the user gave it, or its path in the dataset; with ``size`` and ``version`` its identity.
        size: bytes.
        version: changes when the content does: a local file's modification time in ns, a Hub file's sha256.
        sha256: where it is known without reading the file.
        open: gives the path of the whole file on this machine; may download, raises OnebError. It is given a function
            to call with the bytes that are here and the size; where that raises, it ends.
        remote: it may have to be downloaded, so it is not opened before it is needed.
    """

    name: str
    size: int
    version: str
    sha256: str | None
    open: Callable[[Callable[[int, int], None]], Path]
    remote: bool = False

    @property
    def kind(self) -> str:
        """How it is read: a value of ``KINDS``."""
        kind = kind_of(self.name)
        assert kind is not None
        return kind

    def is_unchanged(self) -> bool:
        """Whether it is still of that size and version, as the Hub's always are. Raises OSError if it is gone."""
        return self.remote or (self.size, self.version) == _identity(Path(self.name))


@dataclass
class Skipped:
    """What was left out or mended, by reason. Sums over the units of an input do not depend on who counted them."""

    empty: int = 0  # documents without text, or null
    bad_json: int = 0  # lines that are not a JSON object
    no_text: int = 0  # JSON objects without the text column, or where it is not a string
    too_long: int = 0  # JSON lines that would not fit in memory
    mended: int = 0  # documents whose invalid UTF-8 became U+FFFD; these are kept
    damaged: int = 0  # places where a file could not be read on
    examples: list[str] = field(default_factory=list)  # the first damaged places

    def __add__(self, other: Skipped) -> Skipped:
        """Both."""
        held, more = asdict(self), asdict(other)
        both = Skipped(**{name: held[name] + more[name] for name in held})
        del both.examples[_EXAMPLES:]
        return both

    def damage(self, place: str) -> None:
        """Count a place where reading had to stop."""
        self.damaged += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(place)

    def __str__(self) -> str:
        reasons = {"empty": self.empty, "not a JSON object": self.bad_json, "without the text column": self.no_text,
                   "longer than fits in memory": self.too_long}
        return ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)


def kind_of(name: str) -> str | None:
    """How a file of that name is read, or None."""
    return next((kind for suffix, kind in KINDS.items() if name.lower().endswith(suffix)), None)


def local_inputs(inputs: Sequence[str], say: Callable[[str], None] = lambda message: None) -> list[InputFile]:
    """The files that paths, folders (searched to the bottom, without what is hidden) and globs stand for, in order.

    Args:
        say: told which files of a folder are not read.

    Raises:
        OnebError: if one of them matches nothing readable, or a file is of no known kind.
    """
    files = []
    for path in _find(inputs, say):
        files.append(InputFile(str(path), *_identity(path), None, partial(_here, path.absolute())))
    return files


def _identity(path: Path) -> tuple[int, str]:
    status = path.stat()
    return status.st_size, str(status.st_mtime_ns)


def _here(path: Path, progress: Callable[[int, int], None]) -> Path:
    return path


def _find(inputs: Sequence[str], say: Callable[[str], None]) -> list[Path]:
    files: list[Path] = []
    for given in inputs:
        target = Path(given).expanduser()
        if target.is_dir():
            found, others = _of_folder(target)
            if found and others:
                say(f"warning: {len(others)} file{'s' * (len(others) > 1)} in {target} not read, since the names do "
                    f"not end in {', '.join(INPUT_SUFFIXES)}: {', '.join(map(str, others[:3]))}"
                    + (", …" if len(others) > 3 else ""))
        elif target.is_file():
            found = [target]
        else:
            found = [Path(match) for match in sorted(glob.glob(str(target), recursive=True))
                     if Path(match).is_file()]
        if not found:
            raise OnebError(f"--input {given}: nothing to read there (looked for {target.absolute()}); "
                            f"wanted files ending in {', '.join(INPUT_SUFFIXES)}, a folder or a glob of them")
        unknown = next((path for path in found if not kind_of(path.name)), None)
        if unknown is not None:
            raise OnebError(f"--input {unknown}: wanted a file ending in {', '.join(INPUT_SUFFIXES)}")
        files += found
    return files


def _of_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files below ``folder`` of a known kind and, by their paths in it, of none. Hidden ones are neither."""
    found: list[Path] = []
    others: list[Path] = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        if kind_of(path.name):
            found.append(path)
        else:
            others.append(inside)
    return found, others


def describe(files: Sequence[InputFile]) -> str:
    """Local files in words, for the sidecar."""
    return f"{len(files)} local files, {Path(files[0].name).name} first"


def check_kinds(files: Sequence[InputFile], encoding: str) -> None:
    """That ready tokens are not mixed with text, nor asked for in another vocabulary.

    Raises:
        OnebError: naming the two.
    """
    tokens = [file.name for file in files if file.kind == "tokens"]
    texts = [file.name for file in files if file.kind != "tokens"]
    if tokens and texts:
        raise OnebError(f"the input holds ready tokens ({tokens[0]}) and text ({texts[0]}); prepare them apart")
    if tokens and encoding != "gpt2":
        raise OnebError(f"{tokens[0]} holds GPT-2 tokens, --tokenizer is {encoding}; use --tokenizer gpt2, "
                        "or give text")
