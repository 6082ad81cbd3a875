"""A run rehearsed: everything that it will do, once, with a throw-away model and nothing left behind.

There are two processes, as there are when a run is resumed. :func:`rehearse` trains a little at each length, evaluates,
saves a checkpoint and makes two steps more. :func:`check`, in a fresh process, loads the checkpoint, makes the same two
steps and compares. Two, because a step's loss tells of the weights alone: the optimizer's state shows in the next one.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from oneb.checkpoints.rundir import LAST, RunDirectory, continued, read_sidecar, run_directory
from oneb.config import Config
from oneb.data.loader import Batch, gather
from oneb.errors import OnebError
from oneb.fit import Fit
from oneb.kernels.attention import SDP_BACKENDS
from oneb.schedules import reached
from oneb.show.recorder import Recorder
from oneb.show.screen import Display, Progress
from oneb.train.resume import StartingPoint, restore
from oneb.train.setup import Parts, build
from oneb.train.signals import StopRequest
from oneb.train.trainer import Trainer
from oneb.units import GIB

_TIMED_S = 4.0  # of steps, for each length
_MOST_STEPS = 20
_BATCHES = 4  # different ones that the timed steps take in turn
_EVAL_S = 2.0  # about as long as the evaluation takes, where the whole would take longer
_SAMPLES = 64  # windows of the data that are looked at
_COMPARED_STEPS = 2
# A uniform guess has a loss of ln(vocabulary), a fresh model of any width in use at most a nat more. Lion's first steps
# without warm-up have been seen to add three (1b, gqa_kv2), and to come down again; what diverges adds dozens.
_WORSE_THAN_A_GUESS = 5.0
# Kernels of a GPU add attention's gradients in whatever order they finish, in 16 bits: a loss repeats itself to about
# 1e-4. Without the saved fp8 scales new ones are found, and round differently (fp8 has 4 significant bits).
_TOLERANCE = 1e-3
_TOLERANCE_NEW_SCALES = 1e-2


def rehearse(config: Config, folder: Path) -> dict[str, Any]:
    """Do everything that the run will do, in small.

    Args:
        folder: where the checkpoint goes. The caller removes it.

    Returns:
        What was measured, as JSON can hold it: ``lengths``, a list of dicts with ``seq_len``, ``tok_s``, ``peak_gib``
        (of the whole GPU; None off CUDA), ``batch_size``, ``grad_accum`` and ``recomputed_layers``; ``eval_s`` (of a
        whole evaluation), ``save_s``, ``checkpoint_bytes``, ``weights_bytes``, ``step`` (of the checkpoint),
        ``has_optimizer``; ``losses`` and ``norms`` of the steps after the checkpoint.

    Raises:
        OnebError: the run could not do it, with the fix.
    """
    chosen = run_directory(config)
    _say("building the model")
    parts = build(continued(config, chosen), _say)
    start = restore(parts, chosen)
    for note in parts.notes:
        _say(f"note: {note}")
    trainer = _Rehearsal(parts, folder, start)
    with sdpa_kernel(SDP_BACKENDS[parts.backend]):
        trainer.read_data()
        # The longest first: what is too large is heard of at once.
        lengths = [trainer.time_steps(seq_len) for seq_len in sorted(trainer.phases, reverse=True)]
        found = {"lengths": lengths, **trainer.time_evaluation(lengths), **trainer.save()}
        return found | trainer.next_steps()


def check(config: Config, folder: Path, found: dict[str, Any]) -> list[float]:
    """Load the checkpoint that :func:`rehearse` left in ``folder`` and make the steps that it made afterwards.

    Args:
        found: what it returned.

    Returns:
        Their losses.

    Raises:
        OnebError: they are not the same.
    """
    path = folder / LAST
    if found["has_optimizer"]:
        directory = RunDirectory(folder, resume_from=path)
    else:  # as a run that starts from its weights
        directory = RunDirectory(folder)
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, ckpt=str(path), resume=False))
    _say("reloading the checkpoint in a fresh process")
    parts = build(continued(config, directory), _say)
    # What is free may have changed since, and other micro-batches would round differently.
    parts.fit = _fit_as_rehearsed(parts.fit, found["lengths"])
    start = dataclasses.replace(restore(parts, directory), step=found["step"])
    trainer = _Rehearsal(parts, folder, start)
    with sdpa_kernel(SDP_BACKENDS[parts.backend]):
        again = trainer.next_steps()
    _compare(trainer, found, again)
    return again["losses"]


class _Rehearsal(Trainer):
    """A trainer that writes nothing but a checkpoint in ``folder``, and whose steps read any length's batches."""

    def __init__(self, parts: Parts, folder: Path, start: StartingPoint) -> None:
        train = parts.config.train
        display = _Lines("rehearsal", Progress(train.steps, start.step, None), sys.stdout)
        super().__init__(parts, RunDirectory(folder), Recorder(folder, display, [display]), StopRequest(), start)
        # First step and end of what is left of each length; of the first phase where there are several.
        self.phases: dict[int, range] = {}
        starts = reached(train.phases, train.steps)
        ends = [first for first, _ in starts[1:]] + [train.steps]
        begin = min(start.step, train.steps - 1)
        for (first, seq_len), end in zip(starts, ends, strict=True):
            if end > begin:
                self.phases.setdefault(seq_len, range(max(first, begin), end))

    def read_data(self) -> None:
        """Read windows from the first token to the last: a sidecar may have vouched for ids that nobody has read.

        Of data that is still arriving, what steps and evaluations here need is waited for, and no more.
        """
        self.recorder.status("reading the data's edges")
        parts, longest = self.parts, max(self.phases)
        for seq_len, steps in self.phases.items():
            self._gather(parts.validation.offsets(seq_len)[[0, -1]], seq_len)
            self._gather(self._offsets(steps[0]), seq_len)
        spread = np.linspace(0, parts.tokens.n_tokens - longest - 1, _SAMPLES).round().astype(np.int64)
        edges = [(seq_len, parts.order.offsets(step)) for seq_len, steps in self.phases.items()
                 for step in {steps[0], steps[-1]}]
        for seq_len, offsets in [(longest, spread), *edges]:
            here = [parts.tokens.is_here(offset, seq_len + 1) for offset in offsets.tolist()]
            if any(here):
                self._gather(offsets[here], seq_len)

    def time_steps(self, seq_len: int) -> dict[str, Any]:
        """Make steps at one length; what they took."""
        self.recorder.status(f"steps at {seq_len} tokens a sequence")
        device = self.parts.device
        if device.is_cuda:
            torch.cuda.empty_cache()  # what longer sequences took is not this length's
            torch.cuda.reset_peak_memory_stats(device.torch)
        steps = self.phases[seq_len][:_BATCHES]
        batches = [self._gather(self._offsets(step), seq_len) for step in steps]
        step_s = self._step_seconds(batches, seq_len)
        fitted = self.fit.at(seq_len)
        tok_s = self.config.train.sequences(seq_len) * seq_len / step_s
        return {"seq_len": seq_len, "tok_s": tok_s, "peak_gib": self._peak_gib(), "batch_size": fitted.batch_size,
                "grad_accum": fitted.grad_accum, "recomputed_layers": fitted.recomputed_layers}

    def time_evaluation(self, lengths: list[dict[str, Any]]) -> dict[str, Any]:
        """An evaluation at the length that the run begins with, and whether its loss is one of a model that works."""
        self.recorder.status("evaluating")
        seq_len = next(iter(self.phases))
        tok_s = next(length["tok_s"] for length in lengths if length["seq_len"] == seq_len)
        rows, whole = self.fit.at(seq_len).batch_size, self.parts.validation
        # Forward alone is a third of the work, so three times as fast.
        some = dataclasses.replace(whole, eval_tokens=min(whole.eval_tokens, max(
            rows * seq_len, int(3 * _EVAL_S * tok_s))))
        first = dataclasses.replace(some, eval_tokens=min(some.eval_tokens, rows * seq_len))
        first.loss(self.parts.model, seq_len, rows)  # which may compile
        began = time.perf_counter()
        loss, n_tokens = some.loss(self.parts.model, seq_len, rows)
        seconds = time.perf_counter() - began
        self._check_evaluation(loss)
        return {"eval_s": seconds * len(whole.offsets(seq_len)) * seq_len / n_tokens}

    def save(self) -> dict[str, Any]:
        """A checkpoint such as the run will save, timed."""
        path, with_optimizer = self.directory.path / LAST, self.config.run.save_optim
        began = time.perf_counter()
        self.saver.save(self.step)
        self.saver.close()
        self.saver.report()
        if self.saver.error:
            raise OnebError(f"a checkpoint could not be saved to {path.parent}: {self.saver.error}; make room there, "
                            "or choose another --run-root")
        weights = sum(tensor.nbytes for tensor in self.parts.model.state_dict().values())
        return {"save_s": time.perf_counter() - began, "checkpoint_bytes": read_sidecar(path)["bytes"],
                "weights_bytes": weights, "step": self.step, "has_optimizer": with_optimizer}

    def next_steps(self) -> dict[str, list[float]]:
        """Losses and gradient norms of the steps from here on, with the batches that a resumed run would read."""
        self.recorder.status("the steps after the checkpoint")
        order, rows = self.parts.order, []
        # Without the optimizer's state only the weights can be the same.
        for _ in range(_COMPARED_STEPS if self.config.run.save_optim else 1):
            at = min(self.step, self.config.train.steps - 1)
            seq_len = order.seq_len(at)
            rows.append(self._step(self._gather(self._offsets(at), seq_len), seq_len))
        losses, norms = torch.stack(rows).T.tolist()
        return {"losses": losses, "norms": norms}

    # ---- the parts of these

    def _offsets(self, step: int) -> np.ndarray:
        """Where a step's windows start. Of data that is read shard by shard, in the first, which is the first there."""
        order = self.parts.order
        offsets = order.offsets(step)
        return offsets % max(1, order.groups[0] - order.seq_len(step)) if order.groups else offsets

    def _gather(self, offsets: np.ndarray, seq_len: int) -> Tensor:
        """(len(offsets), seq_len + 1): the windows there, their ids checked."""
        return gather(self.parts.tokens, offsets, seq_len, self.config.model.vocab_size, self.parts.device.is_cuda)

    def _step(self, tokens: Tensor, seq_len: int) -> Tensor:
        """One optimizer step; (loss, gradient norm) on the device."""
        loss, norm, _ = self.train_step(Batch(self.step, tokens, seq_len))
        self.step += 1
        return torch.stack([loss, norm])

    def _step_seconds(self, batches: list[Tensor], seq_len: int) -> float:
        """Mean seconds a step, without the first, which may compile."""
        fitted = self.fit
        self._timed(batches, seq_len, 1)
        step_s = self._timed(batches, seq_len, 1)
        if (n_steps := min(_MOST_STEPS, int(_TIMED_S / step_s))) > 1:
            step_s = self._timed(batches, seq_len, n_steps)
        if self.fit is not fitted:  # it ran out of memory, and did some steps twice
            return self._step_seconds(batches, seq_len)
        return step_s

    def _timed(self, batches: list[Tensor], seq_len: int, n_steps: int) -> float:
        """Mean seconds of ``n_steps`` steps, the device's work included."""
        began = time.perf_counter()
        rows = [self._step(batches[number % len(batches)], seq_len) for number in range(n_steps)]
        self.parts.device.synchronize()
        seconds = time.perf_counter() - began
        for loss, norm in torch.stack(rows).tolist():
            # With loss scaling, norms are infinite until the scale has been found.
            if not math.isfinite(loss) or not (math.isfinite(norm) or self.parts.scaler.enabled):
                raise OnebError(f"a step at {seq_len} tokens had loss {loss:.4g} and gradient norm {norm:.4g}; both "
                                f"should be finite: {self._calmer()}")
        return seconds / n_steps

    def _check_evaluation(self, loss: float) -> None:
        guess = math.log(self.config.model.vocab_size)
        if not loss <= guess + _WORSE_THAN_A_GUESS:
            raise OnebError(f"after a few steps the validation loss is {loss:.4g} nats a token, and guessing has "
                            f"{guess:.4g}: the run diverges; {self._calmer()}")

    def _calmer(self) -> str:
        optim, run = self.config.optim, self.config.run
        start = f", or another --ckpt than {run.ckpt}" if run.ckpt else ""
        return f"give a smaller --lr (now {optim.lr:g}) or more --warmup-steps (now {optim.warmup_steps}){start}"

    def _peak_gib(self) -> float | None:
        """Most that was taken of the GPU: by torch's allocator, and all that is not its (the CUDA context)."""
        if not self.parts.device.is_cuda:
            return None
        device = self.parts.device.torch
        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
        return (others + torch.cuda.max_memory_reserved(device)) / GIB


class _Lines(Display):
    """Shows what is being waited for as lines, and events."""

    def status(self, text: str) -> None:
        self.message(text)


def _say(text: str) -> None:
    print(text, flush=True)


def _fit_as_rehearsed(fit: Fit, lengths: list[dict[str, Any]]) -> Fit:
    names = ("batch_size", "grad_accum", "recomputed_layers")
    found = {length["seq_len"]: {name: length[name] for name in names} for length in lengths}
    return dataclasses.replace(fit, phases=tuple(
        dataclasses.replace(phase, **found.get(phase.seq_len, {})) for phase in fit.phases))


def _compare(trainer: _Rehearsal, found: dict[str, Any], again: dict[str, list[float]]) -> None:
    """That both processes' steps agree: in every bit where the arithmetic repeats itself, else nearly.

    Raises:
        OnebError: they do not.
    """
    exact = trainer.parts.device.torch.type == "cpu" or trainer.config.train.deterministic
    new_scales = trainer.parts.float8 and not found["has_optimizer"]
    tolerance = _TOLERANCE_NEW_SCALES if new_scales else 0.0 if exact else _TOLERANCE
    same = all(math.isclose(a, b, rel_tol=tolerance)
               for a, b in zip(found["losses"], again["losses"], strict=True))
    if tolerance == 0.0 and found["has_optimizer"]:  # the loss scale, which goes with it, decides what overflows
        same = same and found["norms"] == again["norms"]
    if not same:
        wanted = f"within {tolerance:g} of" if tolerance else "exactly"
        raise OnebError(f"a checkpoint reloaded in a fresh process does not continue as the run that saved it: losses "
                        f"{again['losses']}, wanted {wanted} {found['losses']} (gradient norms {again['norms']} and "
                        f"{found['norms']}). A run could not be resumed here: please report it with this line; "
                        "--no-rehearse trains all the same")
