"""One process a run directory: real processes that hold it, are killed, paused, forked, and told a wrong time."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from small_disk import fill, make_read_only

from oneb.cli.options import config_to_args
from oneb.errors import OnebError
from oneb.presets import resolve
from oneb.train.lock import BEAT_S, NAME, STALE_S, LockedError, Machine, RunLock, _Holder, check_unlocked
from oneb.train.run import train

REPOSITORY = Path(__file__).resolve().parents[1]
QUICK = {"beat_s": 0.2, "stale_s": 2.0}
FAR = ["far", "another boot"]

# A process that holds a lock and does as it is told. Its flock is the machine's own ("works"), missing on its file
# system (an error's name), or kept to a machine of its own, which nobody else here sees ("elsewhere").
HOLDER = """
import errno, fcntl, json, os, sys, time
from pathlib import Path
from oneb.errors import OnebError
from oneb.train.lock import Machine, RunLock

given = json.loads(sys.argv[2])
kind = given.pop("flock", "works")
if kind != "works":
    def flock(descriptor, operation):
        if kind != "elsewhere":
            raise OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))
    fcntl.flock = flock
machine = given.pop("machine", None)
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # at once: two threads speak
lock = RunLock(Path(sys.argv[1]), machine=machine and Machine(*machine), say=say, **given)
began = time.monotonic()
try:
    lock.acquire()
    say("held", time.monotonic() - began)
except OnebError as error:
    say("refused", time.monotonic() - began, error)
    sys.exit(2)
for line in sys.stdin:
    if line.strip() == "leave":
        os._exit(0)
    if line.strip() == "fork":
        if os.fork() == 0:
            time.sleep(600)
    if line.strip() == "check":
        try:
            lock.check()
            say("mine", lock.lost)
        except OnebError as error:
            say("lost", error)
    if line.strip() == "time":
        say(time.time(), time.monotonic())
lock.release()
say("released")
"""


class Process:
    """A :data:`HOLDER`, and what it has said."""

    def __init__(self, directory, environment=None, **given):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(directory), json.dumps(given)], stdin=subprocess.PIPE, text=True,
            stdout=subprocess.PIPE, cwd=REPOSITORY, env={**os.environ, **(environment or {})}, start_new_session=True)
        self.pid = self.process.pid
        self.notes = []

    def says(self):
        """The next line that is no note."""
        while (line := self.process.stdout.readline()).startswith("["):
            self.notes.append(line)
        return line.rstrip("\n")

    def began(self):
        """Whether it has the lock, after how many seconds, and what it said."""
        word, seconds, *rest = self.says().split(" ", 2)
        return word == "held", float(seconds), " ".join(rest)

    def ask(self, word):
        self.tell(word)
        return self.says()

    def tell(self, word):
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def release(self):
        self.process.stdin.close()
        assert self.says() == "released"
        self.process.wait()

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start():
    """Starts processes that hold a lock; none outlives its test."""
    processes = []

    def start_one(directory, **given):
        processes.append(Process(directory, **given))
        return processes[-1]

    yield start_one
    for started in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.process.wait()
        started.process.stdout.close()
        if not started.process.stdin.closed:
            started.process.stdin.close()


def body(directory):
    return json.loads((directory / NAME).read_text())


# ---- on one machine

def test_of_several_at_once_one_has_the_directory(tmp_path, start):
    for number in range(3):
        directory = tmp_path / str(number)
        directory.mkdir()
        processes = [start(directory) for _ in range(4)]
        began = [process.began() for process in processes]
        assert [is_held for is_held, _, _ in began].count(True) == 1
        holder = next(process for process, (is_held, _, _) in zip(processes, began, strict=True) if is_held)
        for is_held, seconds, text in began:
            if not is_held:
                assert f"another process is training in {directory}" in text
                assert "--tag" in text
                assert seconds < 5
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
        assert seconds < 1.5
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
    os.kill(holder.pid, signal.SIGSTOP)
    time.sleep(1.0)
    assert not start(tmp_path, beat_s=0.1, stale_s=0.5).began()[0]
    os.kill(holder.pid, signal.SIGCONT)
    assert holder.ask("check") == "mine None"


def test_a_forked_child_does_not_keep_the_lock(tmp_path, start):
    holder = start(tmp_path)
    assert holder.began()[0]
    holder.tell("fork")
    assert holder.ask("check") == "mine None"
    assert not start(tmp_path).began()[0]  # nor does the child's end of it give it up
    os.kill(holder.pid, signal.SIGKILL)
    is_held, seconds, text = start(tmp_path).began()
    assert is_held, text
    assert seconds < 1.5


def test_a_deleted_lock_is_made_again(tmp_path, start):
    holder = start(tmp_path, **QUICK)
    assert holder.began()[0]
    for _ in range(2):
        (tmp_path / NAME).unlink()
        deadline = time.monotonic() + 10
        while not (tmp_path / NAME).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
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
    before = body(tmp_path / "run")["beats"]
    time.sleep(1.0)
    assert body(tmp_path / "run")["beats"] > before
    shutil.rmtree(tmp_path / "run")
    time.sleep(0.5)
    holder.release()
    assert not (tmp_path / "run").exists()


# ---- on several machines, whose flock does not reach the others

@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_beats_are_enough_where_there_is_no_flock(tmp_path, monkeypatch, error):
    def flock(descriptor, operation):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunLock(tmp_path, beat_s=0.05, stale_s=0.5), pytest.raises(LockedError, match=f"process {os.getpid()}"):
        RunLock(tmp_path, beat_s=0.05, stale_s=0.5).acquire()
    with RunLock(tmp_path, beat_s=0.05, stale_s=0.5):
        pass


@pytest.mark.parametrize("flock", ["elsewhere", "EOPNOTSUPP"])
def test_another_machine_that_beats_has_the_directory(tmp_path, start, flock):
    holder = start(tmp_path, machine=FAR, flock=flock, **QUICK)
    assert holder.began()[0]
    other = start(tmp_path, flock="works" if flock == "elsewhere" else flock, **QUICK)
    is_held, seconds, text = other.began()
    assert not is_held
    assert seconds < QUICK["stale_s"]
    assert f"process {holder.pid} on far, since" in text
    assert f"is locked by process {holder.pid} on far" in other.notes[0]
    holder.release()
    after = start(tmp_path, flock="works" if flock == "elsewhere" else flock, **QUICK)
    is_held, seconds, text = after.began()
    assert is_held, text
    assert seconds < QUICK["stale_s"]
    assert after.notes == []


def test_another_machine_that_is_silent_is_taken_over_from(tmp_path, start):
    processes = {}
    for flock in ("elsewhere", "EOPNOTSUPP"):
        (tmp_path / flock).mkdir()
        holder = start(tmp_path / flock, machine=FAR, flock=flock, **QUICK)
        assert holder.began()[0]
        time.sleep(0.5)
        holder.kill()
        assert body(tmp_path / flock)["beats"] > 1
        here = "works" if flock == "elsewhere" else flock
        processes[tmp_path / flock] = start(tmp_path / flock, flock=here, **QUICK)
    for directory, process in processes.items():
        is_held, seconds, text = process.began()
        assert is_held, text
        assert QUICK["stale_s"] <= seconds < QUICK["stale_s"] + 5
        assert len(process.notes) == 2
        assert "its lock is taken over" in process.notes[1]
        assert body(directory)["pid"] == process.pid


def test_who_was_silent_for_too_long_learns_that_it_lost(tmp_path, start):
    """It was paused, as a virtual machine is; its first look stops it, and it spoils nothing of the other's."""
    paused = start(tmp_path, machine=FAR, flock="elsewhere", **QUICK)
    assert paused.began()[0]
    os.kill(paused.pid, signal.SIGSTOP)
    other = start(tmp_path, **QUICK)
    assert other.began()[0]
    os.kill(paused.pid, signal.SIGCONT)
    assert f"taken over by process {other.pid} on " in paused.ask("check")
    time.sleep(1.0)
    paused.release()
    assert body(tmp_path)["pid"] == other.pid
    assert other.ask("check") == "mine None"


@pytest.mark.parametrize("flock", ["elsewhere", "EOPNOTSUPP"])
def test_of_several_machines_at_once_one_has_the_directory(tmp_path, start, flock):
    """Those that do not hear of each other at the start do so a beat later."""
    processes = [start(tmp_path, machine=[f"far{n}", f"boot {n}"], flock=flock, **QUICK) for n in range(3)]
    held = [process for process in processes if process.began()[0]]
    assert held
    time.sleep(1.0)
    assert [process.ask("check").split()[0] for process in held].count("mine") == 1


@pytest.mark.slow
def test_with_the_real_intervals(tmp_path, start):
    for name in ("alive", "silent"):
        (tmp_path / name).mkdir()
    alive = start(tmp_path / "alive", machine=FAR, flock="elsewhere")
    silent = start(tmp_path / "silent", machine=FAR, flock="elsewhere")
    assert alive.began()[0]
    assert silent.began()[0]
    silent.kill()
    refused, taken = start(tmp_path / "alive"), start(tmp_path / "silent")
    is_held, seconds, _ = refused.began()
    assert not is_held
    assert seconds < 2 * BEAT_S
    is_held, seconds, text = taken.began()
    assert is_held, text
    assert STALE_S <= seconds < STALE_S + 10


# ---- clocks

CLOCK = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long long shift(void) {
    char text[32] = {0};
    int file = open(getenv("CLOCK_SHIFT"), O_RDONLY);
    if (file < 0) return 0;
    if (read(file, text, sizeof text - 1) < 0) text[0] = 0;
    close(file);
    return atoll(text);
}
int clock_gettime(clockid_t which, struct timespec *now) {
    int result = syscall(SYS_clock_gettime, which, now);
    if (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE) now->tv_sec += shift();
    return result;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result) *result = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.fixture(scope="module")
def clock_library(tmp_path_factory):
    """A library that, loaded before others, shifts a process's wall clock by the seconds that a file says."""
    compiler = shutil.which("cc")
    if not compiler or not sys.platform.startswith("linux"):
        pytest.skip("no C compiler, or not Linux")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(CLOCK)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "clock.so", folder / "clock.c"], check=True)
    return folder / "clock.so"


class Clock:
    """A wall clock that can be set; processes with ``environment`` have it."""

    def __init__(self, library, path):
        self.path = path
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_SHIFT": str(path)}
        self.set(0)

    def set(self, shift):
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(str(shift))
        os.replace(new, self.path)


DAYS = 86_400


def test_a_live_lock_survives_clocks_that_are_set(tmp_path, start, clock_library):
    here, there = Clock(clock_library, tmp_path / "here"), Clock(clock_library, tmp_path / "there")
    directory = tmp_path / "run"
    directory.mkdir()
    holder = start(directory, environment=there.environment, machine=FAR, flock="elsewhere", **QUICK)
    assert holder.began()[0]
    wall, monotonic = map(float, holder.ask("time").split())
    for shift in (10 * DAYS, -10 * DAYS, 3600, -3600):
        there.set(shift)
        shifted, now = map(float, holder.ask("time").split())
        assert shifted - wall == pytest.approx(shift + now - monotonic, abs=1.0)  # it really is set
        here.set(-shift)
        before = body(directory)["beats"]
        is_held, seconds, text = start(directory, environment=here.environment, **QUICK).began()
        assert not is_held
        assert seconds < QUICK["stale_s"]
        time.sleep(0.5)
        assert body(directory)["beats"] > before
    assert holder.ask("check") == "mine None"


def test_a_dead_lock_is_neither_younger_nor_older_for_clocks_that_are_set(tmp_path, start, clock_library):
    processes = []
    for number, (before, after) in enumerate([(0, 10 * DAYS), (0, -10 * DAYS), (-DAYS, 3600), (3600, -DAYS)]):
        directory = tmp_path / str(number)
        directory.mkdir()
        holder = start(directory, machine=FAR, flock="elsewhere", **QUICK)
        assert holder.began()[0]
        holder.kill()
        os.utime(directory / NAME, (time.time() - after,) * 2)
        clock = Clock(clock_library, tmp_path / f"clock{number}")
        clock.set(before)
        processes.append((start(directory, environment=clock.environment, **QUICK), clock, after))
    time.sleep(1.0)
    for process, clock, after in processes:
        assert process.process.poll() is None
        clock.set(after)  # in the middle of its watch
    for process, _, _ in processes:
        is_held, seconds, text = process.began()
        assert is_held, text
        assert QUICK["stale_s"] <= seconds < QUICK["stale_s"] + 5


# ---- disks, and what may be in the file

def test_beats_go_on_when_the_disk_is_full(disk, start):
    directory = disk(2**20)
    holder = start(directory, machine=FAR, flock="elsewhere", **QUICK)
    assert holder.began()[0]
    fill(directory)
    before = body(directory)["beats"]
    assert not start(directory, **QUICK).began()[0]
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
        deadline = time.monotonic() + 60
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
