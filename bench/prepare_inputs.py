"""Inputs that ``prepare.py`` measures: text made from books, in every kind of file, a tokenizer, ready tokens."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_MADE_ROWS, _SOURCE_ROWS = 1000, 250  # documents a row group, of some 19 kB each
_TXT_BYTES = 25 * 10**6


def texts_of(folder: Path, n_bytes: int | None = None) -> Iterator[str]:
    """The texts of a folder's parquet files, in order; the first ``n_bytes`` of them, about."""
    for path in sorted(folder.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(256, columns=["text"]):
            for text in batch[0].to_pylist():
                yield text
                if n_bytes is not None:
                    n_bytes -= len(text.encode())
                    if n_bytes <= 0:
                        return


def text_bytes(folder: Path) -> int:
    """UTF-8 bytes of all texts."""
    return sum(len(text.encode()) for text in texts_of(folder))


def make_texts(books: Path, folder: Path, megabytes: int) -> None:
    """Parquet files of about 100 MB of text each: books whose sentences are dealt out anew, some words misspelt."""
    texts = list(texts_of(books))
    chance = random.Random(0)
    total = number = 0
    while total < megabytes * 10**6:
        made, held = [], 0
        while held < min(100, megabytes) * 10**6:
            sentences = [sentence for text in chance.sample(texts, 3) for sentence in text.split(". ")]
            chance.shuffle(sentences)
            text = ". ".join(sentences[:len(sentences) // 3])
            words = text.split(" ")
            for place in chance.sample(range(len(words)), len(words) // 200):
                words[place] += chance.choice("abcdefghijklmnopqrstuvwxyz")
            made.append(" ".join(words))
            held += len(made[-1].encode())
        write_parquet(folder / f"{number:03d}.parquet", made, _MADE_ROWS)
        total += held
        number += 1


def write_parquet(path: Path, texts: list[str], rows: int) -> None:
    """One column, in row groups of so many documents."""
    pq.write_table(pa.table({"text": texts}), path, row_group_size=rows, compression="zstd")


def make_sources(texts: list[str], folder: Path) -> dict[str, Path]:
    """The same documents as every kind of text file, by kind; a .txt holds many in a row, about 25 MB."""
    kinds = {kind: folder / kind for kind in ("parquet", "jsonl", "jsonl.gz", "jsonl.zst", "txt")}
    for path in kinds.values():
        path.mkdir()
    write_parquet(kinds["parquet"] / "a.parquet", texts, _SOURCE_ROWS)
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    (kinds["jsonl"] / "a.jsonl").write_bytes(lines)
    with gzip.open(kinds["jsonl.gz"] / "a.jsonl.gz", "wb", compresslevel=6) as file:
        file.write(lines)
    (kinds["jsonl.zst"] / "a.jsonl.zst").write_bytes(pa.compress(lines, "zstd", asbytes=True))
    held: list[str] = []
    for number, text in enumerate(texts):
        held.append(text)
        if sum(map(len, held)) >= _TXT_BYTES or number == len(texts) - 1:
            (kinds["txt"] / f"{number:06d}.txt").write_text("\n\n".join(held))
            held.clear()
    return kinds


def make_shards(tokens: Path, folder: Path, n_tokens: int, shard_tokens: int = 100_000_000) -> None:
    """Ready tokens as shards of kjj0/finewebedu10B-gpt2 hold them: GPT-2's end-of-text id before each document.

    Args:
        tokens: a .npy with that id behind each; repeated until there are ``n_tokens``.
    """
    ids = np.load(tokens, mmap_mode="r")
    stream = np.resize(np.concatenate([ids[-1:], ids[:-1]]), n_tokens)
    for number in range(0, n_tokens, shard_tokens):
        shard = stream[number:number + shard_tokens].astype("<u2")
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(shard)
        with open(folder / f"finewebedu_train_{number // shard_tokens + 1:06d}.bin", "wb") as file:
            file.write(header.tobytes())
            shard.tofile(file)


# How Llama 3's tokenizer.json splits text, and tiktoken's cl100k_base (openai_public.py).
_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")


def train_tokenizer(texts: list[str], path: Path, vocab_size: int = 32000) -> None:
    """A byte-level BPE as a Hugging Face ``tokenizer.json``."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_SPLIT), "isolated"), in_bytes])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.save(str(path))
