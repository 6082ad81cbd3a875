"""Which tokens a step reads: a pure function of (training tokens, seed, step, schedule, batch).

The training tokens are cut into chunks as long as the longest sequence of the schedule. Chunks are
visited in a pseudo-random order that is new each epoch, and a phase with shorter sequences reads a
chunk window by window over consecutive steps. So no window is used twice in an epoch, a phase
change included, and nothing depends on how many steps the run will have, nor on how a step's
sequences are divided over micro-batches and GPUs.

The order must never change between versions of numpy, so it rests on integer arithmetic given
here: the splitmix64 finalizer as hash and a Feistel network as permutation.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from oneb.errors import OnebError

_FEISTEL_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, splitmix64's increment
_MASK_64 = 2**64 - 1
_Uint64 = TypeVar("_Uint64", int, np.ndarray)


def split_tokens(n_tokens: int) -> tuple[int, int]:
    """``(n_train, n_val)``: validation is the tail, 1% of the data within sensible bounds.

    At most 10M tokens; of small data 131,072 tokens but never more than a tenth.
    """
    n_val = min(10_000_000, max(n_tokens // 100, min(131_072, n_tokens // 10)))
    return n_tokens - n_val, n_val


def eval_offsets(n_train: int, n_val: int, seq_len: int, eval_tokens: int) -> np.ndarray:
    """Where the evaluation windows start: contiguous, from the start of the validation tail.

    Args:
        eval_tokens: targets to predict, rounded up to whole windows and limited to what there is.

    Returns:
        int64 (n_windows,) offsets; a window reads seq_len + 1 tokens (the last one only as target).

    Raises:
        OnebError: if the validation tail is shorter than one window.
    """
    available = (n_val - 1) // seq_len
    if available < 1:
        raise OnebError(f"the validation tail has {n_val} tokens; wanted at least {seq_len + 1}, one window "
                        f"of sequence length {seq_len}. Use more data (its last 1% to 10% is for validation) "
                        "or shorter sequences")
    wanted = max(1, -(-eval_tokens // seq_len))
    return n_train + np.arange(min(wanted, available), dtype=np.int64) * seq_len


@dataclass(frozen=True)
class BatchOrder:
    """The offsets of every step's sequences.

    Args:
        n_train: training tokens; they are the first of the data.
        seed: any integer.
        phases: ``(start_step, seq_len)``, sorted, the first at step 0.
        batch_sequences: B of each phase, sequences a step over all micro-batches and GPUs.

    Raises:
        OnebError: if the training tokens do not fill one chunk.
    """

    n_train: int
    seed: int
    phases: tuple[tuple[int, int], ...]
    batch_sequences: tuple[int, ...]

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.phases]
        assert starts[:1] == [0], self.phases
        assert starts == sorted(set(starts)), self.phases
        assert len(self.batch_sequences) == len(self.phases)
        assert min(*self.batch_sequences, *(seq_len for _, seq_len in self.phases)) > 0
        if self.n_chunks < 1:
            raise OnebError(f"the training part of the data has {self.n_train} tokens; wanted at least "
                            f"{self.chunk_len + 1}, one sequence of length {self.chunk_len}. "
                            "Use more data or shorter sequences")

    @cached_property
    def chunk_len(self) -> int:
        """L, the longest sequence of the schedule."""
        return max(seq_len for _, seq_len in self.phases)

    @cached_property
    def n_chunks(self) -> int:
        """Chunks an epoch; each reads L + 1 tokens, the last of them only as a target."""
        return (self.n_train - 1) // self.chunk_len

    def seq_len(self, step: int) -> int:
        """T at ``step``."""
        return self.phases[self._phase(step)][1]

    def offsets(self, step: int) -> np.ndarray:
        """int64 (B,): the token offset where each sequence of the step starts; it reads T + 1 tokens."""
        phase = self._phase(step)
        start_step, seq_len = self.phases[phase]
        group, window = divmod(step - start_step, self.chunk_len // seq_len)
        sequences = self.batch_sequences[phase]
        first = self._first_positions[phase] + group * sequences
        positions = first + np.arange(sequences, dtype=np.int64)
        return self._chunk_offsets(positions) + window * seq_len

    def epoch(self, step: int) -> float:
        """Epochs of the data consumed before ``step``, so also the epochs of a run of ``step`` steps."""
        phase = self._phase(step)
        start_step, seq_len = self.phases[phase]
        chunks = (step - start_step) * self.batch_sequences[phase] / (self.chunk_len // seq_len)
        return (self._first_positions[phase] + chunks) / self.n_chunks

    def _phase(self, step: int) -> int:
        assert step >= 0, step
        return bisect.bisect_right(self.phases, step, key=lambda phase: phase[0]) - 1

    @cached_property
    def _first_positions(self) -> tuple[int, ...]:
        """Chunk position, counted through all epochs, at which each phase starts: none opened before."""
        positions = [0]
        for (start, seq_len), (next_start, _), sequences in zip(
            self.phases, self.phases[1:], self.batch_sequences, strict=False
        ):
            groups = -(-(next_start - start) // (self.chunk_len // seq_len))
            positions.append(positions[-1] + groups * sequences)
        return tuple(positions)

    def _chunk_offsets(self, positions: np.ndarray) -> np.ndarray:
        """int64 (B,) chunk positions -> the token offsets where those chunks start."""
        epochs, indices = np.divmod(positions, self.n_chunks)
        slack = self.n_train - 1 - self.n_chunks * self.chunk_len  # tokens that fill no chunk
        offsets = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            key = hash_ints(self.seed, epoch)
            shift = hash_ints(key, 0) % (slack + 1)  # so that cuts fall elsewhere each epoch
            offsets[here] = shift + permute(indices[here], self.n_chunks, key) * self.chunk_len
        return offsets


def permute(indices: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a pseudo-random permutation of ``range(n)``, chosen by ``key``, sends each index.

    A balanced Feistel network on the smallest even number of bits that holds n - 1; a value that
    lands outside range(n) goes through again until it lands inside (cycle walking, Black and
    Rogaway 2002), fewer than 4 passes on average. O(len(indices)) memory whatever n is.

    Args:
        indices: int64, each in [0, n).

    Returns:
        int64, same shape, each in [0, n).
    """
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    values = _feistel(indices.astype(np.uint64), half_bits, key)
    while (outside := values >= n).any():
        values[outside] = _feistel(values[outside], half_bits, key)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: int, key: int) -> np.ndarray:
    mask = 2**half_bits - 1
    left, right = values >> half_bits, values & mask
    for number in range(1, _FEISTEL_ROUNDS + 1):
        left, right = right, left ^ (_mix(right + hash_ints(key, number)) & mask)
    return (left << half_bits) | right


def hash_ints(first: int, second: int) -> int:
    """A 64-bit hash of two integers (each taken modulo 2**64): splitmix64's finalizer over both."""
    state = _mix((first + _GOLDEN) & _MASK_64)
    return _mix((state + (second + 1) * _GOLDEN) & _MASK_64)


def _mix(value: _Uint64) -> _Uint64:
    """The splitmix64 finalizer (Steele, Lea and Flood, OOPSLA 2014) of an integer or of a uint64 array."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK_64
    return value ^ (value >> 31)
