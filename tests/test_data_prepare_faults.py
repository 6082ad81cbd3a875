"""Inputs that are damaged, huge or odd: handled, counted, said; and memory stays bounded."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oneb.cli.prepare import main
from oneb.data.prepare import Prepared, prepare
from oneb.data.sidecar import read_sidecar
from oneb.data.sources import local_inputs
from oneb.data.tokenizer import BytesTokenizer, load_tokenizer
from oneb.errors import OnebError

ROOT = Path(__file__).parents[1]
WORKERS = (1, 2)


def in_bytes(*texts: str | bytes) -> list[int]:
    return [token for text in texts for token in (*(text.encode() if isinstance(text, str) else text), 256)]


def prepared(folder: Path, *inputs: Path, workers: int = 1) -> tuple[Prepared, list[int]]:
    """What was done, and the ids."""
    output = folder / "x.npy"
    done = prepare(local_inputs([str(path) for path in inputs]), BytesTokenizer(), output, source="test",
                   n_workers=workers, force=True)
    return done, np.load(output).tolist()


# -- Damage --------------------------------------------------------------------------------------

TEXTS = [f"row {number} " + "x" * (number % 90) for number in range(1000)]


def write_parquet(path: Path, **options) -> bytearray:
    pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=100, use_dictionary=False, **options)
    return bytearray(path.read_bytes())


@pytest.mark.parametrize("compression", ["none", "zstd", "snappy"])
def test_a_parquet_file_damaged_in_the_middle(tmp_path, compression):
    """Of the damaged unit what comes before the damage is kept, and all other units; the same with any processes."""
    path = tmp_path / "a.parquet"
    content = write_parquet(path, compression=compression)
    column = pq.ParquetFile(path).metadata.row_group(3).column(0)
    place = column.data_page_offset
    content[place:place + 30] = random.Random(0).randbytes(30)
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oneb.data.units.UNIT_BYTES", 6000)
        done, ids = prepared(tmp_path, path)
        (tmp_path / "b").mkdir()
        again, same = prepared(tmp_path / "b", path, workers=2)
    assert done.skipped.damaged == 1
    assert "a.parquet from row 300 to" in done.skipped.examples[0]
    assert ids == same
    assert again.skipped == done.skipped
    text = bytes(token if token < 256 else 10 for token in ids).decode().splitlines()
    assert text[:300] == TEXTS[:300]
    assert text[-600:] == TEXTS[-600:]


@pytest.mark.parametrize("damage", ["cut", "magic", "footer", "empty"])
def test_a_parquet_file_that_cannot_be_opened(tmp_path, capsys, damage):
    content = write_parquet(tmp_path / "a.parquet")
    damaged = {"cut": content[:-500], "magic": content[:-4] + b"XXXX", "empty": b"",
               "footer": content[:-60] + b"\xff" * 50 + content[-10:]}[damage]
    (tmp_path / "a.parquet").write_bytes(damaged)
    (tmp_path / "b.txt").write_text("b")
    output = tmp_path / "x.npy"
    arguments = ["--output", str(output), "--tokenizer", "bytes", "--input"]
    assert main([*arguments, str(tmp_path / "a.parquet"), str(tmp_path / "b.txt")]) == 0
    assert np.load(output).tolist() == in_bytes("b")
    error = capsys.readouterr().err
    assert "damaged in 1 place, and" in error
    assert str(tmp_path / "a.parquet") in error
    output.unlink()
    assert main([*arguments, str(tmp_path / "a.parquet")]) == 2
    assert f"no text that can be read; copy it again: {tmp_path / 'a.parquet'}" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_packed_file_cut_short_is_read_up_to_there(tmp_path, suffix):
    chance = random.Random(1)
    texts = [f"{number} {chance.randbytes(40).hex()}" for number in range(5000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    packed = gzip.compress(lines) if suffix == "gz" else pa.compress(lines, "zstd", asbytes=True)
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(packed[:len(packed) // 2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oneb.data.units.UNIT_BYTES", 20_000)
        patch.setattr("oneb.data.units._SEARCH_BYTES", 1000)
        done, ids = prepared(tmp_path, path)
    assert done.skipped.damaged == 1
    assert str(path) in done.skipped.examples[0]
    kept = bytes(token if token < 256 else 10 for token in ids).decode().splitlines()
    assert 1000 < len(kept) < 5000
    assert kept == texts[:len(kept)]
    assert done.skipped.bad_json <= 1  # the line that was cut


def test_invalid_utf8_becomes_replacement_characters_and_is_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 ok")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "x\xffy"}\n{"text": "\\ud83d"}\n'
                                       b'{"text": "\\ud83d\\ude00 \xef\xbf\xbd"}\n{"body": "\xff"}\n')
    raw = pa.array([b"p\xc3", b"q", b"\xf0\x9f\x98\x80"], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": strings}), tmp_path / "c.parquet")
    done, ids = prepared(tmp_path, *(tmp_path / name for name in ("a.txt", "b.jsonl", "c.parquet")))
    assert ids == in_bytes("caf\ufffd ok", "x\ufffdy", "\ufffd", "\U0001f600 \ufffd", "p\ufffd", "q", "\U0001f600")
    assert done.skipped.mended == 4
    assert done.skipped.no_text == 1


def test_odd_json_lines(tmp_path):
    lines = [b"\xef\xbb\xbf" + json.dumps({"text": "with a byte order mark"}).encode(), b"[" * 100_000, b"\x00", b"\r",
             b'{"text": "carriage return"}\r', b'{"text": "a", "text": "last wins"}', b'{"text": "\\u0000"}',
             b"null", b'"text"', b'{"text": NaN}', b'{"text": "no line end"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    done, ids = prepared(tmp_path, tmp_path / "a.jsonl")
    assert ids == in_bytes("with a byte order mark", "carriage return", "last wins", "\0", "no line end")
    assert (done.skipped.bad_json, done.skipped.no_text) == (4, 1)


def test_a_line_that_does_not_fit_in_memory_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("oneb.data.units.MAX_LINE_BYTES", 1000)
    monkeypatch.setattr("oneb.data.units._SEARCH_BYTES", 64)
    texts = ["a", "b" * 5000, "c" * 900, "d" * 2000]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for unit_bytes in (100, 3000, 10**6):
        monkeypatch.setattr("oneb.data.units.UNIT_BYTES", unit_bytes)
        done, ids = prepared(tmp_path, tmp_path / "a.jsonl")
        assert ids == in_bytes("a", "c" * 900)
        assert done.skipped.too_long == 2


@pytest.mark.parametrize("kind", ["dictionary", "large", "many small groups"])
def test_parquet_in_other_layouts(tmp_path, kind):
    texts = pa.array(TEXTS).dictionary_encode() if kind == "dictionary" else pa.array(TEXTS, pa.large_string())
    pq.write_table(pa.table({"id": range(1000), "text": texts}), tmp_path / "a.parquet",
                   row_group_size=7 if kind == "many small groups" else 1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oneb.data.units.UNIT_BYTES", 5000)
        patch.setattr("oneb.data.units._BATCH_BYTES", 300)
        _, ids = prepared(tmp_path, tmp_path / "a.parquet")
    assert ids == in_bytes(*TEXTS)


# -- Huge documents --------------------------------------------------------------------------------

def measured(*arguments: str) -> int:
    """Peak memory in MiB of the command, in one process."""
    code = ("import sys; from oneb.cli.prepare import main; code = main(sys.argv[1:])\n"
            "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM:')))\nsys.exit(code)")
    done = subprocess.run([sys.executable, "-c", code, "--workers", "1", *arguments], text=True, check=True,
                          stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return int(done.stdout.split()[-2]) // 1024


@pytest.mark.parametrize("kind", ["jsonl", pytest.param("txt", marks=pytest.mark.slow),
                                  pytest.param("parquet", marks=pytest.mark.slow)])
def test_a_document_of_100_mb_takes_less_than_a_gigabyte(gpt2_cache, tmp_path, kind):
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    words = random.Random(0).choices(["the", "quick", "brown", "fox.\n", "jumps", "over", "caf\u00e9"], k=20_000)
    text = " ".join(words)
    text *= 100 * 10**6 // len(text.encode())
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": [text, "end"]}), path)
    else:
        path.write_text(text if kind == "txt" else json.dumps({"text": text}, ensure_ascii=False) + '\n{"text": "end"}')
    assert measured("--input", str(path), "--output", str(tmp_path / "x.npy")) < 1024
    ids = np.load(tmp_path / "x.npy")
    ends = np.flatnonzero(ids == 50256)
    assert read_sidecar(tmp_path / "x.npy").documents == len(ends) == (1 if kind == "txt" else 2)
    tokenizer = load_tokenizer("gpt2")
    assert tokenizer.decode(ids[:ends[0]]) == text


# -- Ready tokens ----------------------------------------------------------------------------------

def write_shard(path: Path, ids: list[int]) -> None:
    """As llm.c writes it."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("n_tokens", [None, 7, 5000])
def test_documents_of_shards_end_with_what_they_began_with(gpt2_cache, tmp_path, monkeypatch, workers, n_tokens):
    """Shards begin each document with 50256, and cut documents where a shard is full."""
    monkeypatch.setattr("oneb.data.units.UNIT_BYTES", 1000)
    chance = np.random.default_rng(0)
    documents = [chance.integers(0, 50256, length).tolist() for length in chance.integers(1, 900, 30)]
    stream = [token for document in documents for token in (50256, *document)]
    cuts = [0, 4000, 4001, 9000, len(stream)]
    for number in range(4):
        write_shard(tmp_path / f"shard_{number}.bin", stream[cuts[number]:cuts[number + 1]])
    output = tmp_path / "x.npy"
    done = prepare(local_inputs([str(tmp_path / "*.bin")]), load_tokenizer("gpt2"), output, source="test",
                   n_tokens=n_tokens, n_workers=workers)
    expected = [token for document in documents for token in (*document, 50256)][:n_tokens]
    assert np.load(output).tolist() == expected
    assert np.load(f"{output}.idx.npy")[-1] == len(expected)
    assert done.sidecar.documents == expected[:-1].count(50256) + 1
    files = json.loads((tmp_path / "x.npy.sources.json").read_text())
    assert sum(file["tokens"] for file in files) == len(expected)
    assert len(files) == {None: 4, 7: 1, 5000: 3}[n_tokens]


def test_a_token_that_does_not_fit_is_an_error(gpt2_cache, tmp_path):
    write_shard(tmp_path / "a.bin", [50256, 1, 2, 50257, 3])
    with pytest.raises(OnebError, match="a.bin: the token id 50257 is outside the vocabulary of 50257 of gpt2"):
        prepare(local_inputs([str(tmp_path / "a.bin")]), load_tokenizer("gpt2"), tmp_path / "x.npy", source="test")
    assert not (tmp_path / "x.npy").exists()


@pytest.mark.parametrize("workers", [1, 3])
def test_what_cannot_be_read_is_no_mistake_if_it_is_not_needed(gpt2_cache, tmp_path, monkeypatch, workers):
    """Processes read on while the tokens before are placed; the same for any number of them."""
    monkeypatch.setattr("oneb.data.units.UNIT_BYTES", 1000)
    write_shard(tmp_path / "a.bin", [50256, *range(6000)])
    write_shard(tmp_path / "b.bin", [65535] * 5000)

    def ids(n_tokens: int) -> list[int]:
        prepare(local_inputs([str(tmp_path / "*.bin")]), load_tokenizer("gpt2"), tmp_path / "x.npy", source="test",
                n_tokens=n_tokens, n_workers=workers, force=True)
        return np.load(tmp_path / "x.npy").tolist()

    assert ids(6000) == list(range(6000))
    with pytest.raises(OnebError, match="b.bin: the token id 65535 is outside the vocabulary"):
        ids(6001)
    assert json.loads((tmp_path / "x.npy.parts" / "state.json").read_text())["tokens"] == 6000
