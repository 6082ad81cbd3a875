"""Processes that encode units: each takes tasks from its own pipe, and ends when the other end of it is gone."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import traceback
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from oneb.data.encode import Encoder, make_encoder
from oneb.data.parts import Job, encode_unit, part_path, write_part
from oneb.data.units import Unit
from oneb.errors import OnebError
from oneb.files import sha256_file

_WAITING = 2  # tasks a worker holds: one that it does, one behind it
_WORKER_BYTES = 2**30  # the most that one may take; most take a third
_TRIES = 2  # of a task whose worker was killed


@dataclass(frozen=True)
class Hash:
    """A task: the SHA-256 of a whole file of the input."""

    file: int
    path: Path


Task = Unit | Hash
Result = tuple[Task, str]  # of a Hash, the digest; of a Unit, "": its part is written


class Worker:
    """Does tasks in this process."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._encoder: Encoder | None = None

    def do(self, task: Task) -> str:
        """What a :data:`Result` holds.

        Raises:
            OnebError: as ``encode_unit``; or the disk is full.
        """
        if isinstance(task, Hash):
            return sha256_file(task.path)
        if self._encoder is None:
            self._encoder = make_encoder(self._job.encoding, self._job.ranks)
        part = encode_unit(task, self._job, self._encoder)
        try:
            write_part(part_path(self._job, task.file, task.index), part)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise disk_full(self._job.folder) from error
            raise
        return ""


def usable_workers() -> int:
    """Processes that this machine has cores and memory for."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return _usable_cores()
    return max(1, min(_usable_cores(), available // _WORKER_BYTES))


def _usable_cores() -> int:
    """Cores that this process may use: fewer than the machine has inside many containers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, -(-int(quota) // int(period))))


def disk_full(folder: Path) -> OnebError:
    """The error for a disk that filled up on the way."""
    return OnebError(f"the disk of {folder} is full. Make room and run the same command again: it continues")


class InProcess:
    """The one worker of a small job: this process."""

    def __init__(self, job: Job) -> None:
        self._worker, self._tasks = Worker(job), deque[Task]()

    def has_room(self) -> bool:
        """Whether another task would be taken up soon."""
        return not self._tasks

    def submit(self, task: Task) -> None:
        """Have it done."""
        self._tasks.append(task)

    def results(self, seconds: float) -> list[Result]:
        """What has been done since the last call; waits for it, at most so long."""
        if not self._tasks:
            return []
        task = self._tasks.popleft()
        return [(task, self._worker.do(task))]

    def close(self) -> None:
        """End at once; what is under way is dropped."""


@dataclass
class _Hand:
    """One process, this end of its pipe, and the tasks that it holds."""

    process: BaseProcess
    pipe: Connection
    tasks: deque[Task] = field(default_factory=deque)


class Pool:
    """As :class:`InProcess`, over ``n_workers`` processes."""

    def __init__(self, job: Job, n_workers: int) -> None:
        # Not forked: the parent has threads (downloads, the tokenizer's own), whose locks a fork would copy.
        self._start = partial(_start, multiprocessing.get_context("spawn"), job)
        self._hands = [self._start() for _ in range(n_workers)]
        self._deaths: dict[Task, int] = {}

    def has_room(self) -> bool:
        return any(len(hand.tasks) < _WAITING for hand in self._hands)

    def submit(self, task: Task) -> None:
        hand = min(self._hands, key=lambda hand: len(hand.tasks))
        hand.tasks.append(task)
        with contextlib.suppress(OSError):  # it died; ``results`` finds that out and gives its tasks to another
            hand.pipe.send(task)

    def results(self, seconds: float) -> list[Result]:
        found: list[Result] = []
        hands = {hand.pipe: hand for hand in self._hands}
        for pipe in wait(list(hands), seconds):
            hand = hands[pipe]  # type: ignore[index]
            try:
                kind, value = hand.pipe.recv()
            except (EOFError, OSError):
                self._replace(hand)
                continue
            if kind == "mistake":
                raise OnebError(value)
            if kind == "bug":
                raise RuntimeError(f"a worker process failed:\n{value}")
            found.append((hand.tasks.popleft(), value))
        return found

    def _replace(self, dead: _Hand) -> None:
        """Start another process for one that was killed, for instance by the system, short of memory."""
        dead.process.join()
        task = dead.tasks[0] if dead.tasks else None
        if task is not None:
            self._deaths[task] = self._deaths.get(task, 0) + 1
        if task is None or self._deaths[task] == _TRIES:
            what = f" while it read {task.path}" if task is not None else ""
            code = dead.process.exitcode or 0
            how = f"by signal {-code}" if code < 0 else f"with code {code}"
            raise OnebError(f"a worker process ended {how}{what}, perhaps for lack of memory. "
                            "Run the same command again, with fewer --workers: it continues")
        hand = self._start()
        self._hands[self._hands.index(dead)] = hand
        for task in dead.tasks:
            hand.tasks.append(task)
            hand.pipe.send(task)

    def close(self) -> None:
        for hand in self._hands:
            hand.process.kill()
        for hand in self._hands:
            hand.process.join()
            hand.pipe.close()


def _start(context: Any, job: Job) -> _Hand:
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, job), daemon=True)
    # Ctrl-C reaches the whole group, and the parent decides: the child inherits that it does not listen.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()  # so that reading from ours ends when the process does
    return _Hand(process, ours)


def _work(pipe: Connection, job: Job) -> None:
    """A worker process, until the pipe closes: that is also how it learns that its parent was killed."""
    worker = Worker(job)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("done", worker.do(task))
        except OnebError as error:
            answer = ("mistake", str(error))
        except Exception:  # fallback: the parent raises it
            answer = ("bug", traceback.format_exc())
        try:
            pipe.send(answer)
        except OSError:
            return
