"""One process a run directory, where no flock tells: on machines that beat or are silent, with clocks that are set."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from lock_helpers import *  # noqa: F403
from lock_helpers import FAR, PATIENT, QUICK, beats_on, body

from oneb.checkpoints.lock import NAME, STALE_S, LockedError, RunLock

# ---- on several machines, whose flock does not reach the others

@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_beats_are_enough_where_there_is_no_flock(tmp_path, monkeypatch, error):
    def flock(descriptor, operation):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunLock(tmp_path, beat_s=0.05, stale_s=0.5), pytest.raises(LockedError, match=f"process {os.getpid()}"):
        RunLock(tmp_path, **PATIENT).acquire()
    with RunLock(tmp_path, beat_s=0.05, stale_s=0.5):
        pass


@pytest.mark.parametrize("flock", ["elsewhere", "EOPNOTSUPP"])
def test_another_machine_that_beats_has_the_directory(tmp_path, start, flock):
    holder = start(tmp_path, machine=FAR, flock=flock, **QUICK)
    assert holder.began()[0]
    other = start(tmp_path, flock="works" if flock == "elsewhere" else flock, **PATIENT)
    is_held, seconds, text = other.began()
    assert not is_held
    assert seconds < PATIENT["stale_s"]
    assert f"process {holder.pid} on far, since" in text
    assert f"is locked by process {holder.pid} on far" in other.notes[0]
    holder.release()
    after = start(tmp_path, flock="works" if flock == "elsewhere" else flock, **QUICK)
    is_held, _, text = after.began()
    assert is_held, text
    assert after.notes == []


def test_another_machine_that_is_silent_is_taken_over_from(tmp_path, start):
    processes = {}
    for flock in ("elsewhere", "EOPNOTSUPP"):
        (tmp_path / flock).mkdir()
        holder = start(tmp_path / flock, machine=FAR, flock=flock, **QUICK)
        assert holder.began()[0]
        assert beats_on(tmp_path / flock, 1)
        holder.kill()
        here = "works" if flock == "elsewhere" else flock
        processes[tmp_path / flock] = start(tmp_path / flock, flock=here, **QUICK)
    for directory, process in processes.items():
        is_held, seconds, text = process.began()
        assert is_held, text
        assert QUICK["stale_s"] <= seconds < QUICK["stale_s"] + 60
        assert len(process.notes) == 2
        assert "its lock is taken over" in process.notes[1]
        assert body(directory)["pid"] == process.pid


def test_who_was_silent_for_too_long_learns_that_it_lost(tmp_path, start):
    """It was paused, as a virtual machine is; its first look stops it, and it spoils nothing of the other's."""
    paused = start(tmp_path, machine=FAR, flock="elsewhere", **QUICK)
    assert paused.began()[0]
    paused.pause()
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
    assert seconds < STALE_S
    is_held, seconds, text = taken.began()
    assert is_held, text
    assert STALE_S <= seconds < 2 * STALE_S


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
        assert shifted - wall == pytest.approx(shift + now - monotonic, abs=600)  # it really is set
        here.set(-shift)
        before = body(directory)["beats"]
        is_held, seconds, text = start(directory, environment=here.environment, **PATIENT).began()
        assert not is_held
        assert seconds < PATIENT["stale_s"]
        assert beats_on(directory, before)
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
    for process, clock, after in processes:
        assert "watching" in process.process.stdout.readline()
        clock.set(after)  # in the middle of its watch
    for process, _, _ in processes:
        is_held, seconds, text = process.began()
        assert is_held, text
        assert QUICK["stale_s"] <= seconds < QUICK["stale_s"] + 60
