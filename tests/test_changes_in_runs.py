"""Runs that continue others: with other options, which are refused, told or made; and back at a checkpoint's bits."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from launcher_helpers import NANO as NANO_WORDS
from launcher_helpers import config as config_of_words
from launcher_helpers import launch
from test_trainer import NANO, assert_same_weights, losses, run, weights

from oneb.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from oneb.checkpoints.rundir import check_resume, continued, read_sidecar, run_directory, sidecar_path
from oneb.config import LogConfig, RunConfig, sections
from oneb.errors import OnebError
from oneb.files import read_json_lines
from oneb.presets import resolve
from oneb.show import recorder
from oneb.train.resume import reload
from oneb.train.run import train
from oneb.train.setup import build

NAME = "oneb_decoupled_seed1337"
FP8_WIDTHS = {"sem_dim": 16, "geo_dim": 32}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(recorder, "write_plots", lambda directory: None)
    monkeypatch.setattr(recorder, "write_summary", lambda directory: None)


def messages(directory, event="warning"):
    return [row["message"] for row in read_json_lines(directory / "train.jsonl") if row.get("event") == event]


# ---- the sidecar, the launcher, the trainer

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(recorder, "write_plots", lambda directory: None)
        monkeypatch.setattr(recorder, "write_summary", lambda directory: None)
        return run(tmp_path_factory.mktemp("finished"), save_every=4, steps=8)[0]


@pytest.fixture
def directory(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / NAME)


def resumed(tmp_path, **given):
    return resolve({**NANO, "root": str(tmp_path), "steps": 12, "resume": True, **given})


def test_the_sidecar_holds_the_whole_configuration(directory):
    saved = read_sidecar(directory / "last.pt")["config"]
    own = json.loads((directory / "config.json").read_text())
    assert saved == own
    assert set(saved) == set(sections())
    assert len(saved["run"]) == len(dataclasses.fields(RunConfig))
    assert len(saved["log"]) == len(dataclasses.fields(LogConfig))


@pytest.mark.parametrize("asked", [{}, {"resume": False, "if_exists": "resume"}])
def test_changed_options_are_refused_before_a_model_is_built(directory, tmp_path, monkeypatch, asked):
    monkeypatch.setattr("oneb.train.run.build", lambda *_: pytest.fail("built"))
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(OnebError) as caught:
        train(resumed(tmp_path, lr=2e-3, grad_accum=3, d_ff=512, log_every=7, **asked))
    text = str(caught.value)
    assert "--d-ff is 512, the checkpoint has 384" in text
    assert "\n  --lr: 0.001 -> 0.002" in text
    assert "\n  --grad-accum: 2 -> 3" in text
    assert "--log-every" not in text
    with pytest.raises(OnebError, match="would be continued with options"):
        check_resume(resumed(tmp_path, lr=2e-3, **asked))
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_allowed_changes_are_told_and_made(directory, tmp_path):
    assert train(resumed(tmp_path, lr=2e-3, allow_change=True, save_every=0)) == 0
    told = " ".join(messages(directory))
    assert "--lr: 0.001 -> 0.002" in told
    assert "--save-every: 4 -> 0" in told
    rates = {row["step"]: row["lr"] for row in read_json_lines(directory / "train.jsonl") if row["type"] == "train"}
    assert (rates[8], rates[9]) == (1e-3, 2e-3)
    # From now on these are the run's own.
    assert check_resume(resumed(tmp_path, lr=2e-3)) == []
    with pytest.raises(OnebError, match=r"--lr: 0\.002 -> 0\.001"):
        check_resume(resumed(tmp_path, steps=14))


def test_the_same_line_again_has_nothing_to_tell(directory, tmp_path):
    config = resumed(tmp_path, steps=8, save_every=4, resume=False, if_exists="resume")
    assert check_resume(config) == []
    assert continued(config, run_directory(config)).train.precision == "fp32"


def test_another_optimizer_is_refused_whatever_is_allowed(directory, tmp_path):
    for allow in (False, True):
        with pytest.raises(OnebError, match="--optimizer: lion -> adamw"):
            train(resumed(tmp_path, optimizer="adamw", allow_change=allow))


def test_a_sidecar_of_before_knows_less_and_the_checkpoint_is_asked(directory, tmp_path):
    """Then it is the trainer that refuses, as it has read the checkpoint itself."""
    path = sidecar_path(directory / "last.pt")
    values = json.loads(path.read_text())
    del values["config"]
    path.write_text(json.dumps(values))
    config = resumed(tmp_path, lr=2e-3)
    assert check_resume(config) == []
    with pytest.raises(OnebError, match=r"--lr: 0\.001 -> 0\.002"):
        train(config)
    assert train(resumed(tmp_path)) == 0


def test_what_an_older_checkpoint_that_is_fallen_back_on_was_trained_with_counts(directory, tmp_path):
    """The newest one was saved with an option that had been allowed, and is damaged; the one before it was not."""
    assert train(resumed(tmp_path, lr=2e-3, allow_change=True, save_every=0)) == 0
    (directory / "step00000012.pt").unlink(missing_ok=True)
    data = bytearray((directory / "last.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (directory / "last.pt").write_bytes(data)
    with pytest.raises(OnebError, match=r"step00000008\.pt would be continued with options"):
        train(resumed(tmp_path, lr=2e-3))


def test_the_launcher_refuses_before_it_starts_anything(directory, tmp_path):
    words = (*NANO_WORDS, "--run-root", str(tmp_path), "--layers", "2", "--train-seq-len", "64", "--block", "64",
             "--batch-size", "4", "--grad-accum", "2", "--steps", "8", "--log-every", "1", "--eval-every", "5",
             "--eval-iters", "1", "--lr", "1e-3", "--warmup-steps", "2", "--lr-schedule", "constant", "--live", "basic",
             "--save-every", "4", "--resume")
    assert config_of_words(*words).train.steps == 8
    same = launch(*words, cwd=tmp_path)
    assert (same.returncode, same.stderr) == (0, "")
    assert "run that is continued" not in same.stdout
    refused = launch(*words, "--lr", "5e-4", "--seed", "1337", "--steps", "12", "--run", "--rehearse", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--lr: 0.001 -> 0.0005" in refused.stderr
    assert "oneb.train" not in refused.stdout
    allowed = launch(*words, "--lr", "5e-4", "--steps", "12", "--allow-change", cwd=tmp_path)
    assert (allowed.returncode, allowed.stderr) == (0, "")
    told = " ".join(allowed.stdout.split())
    assert "[note] --allow-change: the result is another" in told
    assert "--steps: 8 -> 12" in told
    assert "--allow-change" in allowed.stdout.split("-m oneb.train")[1]


def test_another_machine_is_told_of_and_continued(directory, tmp_path):
    saved = load_checkpoint(directory / "last.pt")
    assert saved["made_with"]["torch"] == str(torch.__version__)
    assert type(saved["made_with"]["torch"]) is str
    saved["made_with"] |= {"torch": "2.6.0+cu124", "device": "NVIDIA H100", "oneb": "0.0.1"}
    save_checkpoint(directory / "last.pt", saved)
    assert train(resumed(tmp_path, save_every=4)) == 0
    told = " ".join(messages(directory))
    assert "no longer bitwise" in told
    for text in ("PyTorch: 2.6.0+cu124 -> ", "the device: NVIDIA H100 -> cpu", "oneb: 0.0.1 -> "):
        assert text in told


def test_other_micro_batches_are_told_of(directory, tmp_path):
    assert train(resumed(tmp_path, batch_size=8, grad_accum=1)) == 0
    told = " ".join(messages(directory))
    assert "micro-batches at 64 tokens: 4 x 2 -> 8 x 1" in told


# ---- going back within a process

@pytest.mark.parametrize("given", [
    {}, {"optimizer": "adamw", "param_dtype": "bf16"}, {"precision": "fp8", **FP8_WIDTHS}, {"param_dtype": "fp16"}])
def test_a_process_goes_back_to_the_same_bits(tmp_path, given):
    """After other steps altogether in the same parts."""
    given = {**given, "n_layers": 1, "eval_every": 0}
    whole, _ = run(tmp_path / "whole", save_every=4, **given)
    path = whole / "step00000004.pt"
    parts = build(resolve({**NANO, **given, "root": str(tmp_path / "unused")}), lambda text: None)
    first = reload(parts, path)
    assert (first.step, first.checkpoint, first.skips) == (4, path, ())
    generator = torch.Generator().manual_seed(3)
    for number in range(3):  # another run altogether
        tokens = torch.randint(0, 257, (8, 65), generator=generator)
        loss = parts.model.loss(tokens[:4])
        parts.scaler.scale_loss(loss).backward()
        norm = torch.tensor(math.inf if number == 1 else 1.0)
        parts.optimizer.step(0.1, number, torch.tensor(1.0))
        parts.scaler.update(norm)
        if parts.float8:
            parts.float8.step()
    torch.rand(5)
    assert any(p.grad is not None for p in parts.optimizer.params)
    again = reload(parts, path)
    assert again == first
    assert all(p.grad is None for p in parts.optimizer.params)
    saved = load_checkpoint(path)
    assert_same_weights(saved["model"], parts.model.state_dict())
    assert torch.equal(saved["rng"]["cpu"], torch.get_rng_state())
    for name, state in saved["optimizer"]["state"].items():
        assert_same_weights(state, parts.optimizer.state_dict()["state"][name])
    if parts.float8:
        assert_same_weights(saved["float8"], parts.float8.state_dict())
    assert parts.scaler.skipped_steps == saved["scaler"]["skipped_steps"]
    assert parts.scaler.scale == saved["scaler"]["scale"]
    assert parts.fit.divisions() == saved["fit"]


def test_going_back_to_before_fp8_finds_its_scales_anew(tmp_path):
    directory, _ = run(tmp_path / "wide", precision="bf16", steps=3, eval_every=0, **FP8_WIDTHS)
    parts = build(resolve({**NANO, "precision": "fp8", **FP8_WIDTHS}), lambda text: None)
    reload(parts, directory / "last.pt")
    assert not parts.float8.calibrated
    fresh = {name: tensor.clone() for name, tensor in parts.float8.state_dict().items()}
    with parts.float8.calibrating():
        parts.model.loss(torch.randint(0, 257, (2, 65))).backward()
    assert parts.float8.calibrated
    reload(parts, directory / "last.pt")
    assert not parts.float8.calibrated
    assert_same_weights(fresh, parts.float8.state_dict())


def test_what_a_run_remembers_comes_back(directory, tmp_path):
    saved = load_checkpoint(directory / "last.pt")
    saved |= {"skips": [[3, 2], [5, 1]], "watch": {"recent": [1.0, 2.5], "seq_len": 64}, "evaluated_at": 5}
    save_checkpoint(directory / "last.pt", saved)
    parts = build(resumed(tmp_path), lambda text: None)
    start = reload(parts, directory / "last.pt")
    assert start.skips == ((3, 2), (5, 1))
    assert start.watch == {"recent": [1.0, 2.5], "seq_len": 64}
    assert start.evaluated_at == 5
    for name in ("skips", "watch", "evaluated_at", "made_with", "fit", "float8"):
        del saved[name]
    save_checkpoint(directory / "last.pt", saved)
    start = reload(parts, directory / "last.pt")
    assert (start.skips, start.watch, start.evaluated_at) == ((), None, -1)


def test_nothing_has_changed_where_going_back_is_refused(directory, tmp_path):
    parts = build(resumed(tmp_path), lambda text: None)
    before = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(OnebError, match="without optimizer state"):
        reload(parts, directory / "best.pt")
    saved = load_checkpoint(directory / "last.pt")
    name = next(iter(saved["optimizer"]["state"]))
    saved["optimizer"]["state"][name]["exp_avg"] = torch.zeros(3)
    save_checkpoint(directory / "last.pt", saved)
    with pytest.raises(OnebError, match="exp_avg is"):
        reload(parts, directory / "last.pt")
    assert_same_weights(before, parts.model.state_dict())
    assert torch.equal(state, torch.get_rng_state())


def test_a_run_resumed_with_harmless_changes_is_the_run_that_never_stopped(tmp_path):
    whole, rows = run(tmp_path / "whole")
    run(tmp_path / "cut", steps=5)
    cut, again = run(tmp_path / "cut", resume=True, log_every=1, save_every=3, keep_last=1, instrument="full",
                     analysis_every=2, eval_every=4, grad_checkpoint="all")
    assert losses(again) == losses(rows)
    assert_same_weights(weights(whole), weights(cut))
