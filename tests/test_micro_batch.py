"""The note on micro-batches that leave a fast card waiting."""

import pytest

from oneb.gpus import find_gpu
from oneb.presets import resolve
from oneb.train.setup import _small_micro_batch


@pytest.mark.parametrize(("card", "given", "wanted"), [
    ("NVIDIA H200", {"train_seq_len": 2048, "batch_size": 1, "grad_accum": 16}, "--batch-size 4 --grad-accum 4"),
    ("NVIDIA H200", {"train_seq_len": 1024, "batch_size": 1, "grad_accum": 16}, "--batch-size 8 --grad-accum 2"),
    ("NVIDIA H200", {"train_seq_len": 1024, "batch_size": 1, "grad_accum": 1}, None),
    ("NVIDIA H200", {"train_seq_len": 2048, "batch_size": 4, "grad_accum": 8}, None),
    ("NVIDIA GeForce RTX 4090", {"train_seq_len": 1024, "batch_size": 1, "grad_accum": 16}, None),
])
def test_a_fast_card_is_told_of_too_small_micro_batches(card, given, wanted):
    note = _small_micro_batch(resolve(given).train, find_gpu(card))
    assert note is None if wanted is None else wanted in note
