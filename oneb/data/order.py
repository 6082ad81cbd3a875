"""Which tokens a step reads: a pure function of (training tokens, seed, step, schedule, batch).

The training tokens are cut into chunks as long as the longest sequence of the schedule. Chunks are
visited in a pseudo-random order that is new each epoch, and a phase with shorter sequences reads a
chunk window by window over consecutive steps. So no window is used twice in an epoch, a phase
change included, and nothing depends on how many steps the run will have, nor on how a step's
sequences are divided over micro-batches and GPUs.

Data that arrives shard by shard is read so, too: its chunks lie within the shards, the order is pseudo-random within
each, and the shards come one after the other, in every epoch and also when all of them are there. What a step reads
then depends on the sizes of the shards, which are known beforehand, and not on when they come.

A run that went wrong goes back to a checkpoint and passes over the batches at which it did, as PaLM's
did (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1). Such skips are part of the schedule, so
that the order stays a pure function.

The order must never change between versions of numpy, so it rests on integer arithmetic given
here: the splitmix64 finalizer as hash and a Feistel network as permutation.
"""

from __future__ import annotations

import bisect
import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from oneb.errors import OnebError

_FEISTEL_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, splitmix64's increment
_MASK_64 = 2**64 - 1
_GROUP_KEYS = 16  # behind what an epoch's own key is hashed with: 0 for the shift, then the rounds
_MAX_SKIPPED = 2**40  # batches, all skips together: far from overflowing int64 positions
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
        skips: ``(step, batches)``, in the order in which they were decided. From ``step`` to the end of its
            phase each step reads what, with the skips before this one alone, the step ``batches`` later would
            have read. Later phases begin behind all of that: what was passed over is not read in this epoch.
        groups: training tokens of each shard, where the data is read shard by shard; together ``n_train``.

    Raises:
        OnebError: if the training tokens (those of no group) do not fill one chunk, or ``skips`` are not what is
            written above.
    """

    n_train: int
    seed: int
    phases: tuple[tuple[int, int], ...]
    batch_sequences: tuple[int, ...]
    skips: tuple[tuple[int, int], ...] = ()
    groups: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.phases]
        assert starts[:1] == [0], self.phases
        assert starts == sorted(set(starts)), self.phases
        assert len(self.batch_sequences) == len(self.phases)
        assert min(*self.batch_sequences, *(seq_len for _, seq_len in self.phases)) > 0
        assert not self.groups or (sum(self.groups) == self.n_train and min(self.groups) > 0), self.groups
        if self.n_chunks < 1:
            raise OnebError(f"the training part of the data has {self.n_train} tokens; wanted at least "
                            f"{self.chunk_len + 1}, one sequence of length {self.chunk_len}. "
                            "Use more data or shorter sequences")
        wrong = [skip for skip in self.skips if not _is_skip(skip)]
        if wrong or sum(batches for _, batches in self.skips) > _MAX_SKIPPED:
            raise OnebError(f"skipped batches {(wrong or list(self.skips))[:3]}: wanted pairs (step from 0 on, batches "
                            f"from 1 on), {_MAX_SKIPPED} batches at most; the checkpoint that they are from is "
                            "damaged, resume from an older one")

    @cached_property
    def chunk_len(self) -> int:
        """L, the longest sequence of the schedule."""
        return max(seq_len for _, seq_len in self.phases)

    @cached_property
    def n_chunks(self) -> int:
        """Chunks an epoch; each reads L + 1 tokens, the last of them only as a target."""
        return int(self._chunk_bounds[-1])

    @cached_property
    def _chunk_bounds(self) -> np.ndarray:
        """int64 (groups + 1,): the chunks of an epoch before each group, and at last all of them."""
        chunks = [(n_tokens - 1) // self.chunk_len for n_tokens in self.groups or (self.n_train,)]
        return np.cumsum([0, *chunks], dtype=np.int64)

    def seq_len(self, step: int) -> int:
        """T at ``step``."""
        return self.phases[self._phase(step)][1]

    def offsets(self, step: int) -> np.ndarray:
        """int64 (B,): the token offset where each sequence of the step starts; it reads T + 1 tokens."""
        phase = self._phase(step)
        seq_len, sequences = self.phases[phase][1], self.batch_sequences[phase]
        group, window = divmod(self._batch(phase, step), self.chunk_len // seq_len)
        first = self._first_positions[phase] + group * sequences
        positions = first + np.arange(sequences, dtype=np.int64)
        return self._chunk_offsets(positions) + window * seq_len

    def epoch(self, step: int) -> float:
        """Epochs of the data read or passed over before ``step``, so also the epochs of a run of ``step`` steps."""
        phase = self._phase(step)
        chunks = self._batch(phase, step) * self.batch_sequences[phase] / (self.chunk_len // self.phases[phase][1])
        return (self._first_positions[phase] + chunks) / self.n_chunks

    def describe(self, step: int) -> str:
        """What a step reads, for logs: ``"8 sequences of 128 tokens, the first of them at token 162,367"``."""
        sequences = self.batch_sequences[self._phase(step)]
        return (f"{sequences:,} sequence{'s' * (sequences > 1)} of {self.seq_len(step):,} tokens, "
                f"the first of them at token {self.offsets(step)[0]:,}")

    def skipping(self, first_step: int, last_step: int) -> BatchOrder:
        """The order that from ``first_step`` on leaves out all that steps ``first_step .. last_step`` read in this one.

        What lies between those batches is left out with them: where they are of two phases, a little more than they.
        """
        assert 0 <= first_step <= last_step, (first_step, last_step)
        phase, last_phase = self._phase(first_step), self._phase(last_step)
        after = last_step + 1
        if last_phase != phase:
            windows = [self.chunk_len // seq_len for _, seq_len in self.phases]
            groups = self._batch(last_phase, last_step) // windows[last_phase] + 1
            end = self._first_positions[last_phase] + groups * self.batch_sequences[last_phase]
            # Steps in which this phase, were it longer, would only read chunks from position `end` on.
            batch = -(-(end - self._first_positions[phase]) // self.batch_sequences[phase]) * windows[phase]
            steps = range(first_step, self.phases[phase][0] + batch + 1)
            after = steps[bisect.bisect_left(steps, batch, key=lambda step: self._batch(phase, step))]
        return dataclasses.replace(self, skips=(*self.skips, (first_step, after - first_step)))

    def _phase(self, step: int) -> int:
        assert step >= 0, step
        return bisect.bisect_right(self.phases, step, key=lambda phase: phase[0]) - 1

    def _batch(self, phase: int, step: int) -> int:
        """Which of the phase's batches ``step`` reads, counted from 0 through those that are passed over."""
        for first, batches in self._phase_skips[phase]:
            if step >= first:
                step += batches
        return step - self.phases[phase][0]

    @cached_property
    def _phase_skips(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """The skips of each phase, the last decided first: its steps are those of the order with the others."""
        by_phase: list[list[tuple[int, int]]] = [[] for _ in self.phases]
        for first, batches in reversed(self.skips):
            by_phase[self._phase(first)].append((first, batches))
        return tuple(map(tuple, by_phase))

    @cached_property
    def _first_positions(self) -> tuple[int, ...]:
        """Chunk position, counted through all epochs, at which each phase starts: none opened before."""
        positions = [0]
        for phase, (next_start, _) in enumerate(self.phases[1:]):
            batches = self._batch(phase, next_start - 1) + 1
            groups = -(-batches // (self.chunk_len // self.phases[phase][1]))
            positions.append(positions[-1] + groups * self.batch_sequences[phase])
        return tuple(positions)

    def _chunk_offsets(self, positions: np.ndarray) -> np.ndarray:
        """int64 (B,) chunk positions -> the token offsets where those chunks start."""
        epochs, indices = np.divmod(positions, self.n_chunks)
        groups = np.searchsorted(self._chunk_bounds, indices, side="right") - 1
        offsets = np.empty_like(positions)
        for epoch, group in sorted(set(zip(epochs.tolist(), groups.tolist(), strict=True))):
            here = (epochs == epoch) & (groups == group)
            key = hash_ints(self.seed, epoch)
            if self.groups:
                key = hash_ints(key, _GROUP_KEYS + group)
            offsets[here] = self._offsets_within(group, indices[here] - self._chunk_bounds[group], key)
        return offsets

    def _offsets_within(self, group: int, indices: np.ndarray, key: int) -> np.ndarray:
        """The token offsets of a group's chunks (all data is one group, where there are none), shuffled by ``key``."""
        first, n_tokens = sum(self.groups[:group]), (self.groups or (self.n_train,))[group]
        n_chunks = int(self._chunk_bounds[group + 1] - self._chunk_bounds[group])
        slack = n_tokens - 1 - n_chunks * self.chunk_len  # tokens that fill no chunk
        shift = hash_ints(key, 0) % (slack + 1)  # so that cuts fall elsewhere each epoch
        return first + shift + permute(indices, n_chunks, key) * self.chunk_len


def _is_skip(skip: Any) -> bool:
    return isinstance(skip, tuple) and len(skip) == 2 and all(type(value) is int for value in skip) \
        and skip[0] >= 0 and skip[1] >= 1


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
