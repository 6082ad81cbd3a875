"""Processes that encode units: each takes tasks from its own pipe, and ends when the other end of it is gone."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty, SimpleQueue

from oneb.data.encode import Encoder, make_encoder
from oneb.data.parts import Counts, Job, Part, Place, Placed, Target, encode_unit
from oneb.data.units import Unit, load_readers
from oneb.errors import OnebError
from oneb.host_memory import available_bytes

_WAITING = 2  # units a worker has to encode: one that it does, one behind it
_KEPT_BYTES = 64 * 2**20  # of tokens that wait for their place: a worker that has more begins no later unit
_WORKER_BYTES = 2**30  # the most that one may take; most take a third
_TRIES = 2  # of a task whose worker was killed


# A unit is encoded and kept (the answer: its counts), then written to its place (the answer: what was written). One
# that cannot be read is answered by the error: that counts only once its turn has come, for perhaps it is not needed.
Task = Unit | Place
Answer = Counts | Placed | OnebError
Result = tuple[Task, Answer]


def _before(unit: Unit) -> tuple[int, int]:
    """Sorts units as they lie in the input."""
    return unit.file, unit.index


class Worker:
    """Does tasks in this process."""

    def __init__(self) -> None:
        self._job: Job | None = None
        self._encoder: Encoder | None = None
        self._target: Target | None = None
        self._kept: dict[Unit, Part] = {}

    def begin(self, job: Job, encoder: Encoder | None = None) -> None:
        """The job of all tasks to come, and its encoder if it has been made."""
        self._job, self._encoder = job, encoder

    def load(self) -> None:
        """Make ready what most tasks need, before the first one is here."""
        with contextlib.suppress(Exception):  # fallback: the parent loads it, too, and says what is wrong with it
            if self._job is not None and self._job.vocabulary is not None:
                self._encoder = make_encoder(self._job.encoding, self._job.vocabulary)

    def do(self, task: Task) -> Answer:
        """What a :data:`Result` holds.

        Raises:
            OnebError: as ``encode_unit``; or the disk is full, or fails.
        """
        job = self._job
        assert job is not None
        try:
            # Open, and so locked, before anybody can be told to write.
            self._target = self._target or Target(job.folder)
            if isinstance(task, Place):
                return self._target.write(self._kept.pop(task.unit), task)
            return self._encode(task, job)
        except OSError as error:
            raise disk_trouble(error, job.folder) from error

    def _encode(self, task: Unit, job: Job) -> Counts:
        if self._encoder is None and task.kind != "tokens":
            self._encoder = make_encoder(job.encoding, job.vocabulary)
        part = self._kept[task] = encode_unit(task, job, self._encoder)
        return part.counts

    def may(self, task: Task) -> bool:
        """Whether to begin it now: memory for what waits is bounded, and what all others wait for must go on."""
        if isinstance(task, Place) or sum(part.ids.nbytes for part in self._kept.values()) <= _KEPT_BYTES:
            return True
        return _before(task) < min(map(_before, self._kept))

    def close(self) -> None:
        """Write no more."""
        if self._target is not None:
            self._target.close()


def usable_workers() -> int:
    """Processes that this machine has cores and memory for."""
    available = available_bytes()
    return _usable_cores() if available is None else max(1, min(_usable_cores(), available // _WORKER_BYTES))


def _usable_cores() -> int:
    """Cores that this process may use: fewer than the machine has inside many containers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, -(-int(quota) // int(period))))


def disk_trouble(error: OSError, folder: Path) -> OnebError:
    """What to say of a file that failed on the way, or of ``folder`` where the system does not name the file."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OnebError(f"the disk of {folder} is full. Make room and run the same command again: it continues")
    return OnebError(f"{error.filename or folder}: {error.strerror or error}. Put that right and run the same command "
                     "again: it continues")


class InProcess:
    """The one worker of a small job: this process."""

    n_workers = 1

    def __init__(self) -> None:
        self._worker, self._tasks = Worker(), deque[Task]()

    def begin(self, job: Job, encoder: Encoder | None = None) -> None:
        """What all tasks to come are of, and its encoder if this process has made one. May be said again, corrected."""
        self._worker.begin(job, encoder)

    def has_room(self) -> bool:
        """Whether another unit would be taken up soon."""
        return not self._tasks

    def submit(self, task: Task) -> None:
        """Have it done; a unit is placed once its counts have come."""
        self._tasks.append(task)

    def results(self, seconds: float) -> list[Result]:
        """What has been done since the last call; waits for it, at most so long."""
        if not self._tasks:
            return []
        task = self._tasks.popleft()
        return [(task, self._worker.do(task))]

    def close(self) -> None:
        """End at once; what is under way is dropped."""
        self._worker.close()


@dataclass
class _Hand:
    """One process, this end of its pipe, and what it holds."""

    process: BaseProcess
    pipe: Connection
    tasks: deque[Unit] = field(default_factory=deque)  # to do
    kept: dict[Unit, Place | None] = field(default_factory=dict)  # encoded; where it was told to write them

    def begin(self, job: Job) -> None:
        with contextlib.suppress(OSError):  # it died; ``results`` finds that out and starts another
            self.pipe.send(job)

    def send(self, task: Task) -> None:
        if isinstance(task, Place):
            self.kept[task.unit] = task
        else:
            self.tasks.append(task)
        with contextlib.suppress(OSError):  # as above, and gives its tasks to that one
            self.pipe.send(task)


class Pool:
    """As :class:`InProcess`, over ``n_workers`` processes, which start at once: loading takes them a moment.

    Args:
        kinds: of files that they are going to read.
    """

    def __init__(self, n_workers: int, kinds: Iterable[str] = ()) -> None:
        self.n_workers, self._kinds = n_workers, frozenset(kinds)
        self._job: Job | None = None
        self._hands: list[_Hand] = []
        # A fork is there at once, with all that is loaded. But it copies locks as threads hold them (downloads, other
        # packages' own), and nobody would let go of them: where there are threads, a process begins anew.
        fork = _n_threads() == 1
        for _ in range(n_workers):
            self._hands.append(_start(self._hands, self._kinds, fork=fork))
        self._deaths: dict[Task | None, int] = {}
        self._again: dict[Unit, Place] = {}  # being encoded a second time; their places are known

    def begin(self, job: Job, encoder: Encoder | None = None) -> None:
        if job != self._job:
            self._job = job
            for hand in self._hands:
                hand.begin(job)

    def has_room(self) -> bool:
        return any(len(hand.tasks) < _WAITING for hand in self._hands)

    def submit(self, task: Task) -> None:
        if not isinstance(task, Place):
            min(self._hands, key=lambda hand: len(hand.tasks)).send(task)
            return
        hand = next((hand for hand in self._hands if task.unit in hand.kept), None)
        if hand is None:
            self._again[task.unit] = task
        else:
            hand.send(task)

    def results(self, seconds: float) -> list[Result]:
        found: list[Result] = []
        hands = {hand.pipe: hand for hand in self._hands}
        for pipe in wait(list(hands), seconds):
            hand = hands[pipe]  # type: ignore[index]
            try:
                kind, task, answer = hand.pipe.recv()
            except (EOFError, OSError):
                self._replace(hand)
                continue
            if kind == "bug":
                raise RuntimeError(f"a worker process failed:\n{answer}")
            if kind == "mistake" and (isinstance(task, Place) or task in self._again):
                raise OnebError(answer)  # of what is needed for certain
            if self._is_news(hand, task):
                found.append((task, OnebError(answer) if kind == "mistake" else answer))
        return found

    def _is_news(self, hand: _Hand, task: Task) -> bool:
        """Note what ``hand`` has done; False if it did so in place of a dead one, and is told itself how to go on."""
        if isinstance(task, Place):
            del hand.kept[task.unit]
            return True
        hand.tasks.remove(task)
        hand.kept[task] = None
        if task in self._again:
            hand.send(self._again.pop(task))
            return False
        return True

    def _replace(self, dead: _Hand) -> None:
        """Start another process for one that was killed, for instance by the system, short of memory."""
        dead.process.join()
        task = dead.tasks[0] if dead.tasks else next(iter(dead.kept), None)
        self._deaths[task] = self._deaths.get(task, 0) + 1
        if self._deaths[task] == _TRIES:
            what = f" while it read {task.path}" if task is not None else ""
            code = dead.process.exitcode or 0
            how = f"by signal {-code}" if code < 0 else f"with code {code}"
            raise OnebError(f"a worker process ended {how}{what}, perhaps for lack of memory. "
                            "Run the same command again, with fewer --workers: it continues")
        place = self._hands.index(dead)
        del self._hands[place]
        dead.pipe.close()
        # Not a fork: that would hold the journal's lock, even should it outlive this process.
        hand = _start(self._hands, self._kinds, fork=False)
        self._hands.insert(place, hand)
        if self._job is not None:
            hand.begin(self._job)
        self._again |= {unit: place for unit, place in dead.kept.items() if place is not None}
        for lost in sorted((*dead.kept, *dead.tasks), key=_before):
            hand.send(lost)

    def close(self) -> None:
        for hand in self._hands:
            hand.process.kill()
        for hand in self._hands:
            hand.process.join()
            hand.pipe.close()


def _start(others: list[_Hand], kinds: frozenset[str], *, fork: bool) -> _Hand:
    """A new process beside these, which will read files of such kinds; a fork, or begun anew."""
    context = multiprocessing.get_context("fork" if fork else "spawn")
    ours, theirs = context.Pipe()
    inherited = [ours, *(hand.pipe for hand in others)] if fork else []
    process = context.Process(target=_work, args=(theirs, inherited, kinds), daemon=True)
    # Ctrl-C reaches the whole group, and the parent decides: the child does not listen, not even while it begins.
    if not fork:
        resource_tracker.ensure_running()  # else ``start`` does it, and lets SIGINT in
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()  # so that reading from ours ends when the process does
    return _Hand(process, ours)


def _n_threads() -> int | None:
    """Of this process, also those that Python does not know of; None where the system does not say it in /proc."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return None


def _work(pipe: Connection, inherited: list[Connection], kinds: frozenset[str]) -> None:
    """A worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for end in inherited:
        end.close()  # so that reading ends when the parent does
    received: SimpleQueue[Task | Job] = SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, received), daemon=True).start()
    load_readers(kinds)
    worker = Worker()
    waiting = _Waiting(received, worker)
    while True:
        task = waiting.take()
        try:
            answer = ("done", task, worker.do(task))
        except OnebError as error:
            answer = ("mistake", task, str(error))
        except Exception:  # fallback: the parent raises it
            answer = ("bug", task, traceback.format_exc())
        try:
            pipe.send(answer)
        except OSError:
            return


def _receive(pipe: Connection, received: SimpleQueue[Task | Job]) -> None:
    """Tasks from the pipe. It closes when the parent ends, were it killed; then so does this process, at once."""
    try:
        while True:
            received.put(pipe.recv())
    finally:  # whatever it was: a process that hears nothing would be waited for
        os._exit(1)


class _Waiting:
    """Tasks in the order in which a worker takes them: first what only has to be written, and then is off its hands."""

    def __init__(self, received: SimpleQueue[Task | Job], worker: Worker) -> None:
        self._received, self._worker = received, worker
        self._places: deque[Task] = deque()
        self._others: deque[Task] = deque()

    def take(self) -> Task:
        """The next task; waits for one that may begin."""
        while True:
            with contextlib.suppress(Empty):
                while True:
                    self._sort(self._received.get_nowait())
            if self._places:
                return self._places.popleft()
            task = next(filter(self._worker.may, self._others), None)
            if task is not None:
                self._others.remove(task)
                return task
            self._sort(self._received.get())

    def _sort(self, task: Task | Job) -> None:
        if isinstance(task, Job):
            self._worker.begin(task)
            self._worker.load()
        else:
            (self._places if isinstance(task, Place) else self._others).append(task)
