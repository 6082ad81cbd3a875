"""Text to token ids and back: GPT-2's vocabulary, any tokenizer.json, and plain bytes for the demo."""

from __future__ import annotations

import binascii
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from oneb.config import BYTE_VOCAB_SIZE, GPT2_VOCAB_SIZE
from oneb.data.demo import DEMO_EOT
from oneb.errors import OnebError

if TYPE_CHECKING:
    import tiktoken
    from tokenizers import Tokenizer as Backend

# GPT-2's merges, where tiktoken finds and keeps them, and their SHA-256 (tiktoken_ext/openai_public.py).
_MERGES_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


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
        # Downloading fails as OSError (requests' errors are), a damaged download as ValueError.
        try:
            self._encoding, self._ranks = _gpt2()
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
        return b"".join(binascii.b2a_base64(piece, newline=False) + b" %d\n" % rank
                        for piece, rank in self._ranks.items())

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.ranks).hexdigest()

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([int(token) for token in ids])


@cache
def _gpt2() -> tuple[tiktoken.Encoding, dict[bytes, int]]:
    """tiktoken's GPT-2, and the rank of each of its tokens, in order.

    tiktoken's own function takes four times as long: it compares the merges with a second file.
    """
    import tiktoken

    try:
        from tiktoken.load import read_file_cached
        from tiktoken_ext.openai_public import r50k_pat_str
    except ImportError:  # an older version
        encoding = tiktoken.get_encoding("gpt2")
        return encoding, {encoding.decode_single_token_bytes(rank): rank for rank in range(Gpt2Tokenizer.eot)}
    ranks = _merged_bytes(read_file_cached(_MERGES_URL, _MERGES_SHA256).decode())
    special = {"<|endoftext|>": Gpt2Tokenizer.eot}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special,
                             explicit_n_vocab=Gpt2Tokenizer.vocab_size), ranks


def _merged_bytes(merges: str) -> dict[bytes, int]:
    """Tokens by rank: single bytes, then each line's two parts merged.

    GPT-2 writes a byte as a character that can be seen: itself if it can, else one from U+0100 on, in order.
    """
    seen = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    unseen = [byte for byte in range(256) if byte not in seen]
    byte_of = np.zeros(512, np.uint8)
    byte_of[seen], byte_of[256:256 + len(unseen)] = seen, unseen
    merged = [line.replace(" ", "", 1) for line in merges.split("\n")[1:-1]]
    whole = byte_of[np.frombuffer("".join(merged).encode("utf-16-le"), "<u2")].tobytes()
    ends = [0, *accumulate(map(len, merged))]
    tokens = [bytes([byte]) for byte in (*seen, *unseen)] + [whole[i:j] for i, j in pairwise(ends)]
    return {token: rank for rank, token in enumerate(tokens)}


class FileTokenizer:
    """A Hugging Face ``tokenizer.json``, by the tokenizers package. Its special tokens are plain text in text."""

    def __init__(self, path: Path) -> None:
        try:
            self._content = path.read_bytes()
            definition = self._definition()
            self._loaded: Backend | None = _load(definition)
            vocabulary = self._loaded.get_vocab(with_added_tokens=True)
        except ImportError:
            raise OnebError(f"--tokenizer {path} needs the tokenizers package: "
                            "python3 -m pip install tokenizers") from None
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the package raises bare Exceptions; a panic in Rust is not even one
            raise OnebError(f"--tokenizer {path} cannot be read ({str(error)[:200]}); wanted gpt2, bytes or the path "
                            "of a Hugging Face tokenizer.json") from error
        self.name = str(path)
        self.sha256 = hashlib.sha256(self._content).hexdigest()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.eot = _end_of_text(path, vocabulary)
        added = definition.get("added_tokens", ())
        self._special = [token["content"] for token in added if token.get("special")]
        self._ordinary = [token["content"] for token in added if not token.get("special")]
        # The package passes over what contradicts itself; others may stop at it, or take it as it stands.
        self.is_regular = (len(set(vocabulary.values())) == len(vocabulary)
                           and all(vocabulary.get(token["content"]) == token["id"] for token in added))

    def _definition(self) -> dict[str, Any]:
        """What the file says, without what makes a text's tokens depend on chance or on its length."""
        definition = json.loads(self._content.decode("utf-8-sig"))
        definition |= {"truncation": None, "padding": None}
        if "dropout" in definition["model"]:
            definition["model"]["dropout"] = None
        return definition

    @property
    def _backend(self) -> Backend:
        if self._loaded is None:
            self._loaded = _load(self._definition())
        return self._loaded

    def forget(self) -> None:
        """Free what encoding takes, hundreds of MiB for a large vocabulary; it is there again when it is needed."""
        self._loaded = None

    @property
    def without_special_tokens(self) -> bytes:
        """A ``tokenizer.json`` that takes special tokens for text, as ``encode`` does."""
        definition = self._definition()
        added = [token for token in definition.get("added_tokens", ()) if not token.get("special")]
        return json.dumps(definition | {"added_tokens": added}).encode()

    def trial_texts(self) -> Iterator[str]:
        """Texts that hold its added tokens, alone and where a special and an ordinary one overlap."""
        for token in (*self._special, *self._ordinary):
            yield f"a{token} b{token}{token}\n{token}c"
        for special in self._special:
            for token in self._ordinary:
                for shared in range(1, len(token)):
                    if special.endswith(token[:shared]):
                        yield f"a{special}{token[shared:]} b"

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=False)


def _load(definition: dict[str, Any]) -> Backend:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(json.dumps(definition))
    backend.encode_special_tokens = True
    return backend


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
    if isinstance(named, str) and named not in vocabulary:
        raise OnebError(f"--tokenizer {path} has no token {named!r}, which tokenizer_config.json beside it calls "
                        "eos_token; correct one of the two")
    for name in (named, *_END_NAMES):
        if isinstance(name, str) and name in vocabulary:
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
