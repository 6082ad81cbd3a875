"""Real processes that hold a run directory's lock, and do as they are told; for test_lock*.py."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oneb.checkpoints.lock import NAME

REPOSITORY = Path(__file__).resolve().parents[1]
QUICK = {"beat_s": 0.2, "stale_s": 2.0}
# For who watches a process that beats: it may be held up for longer than QUICK has patience.
PATIENT = {**QUICK, "stale_s": 60.0}
FAR = ["far", "another boot"]

# A process that holds a lock and does as it is told. Its flock is the machine's own ("works"), missing on its file
# system (an error's name), or kept to a machine of its own, which nobody else here sees ("elsewhere").
HOLDER = """
import errno, fcntl, json, os, sys, time
from pathlib import Path
from oneb.errors import OnebError
from oneb.checkpoints.lock import Machine, RunLock

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
            say("forked")
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

    def pause(self):
        """Stop it, all of its threads."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)


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
    """What the lock says, once that is whole: it may be written just now."""
    return eventually(lambda: _parsed(directory / NAME))


def _parsed(path):
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def beats_on(directory, before):
    """Wait for a beat that is later than ``before``."""
    return eventually(lambda: body(directory)["beats"] > before)


def eventually(found):
    """What ``found`` returns, once that is true."""
    deadline = time.monotonic() + 120
    while not (result := found()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return result
