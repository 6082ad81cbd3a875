"""Documents to token ids as fast as they can be had: by gigatoken, checked against the tokenizer's own package."""

from __future__ import annotations

import contextlib
import os
import random
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from oneb.data.new_characters import NEW, NEW_LETTERS
from oneb.data.tokenizer import FileTokenizer, Gpt2Tokenizer, Tokenizer, load_tokenizer

PIECE_BYTES = 4 * 2**20  # a long document is encoded in pieces of about so many bytes
_CACHE_BYTES, _LEAST_CACHE_BYTES = 256 * 2**20, 64 * 2**20
_PROCESS_BYTES = 700 * 2**20  # of memory; what is read, written and loaded anew comes on top
_LONG_SPACE = 10_000  # characters
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096

# No word of GPT-2's splitting pattern goes on from a visible character into white space, and its one look ahead is
# inside white space: encoding what lies before such a place, and what lies behind, gives the tokens of the whole.
SAFE_CUT = re.compile(rb"[!-~](?=[ \n])")

# White space as Unicode (and the pattern) has it; Python's \s also takes the separators U+001C to U+001F.
_SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_LONG_SPACES = re.compile(f"{_SPACE}{{{_LONG_SPACE},}}")


class Encoder(Protocol):
    """What a worker asks of a tokenizer."""

    splits: bool  # a document may be cut at every ``SAFE_CUT``

    def encode(self, document: bytes) -> np.ndarray:
        """The ids, (n,) of any integer dtype, of valid UTF-8."""


class BytesEncoder:
    """One id a byte."""

    splits = True

    def encode(self, document: bytes) -> np.ndarray:
        return np.frombuffer(document, np.uint8)


class ReferenceEncoder:
    """Any tokenizer, as its own package does it."""

    splits = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = tokenizer.encode

    def encode(self, document: bytes) -> np.ndarray:
        return np.array(self._encode(document.decode()), np.uint32)


class Gpt2Reference:
    """tiktoken. A long run of white space before a word overflows its stack: the run is one word, encoded apart."""

    splits = True

    def __init__(self, tokenizer: Gpt2Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, document: bytes) -> np.ndarray:
        text = document.decode()
        ids: list[int] = []
        done = 0
        for run in _LONG_SPACES.finditer(text):
            # The last character of white space belongs to the word behind it, if there is one.
            end = run.end() if run.end() == len(text) else run.end() - 1
            ids += self._tokenizer.encode(text[done:run.start()])
            ids += self._tokenizer.encode(text[run.start():end])
            done = end
        ids += self._tokenizer.encode(text[done:])
        return np.array(ids, np.uint32)


class Fast:
    """gigatoken, without special tokens: a literal ``<|endoftext|>`` is text.

    It keeps every word that it has met; it is loaded anew once these take 256 MiB, or less where the process is large
    already. Documents with the newest characters of Unicode, which the two may split differently, are the reference's.

    Args:
        encoding: the tokenizer's name.
        vocabulary: what ``write_vocabulary`` wrote of it.
    """

    def __init__(self, encoding: str, vocabulary: Path) -> None:
        self.splits = encoding == "gpt2"
        self._new = NEW_LETTERS if encoding == "gpt2" else NEW  # GPT-2's pattern asks for letters and numbers alone
        self._encoding, self._vocabulary = encoding, vocabulary
        self._reference: Encoder | None = None
        self._load()

    def _load(self) -> None:
        # Not the package itself: that one wants more packages, for what is not used here.
        from gigatoken.gigatoken_rs import BPETokenizer, load_hf_json

        self._backend: Any = None  # the old one would take its memory beside the new one
        if self._vocabulary.suffix == ".json":
            self._backend = load_hf_json(self._vocabulary.read_bytes())
        else:
            self._backend = BPETokenizer.from_tiktoken(self._vocabulary, "gpt2", None)
        held, self._since = _resident_bytes(), 0
        self._most = held + max(_LEAST_CACHE_BYTES, min(_CACHE_BYTES, _PROCESS_BYTES - held))

    def encode(self, document: bytes) -> np.ndarray:
        self._since += len(document)
        if self._since >= PIECE_BYTES:
            self._since = 0
            if _resident_bytes() > self._most:
                self._load()
        if not self._new.are_in(document):
            return self._backend.encode(document)
        self._reference = self._reference or reference_encoder(load_tokenizer(self._encoding))
        return self._reference.encode(document)


def _resident_bytes() -> int:
    """Memory of this process; 0 where the system does not say it in /proc."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0


@contextlib.contextmanager
def _panics_raised() -> Iterator[None]:
    """Raise a panic in Rust, which is no Exception, as a RuntimeError."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as panic:
        raise RuntimeError(str(panic)) from panic


def write_vocabulary(tokenizer: Tokenizer, folder: Path) -> Path | None:
    """Write the file by which gigatoken knows a tokenizer into ``folder``; None for one that it should not be given."""
    if isinstance(tokenizer, Gpt2Tokenizer):
        path, content = folder / "gpt2.tiktoken", tokenizer.ranks
    elif isinstance(tokenizer, FileTokenizer) and tokenizer.is_regular:
        path, content = folder / "tokenizer.json", tokenizer.without_special_tokens
    else:
        return None
    path.write_bytes(content)
    return path


def checked_fast(tokenizer: Tokenizer, vocabulary: Path) -> tuple[Fast | None, str]:
    """gigatoken, if it encodes many strings as the tokenizer's own package does; else None and why not, in words.

    Args:
        vocabulary: what ``write_vocabulary`` wrote of it.
    """
    own, texts = "tiktoken", trial_texts()
    if isinstance(tokenizer, FileTokenizer):  # it may be one that nobody has compared yet
        own = "the tokenizers package"
        texts = chain(trial_texts(2000), tokenizer.trial_texts())
    try:
        with _panics_raised():
            fast = Fast(tokenizer.name, vocabulary)
            text = _encoded_otherwise(fast, reference_encoder(tokenizer), texts)
    except ImportError:
        return None, (f"the gigatoken package is not installed, so {own} does its work, many times slower: "
                      "python3 -m pip install gigatoken")
    except Exception as error:  # fallback: another version of it, or a tokenizer of a kind that it has not
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        return None, f"gigatoken does not work here ({reason}), so {own} does its work, many times slower"
    if text is not None:
        return None, (f"gigatoken encodes {text[:40]!r} differently from {own}, which therefore does its "
                      "work, many times slower; please report this")
    return fast, ""


def _encoded_otherwise(fast: Encoder, reference: Encoder, texts: Iterable[str]) -> str | None:
    """A text that the two encode differently."""
    for text in texts:
        with contextlib.suppress(UnicodeEncodeError):
            document = text.encode()
            if not np.array_equal(fast.encode(document), reference.encode(document)):
                return text
    return None


def make_encoder(encoding: str, vocabulary: Path | None) -> Encoder:
    """The encoder of a tokenizer's name, by gigatoken if there is a ``vocabulary`` for it.

    Raises:
        RuntimeError: gigatoken does not load it, though it did where it was checked.
    """
    if vocabulary is None:
        return reference_encoder(load_tokenizer(encoding))
    with _panics_raised():
        return Fast(encoding, vocabulary)


def reference_encoder(tokenizer: Tokenizer) -> Encoder:
    """The encoder that a tokenizer's own package is."""
    if isinstance(tokenizer, Gpt2Tokenizer):
        return Gpt2Reference(tokenizer)
    return BytesEncoder() if tokenizer.name == "bytes" else ReferenceEncoder(tokenizer)


def pieces(document: bytes, splits: bool) -> Iterable[bytes]:
    """A long document in pieces whose tokens follow one another to the document's own."""
    if not splits or len(document) < 2 * PIECE_BYTES:
        return (document,)
    return _cut(document)


def _cut(document: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(document):
        found = SAFE_CUT.search(document, start + PIECE_BYTES)
        end = found.end() if found else len(document)
        yield document[start:end]
        start = end


# -- Strings that set tokenizers apart -------------------------------------------------------------

_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz     ", "aA'sStTrReEvVmMlLdD ''", "0123456789.,- ",
    " \n\t\r\x0b\x0c\xa0\u2028\u3000\x85x", "!\"#$%&()*+-/:;<=>?@[]^_`{|}~ a1",
    "\xe4\xf6\xfc\xdf\xe9\xe8\xea\u0301\u0308 e", "\u4e2d\u6587\u3042\u30a2\ud55c\u0939\u093f\u0926 \u0660\xb2\u216b",
    "\U0001f600\U0001f469\u200d\U0001f680\ufe0f\U0001f1e9\U0001f1ea \u200b\ufeff", "\x00\x01\x1c\x1d\x1e\x1f\x7f a\n",
    "<|endoftext|> <|>", "thequickbrown fox jumps. Over 12 'tis don't we'LL\n\n  ",
)
_WORDS = ("<|endoftext|>", " <|endoftext|>\n", "don't", "I'LL", " the", "\n\n", "   ", "\r\n", "\u4e2d\u6587", "\x00",
          "\U0001f600", "123456789", "'s", "\u2019s", "\xa0", "word", "https://a.b/c?d=e&f", "    return x\n", "==",
          "\u0301")


def trial_texts(n: int = 400, seed: int = 0, longest: int = 60) -> Iterator[str]:
    """``n`` strings, always the same for a seed: words of few alphabets, white space, numbers, and any code point."""
    chance = random.Random(seed)
    for number in range(n):
        length = chance.randrange(longest)
        if number % 4 == 0:
            yield "".join(chr(chance.choice((chance.randrange(0x250), chance.randrange(0xD800),
                                             chance.randrange(0xE000, 0x110000)))) for _ in range(length))
        elif number % 4 == 1:
            yield "".join(chance.choices(_WORDS, k=length // 4))
        else:
            letters = chance.choice(_ALPHABETS) + chance.choice(_ALPHABETS)
            yield "".join(chance.choices(letters, k=length))
