"""The batch order: each property of the specification, against windows counted one by one."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oneb.data.order import BatchOrder, eval_offsets, permute, split_tokens
from oneb.errors import OnebError

SEQ_LENS = st.sampled_from([1, 3, 4, 8, 12, 16])


@st.composite
def orders(draw, min_train: int = 17) -> BatchOrder:
    gaps = draw(st.lists(st.integers(1, 12), max_size=3))
    starts = np.cumsum([0, *gaps]).tolist()
    return BatchOrder(n_train=draw(st.integers(min_train, 2000)), seed=draw(st.integers(-2**70, 2**70)),
                      phases=tuple((start, draw(SEQ_LENS)) for start in starts),
                      batch_sequences=tuple(draw(st.integers(1, 7)) for _ in starts))


def sequences_at(order: BatchOrder, step: int) -> int:
    """B of the phase that ``step`` is in."""
    return [b for (start, _), b in zip(order.phases, order.batch_sequences, strict=True) if start <= step][-1]


def windows(order: BatchOrder, steps: int) -> list[tuple[int, int]]:
    """(first, last + 1) token read as input by each sequence of the first ``steps`` steps."""
    return [(offset, offset + order.seq_len(step))
            for step in range(steps) for offset in order.offsets(step).tolist()]


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(n, key):
    assert sorted(permute(np.arange(n), n, key).tolist()) == list(range(n))


def test_permutation_of_a_huge_range_needs_only_its_inputs():
    n = 10**13 + 7
    inputs = np.arange(n - 1000, n)
    outputs = permute(inputs, n, 5)
    assert len(set(outputs.tolist())) == 1000
    assert outputs.min() >= 0
    assert outputs.max() < n
    # one by one or together is the same
    assert [int(permute(inputs[i:i + 1], n, 5)[0]) for i in range(5)] == outputs[:5].tolist()


def test_permutation_looks_random():
    n = 10_000
    outputs = permute(np.arange(n), n, key=3)
    # Neighbours are independent: the correlation of n pairs has standard deviation 1/sqrt(n).
    assert abs(np.corrcoef(np.arange(n), outputs)[0, 1]) < 5 / np.sqrt(n)
    assert abs(np.corrcoef(outputs[:-1], outputs[1:])[0, 1]) < 5 / np.sqrt(n)
    assert np.count_nonzero(outputs == np.arange(n)) < 10  # fixed points: Poisson(1)
    # Each tenth of the inputs lands evenly over the tenths of the outputs (chi-squared, 81 degrees of
    # freedom).
    counts = np.histogram2d(np.arange(n), outputs, bins=10)[0]
    assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 140


@given(order=orders())
def test_reads_stay_inside_the_training_tokens(order):
    for step in range(60):
        offsets = order.offsets(step)
        assert offsets.dtype == np.int64
        assert offsets.shape == (sequences_at(order, step),)
        assert offsets.min() >= 0
        assert offsets.max() + order.seq_len(step) + 1 <= order.n_train


@settings(max_examples=200)
@given(order=orders(min_train=200))
def test_no_token_is_used_twice_within_an_epoch_over_phase_changes(order):
    seen = Counter()
    for first, end in windows(order, _steps_within_first_epoch(order, 100)):
        seen.update(range(first, end))
    assert max(seen.values(), default=1) == 1


def _steps_within_first_epoch(order: BatchOrder, limit: int) -> int:
    """Steps whose chunks all lie in epoch 0, from the rule for positions written out anew."""
    opened, chunk_len = 0, max(t for _, t in order.phases)
    for index, (start, seq_len) in enumerate(order.phases):
        end = order.phases[index + 1][0] if index + 1 < len(order.phases) else limit
        per_chunk = chunk_len // seq_len
        for step in range(start, min(end, limit)):
            if (step - start) % per_chunk == 0:
                opened += order.batch_sequences[index]
            if opened > (order.n_train - 1) // chunk_len:
                return step
    return limit


@given(n_train=st.integers(17, 500), seed=st.integers(0, 9), seq_len=st.sampled_from([4, 8, 16]))
def test_one_epoch_reads_every_chunk_exactly_once(n_train, seed, seq_len):
    order = BatchOrder(n_train, seed, ((0, seq_len), (10**9, 16)), batch_sequences=(1, 1))
    n_chunks = (n_train - 1) // 16
    read = sorted(windows(order, n_chunks * 16 // seq_len))
    shift = read[0][0]
    assert 0 <= shift <= (n_train - 1) % 16
    assert read == [(shift + i * seq_len, shift + (i + 1) * seq_len) for i in range(n_chunks * 16 // seq_len)]


def test_a_batch_that_straddles_epochs_takes_from_both():
    order = BatchOrder(n_train=5 * 8 + 1, seed=1, phases=((0, 8),), batch_sequences=(3,))
    drawn = np.concatenate([order.offsets(step) for step in range(10)]) // 8
    for epoch in range(6):
        assert sorted(drawn[epoch * 5:epoch * 5 + 5].tolist()) == [0, 1, 2, 3, 4]


def test_epochs_and_seeds_differ():
    def epoch_order(seed: int, epoch: int) -> tuple[int, ...]:
        order = BatchOrder(n_train=100 * 8 + 6, seed=seed, phases=((0, 8),), batch_sequences=(100,))
        return tuple(order.offsets(epoch).tolist())

    assert len({epoch_order(seed, epoch) for seed in range(10) for epoch in range(10)}) == 100
    assert len({min(epoch_order(0, epoch)) for epoch in range(30)}) > 2  # the cuts shift too


@given(order=orders(), extra=st.tuples(st.integers(1, 50), SEQ_LENS))
def test_later_phases_that_are_not_longer_change_nothing_before_them(order, extra):
    gap, seq_len = extra
    last = order.phases[-1][0]
    longest = max(t for _, t in order.phases)
    longer = BatchOrder(order.n_train, order.seed, (*order.phases, (last + gap, min(seq_len, longest))),
                        (*order.batch_sequences, 3))
    for step in range(last + gap):
        assert np.array_equal(order.offsets(step), longer.offsets(step))


@given(order=orders(), data=st.data())
def test_a_step_is_a_pure_function(order, data):
    again = BatchOrder(order.n_train, order.seed, order.phases, order.batch_sequences)
    steps = data.draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
    forwards = [order.offsets(step).tolist() for step in steps]
    assert [again.offsets(step).tolist() for step in reversed(steps)] == forwards[::-1]


@given(order=orders(), factor=st.integers(2, 4))
def test_a_batch_is_the_same_sequences_as_several_smaller_ones(order, factor):
    """Row b of a step is position c0 + g*B + b, so with one phase a larger batch is a plain regrouping."""
    seq_len = max(t for _, t in order.phases)
    first = order.batch_sequences[0]
    small = BatchOrder(order.n_train, order.seed, ((0, seq_len),), (first,))
    large = BatchOrder(order.n_train, order.seed, ((0, seq_len),), (first * factor,))
    parts = [small.offsets(step) for step in range(3 * factor, 4 * factor)]
    assert np.array_equal(np.concatenate(parts), large.offsets(3))


def test_epoch_counts_tokens():
    order = BatchOrder(n_train=100 * 16 + 1, seed=0, phases=((0, 4), (8, 16)), batch_sequences=(5, 5))
    assert order.epoch(0) == 0
    assert order.epoch(4) == 0.05  # 4 steps x 5 sequences x 4 tokens of 1600
    assert order.epoch(8) == 0.10
    assert order.epoch(8 + 18) == 1.0


def test_the_order_never_changes():
    """Old runs must resume on the same tokens: a change here breaks them all."""
    order = BatchOrder(n_train=1_000_000, seed=1337, phases=((0, 128), (10, 512)), batch_sequences=(8, 8))
    digest = hashlib.sha256()
    for step in (0, 1, 9, 10, 11, 400, 10**6):
        digest.update(order.offsets(step).astype("<i8").tobytes())
    assert order.offsets(0).tolist() == [162367, 814655, 807487, 467519, 115775, 911935, 423487, 546367]
    assert digest.hexdigest()[:16] == "0f5184b5aa5b3658"


# ---- batches passed over after a rollback


@st.composite
def skipping_orders(draw, max_skips: int = 4) -> BatchOrder:
    order = draw(orders(min_train=200))
    skips = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=max_skips))
    return dataclasses.replace(order, skips=tuple(skips))


@given(order=skipping_orders())
def test_no_token_is_used_twice_within_an_epoch_whatever_is_skipped(order):
    endless = dataclasses.replace(order, n_train=10**6)  # so many tokens that all of it is the first epoch
    seen = Counter()
    for step in range(60):
        if endless.epoch(step + 1) > 1:
            break
        for offset in endless.offsets(step).tolist():
            seen.update(range(offset, offset + endless.seq_len(step)))
    assert step == 59
    assert max(seen.values()) == 1


@given(order=orders(), data=st.data())
def test_steps_before_a_skip_are_unchanged_and_later_ones_read_what_would_have_come(order, data):
    step, batches = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 30))
    skipping = dataclasses.replace(order, skips=((step, batches),))
    for before in range(step):
        assert np.array_equal(skipping.offsets(before), order.offsets(before))
        assert skipping.epoch(before) == order.epoch(before)
    # Its phase, and the same phase of an order in which it lasts longer: what "later" means at its end.
    number = max(n for n, (start, _) in enumerate(order.phases) if start <= step)
    ends = [start for start, _ in order.phases[1:]] + [step + 20]
    longer = BatchOrder(order.n_train, order.seed, order.phases[:number + 1], order.batch_sequences[:number + 1])
    if longer.chunk_len != order.chunk_len:
        return  # a later phase decides the chunks
    for after in range(step, ends[number]):
        assert np.array_equal(skipping.offsets(after), longer.offsets(after + batches))


@given(order=orders(), data=st.data())
def test_later_phases_begin_where_they_would_had_the_phase_lasted_longer(order, data):
    step, batches = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 30))
    skipping = dataclasses.replace(order, skips=((step, batches),))
    number = max(n for n, (start, _) in enumerate(order.phases) if start <= step)
    moved = tuple((start + batches * (n > number), seq_len) for n, (start, seq_len) in enumerate(order.phases))
    longer = dataclasses.replace(order, phases=moved)
    for start, _ in order.phases[number + 1:]:
        for after in range(start, start + 15):
            if skipping.phases[skipping._phase(after)][0] == start:
                assert np.array_equal(skipping.offsets(after), longer.offsets(after + batches))


@given(order=skipping_orders(max_skips=2), data=st.data())
def test_a_skip_is_made_in_the_order_that_the_skips_before_it_left(order, data):
    """Also one decided further back than an earlier one, whose batches stay unread."""
    step, batches = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 12))
    more = dataclasses.replace(order, skips=(*order.skips, (step, batches)))
    number = max(n for n, (start, _) in enumerate(order.phases) if start <= step)
    end = (*order.phases, (10**6, 1))[number + 1][0]
    for at in range(step):
        assert np.array_equal(more.offsets(at), order.offsets(at))
    for at in range(step, min(end - batches, step + 20)):
        assert np.array_equal(more.offsets(at), order.offsets(at + batches))


@settings(max_examples=200)
@given(order=skipping_orders(max_skips=2), first=st.integers(0, 40), length=st.integers(1, 20))
def test_skipping_leaves_out_what_went_wrong(order, first, length):
    """Windows of the steps named are in no later step, over phase changes too; the steps before are as they were."""
    order = dataclasses.replace(order, n_train=10**6)  # so many tokens that all of it is the first epoch
    skipping = order.skipping(first, first + length - 1)
    wrong = {token for step in range(first, first + length) for offset in order.offsets(step).tolist()
             for token in range(offset, offset + order.seq_len(step))}
    for step in range(first):
        assert np.array_equal(skipping.offsets(step), order.offsets(step))
    for step in range(first, first + length + 30):
        for offset in skipping.offsets(step).tolist():
            assert wrong.isdisjoint(range(offset, offset + skipping.seq_len(step)))
    assert skipping.skips[:-1] == order.skips


def test_skipping_leaves_out_no_more_than_it_must():
    order = BatchOrder(n_train=10**5, seed=0, phases=((0, 16), (10, 16), (20, 64)), batch_sequences=(4, 4, 4))
    assert order.skipping(7, 8).skips == ((7, 2),)
    assert order.skipping(30, 30).skipping(3, 3).skips == ((30, 1), (3, 1))
    # Phase 0 opened chunks 0-11 in its ten steps, and phase 1 at step 11 the first window of chunks 12-15: the next
    # group is that of window 16 of phase 0, nine after the seventh.
    assert order.skipping(7, 11).skips == ((7, 9),)
    # Steps 20-22 read chunks 24-35 whole: group 9, window 36.
    assert order.skipping(7, 22).skips == ((7, 29),)
    assert order.skipping(12, 20).skips == ((12, 14),)  # chunks 24-27: group 4 of phase 1, window 16, is step 26's


@given(order=orders(), data=st.data())
def test_a_skip_adds_to_what_is_read_of_the_epoch(order, data):
    step, batches = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 30))
    skipping = dataclasses.replace(order, skips=((step, batches),))
    last = order.phases[-1][0]
    if step < last:
        return
    for at in range(step, step + 10):
        assert skipping.epoch(at) == pytest.approx(order.epoch(at + batches))


def test_a_step_is_described_by_the_place_of_its_first_sequence():
    order = BatchOrder(n_train=1_000_000, seed=1337, phases=((0, 128), (10, 512)), batch_sequences=(8, 1))
    assert order.describe(0) == "8 sequences of 128 tokens, the first of them at token 162,367"
    assert order.describe(10).startswith("1 sequence of 512 tokens, the first of them at token ")
    assert f"{order.offsets(10)[0]:,}" in order.describe(10)


@pytest.mark.parametrize("skips", [
    ((-1, 5),), ((3, 0),), ((3, -2),), ((3, 2.0),), ((3, True),), ((3,),), ((3, 2, 1),), ([3, 2],), ("ab",), (None,),
    ((0, 2**40), (0, 1)), ((0, 10**30),)])
def test_skips_of_a_damaged_checkpoint_are_refused(skips):
    with pytest.raises(OnebError, match="skipped batches .* resume from an older one"):
        BatchOrder(n_train=1000, seed=0, phases=((0, 16),), batch_sequences=(2,), skips=skips)


def test_the_longest_skip_that_is_allowed_overflows_nothing():
    order = BatchOrder(n_train=10**12, seed=0, phases=((0, 16), (100, 4096)), batch_sequences=(1024, 8),
                       skips=((0, 2**40),))
    for step in (0, 99, 100, 10**9):
        offsets = order.offsets(step)
        assert 0 <= offsets.min() <= offsets.max() < 10**12


def test_data_shorter_than_a_chunk_is_the_users_mistake():
    with pytest.raises(OnebError, match="512 tokens; wanted at least 513"):
        BatchOrder(n_train=512, seed=0, phases=((0, 128), (5, 512)), batch_sequences=(1, 1))


@given(n_tokens=st.integers(2, 10**12))
def test_split_is_disjoint_and_covers_all(n_tokens):
    n_train, n_val = split_tokens(n_tokens)
    assert n_train + n_val == n_tokens
    assert 0 <= n_val <= min(10_000_000, n_tokens // 10)
    assert n_train > 0


@pytest.mark.parametrize(("n_tokens", "n_val"), [
    (100, 10), (1_000_000, 100_000), (10_000_000, 131_072), (100_000_000, 1_000_000),
    (1_000_000_000, 10_000_000), (10_000_000_000, 10_000_000)])
def test_split_sizes(n_tokens, n_val):
    assert split_tokens(n_tokens) == (n_tokens - n_val, n_val)


@given(n_val=st.integers(1, 5000), seq_len=st.integers(1, 64), eval_tokens=st.integers(1, 10_000))
def test_evaluation_windows(n_val, seq_len, eval_tokens):
    if n_val < seq_len + 1:
        with pytest.raises(OnebError, match=f"{n_val} tokens; wanted at least {seq_len + 1}"):
            eval_offsets(1000, n_val, seq_len, eval_tokens)
        return
    offsets = eval_offsets(1000, n_val, seq_len, eval_tokens)
    assert offsets[0] == 1000  # disjoint from training
    assert (np.diff(offsets) == seq_len).all()  # contiguous, not overlapping
    assert offsets[-1] + seq_len + 1 <= 1000 + n_val
    # as many as asked for, or as there are
    assert len(offsets) * seq_len >= eval_tokens or offsets[-1] + 2 * seq_len + 1 > 1000 + n_val
    assert (len(offsets) - 1) * seq_len < eval_tokens
