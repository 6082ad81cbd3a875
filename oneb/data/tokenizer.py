"""Text to token ids and back: GPT-2's vocabulary, any tokenizer.json, and plain bytes for the demo."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from oneb.config import BYTE_VOCAB_SIZE, GPT2_VOCAB_SIZE
from oneb.data.demo import DEMO_EOT
from oneb.errors import OnebError


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer."""

    name: str  # the `encoding` of a token file's sidecar
    vocab_size: int  # ids lie in [0, vocab_size)
    eot: int  # ends every document; text itself never encodes to it
    sha256: str  # of what defines it

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids in [0, vocab_size); bytes that are not UTF-8 become U+FFFD."""


class BytesTokenizer:
    """One id a UTF-8 byte."""

    name = "bytes"
    vocab_size = BYTE_VOCAB_SIZE
    eot = DEMO_EOT
    sha256 = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: Iterable[int]) -> str:
        pieces: list[bytes] = []
        for token in ids:
            token = int(token)
            pieces.append(b"<|endoftext|>" if token == self.eot else bytes([token]))
        return b"".join(pieces).decode("utf-8", errors="replace")


class Gpt2Tokenizer:
    """GPT-2's byte-pair encoding, by tiktoken."""

    name = "gpt2"
    vocab_size = GPT2_VOCAB_SIZE
    eot = 50256

    def __init__(self) -> None:
        import tiktoken

        # Downloading fails as OSError (requests' errors are), a damaged download as ValueError.
        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise OnebError(
                "tiktoken could not download GPT-2's vocabulary "
                f"({type(error).__name__}: {str(error)[:200]}). Try again with a network; or, on a machine "
                "that has one, set TIKTOKEN_CACHE_DIR to a folder, run "
                "`python3 -c \"import tiktoken; tiktoken.get_encoding('gpt2')\"`, copy the folder here and "
                "set TIKTOKEN_CACHE_DIR to it") from error
        assert (self._encoding.n_vocab, self._encoding.eot_token) == (self.vocab_size, self.eot)

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    @cached_property
    def ranks(self) -> bytes:
        """The vocabulary as a ``.tiktoken`` file: a line of base64 and rank each, in order of rank."""
        pairs = ((self._encoding.decode_single_token_bytes(rank), rank) for rank in range(self.eot))
        return b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in pairs)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.ranks).hexdigest()

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([int(token) for token in ids])


class FileTokenizer:
    """A Hugging Face ``tokenizer.json``, by the tokenizers package. Its special tokens are plain text in text."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise OnebError(f"--tokenizer {path} needs the tokenizers package: "
                            "python3 -m pip install tokenizers") from None
        try:
            text = path.read_text(encoding="utf-8")
            self._backend = Backend.from_str(text)
        except Exception as error:  # the package raises bare Exceptions
            raise OnebError(f"--tokenizer {path} cannot be read ({str(error)[:200]}); wanted gpt2, bytes or the path "
                            "of a Hugging Face tokenizer.json") from error
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.name = str(path)
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eot = _end_of_text(path, vocabulary)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=False)


# What models call the token that ends a document, most telling first.
_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]",
              "<\uff5cend\u2581of\u2581sentence\uff5c>", "[SEP]")


def _end_of_text(path: Path, vocabulary: dict[str, int]) -> int:
    """The id that ends documents: what ``tokenizer_config.json`` beside it names, else a usual name."""
    try:
        beside: Any = json.loads(path.with_name("tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        beside = None
    named = beside.get("content") if isinstance(beside, dict) else beside
    for name in (named, *_END_NAMES):
        if name in vocabulary:
            return vocabulary[name]
    raise OnebError(f"--tokenizer {path}: no token in it ends a document (looked for {', '.join(_END_NAMES)}). Put a "
                    'tokenizer_config.json beside it that says {"eos_token": "..."}')


TOKENIZERS: dict[str, type[BytesTokenizer] | type[Gpt2Tokenizer]] = {
    "gpt2": Gpt2Tokenizer, "bytes": BytesTokenizer,
}


def known_tokenizer(encoding: str) -> Tokenizer:
    """The tokenizer that a file of tokens or a checkpoint names: one of ours. What a file says is never a path to open.

    Raises:
        OnebError: it names another.
    """
    if encoding not in TOKENIZERS:
        raise OnebError(f"the tokenizer is said to be {encoding[:200]!r}, which is none of {', '.join(TOKENIZERS)}; "
                        "give its tokenizer.json with --tokenizer, if you trust it")
    return TOKENIZERS[encoding]()


def load_tokenizer(encoding: str) -> Tokenizer:
    """The tokenizer of that name: "gpt2", "bytes", or the path of a ``tokenizer.json``.

    ``TOKENIZERS[encoding].vocab_size`` is known without loading it.

    Raises:
        OnebError: for another name, or if GPT-2's vocabulary can be neither found nor downloaded.
    """
    if encoding.endswith(".json"):
        return FileTokenizer(Path(encoding).expanduser().absolute())
    if encoding not in TOKENIZERS:
        raise OnebError(f"tokenizer {encoding!r} is not known; wanted one of {', '.join(TOKENIZERS)}, "
                        "or the path of a Hugging Face tokenizer.json")
    return TOKENIZERS[encoding]()
