"""run_1b_launch.py as a user runs it: a process, its output and its exit code."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launcher_helpers import NANO, ROOT, as_bash_reads, config, launch, printed_command, write_checkpoint

from oneb.cli.options import config_to_args


def poisoned(folder: Path, *names: str) -> str:
    """A folder for PYTHONPATH where importing any of ``names`` is an error."""
    for name in names:
        (folder / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')\n")
    return str(folder)


def test_the_dry_run_prints_the_plan_and_changes_nothing(tmp_path):
    done = launch("--device", "cuda", "--data", "fineweb_1b.npy", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    # 16 sequences a step: 10,000 steps of 1024 tokens, then 10,000 of 2048.
    tokens = 16 * 10_000 * (1024 + 2048)
    assert f"[plan] global_batch=16 | steps=20000 | planned_tokens≈{tokens / 1e9:.4g}B" in done.stdout
    assert "[plan] seq_schedule=1024@0,2048@10000" in done.stdout
    assert "[plan] parameters=933M" in done.stdout
    assert f"{22 * (128 + 256 + 384) * 2:,} bytes a token" in done.stdout
    assert "[plan] run_directory=runs/oneb_decoupled_seed1337" in done.stdout
    assert "prepare_fineweb.py --tokens 1B --output fineweb_1b.npy" in done.stdout
    assert "--run" in done.stdout.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_the_dry_run_imports_neither_torch_nor_numpy(tmp_path):
    (tmp_path / "poison").mkdir()
    poison = poisoned(tmp_path / "poison", "torch", "numpy", "wandb", "rich", "matplotlib")
    for words in (("--data", "demo"), ("--gpu", "h100", "--budget", "40")):
        done = launch(*words, cwd=tmp_path, PYTHONPATH=poison)
        assert (done.returncode, done.stderr) == (0, "")
    # The poison works: a module that does import numpy fails.
    control = subprocess.run([sys.executable, "-c", "import numpy"], env={"PYTHONPATH": poison}, capture_output=True)
    assert b"numpy was imported" in control.stderr


@pytest.mark.parametrize("words", [
    (),
    ("--data=my data/it's \"here\" $HOME `id` \\ *.npy",),
    ("--data=-leading.npy", "--wandb-tags", "a,b c", "--wandb-name", "line\nbreak"),
    ("--variant", "gqa", "--kv-head", "8", "--null-attn", "--no-rope", "--lr", "1e-3", "--target-tokens", "10B"),
    ("--seq-schedule", "512@0, 1024@2000", "--run-root", "/content/drive/My Drive/runs", "--ckpt", "a b.pt"),
], ids=["defaults", "quotes", "dashes", "solved", "spaces"])
def test_the_printed_command_survives_the_shell(tmp_path, words):
    if "--ckpt" in words:
        write_checkpoint(tmp_path / "a b.pt", config().model)
    done = launch(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    argv = as_bash_reads(printed_command(done.stdout))
    # From outside the checkout, Python must be told where the package is.
    assert argv[:5] == ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "oneb.train"]
    assert config(*argv[5:]) == config(*words)


def test_target_tokens_solves_for_steps(tmp_path):
    done = launch("--target-tokens", "10B", cwd=tmp_path)
    # 10,000 steps of 16 x 1024 tokens, then as many of 16 x 2048 as it takes.
    steps = 10_000 + -(-(10**10 - 10_000 * 16 * 1024) // (16 * 2048))
    assert f"steps={steps} | planned_tokens≈10B" in done.stdout
    assert f"--steps {steps} " in done.stdout


def test_train_seq_len_alone_is_the_length_trained_at(tmp_path):
    done = launch("--train-seq-len", "512", cwd=tmp_path)
    assert "[plan] seq_schedule=512@0\n" in done.stdout
    assert "--seq-schedule 512@0 " in done.stdout
    assert "never trains past 512" in done.stdout


@pytest.mark.parametrize(("words", "said"), [
    ("--seq-schedule 1024@0,2048", "'2048' is not LENGTH@STEP"),
    ("--seq-schedule 1024@5", "--train-seq-len"),
    ("--seq-schedule 4096@0", "--block 4096"),
    ("--train-seq-len 4096", "--block 4096"),
    ("--variant baseline --n-head 30", "2040 or 2070"),
    ("--geo-dim 32", "--no-rope"),
    ("--variant gqa --kv-head 3", "1, 2, 4, 8, 16, 32"),
    ("--variant gqa --tie-qk", "--kv-head 32"),
    ("--variant baseline --geo-dim 64", "leave it out"),
    ("--size huge", "nano"),
    ("--variant mqa", "bottleneck"),
    ("--optimizer sgd", "adamw"),
    ("--device tpu", "mps"),
    ("--steps many", "--steps"),
    ("--steps 0", "at least 1"),
    ("--target-tokens 10Q", "such as 100M"),
    ("--target-tokens 1B --steps 5", "one of them"),
    ("--lr -1", "above 0"),
    ("--tag ../up", "letters"),
    ("--resume", "--ckpt"),
    ("--ckpt nowhere.pt", "no checkpoint at nowhere.pt"),
    ("--grad-acum 3", "did you mean --grad-accum?"),
    ("--layer 3", "did you mean --layers?"),
])
def test_a_mistake_is_exit_code_2_with_the_fix_and_no_traceback(tmp_path, words, said):
    done = launch(*words.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr + done.stdout
    assert "oneb.train" not in done.stdout


def test_all_mistakes_are_listed_together(tmp_path):
    done = launch("--seq-schedule", "x@1", "--lr", "0", "--geo-dim", "33", "--tag", "a b", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 4 problems")
    assert all(flag in done.stderr for flag in ("--seq-schedule", "--lr 0", "--geo-dim 33", "--tag 'a b'"))


def test_resuming_another_shape_is_refused_before_anything_starts(tmp_path):
    words = (*NANO, "--resume")
    write_checkpoint(tmp_path / "runs/oneb_decoupled_seed1337/last.pt", config(*NANO).model)
    assert launch(*words, cwd=tmp_path).returncode == 0
    done = launch(*words, "--layers", "5", "--run", cwd=tmp_path)
    assert done.returncode == 2
    assert "--layers is 5, the checkpoint has 4" in done.stderr


@pytest.fixture
def checkout(tmp_path):
    """The project's files alone, without anybody's .venv."""
    folder = tmp_path / "a checkout"
    shutil.copytree(ROOT / "oneb", folder / "oneb", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run_1b_launch.py", folder)
    return folder


BARE = (sys.executable, "-S")  # a Python without any installed package


def test_run_without_torch_says_how_to_get_it(checkout, tmp_path):
    done = launch(*NANO, "--run", cwd=tmp_path, root=checkout, python=BARE)
    assert done.returncode == 2
    assert "torch" in done.stderr
    assert "bash quickstart.sh" in done.stderr


def test_run_becomes_the_printed_command(checkout, tmp_path):
    """In a bare Python it is .venv's that trains: here a stand-in that writes down how it was called."""
    python = checkout / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\nprintf "%s\\0" "$0" "$@" > called; echo "$PYTHONPATH" > path; exit 7\n')
    python.chmod(0o755)
    done = launch(*NANO, "--data=a 'b'.npy", "--run", cwd=tmp_path, root=checkout, python=BARE)
    assert done.returncode == 7
    called = (tmp_path / "called").read_text().split("\0")[:-1]
    assert called == as_bash_reads(printed_command(done.stdout))[2:]  # after env PYTHONPATH=…
    assert called == [str(python), "-m", "oneb.train",
                      *[word for line in config_to_args(config(*NANO, "--data=a 'b'.npy")) for word in line]]
    assert (tmp_path / "path").read_text().split(":")[0].strip() == str(checkout)


def test_skip_does_not_start(checkout, tmp_path):
    (tmp_path / "runs/oneb_decoupled_seed1337").mkdir(parents=True)
    done = launch(*NANO, "--if-exists", "skip", "--run", cwd=tmp_path, root=checkout, python=BARE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Nothing to do" in done.stdout


def test_help_names_every_option_and_default(tmp_path):
    done = launch("--help", cwd=tmp_path)
    assert done.returncode == 0
    for text in ("--seq-schedule", "--target-tokens", "1024@0,2048@10000", "--kv-head", "(default fineweb_1b.npy)"):
        assert text in done.stdout


@pytest.mark.parametrize(("words", "code", "said"), [
    (("--help",), 0, "launch"), ((), 2, "launch"), (("lunch",), 2, "'lunch' is not a command"),
    (("--version",), 0, "oneb "), (("launch", "--data", "demo"), 0, "[plan]"),
])
def test_the_oneb_command(words, code, said):
    program = "import sys; from oneb.cli.main import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert said in done.stdout + done.stderr


def test_in_the_checkout_the_printed_command_needs_no_path():
    argv = as_bash_reads(printed_command(launch(*NANO, cwd=ROOT).stdout))
    assert argv[:3] == [sys.executable, "-m", "oneb.train"]


def test_the_printed_command_trains_from_anywhere(tmp_path):
    words = (*NANO, "--layers", "1", "--steps", "1", "--train-seq-len", "16", "--eval-iters", "1", "--grad-accum", "1")
    command = printed_command(launch(*words, cwd=tmp_path).stdout)
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "oneb_decoupled_seed1337" / "last.pt").exists()


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    command = f"{sys.executable} {ROOT}/run_1b_launch.py --data demo | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("[plan]")
    assert done.stderr == ""
