"""What a token file holds, as it is shown and as it is verified."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneb.cli import progress_line
from oneb.cli.main import main as oneb
from oneb.cli.prepare import main as prepare
from oneb.data import verify
from oneb.data.formats import open_file
from oneb.data.verify import statistics


@pytest.fixture
def made(tmp_path) -> Path:
    for number in range(30):
        (tmp_path / f"{number:02d}.txt").write_text(f"file {number} " + "abc " * number)
    assert prepare(["--input", str(tmp_path / "*.txt"), "--output", str(tmp_path / "x.npy"), "--tokenizer", "bytes",
                    "--tokens", "1990"]) == 0
    return tmp_path / "x.npy"


@given(ids=st.lists(st.integers(0, 3), min_size=1, max_size=60), chunk=st.integers(1, 9),
       eot=st.sampled_from([None, 0, 3]))
def test_statistics_against_plain_python(tmp_path_factory, ids, chunk, eot):
    path = tmp_path_factory.getbasetemp() / "statistics.npy"
    np.save(path, np.array(ids, np.uint16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "_CHUNK_TOKENS", chunk)
        found = statistics(open_file(path, "npy"), eot)
    assert found.tokens == len(ids)
    assert found.counts.tolist() == [ids.count(token) for token in range(max(ids) + 1)]
    runs = "".join("0" if token == 0 else " " for token in ids).split()
    assert found.longest_zeros == max(map(len, runs), default=0)
    ends = [place + 1 for place, token in enumerate(ids) if token == eot]
    assert found.ends.tolist() == ends
    bounds = [0, *ends] if ends and ends[-1] == len(ids) else [0, *ends, len(ids)]
    assert found.lengths.tolist() == np.diff(bounds).tolist()


def test_show(made, capsys):
    capsys.readouterr()
    assert oneb(["data", "show", str(made), "--samples", "2", "--length", "40"]) == 0
    printed = capsys.readouterr().out
    ids = np.load(made)
    lengths = np.diff(np.load(f"{made}.idx.npy"))
    assert "1990 tokens (1.99K)" in printed
    assert f"{len(np.unique(ids))} of 257 occur, the largest is 256" in printed
    assert f"documents: {len(lengths)}, the last one cut; tokens in one: mean {lengths.mean():.0f}" in printed
    assert f"longest {lengths.max()}" in printed
    assert "--- tokens 0 to 40\nfile 0 <|endoftext|>file 1 abc <|endoftext|>" in printed
    assert printed.count("--- tokens ") == 2
    assert "warning" not in printed


def test_show_says_what_it_cannot_know_and_what_looks_wrong(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.concatenate([np.arange(1, 50), np.zeros(5000)]).astype(np.uint16))
    assert oneb(["data", "show", str(tmp_path / "x.npy")]) == 0
    printed = capsys.readouterr().out
    assert "no .meta beside it: name its --tokenizer" in printed
    assert "warning: 5000 ids 0 in a row" in printed
    assert oneb(["data", "show", str(tmp_path)]) == 2
    assert "is a folder; wanted one of its files: x.npy" in capsys.readouterr().err
    (tmp_path / "x.u16").write_bytes(np.arange(9, dtype="<u2").tobytes())
    assert oneb(["data", "show", str(tmp_path / "x.u16"), "--data-format", "raw"]) == 0
    assert "9 tokens (9)" in capsys.readouterr().out
    assert oneb(["data", "show", str(tmp_path / "none.npy")]) == 2
    assert "none.npy cannot be read" in capsys.readouterr().err
    np.save(tmp_path / "wild.npy", np.array([3, -1, 2], np.int64))
    assert oneb(["data", "show", str(tmp_path / "wild.npy")]) == 2
    assert "are no token ids" in capsys.readouterr().err


def test_verify(made, capsys):
    capsys.readouterr()
    assert prepare(["--verify", str(made)]) == 0
    printed = capsys.readouterr().out
    assert "1990 tokens of" in printed
    assert "from token 0: 'file 0 <|endoftext|>file 1 abc" in printed


def test_reading_a_long_file_shows_progress(made, capsys, monkeypatch):
    monkeypatch.setattr(progress_line, "_LINE_SECONDS", 0.0)
    monkeypatch.setattr(verify, "_CHUNK_TOKENS", 500)
    for command in (lambda: prepare(["--verify", str(made)]), lambda: oneb(["data", "show", str(made)])):
        capsys.readouterr()
        assert command() == 0
        lines = capsys.readouterr().err.splitlines()
        assert [line.split("  ")[:2] for line in lines] == [
            [" 25%", "read"], [" 50%", "read"], [" 75%", "read"], ["100%", "read"]]


def test_verify_decodes_by_no_other_tokenizer(made, gpt2_cache, capsys):
    assert prepare(["--verify", str(made), "--tokenizer", "bytes"]) == 0
    assert "from token 0: 'file 0" in capsys.readouterr().out
    assert prepare(["--verify", str(made), "--tokenizer", "gpt2"]) == 2
    assert "the file is right, but gpt2 is not the tokenizer that made it" in capsys.readouterr().err
    assert prepare(["--verify", str(made), "--tokenizer", "none.json"]) == 2
    assert "none.json cannot be read" in capsys.readouterr().err


def test_verify_is_interrupted_while_it_hashes(made, monkeypatch):
    """Whatever the hash would say: and it does not read on to the end."""
    change(made.with_name("x.npy.meta"), "sha256: ", "sha256: 0")
    cancelled = threading.Event()

    def hash_for_ever(path: Path, stopped: Callable[[], bool]) -> str:
        while not stopped():
            time.sleep(0.01)
        cancelled.set()
        return ""

    def interrupt(fraction: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "sha256_file", hash_for_ever)
    with pytest.raises(KeyboardInterrupt):
        verify.verify(made, interrupt)
    assert cancelled.is_set()


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("damage", ["token", "cut", "documents", "max_id", "index", "short index", "none"])
def test_verify_finds_what_is_wrong(made, capsys, damage):
    index, meta = made.with_name("x.npy.idx.npy"), made.with_name("x.npy.meta")
    if damage == "token":
        content = bytearray(made.read_bytes())
        content[1000] ^= 1
        made.write_bytes(content)
    elif damage == "cut":
        made.write_bytes(made.read_bytes()[:-10])
    elif damage == "documents":
        line = next(line for line in meta.read_text().splitlines() if line.startswith("documents"))
        change(meta, line, "documents: 3")
    elif damage == "max_id":
        change(meta, "max_id: 256", "max_id: 255")
    elif damage == "index":
        offsets = np.load(index)
        offsets[4] += 1
        np.save(index, offsets)
    elif damage == "short index":
        np.save(index, np.load(index)[:-1])
    else:
        meta.unlink()
    expected = {"token": "does not have the SHA-256", "cut": "does not have the SHA-256", "none": "has no sidecar",
                "documents": "says documents: 3", "max_id": "says max_id: 255", "index": "first at document 4",
                "short index": "first at its length"}[damage]
    assert prepare(["--verify", str(made)]) == 2
    assert expected in capsys.readouterr().err


def test_verify_without_an_index_is_fine(made):
    shutil.move(f"{made}.idx.npy", f"{made}.elsewhere")
    assert prepare(["--verify", str(made)]) == 0


def rewrite(made: Path, **changes: str | None) -> None:
    """Change lines of the sidecar; None removes one."""
    meta = Path(f"{made}.meta")
    facts = dict(line.split(": ", 1) for line in meta.read_text().splitlines()) | changes
    meta.write_text("".join(f"{name}: {value}\n" for name, value in facts.items() if value is not None))


def test_what_does_not_belong_together_is_shown_with_a_warning(made, capsys):
    rewrite(made, tokens="1000")
    assert oneb(["data", "show", str(made)]) == 0
    assert "x.npy.meta says 1000 tokens: it is of another file" in capsys.readouterr().out
    rewrite(made, tokens="1990", tokenizer_sha256="0" * 64)
    assert oneb(["data", "show", str(made)]) == 0
    printed = capsys.readouterr().out
    assert "bytes is not the tokenizer that made this file" in printed
    assert "--- tokens" not in printed
    rewrite(made, encoding="own.json", tokenizer_sha256=None)
    assert oneb(["data", "show", str(made)]) == 0
    printed = capsys.readouterr().out
    assert "give its tokenizer.json with --tokenizer" in printed
    assert "documents: " in printed


def test_ids_beyond_a_tokenizer_are_not_decoded(tmp_path, capsys):
    np.save(tmp_path / "y.npy", np.array([1, 300, 2], np.uint16))
    assert oneb(["data", "show", str(tmp_path / "y.npy"), "--tokenizer", "bytes"]) == 0
    assert "bytes is not the tokenizer that made this file" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--samples", "-1"], ["--length", "0"], ["--seed", "-1"]])
def test_samples_that_cannot_be(made, capsys, words):
    assert oneb(["data", "show", str(made), *words]) == 2
    assert "wanted at least 0, 1 and 0" in capsys.readouterr().err


def test_verify_says_what_it_could_not_compare(made, capsys):
    rewrite(made, sha256=None)
    assert prepare(["--verify", str(made)]) == 0
    assert "does not say sha256, so that was not compared" in capsys.readouterr().err
    rewrite(made, encoding="own.json")
    assert prepare(["--verify", str(made)]) == 0
    assert "no samples: the tokenizer is said to be 'own.json', which is none" in capsys.readouterr().out
    Path(f"{made}.meta").write_text("")
    assert prepare(["--verify", str(made)]) == 2
    assert "says nothing that could be compared" in capsys.readouterr().err
    assert prepare(["--verify", str(made.with_name("nothere.npy"))]) == 2
    assert "there is no such file" in capsys.readouterr().err
