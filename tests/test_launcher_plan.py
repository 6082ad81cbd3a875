"""The launcher's plan for a GPU, its budget, and the rehearsal before a run."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from data_helpers import write_npy
from launcher_helpers import NANO, config, launch, printed_command, write_checkpoint

from oneb.cli import rehearse
from oneb.cli.launch import main as launch_here
from oneb.errors import OnebError
from oneb.gpus import get_gpu
from oneb.planner import fit_to, make_plan
from oneb.units import format_duration

H100 = get_gpu("h100")


# ---- plans for a GPU

def fake_gpu(folder: Path, line: str, log: Path | None = None) -> str:
    """A PATH on which nvidia-smi answers ``line``, and writes its arguments to ``log``."""
    folder.mkdir()
    program = folder / "nvidia-smi"
    note = f'echo "$@" >> "{log}"\n' if log else ""
    program.write_text(f"#!/bin/bash\n{note}echo '{line}'\n")
    program.chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def plan_text(output: str) -> list[str]:
    """Every line but those of the command to paste."""
    return [line for paragraph in output.split("\n\n") if "-m oneb.train" not in paragraph
            for line in paragraph.splitlines()]


@pytest.mark.parametrize("words", [
    (), ("--gpu", "h100", "--price", "2.49"), ("--gpu", "4060", "--variant", "baseline"),
    ("--gpu", "rtx3090", "--seq-schedule", "256@0,512@5,1024@7,2048@9,1024@11,512@13,256@1000000"),
    ("--gpu", "t4", "--optimizer", "adamw", "--size", "large", "--save-every", "7", "--data-format", "auto"),
    ("--gpu", "b200", "--budget", "100000", "--batch-tokens", "4M", "--lr", "1", "--warmup-steps", "100"),
    ("--gpu", "a100", "--variant", "bottleneck", "--attn-dim", "1024", "--vocab-size", "1000000"),
    ("--gpu", "4090", "--seq-schedule", ",".join(f"{128 << i % 5}@{i * 100}" for i in range(12)), "--price", "0.5"),
    NANO,
])
def test_every_screen_fits_80_columns(tmp_path, words):
    done = launch(*words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = plan_text(done.stdout)
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert not [line for line in lines if line != line.rstrip()]


def test_a_gpu_that_is_not_here_is_planned_for(tmp_path):
    done = launch("--gpu", "h100", "--price", "2", "--train-seq-len", "2048", "--steps", "1000", cwd=tmp_path)
    assert "no GPU here" not in done.stdout
    assert "[plan] gpu=h100: 78.6 GiB to use" in done.stdout
    for part in ("weights", "gradients", "optimizer", "activations", "loss head", "workspace", "allocator", "context",
                 "peak, of 78.6", "tokens a second, estimated", "micro-batch x accumulation", "layers recomputed"):
        assert f" {part} " in done.stdout
    assert "at $2.00 an hour" in done.stdout
    assert "[fit] at 2048 tokens: micro-batch" in done.stdout
    assert "disk≈" in done.stdout
    # The GPU is the plan's affair; the command trains on what will be there.
    assert "--gpu" not in printed_command(done.stdout)


def test_a_vocabulary_larger_than_the_models_is_noticed(tmp_path):
    write_npy(tmp_path / "x.npy", range(9), meta={"vocab_size": 128256})
    done = launch("--data", "x.npy", cwd=tmp_path)
    assert "the model has 50257: the run needs --vocab-size 128256" in " ".join(done.stdout.split())
    assert "128256" not in launch("--data", "x.npy", "--vocab-size", "200000", cwd=tmp_path).stdout


def test_without_a_gpu_the_plan_says_how_to_name_one(tmp_path):
    assert "[plan] no GPU here: add --gpu h100" in launch(cwd=tmp_path).stdout
    done = launch(*NANO, cwd=tmp_path).stdout
    assert "no GPU here" not in done
    assert "GPU memory" not in done


def test_the_tables_price_is_called_approximate(tmp_path):
    assert "(RunPod" in launch("--gpu", "h100", cwd=tmp_path).stdout
    done = launch("--gpu", "a10", cwd=tmp_path).stdout  # the table has no price of it
    assert "time≈" in done
    assert "cost" not in done


def test_the_gpu_of_this_machine_is_planned_for(tmp_path):
    log = tmp_path / "asked"
    path = fake_gpu(tmp_path / "bin", "NVIDIA H200, 1000, 100000", log)
    done = launch(cwd=tmp_path, PATH=path)
    assert "gpu=NVIDIA H200 (in this machine): 97.7 GiB free" in done.stdout
    assert "tokens a second, expected" in done.stdout
    assert "--id=0" in log.read_text()
    launch(cwd=tmp_path, PATH=path, CUDA_VISIBLE_DEVICES="3,1")
    assert "--id=3" in log.read_text().splitlines()[-1]
    assert "no GPU here" in launch(cwd=tmp_path, PATH=path, CUDA_VISIBLE_DEVICES="").stdout
    limited = launch("--vram-limit-gib", "24", cwd=tmp_path, PATH=path)
    assert "peak, of 24.0" in limited.stdout


def test_a_card_that_is_not_in_the_table_is_fitted_without_speed(tmp_path):
    done = launch(cwd=tmp_path, PATH=fake_gpu(tmp_path / "bin", "NVIDIA Z1000, 0, 12000"))
    assert "not in our table" in " ".join(done.stdout.split())
    assert "peak, of 11.7" in done.stdout
    assert "tokens a second" not in done.stdout


@pytest.mark.parametrize(("words", "said"), [
    ("--gpu h1000", "Did you mean h100"),
    ("--gpu h100 --device cpu", "leave one of them out"),
    ("--gpu h100 --run", "nvidia-smi finds no GPU here"),
    ("--gpu h100 --rehearse", "nvidia-smi finds no GPU here"),
    ("--budget 40", "no GPU is here"),
    ("--budget 40 --gpu h100 --steps 5", "--budget 40 and --steps 5 both set"),
    ("--budget 40 --gpu h100 --target-tokens 1B", "--budget 40 and --target-tokens 1000000000 both set"),
    ("--budget 0 --gpu h100", "must be above 0"),
    ("--budget 40 --gpu h100 --price 0", "at --price 0 there is no end"),
    ("--budget 40 --gpu a10", "add --price X"),
    ("--budget 0.00001 --gpu h100", "does not last for one step"),
    ("--budget 1 --gpu t4 --warmup-steps 50000", "--warmup-steps 50000 is longer than the run"),
])
def test_mistakes_about_gpu_and_money(tmp_path, words, said):
    done = launch(*words.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_faults_of_the_budget_are_listed_with_the_others(tmp_path):
    done = launch("--budget", "-1", "--steps", "5", "--lr", "0", cwd=tmp_path)
    assert "3 problems" in done.stderr


def test_another_gpu_than_the_one_here_cannot_be_run_on(tmp_path):
    path = fake_gpu(tmp_path / "bin", "NVIDIA L4, 0, 20000")
    done = launch("--gpu", "h100", "--run", cwd=tmp_path, PATH=path)
    assert done.returncode == 2
    assert "the GPU here is NVIDIA L4" in done.stderr
    assert "gpu=h100" in launch("--gpu", "h100", cwd=tmp_path, PATH=path).stdout
    assert "gpu=NVIDIA L4 (in this machine)" in launch("--gpu", "l4", cwd=tmp_path, PATH=path).stdout


@pytest.mark.parametrize("dollars", [1, 40, 900])
def test_a_budget_buys_as_many_steps_as_it_can(tmp_path, dollars):
    words = ("--gpu", "h100", "--price", "2.5")
    done = launch(*words, "--budget", str(dollars), cwd=tmp_path)
    steps = int(re.search(r"steps=(\d+)", done.stdout)[1])
    assert f"--steps {steps} " in printed_command(done.stdout)
    warmup = min(2000, -(-steps // 50))
    assert f"--warmup-steps {warmup} " in printed_command(done.stdout)

    def cost(steps: int) -> float:
        given = config("--steps", str(steps))
        return make_plan(given, gpu=H100, fit=fit_to(given, H100, H100.usable_bytes), price=2.5).dollars

    assert cost(steps) <= dollars < cost(steps + 1)


def test_a_continued_run_keeps_the_length_that_its_budget_bought(tmp_path):
    run = tmp_path / "runs/oneb_decoupled_seed1337"
    write_checkpoint(run / "last.pt", config().model)
    words = ("--gpu", "h100", "--budget", "40", "--if-exists", "resume")
    done = launch(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "config.json; give its --steps instead" in done.stderr
    (run / "config.json").write_text(json.dumps({"train": {"steps": 4321}}))
    assert "steps=4321 " in launch(*words, cwd=tmp_path).stdout


def test_what_is_left_of_a_continued_run(tmp_path):
    path = tmp_path / "runs/oneb_decoupled_seed1337/last.pt"
    write_checkpoint(path, config().model)
    sidecar = path.with_name("last.pt.json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"step": 15_000}))
    words = ("--gpu", "h100", "--price", "2", "--resume")
    text = " ".join(launch(*words, cwd=tmp_path).stdout.split())
    assert "resumes at step 15,000: 5,000 steps and 164M tokens are left, " in text
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"step": 20_000}))
    assert "nothing is left to do" in launch(*words, cwd=tmp_path).stdout


def test_epochs_are_counted_from_the_header(tmp_path):
    np.save(tmp_path / "small.npy", np.zeros(30_000_000, np.uint16))
    done = launch("--data", "small.npy", "--steps", "20000", cwd=tmp_path)
    assert "the data has 30.0M tokens" in " ".join(done.stdout.split())
    assert "teach little" in " ".join(done.stdout.split())


def test_a_terminal_without_blocks_gets_ascii(tmp_path):
    done = launch("--gpu", "h100", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert "|####" in done.stdout
    assert "planned_tokens?0.4915B" in done.stdout


# ---- rehearsal before the run

@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Launch in this process, with a stand-in for the rehearsal and for what replaces the process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", "")
    calls = []

    def rehearsed(interpreter, words, config):
        calls.append(("rehearse", list(words)))
        lengths = sorted({seq_len for _, seq_len in config.train.phases})
        return SimpleNamespace(tok_s=dict.fromkeys(lengths, 10_000.0))

    monkeypatch.setattr(rehearse, "rehearse", rehearsed)
    monkeypatch.setattr(rehearse, "rehearsal_lines", lambda found: ["[rehearsal] went well"])
    monkeypatch.setattr(os, "execv", lambda path, words: calls.append(("train", words[3:])) or 0)

    def run(*words: str, gpu: str | None = None):
        if gpu:
            monkeypatch.setenv("PATH", fake_gpu(tmp_path / "bin", gpu))
        calls.clear()
        return launch_here(list(words)), [name for name, _ in calls], dict(calls)

    return run


def test_a_run_on_cuda_is_rehearsed_first(launched, capsys):
    code, order, calls = launched("--run", gpu="NVIDIA H200, 0, 100000")
    assert (code, order) == (0, ["rehearse", "train"])
    assert calls["rehearse"] == calls["train"]
    output = capsys.readouterr().out
    # 492M tokens at 10,000 a second, and 2%.
    tokens = 16 * 10_000 * (1024 + 2048)
    assert f"time≈{format_duration(tokens / 10_000 / 0.98)}" in output.split("went well")[1]


@pytest.mark.parametrize(("words", "order"), [
    (("--run", "--no-rehearse"), ["train"]), (("--rehearse",), ["rehearse"]), ((), []),
    ((*NANO, "--run"), ["train"]), ((*NANO, "--run", "--rehearse"), ["rehearse", "train"]),
    ((*NANO, "--rehearse"), ["rehearse"]), (("--run", "--device", "auto"), ["train"]),
])
def test_when_there_is_a_rehearsal(launched, words, order, capsys):
    assert launched(*words)[:2] == (0, order)
    assert ("dry run" in capsys.readouterr().out) == (not order)


def test_the_rehearsals_speed_decides_what_the_budget_buys(launched, capsys):
    code, order, calls = launched("--run", "--budget", "40", "--price", "4", gpu="NVIDIA H200, 0, 100000")
    assert order == ["rehearse", "train"]
    # Ten hours, less 2%, at 10,000 tokens a second: the schedule's first phase is 10,000 steps of 16 x 1024 tokens.
    tokens = 10 * 3600 * 0.98 * 10_000
    steps = 10_000 + int((tokens - 10_000 * 16 * 1024) / (16 * 2048))
    words = calls["train"]
    assert words[words.index("--steps") + 1] == str(steps)
    assert int(calls["rehearse"][calls["rehearse"].index("--steps") + 1]) > 2 * steps
    output = capsys.readouterr().out
    assert f"buys {steps:,} steps instead of" in output
    assert f"--steps {steps} " in output.split("went well")[1]
    assert "cost≈$40.00" in output.split("went well")[1]


def test_a_finished_run_is_neither_rehearsed_nor_started(launched, tmp_path, capsys):
    write_checkpoint(tmp_path / "runs/oneb_decoupled_seed1337/last.pt", config(*NANO).model)
    assert launched(*NANO, "--resume", "--steps", "1", "--run", "--rehearse")[:2] == (0, [])
    assert "Nothing to do" in capsys.readouterr().out
    assert launched(*NANO, "--resume", "--steps", "2", "--run", "--rehearse")[:2] == (0, ["rehearse", "train"])


def test_a_failed_rehearsal_starts_nothing(launched, monkeypatch, capsys):
    def fails(interpreter, words, config):
        raise OnebError("the disk is full; make room")

    monkeypatch.setattr(rehearse, "rehearse", fails)
    code, order, _ = launched("--run", gpu="NVIDIA H200, 0, 100000")
    assert (code, order) == (2, [])
    assert "the disk is full" in capsys.readouterr().err
