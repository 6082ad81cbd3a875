"""Whole runs in which something is left to oneb.fit: what is chosen, what resuming keeps, what is refused."""

import dataclasses

import pytest
import torch
from test_out_of_memory import fails_above
from test_trainer import NANO, assert_same_weights, each_save_is_waited_for, losses, run, weights

from oneb.checkpoints.checkpoint import load_checkpoint
from oneb.checkpoints.rundir import read_sidecar
from oneb.config import device_defaults
from oneb.errors import OnebError
from oneb.files import read_json_lines
from oneb.fit import fit
from oneb.memory import CONTEXT_BYTES
from oneb.optim.optimizer import Optimizer
from oneb.presets import resolve
from oneb.train import trainer
from oneb.train.device import Device
from oneb.train.run import train
from oneb.units import GIB

AUTO = {"batch_size": None, "grad_accum": 8}
# Bytes: of NANO's peaks, lion's is above and lion8bit's below (10.7 and 9.6 MB).
LION8BIT_ONLY = 10_200_000


@pytest.fixture
def give_memory(monkeypatch):
    """Let the CPU have so many bytes, as a GPU would."""
    def give(n_bytes):
        monkeypatch.setattr(Device, "limit_memory", lambda device, limit_gib: n_bytes)

    return give


def messages(rows, event):
    return [row["message"] for row in rows if row["type"] == "event" and row["event"] == event]


def test_what_a_small_card_chose_stays_on_a_larger_one(tmp_path, give_memory):
    give_memory(LION8BIT_ONLY)
    whole, rows = run(tmp_path / "whole", **AUTO)
    assert read_sidecar(whole / "last.pt")["optimizer"] == "lion8bit"
    assert any("lion8bit" in note for note in messages(rows, "fit"))
    cut, _ = run(tmp_path / "cut", **AUTO, steps=5)
    give_memory(None)
    _, rows = run(tmp_path / "cut", **AUTO, resume=True)
    assert load_checkpoint(cut / "last.pt")["optimizer"]["kind"] == "lion8bit"
    assert messages(rows, "warning") == [
        "not as in the run that is continued, without effect on its result (--steps: 5 -> 12)"]
    assert losses(rows) == losses(read_json_lines(whole / "train.jsonl"))
    # Its weights alone begin another run, which chooses for itself.
    other, _ = run(tmp_path, **AUTO, tag="other", ckpt=str(cut / "last.pt"), steps=2)
    assert read_sidecar(other / "last.pt")["optimizer"] == "lion"


def test_adamw_is_not_continued_with_lions_weight_decay(tmp_path):
    run(tmp_path, optimizer="adamw", steps=2)
    with pytest.raises(OnebError, match="--optimizer adamw"):
        train(resolve({**NANO, "root": str(tmp_path), "resume": True}))
    directory, rows = run(tmp_path, optimizer="adamw", resume=True)
    assert messages(rows, "warning") == [
        "not as in the run that is continued, without effect on its result (--steps: 2 -> 12)"]
    assert load_checkpoint(directory / "last.pt")["step"] == NANO["steps"]


def test_a_resumed_run_divides_its_steps_as_it_did_before(tmp_path, monkeypatch):
    """Having run out of memory once it uses smaller micro-batches, and goes on with these, to the same bits."""
    given = {"batch_size": None, "grad_accum": 8, "n_layers": 1}
    with monkeypatch.context() as patch:
        fails_above(patch, 2, from_call=3)
        whole, rows = run(tmp_path / "whole", **given)
    with monkeypatch.context() as patch:
        fails_above(patch, 2, from_call=3)
        run(tmp_path / "cut", steps=6, **given)
    directory, again = run(tmp_path / "cut", resume=True, **given)
    assert load_checkpoint(directory / "last.pt")["fit"] == [{"seq_len": 64, "batch_size": 2, "grad_accum": 4}]
    assert losses(again) == losses(rows)
    assert_same_weights(weights(whole), weights(directory))


def test_micro_batches_of_before_that_are_asked_for_otherwise_or_too_large_are_not_kept():
    def chosen(gib, **options):
        config = resolve({"variant": "baseline", "train_seq_len": 2048, **options})
        return fit(dataclasses.replace(config, train=device_defaults(config.train, "cuda")), gib * GIB)

    before = [{"seq_len": 2048, "batch_size": 8, "grad_accum": 2}]
    assert chosen(80).at(2048).batch_size == 16
    assert chosen(80).divided_as(before).divisions() == before
    assert chosen(80).divided_as(before).at(2048).recomputed_layers == 0
    assert chosen(80).divided_as([{**before[0], "grad_accum": 4}]) == chosen(80)  # another global batch
    assert chosen(80).divided_as([{**before[0], "seq_len": 512}]) == chosen(80)
    assert chosen(80, batch_size=4, grad_accum=4).divided_as(before).at(2048).batch_size == 4
    small = chosen(10).divided_as(before)
    assert small == chosen(10)
    assert small.fits


def test_what_cannot_fit_is_refused_before_anything_is_allocated(tmp_path, give_memory, monkeypatch):
    monkeypatch.setattr("oneb.train.setup.build_model", lambda *_, **__: pytest.fail("allocated"))
    for n_bytes, given in ((6_000_000, AUTO), (1_000_000, {"grad_checkpoint": "none"})):
        give_memory(n_bytes)
        with pytest.raises(OnebError, match="the run does not fit: ") as caught:
            train(resolve({**NANO, "root": str(tmp_path), **given}))
        assert "use a GPU with more memory" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_numbers_that_were_given_are_tried_all_the_same(tmp_path, give_memory):
    give_memory(9_000_000)
    _, rows = run(tmp_path, grad_checkpoint="none", steps=2)
    assert any("does not fit" in note for note in messages(rows, "fit"))
    assert sorted(losses(rows)) == [1, 2]


def test_a_batch_in_tokens_keeps_its_size_over_the_schedule_and_resumes_exactly(tmp_path):
    given = {name: value for name, value in NANO.items() if name not in ("train_seq_len", "grad_accum", "batch_size")}
    base = resolve({**given, "phases": "16@0,32@4,64@8", "batch_tokens": 512, "root": str(tmp_path / "whole")})
    assert train(base) == 0
    for steps, resume in ((5, False), (12, True)):
        config = dataclasses.replace(
            base, run=dataclasses.replace(base.run, root=str(tmp_path / "cut"), resume=resume),
            train=dataclasses.replace(base.train, steps=steps))
        assert train(config) == 0
    whole, cut = (tmp_path / part / base.name for part in ("whole", "cut"))
    assert_same_weights(weights(whole), weights(cut))
    rows = [row for row in read_json_lines(cut / "train.jsonl") if row["type"] == "train"]
    assert [row["tokens"] for row in rows] == [512 * step for step in range(1, 13)]


def test_an_analysis_that_does_not_fit_is_left_out(tmp_path, monkeypatch):
    undisturbed, _ = run(tmp_path / "a", steps=4)

    def analyse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer, "analyse", analyse)
    directory, rows = run(tmp_path / "b", steps=4, instrument="full", analysis_every=2)
    assert len(messages(rows, "warning")) == 2
    assert_same_weights(weights(undisturbed), weights(directory))


def test_a_half_done_update_is_never_saved(tmp_path, monkeypatch):
    """Weights that belong to no step must not take the place of a checkpoint that can be resumed."""
    each_save_is_waited_for(monkeypatch.setattr)  # none is made before an evaluation while another is under way
    calls, whole_step = [], Optimizer.step

    def step(optimizer, *args):
        calls.append(1)
        if len(calls) == 6:
            optimizer.params[0].data.add_(1.0)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        whole_step(optimizer, *args)

    monkeypatch.setattr(Optimizer, "step", step)
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path, save_every=4)
    directory = tmp_path / "oneb_decoupled_seed1337"
    assert read_sidecar(directory / "last.pt")["step"] == 5  # an evaluation was due there
    run(tmp_path, resume=True)
    undisturbed, _ = run(tmp_path / "other")
    assert_same_weights(weights(undisturbed), weights(directory))


@pytest.mark.parametrize(("used", "reserved", "limit_gib", "budget", "share"), [
    (0.5, 0.0, None, 80.0, None),  # only this process's context is taken
    (30.5, 0.0, None, 49.5 + CONTEXT_BYTES / GIB, None),  # others have 30, of which some may be ours
    (4.5, 4.0, 24.0, 24.0, (24 - CONTEXT_BYTES / GIB) / 80),
    (0.5, 0.0, 200.0, 80.0, (80 - CONTEXT_BYTES / GIB) / 80),  # no more than there is
    (0.5, 0.0, 0.25, 0.25, 0.0),
])
def test_a_limit_counts_the_context(monkeypatch, used, reserved, limit_gib, budget, share):
    shares = []
    cuda = {"mem_get_info": (int((80 - used) * GIB), 80 * GIB), "memory_reserved": int(reserved * GIB)}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share))
    device = Device(torch.device("cuda"), "a card", None, True, True)
    found = device.limit_memory(limit_gib)
    assert found == pytest.approx(budget * GIB, abs=2)
    assert shares == ([] if share is None else [pytest.approx(share)])
