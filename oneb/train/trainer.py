"""The training loop: steps, and what is done beside and between them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from oneb.checkpoints.lock import LockedError
from oneb.checkpoints.mirror import Mirror
from oneb.checkpoints.rundir import LAST, CheckpointError, RunDirectory, fault
from oneb.data.loader import Batch, BatchLoader
from oneb.errors import OnebError
from oneb.files import write_json
from oneb.inspect.analysis import analyse
from oneb.planner import make_plan, mfu
from oneb.schedules import seq_len_at, tokens_before
from oneb.show.recorder import Recorder
from oneb.train.arrival import Arrival
from oneb.train.clock import StepClock, process_age_s
from oneb.train.compiles import compilations
from oneb.train.resume import StartingPoint, reload, snapshot
from oneb.train.rollback import checkpoints_before
from oneb.train.saving import Saver
from oneb.train.setup import Parts, describe
from oneb.train.signals import Stopped, StopRequest
from oneb.train.stepper import Stepper
from oneb.train.watch import LossWatch, Readings, Verdict

_PROBE_TOKENS = 512  # longest window that an analysis looks at
_PREFETCH_STEPS = 4


class Diverged(OnebError):
    """The run went wrong, and going back is of no use, or of no more."""


class Trainer(Stepper):
    """One run: its state (step, best loss, what was noticed; weights and optimizer in ``parts``) and its loop."""

    def __init__(
        self, parts: Parts, directory: RunDirectory, recorder: Recorder, stop: StopRequest, start: StartingPoint,
        mirror: Mirror | None = None,
    ) -> None:
        super().__init__(parts, recorder, start.step)
        self.directory = directory
        self.stop = stop
        self.clock = StepClock(parts.device.synchronize)
        self.order = dataclasses.replace(parts.order, skips=start.skips)
        self.arrival = Arrival(parts.tokens, recorder)
        self.saver = Saver(parts, directory, recorder, self.contents, start.step, mirror)
        self.compiled: int | None = None  # graphs and kernels, once the first step has run
        self._begin_at(start)

    def _begin_at(self, start: StartingPoint) -> None:
        """Go on from what has been loaded into the parts."""
        self.step = start.step
        self.best_val_loss = start.best_val_loss
        self.evaluated_at = start.evaluated_at
        self.readings = Readings(self.parts.device.torch)
        self.watch = LossWatch(self.config.train.spike_zscore, warmup_steps=self.config.optim.warmup_steps,
                               chunk_len=self.order.chunk_len)
        if start.watch:
            self.watch.load_state_dict(start.watch)
        self.verdict: Verdict | None = None
        self.seq_len: int | None = None  # of the last step

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return tokens_before(self.config.train.phases, self.step, self.config.train.sequences)

    def describe(self) -> None:
        """Write down what this run is, before its first step."""
        write_json(self.directory.path / "config.json", self.config.to_dict())
        plan = make_plan(self.config, gpu=self.parts.device.gpu, fit=self.fit)
        write_json(self.directory.path / "plan.json", plan.to_dict())
        self.recorder.log({"type": "meta", "time": time.time(), **describe(self.parts, self.step)})
        for note in self.parts.notes:
            self.recorder.warn(self.step, note)
        for note in self.fit.notes:
            self.event("fit", note)
        if self.directory.resume_from:
            self.event("resume", f"continues {self.directory.resume_from} at step {self.step}")

    # ---- the loop

    def run(self) -> None:
        """Train from the current step to the last one, or until a stop is asked for."""
        self.saver.reserve()
        try:
            self._evaluate_if_due()  # what a run that was killed while it evaluated still owes
            while self._goes_on():
                with self._loader() as loader:
                    self.clock.restart()
                    while not self.stop.signum and not self._went_back() and self._goes_on():
                        self._next_step(loader)
        except Stopped:
            pass
        except Exception as error:
            if not self.stop.signum or self.updating:
                raise
            # A signal to all of a terminal's processes has reached a compiler, say, that this one waited for.
            self.recorder.warn(self.step, f"while stopping: {type(error).__name__}: {error}")
        self._forget_gradients()

    def _goes_on(self) -> bool:
        return self.step < self.config.train.steps and not self.stop.signum

    def _next_step(self, loader: BatchLoader) -> None:
        """A step, and what is due after it."""
        with self.stop.interruptible():
            batch = loader.next(self.arrival.waiting)
        if batch.seq_len == self.seq_len:
            loss, norm, lr = self.train_step(batch)
            self.clock.step(loader.wait_seconds)
        else:
            with self._first_of_its_length(batch.seq_len):
                loss, norm, lr = self.train_step(batch)
            self.seq_len = batch.seq_len
        scaler = self.parts.scaler
        self.readings.add(self.step, batch.seq_len, loss, norm, scaler.scale if scaler.enabled else None)
        self.step += 1
        if self.directory.lock and self.directory.lock.lost:
            self.directory.lock.check()
        self.recorder.advance(self.step)
        self.arrival.look(self.step)
        if self.step % self.config.log.log_every == 0 or self.step in (1, self.config.train.steps):
            self.log_step(loss, norm, lr, batch.seq_len)
        if self.saver.is_due(self.step) and self._is_calm() and self.saver.save(self.step):
            with self.clock.pause():
                self.recorder.refresh_report(self.step)
        self._evaluate_if_due()
        self.saver.report()

    def _gradients_within_memory(self, batch: Batch) -> tuple[Tensor, Tensor]:
        # The first at a length may compile for longer than somebody who stops the run can wait.
        with self.stop.interruptible(batch.seq_len != self.seq_len):
            return super()._gradients_within_memory(batch)

    def _before_update(self) -> None:
        if self._analysis_due(self.step + 1):
            self.analyse()
        self.saver.before_update()

    def _loader(self) -> BatchLoader:
        return BatchLoader(
            self.parts.tokens, self.order, vocab_size=self.config.model.vocab_size, start_step=self.step,
            total_steps=self.config.train.steps, prefetch=_PREFETCH_STEPS, pin_memory=self.parts.device.is_cuda,
        )

    @contextlib.contextmanager
    def _first_of_its_length(self, seq_len: int) -> Iterator[None]:
        """The first step at a sequence length, which may compile: said beforehand, timed apart from the others."""
        began = time.perf_counter()
        first_of_run = self.compiled is None
        if self.config.train.compile:
            self.recorder.status(f"compiling for {seq_len} tokens a sequence, once; up to a minute")
        elif self.parts.device.is_cuda and first_of_run:
            self.recorder.status("first step: kernels are compiled, and kept on disk for the next run")
        yield
        self.parts.device.synchronize()
        seconds = time.perf_counter() - began
        self.clock.restart()
        self.compiled = compilations()
        text = f"first step at {seq_len} tokens took {seconds:.1f}s"
        if first_of_run:
            text += f", {process_age_s():.1f}s after the command was given"
        self.event("first_step", text, seconds=seconds, since_start_s=process_age_s(), seq_len=seq_len)

    # ---- what happens beside the steps

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Work whose time is not the steps', nor is what it compiles."""
        before = compilations()
        with self.clock.pause():
            yield
        if self.compiled is not None:
            self.compiled += compilations() - before

    def log_step(self, loss: Tensor, norm: Tensor, lr: float, seq_len: int) -> None:
        """One train row. Reading the loss is the only time that the host waits for the device."""
        values = torch.stack([loss, norm, self.parts.scaler.skipped_steps.float()]).tolist()
        self.recorder.log({
            "type": "train", "step": self.step, "tokens": self.tokens, "loss": values[0], "lr": lr,
            "grad_norm": values[1], "seq_len": seq_len, **self._speed(seq_len),
            "memory_gib": self.parts.device.peak_gib(), "skipped": int(values[2]), "elapsed_s": process_age_s(),
        })
        if (compiled := compilations()) > self.compiled:
            self.event("recompile", f"{compiled - self.compiled} graphs or kernels were compiled since the last log "
                       "row")
            self.compiled = compiled

    def _speed(self, seq_len: int) -> dict[str, float | None]:
        """Mean of the steps since the last row; None where there was only one that compiled."""
        if (read := self.clock.read()) is None:
            return dict.fromkeys(("tok_s", "mfu", "step_ms", "data_ms"))
        step_s, waited_s = read
        tok_s = seq_len * self.config.train.sequences(seq_len) / step_s
        return {"tok_s": tok_s, "mfu": mfu(self.config, tok_s, seq_len, self.parts.device.gpu),
                "step_ms": step_s * 1e3, "data_ms": waited_s * 1e3}

    def _evaluate_if_due(self) -> None:
        every, steps = self.config.train.eval_every, self.config.train.steps
        due = every > 0 and 0 < self.step < steps and self.step % every == 0 and self.evaluated_at != self.step
        if due and self.verdict is None:
            self.evaluate()

    def evaluate(self) -> None:
        """Validation loss now; the best so far is kept as ``best.pt``. Whatever happens here, the run is saved before.

        Raises:
            Stopped: a signal came; the evaluation is left to the run that continues this one.
        """
        if self._is_calm():
            self.saver.save_before_evaluation(self.step)
        with self._aside():
            began = time.perf_counter()
            seq_len = seq_len_at(self.config.train.phases, max(0, self.step - 1))
            self.recorder.status("evaluating")
            max_rows = self.fit.at(seq_len).batch_size
            with self.stop.interruptible():  # what comes of it is recorded whole
                loss, n_tokens = self.parts.validation.loss(self.parts.model, seq_len, max_rows)
            self.evaluated_at = self.step
            best = loss < self.best_val_loss
            self.best_val_loss = min(loss, self.best_val_loss) if math.isfinite(loss) else self.best_val_loss
            self.recorder.log({
                "type": "eval", "step": self.step, "tokens": self.tokens, "val_loss": loss,
                "best_val_loss": self.best_val_loss, "seq_len": seq_len, "eval_tokens": n_tokens,
                "eval_s": time.perf_counter() - began,
            })
        if best:
            self.saver.save_best(self.step)

    def _analysis_due(self, step: int) -> bool:
        log, every = self.config.log, self.config.log.analysis_every
        if log.instrument == "off":
            return False
        if every == 0 and log.instrument in ("medium", "full"):
            every = self.config.train.eval_every
        return every > 0 and step % every == 0

    def analyse(self) -> None:
        """An analysis row, from the gradients of the step under way."""
        with self._aside():
            level = self.config.log.instrument
            try:
                probe = None
                if level == "full":
                    seq_len = min(_PROBE_TOKENS, self.config.model.max_seq_len)
                    probe = self.parts.validation.probe(self.parts.model, seq_len)
                scale = self.parts.scaler.inv_scale.item()
                row = analyse(self.parts.model, probe, level, grad_scale=scale)
            except torch.OutOfMemoryError:  # fallback: a look at the run must not end it
                self.recorder.warn(self.step, "the GPU has no memory left for this analysis: it is left out; a lower "
                                   f"--instrument than {level} needs less")
                return
            self.recorder.log({"type": "analysis", "step": self.step + 1, **row})

    # ---- when something goes wrong

    def _take_readings(self, wait: bool = False) -> None:
        """Look at the steps whose loss and norm have arrived, or at all of them; ``verdict`` may come of it."""
        for reading in self.readings.arrived(wait):
            if reading.skipped:
                self.recorder.warn(reading.step + 1, f"the update of step {reading.step + 1} was skipped: its loss was "
                                   f"{reading.loss:.4g}, its gradient norm {reading.norm:.4g}; it read "
                                   f"{self.order.describe(reading.step)}")
            self.verdict = self.verdict or self.watch.add(reading)

    def _is_calm(self) -> bool:
        """Whether all steps look right, the last one included: what is saved now is worth going back to."""
        self._take_readings(wait=True)
        return self.verdict is None and self.watch.calm

    def _went_back(self) -> bool:
        """Whether the run has gone back to a checkpoint, and reads other data from there."""
        self._take_readings(wait=self.step == self.config.train.steps)  # no later step will hear of them
        if self.verdict is None:
            return False
        self._go_back(self.verdict)
        return True

    def _go_back(self, verdict: Verdict) -> None:
        """Load the last good checkpoint and pass over the data at which the run went wrong.

        Raises:
            Diverged: it has done so too often, or there is no such checkpoint.
        """
        calmer = f"give a smaller --lr (now {self.config.optim.lr:g}), more --warmup-steps or a smaller --grad-clip"
        most = self.config.train.max_rollbacks
        if len(self.order.skips) >= most:
            raise Diverged(f"{verdict.reason}. The run has gone back {len(self.order.skips)} times (--max-rollbacks "
                           f"{most}), so it is not the data: {calmer}, and start from a step*.pt or anew")
        self.saver.flush()
        start, reached_step = self._load_before(verdict), self.step
        if start is None:
            raise Diverged(f"{verdict.reason}. There is no checkpoint from before that: {calmer}; --save-minutes or "
                           "--save-every saves more often")
        self.fit = self.parts.fit
        self.order = self.order.skipping(verdict.first_step, verdict.last_step)
        self._begin_at(start)
        self.recorder.rewind(self.step)
        self.event("rollback", f"{verdict.reason}. Back from step {reached_step} to {start.checkpoint.name} of step "
                   f"{self.step}; the batches of steps {verdict.first_step + 1} to {verdict.last_step + 1} are passed "
                   "over",
                   first_step=verdict.first_step, last_step=verdict.last_step, checkpoint=start.checkpoint.name)
        self.saver.went_back(self.step)

    def _load_before(self, verdict: Verdict) -> StartingPoint | None:
        """Load the newest good checkpoint from before what ``verdict`` says; None where there is none."""
        for path in checkpoints_before(self.directory.path, verdict, self.order.skips):
            try:
                return reload(self.parts, path)
            except CheckpointError as error:
                self.recorder.warn(self.step, f"passed over on the way back: {fault(error)}")
        return None

    def rescue(self, error: Exception) -> None:
        """Save the last whole step after ``error``, which the caller then raises."""
        if isinstance(error, LockedError):
            return  # another process saves there
        if self.verdict is not None:  # what the run has come to is not worth saving
            self.recorder.warn(self.step, f"the run ends: {error}")
            return
        if self.updating:
            self.recorder.warn(self.step, f"an error ended the run within the update of step {self.step}, and left "
                               f"weights that belong to no step: {LAST} stays as it is")
            return
        self.recorder.warn(self.step, f"an error ended the run at step {self.step}; saving {LAST}")
        try:
            self._forget_gradients()
            self.saver.secure(self.step, keep_last=not self._is_calm())
            self.saver.finish(self.step)
        except Exception as second:  # fallback: the error that ended the run says more than this one
            self.recorder.warn(self.step, f"{LAST} could not be saved either ({type(second).__name__}: {second})")

    # ---- saving

    def contents(self, with_optimizer: bool) -> dict[str, Any]:
        """The run as it is, for a checkpoint."""
        return snapshot(
            self.parts, step=self.step, best_val_loss=self.best_val_loss, divisions=self.fit.divisions(),
            with_optimizer=with_optimizer, skips=self.order.skips, watch=self.watch.state_dict(),
            evaluated_at=self.evaluated_at)

    def finish(self) -> None:
        """Save where the run stands, evaluate a finished one, and write the report.

        Raises:
            OnebError: it could not be saved.
        """
        # Before the evaluation: whatever happens there, the run is not lost. What a verdict speaks of is not kept.
        calm = self._is_calm()
        if self.verdict is None:
            # The run that continues may find that it must go back to before what has begun here.
            self.saver.secure(self.step, keep_last=not calm)
        if not self.stop.signum and self.evaluated_at != self.step:
            with contextlib.suppress(Stopped):
                self.evaluate()
        self.saver.flush()
        if self.step < self.config.train.steps or self.evaluated_at != self.step:
            name = signal.Signals(self.stop.signum).name
            text = f"stopped by signal {self.stop.signum} ({name}) at step {self.step}; {self._how_to_continue()}"
            self.event("stopped", text)
        else:
            self.event("finish", f"finished {self.step} steps, {self.tokens:,} tokens")
        self.recorder.refresh_report(self.step)
        self.saver.finish(self.step)

    def _how_to_continue(self) -> str:
        if not self.config.run.save_optim:
            return "without optimizer state (--no-save-optim) it cannot be continued exactly"
        if self.saver.saved_step is None:
            return "nothing to save yet"
        if self.config.run.if_exists == "resume":
            return "the same command continues"
        # Alone it continues the run of this name; another directory must be said.
        own = self.directory.path.name == self.config.name
        return f"the same command with --resume{'' if own else f' --ckpt {self.directory.path / LAST}'} continues"
