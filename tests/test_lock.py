"""One process a run directory: real processes that hold it, are killed, paused and forked; full disks, odd locks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from lock_helpers import *  # noqa: F403
from lock_helpers import FAR, PATIENT, QUICK, REPOSITORY, beats_on, body
from small_disk import fill, make_read_only

from oneb.checkpoints.lock import NAME, STALE_S, LockedError, Machine, RunLock, _Holder, check_unlocked
from oneb.cli.options import config_to_args
from oneb.errors import OnebError
from oneb.presets import resolve
from oneb.train.run import train

# ---- on one machine

def test_of_several_at_once_one_has_the_directory(tmp_path, start):
    for number in range(3):
        directory = tmp_path / str(number)
        directory.mkdir()
        processes = [start(directory) for _ in range(4)]
        began = [process.began() for process in processes]
        assert [is_held for is_held, _, _ in began].count(True) == 1
        holder = next(process for process, (is_held, _, _) in zip(processes, began, strict=True) if is_held)
        for process, (is_held, seconds, text) in zip(processes, began, strict=True):
            if not is_held:
                assert f"another process is training in {directory}" in text
                assert "--tag" in text
                assert seconds < STALE_S / 2
                assert process.notes == []
        assert body(directory)["pid"] == holder.pid
        with pytest.raises(LockedError, match=f"process {holder.pid}, since 20"):
            check_unlocked(directory)
        holder.release()
        check_unlocked(directory)


@pytest.mark.parametrize("how", ["SIGKILL", "os._exit", "release"])
def test_the_next_one_starts_at_once_however_the_last_one_ended(tmp_path, start, how):
    """With the real intervals: nobody waits for a minute here."""
    inodes = set()
    for _ in range(6):
        process = start(tmp_path)
        is_held, seconds, text = process.began()
        assert is_held, text
        assert seconds < STALE_S / 2
        assert process.notes == []
        assert body(tmp_path)["pid"] == process.pid
        inodes.add((tmp_path / NAME).stat().st_ino)
        if how == "SIGKILL":
            process.kill()
        elif how == "release":
            process.release()
            assert (tmp_path / NAME).read_bytes() == b""
        else:
            process.tell("leave")
            process.process.wait()
    assert len(inodes) == 1  # the file itself is never replaced


def test_a_paused_process_has_the_directory_still(tmp_path, start):
    holder = start(tmp_path, beat_s=0.1, stale_s=0.5)
    assert holder.began()[0]
    holder.pause()
    time.sleep(1.0)
    assert not start(tmp_path, beat_s=0.1, stale_s=0.5).began()[0]
    os.kill(holder.pid, signal.SIGCONT)
    assert holder.ask("check") == "mine None"


def test_a_forked_child_does_not_keep_the_lock(tmp_path, start):
    holder = start(tmp_path)
    assert holder.began()[0]
    assert holder.ask("fork") == "forked"
    assert holder.ask("check") == "mine None"
    assert not start(tmp_path).began()[0]  # nor does the child's end of it give it up
    holder.kill()
    after = start(tmp_path)
    is_held, seconds, text = after.began()
    assert is_held, text
    assert seconds < STALE_S / 2
    assert after.notes == []


def test_a_deleted_lock_is_made_again(tmp_path, start):
    holder = start(tmp_path, **QUICK)
    assert holder.began()[0]
    for _ in range(2):
        (tmp_path / NAME).unlink()
        assert body(tmp_path)["pid"] == holder.pid
        assert not start(tmp_path).began()[0]
        assert holder.ask("check") == "mine None"


def test_who_deletes_the_lock_and_starts_another_run_stops_the_first(tmp_path, start):
    holder = start(tmp_path, beat_s=600.0)  # it will not make it again in time
    assert holder.began()[0]
    (tmp_path / NAME).unlink()
    other = start(tmp_path)
    assert other.began()[0]
    assert f"taken over by process {other.pid}" in holder.ask("check")
    holder.release()
    assert body(tmp_path)["pid"] == other.pid
    assert other.ask("check") == "mine None"


def test_a_directory_that_is_moved_or_removed_is_no_crash(tmp_path, start):
    (tmp_path / "run").mkdir()
    holder = start(tmp_path / "run", **QUICK)
    assert holder.began()[0]
    (tmp_path / "run").rename(tmp_path / "other")
    time.sleep(0.5)
    assert holder.ask("check") == "mine None"
    (tmp_path / "other").rename(tmp_path / "run")
    assert beats_on(tmp_path / "run", body(tmp_path / "run")["beats"])
    (tmp_path / "run").rename(tmp_path / "other")  # else a beat may come while it is half removed
    shutil.rmtree(tmp_path / "other")
    time.sleep(0.5)
    holder.release()
    assert not (tmp_path / "run").exists()


# ---- disks, and what may be in the file

def test_beats_go_on_when_the_disk_is_full(disk, start):
    directory = disk(2**20)
    holder = start(directory, machine=FAR, flock="elsewhere", **QUICK)
    assert holder.began()[0]
    fill(directory)
    before = body(directory)["beats"]
    assert not start(directory, **PATIENT).began()[0]
    assert body(directory)["beats"] > before
    holder.release()
    assert start(directory, **QUICK).began()[0]


def test_a_lock_that_cannot_be_written_is_no_traceback(disk):
    directory = disk(2**20)
    make_read_only(directory)
    with pytest.raises(OnebError, match=r"\.lock cannot be written \(Read-only file system\).*--run-root"):
        RunLock(directory).acquire()


def test_a_disk_without_an_inode_is_no_traceback(disk):
    directory = disk(2**20, nr_inodes=2)
    (directory / "file").touch()
    with pytest.raises(OnebError, match=r"\.lock cannot be written \(No space left on device\)"):
        RunLock(directory).acquire()


def test_a_lock_of_somebody_else_is_refused_before_the_run_starts(tmp_path):
    (tmp_path / NAME).mkdir()
    for ask in (check_unlocked, lambda path: RunLock(path).acquire()):
        with pytest.raises(OnebError, match=r"\.lock cannot be written \(Is a directory\)"):
            ask(tmp_path)


@given(st.binary(max_size=600) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.integers(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["host", "boot", "pid", "id", "started"]), inner),
).map(lambda value: json.dumps(value).encode()))
@example(b"[" * 4096)
@example(b'{"host": "\\u001b[2J\\n", "boot": "", "pid": 1e400, "id": "", "started": ""}')
@example(b'{"host": "\\u001b]0;x\\u0007\\n", "boot": "", "pid": 7, "id": "", "started": "\\u202e"}')
def test_nothing_that_the_file_may_hold_does_harm(content):
    holder = _Holder.parse(content)
    if holder:
        described = holder.described(Machine("here", "boot"))
        assert described.isprintable()
        assert len(described) < 5000


@pytest.mark.parametrize("content", [b"not json", b"[" * 4096, b'{"pid": 1}', b"\0" * 512])
def test_what_makes_no_sense_is_watched_as_another_machine_is(tmp_path, capsys, content):
    (tmp_path / NAME).write_bytes(content)
    began = time.monotonic()
    with RunLock(tmp_path, beat_s=0.1, stale_s=0.5):
        assert time.monotonic() - began >= 0.5
        assert body(tmp_path)["pid"] == os.getpid()
    assert "a process that cannot be told" in capsys.readouterr().out


def test_an_error_gives_the_directory_back(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
        1 / 0  # noqa: B018
    with RunLock(tmp_path) as lock:
        lock.check()
        with pytest.raises(LockedError, match="another process"):
            RunLock(tmp_path).acquire()
        lock.check()


# ---- whole runs

def test_two_runs_at_once(tmp_path):
    """The same line, pasted twice: the second says who trains there, and the first does not notice."""
    config = resolve({"size": "nano", "n_layers": 2, "path": "demo", "device": "cpu", "live": "off", "steps": 10**6,
                      "root": str(tmp_path), "if_exists": "resume"})
    command = [sys.executable, "-m", "oneb.train", *(word for line in config_to_args(config) for word in line)]
    first = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    try:
        directory = tmp_path / config.name
        deadline = time.monotonic() + 300
        while not (directory / "train.jsonl").exists():
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(OnebError) as caught:
            train(config)
        assert f"another process is training in {directory} (process {first.pid}, since" in str(caught.value)
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()


def test_a_lock_that_was_given_back_leaves_later_children_alone(tmp_path):
    """What a forked child closes must be the lock's own: the numbers of its descriptors belong to others by then."""
    lock = RunLock(tmp_path)
    with lock:
        pass
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", "print('there')"], capture_output=True, text=True,
                              preexec_fn=lambda: None)
        assert done.stdout == "there\n", done.stderr
