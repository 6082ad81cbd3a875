"""The sidecar ``X.npy.meta`` beside a token file: ``key: value`` lines that say what the tokens are."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from oneb.errors import OnebError
from oneb.files import write_text


@dataclass(frozen=True)
class Sidecar:
    """What is known of a token file; ``None`` where the sidecar (perhaps an old one) does not say."""

    tokens: int | None = None
    documents: int | None = None
    encoding: str | None = None  # tokenizer name: "gpt2" or "bytes"
    vocab_size: int | None = None  # ids lie in [0, vocab_size)
    eot: int | None = None  # the id that ends every document
    source: str | None = None  # where the text came from
    format: str | None = None  # "npy uint16" or "npy uint32"
    sha256: str | None = None  # of the token file
    max_id: int | None = None  # the largest id in the file
    revision: str | None = None  # of the source, where it has any
    tokenizer_sha256: str | None = None  # of the tokenizer's definition


_MAX_BYTES = 2**16  # a sidecar has a few hundred
_MAX_DIGITS = 18  # what int64 holds whatever the digits
_OPTIONAL_KEYS = frozenset({"revision", "tokenizer_sha256"})
_INTEGER_KEYS = frozenset({"tokens", "documents", "vocab_size", "eot", "max_id"})


def is_beside_tokens(name: str) -> bool:
    """Whether a file name is that of something kept beside token files, and not a token file's itself."""
    return name.startswith(".") or name.endswith((".meta", ".idx.npy", ".sources.json"))


def sidecar_path(path: Path) -> Path:
    """``x.npy`` -> ``x.npy.meta``."""
    return path.with_name(path.name + ".meta")


def read_sidecar(path: Path) -> Sidecar | None:
    """The sidecar of the token file ``path``, or None if it has none. Unknown keys are ignored.

    Raises:
        OnebError: if the sidecar cannot be read, is not text or one of the known numbers is not a whole number.
    """
    meta_path = sidecar_path(path)
    try:
        with open(meta_path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
        text = content.decode("utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OnebError(f"{meta_path} cannot be read: {error.strerror or error}. "
                        "Delete it, or copy it again beside its token file") from error
    except UnicodeDecodeError:
        raise OnebError(f"{meta_path} is not text; wanted `key: value` lines. "
                        "Delete it, or copy it again beside its token file") from None
    if len(content) > _MAX_BYTES:
        raise OnebError(f"{meta_path} has more than {_MAX_BYTES} bytes; wanted a few `key: value` lines. "
                        "Delete it, or copy it again beside its token file")
    known = {field.name for field in fields(Sidecar)}
    values: dict[str, int | str] = {}
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key in known and value:
            values[key] = _whole_number(value, key, meta_path) if key in _INTEGER_KEYS else value
    return Sidecar(**values)


def write_sidecar(path: Path, sidecar: Sidecar) -> None:
    """Atomically write the sidecar of the token file ``path``; every field but the last two must be known."""
    lines = []
    for field in fields(Sidecar):
        value = str(getattr(sidecar, field.name))
        if value == "None" and field.name in _OPTIONAL_KEYS:
            continue
        assert value != "None", f"{field.name} is not known"
        lines.append(f"{field.name}: {' '.join(value.split())}\n")
    write_text(sidecar_path(path), "".join(lines))


def _whole_number(value: str, key: str, meta_path: Path) -> int:
    digits = value.replace(",", "").replace("_", "")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= _MAX_DIGITS):
        raise OnebError(f"{meta_path}: `{key}: {value[:40]}` is not a whole number. "
                        "Correct that line, or delete the sidecar to go without it")
    return int(digits)
