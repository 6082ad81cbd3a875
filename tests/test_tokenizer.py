"""Text to ids: round trips, what an end-of-text id is, and the fast encoder against tiktoken."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from data_helpers import books_parquet
from hypothesis import given, settings
from hypothesis import strategies as st

from oneb.data import encode
from oneb.data.encode import Fast, Gpt2Reference, checked_fast, make_encoder, pieces, trial_texts
from oneb.data.tokenizer import _gpt2, known_tokenizer, load_tokenizer
from oneb.errors import OnebError

ROOT = Path(__file__).parents[1]

@given(text=st.text())
def test_tokenizers_round_trip(gpt2_cache, text):
    for name in ("gpt2", "bytes"):
        tokenizer = load_tokenizer(name)
        assert tokenizer.name == name
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == tokenizer.decode(np.array(ids, np.int64)) == text
        assert tokenizer.eot not in ids


def test_text_never_ends_a_document(gpt2_cache):
    for name in ("gpt2", "bytes"):
        tokenizer = load_tokenizer(name)
        ids = tokenizer.encode("<|endoftext|>")
        assert tokenizer.eot not in ids
        assert tokenizer.decode([*ids, tokenizer.eot]) == "<|endoftext|><|endoftext|>"
        assert tokenizer.eot == tokenizer.vocab_size - 1


def test_bytes_that_are_not_utf8_decode_to_replacements():
    assert load_tokenizer("bytes").decode([0xC3, 97]) == "\ufffda"


def test_unknown_tokenizer():
    with pytest.raises(OnebError, match="'llama' is not known; wanted one of gpt2, bytes, or the path of a Hugging"):
        load_tokenizer("llama")
    with pytest.raises(OnebError, match=r"none.json cannot be read"):
        load_tokenizer("none.json")


def test_no_network_and_no_cache_is_explained(tmp_path):
    """In a process of its own: tiktoken keeps what it has loaded. A proxy that is not there is no network."""
    code = ("from oneb.data.tokenizer import load_tokenizer\nfrom oneb.errors import OnebError\n"
            "try:\n    load_tokenizer('gpt2')\nexcept OnebError as error:\n    print(error)")
    environment = os.environ | {"TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9",
                                "https_proxy": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "could not download GPT-2's vocabulary" in done.stdout
    assert "TIKTOKEN_CACHE_DIR" in done.stdout


# -- gigatoken against tiktoken ------------------------------------------------------------------

@pytest.fixture(scope="session")
def ranks(gpt2_cache, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "gpt2.tiktoken"
    path.write_bytes(load_tokenizer("gpt2").ranks)
    return path


def test_the_vocabulary_is_gpt2s_own(gpt2_cache):
    """The SHA-256 that tiktoken's source gives for r50k_base, whose ranks are GPT-2's."""
    assert load_tokenizer("gpt2").sha256 == "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


def test_an_older_tiktoken_gives_the_same_vocabulary(gpt2_cache, monkeypatch):
    ours = load_tokenizer("gpt2")
    monkeypatch.setitem(sys.modules, "tiktoken.load", types.ModuleType("without_read_file_cached"))
    assert _gpt2.__wrapped__()[1] == ours._ranks


@pytest.fixture(scope="session")
def fast(ranks) -> Fast:
    encoder, trouble = checked_fast(load_tokenizer("gpt2"), ranks)
    assert trouble == ""
    return encoder


def differing(fast: Fast, texts) -> list[str]:
    """Texts that gigatoken and plain tiktoken encode differently."""
    import tiktoken

    plain = tiktoken.get_encoding("gpt2")
    return [text for text in texts if fast.encode(text.encode()).tolist() != plain.encode_ordinary(text)]


def test_books_are_encoded_as_tiktoken_does(fast):
    texts = (text for path in books_parquet() for text in pq.read_table(path)["text"].to_pylist()[::10])
    assert not differing(fast, texts)


def test_fuzzed_strings_are_encoded_as_tiktoken_does(fast):
    assert not differing(fast, trial_texts(20_000, seed=1))


@pytest.mark.slow
def test_a_million_fuzzed_strings_are_encoded_as_tiktoken_does(fast):
    assert not differing(fast, trial_texts(1_000_000, seed=2))
    assert not differing(fast, trial_texts(2_000, seed=3, longest=20_000))


@given(text=st.text(max_size=300))
def test_any_text_is_encoded_as_tiktoken_does(fast, text):
    assert not differing(fast, [text])


@given(text=st.text(st.sampled_from(" \n\t\x0b\xa0\u3000\x1cab.'s1"), max_size=60), longest=st.integers(1, 5))
@settings(max_examples=300)
def test_long_white_space_is_cut_out_without_a_trace(gpt2_cache, text, longest):
    """The stand-in encodes what tiktoken cannot, and the same ids where it can."""
    import tiktoken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_LONG_SPACES", encode.re.compile(f"{encode._SPACE}{{{longest},}}"))
        found = Gpt2Reference(load_tokenizer("gpt2")).encode(text.encode())
    assert found.tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(text)


# The four tokens of GPT-2 that join the end of one character to the begin of the next: by the last byte of the first,
# what must follow. Only here does it show whether both take a character for a letter.
JOINED = {0x9A: "\u9192", 0xB6: "\u6975", 0x88: "\u8b6b", 0x91: "\u58eb"}


def test_both_take_the_same_characters_for_letters(fast):
    """Unicode 17's CJK Extension J, for one, is known to gigatoken and not to tiktoken."""
    joined = [chr(code) + JOINED[last] for code in (*range(0x80, 0xD800), *range(0xE000, 0x40000))
              if (last := chr(code).encode()[-1]) in JOINED]
    assert not differing(fast, joined)


WORDS = {
    "one letter": "a" * 10**6, "letters": "".join(random.Random(0).choices("abcdefghijklmnop", k=10**6)),
    "digits": "7" * 10**6, "signs": "=" * 10**6, "spaces": " " * 10**6, "line ends before a word": "\n" * 10**6 + "x",
    "Chinese": "\u4e2d" * 10**6, "emoji": "\U0001f600" * 250_000,
}


@pytest.mark.parametrize("name", WORDS)
def test_words_of_a_million_characters(fast, name):
    """Both encoders, in seconds (tiktoken alone overflows its stack on some)."""
    document = WORDS[name].encode()
    started = time.monotonic()
    ids = fast.encode(document)
    assert np.array_equal(ids, Gpt2Reference(load_tokenizer("gpt2")).encode(document))
    assert time.monotonic() - started < 60  # on a busy machine; quadratic work would take hours
    assert load_tokenizer("gpt2").decode(ids) == WORDS[name]


@given(words=st.lists(st.sampled_from(["word", " ", "\n", "\n\n", ". ", "\u00e9", "  x", "'s", "\u3000"]), max_size=60))
def test_pieces_of_a_document_encode_to_the_whole(fast, words):
    document = "".join(words).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "PIECE_BYTES", 5)
        parts = list(pieces(document, splits=True))
    assert b"".join(parts) == document
    assert [token for part in parts for token in fast.encode(part)] == fast.encode(document).tolist()


def test_what_gigatoken_remembers_is_bounded(ranks, monkeypatch):
    """Words never seen before, 40 MB of them: gigatoken alone would keep every one, some 300 MB."""
    monkeypatch.setattr(encode, "_CACHE_BYTES", 64 * 2**20)
    fast, chance = Fast("gpt2", ranks), np.random.default_rng(0)
    process = psutil.Process()
    before = peak = process.memory_info().rss
    for _ in range(10):
        letters = chance.integers(97, 123, 4 * 2**20).astype(np.uint8)
        letters[chance.random(len(letters)) < 0.15] = 32
        fast.encode(letters.tobytes())
        peak = max(peak, process.memory_info().rss)
    assert peak - before < 200 * 2**20


def test_without_gigatoken_tiktoken_does_the_work_and_says_so(ranks, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    encoder, trouble = checked_fast(load_tokenizer("gpt2"), ranks)
    assert encoder is None
    assert "gigatoken package is not installed" in trouble
    assert isinstance(make_encoder("gpt2", None), Gpt2Reference)


def test_a_gigatoken_that_differs_is_not_used(ranks, monkeypatch):
    right = Fast.encode
    monkeypatch.setattr(Fast, "encode", lambda self, document: right(self, document.replace(b"don't", b"dont")))
    encoder, trouble = checked_fast(load_tokenizer("gpt2"), ranks)
    assert encoder is None
    assert "differently from tiktoken" in trouble


# -- What files say ------------------------------------------------------------------------------

@pytest.mark.parametrize("said", ["/etc/passwd", "../tokenizer.json", "x.json", "gpt2; rm -rf /", "llama", "$(id)"])
def test_what_a_file_says_is_never_a_path_to_open(said):
    """A .meta or a checkpoint may come from anybody: it chooses among our tokenizers, and opens nothing."""
    with pytest.raises(OnebError, match="none of gpt2, bytes; give its tokenizer.json with --tokenizer"):
        known_tokenizer(said)
    assert known_tokenizer("bytes").name == "bytes"
