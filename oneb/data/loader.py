"""Batches on the host, gathered ahead of the step that needs them."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from oneb.data.order import BatchOrder
from oneb.data.tokens import Tokens, bad_id_error, first_bad_id

if TYPE_CHECKING:
    import torch

_POLL_S = 0.1  # how often a full queue looks whether the loader was closed
_WAITING_S = 1.0  # how often a wait for a batch is told of
_CLOSE_S = 5.0  # a thread that waits longer than this for its disk is left to itself
# They are the main thread's: one that arrived here would leave it asleep where it waits for a batch.
_NOT_HERE = {signal.SIGINT, signal.SIGTERM} | ({signal.SIGHUP} if hasattr(signal, "SIGHUP") else set())


class Batch(NamedTuple):
    """One optimizer step's sequences."""

    step: int
    tokens: torch.Tensor  # int32 (B, T + 1): inputs are [:, :-1], targets [:, 1:]
    seq_len: int  # T


class _Failure(NamedTuple):
    """What went wrong in the thread, to be raised in the caller at the step concerned."""

    error: BaseException


class BatchLoader:
    """The batches of steps ``start_step`` to ``total_steps - 1``, in order, gathered by a background thread.

    Resuming is starting at another ``start_step``: a batch depends only on (data, order, step).

    Args:
        vocab_size: every id is checked to lie in [0, vocab_size) before it reaches a GPU.
        prefetch: batches gathered ahead.
        pin_memory: page-locked tensors, for copies to a GPU that overlap with its work.
        rows: which of a step's B sequences this process takes; all of them by default.

    Use it as a context manager, or call ``close``.
    """

    def __init__(self, tokens: Tokens, order: BatchOrder, *, vocab_size: int, start_step: int,
                 total_steps: int, prefetch: int = 2, pin_memory: bool = False,
                 rows: slice = slice(None)) -> None:
        assert prefetch > 0, prefetch
        self.wait_seconds = 0.0  # how long the last `next` waited for its batch
        self._tokens, self._order, self._vocab_size = tokens, order, vocab_size
        self._steps = range(start_step, total_steps)
        self._pin_memory, self._rows = pin_memory, rows
        self._ready: queue.Queue[Batch | _Failure | None] = queue.Queue(maxsize=prefetch)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="oneb-batch-loader", daemon=True)
        self._thread.start()

    def next(self, waiting: Callable[[float], None] = lambda seconds: None) -> Batch:
        """The next step's batch.

        Args:
            waiting: called about once a second while it is not there, with the seconds since this call.

        Raises:
            OnebError: if the batch holds an id outside the vocabulary, or a file became shorter or cannot be read
                any more, naming file and token offset.
            StopIteration: after the last step.
            RuntimeError: if the loader was closed.
        """
        if self._closed.is_set():
            raise RuntimeError("the batch loader was closed")
        started = time.perf_counter()
        while True:
            try:
                item = self._ready.get(timeout=_WAITING_S)
                break
            except queue.Empty:
                waiting(time.perf_counter() - started)
        self.wait_seconds = time.perf_counter() - started
        if isinstance(item, Batch):
            return item
        self.close()  # nothing follows, and a further `next` must not wait for it
        if isinstance(item, _Failure):
            raise item.error
        raise StopIteration

    __next__ = next

    def __iter__(self) -> Iterator[Batch]:
        return self

    def close(self) -> None:
        """Stop the thread, and wait for it unless its disk hangs. Safe to call again."""
        self._closed.set()
        self._thread.join(_CLOSE_S)

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _produce(self) -> None:
        if hasattr(signal, "pthread_sigmask"):  # not on Windows
            signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_HERE)
        try:
            for step in self._steps:
                seq_len = self._order.seq_len(step)
                offsets = self._order.offsets(step)[self._rows]
                if not self._tokens.wait_for(offsets.tolist(), seq_len + 1, self._closed.is_set):
                    return
                batch = gather(self._tokens, offsets, seq_len, self._vocab_size, self._pin_memory)
                if not self._put(Batch(step, batch, seq_len)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(_Failure(error))

    def _put(self, item: Batch | _Failure | None) -> bool:
        """Hand over ``item``; False if the loader was closed meanwhile."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False


def gather(tokens: Tokens, offsets: np.ndarray, seq_len: int, vocab_size: int,
           pin_memory: bool = False) -> torch.Tensor:
    """int32 (len(offsets), seq_len + 1): the tokens from each offset on.

    Raises:
        OnebError: at an id outside [0, vocab_size), naming file and token offset; on a GPU it would
            be a failed assertion without either, and the end of the process.
    """
    import torch

    ids = np.empty((len(offsets), seq_len + 1), tokens.dtype)
    starts = offsets.tolist()
    tokens.expect(starts, seq_len + 1)
    for row, offset in zip(ids, starts, strict=True):
        tokens.read_into(row, offset)
    bad = first_bad_id(ids.reshape(-1), vocab_size)
    if bad is not None:
        row, place = divmod(bad, seq_len + 1)
        raise bad_id_error(*tokens.locate(int(offsets[row]) + place), int(ids[row, place]), vocab_size)
    batch = torch.empty(ids.shape, dtype=torch.int32, pin_memory=pin_memory)
    batch.numpy()[:] = ids
    return batch


def eval_batches(tokens: Tokens, offsets: np.ndarray, seq_len: int, rows: int,
                 vocab_size: int) -> Iterator[torch.Tensor]:
    """int32 (rows, seq_len + 1) tensors that cover ``offsets`` in order; the last may have fewer rows.

    Raises:
        OnebError: as ``gather``.
    """
    for start in range(0, len(offsets), rows):
        yield gather(tokens, offsets[start:start + rows], seq_len, vocab_size)
