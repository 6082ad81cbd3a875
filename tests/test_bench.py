"""oneb bench: real children on the CPU, mistakes, the meter, kernels by name."""

import ast
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_runs import within

from oneb.bench import results
from oneb.bench.breakdown import MARK_BYTES, breakdown, classify
from oneb.bench.children import Children, spread
from oneb.bench.measure import Bench
from oneb.bench.meter import Meter, with_energy
from oneb.bench.points import Point, Settings
from oneb.cli import bench
from oneb.gpus import get_gpu
from oneb.train.trainer import Trainer

ROOT = Path(__file__).parents[1]
QUICK = ("--size", "nano", "--device", "cpu", "--precisions", "fp32", "--steps", "3", "--warmup", "2",
         "--batch-tokens", "128", "--ceiling-seconds", "0.001")
MEASURED = {"tok_s", "step_ms", "step_ms_p10", "step_ms_p90", "step_ms_mean", "data_ms", "memory_gib", "first_step_s",
            "clock_mhz", "watts", "tokens_per_joule", "recompiles", "mfu", "breakdown", "ceilings", "predicted", "gemm",
            "parameters", "batch_size", "grad_accum", "recomputed_layers", "tokens_per_step", "attention_backend",
            "train", "loss", "notes", "expected_tok_s"}


# ---- whole benches

def run_bench(*words, cwd):
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "oneb", "bench", *words], cwd=cwd, env=environment,
                          capture_output=True, text=True, timeout=600)


def test_a_bench_measures_real_runs_in_children_and_goes_on_after_one_that_fails(tmp_path):
    # A tenth of 2,000 tokens is for validation: windows of 32 fit into it, one of 1024 does not.
    np.save(tmp_path / "few.npy", np.random.default_rng(1).integers(300, size=2000, dtype=np.uint16))
    done = run_bench(
        *QUICK, "--variants", "decoupled", "--lengths", "1024", "32", "--data", "few.npy", "--commit", "abc",
        "--out", "sub/r.json", "--", "--layers", "2", "--vocab-size", "300", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    record = json.loads((tmp_path / "sub/r.json").read_text())
    assert record["commit"] == "abc"
    assert record["command"].startswith("oneb bench --variants decoupled --lengths 1024 32")
    assert record["command"].endswith("-- --layers 2 --vocab-size 300")
    assert set(record) >= {"command", "commit", "gpu", "torch", "triton", "driver", "date", "rows"}
    failed, row = record["rows"]
    assert (failed["seq_len"], row["seq_len"]) == (1024, 32)
    assert "validation tail" in failed["error"]
    assert "failed: decoupled 1024 fp32" in done.stdout
    assert row["error"] is None
    assert set(row) >= MEASURED
    # 128 tokens a step are four sequences of 32; the host's memory does not count, so they are one micro-batch.
    assert (row["batch_size"], row["grad_accum"], row["tokens_per_step"]) == (4, 1, 128)
    assert (row["asked_batch_size"], row["recomputed_layers"]) == ("auto", 0)
    assert any("micro-batch 4 x 1" in note for note in row["notes"])
    assert row["expected_tok_s"] is None  # a CPU is not in the table of GPUs
    assert row["tok_s"] == pytest.approx(128 / row["step_ms"] * 1e3)
    assert row["step_ms_p10"] <= row["step_ms"] <= row["step_ms_p90"]
    assert 0 < row["first_step_s"] < 600
    assert 0 <= row["data_ms"] < row["step_ms_mean"]
    assert row["breakdown"] is None  # nothing is invented where the profiler sees no GPU
    assert row["clock_mhz"] is row["watts"] is row["memory_gib"] is None
    # Random ids of 300: the untrained model knows nothing, and no run of a few steps learns any of it.
    assert row["loss"] == pytest.approx(np.log(300), abs=0.4)
    assert len(row["ceilings"]["gemm"]) == 15
    assert row["predicted"]["tok_s"] > 0
    assert row["predicted"]["source"] == "measured"


def test_points_that_share_a_process_are_measured_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""))
    out, data = tmp_path / "r.json", tmp_path / "tokens.npy"
    np.save(data, np.random.default_rng(2).integers(300, size=3000, dtype=np.uint16))
    assert bench.main(["--one", *QUICK, "--variants", "gqa", "--lengths", "16", "--batch-size", "8", "2",
                       "--data", str(data), "--out", str(out), "--", "--layers", "2", "--vocab-size", "300",
                       "--grad-checkpoint", "1"]) == 0
    rows = results.load(out)["rows"]
    assert [(row["batch_size"], row["grad_accum"], row["recomputed_layers"]) for row in rows] == [(8, 1, 1), (2, 4, 1)]
    assert rows[0]["first_step_s"] > 0
    assert rows[1]["first_step_s"] is None  # the process's age then counts the point before
    assert rows[0]["ceilings"]["gemm"][0]["m"] == 4 * rows[1]["ceilings"]["gemm"][0]["m"]
    assert rows[1]["predicted"]["us_per_token"]["grad_accumulation"] > 0
    assert rows[0]["predicted"]["us_per_token"]["grad_accumulation"] == 0
    capsys.readouterr()
    assert bench.main(["--show", str(out), "--markdown"]) == 0
    shown = capsys.readouterr().out
    assert f"{rows[0]['tok_s']:,.0f}" in shown
    assert "| gqa |" in shown


@pytest.fixture
def bench_of_h200(tmp_path):
    """A bench on the CPU that takes it for a card of the table."""
    np.save(tmp_path / "tokens.npy", np.random.default_rng(3).integers(300, size=4000, dtype=np.uint16))
    settings = Settings(size="nano", device="cpu", data=str(tmp_path / "tokens.npy"), batch_tokens=128, steps=2,
                        warmup=1, profile=False, ceiling_s=0, given={"n_layers": 2, "vocab_size": 300})
    found = Bench(settings, tmp_path)
    found.device = dataclasses.replace(found.device, name="NVIDIA H200", gpu=get_gpu("h200"))
    return found


@pytest.mark.parametrize("variant", ["baseline", "decoupled"])
def test_a_row_stores_the_expected_speed_that_would_be_worked_out_of_it(bench_of_h200, variant):
    row = bench_of_h200.row(Point(variant, 16, "fp32"))
    assert row["error"] is None
    assert row["predicted"]["source"] == "GPU table"
    stored = row.pop("expected_tok_s")
    assert 0 < stored < row["predicted"]["tok_s"]
    (again,) = results.with_expected({"gpu": "NVIDIA H200", "rows": [json.loads(json.dumps(row))]})["rows"]
    assert again["expected_tok_s"] == pytest.approx(stored)


def test_a_point_that_runs_out_of_memory_is_measured_with_less_and_says_so(bench_of_h200, monkeypatch):
    real = Trainer._gradients

    def limited(self, batch):
        if self.fit.at(batch.seq_len).batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return real(self, batch)

    monkeypatch.setattr(Trainer, "_gradients", limited)
    row = bench_of_h200.row(Point("gqa", 16, "fp32", 8))
    assert row["error"] is None
    assert (row["asked_batch_size"], row["batch_size"], row["grad_accum"], row["tokens_per_step"]) == (8, 2, 4, 128)
    assert sum("Tried to allocate" in note for note in row["notes"]) == 2


@pytest.mark.gpu
def test_a_bench_on_a_gpu_knows_every_kernel(tmp_path):
    done = run_bench("--size", "nano", "--variants", "baseline", "decoupled", "--lengths", "256", "--steps", "5",
                     "--batch-tokens", "4096", "--ceiling-seconds", "0.02", "--out", "r.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for row in results.load(tmp_path / "r.json")["rows"]:
        found = row["breakdown"]
        assert found["marked"]
        assert found["largest_unknown"] is None
        assert sum(found["share"].values()) == pytest.approx(1.0, abs=0.05)
        assert min(found["ms"][kind] for kind in ("gemm", "attention", "elementwise", "loss", "optimizer")) > 0
        assert row["clock_mhz"] > 100
        assert row["tokens_per_joule"] == pytest.approx(row["tok_s"] / row["watts"])
        assert row["recompiles"] == 0
        # 16 sequences of 256 tokens, all of which fit at once.
        assert (row["batch_size"], row["grad_accum"], row["recomputed_layers"]) == (16, 1, 0)
        assert (row["expected_tok_s"] is None) == (row["mfu"] is None)


@pytest.mark.parametrize(("words", "axes"), [
    ([], [("auto",)]), (["--grow"], [("length",), ("batch",)]), (["--grow", "both"], [("length",), ("batch",)]),
    (["--grow", "length"], [("length",)]), (["--grow", "batch"], [("batch",)]),
])
def test_growth_is_measured_along_the_axes_asked_for(words, axes):
    args = bench.build_parser().parse_args([*words, "--variants", "baseline", "decoupled", "--precisions", "fp8"])
    tasks = bench._tasks(args)
    found = []
    for task in tasks:
        (variant,), (precision,) = {point.variant for point in task}, {point.precision for point in task}
        lengths, sizes = {point.seq_len for point in task}, {point.batch_size for point in task}
        assert precision == "fp8"
        axis = "length" if len(lengths) > 1 else "batch" if len(sizes) > 1 else "auto"
        assert sizes == {None} if axis != "batch" else lengths == {2048} and min(sizes) == 1
        found.append((variant, axis))
    assert found == [(variant, *axis) for variant in ("baseline", "decoupled") for axis in axes]


@pytest.mark.parametrize(("words", "message"), [
    (["--variants", "baseline"], "--out"),
    (["--out", "x.json", "--lengths", "0"], "at least 1"),
    (["--out", "x.json", "--batch-size", "many"], "'many' is neither a whole number nor auto"),
    (["--out", "x.json", "--batch-size", "4", "0"], "--batch-size 0"),
    (["--out", "x.json", "--batch-size=-3"], "--batch-size -3"),
    (["--out", "x.json", "--grow", "width"], "--grow"),
    (["--out", "x.json", "--length", "5"], "did you mean --lengths"),
    (["--out", "x.json", "--data", "nowhere.npy"], "nowhere.npy is not there"),
    (["--out", "x.json", "--", "--steps", "5"], "give --steps before the --"),
    (["--out", "x.json", "--", "--data", "x.npy"], "give --data before the --"),
    (["--out", "x.json", "--", "--batch-tokens", "512K"], "give --batch-tokens before the --"),
    (["--out", "x.json", "--", "--optimiser", "lion"], "did you mean --optimizer"),
    (["--out", "x.json", "--lengths", "4096", "--", "--block", "2048"], "--block 4096"),
    (["--out", "x.json", "--gpus", "0,,1"], "write them as 0,1"),
    (["--show", "nowhere.json"], "no results at nowhere.json"),
])
def test_mistakes_are_one_line_with_the_fix(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = bench.main(words)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


# ---- children

@pytest.fixture
def run_child(tmp_path):
    def run(code, timeout_s=30.0):
        return Children(timeout_s).run([sys.executable, "-c", code], os.environ, tmp_path / "log")
    return run


def test_what_went_wrong_in_a_child_is_told(run_child):
    assert run_child("print('fine')") is None
    assert run_child("print('a'); raise SystemExit('error: no such thing')") == "exit code 1: no such thing"
    assert run_child("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)") == "ended by SIGSEGV"


def test_a_child_that_takes_too_long_ends_with_all_that_it_started(run_child, tmp_path):
    code = (f"import subprocess, time; child = subprocess.Popen(['sleep', '600']); "
            f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); time.sleep(600)")
    # Unless its time is over before it has started one.
    assert any("--timeout" in run_child(code, limit) and (tmp_path / "pid").exists() for limit in (1.5, 10.0, 60.0))
    stat = Path("/proc", (tmp_path / "pid").read_text(), "stat")

    def ended() -> bool:
        with contextlib.suppress(OSError):
            return stat.read_text().rpartition(")")[2].split()[0] == "Z"
        return True

    assert within(60, ended), "the child's own child lives on"


def test_each_gpu_has_one_child_at_a_time_and_an_error_stops_the_rest(tmp_path):
    places = [{"gpu": str(number)} for number in range(3)]
    busy, done, lock, all_at_once = set(), [], threading.Lock(), threading.Barrier(3)

    def work(task, place):
        with lock:
            assert place["gpu"] not in busy
            busy.add(place["gpu"])
        all_at_once.wait(60)
        with lock:
            busy.remove(place["gpu"])
            done.append(task)

    spread(range(12), places, work, Children(1))
    assert sorted(done) == list(range(12))

    children = Children(600)

    def waits_or_breaks(task, place):
        if task == 1:
            time.sleep(0.3)
            raise KeyboardInterrupt
        children.run(["sleep", "300"], os.environ, tmp_path / f"log{task}")

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        spread(range(4), places[:2], waits_or_breaks, children)
    assert time.monotonic() - began < 200


def test_the_meter_reads_the_gpu_that_it_is_told_to(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho \"$@\" > arguments\n"
                    "while true; do echo '1500, 690.5'; echo '[N/A], [N/A]'; echo '1600, 699.5'; sleep 0.05; done\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    with Meter("GPU-123").running() as meter:
        assert within(60, lambda: meter.samples)
        began = time.time()
        before = len(meter.samples)
        assert within(60, lambda: len(meter.samples) >= before + 4)
        ended = time.time()
    assert (tmp_path / "arguments").read_text().startswith("-i GPU-123 ")
    figures = meter.between(began, ended)
    assert 1500 <= figures["clock_mhz"] <= 1600
    assert with_energy(figures, 1000.0)["tokens_per_joule"] == 1000.0 / figures["watts"]
    assert meter.between(ended + 60, ended + 61) == {"clock_mhz": None, "watts": None}
    with Meter(None).running() as none:
        pass
    assert with_energy(none.between(0, ended), 5.0) == {"clock_mhz": None, "watts": None, "tokens_per_joule": None}


# ---- kernels by name

NAMES = {
    "gemm": ["nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NNT", "nvjet_hsh_128x256_64x4_1x2_h_bz_TNN",
             "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x256_32x3_nn_align8>(Params)",
             "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off",
             "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(cublasLt::cublasSplitKParams)",
             "ampere_fp16_s16816gemm_fp16_128x128_ldg8_f2f_stages_32x5_tn"],
    "attention": ["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0",
                  "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_6_128x64x64_1x1x1_kernel0_0",
                  "void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 128, 64, 64>(float)",
                  "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, cutlass::bfloat16_t>>",
                  "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::half_t>(Flash_bwd_params)",
                  "fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<float>::Params)"],
    "optimizer": ["_lion_kernel", "_adamw_kernel", "void at::native::lpnorm_cleanup<float, (at::native::NormType)1>",
                  "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<1>, "
                  "at::native::LpNormFunctor<c10::BFloat16, (at::native::NormType)1, float, 1, 1, 0>, float*, int>"],
    "elementwise": ["triton_poi_fused_add_mul_silu_5", "triton_red_fused__to_copy_mean_mul_rsqrt_2",
                    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int)",
                    "void at::native::reduce_kernel<512, 1, ReduceOp<float, at::native::func_wrapper_t<float, "
                    "at::native::sum_functor<float, float, float>>>>",
                    "void at::native::(anonymous namespace)::embedding_backward_feature_kernel<float>"],
    "loss": ["triton_red_fused__to_copy_arange_exp_gather_logsumexp_lt_where_3",
             "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float>"],
    "grad_accumulation": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>"],
    "other": ["Memcpy HtoD (Pinned -> Device)", "Memset (Device)"],
}
# The class of each of our own kernels, by its file.
OURS = {"optimizer_step": "optimizer", "float8": "fp8_casts", "rms_norm": "elementwise", "swiglu": "elementwise",
        "rotary": "elementwise", "softmax_loss": "loss", "narrow_attention": "attention",
        "narrow_attention_backward": "attention", "null_terms": "attention", "optimizer_step8": "optimizer"}


def our_kernels():
    for path in sorted((ROOT / "oneb/kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                yield pytest.param(path.stem, node.name, id=f"{path.stem}-{node.name}")


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_a_library_kernel_is_known_by_its_name(kind, name):
    assert classify(name) == kind


@pytest.mark.parametrize(("file", "name"), list(our_kernels()))
def test_each_kernel_of_ours_is_known_by_its_name(file, name):
    assert classify(name) == OURS[file]


@pytest.mark.parametrize("name", ["ncclDevKernel_AllReduce_Sum_bf16", "my_kernel", "spin"])
def test_an_unknown_kernel_is_not_guessed_at(name):
    assert classify(name) is None


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("marks", [True, False])
def test_the_breakdown_adds_up(seed, marks, tmp_path):
    """Against a microsecond-by-microsecond painting of random, overlapping kernels."""
    rng = np.random.default_rng(seed)
    names = {"nvjet_x": "gemm", "_lion_kernel": "optimizer", "_rms_norm_kernel": "elementwise", "mystery": "other"}
    lead_in, steps, length = 1, 2, 400
    events, painted, sums = [], np.zeros((lead_in + steps) * length, bool), dict.fromkeys(names.values(), 0)
    first = 1 + int(rng.integers(5))
    for start in np.unique(rng.integers(first, len(painted) - 60, 120)):
        start = first if not events else int(start)
        if start % length > length - 40:
            continue  # no kernel reaches into a mark
        name = str(rng.choice(list(names)))
        dur = int(rng.integers(1, 40))
        events.append({"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": dur, "args": {}})
        if not marks or start >= lead_in * length:
            painted[start:start + dur] = True
            sums[names[name]] += dur
    last = max(event["ts"] + event["dur"] for event in events)
    if marks:
        events += [{"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": (step + 1) * length - 1, "dur": 1,
                    "args": {"bytes": MARK_BYTES}} for step in range(lead_in + steps)]
    noise = [{"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0, "dur": 9e9},
             {"ph": "M", "name": "x"}]
    rng.shuffle(events)
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": noise + events}))
    found = breakdown(path, lead_in=lead_in, steps=steps, micro_batches=2)
    start, end, counted = (lead_in * length, len(painted) - 1, steps) if marks else (first, last, lead_in + steps)
    assert found["marked"] is marks
    assert found["wall_ms"] == pytest.approx((end - start) / counted / 1e3)
    for kind, total in sums.items():
        assert found["ms"][kind] == pytest.approx(total / counted / 1e3)
    assert found["ms"]["idle"] == pytest.approx((end - start - painted[start:end].sum()) / counted / 1e3)
    assert found["largest_unknown"]["name"] == "mystery"
    assert found["largest_unknown"]["ms"] == pytest.approx(sums["other"] / counted / 1e3)


def test_a_profiler_that_saw_nothing_gives_no_breakdown(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [{"ph": "X", "cat": "cuda_runtime", "name": "x", "ts": 0, "dur": 5}]}))
    assert breakdown(path, lead_in=1, steps=2, micro_batches=1) is None


def test_the_help_names_every_option():
    text = bench.build_parser().format_help()
    flags = {flag for action in bench.build_parser()._actions for flag in action.option_strings if flag != "--one"}
    assert flags <= set(re.findall(r"-[-\w]+", text))
    assert "--one" not in text
