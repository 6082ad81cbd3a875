"""Whole runs of the trainer at nano size: what they write, how they continue, what stops them."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from oneb.checkpoints.checkpoint import load_checkpoint
from oneb.errors import OnebError
from oneb.files import read_json_lines
from oneb.presets import resolve
from oneb.train.run import train
from oneb.train.trainer import Trainer
from oneb.train.writer import CheckpointWriter

REPOSITORY = Path(__file__).resolve().parents[1]
NANO = {
    "size": "nano", "n_layers": 2, "path": "demo", "device": "cpu", "train_seq_len": 64, "max_seq_len": 64,
    "batch_size": 4, "grad_accum": 2, "steps": 12, "log_every": 1, "eval_every": 5, "eval_iters": 1, "lr": 1e-3,
    "warmup_steps": 2, "lr_schedule": "constant", "live": "basic",
}


def run(tmp_path, **given):
    """Train; returns (run directory, rows of train.jsonl)."""
    config = resolve({**NANO, "root": str(tmp_path), **given})
    before = set(tmp_path.glob("*"))
    assert train(config) == 0
    directory = (set(tmp_path.glob("*")) - before or {tmp_path / config.name}).pop()
    return directory, read_json_lines(directory / "train.jsonl")


def each_save_is_waited_for(setattr):
    """What is saved when no longer depends on the disk: each checkpoint is there before the run goes on."""
    submit = CheckpointWriter.submit

    def written(self, *arguments):
        submit(self, *arguments)
        self.wait()

    setattr(CheckpointWriter, "submit", written)


def losses(rows):
    return {row["step"]: row["loss"] for row in rows if row["type"] == "train"}


def val_losses(rows):
    return {row["step"]: row["val_loss"] for row in rows if row["type"] == "eval"}


def weights(directory, name="last.pt"):
    return load_checkpoint(directory / name)["model"]


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_learns_and_writes_what_the_guide_promises(tmp_path):
    directory, rows = run(tmp_path, steps=40, save_every=20)
    assert directory.name == "oneb_decoupled_seed1337"
    names = {path.name for path in directory.iterdir()}
    assert names >= {"train.jsonl", "config.json", "plan.json", "summary.md", "loss.png", "throughput.png", "best.pt",
                     "best.pt.json", "last.pt", "last.pt.json", "step00000020.pt", "step00000040.pt"}
    assert not [name for name in names if "tmp" in name]
    train_rows = [row for row in rows if row["type"] == "train"]
    assert set(train_rows[-1]) >= {"step", "tokens", "loss", "lr", "grad_norm", "seq_len", "tok_s", "mfu", "step_ms",
                                   "data_ms", "memory_gib"}
    assert [row["step"] for row in train_rows] == list(range(1, 41))
    assert train_rows[-1]["tokens"] == 40 * 8 * 64
    # Near ln(257) = 5.55, and below it: tied embeddings lean towards repeating a token, and code repeats spaces.
    assert 4.9 < train_rows[0]["loss"] < 5.6
    assert train_rows[-1]["loss"] < 3.6
    assert sorted(val_losses(rows)) == [5, 10, 15, 20, 25, 30, 35, 40]
    sidecar = json.loads((directory / "last.pt.json").read_text())
    assert (sidecar["step"], sidecar["tokens"]) == (40, 40 * 8 * 64)
    config = json.loads((directory / "config.json").read_text())
    assert config["train"]["param_dtype"] == "fp32"


@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
@pytest.mark.parametrize("param_dtype", ["fp32", "bf16"])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, optimizer, param_dtype):
    # Phase lengths that change after the cut, evaluations before and after it, and stochastic rounding in bf16.
    given = {"optimizer": optimizer, "param_dtype": param_dtype, "null_attn": True, "phases": "32@0,64@9"}
    del_train_seq_len = {key: value for key, value in NANO.items() if key != "train_seq_len"}
    base = resolve({**del_train_seq_len, **given, "root": str(tmp_path / "whole")})
    assert train(base) == 0
    for steps, resume in ((7, False), (10, True), (12, True)):
        config = dataclasses.replace(
            base, run=dataclasses.replace(base.run, root=str(tmp_path / "cut"), resume=resume),
            train=dataclasses.replace(base.train, steps=steps),
        )
        assert train(config) == 0
    whole, cut = tmp_path / "whole" / base.name, tmp_path / "cut" / base.name
    assert_same_weights(weights(whole), weights(cut))
    a, b = load_checkpoint(whole / "last.pt"), load_checkpoint(cut / "last.pt")
    assert_same_weights(
        {f"{p}.{n}": t for p, s in a["optimizer"]["state"].items() for n, t in s.items()},
        {f"{p}.{n}": t for p, s in b["optimizer"]["state"].items() for n, t in s.items()},
    )
    whole_rows, cut_rows = read_json_lines(whole / "train.jsonl"), read_json_lines(cut / "train.jsonl")
    assert losses(whole_rows) == losses(cut_rows)
    assert val_losses(whole_rows).items() <= val_losses(cut_rows).items()
    assert [row["step"] for row in cut_rows if row["type"] == "train"] == list(range(1, 13))


def test_accumulated_micro_batches_are_one_big_batch(tmp_path):
    results = [run(tmp_path / str(batch), batch_size=batch, grad_accum=8 // batch, steps=6) for batch in (8, 4, 1)]
    expected = losses(results[0][1])
    for directory, rows in results[1:]:
        assert losses(rows) == pytest.approx(expected, rel=1e-5)
        assert val_losses(rows) == pytest.approx(val_losses(results[0][1]), rel=1e-5)
        for name, tensor in weights(directory).items():
            # Lion moves by the sign of a gradient: a rounding difference at zero is a whole step of lr.
            wrong = (tensor - weights(results[0][0])[name]).abs() > 1e-5
            assert wrong.float().mean() < 0.01, name


def test_bf16_weights_train_like_fp32_ones(tmp_path):
    _, wide = run(tmp_path, steps=40, param_dtype="fp32", lr=3e-4)
    _, narrow = run(tmp_path, steps=40, param_dtype="bf16", lr=3e-4)
    assert max(val_losses(narrow).values()) > 4  # the curve has somewhere to fall
    assert val_losses(narrow) == pytest.approx(val_losses(wide), rel=0.01)


def test_fp16_weights_scale_the_loss_and_learn(tmp_path):
    directory, rows = run(tmp_path, steps=20, param_dtype="fp16")
    assert losses(rows)[20] < 4.5
    state = load_checkpoint(directory / "last.pt")["scaler"]
    assert state["enabled"]
    assert state["scale"] > 1


def test_the_sequence_schedule_is_followed(tmp_path):
    given = {key: value for key, value in NANO.items() if key != "train_seq_len"}
    config = resolve({**given, "phases": "16@0,32@4,64@8", "root": str(tmp_path)})
    assert train(config) == 0
    rows = [row for row in read_json_lines(tmp_path / config.name / "train.jsonl") if row["type"] == "train"]
    assert [row["seq_len"] for row in rows] == [16] * 4 + [32] * 4 + [64] * 4
    assert rows[-1]["tokens"] == 8 * 4 * (16 + 32 + 64)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path, monkeypatch):
    plain = Trainer.train_step
    kept = {}

    def poisoned(self, batch):
        if batch.step != 5:
            return plain(self, batch)
        kept["before"] = {name: p.detach().clone() for name, p in self.parts.model.named_parameters()}
        weight = self.parts.model.blocks[1].feed_forward.down.weight
        handle = weight.register_hook(lambda grad: grad * float("nan"))
        result = plain(self, batch)
        handle.remove()
        kept["after"] = {name: p.detach().clone() for name, p in self.parts.model.named_parameters()}
        return result

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    _, rows = run(tmp_path)
    assert_same_weights(kept["before"], kept["after"])
    by_step = {row["step"]: row for row in rows if row["type"] == "train"}
    assert (by_step[5]["skipped"], by_step[6]["skipped"], by_step[12]["skipped"]) == (0, 1, 1)
    assert by_step[6]["grad_norm"] is None
    assert any(row["type"] == "event" and "skipped" in row["message"] for row in rows)
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses(rows).values())


def test_analysis_rows_come_when_asked_for(tmp_path):
    _, rows = run(tmp_path, instrument="full", analysis_every=4, null_attn=True)
    analyses = [row for row in rows if row["type"] == "analysis"]
    assert [row["step"] for row in analyses] == [4, 8, 12]
    assert "attention_entropy" in analyses[0]
    _, rows = run(tmp_path, instrument="off", analysis_every=4, tag="off")
    assert not [row for row in rows if row["type"] == "analysis"]


def test_watching_a_run_does_not_change_it(tmp_path):
    plain, _ = run(tmp_path, tag="plain")
    watched, _ = run(tmp_path, tag="watched", instrument="full", analysis_every=3, eval_every=2, log_every=5)
    assert_same_weights(weights(plain), weights(watched))


def test_an_error_in_the_loop_saves_the_last_whole_step(tmp_path, monkeypatch):
    def fail(self):
        raise OSError("the disk of the data went away")

    monkeypatch.setattr(Trainer, "evaluate", fail)
    config = resolve({**NANO, "root": str(tmp_path)})
    with pytest.raises(OSError, match="went away"):
        train(config)
    assert load_checkpoint(tmp_path / config.name / "last.pt")["step"] == 5


def test_a_validation_tail_too_short_for_a_later_phase_is_heard_of_at_the_start(tmp_path):
    (tmp_path / "short.txt").write_text("7 " * 6000)
    given = {key: value for key, value in NANO.items() if key != "train_seq_len"}
    given |= {"path": str(tmp_path / "short.txt"), "format": "txt", "vocab_size": 257, "max_seq_len": 1024}
    with pytest.raises(OnebError, match="validation tail"):
        train(resolve({**given, "phases": "256@0,700@10", "root": str(tmp_path / "runs")}))
    assert not (tmp_path / "runs").exists()


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    directory, rows = run(tmp_path, steps=2)
    before = (directory / "train.jsonl").read_bytes()
    assert train(resolve({**NANO, "root": str(tmp_path), "steps": 2, "if_exists": "resume"})) == 0
    assert (directory / "train.jsonl").read_bytes() == before


def test_ckpt_without_resume_starts_anew_from_its_weights(tmp_path):
    first, _ = run(tmp_path)
    _, rows = run(tmp_path, tag="second", ckpt=str(first / "last.pt"), steps=3)
    assert losses(rows)[1] < 4.5
    assert rows[0]["start_step"] == 0


@pytest.mark.parametrize(("change", "message"), [
    ({"d_ff": 512}, "--d-ff"),
    ({"variant": "baseline", "ckpt": "oneb_decoupled_seed1337/last.pt"}, "--variant"),
    ({"path": "other"}, "fingerprint"),
    ({"ckpt": "oneb_decoupled_seed1337/best.pt"}, "without optimizer state"),
    ({"ckpt": "nowhere.pt"}, "no checkpoint at"),
])
def test_what_cannot_be_resumed_is_refused(tmp_path, change, message):
    run(tmp_path, steps=2, eval_every=1)
    if change.get("path"):
        import numpy as np

        np.save(tmp_path / "other.npy", np.arange(20000, dtype=np.uint16) % 257)
        change = {"path": str(tmp_path / "other.npy"), "vocab_size": 257}
    if change.get("ckpt"):
        change = {**change, "ckpt": str(tmp_path / change["ckpt"])}
    config = resolve({**NANO, "root": str(tmp_path), "steps": 4, "resume": True, **change})
    with pytest.raises(OnebError, match=message):
        train(config)


@pytest.mark.parametrize("damage", ["truncate", "flip", "no sidecar"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    directory, _ = run(tmp_path, steps=2)
    last = directory / "last.pt"
    content = bytearray(last.read_bytes())
    if damage == "truncate":
        last.write_bytes(content[:-100])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        last.write_bytes(content)
    else:
        (directory / "last.pt.json").unlink()
    with pytest.raises(OnebError, match="cut short|damaged"):
        train(resolve({**NANO, "root": str(tmp_path), "resume": True}))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_the_run_continues(tmp_path, signum):
    def words(steps):
        return [sys.executable, "-m", "oneb.train", "--size", "nano", "--layers", "2", "--data", "demo",
                "--device", "cpu", "--train-seq-len", "64", "--steps", str(steps), "--log-every", "1",
                "--live", "off", "--eval-iters", "1", "--run-root", str(tmp_path)]

    process = subprocess.Popen(words(100_000), cwd=REPOSITORY, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    log = tmp_path / "oneb_decoupled_seed1337" / "train.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and '"step": 5,' in log.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signum, output
    step = json.loads((log.parent / "last.pt.json").read_text())["step"]
    assert step >= 5
    more = subprocess.run([*words(step + 3), "--resume", "--allow-change"], cwd=REPOSITORY, capture_output=True,
                          text=True)
    assert more.returncode == 0, more.stderr
    assert json.loads((log.parent / "last.pt.json").read_text())["step"] == step + 3


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["baseline", "gqa", "decoupled"])
def test_compiled_fused_training_equals_plain_on_the_gpu(tmp_path, variant):
    given = {"variant": variant, "device": "cuda", "null_attn": True, "steps": 30, "d_model": 256, "n_heads": 4,
             "param_dtype": "fp32", "optimizer": "adamw"}
    _, plain = run(tmp_path / "plain", compile=False, fused=False, **given)
    _, fast = run(tmp_path / "fast", compile=True, fused=True, **given)
    assert losses(fast) == pytest.approx(losses(plain), rel=0.01)
    assert val_losses(fast) == pytest.approx(val_losses(plain), rel=0.01)
    assert not [row for row in fast if row.get("event") == "recompile"]


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["gqa", "decoupled"])
def test_a_deterministic_run_repeats_itself_on_the_gpu(tmp_path, variant, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as oneb.cli.train sets it
    given = {"variant": variant, "device": "cuda", "null_attn": True, "d_model": 256, "n_heads": 4,
             "deterministic": True, "train_seq_len": 512, "max_seq_len": 512}
    first, rows = run(tmp_path / "first", **given)
    run(tmp_path / "second", steps=6, **given)
    second, more = run(tmp_path / "second", resume=True, **given)
    assert losses(rows) == losses(more)
    assert_same_weights(weights(first), weights(second))
