"""The rehearsal: what it finds, what it measures, and that nothing of it is left."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import write_npy
from forked_runs import PATIENCE_S, within

import oneb.train.rehearse
from oneb.checkpoints.checkpoint import load_checkpoint
from oneb.cli.options import config_to_args
from oneb.cli.rehearse import RESULT, Rehearsal, rehearsal_lines, rehearse
from oneb.cli.train import build_parser
from oneb.data.tokens import open_tokens
from oneb.errors import OnebError
from oneb.files import sha256_file, write_json
from oneb.model.transformer import build_model
from oneb.presets import resolve
from oneb.train.rehearse import check
from oneb.train.run import train
from oneb.train.trainer import Trainer

REPOSITORY = Path(__file__).resolve().parents[1]
NANO = {
    "size": "nano", "n_layers": 2, "path": "demo", "device": "cpu", "phases": "16@0,32@20", "max_seq_len": 32,
    "grad_accum": 4, "steps": 400, "eval_iters": 1, "warmup_steps": 1, "live": "basic",
}


def configuration(root, **given):
    return resolve({**NANO, "root": str(root), **given})


def words(config):
    return [word for line in config_to_args(config) for word in line]


def here(config, folder):
    """The first half of a rehearsal in this process, with few steps."""
    folder.mkdir(parents=True, exist_ok=True)
    return oneb.train.rehearse.rehearse(config, folder)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(oneb.train.rehearse, "_TIMED_S", 0.1)
    monkeypatch.setattr(oneb.train.rehearse, "_EVAL_S", 0.1)
    # As the launcher does, whose children find the package wherever it was called from.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]))


def stand_in(folder, script):
    """A Python that is none: ``script`` in bash, with the rehearsal's folder in $FOLDER."""
    path = folder / "stand_in"
    path.write_text(f'#!/bin/bash\nFOLDER="${{@: -1}}"\n{script}\n')
    path.chmod(0o755)
    return str(path)


# ---- whole rehearsals

def test_a_rehearsal_measures_the_run_and_leaves_nothing(tmp_path, capfd):
    config = configuration(tmp_path / "new" / "runs")
    found = rehearse(sys.executable, words(config), config)
    assert list(tmp_path.iterdir()) == []
    assert found.tok_s.keys() == found.batch.keys() == {16, 32}
    assert list(found.tok_s) == [32, 16]  # the longest first
    assert all(rows * accumulated == 4 for rows, accumulated, _ in found.batch.values())
    # A step has up to 128 tokens: it takes no minute, and no microsecond.
    assert all(1 < tok_s < 1e8 for tok_s in found.tok_s.values())
    assert found.peak_gib == {}
    assert found.loss == found.reloaded_loss
    assert 3 < found.loss < 6
    assert 0 < found.save_s < found.seconds
    assert 0 < found.eval_s < math.inf
    output = capfd.readouterr()
    assert "  steps at 32 tokens" in output.out
    assert "fresh process" in output.out
    # fp32 weights and one fp32 moment.
    n_parameters = sum(parameter.numel() for parameter in build_model(config.model).parameters())
    assert found.checkpoint_bytes == pytest.approx(8 * n_parameters, rel=0.02)


def test_an_interrupted_rehearsal_leaves_nothing(tmp_path):
    given = {**NANO, "root": str(tmp_path / "runs"), "batch_size": 1, "grad_accum": 50_000}  # steps take minutes
    program = "import sys; from oneb.cli.rehearse import rehearse; from oneb.presets import resolve\n" \
              f"rehearse(sys.executable, {words(resolve(given))}, resolve({given}))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True)
    for line in process.stdout:
        if "steps at 32" in line:  # its child is at work
            break
    assert list((tmp_path / "runs").glob(".rehearsal_*"))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in output
    assert "stopped by SIGINT; nothing of it is left" in output
    assert list(tmp_path.iterdir()) == []
    assert within(PATIENCE_S, lambda: str(tmp_path) not in subprocess.run(
        ["ps", "-A", "-o", "args="], capture_output=True, text=True).stdout)


def test_what_a_killed_rehearsal_left_is_removed_by_the_next_one(tmp_path, capsys):
    """And not what another launcher may be using; here the next one stops early, at data that is not there."""
    root = tmp_path / "runs"
    old, new = root / ".rehearsal_old", root / ".rehearsal_new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "last.pt").write_bytes(b"x" * 1000)
    os.utime(old, (time.time() - 2 * 3600,) * 2)
    config = configuration(root, path=str(tmp_path / "missing.npy"))
    with pytest.raises(OnebError, match=r"missing\.npy"):
        rehearse(sys.executable, words(config), config)
    assert list(root.iterdir()) == [new]
    assert str(old) in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("given", [{}, {"deterministic": True}, {"precision": "fp8"}, {"save_optim": False}], ids=str)
def test_a_rehearsal_on_the_gpu(tmp_path, given):
    given = {"device": "cuda", "d_model": 256, "n_heads": 4, "phases": "256@0,512@20", "max_seq_len": 512, **given}
    config = configuration(tmp_path / "runs", **given)
    found = rehearse(sys.executable, words(config), config)
    assert list(tmp_path.iterdir()) == []
    total_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    assert found.peak_gib.keys() == {256, 512}
    assert all(0.2 < peak < total_gib for peak in found.peak_gib.values())
    assert found.reloaded_loss == pytest.approx(found.loss, rel=1e-2 if given.get("precision") else 1e-3)
    if given.get("deterministic"):
        assert found.reloaded_loss == found.loss


# ---- what the processes find

@pytest.mark.parametrize("given", [
    {}, {"optimizer": "adamw", "param_dtype": "bf16"}, {"param_dtype": "fp16"}, {"save_optim": False},
    {"precision": "fp8", "variant": "baseline", "max_seq_len": 64, "phases": "16@0,64@20"},
    {"grad_checkpoint": "1", "batch_size": 2},
], ids=str)
def test_a_reloaded_checkpoint_continues_with_the_same_losses(tmp_path, given):
    config = configuration(tmp_path / "runs", **given)
    found = here(config, tmp_path / "folder")
    found = json.loads(json.dumps(found))  # as the other process gets it
    assert len(found["losses"]) == (2 if config.run.save_optim else 1)
    assert check(config, tmp_path / "folder", found) == found["losses"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("most", [1, 0])
def test_a_gpu_that_is_smaller_than_planned(tmp_path, monkeypatch, most):
    """The trainer halves micro-batches until they fit, and what the rehearsal reports is what it ended up with."""
    plain = Trainer._gradients

    def limited(self, batch):
        if self.fit.at(batch.seq_len).batch_size > most:
            raise torch.OutOfMemoryError("out of memory, for the test")
        return plain(self, batch)

    config = configuration(tmp_path / "runs")
    monkeypatch.setattr(Trainer, "_gradients", limited)
    if most == 0:
        with pytest.raises(OnebError, match="out of memory at 32 tokens .* there is nothing less"):
            here(config, tmp_path / "folder")
        return
    found = here(config, tmp_path / "folder")
    assert [(length["batch_size"], length["grad_accum"]) for length in found["lengths"]] == [(1, 4), (1, 4)]
    monkeypatch.setattr(Trainer, "_gradients", plain)  # the other process has all the memory that it wants
    assert check(config, tmp_path / "folder", found) == found["losses"]


@pytest.mark.parametrize("damage", ["optimizer", "model"])
def test_a_checkpoint_that_lost_something_is_found(tmp_path, damage):
    config = configuration(tmp_path / "runs")
    folder = tmp_path / "folder"
    found = here(config, folder)
    contents = dict(load_checkpoint(folder / "last.pt"))
    if damage == "optimizer":  # which a single step's loss would not show
        states = contents["optimizer"]["state"].values()
        contents["optimizer"]["state"] = dict(zip(contents["optimizer"]["state"], [
            {name: torch.zeros_like(tensor) for name, tensor in state.items()} for state in states], strict=True))
    else:
        contents["model"] = {name: tensor * (1 + 1e-3) for name, tensor in contents["model"].items()}
    torch.save(contents, folder / "other.pt")
    os.replace(folder / "other.pt", folder / "last.pt")
    sidecar = json.loads((folder / "last.pt.json").read_text())
    write_json(folder / "last.pt.json", {**sidecar, "bytes": (folder / "last.pt").stat().st_size,
                                         "sha256": sha256_file(folder / "last.pt")})
    with pytest.raises(OnebError, match="does not continue as the run that saved it"):
        check(config, folder, found)


def test_a_rehearsal_of_a_resumed_run_starts_from_its_checkpoint(tmp_path):
    first = configuration(tmp_path, steps=30, lr=2e-3)
    assert train(first) == 0
    before = {path.name: sha256_file(path) for path in (tmp_path / first.name).iterdir()}
    again = dataclasses.replace(
        first, run=dataclasses.replace(first.run, resume=True, allow_change=True),
        train=dataclasses.replace(first.train, steps=60))
    found = here(again, tmp_path / "folder")
    assert found["step"] > 30
    assert [length["seq_len"] for length in found["lengths"]] == [32]  # what is left of the schedule
    assert max(found["losses"]) < 4.5  # a fresh model has 5.5
    assert check(again, tmp_path / "folder", found) == found["losses"]
    assert {path.name: sha256_file(path) for path in (tmp_path / first.name).iterdir()} == before
    last = tmp_path / first.name / "last.pt"
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(OnebError, match="cut short"):
        here(again, tmp_path / "folder")


@pytest.mark.parametrize("at", [-1, 0])
def test_a_bad_id_at_the_data_s_edge_is_found(tmp_path, at):
    ids = np.random.default_rng(at + 3).integers(0, 257, 60_000)
    ids[at] = 300
    meta = {"tokens": 60_000, "encoding": "bytes", "vocab_size": 257, "max_id": 256, "eot": 256}
    path = write_npy(tmp_path / "data.npy", ids, meta=meta)
    open_tokens(str(path), vocab_size=257)  # takes the sidecar's word
    with pytest.raises(OnebError, match=rf"token id 300 at token offset {at % 60_000} "):
        here(configuration(tmp_path, path=str(path), vocab_size=257), tmp_path / "folder")


@pytest.mark.parametrize("given", [{"lr": 5.0, "warmup_steps": 0}, {"lr": 1e9, "optimizer": "adamw"}], ids=str)
def test_a_run_that_diverges_is_stopped(tmp_path, given, monkeypatch):
    # As many steps as there can be, however slow the machine is just now.
    monkeypatch.setattr("oneb.train.rehearse._TIMED_S", 600.0)
    with pytest.raises(OnebError, match="smaller --lr"):
        here(configuration(tmp_path, **given), tmp_path / "folder")


def test_weights_that_are_not_finite_are_found(tmp_path):
    first = configuration(tmp_path, steps=1)
    assert train(first) == 0
    path = tmp_path / first.name / "best.pt"
    contents = dict(load_checkpoint(path))
    contents["model"] = {name: torch.full_like(tensor, torch.nan) for name, tensor in contents["model"].items()}
    torch.save(contents, tmp_path / "nan.pt")
    sidecar = json.loads(path.with_name("best.pt.json").read_text())
    write_json(tmp_path / "nan.pt.json", {**sidecar, "bytes": (tmp_path / "nan.pt").stat().st_size,
                                          "sha256": sha256_file(tmp_path / "nan.pt")})
    with pytest.raises(OnebError, match=r"loss nan .* should be finite.*another --ckpt"):
        here(configuration(tmp_path / "other", ckpt=str(tmp_path / "nan.pt")), tmp_path / "folder")


def test_a_full_disk_is_no_traceback(tmp_path, disk):
    with pytest.raises(OnebError, match=r"could not be saved .*1\.0 MiB free.*--run-root"):
        here(configuration(tmp_path), disk(2**20))


# ---- the disk, beforehand

# A checkpoint of it has 371k parameters: 1.5 MB of weights, and as much of Lion's state.
def test_too_little_disk_is_heard_of_before_anything_starts(disk):
    root = disk(20 * 2**20)
    config = configuration(root / "runs", save_every=20, optimizer="lion")
    with pytest.raises(OnebError, match=r"take 6\d\.\d MiB .* 20\.0 MiB free.* a larger --save-every"):
        rehearse("/nonexistent", [], config)
    with pytest.raises(FileNotFoundError):  # the check lets it pass, and what does not exist is started
        rehearse("/nonexistent", [], configuration(root / "runs", optimizer="lion"))
    assert list(root.iterdir()) == []


@pytest.mark.parametrize(("size", "given", "done", "enough"), [
    # last.pt twice, for the moment between an old one and a new one, and best.pt: 7.5 MB, and 1 MiB for the log.
    (8_000_000, {}, 0, False), (9_000_000, {}, 0, True),
    # 16.5 MB and the log: 4 files, of which the last one is last.pt. Less where two of them, and the log, are there.
    (17_000_000, {"save_every": 100}, 0, False), (18_000_000, {"save_every": 100}, 0, True),
    (10_000_000, {"save_every": 100}, 250, False), (11_000_000, {"save_every": 100}, 250, True),
])
def test_the_disk_is_measured_against_a_real_checkpoint(tmp_path, disk, size, given, done, enough):
    root = disk(size)
    # With the optimizer open the first estimate is that of 8-bit state: nothing is refused that would fit.
    config = configuration(root, **given)
    if done:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True))
        (root / config.name).mkdir()
        (root / config.name / "last.pt").touch()
        write_json(root / config.name / "last.pt.json", {
            "step": done, "tokens": 1, "best_val_loss": None, "sha256": "", "bytes": 0, "model": vars(config.model)})
    write_json(tmp_path / "found.json", {
        "lengths": [{"seq_len": 32, "tok_s": 1e4, "peak_gib": 1.5, "batch_size": 2, "grad_accum": 2,
                     "recomputed_layers": 1}],
        "save_s": 1.0, "eval_s": 1.0, "checkpoint_bytes": 3_000_000, "weights_bytes": 1_500_000,
        "losses": [5.0, 4.9], "reloaded_losses": [5.0, 4.8],
    })
    python = stand_in(tmp_path, f'cp {tmp_path}/found.json "$FOLDER/{RESULT}"\n'
                                'head -c 3000000 /dev/zero > "$FOLDER/last.pt"')
    if enough:
        found = rehearse(python, [], config)
        assert (found.batch, found.peak_gib) == ({32: (2, 2, 1)}, {32: 1.5})
        assert (found.loss, found.reloaded_loss) == (4.9, 4.8)
    else:
        with pytest.raises(OnebError, match=r"checkpoints take .*2\.9 MiB each"):
            rehearse(python, [], config)
    assert not list(root.glob(".*"))


def test_a_run_fits_on_the_disk_that_it_is_promised(disk):
    """The check at its narrowest: the smallest disk that it accepts holds the run."""
    def accepted(size, steps=2, every=1):
        root = disk(size)
        config = configuration(root, steps=steps, save_every=every, eval_every=1, optimizer="lion")
        try:
            rehearse("/nonexistent", [], config)
        except FileNotFoundError:
            return config
        except OnebError:
            return None

    assert not accepted(8 * 2**20)
    config = next(filter(None, (accepted(int(size * 2**20)) for size in np.arange(8.5, 14, 0.5))))
    assert train(config) == 0
    root = Path(config.run.root)
    assert len(list(root.glob("*/step*.pt"))) == 2


# ---- the processes

def test_a_failed_process_says_why_once(tmp_path, capfd):
    python = stand_in(tmp_path, 'touch "$FOLDER/big"; echo working; echo "error: 2 problems:" >&2; echo "  1. a" >&2; '
                                "exit 2")
    with pytest.raises(OnebError) as caught:
        rehearse(python, [], configuration(tmp_path / "runs"))
    assert str(caught.value) == "the rehearsal failed (exit code 2): 2 problems:\n  1. a"
    output = capfd.readouterr().out
    assert "  working\n" in output
    assert "problems" not in output
    assert not (tmp_path / "runs").exists()


def test_a_killed_process_is_no_success(tmp_path):
    python = stand_in(tmp_path, "echo checking; kill -KILL $$")
    with pytest.raises(OnebError, match=r"failed \(ended by SIGKILL\): checking"):
        rehearse(python, [], configuration(tmp_path))


def test_a_second_signal_ends_a_process_that_ignores_the_first(tmp_path):
    python = stand_in(tmp_path, "trap 'echo told' TERM; echo ready; while true; do sleep 0.1; done")
    program = "import sys; from oneb.cli.rehearse import rehearse; from oneb.presets import resolve\n" \
              f"rehearse({python!r}, [], resolve({ {**NANO, 'root': str(tmp_path / 'runs')} }))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "  ready\n"
    process.terminate()
    assert "  told\n" in iter(process.stdout.readline, "")  # bash also tells of the sleep that this has ended
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + signal.SIGTERM
    assert not (tmp_path / "runs").exists()


def test_what_is_shown_of_a_rehearsal():
    found = Rehearsal(52.3, {2048: 70_400.0, 1024: 75_000.0}, {2048: 56.51, 1024: 40.0}, 6.1, 7_402_000_000, 1.8,
                      10.81, 10.81, {2048: (16, 1, 0), 1024: (8, 2, 4)})
    assert rehearsal_lines(found) == [
        "[rehearsal] 2048 tokens: 70.4K tok/s, peak 56.5 GiB, micro-batch 16 x 1",
        "[rehearsal] 1024 tokens: 75.0K tok/s, peak 40.0 GiB, micro-batch 8 x 2, 4 layers",
        "            recomputed",
        "[rehearsal] checkpoint 6.9 GiB saved in 6.1s, reloaded, next loss equal (10.81)",
        "[rehearsal] evaluation 1.8s | 52s in all",
    ]
    other = dataclasses.replace(found, peak_gib={}, reloaded_loss=10.8123)
    assert rehearsal_lines(other)[0] == "[rehearsal] 2048 tokens: 70.4K tok/s, micro-batch 16 x 1"
    assert "next loss 10.8123 for" in rehearsal_lines(other)[-3]


def test_its_flags_are_nobody_s_business():
    assert "rehearsal" not in build_parser().format_help()
