"""Running the launcher as a user does, and reading what it prints."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from oneb.cli.options import add_config_options, config_from_args

ROOT = Path(__file__).parents[1]
NANO = ("--device", "cpu", "--size", "nano", "--data", "demo")


def launch(*words: str, cwd: Path, root: Path = ROOT, python: tuple[str, ...] = (sys.executable,), **environment: str):
    return subprocess.run([*python, str(root / "run_1b_launch.py"), *words], cwd=cwd, capture_output=True, text=True,
                          timeout=60, env={"PATH": "/usr/bin:/bin", **environment})


def config(*words: str):
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    return config_from_args(parser.parse_args(words))


def printed_command(output: str) -> str:
    """The paragraph that a user selects and pastes."""
    (command,) = [paragraph for paragraph in output.split("\n\n") if "-m oneb.train" in paragraph]
    return command


def as_bash_reads(command: str) -> list[str]:
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def write_checkpoint(path: Path, model) -> None:
    """What the launcher reads of a checkpoint: that it is there, and its sidecar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    values = {"step": 1, "tokens": 1, "best_val_loss": None, "sha256": "", "bytes": 0, "model": vars(model)}
    path.with_name(path.name + ".json").write_text(json.dumps(values))
