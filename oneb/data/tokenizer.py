"""Text to token ids and back: GPT-2's vocabulary, and plain bytes for the demo."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Protocol

from oneb.config import BYTE_VOCAB_SIZE, GPT2_VOCAB_SIZE
from oneb.data.demo import DEMO_EOT
from oneb.errors import OnebError


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer."""

    name: str  # the `encoding` of a token file's sidecar
    vocab_size: int  # ids lie in [0, vocab_size)
    eot: int  # ends every document; text itself never encodes to it

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text, on all cores where that helps."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids in [0, vocab_size); bytes that are not UTF-8 become U+FFFD."""


class BytesTokenizer:
    """One id a UTF-8 byte."""

    name = "bytes"
    vocab_size = BYTE_VOCAB_SIZE
    eot = DEMO_EOT

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

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

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([int(token) for token in ids])


TOKENIZERS: dict[str, type[BytesTokenizer] | type[Gpt2Tokenizer]] = {
    "gpt2": Gpt2Tokenizer, "bytes": BytesTokenizer,
}


def load_tokenizer(encoding: str) -> Tokenizer:
    """The tokenizer of that name ("gpt2" or "bytes").

    ``TOKENIZERS[encoding].vocab_size`` is known without loading it.

    Raises:
        OnebError: for another name, or if GPT-2's vocabulary can be neither found nor downloaded.
    """
    if encoding not in TOKENIZERS:
        raise OnebError(f"tokenizer {encoding!r} is not known; wanted one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[encoding]()
