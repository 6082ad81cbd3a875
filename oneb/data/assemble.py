"""All units of an input through the workers and, in their order, into the journal."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.pool import ThreadPool
from pathlib import Path

from oneb.data.journal import FileState, Journal
from oneb.data.parts import Counts, Job, Place, Placed
from oneb.data.reading import cannot_read
from oneb.data.sources import InputFile
from oneb.data.units import Unit, damage_note, plan_units
from oneb.data.workers import Answer, InProcess, Pool, Task
from oneb.errors import OnebError
from oneb.files import sha256_file
from oneb.units import format_transfer

_COMMIT_SECONDS = 1.0  # between commits: what a kill may cost, about
_WAIT_SECONDS = 0.5
_GLANCE_SECONDS = 0.05  # enough to open a file that is here
_HASHED_WHOLE = 2**30  # a file of which only a part was used is hashed up to this size


@dataclass(frozen=True)
class Progress:
    """How far the work is. ``fraction`` is of the tokens asked for, else of the input's bytes."""

    tokens: int
    text_bytes: int
    fraction: float
    arriving: str  # what is being downloaded, in words, or ""


class _Stopped(Exception):
    """Ends a download that nobody waits for any more."""


class Arrivals:
    """Opens the input's files, each in a thread of its own: most are here, some must be downloaded."""

    def __init__(self, files: Sequence[InputFile]) -> None:
        self._files = files
        self._futures: dict[int, Future[Path]] = {}
        self._stopped = False
        self.arriving = ""

    def expect(self, number: int) -> None:
        """Begin to open file ``number``."""
        if number < len(self._files) and number not in self._futures:
            self._futures[number] = future = Future()
            # A daemon: a download that is not needed any more must not hold up the end.
            threading.Thread(target=self._open, args=(self._files[number], future), daemon=True).start()

    def _open(self, file: InputFile, future: Future[Path]) -> None:
        began: tuple[int, float] | None = None

        def progress(n_bytes: int, size: int) -> None:
            nonlocal began
            if self._stopped:
                raise _Stopped
            now = time.monotonic()
            began = began or (n_bytes, now)
            far = format_transfer(n_bytes, size, began[0], now - began[1])
            self.arriving = f"{Path(file.name).name}, {far}" if n_bytes < size else ""

        try:
            future.set_result(file.open(progress))
        except _Stopped:
            return
        except BaseException as error:  # fallback: raised by ``get``, in the thread that asks
            future.set_exception(error)

    def get(self, number: int, seconds: float | None) -> Path | None:
        """File ``number``, or None if it is not here after so many seconds."""
        self.expect(number)
        try:
            return self._futures[number].result(seconds)
        except NotYet:  # unless opening has ended since, or this is what it met
            return self._futures[number].result() if self._futures[number].done() else None

    def stop(self) -> None:
        """End downloads at their next bytes."""
        self._stopped = True


@dataclass
class _OnTheWay:
    """A unit that workers were given, and what is known of it."""

    unit: Unit
    counts: Counts | OnebError | None = None
    place: Place | None = None
    placed: Placed | None = None


class Commits:
    """The journal's commits, in a thread: a disk takes its time, and the workers want tasks.

    Args:
        seconds: between them, at least.
    """

    def __init__(self, journal: Journal, seconds: float) -> None:
        self._journal, self._seconds = journal, seconds
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None
        self._began = time.monotonic()

    def offer(self) -> None:
        """A moment at which one may begin."""
        if time.monotonic() - self._began >= self._seconds and (self._last is None or self._last.done()):
            self.begin()

    def begin(self) -> None:
        """Begin one now, as soon as the last is done."""
        self.wait()
        self._began = time.monotonic()
        self._last = self._thread.submit(self._journal.commit, self._journal.snapshot())

    def wait(self) -> None:
        """Until the last one is done.

        Raises:
            OSError: it failed.
        """
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """As ``wait``, without a word on how it went."""
        self._thread.shutdown()


class Work:
    """From the journal's state to all the tokens that are wanted."""

    def __init__(self, files: Sequence[InputFile], job: Job, journal: Journal, workers: InProcess | Pool,
                 n_tokens: int | None, progress: Callable[[Progress], None]) -> None:
        self.files, self.job, self.journal, self.n_tokens, self.progress = files, job, journal, n_tokens, progress
        self.arrivals = Arrivals(files)
        self.commits = Commits(journal, _COMMIT_SECONDS)
        self.sizes = (0, *accumulate(file.size for file in files))
        self.pool = workers
        self.window = 3 * workers.n_workers + 2  # units on the way: what one slow unit may keep others waiting for
        self.order: deque[_OnTheWay] = deque()
        self.next_token, self.next_document = journal.state.tokens, journal.state.documents  # to be placed
        self.share = 0.0  # of the current file that is appended
        self.appended, self.appended_tokens = 0, 0  # here, without what an earlier process did

    def run(self) -> None:
        """Append until full or at the input's end, then hash what was read."""
        try:
            units = self._units()
            more = True
            while not self._is_full():
                more = more and self._dispatch(units)
                if not self.order and not more:
                    break
                for task, answer in self.pool.results(_WAIT_SECONDS if self.order else 0):
                    self._note(task, answer)
                self._place()
                self._append()
                self._report()
            if self.journal.state.tokens:
                self.journal.complete()
            self.commits.begin()
            self._hash()
            self.commits.wait()
        finally:
            self.arrivals.stop()
            self.commits.close()

    def _is_full(self) -> bool:
        return self.n_tokens is not None and self.journal.state.tokens >= self.n_tokens

    # -- Units -----------------------------------------------------------------------------------

    def _units(self) -> Iterator[Unit | None]:
        """Units from the journal's state on; None where one cannot be had yet.

        Raises:
            OnebError, OSError: a file cannot be opened, and what comes before it is appended and not enough.
        """
        try:
            yield from self._readable_units()
        except (OnebError, OSError) as error:
            while self.order:
                yield None
            raise error

    def _readable_units(self) -> Iterator[Unit | None]:
        """As ``_units``. None: the next file is not here, or not yet known to be needed."""
        first, skip = self.journal.state.file, self.journal.state.unit
        for number in range(first, len(self.files)):
            while self.files[number].remote and self.order and not self._next_is_needed(number - 1):
                yield None
            while (path := self.arrivals.get(number, _GLANCE_SECONDS if self.order else _WAIT_SECONDS)) is None:
                self._report()
                yield None
            done = skip if number == first else 0
            for unit in plan_units(number, path, self.files[number].kind, text_column=self.job.text_column,
                                   splits=self.splits, spool=lambda index, file=number: self._spool(file, index),
                                   skip=done):
                if unit.index < done:
                    self.share += unit.share
                else:
                    yield unit

    @property
    def splits(self) -> bool:
        """Whether a text may be cut into units: the tokenizers that are known here allow it, any other might not."""
        return self.job.encoding in ("gpt2", "bytes")

    def _spool(self, file: int, index: int) -> Path:
        return self.job.folder / f"{file:06d}-{index:06d}.lines"

    def _dispatch(self, units: Iterator[Unit | None]) -> bool:
        """Give the workers what they can take; False at the input's end."""
        while self.pool.has_room() and self._wants_more():
            try:
                unit = next(units)
            except StopIteration:
                return False
            if unit is None:
                break
            self.order.append(_OnTheWay(unit))
            self.pool.submit(unit)
            if self._next_is_needed(unit.file):
                self.arrivals.expect(unit.file + 1)
        return True

    def _wants_more(self) -> bool:
        """Whether another unit would be of use: not if those on the way seem enough."""
        if not self.order:
            return True
        if len(self.order) >= self.window:
            return False
        if self.n_tokens is None or not self.appended:
            return True
        mean = self.appended_tokens / self.appended
        return self.journal.state.tokens + mean * len(self.order) < self.n_tokens

    def _next_is_needed(self, file: int) -> bool:
        """Whether the tokens wanted reach beyond this file, as far as can be told from those before."""
        if self.n_tokens is None:
            return True
        if self.files[file].kind == "tokens":
            return self.sizes[file + 1] // 2 <= self.n_tokens
        if self.journal.state.file != file or not self.share:
            return False
        before = sum(done.tokens for done in self.journal.state.files[:file])
        return before + self.journal.source(file).tokens / self.share < 1.1 * self.n_tokens

    # -- Tokens ----------------------------------------------------------------------------------

    def _note(self, task: Task, answer: Answer) -> None:
        unit = task.unit if isinstance(task, Place) else task
        for entry in self.order:
            if entry.unit == unit and isinstance(answer, Placed):
                entry.placed = answer
            elif entry.unit == unit and isinstance(answer, Counts | OnebError):
                entry.counts = answer

    def _place(self) -> None:
        """Say where tokens go as soon as it is known how many there are before them."""
        for entry in self.order:
            counts = entry.counts
            room = None if self.n_tokens is None else self.n_tokens - self.next_token
            if not isinstance(counts, Counts) or room == 0:
                break
            if entry.place is None:
                room = counts.tokens if room is None else min(room, counts.tokens)
                entry.place = Place(entry.unit, self.next_token, self.next_document, room)
                self.next_token += room
                self.next_document += counts.documents
                self.pool.submit(entry.place)

    def _append(self) -> None:
        while self.order and self.order[0].placed is not None:
            entry = self.order.popleft()
            unit, counts, placed, place = entry.unit, entry.counts, entry.placed, entry.place
            assert isinstance(counts, Counts)
            assert placed is not None
            assert place is not None
            if placed.tokens != place.room:  # encoded twice, its worker having died in between
                raise _changed(self.files[unit.file])
            self.journal.append(counts, placed, unit.file, unit.index, last=unit.last)
            self.appended += 1
            self.appended_tokens += counts.tokens
            self.share = 0.0 if unit.last else self.share + unit.share
            if unit.kind == "lines":
                for path in (unit.path, damage_note(unit.path)):
                    path.unlink(missing_ok=True)
            self.commits.offer()
        if self.order and isinstance(self.order[0].counts, OnebError) and not self._is_full():
            raise self.order[0].counts

    def _hash(self) -> None:
        """The SHA-256 of each file that gave something; that none changed since it was found."""
        state = self.journal.state
        self.pool.close()  # what it still has to do is not needed
        unknown: list[FileState] = []
        paths: list[Path] = []
        for number, done in enumerate(state.files):
            file = self.files[number]
            done.sha256 = done.sha256 or file.sha256
            whole = number < state.file
            if done.sha256 is None and (whole or file.size <= _HASHED_WHOLE):
                path = self.arrivals.get(number, None)
                assert path is not None
                unknown.append(done)
                paths.append(path)
        # Threads are enough, hashing lets go of Python's lock; and these do not hold up Ctrl-C.
        with ThreadPool(self.pool.n_workers) as threads:
            for done, digest in zip(unknown, threads.imap(_hash, paths), strict=True):
                done.sha256 = digest
        for file in self.files[:len(state.files)]:
            if not file.is_unchanged():
                raise _changed(file)

    def _report(self) -> None:
        state = self.journal.state
        if self.n_tokens is not None:
            fraction = state.tokens / self.n_tokens
        else:
            current = self.share * self.files[state.file].size if state.file < len(self.files) else 0
            fraction = (self.sizes[state.file] + current) / max(1, self.sizes[-1])
        self.progress(Progress(state.tokens, state.text_bytes, fraction, self.arrivals.arriving))


def _changed(file: InputFile) -> OnebError:
    return OnebError(f"{file.name} changed while it was read. Leave it as it is and run the same command again: it "
                     "starts over")


def _hash(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise cannot_read(path, error) from error
