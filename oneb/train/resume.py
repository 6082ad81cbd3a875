"""Where a run starts: at step 0, from another run's weights, or exactly where a checkpoint left off."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneb.config import TrainConfig, compute_dtype
from oneb.errors import OnebError
from oneb.schedules import tokens_before
from oneb.train.checkpoint import load_checkpoint, load_weights, rng_state, set_rng_state
from oneb.train.rundir import (
    BEST,
    CheckpointError,
    RunDirectory,
    fault,
    none_whole,
    previous_path,
    whole_sidecar,
)
from oneb.train.setup import Parts

# Options, or sections of them, that change nothing about what is computed from a given step on. What --amp and
# --amp-dtype decide, a settled --precision and --param-dtype say.
_HARMLESS = {
    "run", "log", "data.path", "train.device", "train.eval_every", "train.eval_iters", "train.fused_blocks",
    "train.compile", "train.compile_mode", "train.grad_checkpoint", "train.deterministic", "optim.fused",
    "model.max_seq_len", "train.amp", "train.amp_dtype", "train.vram_limit_gib",
    "train.spike_zscore", "train.max_rollbacks",
    # How a step is divided is free; its size is compared by itself.
    "train.batch_size", "train.grad_accum", "train.batch_tokens",
}


@dataclass(frozen=True)
class StartingPoint:
    """What the loop continues from, beside the weights and the optimizer in ``parts``.

    Attributes:
        checkpoint: what is continued; None for a run from step 0.
        step: optimizer steps done.
        best_val_loss: lowest validation loss so far, nats a token; inf before the first evaluation.
    """

    checkpoint: Path | None = None
    step: int = 0
    best_val_loss: float = math.inf


def restore(parts: Parts, directory: RunDirectory) -> StartingPoint:
    """Load into ``parts`` what the run starts from.

    Raises:
        OnebError: no checkpoint of those to choose from is whole, or the one that is holds another model or cannot be
            continued with this data.
    """
    if directory.resume_from:
        return _resume(parts, directory)
    if parts.config.run.ckpt:
        path = Path(parts.config.run.ckpt)
        load_weights(parts.model, load_checkpoint(path), parts.config.model, path)
        if parts.float8:
            parts.float8.refresh_weights()
    return StartingPoint()


def _resume(parts: Parts, directory: RunDirectory) -> StartingPoint:
    path, saved = _newest_undamaged(directory, parts.notes)
    if saved["optimizer"] is None:
        raise OnebError(f"{path} was saved without optimizer state (best.pt, or --no-save-optim), so it cannot be "
                        "continued exactly; leave out --resume to start a new run from its weights")
    if saved["data_fingerprint"] != parts.tokens.fingerprint:
        raise OnebError(f"--data {parts.config.data.path} is not the data that {path} was trained on (fingerprint "
                        f"{parts.tokens.fingerprint}, the checkpoint has {saved['data_fingerprint']}); give the "
                        "same file, or leave out --resume to start a new run from its weights")
    load_weights(parts.model, saved, parts.config.model, path)
    parts.optimizer.load_state_dict(saved["optimizer"])
    parts.scaler.load_state_dict(saved["scaler"])
    if parts.float8:
        # Where a run in another precision is continued there is none: the scales are found anew.
        if state := saved.get("float8"):
            parts.float8.load_state_dict(state)
        parts.float8.refresh_weights()
    set_rng_state(saved["rng"])
    # Checkpoints of earlier versions do not say how their steps were divided.
    parts.fit = parts.fit.divided_as(saved.get("fit", ()))
    parts.notes += _changes(saved["config"], parts.config.to_dict())
    best_val_loss = saved["best_val_loss"]
    best = directory.path / BEST
    found = whole_sidecar(best) or whole_sidecar(previous_path(best))
    if found and found["step"] <= saved["step"]:
        # A finished run evaluates after its last save.
        best_val_loss = min(best_val_loss, found["best_val_loss"] or math.inf)
    return StartingPoint(path, saved["step"], best_val_loss)


def _newest_undamaged(directory: RunDirectory, notes: list[str]) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint whose content is what its sidecar says; ``notes`` gets what is wrong with newer ones."""
    faults = []
    for path in (directory.resume_from, *directory.older):
        try:
            saved = load_checkpoint(path)
        except CheckpointError as error:
            if not directory.older:
                raise
            faults.append(fault(error))
        else:
            notes += [f"passed over to continue {path}: {text}" for text in faults]
            return path, saved
    raise none_whole(directory.path, faults)


def snapshot(
    parts: Parts, *, step: int, best_val_loss: float, divisions: list[dict[str, int]], with_optimizer: bool
) -> dict[str, Any]:
    """What a checkpoint holds, for :func:`oneb.train.checkpoint.save_checkpoint`: all that :func:`restore` reads.

    Args:
        divisions: how each length's steps are divided (:meth:`oneb.fit.Fit.divisions`).
    """
    train, float8 = parts.config.train, parts.float8
    return {
        "config": parts.config.to_dict(),
        "model": parts.model.state_dict(),
        "optimizer": parts.optimizer.state_dict() if with_optimizer else None,
        "scaler": parts.scaler.state_dict(),
        # Scales that nobody has found yet would be taken for found ones.
        "float8": float8.state_dict() if float8 and float8.calibrated else None,
        "rng": rng_state(),
        "fit": divisions,
        "step": step,
        "tokens": tokens_before(train.phases, step, train.sequences),
        "best_val_loss": best_val_loss,
        "data_fingerprint": parts.tokens.fingerprint,
        "encoding": parts.encoding,
    }


def _changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a resumed run does differently from the one it continues, one sentence each."""
    before, after = _train_config(saved["train"]), _train_config(now["train"])
    if "precision" not in saved["train"]:  # saved before there was the option: all products were in one dtype
        saved = {**saved, "train": {**saved["train"], "precision": compute_dtype(before)}}
    batches = [
        f"a step at {seq_len} tokens has {after.sequences(seq_len)} sequences, the run that is continued had "
        f"{before.sequences(seq_len)}"
        for seq_len in dict.fromkeys(seq_len for _, seq_len in after.phases)
        if before.sequences(seq_len) != after.sequences(seq_len)
    ]
    return batches + [
        f"{section}.{name} is {value}, the run that is continued had {saved[section].get(name)}"
        for section, values in now.items() if section not in _HARMLESS
        for name, value in values.items()
        if f"{section}.{name}" not in _HARMLESS and value != saved[section].get(name)
    ]


def _train_config(values: dict[str, Any]) -> TrainConfig:
    """A checkpoint's; another version's may have fields that this one has not."""
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    return TrainConfig(**{name: value for name, value in values.items() if name in known})
