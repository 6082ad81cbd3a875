"""Child processes of the bench: one at a time on each GPU, each with a time limit, none left behind."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

Task = TypeVar("Task")
_LOG_LINES = 25
_GRACE_S = 10.0  # between asking a child to end and ending it


class Children:
    """Runs commands as children, so that whatever ends this process's work ends theirs.

    Args:
        timeout_s: how long each may take.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._live: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, words: Sequence[str], environment: Mapping[str, str], log: Path) -> str | None:
        """Run ``words`` with their output in ``log``; returns what went wrong, or None."""
        with open(log, "wb") as output:
            with self._lock:
                if self._stopped:
                    return "stopped before it began"
                # A session of its own: compile workers that it starts end with it.
                child = subprocess.Popen(words, env=dict(environment), stdout=output, stderr=subprocess.STDOUT,
                                         stdin=subprocess.DEVNULL, start_new_session=True)
                self._live.add(child)
            try:
                code = child.wait(self.timeout_s)
            except subprocess.TimeoutExpired:
                self._end(child)
                return f"took more than {self.timeout_s:g} s (--timeout)"
            finally:
                with self._lock:
                    self._live.discard(child)
        if code == 0:
            return None
        how = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
        lines = tail(log)
        return f"{how}: {lines[-1].removeprefix('error: ')}" if lines else how

    def stop(self) -> None:
        """End every child, and start no other."""
        with self._lock:
            self._stopped = True
            live = list(self._live)
        for child in live:
            self._end(child)

    @staticmethod
    def _end(child: subprocess.Popen) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_GRACE_S)
                if number == signal.SIGKILL:
                    return


def tail(log: Path) -> list[str]:
    """The last lines of a log that are not empty."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.rstrip() for line in lines if line.strip()][-_LOG_LINES:]


def spread(tasks: Sequence[Task], places: Sequence[Mapping[str, str]], work: Callable[[Task, Mapping[str, str]], None],
           children: Children) -> None:
    """Do ``work(task, place)`` for every task in order, each place (a GPU's environment) with one task at a time.

    If this is interrupted, or a task's work raises, the children are stopped before the exception goes on.
    """
    free: queue.Queue[Mapping[str, str]] = queue.Queue()
    for place in places:
        free.put(place)

    def at_a_free_place(task: Task) -> None:
        place = free.get()
        try:
            work(task, place)
        finally:
            free.put(place)

    with ThreadPoolExecutor(len(places)) as pool:
        futures = [pool.submit(at_a_free_place, task) for task in tasks]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()
            raise
