"""The training loop: build, then steps, each phase of which can be read here in order."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from oneb.config import Config
from oneb.data.loader import Batch, BatchLoader
from oneb.files import write_json
from oneb.inspect.analysis import analyse
from oneb.kernels.attention import SDP_BACKENDS
from oneb.optim import clip_scale, grad_norm
from oneb.planner import make_plan, mfu
from oneb.schedules import lr_at, seq_len_at, tokens_before
from oneb.train import checkpoint
from oneb.train.clock import StepClock, process_age_s
from oneb.train.compiles import compilations
from oneb.train.recorder import Recorder, open_recorder
from oneb.train.resume import StartingPoint, restore, snapshot
from oneb.train.rundir import BEST, LAST, RunDirectory, claimed, continued, run_directory
from oneb.train.setup import Parts, build, describe
from oneb.train.signals import StopRequest

_PROBE_TOKENS = 512  # longest window that an analysis looks at
_PREFETCH_STEPS = 4


def train(config: Config) -> int:
    """Run ``config`` to its end, or until a signal; returns the exit code.

    Raises:
        OnebError: a mistake in what was asked for, before the first step wherever it can be known then.
    """
    chosen = run_directory(config)
    print(f"run directory: {chosen.path}{chosen.note}", flush=True)
    if chosen.skip:
        return 0
    # Nothing is written before it is known that the run can start.
    parts = build(continued(config, chosen), print)
    start = restore(parts, chosen)
    chosen = dataclasses.replace(chosen, resume_from=start.checkpoint)  # an older one, where the newest is damaged
    if start.step >= config.train.steps:
        print(f"nothing to do: {chosen.resume_from} has done {start.step} of {config.train.steps} steps")
        return 0
    with claimed(config, chosen) as directory, StopRequest() as stop:
        if directory != chosen:
            print(f"run directory: {directory.path}{directory.note}", flush=True)
        if directory.skip:
            return 0
        with open_recorder(parts.config, directory) as recorder, sdpa_kernel(SDP_BACKENDS[parts.backend]):
            trainer = Trainer(parts, directory, recorder, stop, start)
            trainer.describe()
            try:
                trainer.run()
            except Exception:
                trainer.rescue()
                raise
            trainer.finish()
        return stop.exit_code


class Trainer:
    """One run: its state (step, tokens, best loss; weights and optimizer in ``parts``) and its steps."""

    def __init__(
        self, parts: Parts, directory: RunDirectory, recorder: Recorder, stop: StopRequest, start: StartingPoint
    ) -> None:
        self.parts = parts
        self.config = parts.config
        self.fit = parts.fit  # and less than that, once the GPU has run out of memory
        self.directory = directory
        self.recorder = recorder
        self.stop = stop
        self.clock = StepClock(parts.device.synchronize)
        self.step = start.step
        self.best_val_loss = start.best_val_loss
        self.evaluated_at = -1
        # What the run starts from need not be saved again, if it is this directory's own.
        self.saved_at = start.step if directory.resume_from in (None, directory.path / LAST) else -1
        self.saved_time = time.monotonic()  # of last.pt, seconds
        self.compiled: int | None = None  # graphs and kernels, once the first step has run
        self.skipped = int(parts.scaler.skipped_steps)
        self.updating = False  # weights are changing, some of them changed: no checkpoint now

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
        train = self.config.train
        with self._loader() as loader:
            seq_len = None
            self.clock.restart()
            while self.step < train.steps and not self.stop.signum:
                batch = loader.next()
                if batch.seq_len == seq_len:
                    loss, norm, lr = self.train_step(batch)
                    self.clock.step(loader.wait_seconds)
                else:
                    seq_len = batch.seq_len
                    with self._first_of_its_length(seq_len):
                        loss, norm, lr = self.train_step(batch)
                self.step += 1
                self.recorder.advance(self.step)
                if self.step % self.config.log.log_every == 0 or self.step in (1, train.steps):
                    self.log_step(loss, norm, lr, seq_len)
                if self._due(train.eval_every) and self.step < train.steps:
                    self.evaluate()
                if self._due(self.config.run.save_every):
                    self.save_step()
                elif 0 < self.config.run.save_minutes <= (time.monotonic() - self.saved_time) / 60:
                    with self.clock.pause():
                        self._save_last()

    def train_step(self, batch: Batch) -> tuple[Tensor, Tensor, float]:
        """One optimizer step; nothing here waits for the device.

        Returns:
            The whole batch's mean loss and its gradient norm (0-dim device tensors), and the learning rate.
        """
        optim, steps = self.config.optim, self.config.train.steps
        optimizer, scaler, float8 = self.parts.optimizer, self.parts.scaler, self.parts.float8
        total, norm = self._gradients_within_memory(batch)
        if self._analysis_due(self.step + 1):
            self.analyse()
        lr = lr_at(self.step, schedule=optim.lr_schedule, peak_lr=optim.lr, min_lr=optim.min_lr,
                   warmup_steps=optim.warmup_steps, steps=steps)
        self.updating = True
        # A norm that is not finite makes this scale NaN, and the optimizer leaves weights and state alone.
        optimizer.step(lr, self.step, clip_scale(norm, optim.grad_clip, scaler.inv_scale))
        scaler.update(norm)
        if float8:
            float8.step()
        optimizer.zero_grad()
        self.updating = False
        return total, norm, lr

    def _gradients_within_memory(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """:meth:`_gradients`, again in smaller micro-batches for as long as the GPU runs out of memory.

        Weights, optimizer state and data are untouched until gradients are whole, so nothing is lost but time.

        Raises:
            OnebError: they cannot be made smaller.
        """
        while True:
            try:
                return self._gradients(batch)
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
            # Out of the handler, whose traceback holds the failed pass's activations.
            self._make_smaller(batch.seq_len, reason)

    def _gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Forward and backward of a step's micro-batches: mean loss, and the norm of the gradients they leave."""
        model, scaler, float8 = self.parts.model, self.parts.scaler, self.parts.float8
        fitted = self.fit.at(batch.seq_len)
        model.recomputed_layers = fitted.recomputed_layers
        tokens = batch.tokens.to(model.device, non_blocking=True)
        if float8 and not float8.calibrated:
            self._calibrate(tokens)
        total = torch.zeros((), device=model.device)
        for micro_batch in tokens.split(fitted.batch_size):
            loss = model.loss(micro_batch) / fitted.grad_accum
            scaler.scale_loss(loss).backward()
            total += loss.detach()
            del loss  # its graph holds what the backward pass did not free, until the next one's is built
        norm = grad_norm(self.parts.optimizer.params, scaler.inv_scale)
        return total, norm + float8.fault() if float8 else norm

    def _make_smaller(self, seq_len: int, reason: str) -> None:
        """After running out of memory: give back what the failed pass took, and plan with less."""
        self.parts.optimizer.zero_grad()
        if self.parts.float8:
            self.parts.float8.forget_step()
        before = self.fit.at(seq_len)
        self.fit = self.fit.smaller(seq_len)
        torch.cuda.empty_cache()
        after = self.fit.at(seq_len)
        self.event("out_of_memory", f"{reason} The step is done again: {after.described()} instead of "
                   f"{before.described()}", batch_size=after.batch_size, grad_accum=after.grad_accum,
                   recomputed_layers=after.recomputed_layers)

    def _calibrate(self, tokens: Tensor) -> None:
        """Before the first fp8 step: the sizes of activations and gradients, from one sequence in 16 bit."""
        parts = self.parts
        with parts.float8.calibrating():
            loss = parts.model.loss(tokens[:1]) / len(tokens)
            parts.scaler.scale_loss(loss).backward()
        parts.optimizer.zero_grad()

    def _loader(self) -> BatchLoader:
        return BatchLoader(
            self.parts.tokens, self.parts.order, vocab_size=self.config.model.vocab_size, start_step=self.step,
            total_steps=self.config.train.steps, prefetch=_PREFETCH_STEPS, pin_memory=self.parts.device.is_cuda,
        )

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

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
        if (skipped := int(values[2])) > self.skipped:
            self.recorder.warn(self.step, f"{skipped - self.skipped} updates skipped since the last log row: their "
                               f"gradients were not finite (loss now {values[0]:.4g})")
            self.skipped = skipped

    def _speed(self, seq_len: int) -> dict[str, float | None]:
        """Mean of the steps since the last row; None where there was only one that compiled."""
        if (read := self.clock.read()) is None:
            return dict.fromkeys(("tok_s", "mfu", "step_ms", "data_ms"))
        step_s, waited_s = read
        tok_s = seq_len * self.config.train.sequences(seq_len) / step_s
        return {"tok_s": tok_s, "mfu": mfu(self.config, tok_s, seq_len, self.parts.device.gpu),
                "step_ms": step_s * 1e3, "data_ms": waited_s * 1e3}

    def evaluate(self) -> None:
        """Validation loss now; the best so far is kept as ``best.pt``."""
        with self._aside():
            began = time.perf_counter()
            seq_len = seq_len_at(self.config.train.phases, max(0, self.step - 1))
            self.recorder.status("evaluating")
            max_rows = self.fit.at(seq_len).batch_size
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
                self._save(self.directory.path / BEST, with_optimizer=False)

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

    def event(self, name: str, message: str, **details: Any) -> None:
        """Something that happened once: shown, and recorded."""
        self.recorder.log({"type": "event", "step": self.step, "event": name, "message": message, **details})

    # ---- saving

    def save_step(self) -> None:
        """``stepNNNNNNNN.pt``, and ``last.pt`` as the same file."""
        with self.clock.pause():
            path = self.directory.path / f"step{self.step:08d}.pt"
            self._save(path, with_optimizer=self.config.run.save_optim)
            checkpoint.link_checkpoint(path, self.directory.path / LAST)
            checkpoint.prune_checkpoints(self.directory.path, self.config.run.keep_last)
            self._saved(path)
            self.recorder.refresh_report(self.step)

    def _save(self, path: Path, *, with_optimizer: bool) -> None:
        self.recorder.status(f"saving {path.name}")
        checkpoint.save_checkpoint(path, snapshot(
            self.parts, step=self.step, best_val_loss=self.best_val_loss, divisions=self.fit.divisions(),
            with_optimizer=with_optimizer))

    def _saved(self, path: Path) -> None:
        self.saved_at, self.saved_time = self.step, time.monotonic()
        self.event("checkpoint", f"saved {path.name}")

    def _save_last(self) -> None:
        """``last.pt`` of the current step, unless it is that already or there is nothing new in it."""
        if self.saved_at != self.step:
            self._save(path := self.directory.path / LAST, with_optimizer=self.config.run.save_optim)
            self._saved(path)

    def _how_to_continue(self) -> str:
        if not self.config.run.save_optim:
            return "without optimizer state (--no-save-optim) it cannot be continued exactly"
        if self.saved_at == 0:
            return "nothing to save yet"
        return f"the same command with --resume --ckpt {self.directory.path / LAST} continues"

    def rescue(self) -> None:
        """Save the last whole step after an error, which the caller then raises."""
        if self.updating:
            self.recorder.warn(self.step, f"an error ended the run within the update of step {self.step}, and left "
                               f"weights that belong to no step: {LAST} stays as it is")
            return
        self.recorder.warn(self.step, f"an error ended the run at step {self.step}; saving {LAST}")
        try:
            self._save_last()
        except Exception as error:  # fallback: the error that ended the run says more than this one
            self.recorder.warn(self.step, f"{LAST} could not be saved either ({type(error).__name__}: {error})")

    def finish(self) -> None:
        """Save where the run stands, evaluate a finished one, and write the report."""
        stopped = self.stop.signum is not None
        # Saved before the evaluation: whatever happens there, the run is not lost.
        self._save_last()
        if not stopped and self.evaluated_at != self.step:
            self.evaluate()
        if stopped:
            text = f"stopped by signal {self.stop.signum} at step {self.step}; {self._how_to_continue()}"
            self.event("stopped", text)
        else:
            self.event("finish", f"finished {self.step} steps, {self.tokens:,} tokens")
        self.recorder.refresh_report(self.step)
