"""Checkpoints that nobody has saved: pickles that run code, archives that unpack to more, bytes flipped at random.

Every file here has a sidecar that is right, with its size and its SHA-256: what is tested is what comes after these.
"""

import contextlib
import io
import os
import pickle
import random
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hostile_helpers import *  # noqa: F403
from hostile_helpers import STEPS, configuration, publish, saved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from second_process import python

from oneb.checkpoints.checkpoint import load_checkpoint
from oneb.checkpoints.rundir import CheckpointError, sidecar_path
from oneb.errors import OnebError
from oneb.train.run import train


def archive(original: bytes, change, compress: int = zipfile.ZIP_STORED) -> bytes:
    """A checkpoint's archive packed anew, each entry being ``change(name, data)``; None leaves it out."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(original)) as old, zipfile.ZipFile(file, "w", compress) as new:
        for entry in old.infolist():
            if (data := change(entry.filename, old.read(entry))) is not None:
                new.writestr(entry.filename, data)
    return file.getvalue()


def with_pickle(original: bytes, data: bytes, compress: int = zipfile.ZIP_STORED) -> bytes:
    return archive(original, lambda name, old: data if name.endswith("/data.pkl") else old, compress)


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


# ---- pickles

PICKLES = {
    "os.system": lambda mark: Call(os.system, f"touch {mark}"),
    "eval": lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"),
    "exec": lambda mark: Call(exec, f"open({str(mark)!r}, 'w')"),
    "open": lambda mark: Call(open, str(mark), "w"),
    "popen": lambda mark: Call(os.popen, f"touch {mark}"),
    "torch.load": lambda mark: Call(torch.load, str(mark)),
    "makedirs": lambda mark: Call(os.makedirs, str(mark)),
    "getattr": lambda mark: Call(getattr, Call(__import__, "os"), "system"),
    "bytearray": lambda mark: Call(bytearray, 2**40),
    "storage": lambda mark: Call(torch.UntypedStorage, 2**45),
}


@pytest.mark.parametrize("place", ["instead", "field", "key"])
@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_runs_no_code(made, directory, tmp_path, kind, place):
    mark = tmp_path / "ran"
    call = PICKLES[kind](mark)
    value = {"instead": call, "field": {"format": 1, "step": call}, "key": {"format": 1, "model": OrderedDict(w=call)}}
    path = directory / "last.pt"
    publish(path, with_pickle(saved(made[1]), pickle.dumps(value[place], protocol=2)))
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        load_checkpoint(path)
    with pytest.raises(OnebError):
        train(configuration(tmp_path))
    assert not mark.exists()
    # And the file is what it is taken for: read without care, it does run.
    if kind in ("eval", "exec", "open", "makedirs", "os.system") and place == "instead":
        pickle.loads(pickle.dumps(value[place], protocol=2))
        assert mark.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_of_any_protocol_is_no_checkpoint(directory, tmp_path, protocol):
    mark = tmp_path / "ran"
    path = publish(directory / "last.pt", pickle.dumps({"step": Call(os.mkdir, str(mark))}, protocol))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not mark.exists()


def test_what_torch_itself_would_load_of_a_plain_script_module_is_refused(directory):
    """A TorchScript archive is code."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    with pytest.raises(CheckpointError):
        load_checkpoint(publish(directory / "last.pt", file.getvalue()))


# ---- archives

def loaded_with_little_memory(paths: list[Path], mebibytes: int) -> list[str]:
    """What loading each of them raises in a process that may take so much more memory than it has."""
    code = f"""
import resource
from pathlib import Path
from oneb.checkpoints.checkpoint import load_checkpoint
taken = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + {mebibytes} * 2**20,) * 2)
for path in {[str(path) for path in paths]}:
    try:
        load_checkpoint(Path(path))
    except Exception as error:
        print(type(error).__name__, str(error))
"""
    return python("-c", code).splitlines()


def test_a_zip_bomb_is_not_unpacked(made, directory):
    """64 MiB of nothing in 64 KiB, read by a process without that much memory."""
    original, nothing = saved(made[1]), bytes(2**26)
    file = io.BytesIO(original)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as appended:
        appended.writestr("archive/more", nothing)

    def tensor(name, old):
        return nothing if name.endswith("/data/0") else old

    bombs = [with_pickle(original, b"\x80\x02" + nothing, zipfile.ZIP_DEFLATED),
             archive(original, tensor, zipfile.ZIP_DEFLATED), file.getvalue()]
    paths = []
    for number, data in enumerate(bombs):
        assert len(data) < 2**22
        path = shutil.copy(directory / "last.pt", directory / f"{number}.pt")
        shutil.copy(sidecar_path(directory / "last.pt"), sidecar_path(path))
        paths.append(publish(path, data))
    said = loaded_with_little_memory(paths, 48)
    assert len(said) == len(bombs)
    for line in said:
        assert line.startswith("CheckpointError")
        assert "it is compressed" in line


def test_parts_that_are_more_than_the_whole_are_refused(made, directory):
    """Fifty entries that are the same bytes."""
    file = io.BytesIO(saved(made[1]))
    with zipfile.ZipFile(file, "a") as overlapping:
        largest = max(overlapping.infolist(), key=lambda entry: entry.file_size)
        for number in range(50):
            again = zipfile.ZipInfo(f"archive/data/9{number}")
            again.header_offset, again.CRC = largest.header_offset, largest.CRC
            again.file_size = again.compress_size = largest.file_size
            overlapping.filelist.append(again)
        overlapping._didModify = True
    with pytest.raises(CheckpointError, match="larger than the whole"):
        load_checkpoint(publish(directory / "last.pt", file.getvalue()))


def appended(data: bytes, *, comment: bytes = b"", **entries: bytes) -> bytes:
    file = io.BytesIO(data)
    with zipfile.ZipFile(file, "a") as more:
        more.comment = comment
        for name, entry in entries.items():
            more.writestr(name.replace("__", "/"), entry)
    return file.getvalue()


ARCHIVES = {
    "prefix": lambda data: b"#!/bin/sh\n" + data,
    "suffix": lambda data: data + b"more",
    "comment": lambda data: appended(data, comment=b"PK\5\6" * 10),
    "two pickles": lambda data: appended(data, **{"other__data.pkl": b"\x80\x02}."}),
    "no pickle": lambda data: archive(data, lambda name, old: None if name.endswith(".pkl") else old),
    "no weights": lambda data: archive(data, lambda name, old: None if "/data/" in name else old),
    "short weights": lambda data: archive(data, lambda name, old: old[:5] if "/data/" in name else old),
    "cut": lambda data: data[:-1000],
    "empty": lambda data: b"",
    "not zip": lambda data: b"PK\3\4" + data[99:5000],
    "text": lambda data: b"a checkpoint",
}


def test_what_these_archives_are_made_from_is_whole(made, directory):
    data = archive(saved(made[1]), lambda name, old: old)
    assert load_checkpoint(publish(directory / "last.pt", data))["step"] == STEPS


@pytest.mark.parametrize("damage", ARCHIVES)
def test_other_archives_are_refused(made, directory, damage):
    path = publish(directory / "last.pt", ARCHIVES[damage](saved(made[1])))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


# ---- at random

@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_flipped_bytes_with_a_right_sidecar_are_an_error_or_a_checkpoint(made, directory, data):
    """In the pickle and the archive's own bytes; among the weights any bytes are weights."""
    path = directory / "last.pt"
    contents = bytearray((made[0] / "last.pt").read_bytes())
    with zipfile.ZipFile(io.BytesIO(contents)) as whole:
        entry = next(entry for entry in whole.infolist() if entry.filename.endswith("data.pkl"))
        ranges = [(entry.header_offset, entry.header_offset + entry.file_size + 100), (whole.start_dir, len(contents))]
    for _ in range(data.draw(st.integers(1, 8))):
        start, end = data.draw(st.sampled_from(ranges))
        contents[data.draw(st.integers(start, end - 1))] = data.draw(st.integers(0, 255))
    publish(path, bytes(contents))
    with contextlib.suppress(CheckpointError):
        assert load_checkpoint(path)["step"] == STEPS


@pytest.mark.slow
def test_many_random_archives(made, directory):
    """Thousands of damaged files, in one process whose memory is limited."""
    chance = random.Random(11)
    original = (made[0] / "last.pt").read_bytes()
    for _ in range(5000):
        contents = bytearray(original)
        for _ in range(chance.choice((1, 2, 50))):
            contents[chance.choice((chance.randrange(4096), chance.randrange(len(contents)),
                                    len(contents) - 1 - chance.randrange(8192)))] = chance.randrange(256)
        if chance.random() < 0.3:
            del contents[chance.randrange(len(contents)):]
        path = publish(directory / "last.pt", bytes(contents))
        with contextlib.suppress(CheckpointError):
            load_checkpoint(path)
