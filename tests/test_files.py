"""Files are whole or absent, and a torn log still reads."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneb.files import atomic_writer, read_json_lines, sha256_file, write_json, write_text


class Interruption(BaseException):
    """Stands for KeyboardInterrupt and SystemExit too."""


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, Interruption])
@pytest.mark.parametrize("before", [None, "old"])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, error, before):
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_text(before)

    def write_half():
        with atomic_writer(path, "w") as file:
            file.write("new, but only half of i")
            raise error

    with pytest.raises(error):
        write_half()
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else ["file.txt"])
    assert before is None or path.read_text() == before


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with atomic_writer(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    program = (
        "import sys, time\nfrom oneb.files import atomic_writer\n"
        "with atomic_writer(sys.argv[1]) as file:\n"
        "    file.write(bytes(1 << 20)); file.flush(); print('half', flush=True); time.sleep(60)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "half\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert path.read_bytes() == b"old"


def test_readers_never_see_a_partial_file(tmp_path):
    """A process rewrites a file of equal bytes over and over; every read finds one whole version."""
    path = tmp_path / "file.txt"
    program = (
        "import itertools, sys\nfrom oneb.files import write_text\n"
        "for n in itertools.count():\n    write_text(sys.argv[1], str(n % 10) * 50_000)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)])
    try:
        while not path.exists():
            assert writer.poll() is None
            time.sleep(0.01)
        seen = [path.read_text() for _ in range(200)]
    finally:
        writer.kill()
        writer.wait()
    assert all(len(text) == 50_000 and len(set(text)) == 1 for text in seen)


def test_text_and_json_round_trip(tmp_path):
    write_text(tmp_path / "a", "naïve ≈ ✓\n")
    assert (tmp_path / "a").read_bytes() == "naïve ≈ ✓\n".encode()
    value = {"name": "≈", "list": [1, 2.5, None, True], "nested": {"a": "b"}}
    write_json(tmp_path / "b", value)
    assert json.loads((tmp_path / "b").read_text()) == value


@pytest.mark.parametrize("size", [0, 1, 8 * 2**20, 8 * 2**20 + 1])
def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path, size):
    data = os.urandom(1024) * (size // 1024) + b"x" * (size % 1024)
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()


ROWS = st.lists(st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=20) | st.none(), max_size=3),
                max_size=5)


@given(rows=ROWS, cut=st.integers(0, 10_000))
def test_a_log_cut_anywhere_reads_as_its_whole_lines(tmp_path_factory, rows, cut):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    cut = min(cut, len(data))
    path = tmp_path_factory.mktemp("log") / "train.jsonl"
    path.write_bytes(data[:cut])
    whole = data[:cut].count(b"\n")
    read = read_json_lines(path)
    # A last line that lacks only its newline is whole too.
    assert read in (rows[:whole], rows[:whole + 1])
    assert len(read) == whole or data[:cut].endswith(b"}")


def test_damage_in_the_middle_of_a_log_is_named(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"a": 1}\n{"b": \n{"c": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_json_lines(path)
