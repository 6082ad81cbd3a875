"""A GPU that runs out of memory: the step is done again in smaller pieces, and nothing else changes."""

import gc

import pytest
import torch
from test_trainer import NANO, assert_same_weights, losses, run, val_losses, weights

from oneb.checkpoints.checkpoint import load_checkpoint
from oneb.errors import OnebError
from oneb.model.transformer import Transformer


def fails_above(monkeypatch, rows, recomputed_layers=0, from_call=0):
    """Forward passes run out of memory from the ``from_call``-th on, unless they are that small."""
    calls, forward = [], Transformer.loss

    def loss(model, tokens):
        calls.append(len(tokens))
        if len(calls) > from_call and (len(tokens) > rows or model.recomputed_layers < recomputed_layers):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(model, tokens)

    monkeypatch.setattr(Transformer, "loss", loss)
    return calls


def events(rows):
    return [row for row in rows if row["type"] == "event" and row["event"] == "out_of_memory"]


@pytest.mark.parametrize("given", [{}, {"precision": "fp8", "variant": "baseline"}], ids=["fp32", "fp8"])
def test_the_loss_curve_is_the_undisturbed_one(tmp_path, monkeypatch, given):
    _, undisturbed = run(tmp_path / "a", **given)
    # In the second micro-batch of the fourth step, when half of its gradients are there already.
    calls = fails_above(monkeypatch, 2, from_call=7 + ("precision" in given))
    directory, rows = run(tmp_path / "b", **given, save_every=4)
    (event,) = events(rows)
    assert (event["step"], event["batch_size"], event["grad_accum"]) == (3, 2, 4)
    assert 4 in calls
    assert losses(rows) == pytest.approx(losses(undisturbed), rel=2e-3 if given else 1e-5)
    assert sorted(val_losses(rows)) == sorted(val_losses(undisturbed))
    assert load_checkpoint(directory / "last.pt")["step"] == NANO["steps"]


def test_what_does_not_divide_by_two_becomes_the_next_smaller_part(tmp_path, monkeypatch):
    fails_above(monkeypatch, 4)
    _, rows = run(tmp_path, batch_size=15, grad_accum=1, steps=2)
    assert [row["batch_size"] for row in events(rows)] == [5, 1]


def test_layers_are_recomputed_when_micro_batches_cannot_shrink(tmp_path, monkeypatch):
    fails_above(monkeypatch, 1, recomputed_layers=2, from_call=3)
    _, rows = run(tmp_path, steps=3)
    assert [(row["batch_size"], row["recomputed_layers"]) for row in events(rows)] == [(2, 0), (1, 0), (1, 1), (1, 2)]


def test_a_run_that_cannot_shrink_any_more_saves_and_says_what_would_help(tmp_path, monkeypatch):
    undisturbed, _ = run(tmp_path / "a", steps=3)
    fails_above(monkeypatch, 0, from_call=6)
    with pytest.raises(OnebError) as caught:
        run(tmp_path / "b")
    for remedy in ("end other processes", "use a GPU with more memory"):
        assert remedy in str(caught.value)
    directory = tmp_path / "b" / "oneb_decoupled_seed1337"
    assert load_checkpoint(directory / "last.pt")["step"] == 3
    assert_same_weights(weights(undisturbed), weights(directory))


def test_an_evaluation_that_does_not_fit_is_cut_smaller(tmp_path, monkeypatch):
    _, undisturbed = run(tmp_path / "a", steps=6)
    forward = Transformer.loss

    def loss(model, tokens):
        if not torch.is_grad_enabled() and len(tokens) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(model, tokens)

    monkeypatch.setattr(Transformer, "loss", loss)
    _, rows = run(tmp_path / "b", steps=6)
    assert val_losses(rows) == pytest.approx(val_losses(undisturbed), rel=1e-5)
    assert not events(rows)  # training itself had room


@pytest.mark.gpu
@pytest.mark.parametrize("given", [{}, {"precision": "fp8"}], ids=["bf16", "fp8"])
def test_a_card_that_another_process_fills(tmp_path, monkeypatch, given):
    """The allocator's own error: from the fourth step on, it may have a little more than weights and state."""
    shape = {"size": "small", "n_layers": 12, "device": "cuda", "batch_size": 16, "grad_accum": 1, "train_seq_len": 512,
             "max_seq_len": 512, "vocab_size": 50257, "steps": 8, "eval_every": 0, "lr": 1e-4, **given}
    _, undisturbed = run(tmp_path / "a", **shape)
    gc.collect()
    torch.cuda.empty_cache()
    forward, calls = Transformer.loss, []

    def loss(model, tokens):
        calls.append(len(tokens))
        if len(calls) == 4:
            torch.cuda.empty_cache()
            room = torch.cuda.memory_allocated() + int(2.3 * 2**30)
            torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
        return forward(model, tokens)

    monkeypatch.setattr(Transformer, "loss", loss)
    try:
        _, rows = run(tmp_path / "b", **shape)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert events(rows)
    assert max(calls[-3:]) < 16
    # In another order of sums; Lion's sign makes a little of it.
    assert losses(rows) == pytest.approx(losses(undisturbed), rel=5e-3)
