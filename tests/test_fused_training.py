"""Whole runs of the trainer through fused blocks and fp8 products: the same losses, and the same when resumed."""

import dataclasses
import gc
import weakref

import pytest
import torch

from oneb.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from oneb.config import device_defaults
from oneb.errors import OnebError
from oneb.files import read_json_lines
from oneb.model.attention import Attention
from oneb.presets import resolve
from oneb.show.recorder import Recorder
from oneb.train.run import train
from oneb.train.setup import build
from oneb.train.trainer import Trainer

# Widths in multiples of 16, as fp8 wants them; heads of decoupled are 12 wide.
SMALL = {
    "d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 96, "max_seq_len": 32, "train_seq_len": 32, "path": "demo",
    "device": "cpu", "batch_size": 2, "grad_accum": 2, "steps": 8, "log_every": 1, "eval_every": 4, "eval_iters": 1,
    "lr": 1e-3, "warmup_steps": 2, "lr_schedule": "constant", "live": "off", "sem_dim": 16, "geo_dim": 32,
}


@pytest.fixture(autouse=True)
def quick_runs(monkeypatch):
    """Small evaluations, no plots, and one thread: at these sizes a second one mostly waits for its core."""
    monkeypatch.setattr("oneb.train.setup.EVAL_ITER_TOKENS", 1024)
    monkeypatch.setattr(Recorder, "refresh_report", lambda self, step: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def configuration(root, **given):
    given = {**SMALL, **given}
    if given.get("variant", "decoupled") != "decoupled":
        given = {name: value for name, value in given.items() if name not in ("sem_dim", "geo_dim")}
    if "phases" in given:
        del given["train_seq_len"]
    return resolve({**given, "root": str(root)})


def run(root, **given):
    """Train; returns the run's directory."""
    config = configuration(root, **given)
    assert train(config) == 0
    return root / config.name


def rows(directory, kind="train"):
    return [row for row in read_json_lines(directory / "train.jsonl") if row["type"] == kind]


def losses(directory):
    return {row["step"]: row["loss"] for row in rows(directory)}


def val_losses(directory):
    return {row["step"]: row["val_loss"] for row in rows(directory, "eval")}


def state(directory, name="last.pt"):
    """Weights, optimizer state and fp8 scales of a checkpoint, by name."""
    saved = load_checkpoint(directory / name)
    found = {f"model.{key}": tensor for key, tensor in saved["model"].items()}
    for parameter, tensors in saved["optimizer"]["state"].items():
        found |= {f"optimizer.{parameter}.{key}": tensor for key, tensor in tensors.items()}
    return found | {f"float8.{key}": tensor for key, tensor in (saved["float8"] or {}).items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def without_newer_keys(path):
    """Rewrite a checkpoint as the version before fused blocks and ``--precision`` wrote it."""
    saved = load_checkpoint(path)
    del saved["float8"], saved["format"]
    for name in ("precision", "fused_blocks"):
        del saved["config"]["train"][name]
    save_checkpoint(path, saved)


@pytest.mark.parametrize("given", [
    {"null_attn": True}, {"variant": "gqa", "n_kv_heads": 2}, {"grad_checkpoint": "all", "tie_qk": True},
], ids=["decoupled", "gqa", "recomputed"])
def test_fused_blocks_train_as_the_plain_ones(tmp_path, given):
    given |= {"steps": 20, "optimizer": "adamw", "phases": "17@0,32@10"}  # an odd length too
    plain = run(tmp_path / "plain", fused_blocks=False, **given)
    fused = run(tmp_path / "fused", fused_blocks=True, **given)
    assert losses(fused) == pytest.approx(losses(plain), rel=2e-6)
    assert val_losses(fused) == pytest.approx(val_losses(plain), rel=2e-6)
    assert losses(plain)[20] < losses(plain)[1] - 0.5


@pytest.mark.parametrize("param_dtype", ["fp32", "fp16"])
def test_fused_blocks_train_alike_with_a_scaled_loss(tmp_path, param_dtype):
    given = {"precision": "fp16", "param_dtype": param_dtype, "steps": 12}
    plain = run(tmp_path / "plain", fused_blocks=False, **given)
    fused = run(tmp_path / "fused", fused_blocks=True, **given)
    assert load_checkpoint(fused / "last.pt")["scaler"]["scale"] > 1
    assert losses(fused) == pytest.approx(losses(plain), rel=5e-4)


@pytest.mark.parametrize("param_dtype", ["bf16", "fp32"])
def test_a_stopped_fp8_run_continues_bit_for_bit(tmp_path, param_dtype):
    given = {"precision": "fp8", "param_dtype": param_dtype, "phases": "16@0,32@4", "null_attn": True}
    whole = run(tmp_path / "whole", eval_every=3, **given)
    run(tmp_path / "cut", eval_every=0, steps=3, **given)
    cut = run(tmp_path / "cut", eval_every=0, resume=True, **given)
    a, b = state(whole), state(cut)
    # The scales have moved on from the calibration of the first step, or equality would show little.
    assert any(key.startswith("float8.history") and tensor.gt(0).all() for key, tensor in a.items())
    assert_equal(a, b)
    assert losses(whole) == losses(cut)
    assert losses(whole)[8] < losses(whole)[1]


def test_recomputed_fp8_equals_kept(tmp_path):
    kept = run(tmp_path / "kept", precision="fp8", steps=4)
    recomputed = run(tmp_path / "recomputed", precision="fp8", steps=4, grad_checkpoint="all")
    assert_equal(state(kept), state(recomputed))


def test_fp8_micro_batches_are_one_batch(tmp_path):
    given = {"precision": "fp8", "param_dtype": "fp32", "steps": 10, "optimizer": "adamw"}
    one, four = (run(tmp_path / str(n), batch_size=4 // n, grad_accum=n, **given) for n in (1, 4))
    # Alike to the rounding of bf16 and fp8: scales are found on the same sequence, and amaxes are the whole batch's.
    assert losses(one) == pytest.approx(losses(four), rel=1e-3)
    a, b = state(one)["float8.scale"], state(four)["float8.scale"]
    assert ((a / b).log2().abs() <= 1).all()


def test_fp8_learns_like_16_bit(tmp_path):
    given = {"steps": 20, "param_dtype": "fp32"}
    wide = run(tmp_path / "wide", precision="bf16", **given)
    narrow = run(tmp_path / "narrow", precision="fp8", **given)
    assert losses(narrow) != losses(wide)
    assert losses(narrow) == pytest.approx(losses(wide), rel=0.01)
    assert losses(wide)[20] < losses(wide)[1] - 0.5


def test_looking_at_an_fp8_run_does_not_change_it(tmp_path):
    plain = run(tmp_path / "plain", precision="fp8")
    watched = run(tmp_path / "watched", precision="fp8", eval_every=2, instrument="full", analysis_every=3, log_every=5)
    assert [row["step"] for row in rows(watched, "analysis")] == [3, 6]
    assert_equal(state(plain), state(watched))


def test_an_infinity_that_fp8_clamps_is_no_update(tmp_path, monkeypatch):
    # Of the attention's output, behind which nothing but the cast meets it: every gradient stays finite.
    step, attend, kept = Trainer.train_step, Attention.attend, {}

    def infinite(self, q, k, v, documents):
        y = attend(self, q, k, v, documents)
        return y.index_fill(2, torch.tensor([5]), float("inf"))

    def poisoned(self, batch):
        if batch.step != 4:
            return step(self, batch)
        kept["before"] = everything(self.parts)
        with monkeypatch.context() as patched:
            patched.setattr(Attention, "attend", infinite)
            result = step(self, batch)
        kept["after"] = everything(self.parts)
        return result

    def everything(parts):
        tensors = {name: p.detach().clone() for name, p in parts.model.named_parameters()}
        for name, states in parts.optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{key}": tensor.clone() for key, tensor in states.items()}
        return tensors | {"scale of the infinite": parts.float8.scale[:, 1].clone()}

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    directory = run(tmp_path, precision="fp8")
    assert_equal(kept["before"], kept["after"])
    by_step = {row["step"]: row for row in rows(directory)}
    assert [by_step[number]["skipped"] for number in (4, 5, 6, 8)] == [0, 1, 1, 1]
    assert by_step[8]["loss"] < by_step[1]["loss"]
    assert all(torch.isfinite(tensor).all() for tensor in state(directory).values())


def test_a_run_may_continue_in_fp8_and_return(tmp_path):
    run(tmp_path, precision="bf16", steps=3)
    directory = run(tmp_path, precision="fp8", steps=6, resume=True, allow_change=True)
    assert load_checkpoint(directory / "last.pt")["float8"] is not None
    run(tmp_path, precision="bf16", steps=9, resume=True, allow_change=True)
    assert load_checkpoint(directory / "last.pt")["float8"] is None
    notes = [row["message"] for row in rows(directory, "event") if "--precision" in row["message"]]
    assert len(notes) == 2
    assert "--precision: bf16 -> fp8" in notes[0]
    assert sorted(losses(directory)) == list(range(1, 10))
    assert losses(directory)[9] < losses(directory)[1]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_run_of_the_version_before_continues(tmp_path, precision):
    directory = run(tmp_path, steps=3, param_dtype="bf16")
    without_newer_keys(directory / "last.pt")
    run(tmp_path, steps=5, param_dtype="bf16", resume=True, precision=precision, allow_change=precision == "fp8")
    assert sorted(losses(directory)) == list(range(1, 6))
    changes = [row["message"] for row in rows(directory, "event") if "--allow-change" in row["message"]]
    assert len(changes) == (precision == "fp8"), changes


def test_scales_that_were_never_found_are_not_saved(tmp_path, monkeypatch):
    bf16 = run(tmp_path / "bf16", precision="bf16", steps=3)

    def fail(self, tokens):
        raise OSError("before the scales were found")

    config = configuration(tmp_path / "fp8", precision="fp8", steps=5, ckpt=str(bf16 / "last.pt"), resume=True,
                           allow_change=True)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_calibrate", fail)
        with pytest.raises(OSError, match="before the scales"):
            train(config)
    saved = load_checkpoint(tmp_path / "fp8" / config.name / "last.pt")
    assert (saved["step"], saved["float8"]) == (3, None)
    train(dataclasses.replace(config, run=dataclasses.replace(config.run, ckpt=None)))
    assert (state(tmp_path / "fp8" / config.name)["float8.scale"] != 1).any()


def test_weights_to_start_from_reach_the_fp8_copies(tmp_path):
    first = run(tmp_path / "first", precision="bf16", steps=12)
    warm = {"steps": 1, "warmup_steps": 1, "seed": 7, "ckpt": str(first / "last.pt")}
    wide, narrow = (run(tmp_path / name, precision=name, **warm) for name in ("bf16", "fp8"))
    # With copies of its own seed's weights it is 10% off.
    assert losses(narrow)[1] == pytest.approx(losses(wide)[1], rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_a_discarded_model_frees_its_memory_at_once(tmp_path, precision):
    parts = build(configuration(tmp_path, fused_blocks=True, precision=precision), lambda text: None)
    references = [weakref.ref(module) for module in parts.model.modules()]
    gc.collect()
    gc.disable()
    try:
        del parts
        assert not any(reference() for reference in references)
    finally:
        gc.enable()


def test_without_triton_nothing_is_compiled_either():
    settled = device_defaults(resolve({}).train, "cuda", has_triton=False)
    assert (settled.fused_blocks, settled.compile) == (False, False)


def test_a_compile_mode_that_would_do_nothing_is_refused():
    for given in ({}, {"compile": False}, {"fused_blocks": True}):
        with pytest.raises(OnebError, match="add --compile"):
            resolve({"compile_mode": "max-autotune", **given})
    for given in ({"compile": True}, {"fused_blocks": False}):
        settled = device_defaults(resolve({"compile_mode": "max-autotune", **given}).train, "cuda")
        assert (settled.compile, settled.compile_mode, settled.fused_blocks) == (True, "max-autotune", False)


@pytest.mark.gpu
@pytest.mark.parametrize("given", [{}, {"null_attn": True}, {"grad_checkpoint": "all"}], ids=["", "null", "recomputed"])
def test_narrow_heads_and_fused_blocks_train_as_the_plain_path_on_the_gpu(tmp_path, given):
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("the kernel for narrow heads needs compute capability 8.0")
    given |= {"device": "cuda", "d_model": 256, "n_heads": 8, "d_ff": 512, "sem_dim": 32, "geo_dim": 64, "steps": 20,
              "max_seq_len": 200, "phases": "200@0", "param_dtype": "fp32", "optimizer": "adamw", "batch_size": 4}
    fused = run(tmp_path / "fused", **given)
    assert rows(fused, "meta")[0]["attention_backend"] == "narrow"
    assert rows(fused, "meta")[0]["fused_blocks"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("oneb.train.setup.choose_backend", lambda *given, **options: "math")
        plain = run(tmp_path / "plain", fused_blocks=False, compile=False, **given)
    assert losses(fused) == pytest.approx(losses(plain), rel=0.01)
    assert val_losses(fused) == pytest.approx(val_losses(plain), rel=0.01)
    assert losses(plain)[20] < losses(plain)[1] - 0.5
    assert not [row for row in rows(fused, "event") if row["event"] == "recompile"]


@pytest.mark.gpu
def test_fp8_trains_like_bf16_and_resumes_on_the_gpu(tmp_path):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 products need compute capability 8.9")
    given = {"device": "cuda", "variant": "baseline", "d_model": 256, "n_heads": 4, "d_ff": 512, "max_seq_len": 128,
             "phases": "64@0,128@6", "steps": 20, "batch_size": 4, "deterministic": True, "lr": 3e-4}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as oneb.cli.train sets it
        wide = run(tmp_path / "wide", precision="bf16", **given)
        whole = run(tmp_path / "whole", precision="fp8", **given)
        run(tmp_path / "cut", precision="fp8", **(given | {"steps": 7}))
        cut = run(tmp_path / "cut", precision="fp8", resume=True, **given)
    assert losses(whole) == pytest.approx(losses(wide), rel=0.015)
    assert_equal(state(whole), state(cut))
