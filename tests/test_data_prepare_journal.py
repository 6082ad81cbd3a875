"""The journal of preparing data vouches for what is on the disk, and for nothing else."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oneb.data import units
from oneb.data.assemble import Commits
from oneb.data.journal import FileState, Journal
from oneb.data.parts import Counts, Placed
from oneb.data.prepare import prepare
from oneb.data.sources import Skipped, local_inputs
from oneb.data.tokenizer import BytesTokenizer
from oneb.errors import OnebError


@pytest.fixture
def inputs(tmp_path, monkeypatch) -> Path:
    """Some units, and each is committed at once."""
    monkeypatch.setattr(units, "UNIT_BYTES", 700)
    monkeypatch.setattr(Commits, "offer", lambda self: (self.begin(), self.wait()))
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": f"text number {number}"}) + "\n" for number in range(150)))
    return path


def run(inputs: Path, folder: Path) -> None:
    prepare(local_inputs([str(inputs)]), BytesTokenizer(), folder / "x.npy", source="test", n_tokens=2500)


def test_a_state_is_written_once_what_it_speaks_of_is_on_the_disk(inputs, tmp_path, monkeypatch):
    folder = tmp_path.resolve() / "x.npy.parts"
    pending, states = {"tokens": True, "ends": True}, 0
    fsync, pwrite, rename = os.fsync, os.pwrite, os.replace

    def name(descriptor: int) -> str:
        return Path(f"/proc/self/fd/{descriptor}").resolve().name

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        pending[name(descriptor)] = False

    def written(descriptor: int, data: bytes, position: int) -> int:
        pending[name(descriptor)] = True
        return pwrite(descriptor, data, position)

    def renamed(source: Path, target: Path) -> None:
        nonlocal states
        if Path(target).resolve() == folder / "state.json" and json.loads(Path(source).read_text())["tokens"]:
            assert not pending["tokens"]
            assert not pending["ends"]
            states += 1
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "pwrite", written)
    monkeypatch.setattr(os, "replace", renamed)
    run(inputs, tmp_path)
    assert states > 2


def test_after_a_failed_commit_nothing_more_is_vouched_for(inputs, tmp_path, monkeypatch):
    """The system reports bytes that it lost once; the next fsync succeeds."""
    state, fsync, left, before = tmp_path / "x.npy.parts" / "state.json", os.fsync, 3, ""

    def failing(descriptor: int) -> None:
        nonlocal left, before
        if Path(f"/proc/self/fd/{descriptor}").resolve().name == "tokens":
            left -= 1
            if left == 0:
                before = state.read_text()
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OnebError, match="x.npy.parts: Input/output error.*run the same command again"):
        run(inputs, tmp_path)
    assert state.read_text() == before
    assert json.loads(before)["tokens"] > 0
    run(inputs, tmp_path)
    (tmp_path / "other").mkdir()
    run(inputs, tmp_path / "other")
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "other" / "x.npy").read_bytes()


def interrupted_at(line: int, function: Callable[..., None], *arguments: Any, **options: Any) -> bool:
    """Call it with a KeyboardInterrupt before so many of its lines have run; False if it has fewer."""
    left = line

    def interrupt(frame, event, argument):
        nonlocal left
        if event == "line" and frame.f_code is function.__code__:
            left -= 1
            if not left:
                raise KeyboardInterrupt
        return interrupt

    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            function(*arguments, **options)
    finally:
        sys.settrace(before)
    return left <= 0


def test_an_interrupt_finds_all_of_a_unit_in_the_state_or_nothing(tmp_path):
    """At any line of ``append``; and what was to be committed stays what it was."""
    placed, counts = Placed(5, 1, 7, True), Counts(5, 1, 9, Skipped(empty=1, examples=["a"]))
    once = {"file": 0, "unit": 1, "tokens": 5, "documents": 1, "text_bytes": 9, "max_id": 7, "ended": True,
            "skipped": asdict(Skipped(empty=1, examples=["a"])), "files": [asdict(FileState(5, 1))]}
    twice = {"file": 1, "unit": 0, "tokens": 10, "documents": 2, "text_bytes": 18, "max_id": 7, "ended": True,
             "skipped": asdict(Skipped(empty=2, examples=["a", "a"])), "files": [asdict(FileState(10, 2))]}
    seen = []
    for line in count(1):
        journal = Journal(tmp_path / f"{line}.npy", np.dtype("<u2"), {}, lambda message: None)
        with contextlib.closing(journal):
            journal.begin(None)
            journal.append(counts, placed, 0, 0, last=False)
            before = journal.snapshot()
            interrupted = interrupted_at(line, Journal.append, journal, counts, placed, 0, 1, last=True)
            assert before == once
            seen.append(journal.snapshot())
        if not interrupted:
            break
    assert seen[0] == once
    assert seen[-1] == twice
    assert all(state in (once, twice) for state in seen)


def test_an_output_that_another_process_finished_meanwhile_is_not_replaced(inputs, tmp_path, monkeypatch):
    def late(output: Path, *arguments: Any) -> Journal:
        output.write_bytes(b"of another process")
        return Journal(output, *arguments)

    monkeypatch.setattr("oneb.data.prepare.Journal", late)
    with pytest.raises(OnebError, match="exists already"):
        run(inputs, tmp_path)
    assert (tmp_path / "x.npy").read_bytes() == b"of another process"
    assert not (tmp_path / "x.npy.parts").exists()


def test_a_folder_is_no_output(inputs, tmp_path):
    (tmp_path / "x.npy").mkdir()
    with pytest.raises(OnebError, match=r"x\.npy is a folder; wanted a file"):
        prepare(local_inputs([str(inputs)]), BytesTokenizer(), tmp_path / "x.npy", source="test", force=True)
