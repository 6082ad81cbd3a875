"""Text to token files: against a straightforward loop over the same documents."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import books_parquet
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from oneb.cli.prepare import main
from oneb.data.journal import npy_header
from oneb.data.prepare import prepare
from oneb.data.sidecar import read_sidecar
from oneb.data.sources import local_inputs
from oneb.data.tokenizer import BytesTokenizer, load_tokenizer
from oneb.data.tokens import open_tokens
from oneb.data.verify import verify

ROOT = Path(__file__).parents[1]


def reference_books(n_tokens: int) -> list[int]:
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    ids: list[int] = []
    for path in books_parquet():
        for text in pq.read_table(path)["text"].to_pylist():
            ids += [*encoding.encode(text, disallowed_special=()), encoding.eot_token]
            if len(ids) >= n_tokens:
                return ids[:n_tokens]
    return ids


def run(output: Path, *arguments: object) -> int:
    return main(["--output", str(output), *map(str, arguments)])


def in_bytes(*texts: str) -> list[int]:
    """The documents as the bytes tokenizer must write them."""
    return [token for text in texts for token in (*text.encode(), 256)]


def contents(path: Path) -> list[int]:
    return np.load(path).tolist()


# -- Books ---------------------------------------------------------------------------------------

def test_books_equal_a_plain_loop(books_npy):
    expected = reference_books(1_000_000)
    assert contents(books_npy) == expected
    sidecar = read_sidecar(books_npy)
    ends = np.flatnonzero(np.array(expected) == 50256)
    assert sidecar.documents == len(ends) + 1  # the last one is cut
    assert (sidecar.tokens, sidecar.encoding, sidecar.vocab_size, sidecar.eot) == (1_000_000, "gpt2", 50257, 50256)
    assert sidecar.max_id == 50256
    assert sidecar.format == "npy uint16"
    assert sidecar.sha256 == hashlib.sha256(books_npy.read_bytes()).hexdigest()


def test_books_open_without_warnings(books_npy):
    tokens = open_tokens(str(books_npy), vocab_size=50257)
    assert tokens.n_tokens == 1_000_000
    assert tokens.warnings == ()
    assert load_tokenizer(tokens.encoding).decode(tokens.read(0, 50)) in pq.read_table(
        books_parquet()[0])["text"][0].as_py()


# -- Inputs --------------------------------------------------------------------------------------

@pytest.fixture
def inputs(tmp_path) -> Path:
    """A folder with one file of each kind, and the texts "a".."h" in order of name."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    table = pa.table({"id": [1, 2, 3, 4], "text": ["a", None, "", "b"]})
    pq.write_table(table, folder / "1.parquet", row_group_size=3)
    lines = ['{"text": "c"}', "not json", "[1]", "", '{"body": "x"}', '{"text": 5}', '{"text": ""}', '{"text": "d\\n"}']
    (folder / "2.jsonl").write_text("\n".join(lines))
    with gzip.open(folder / "3.jsonl.gz", "wt") as file:
        file.write('{"text": "é"}\n{"text": "f"}\n')
    (folder / "4.txt").write_text("g\n")
    (folder / "sub" / "5.txt").write_text("h")
    (folder / "notes.md").write_text("not data")
    return folder


TEXTS = ("a", "b", "c", "d\n", "é", "f", "g\n", "h")


def test_every_kind_of_input(inputs, tmp_path, capsys):
    output = tmp_path / "x.npy"
    assert run(output, "--input", inputs, "--tokenizer", "bytes") == 0
    assert contents(output) == in_bytes(*TEXTS)
    assert read_sidecar(output).documents == 8
    printed = capsys.readouterr().out
    assert "3 empty, 2 not a JSON object, 2 without the text column" in printed
    assert "19 tokens (19) of 8 documents" in printed


def test_what_a_folder_holds_besides_is_said_and_what_is_hidden_is_left(inputs, tmp_path, capsys):
    (inputs / ".cache").mkdir()
    for name in (".cache/a.txt", ".b.txt", "._c.txt"):
        (inputs / name).write_text("hidden")
    (inputs / "sub" / "d.csv").write_text("e,f")
    assert run(tmp_path / "x.npy", "--input", inputs, "--tokenizer", "bytes") == 0
    assert contents(tmp_path / "x.npy") == in_bytes(*TEXTS)
    said = capsys.readouterr().err
    assert f"warning: 2 files in {inputs} not read, since" in said
    assert "notes.md, sub/d.csv\n" in said


def test_files_and_globs_keep_their_order(inputs, tmp_path):
    output = tmp_path / "x.npy"
    assert run(output, "--input", inputs / "sub", inputs / "*.txt", inputs / "3.jsonl.gz",
               "--tokenizer", "bytes") == 0
    assert contents(output) == in_bytes("h", "g\n", "é", "f")


@pytest.mark.parametrize("n_tokens", range(1, 20))
def test_the_count_is_exact(inputs, tmp_path, n_tokens):
    output = tmp_path / "x.npy"
    assert run(output, "--input", inputs, "--tokenizer", "bytes", "--tokens", n_tokens) == 0
    expected = in_bytes(*TEXTS)[:n_tokens]
    assert contents(output) == expected
    sidecar = read_sidecar(output)
    assert sidecar.tokens == n_tokens
    assert sidecar.documents == 1 + expected[:-1].count(256)
    assert sidecar.max_id == max(expected)


def test_input_that_runs_short_is_a_warning_with_the_true_count(inputs, tmp_path, capsys):
    assert run(tmp_path / "x.npy", "--input", inputs, "--tokenizer", "bytes", "--tokens", 1000) == 0
    assert "warning: the input held 19 tokens, 981 fewer than the 1000 asked for" in capsys.readouterr().err
    assert read_sidecar(tmp_path / "x.npy").tokens == 19
    assert verify(tmp_path / "x.npy").tokens == 19  # its SHA-256, too


@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=8), n_tokens=st.integers(1, 200),
       unit_bytes=st.integers(1, 300), kind=st.sampled_from(["jsonl", "jsonl.gz", "parquet"]))
@settings(max_examples=40)
def test_any_text_in_any_units(tmp_path_factory, texts, n_tokens, unit_bytes, kind):
    folder = tmp_path_factory.mktemp("any")
    path = folder / f"in.{kind}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=3)
    else:
        path.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    expected = in_bytes(*texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oneb.data.units.UNIT_BYTES", unit_bytes)
        patch.setattr("oneb.data.units._SEARCH_BYTES", 7)
        done = prepare(local_inputs([str(path)]), BytesTokenizer(), folder / "x.npy", source="test", n_tokens=n_tokens)
    assert contents(folder / "x.npy") == expected[:n_tokens]
    assert done.short_by == max(0, n_tokens - len(expected))
    assert not (folder / "x.npy.parts").exists()
    starts = [0, *(place + 1 for place, token in enumerate(expected[:n_tokens]) if token == 256)]
    if starts[-1] != len(expected[:n_tokens]):
        starts.append(len(expected[:n_tokens]))
    index = np.load(folder / "x.npy.idx.npy")
    assert index.dtype == np.int64
    assert index.tolist() == starts
    assert done.sidecar.documents == len(starts) - 1


@given(text=st.text(st.sampled_from("aé \n.\u3000😀"), max_size=80), unit_bytes=st.integers(1, 30))
@settings(max_examples=20)
def test_a_text_file_in_any_units_is_one_document(gpt2_cache, tmp_path_factory, text, unit_bytes):
    import tiktoken

    folder = tmp_path_factory.mktemp("txt")
    (folder / "a.txt").write_bytes(text.encode())
    (folder / "b.txt").write_bytes(b"b")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oneb.data.units.UNIT_BYTES", unit_bytes)
        patch.setattr("oneb.data.units._SEARCH_BYTES", 5)
        done = prepare(local_inputs([str(folder)]), load_tokenizer("gpt2"), folder / "x.npy", source="test")
    encoding = tiktoken.get_encoding("gpt2")
    expected = [*encoding.encode_ordinary(text), 50256] if text else []
    assert contents(folder / "x.npy") == [*expected, *encoding.encode_ordinary("b"), 50256]
    assert done.skipped.empty == (text == "")


def test_a_large_vocabulary_takes_uint32(tmp_path):
    vocabulary = {f"w{number}": number for number in range(70_000)} | {"</s>": 70_000, "[UNK]": 70_001}
    tokenizer = Backend(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "wide.json"))
    (tmp_path / "a.txt").write_text("w3 w69999 </s> w65536")
    output = tmp_path / "x.npy"
    assert run(output, "--input", tmp_path / "a.txt", "--tokenizer", tmp_path / "wide.json") == 0
    assert np.load(output).dtype == np.uint32
    # A special token's name in text is text: here three unknown words.
    assert contents(output) == [3, 69_999, 70_001, 70_001, 70_001, 65_536, 70_000]
    sidecar = read_sidecar(output)
    assert (sidecar.format, sidecar.vocab_size, sidecar.eot) == ("npy uint32", 70_002, 70_000)
    assert load_tokenizer(sidecar.encoding).decode([3, 65_536]) == "w3 w65536"


@given(count=st.integers(0, 10**15))
def test_header_is_numpys_own_format(tmp_path_factory, count):
    path = tmp_path_factory.getbasetemp() / "header.npy"
    path.write_bytes(npy_header(np.dtype("<u4"), count))
    with open(path, "rb") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == ((count,), False, np.dtype("<u4"))
        assert file.tell() == 128


# -- Mistakes ------------------------------------------------------------------------------------

def fails(capsys, output: Path, *arguments: object) -> str:
    assert run(output, *arguments) == 2
    assert not [path for path in output.parent.glob("*") if ".tmp" in path.name]
    error = capsys.readouterr().err
    assert "error: " in error
    return error


def test_an_existing_output_is_kept_unless_forced(inputs, tmp_path, capsys):
    output = tmp_path / "x.npy"
    assert run(output, "--input", inputs / "4.txt", "--tokenizer", "bytes") == 0
    before = output.read_bytes()
    assert "exists already" in fails(capsys, output, "--input", inputs, "--tokenizer", "bytes")
    pq.write_table(pa.table({"body": ["x"]}), inputs / "1.parquet")  # fails half way: the old pair stays
    assert "has no column 'text'; it has body" in fails(capsys, output, "--input", inputs / "4.txt",
                                                        inputs / "1.parquet", "--tokenizer", "bytes", "--force")
    assert output.read_bytes() == before
    assert read_sidecar(output).tokens == 3
    assert run(output, "--input", inputs / "sub", "--tokenizer", "bytes", "--force") == 0
    assert contents(output) == in_bytes("h")
    assert read_sidecar(output).tokens == 2


def test_killed_between_file_and_sidecar_leaves_no_lie(inputs, tmp_path, monkeypatch, capsys):
    output = tmp_path / "x.npy"
    assert run(output, "--input", inputs / "4.txt", "--tokenizer", "bytes") == 0

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("oneb.data.journal.fsync_directory", stop)
    assert run(output, "--input", inputs, "--tokenizer", "bytes", "--force") == 130
    assert Path(f"{output}.parts").exists()
    assert open_tokens(str(output), vocab_size=257).n_tokens == 19
    assert "run the same command again, and it continues" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(output, "--input", inputs, "--tokenizer", "bytes", "--force") == 0
    assert "wrote" in capsys.readouterr().out
    assert read_sidecar(output).sha256 == hashlib.sha256(output.read_bytes()).hexdigest()
    assert len(np.load(f"{output}.idx.npy")) == 9
    assert not Path(f"{output}.parts").exists()


def test_a_finished_file_gets_its_name_whatever_is_asked_for_next(inputs, tmp_path, monkeypatch, capsys):
    output = tmp_path / "x.npy"

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oneb.data.journal.Journal.publish", stop)
        assert run(output, "--input", inputs, "--tokenizer", "bytes") == 130
    assert not output.exists()
    assert "exists already" in fails(capsys, output, "--input", inputs, "--tokenizer", "bytes", "--tokens", "5")
    assert len(contents(output)) == 19
    assert not Path(f"{output}.parts").exists()
    assert run(output, "--input", inputs, "--tokenizer", "bytes", "--tokens", "5", "--force") == 0
    assert len(contents(output)) == 5


def command_fails(capsys, *arguments: str) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_mistakes_are_explained(inputs, tmp_path, capsys, gpt2_cache):
    output, shard = tmp_path / "x.npy", tmp_path / "shard.bin"
    shard.write_bytes(b"")
    assert "needs --tokens" in fails(capsys, output)
    assert "nothing to read there" in fails(capsys, output, "--input", tmp_path / "none*")
    assert "wanted a file ending in" in fails(capsys, output, "--input", inputs / "notes.md")
    assert "ending in .npy" in fails(capsys, tmp_path / "x.bin", "--tokens", "1M")
    assert "mkdir -p" in fails(capsys, tmp_path / "no" / "x.npy", "--tokens", "1M")
    assert "the disk has" in fails(capsys, output, "--tokens", "100000T")
    assert "'lots' is not a count" in fails(capsys, output, "--tokens", "lots")
    assert "it has id, text" in fails(capsys, output, "--input", inputs / "1.parquet", "--text-column", "body")
    assert "holds int64, wanted text" in fails(capsys, output, "--input", inputs / "1.parquet",
                                               "--text-column", "id")
    assert "prepare them apart" in fails(capsys, output, "--input", inputs, shard)
    assert "holds GPT-2 tokens, --tokenizer is bytes" in fails(capsys, output, "--input", shard, "--tokenizer", "bytes")
    assert "wanted either --output X.npy, to make it, or --verify" in command_fails(capsys)
    assert "--workers 0: wanted at least 1" in fails(capsys, output, "--workers", "0", "--tokens", "1M")
    assert "holds no text in 'none' (documents left out: " in fails(capsys, output, "--input", inputs / "2.jsonl",
                                                                   "--text-column", "none")
    for hub in (["--source", "fineweb"], ["--source-files", "*"], ["--retokenize"]):
        assert f"this machine, {hub[0]} those of the" in fails(capsys, output, "--input", inputs, *hub)
    assert "needs --source owner/name; fineweb has" in fails(capsys, output, "--source", "fineweb", "--source-files",
                                                             "*", "--tokens", "1M")
    assert "--verify only reads a.npy; --tokens, --force: for" in command_fails(
        capsys, "--verify", "a.npy", "--tokens", "1M", "--force")
    assert "--text-column: for --output" in command_fails(capsys, "--verify", "a.npy", "--text-column", "text")
    assert "--tokenizer is empty" in fails(capsys, output, "--input", inputs, "--tokenizer", "")
    assert "--input is empty" in fails(capsys, output, "--input", "")
    assert not output.exists()


def test_help_needs_no_packages_and_their_lack_is_explained(tmp_path):
    command = [sys.executable, "-S", "-E", str(ROOT / "prepare_fineweb.py")]  # -S: without site-packages
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "--text-column" in done.stdout
    done = subprocess.run([*command, "--output", "x.npy"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "lacks numpy, tiktoken, pyarrow" in done.stderr
    assert "bash quickstart.sh" in done.stderr


def test_the_sidecar_is_plain_lines_for_other_programs(inputs, tmp_path):
    output = tmp_path / "x.npy"
    assert run(output, "--input", inputs, "--tokenizer", "bytes") == 0
    meta = dict(line.split(": ", 1) for line in Path(f"{output}.meta").read_text().splitlines())
    assert " ".join(meta) == "tokens documents encoding vocab_size eot source format sha256 max_id tokenizer_sha256"
    assert (meta["tokens"], meta["encoding"], meta["eot"]) == ("19", "bytes", "256")
