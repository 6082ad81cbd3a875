"""Where a run starts: at step 0, from another run's weights, or exactly where a checkpoint left off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from oneb import __version__
from oneb.changes import Change, changes, notes, refusal, shown
from oneb.checkpoints.checkpoint import check_weights, load_checkpoint, load_weights, rng_state, set_rng_state
from oneb.checkpoints.contents import refuse_faults, tensor_faults
from oneb.checkpoints.rundir import (
    BEST,
    CheckpointError,
    RunDirectory,
    fault,
    none_whole,
    previous_path,
    whole_sidecar,
)
from oneb.errors import OnebError
from oneb.schedules import tokens_before
from oneb.train.setup import Parts

# What a run is computed with beside its options, and how people call it.
_ENVIRONMENT = {"oneb": "oneb", "torch": "PyTorch", "device": "the device", "attention": "the attention kernel"}


@dataclass(frozen=True)
class StartingPoint:
    """What the loop continues from, beside the weights and the optimizer in ``parts``.

    Attributes:
        checkpoint: what is continued; None for a run from step 0.
        step: optimizer steps done.
        best_val_loss: lowest validation loss so far, nats a token; inf before the first evaluation.
        evaluated_at: steps done at the last evaluation; -1 before the first one, or where that was not saved.
        skips: the data that was passed over, for :class:`oneb.data.order.BatchOrder`.
        watch: state of :class:`oneb.train.watch.LossWatch`; None where there is none.
    """

    checkpoint: Path | None = None
    step: int = 0
    best_val_loss: float = math.inf
    evaluated_at: int = -1
    skips: tuple[tuple[int, int], ...] = ()
    watch: dict[str, Any] | None = None


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


def reload(parts: Parts, path: Path) -> StartingPoint:
    """Go back to a checkpoint of the run under way: all of it into the ``parts`` of this process.

    Gradients of a step under way are dropped. How steps are divided, in ``parts.fit``, is as it was then. The options
    are not compared: they are this run's.

    Raises:
        OnebError: the checkpoint is not whole, or does not fit; nothing has changed then.
    """
    saved = load_checkpoint(path)
    _check(parts, saved, path)
    parts.optimizer.zero_grad()
    return _load(parts, saved, path, path.parent)


def _resume(parts: Parts, directory: RunDirectory) -> StartingPoint:
    path, saved = _newest_undamaged(parts, directory)
    found = changes(saved["config"], parts.config, saved["step"], has_bf16=parts.device.has_bf16)
    if refused := refusal(found, path, parts.config.run.allow_change):
        raise OnebError(refused)
    start = _load(parts, saved, path, directory.path)
    parts.notes += notes([*found, *_other_environment(parts, saved)])
    return start


def _newest_undamaged(parts: Parts, directory: RunDirectory) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint whose content is what its sidecar says, and what it should be.

    ``parts.notes`` gets what is wrong with newer ones.
    """
    faults = []
    for path in (directory.resume_from, *directory.older):
        try:
            saved = load_checkpoint(path)
            _check(parts, saved, path)
        except CheckpointError as error:
            if not directory.older:
                raise
            faults.append(fault(error))
        else:
            parts.notes += [f"passed over to continue {path}: {text}" for text in faults]
            return path, saved
    raise none_whole(directory.path, faults)


def _check(parts: Parts, saved: dict[str, Any], path: Path) -> None:
    """That ``saved`` can be continued with these parts. Nothing has been loaded yet.

    Raises:
        CheckpointError: it holds other tensors than it should.
        OnebError: it is of another model or other data, or has no optimizer state.
    """
    check_weights(parts.model, saved, parts.config.model, path)
    if saved["optimizer"] is None:
        raise OnebError(f"{path} was saved without optimizer state (best.pt, or --no-save-optim), so it cannot be "
                        "continued exactly; leave out --resume to start a new run from its weights")
    if saved["data_fingerprint"] != parts.tokens.fingerprint:
        raise OnebError(f"--data {parts.config.data.path} is not the data that {path} was trained on (fingerprint "
                        f"{parts.tokens.fingerprint}, the checkpoint has {shown(saved['data_fingerprint'])}); give the "
                        "same file, or leave out --resume to start a new run from its weights")
    faults = [f"it has no {name}" for name in ("scaler", "rng") if saved[name] is None]
    given, wanted = saved["optimizer"], parts.optimizer.state_dict()
    if given["kind"] == wanted["kind"]:  # else one of --optimizer's, which is said as such
        faults += tensor_faults(given["state"], wanted["state"])
    if parts.float8 and saved["float8"]:
        faults += tensor_faults(saved["float8"], parts.float8.state_dict())
    refuse_faults(path, faults)
    if given["kind"] != wanted["kind"]:
        raise OnebError(f"{path} has the optimizer state of {shown(given['kind'])}, and --optimizer {wanted['kind']} "
                        "cannot continue from it; give the run's own --optimizer, or leave out --resume to start a "
                        "new run from its weights")


def _load(parts: Parts, saved: dict[str, Any], path: Path, best_in: Path) -> StartingPoint:
    """What :func:`_check` has looked at, into ``parts``; the best so far may be in ``best_in``."""
    load_weights(parts.model, saved, parts.config.model, path)
    parts.optimizer.load_state_dict(saved["optimizer"])
    parts.scaler.load_state_dict(saved["scaler"])
    if float8 := parts.float8:
        if saved["float8"]:
            float8.load_state_dict(saved["float8"])
        elif float8.calibrated:  # saved in another precision: the scales are found anew
            float8.load_state_dict({name: torch.ones_like(tensor) if name == "scale" else torch.zeros_like(tensor)
                                    for name, tensor in float8.state_dict().items()})
            float8.calibrated = False
        float8.refresh_weights()
    set_rng_state(saved["rng"])
    # Checkpoints of earlier versions do not say how their steps were divided.
    parts.fit = parts.fit.divided_as(saved["fit"] or ())
    best_val_loss = saved["best_val_loss"]
    best = best_in / BEST
    found = whole_sidecar(best) or whole_sidecar(previous_path(best))
    if found and found["step"] <= saved["step"]:
        # A finished run evaluates after its last save.
        best_val_loss = min(best_val_loss, math.inf if found["best_val_loss"] is None else found["best_val_loss"])
    if saved["config"].get("data", {}).get("doc_mask", False) != parts.config.data.doc_mask:
        best_val_loss = math.inf  # losses with and without --doc-mask do not compare
    return StartingPoint(
        path, saved["step"], best_val_loss, evaluated_at=-1 if saved["evaluated_at"] is None else saved["evaluated_at"],
        skips=tuple((step, batches) for step, batches in saved["skips"] or ()), watch=saved["watch"])


def snapshot(
    parts: Parts, *, step: int, best_val_loss: float, divisions: list[dict[str, int]], with_optimizer: bool,
    skips: Sequence[tuple[int, int]] = (), watch: dict[str, Any] | None = None, evaluated_at: int = -1,
) -> dict[str, Any]:
    """What a checkpoint holds, for :func:`oneb.checkpoints.checkpoint.save_checkpoint`: all that :func:`restore` reads.

    Args:
        divisions: how each length's steps are divided (:meth:`oneb.fit.Fit.divisions`).
        skips, watch, evaluated_at: as in :class:`StartingPoint`.
    """
    train, float8_state = parts.config.train, None
    if parts.float8 and parts.float8.calibrated:
        # A copy: the next forward pass changes them, and a checkpoint may be written while it runs.
        float8_state = {name: tensor.clone() for name, tensor in parts.float8.state_dict().items()}
    return {
        "config": parts.config.to_dict(),
        "model": parts.model.state_dict(),
        "optimizer": parts.optimizer.state_dict() if with_optimizer else None,
        "scaler": parts.scaler.state_dict(),
        # Scales that nobody has found yet would be taken for found ones.
        "float8": float8_state,
        "rng": rng_state(),
        "fit": divisions,
        "step": step,
        "tokens": tokens_before(train.phases, step, train.sequences),
        "best_val_loss": best_val_loss,
        "data_fingerprint": parts.tokens.fingerprint,
        "encoding": parts.encoding,
        "made_with": _environment(parts),
        "skips": [list(skip) for skip in skips],
        "watch": watch,
        "evaluated_at": evaluated_at,
    }


def _environment(parts: Parts) -> dict[str, str]:
    """What rounds the sums of this run, beside its options."""
    return {"oneb": __version__, "torch": str(torch.__version__), "device": parts.device.name,
            "attention": parts.backend}


def _other_environment(parts: Parts, saved: dict[str, Any]) -> list[Change]:
    """In what a run that has been loaded goes on otherwise than it was, without being asked to."""
    before, now = saved["made_with"] or {}, _environment(parts)
    found = [Change(text, shown(before[name]), now[name], matters=False, rounds=True)
             for name, text in _ENVIRONMENT.items() if before.get(name, now[name]) != now[name]]
    divided = {entry["seq_len"]: entry for entry in saved["fit"] or ()}
    for entry in parts.fit.divisions():
        old = divided.get(entry["seq_len"], entry)
        if old["batch_size"] != entry["batch_size"]:
            found.append(Change(f"micro-batches at {entry['seq_len']} tokens", _division(old), _division(entry),
                                matters=False, rounds=True))
    return found


def _division(entry: dict[str, int]) -> str:
    return f"{entry['batch_size']} x {entry['grad_accum']}"
