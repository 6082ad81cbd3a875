"""A run's checkpoint to damage, and sidecars that vouch for the damage; for test_hostile_*.py."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from test_trainer import NANO, run

from oneb.checkpoints.rundir import sidecar_path
from oneb.files import sha256_file, write_json
from oneb.presets import resolve
from oneb.show import recorder

NAME = "oneb_decoupled_seed1337"
STEPS = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of three steps, and what its last.pt holds."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(recorder, "write_plots", lambda directory: None)
        monkeypatch.setattr(recorder, "write_summary", lambda directory: None)
        directory, _ = run(tmp_path_factory.mktemp("made"), n_layers=1, steps=STEPS, eval_every=0)
    return directory, torch.load(directory / "last.pt", weights_only=True)


@pytest.fixture
def directory(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / NAME)


def configuration(root, **given):
    return resolve({**NANO, "n_layers": 1, "steps": 6, "eval_every": 0, "root": str(root), "resume": True, **given})


def publish(path: Path, data: bytes, **values) -> Path:
    """Write a checkpoint's bytes, and beside them a sidecar that vouches for them."""
    path.write_bytes(data)
    sidecar = json.loads(sidecar_path(path).read_text())
    write_json(sidecar_path(path), {**sidecar, "bytes": len(data), "sha256": sha256_file(path), **values})
    return path


def saved(contents) -> bytes:
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()
