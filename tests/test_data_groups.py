"""The batch order of data that is read shard by shard: within a shard in any order, shard after shard."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data_order import orders

from oneb.data.order import BatchOrder
from oneb.errors import OnebError


@st.composite
def grouped_orders(draw) -> BatchOrder:
    order = draw(orders())
    groups = tuple(draw(st.lists(st.integers(1, 400), min_size=1, max_size=6)))
    if max(groups) <= order.chunk_len:
        groups += (order.chunk_len + 1 + draw(st.integers(0, 300)),)
    return dataclasses.replace(order, n_train=sum(groups), groups=groups)


def chunks_of(order: BatchOrder) -> list[int]:
    """Whole chunks in each group."""
    return [(n_tokens - 1) // order.chunk_len for n_tokens in order.groups]


def group_of(order: BatchOrder, first: int, last: int) -> int:
    """The group that holds tokens ``first`` to ``last``."""
    ends = np.cumsum(order.groups)
    group = int(np.searchsorted(ends, first, side="right"))
    assert last < ends[group], "a sequence spans two groups"
    return group


@given(order=grouped_orders())
def test_each_sequence_lies_within_a_group_with_the_token_after_it(order):
    for step in range(60):
        for offset in order.offsets(step).tolist():
            group_of(order, offset, offset + order.seq_len(step))


@given(order=grouped_orders())
def test_groups_are_read_one_after_the_other_in_every_epoch(order):
    """Chunk positions, counted from the rule for them alone, against the groups that their sequences lie in."""
    one_phase = dataclasses.replace(order, phases=((0, order.chunk_len),), batch_sequences=order.batch_sequences[:1])
    expected = [group for group, n_chunks in enumerate(chunks_of(order)) for _ in range(n_chunks)] * 3
    read = np.concatenate([one_phase.offsets(step) for step in range(-(-len(expected) // order.batch_sequences[0]))])
    found = [group_of(order, offset, offset + order.chunk_len) for offset in read.tolist()[:len(expected)]]
    assert found == expected
    n_chunks = len(expected) // 3
    for epoch in range(3):  # each of an epoch's windows once
        here = np.sort(read[epoch * n_chunks:(epoch + 1) * n_chunks])
        assert (np.diff(here) >= order.chunk_len).all()


@given(order=grouped_orders())
def test_no_token_of_groups_is_used_twice_within_an_epoch_over_phase_changes(order):
    n_chunks, seen = sum(chunks_of(order)), Counter()
    for step in range(60):
        if order.epoch(step + 1) * n_chunks > n_chunks - max(order.batch_sequences) * len(order.phases):
            break  # chunks of the next epoch may be open
        for offset in order.offsets(step).tolist():
            seen.update(range(offset, offset + order.seq_len(step)))
    assert max(seen.values(), default=1) == 1


@given(order=grouped_orders(), data=st.data())
def test_skips_in_groups_leave_out_what_would_have_come(order, data):
    step, batches = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 30))
    skipping = dataclasses.replace(order, skips=((step, batches),))
    for before in range(step):
        assert np.array_equal(skipping.offsets(before), order.offsets(before))
    if step >= order.phases[-1][0]:
        for after in range(step, step + 15):
            assert np.array_equal(skipping.offsets(after), order.offsets(after + batches))


def test_groups_are_shuffled_each_in_its_own_way():
    order = BatchOrder(n_train=3 * 801, seed=5, phases=((0, 8),), batch_sequences=(100,), groups=(801,) * 3)
    drawn = [tuple(((order.offsets(step) - step % 3 * 801) // 8).tolist()) for step in range(12)]
    assert len(set(drawn)) == 12
    assert {tuple(sorted(chunks)) for chunks in drawn} == {tuple(range(100))}


def test_the_order_of_groups_never_changes():
    order = BatchOrder(n_train=250_000, seed=1337, phases=((0, 128), (10, 512)), batch_sequences=(8, 8),
                       groups=(100_000, 100_000, 50_000))
    digest = hashlib.sha256()
    for step in (0, 1, 9, 10, 11, 400, 10**6):
        digest.update(order.offsets(step).astype("<i8").tobytes())
    assert order.offsets(0).tolist() == [12376, 89688, 98392, 2648, 68184, 66648, 34392, 33368]
    assert digest.hexdigest()[:16] == "06890e2ed1e7f34d"


def test_groups_that_are_all_shorter_than_a_chunk_are_the_users_mistake():
    with pytest.raises(OnebError, match="1024 tokens; wanted at least 513"):
        BatchOrder(n_train=1024, seed=0, phases=((0, 512),), batch_sequences=(1,), groups=(512, 512))
