"""When a run saves, what it saves, and what it does where that fails."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oneb.checkpoints.checkpoint import link_checkpoint, prune_checkpoints
from oneb.checkpoints.disk import room_for
from oneb.checkpoints.mirror import Mirror
from oneb.checkpoints.rundir import BEST, LAST, RunDirectory, checkpoints, whole_sidecar
from oneb.errors import OnebError
from oneb.show.recorder import Recorder
from oneb.train.setup import Parts
from oneb.train.writer import CheckpointWriter, Written, tensors_of
from oneb.units import format_gib

_RETRY_S = 60.0  # after a save that failed
_FINAL_ATTEMPTS = 3
_FINAL_RETRY_S = 5.0
_MIRROR_PATIENCE_S = 120.0  # at the end of a run, without a byte that gets through


class Saver:
    """Saves a run in the background: ``last.pt`` by the clock, ``step*.pt`` by the step, ``best.pt`` when asked.

    Args:
        contents: the run as a checkpoint, given whether the optimizer's state belongs in it.
        start_step: steps done when this process began.
        mirror: the second place, if there is one.

    Attributes:
        saved_step: steps done in the newest checkpoint of this run that is whole; None while there is none.
        error: why the last save failed; None if it did not.
    """

    def __init__(
        self, parts: Parts, directory: RunDirectory, recorder: Recorder, contents: Callable[[bool], dict[str, Any]],
        start_step: int, mirror: Mirror | None = None,
    ) -> None:
        self._parts = parts
        self._run = parts.config.run
        self._path = directory.path
        self._recorder = recorder
        self._contents = contents
        self._mirror = mirror
        self._writer = CheckpointWriter(parts.device, *([directory.lock.check] if directory.lock else []))
        begun_here = directory.resume_from is None or directory.resume_from.parent.resolve() == self._path.resolve()
        self.saved_step = start_step if begun_here and start_step else None
        # What the run starts from need not be saved again, if it is this directory's own.
        self._submitted_step = start_step if directory.resume_from in (None, self._path / LAST) else -1
        self._submitted_at = time.monotonic()
        self._file_step = start_step  # of the last step*.pt
        self.error: str | None = None
        self._may_help = True  # to try again after that
        self._retry_at = -math.inf
        self._ends = False  # nothing comes after what is saved now
        self._waited_s = 0.0

    # ---- what the loop asks for

    def reserve(self) -> None:
        """Take the host memory that saves need, in the background, where there will be one before the end."""
        if self._run.save_minutes or self._run.save_every:
            self._writer.reserve(self._contents(self._run.save_optim))

    def is_due(self, step: int) -> bool:
        """Whether it is time to save, ``step`` steps being done."""
        if self._file_is_due(step):
            return True
        if self._writer.busy or self._submitted_step == step:
            return False
        now = time.monotonic()
        if self.error:
            return now >= self._retry_at
        return 0 < self._run.save_minutes <= (now - self._submitted_at) / 60

    def save(self, step: int) -> bool:
        """Save the run as it is; whether as ``stepNNNNNNNN.pt``, which was due then, with ``last.pt`` as the same file.

        Else as ``last.pt`` alone, if that does not hold this step already.
        """
        if as_file := self._file_is_due(step):
            self._file_step = step
            self._submit(self._path / f"step{step:08d}.pt", step)
        elif self._submitted_step != step:
            self._submit(self._path / LAST, step)
        return as_file

    def save_before_evaluation(self, step: int) -> None:
        """Save the run as it is, unless an earlier save is still being written."""
        if not self._writer.busy:
            self.save(step)

    def save_best(self, step: int) -> None:
        """Save the weights as ``best.pt``."""
        self._submit(self._path / BEST, step)

    def before_update(self) -> None:
        """Wait until weights and optimizer state may change."""
        self._waited_s += self._writer.wait_copied()

    def report(self) -> None:
        """Record what has become of saves."""
        for written in self._writer.results():
            self._record(written)
        for event in self._mirror.poll() if self._mirror else ():
            self._recorder.log({"type": "event", "step": event.step, "event": f"copy_{event.name}",
                                "message": event.message})

    def secure(self, step: int, keep_last: bool = False) -> None:
        """Save the run as it is, and wait until that is on the disk.

        Args:
            keep_last: the ``last.pt`` of an earlier step stays, under its step's name.

        Raises:
            OnebError: it could not be saved.
        """
        self.flush()
        self._ends = True
        if keep_last:
            self._keep_last(step)
        for attempt in range(_FINAL_ATTEMPTS):
            if attempt:
                time.sleep(_FINAL_RETRY_S)
            self.save(step)
            self.flush()
            if not self.error:
                return
            if not self._may_help:
                raise OnebError(f"step {step} was not saved: {self.error}, and {self._kept()}; the same command with "
                                "--resume continues from there")
        raise OnebError(f"step {step} could not be saved to {self._path} ({self.error}), and {self._kept()}; make room "
                        "there, and give the same command with --resume")

    def finish(self, step: int) -> None:
        """Wait until everything is on the disk, and what was saved last in the second place, too."""
        self.flush()
        if self._mirror:
            self._recorder.status(f"copying to {self._run.save_to}")
            if not self._mirror.finish(_MIRROR_PATIENCE_S):
                self._recorder.warn(step, f"the newest step in {self._run.save_to} is {self._mirror.verified_step}")
            self.report()

    def went_back(self, step: int) -> None:
        """The run goes on from ``step``, which is saved, and is so again with what is otherwise from now on."""
        self.saved_step = self._file_step = step
        self._submitted_step = -1
        self._writer.forget()
        self.save(step)

    def flush(self) -> None:
        """Wait until what was handed over is on the disk, or has failed; record which."""
        self._writer.wait()
        self.report()

    def close(self) -> None:
        """End the threads, the writer's after it has finished."""
        try:
            self._writer.close()
        finally:
            if self._mirror:
                self._mirror.close()

    # ---- its parts

    def _kept(self) -> str:
        if self.saved_step is None or not checkpoints(self._path)[0]:
            return "nothing of the run is saved"
        return f"step {self.saved_step} is kept"

    def _keep_last(self, step: int) -> None:
        """Give ``last.pt`` the name of its step, too, unless that is ``step``."""
        found = whole_sidecar(self._path / LAST)
        kept = self._path / f"step{found['step'] if found else step:08d}.pt"
        if found and found["step"] < step and not kept.exists():
            with contextlib.suppress(OSError):  # fallback: then the newer one alone is there
                link_checkpoint(self._path / LAST, kept)

    def _file_is_due(self, step: int) -> bool:
        every = self._run.save_every
        return every > 0 and step // every > self._file_step // every

    def _submit(self, path: Path, step: int) -> None:
        """Have the writer write ``path``; ``best.pt`` has no optimizer state and says nothing about the run's place."""
        resumable = path.name != BEST
        contents = self._contents(resumable and self._run.save_optim)
        if resumable:
            self._submitted_step, self._submitted_at, self._waited_s = step, time.monotonic(), 0.0
        n_bytes = sum(tensor.nbytes for _, tensor in tensors_of(contents))
        if reason := room_for(path, n_bytes):
            self._record(Written(path, step, n_bytes, 0.0, reason))
            return
        self._recorder.status(f"saving {path.name}")
        self._writer.submit(path, contents, self._weights_are_finite(), lambda: self._when_whole(path))

    def _weights_are_finite(self) -> Tensor:
        """0-dim bool, not waited for: a sum of squares has an infinity or a NaN where one of its terms has."""
        norms = torch._foreach_norm(self._parts.optimizer.params, 2.0, dtype=torch.float32)
        return torch.isfinite(torch.stack(norms)).all()

    def _when_whole(self, path: Path) -> None:
        """In the writer's thread: what follows from a checkpoint's being there."""
        if path.name == BEST:
            return
        if path.name != LAST:
            link_checkpoint(path, self._path / LAST)
            prune_checkpoints(self._path, self._run.keep_last)
        if self._mirror:
            self._mirror.submit(self._path / LAST)

    def _record(self, written: Written) -> None:
        resumable = written.path.name != BEST
        if resumable:
            self.error, self._may_help = written.error, written.may_help
        if written.error:
            then = "" if self._ends else ". The run goes on"
            if resumable:
                self._retry_at, self._submitted_step = time.monotonic() + _RETRY_S, -1
                then += "" if self._ends else ", and tries again in a minute"
            self._recorder.warn(written.step, f"{written.path.name} of step {written.step} could not be saved: "
                                f"{written.error}; {self._kept()}{then}")
        elif resumable:
            self.saved_step = written.step
            self._recorder.log({
                "type": "event", "step": written.step, "event": "checkpoint", "bytes": written.n_bytes,
                "message": f"saved {written.path.name} ({format_gib(written.n_bytes)} in {written.seconds:.1f}s; steps "
                           f"waited {self._waited_s:.2f}s)",
                "seconds": written.seconds, "waited_s": self._waited_s,
            })
