"""What fails under preparing data, or is not needed after all: said in words, and what is done is kept."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_data_prepare_faults import WORKERS, in_bytes, prepared

from oneb.cli.prepare import main
from oneb.data.assemble import Arrivals, Progress
from oneb.data.parts import Target
from oneb.data.prepare import prepare
from oneb.data.sources import Skipped, local_inputs
from oneb.data.tokenizer import BytesTokenizer
from oneb.errors import OnebError

# -- A full disk -----------------------------------------------------------------------------------

@pytest.fixture
def tiny_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this process may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_full_disk_is_said_and_room_lets_it_continue(tiny_disk, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("oneb.data.units.UNIT_BYTES", 50_000)
    chance = random.Random(2)
    texts = [chance.randbytes(500).hex() for _ in range(700)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ballast = tiny_disk / "ballast"
    ballast.write_bytes(b"\1" * (3 * 2**20))
    with pytest.raises(OnebError, match="is full. Make room and run the same command again: it continues"):
        prepared(tiny_disk, tmp_path / "a.jsonl", workers=workers)
    assert not (tiny_disk / "x.npy").exists()
    ballast.unlink()
    done, ids = prepared(tiny_disk, tmp_path / "a.jsonl", workers=workers)
    assert ids == in_bytes(*texts)
    assert done.sidecar.sha256 is not None


def test_too_small_a_disk_is_said_first(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    with pytest.raises(OnebError, match="600000 tokens take 1.1 MiB, the disk has 976.6 KiB free"):
        prepare(local_inputs([str(tmp_path / "a.txt")]), BytesTokenizer(), tmp_path / "x.npy", source="test",
                n_tokens=600_000)


# -- Files that fail -------------------------------------------------------------------------------

@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("kind", ["gone", "packed", "remote"])
def test_a_file_that_cannot_be_opened_is_no_mistake_if_it_is_not_needed(tmp_path, workers, kind):
    """The same for any number of processes; and what comes before it is kept."""
    (tmp_path / "a.txt").write_text("a" * 99)
    (tmp_path / "b.jsonl.gz").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b"b")
    inputs = local_inputs([str(tmp_path / "a.txt"), str(tmp_path / ("b.jsonl.gz" if kind == "packed" else "b.txt"))])
    Path(inputs[1].name).unlink()
    if kind == "remote":
        def refuse(progress) -> Path:
            raise OnebError(f"{inputs[1].name}: No such file or directory on the Hub")

        inputs[1] = replace(inputs[1], open=refuse)
    output = tmp_path / "x.npy"

    def ids(n_tokens: int) -> list[int]:
        prepare(inputs, BytesTokenizer(), output, source="test", n_tokens=n_tokens, n_workers=workers, force=True)
        return np.load(output).tolist()

    assert ids(100) == in_bytes("a" * 99)
    with pytest.raises(OnebError, match=r"b\..*No such file or directory"):
        ids(101)
    assert json.loads((tmp_path / "x.npy.parts" / "state.json").read_text())["tokens"] == 100


@pytest.mark.parametrize("workers", WORKERS)
def test_an_input_that_is_deleted_before_it_is_hashed(tmp_path, workers):
    path = tmp_path / "a.txt"
    path.write_text("abc")
    with pytest.raises(OnebError, match="a.txt cannot be read: No such file"):
        prepare(local_inputs([str(path)]), BytesTokenizer(), tmp_path / "x.npy", source="test", n_workers=workers,
                progress=lambda progress: path.unlink(missing_ok=True) if progress.tokens else None)


@pytest.mark.parametrize("workers", WORKERS)
def test_an_input_that_changes_before_it_is_hashed(tmp_path, workers):
    """Its hash would not be of what was encoded."""
    path, output = tmp_path / "a.txt", tmp_path / "x.npy"
    path.write_text("abc")

    def change(progress: Progress) -> None:
        if progress.tokens:
            path.write_text("abcd")

    with pytest.raises(OnebError, match="a.txt changed while it was read.* it starts over"):
        prepare(local_inputs([str(path)]), BytesTokenizer(), output, source="test", n_workers=workers, progress=change)
    assert not output.exists()
    prepare(local_inputs([str(path)]), BytesTokenizer(), output, source="test", n_workers=workers)
    assert np.load(output).tolist() == in_bytes("abcd")


@pytest.mark.parametrize("workers", WORKERS)
def test_a_disk_that_fails_while_it_is_written_is_named(tmp_path, monkeypatch, workers):
    def fail(*arguments) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("oneb.data.workers._n_threads", lambda: 1)  # forks have the patch, too
    monkeypatch.setattr(os, "pwrite", fail)
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(OnebError, match="x.npy.parts: Input/output error.*run the same command again"):
        prepared(tmp_path, tmp_path / "a.txt", workers=workers)


def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("abc")
    if os.geteuid():
        tmp_path.chmod(0o500)
    else:  # who may write everywhere is told so by the system
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(OnebError, match="x.npy: this user may not write to .*; choose another folder"):
        prepared(tmp_path, tmp_path / "a.txt")
    tmp_path.chmod(0o700)


def test_an_input_that_changes_while_it_is_read(tmp_path, monkeypatch):
    """Here: a unit is counted, its worker dies, and what is then written of it is less."""
    write = Target.write
    monkeypatch.setattr(Target, "write", lambda self, part, place: write(
        self, replace(part, ids=part.ids[:-5], ends=part.ends[:-1]), place))
    (tmp_path / "a.txt").write_text("abcdefghi")
    with pytest.raises(OnebError, match="a.txt changed while it was read"):
        prepared(tmp_path, tmp_path / "a.txt")


def test_a_file_of_somebody_else_is_no_note_of_damage(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n')
    (tmp_path / "a.damage").write_bytes(b"my notes \xff")
    done, ids = prepared(tmp_path, tmp_path / "a.jsonl")
    assert ids == in_bytes("abc")
    assert done.skipped == Skipped()


def test_a_file_that_arrives_at_the_last_moment_is_there(tmp_path):
    """Between the end of the wait and a second look."""
    class Late(Future):
        def result(self, timeout=None):
            if timeout is not None:
                self.set_result(tmp_path)
                raise TimeoutError
            return super().result()

    arrivals = Arrivals([])
    arrivals._futures[0] = Late()
    assert arrivals.get(0, 0.1) == tmp_path


def test_progress_through_a_packed_file_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("oneb.data.units.UNIT_BYTES", 20_000)
    monkeypatch.setattr("oneb.data.units._SEARCH_BYTES", 2000)
    texts = [random.Random(number).randbytes(20).hex() for number in range(5000)]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    seen: list[float] = []

    def run(stop: float) -> None:
        def progress(done: Progress) -> None:
            seen.append(done.fraction)
            if done.fraction > stop:
                raise ZeroDivisionError

        prepare(local_inputs([str(tmp_path / "a.jsonl.gz")]), BytesTokenizer(), tmp_path / "x.npy", source="test",
                progress=progress)

    with pytest.raises(ZeroDivisionError):
        run(0.5)
    stopped = len(seen)
    run(2.0)
    assert seen[stopped] >= seen[stopped - 1] - 0.1
    assert max(seen) <= 1.0 + 1e-9
    assert np.load(tmp_path / "x.npy").tolist() == in_bytes(*texts)


def test_a_gigatoken_that_fails_when_it_encodes_is_done_without(gpt2_cache, tmp_path, monkeypatch, capsys):
    class Panic(BaseException):
        """As Rust's reach Python."""

    class Broken:
        @staticmethod
        def from_tiktoken(*arguments) -> Broken:
            return Broken()

        def encode(self, document: bytes) -> list[int]:
            raise Panic("called `Option::unwrap()`")

    monkeypatch.setattr("gigatoken.gigatoken_rs.BPETokenizer", Broken)
    (tmp_path / "a.txt").write_text("Hello world")
    assert main(["--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "x.npy")]) == 0
    assert "gigatoken does not work here (called `Option::unwrap()`)" in capsys.readouterr().err
    assert np.load(tmp_path / "x.npy").tolist() == [15496, 995, 50256]
