"""Checkpoints written by a thread of their own, from a copy in host memory that the steps hardly wait for.

Weights and optimizer state change in the optimizer's update and nowhere else. So the thread copies them while the next
step's forward and backward pass are computed, on a stream of its own, and only that step's update waits for the copy
(:meth:`CheckpointWriter.wait_copied`). Where the host has no memory for a copy, the file is written straight from the
tensors, and the update waits for that.
"""

from __future__ import annotations

import mmap
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oneb.checkpoints.checkpoint import save_checkpoint
from oneb.host_memory import available_bytes
from oneb.train.device import Device

_SPARE_BYTES = 2**30  # of host memory, that a copy must leave
Contents = dict[str, Any]


@dataclass(frozen=True)
class Written:
    """What became of a checkpoint.

    Attributes:
        path: where it was to be.
        step: optimizer steps that it has done.
        n_bytes: size of the file, or of the tensors in it.
        seconds: it took, from its turn on.
        error: why there is no such file; None if all is well.
        may_help: to try the same again.
    """

    path: Path
    step: int
    n_bytes: int
    seconds: float
    error: str | None = None
    may_help: bool = True


@dataclass(frozen=True)
class _Job:
    path: Path
    contents: Contents
    finite: Tensor
    then: Callable[[], None]
    ready: torch.cuda.Event | None
    copied: threading.Event


class CheckpointWriter:
    """Writes one checkpoint after another, each whole or absent. Use it as a context manager, or call ``close``.

    Args:
        device: where the tensors live.
        check: called by the thread before each write, which what it raises prevents.
    """

    def __init__(self, device: Device, check: Callable[[], None] = lambda: None) -> None:
        self._device = device
        self._check = check
        self._host = _HostCopy(device)
        self._jobs: queue.Queue[_Job | Callable[[], None] | None] = queue.Queue()
        self._results: queue.SimpleQueue[Written | BaseException] = queue.SimpleQueue()
        self._copied: threading.Event | None = None  # of what was submitted last
        self._thread: threading.Thread | None = None  # until there is something to do
        self._stream: torch.cuda.Stream | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written, or waits for its turn."""
        return self._jobs.unfinished_tasks > 0

    def reserve(self, contents: Contents) -> None:
        """Take the host memory for checkpoints like ``contents`` now, in the background."""
        self._put(lambda: self._host.reserve(contents))

    def submit(self, path: Path, contents: Contents, finite: Tensor, then: Callable[[], None]) -> None:
        """Write ``contents`` to ``path``, as ``save_checkpoint`` does; then call ``then``.

        Until :meth:`wait_copied` returns, no tensor of it may change; what changes at other times than weights and
        optimizer state must be a copy already. Checkpoints of one step share one copy.

        Args:
            finite: 0-dim bool; where it turns out to be False nothing is written.
            then: called by the thread once the file is whole.
        """
        ready = torch.cuda.Event() if self._device.is_cuda else None
        if ready:
            ready.record()
        self.wait_copied()
        self._copied = threading.Event()
        if self._host.holds(contents):
            self._copied.set()
        self._put(_Job(path, contents, finite, then, ready, self._copied))

    def wait_copied(self) -> float:
        """Wait until all that was submitted may change; returns the seconds that it took."""
        began = time.perf_counter()
        if self._copied:
            self._copied.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        """Wait until all that was submitted is on the disk, or has failed."""
        self._jobs.join()

    def forget(self) -> None:
        """The run has gone back: a step of this number is another one from now on."""
        self.wait()
        self._host.forget()

    def results(self) -> Iterator[Written]:
        """What has become of checkpoints since the last call.

        Raises:
            BaseException: what ended a write and does not come from the disk: a mistake of ours.
        """
        while not self._results.empty():
            result = self._results.get()
            if isinstance(result, BaseException):
                raise result
            yield result

    def close(self) -> None:
        """Finish what was submitted, and end the thread. Safe to call again."""
        if self._thread:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        self._host.free()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _put(self, job: _Job | Callable[[], None]) -> None:
        if self._thread is None:
            self._stream = torch.cuda.Stream(self._device.torch) if self._device.is_cuda else None
            self._thread = threading.Thread(target=self._work, name="oneb-checkpoint-writer", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    # ---- in the thread

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                with torch.cuda.stream(self._stream):
                    if isinstance(job, _Job):
                        self._results.put(self._write(job))
                    else:
                        job()
            except BaseException as error:  # fallback: raised in the loop's thread, by `results`
                self._results.put(error)
            finally:
                if isinstance(job, _Job):
                    job.copied.set()
                self._jobs.task_done()
        self._jobs.task_done()  # of the end, too: who waits after it must not wait for ever

    def _write(self, job: _Job) -> Written:
        began = time.monotonic()
        step, n_bytes, error, may_help = job.contents["step"], 0, None, True
        if job.ready:
            torch.cuda.current_stream().wait_event(job.ready)
        try:
            if job.finite.item():
                contents = self._host.copy(job.contents)
                if contents is not None:
                    job.copied.set()
                self._check()
                save_checkpoint(job.path, contents or job.contents)
                n_bytes = job.path.stat().st_size
                job.then()
            else:
                error, may_help = f"the weights of step {step} are not finite", False
        except OSError as failed:
            error = failed.strerror or str(failed)
        return Written(job.path, step, n_bytes, time.monotonic() - began, error, may_help)


class _HostCopy:
    """A checkpoint's tensors in host memory, which is kept for the next one. For one thread.

    Attributes:
        step: of what the memory holds; None before the first copy.
    """

    def __init__(self, device: Device) -> None:
        self.step: int | None = None
        self._device = device
        self._tensors: dict[str, Tensor] = {}  # by place in the checkpoint
        self._current: set[str] = set()  # those that hold values of `step`
        self._registered: list[int] = []

    def holds(self, contents: Contents) -> bool:
        """Whether all of ``contents`` is here: a copy without optimizer state is none of a checkpoint with it."""
        return self.step == contents["step"] and self._current.issuperset(place for place, _ in tensors_of(contents))

    def reserve(self, contents: Contents) -> bool:
        """Take the memory for tensors like those of ``contents``; False where there is not enough."""
        missing = {place: tensor for place, tensor in tensors_of(contents) if not self._fits(place, tensor)}
        if not missing:
            return True
        available = available_bytes()
        if available is not None and sum(t.nbytes for t in missing.values()) + _SPARE_BYTES > available:
            return False
        try:
            for place, tensor in missing.items():
                self._tensors[place] = self._new(tensor)
        except OSError:  # fallback: a limit that available_bytes knows nothing of
            return False
        return True

    def copy(self, contents: Contents) -> Contents | None:
        """``contents`` with its tensors in host memory; None where there is no room for them."""
        if not self.reserve(contents):
            return None
        if self.step != contents["step"]:
            self._current.clear()
        for place, tensor in tensors_of(contents):
            if place not in self._current:
                self._tensors[place].copy_(tensor, non_blocking=True)
                self._current.add(place)
        if self._device.is_cuda:
            torch.cuda.current_stream().synchronize()
        self.step = contents["step"]
        return _with_tensors(contents, self._tensors)

    def forget(self) -> None:
        """Nothing that is here is of any step."""
        self.step = None
        self._current.clear()

    def free(self) -> None:
        """Give the memory back."""
        self.forget()
        for address in self._registered:
            torch.cuda.cudart().cudaHostUnregister(address)  # where it fails, CUDA has failed before, and was heard
        self._registered.clear()
        self._tensors.clear()

    def _fits(self, place: str, tensor: Tensor) -> bool:
        here = self._tensors.get(place)
        return here is not None and (here.shape, here.dtype) == (tensor.shape, tensor.dtype)

    def _new(self, tensor: Tensor) -> Tensor:
        if tensor.numel() == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        # Pages of its own, so that they can be page-locked: torch's own pinned memory comes in powers of two.
        memory = torch.frombuffer(mmap.mmap(-1, tensor.nbytes), dtype=tensor.dtype).view(tensor.shape)
        # The code is an enumeration's member, which is true whatever it says.
        if self._device.is_cuda and int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0:
            self._registered.append(memory.data_ptr())
        return memory


def tensors_of(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested containers, with its place in them."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from tensors_of(entry, f"{place}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from tensors_of(entry, f"{place}/{index}")


def _with_tensors(value: Any, tensors: dict[str, Tensor], place: str = "") -> Any:
    """``value`` with the tensors of those places instead of its own."""
    if isinstance(value, Tensor):
        return tensors[place]
    if isinstance(value, dict):
        return {key: _with_tensors(entry, tensors, f"{place}/{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_tensors(entry, tensors, f"{place}/{index}") for index, entry in enumerate(value))
    return value
