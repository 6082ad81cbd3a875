"""Where a run lives, and whether it may start or continue there. No torch: the launcher asks the same questions."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneb.config import Config, model_differences, model_from_dict
from oneb.errors import OnebError

LAST = "last.pt"
BEST = "best.pt"


@dataclass(frozen=True)
class RunDirectory:
    """The directory a run will write to.

    Attributes:
        path: the directory.
        resume_from: checkpoint to continue exactly, or None for a run from step 0.
        skip: there is nothing to do (``--if-exists skip``).
        note: how the choice came about, for people; empty for a new directory.
    """

    path: Path
    resume_from: Path | None = None
    skip: bool = False
    note: str = ""


def run_directory(config: Config) -> RunDirectory:
    """Choose the run directory by name, ``--resume`` and ``--if-exists``. Creates nothing.

    Raises:
        OnebError: it exists under ``--if-exists error``, or there is no checkpoint to resume.
    """
    path = Path(config.run.root) / config.name
    if config.run.resume:
        checkpoint = Path(config.run.ckpt) if config.run.ckpt else path / LAST
        read_sidecar(checkpoint)
        # A run that got a suffix continues in its own directory.
        if re.fullmatch(rf"{re.escape(path.name)}_\d+", checkpoint.parent.name):
            path = checkpoint.parent
        return RunDirectory(path, resume_from=checkpoint, note=f" (continues {checkpoint})")
    if not path.exists():
        return RunDirectory(path)
    policy = config.run.if_exists
    if policy == "error":
        raise OnebError(f"{path} exists, and --if-exists is error; choose another --tag or --seed, "
                        "or --if-exists suffix|skip|resume")
    if policy == "skip":
        return RunDirectory(path, skip=True, note=" (exists: skipped)")
    if policy == "resume":
        if sidecar_path(path / LAST).exists():
            return RunDirectory(path, resume_from=path / LAST, note=f" (exists: continues {LAST})")
        return RunDirectory(path, note=" (exists, with nothing saved to resume: starts at step 0)")
    number = 2
    while (candidate := path.with_name(f"{path.name}_{number}")).exists():
        number += 1
    return RunDirectory(candidate, note=f" ({path.name} exists)")


def sidecar_path(checkpoint: Path) -> Path:
    """The JSON file whose presence says that a checkpoint is whole."""
    return checkpoint.with_name(checkpoint.name + ".json")


def read_sidecar(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's sidecar: step, tokens, best_val_loss, sha256, bytes, model.

    Raises:
        OnebError: the checkpoint or its sidecar is not there, or is not what its name says.
    """
    if not checkpoint.is_file():
        raise OnebError(f"no checkpoint at {checkpoint}; give --ckpt RUN_DIRECTORY/last.pt (same --tag, --variant and "
                        "--seed as the run to continue), or leave out --resume to start a new run")
    sidecar = sidecar_path(checkpoint)
    try:
        values = json.loads(sidecar.read_text(encoding="utf-8"))
        return {key: values[key] for key in ("step", "tokens", "best_val_loss", "sha256", "bytes", "model")}
    except FileNotFoundError:
        raise OnebError(f"{checkpoint} has no {sidecar.name} beside it: its save was cut short, or the file was copied "
                        "alone; copy both files, or use an older checkpoint of the run") from None
    except (ValueError, KeyError, TypeError):
        raise OnebError(f"{sidecar} is damaged; copy it again, or use an older checkpoint of the run") from None


def check_resume(config: Config) -> None:
    """Refuse a checkpoint whose model is another shape than the one asked for.

    Raises:
        OnebError: naming every difference.
    """
    checkpoint = Path(config.run.ckpt) if config.run.ckpt else run_directory(config).resume_from
    if checkpoint is None:
        return
    differences = model_differences(model_from_dict(read_sidecar(checkpoint)["model"]), config.model)
    if differences:
        raise OnebError(f"{checkpoint} holds another model than the one asked for: {'; '.join(differences)}. "
                        "Give the run's own options, or leave out --ckpt and --resume to train this one from the start")
