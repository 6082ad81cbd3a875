"""One process a run directory, be it on one machine or on several that share a disk.

Two means, since neither is enough. ``flock`` goes with the process, however that ends, but some shared file systems
keep it to one machine, and others do not have it. So the lock file also says who holds it and counts beats, which a
thread adds; another machine watches whether they go on. No two clocks are ever compared: what counts is how long, by
the watcher's own monotonic clock, nothing has changed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import secrets
import select
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneb.errors import OnebError

NAME = ".lock"
BEAT_S = 10.0
STALE_S = 60.0  # without a beat: six are missing
_PATIENCE_S = 0.5  # with who merely looks at the lock, or is just about to end
_SETTLE_S = 2.0  # for what two machines wrote at the same time to reach both
_BODY_BYTES = 512  # one write, of always as many: there is room for it on a full disk, too
_MOST_BYTES = 4096  # that are read of a file that anybody may have written
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class LockedError(OnebError):
    """Another process has the run directory."""


@dataclass(frozen=True)
class Machine:
    """A machine as locks know it.

    Attributes:
        host: its name, which need not be its own alone.
        boot: differs between machines and from one start to the next; empty where the system has no such thing.
            Containers of one machine share it, as they share its kernel, and so its flock.
    """

    host: str
    boot: str

    def is_same(self, other: Machine) -> bool:
        """Whether flock is sure to reach from one to the other."""
        return self.boot == other.boot if self.boot or other.boot else self.host == other.host


def this_machine() -> Machine:
    """The one that this process runs on."""
    boot = ""
    with contextlib.suppress(OSError):  # Linux has it
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return Machine(platform.node(), boot)


@dataclass(frozen=True)
class _Holder:
    """Who the lock file says holds it."""

    machine: Machine
    pid: int
    identity: str
    started: str

    @staticmethod
    def parse(body: bytes) -> _Holder | None:
        """None where it says nothing that makes sense: a write is under way, or this is no lock of ours."""
        try:
            values = json.loads(body)
            host, boot, identity, started = (_plain(values[key]) for key in ("host", "boot", "id", "started"))
            return _Holder(Machine(host, boot), int(values["pid"]), identity, started)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return None

    def described(self, here: Machine) -> str:
        """For people."""
        where = "" if self.machine == here else f" on {self.machine.host}"
        return f"process {self.pid}{where}, since {self.started}"


def _plain(text: Any) -> str:
    """What may be shown: no control characters, not much of it."""
    return "".join(character for character in str(text) if character.isprintable())[:64]


class RunLock:
    """Holds a run directory from :meth:`acquire` to :meth:`release`, as a context manager does.

    Args:
        directory: the run directory, which exists.
        machine: where this process runs, by default :func:`this_machine`.
        say: told what is waited for and what is taken over.
        beat_s, stale_s: seconds from beat to beat, and without one until a lock counts for nothing.
    """

    def __init__(self, directory: Path, *, machine: Machine | None = None, say: Callable[[str], None] = print,
                 beat_s: float = BEAT_S, stale_s: float = STALE_S) -> None:
        self.lost: str | None = None  # why this process has the directory no longer, once that has been seen
        self._directory, self._path = directory, directory / NAME
        self._here = machine or this_machine()
        self._say, self._beat_s, self._stale_s = say, beat_s, stale_s
        self._identity, self._beats = secrets.token_hex(8), 0
        self._started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())  # for people only
        self._descriptor: int | None = None
        self._wake: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._turn = threading.Lock()  # the file is looked at by the beats and by check()

    def acquire(self) -> None:
        """Take the directory. Waits for up to ``stale_s`` where another machine may have it, else not.

        Raises:
            LockedError: another process has it.
            OnebError: the lock cannot be written.
        """
        try:
            self._descriptor, has_flock = _open(self._path, _PATIENCE_S)
            try:
                self._take(has_flock)
            except BaseException:
                self._close()
                raise
        except BlockingIOError:
            raise _locked(self._path, _read(self._path), self._here) from None
        except OSError as error:
            raise _unwritable(self._path, error) from error
        self._wake = os.pipe()
        _close_in_children(self)
        self._thread = threading.Thread(target=self._beat, name="lock-heartbeat", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the directory back at once. The file stays: whoever has it open already would lock nothing."""
        if self._descriptor is None:
            return
        os.close(self._wake[1])  # ends the beats
        self._thread.join(timeout=5.0)
        if self._thread.is_alive():
            return  # the disk does not answer; the lock goes with the process
        os.close(self._wake[0])
        self._wake = None  # a child that is forked later must not close what has these numbers then
        with contextlib.suppress(OSError):
            if not self._other():
                os.ftruncate(self._descriptor, 0)
        self._close()

    def check(self) -> None:
        """Look whether this process still has the directory; to be asked before anything there is replaced.

        Raises:
            LockedError: another one took it, since nothing had been heard of this one.
        """
        if self._descriptor is not None and not self.lost:
            with self._turn, contextlib.suppress(OSError):  # a disk that does not answer is the saver's business
                self._note(self._other())
        if self.lost:
            raise LockedError(self.lost)

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    # ---- taking it

    def _take(self, has_flock: bool) -> None:
        """Write our name into the file, once nobody else's counts."""
        took_over = self._watch(has_flock)
        self._write()
        if took_over or not has_flock:
            time.sleep(min(_SETTLE_S, self._stale_s / 2))
            if other := self._other():
                raise _locked(self._path, other, self._here)

    def _watch(self, has_flock: bool) -> bool:
        """Wait until the holder that the file names has ended, if that is not known; whether that took a while."""
        first = _read(self._path)
        holder = _Holder.parse(first)
        if not first or has_flock and holder and holder.machine.is_same(self._here):
            return False  # flock says that the process has ended
        who = holder.described(self._here) if holder else "a process that cannot be told"
        self._say(f"[note] {self._directory} is locked by {who}; watching for {self._stale_s:g}s whether it is alive")
        began = time.monotonic()
        while True:
            time.sleep(min(1.0, self._beat_s / 4))
            waited = time.monotonic() - began  # before the look: this process may have been stopped in between
            now = _read(self._path)
            if not now:
                return True
            if now != first:
                raise _locked(self._path, now, self._here)
            if waited >= self._stale_s:
                self._say(f"[note] nothing was heard of it for {waited:.0f}s: its lock is taken over")
                return True

    # ---- keeping it

    def _beat(self) -> None:
        # Not an Event: with Python 3.10 its waits follow the wall clock.
        poll = select.poll()
        poll.register(self._wake[0])
        while not poll.poll(self._beat_s * 1000):
            try:
                with self._turn:
                    self._keep()
            except OSError:  # the disk is full or does not answer; the next beat may arrive
                continue
            if self.lost:
                self._say(f"[warning] {self.lost}")
                return

    def _keep(self) -> None:
        """One beat; or the directory is found to be another's."""
        if self.lost:
            return
        try:
            self._note(self._other())
            is_there = _is_at(self._descriptor, self._path)
            if not is_there and not self.lost:  # somebody deleted it
                descriptor, _ = _open(self._path, 0.0)
                self._descriptor, old = descriptor, self._descriptor
                os.close(old)
                self._note(self._other())
        except BlockingIOError:
            self._note(_read(self._path) or b"?")
        if not self.lost:
            self._write()

    def _other(self) -> bytes:
        """What the file says, if that is another process's name; else nothing."""
        body = _read(self._path)
        holder = _Holder.parse(body)
        return body if holder and holder.identity != self._identity else b""

    def _note(self, other: bytes) -> None:
        if not other:
            return
        holder = _Holder.parse(other)
        who = holder.described(self._here) if holder else "another process"
        self.lost = (f"{self._directory} was taken over by {who}: nothing was heard of this process for a while (was "
                     "it paused, or did the disk not answer?). It stops, and leaves the directory to the other")

    def _write(self) -> None:
        self._beats += 1
        body = json.dumps({
            "host": _plain(self._here.host).encode("ascii", "replace").decode(), "boot": self._here.boot,
            "pid": os.getpid(), "started": self._started, "beats": self._beats, "id": self._identity,
        })
        _write_all(self._descriptor, (body.ljust(_BODY_BYTES - 1) + "\n").encode("ascii"))

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _forget(self) -> None:
        """In a forked child: an open descriptor would keep the lock beyond the end of its holder."""
        if self._wake:
            for end in self._wake:
                with contextlib.suppress(OSError):
                    os.close(end)
            self._wake = None
        self._close()


def check_unlocked(directory: Path) -> None:
    """Ask, before much is done for a run, whether another process of this machine has its directory.

    Of another machine's processes :meth:`RunLock.acquire` finds out.

    Raises:
        OnebError: it has, or the lock could not be written.
    """
    path = directory / NAME
    try:
        os.close(_open(path, _PATIENCE_S, create=False)[0])
    except FileNotFoundError:
        return
    except BlockingIOError:
        raise _locked(path, _read(path), this_machine()) from None
    except OSError as error:
        raise _unwritable(path, error) from error


def _locked(path: Path, body: bytes, here: Machine) -> LockedError:
    holder = _Holder.parse(body)
    who = f" ({holder.described(here)})" if holder else ""
    return LockedError(f"another process is training in {path.parent}{who}; wait for it or stop it, or choose "
                       "another --tag or --seed")


def _unwritable(path: Path, error: OSError) -> OnebError:
    return OnebError(f"{path} cannot be written ({error.strerror}), and a run must be able to lock its directory; make "
                     "that possible, or choose another --run-root")


# ---- the file

def _open(path: Path, patience_s: float, create: bool = True) -> tuple[int, bool]:
    """The lock file's descriptor, and whether it has the flock; not, where the file system knows none.

    Raises:
        BlockingIOError: another process has it, and keeps it for ``patience_s``.
        OSError: the file cannot be opened for writing.
    """
    import fcntl  # not on every system that plans runs

    began = time.monotonic()
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o666)
        held = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            has_flock = True
        except OSError as error:
            has_flock, held = False, error.errno in _HELD
            if not held and error.errno not in _NO_FLOCK:
                os.close(descriptor)
                raise
        # Somebody may have deleted the file in between; a new one would then be locked by the next process.
        if not held and _is_at(descriptor, path):
            return descriptor, has_flock
        os.close(descriptor)
        if held and time.monotonic() - began >= patience_s:
            raise BlockingIOError(errno.EWOULDBLOCK, "held")
        time.sleep(0.02)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _read(path: Path) -> bytes:
    """The lock file's content, opened anew: network file systems look at the server then. Nothing if there is none."""
    try:
        with open(path, "rb") as file:
            return file.read(_MOST_BYTES)
    except FileNotFoundError:
        return b""


def _write_all(descriptor: int, body: bytes) -> None:
    if os.pwrite(descriptor, body, 0) < len(body):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(descriptor, len(body))
    with contextlib.suppress(OSError):  # who cannot see it has not heard a beat
        os.fsync(descriptor)


def _close_in_children(lock: RunLock) -> None:
    reference = weakref.ref(lock)

    def close() -> None:
        if (held := reference()) is not None:
            held._forget()

    os.register_at_fork(after_in_child=close)
