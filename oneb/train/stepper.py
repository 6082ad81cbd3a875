"""One optimizer step, each phase of which can be read here in order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oneb.data.loader import Batch
from oneb.optim import clip_scale, grad_norm
from oneb.schedules import lr_at
from oneb.show.recorder import Recorder
from oneb.train.setup import Parts


class Stepper:
    """Makes optimizer steps. Between two of them nothing is half done, and within one only the update changes anything.

    Attributes:
        step: optimizer steps done.
        fit: how steps are divided; finer than ``parts.fit`` once the GPU has run out of memory.
        updating: weights are changing, some of them changed: no checkpoint now.
    """

    def __init__(self, parts: Parts, recorder: Recorder, step: int) -> None:
        self.parts = parts
        self.config = parts.config
        self.recorder = recorder
        self.step = step
        self.fit = parts.fit
        self.updating = False

    def event(self, name: str, message: str, **details: Any) -> None:
        """Something that happened once: shown, and recorded."""
        self.recorder.log({"type": "event", "step": self.step, "event": name, "message": message, **details})

    def train_step(self, batch: Batch) -> tuple[Tensor, Tensor, float]:
        """One optimizer step; nothing here waits for the device.

        Returns:
            The whole batch's mean loss and its gradient norm (0-dim device tensors), and the learning rate.
        """
        optim, steps = self.config.optim, self.config.train.steps
        optimizer, scaler, float8 = self.parts.optimizer, self.parts.scaler, self.parts.float8
        total, norm = self._gradients_within_memory(batch)
        self._before_update()
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

    def _before_update(self) -> None:
        """What is to happen once gradients are whole, and weights still as they were."""

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
        # A loss that is not finite makes the norm so, too: then the update is left out.
        norm = grad_norm(self.parts.optimizer.params, scaler.inv_scale) + 0 * total
        return total, norm + float8.fault() if float8 else norm

    def _make_smaller(self, seq_len: int, reason: str) -> None:
        """After running out of memory: give back what the failed pass took, and plan with less."""
        self._forget_gradients()
        before = self.fit.at(seq_len)
        self.fit = self.fit.smaller(seq_len)
        torch.cuda.empty_cache()
        after = self.fit.at(seq_len)
        self.event("out_of_memory", f"{reason} The step is done again: {after.described()} instead of "
                   f"{before.described()}", batch_size=after.batch_size, grad_accum=after.grad_accum,
                   recomputed_layers=after.recomputed_layers)

    def _forget_gradients(self) -> None:
        """As if the step that is under way had not begun."""
        self.parts.optimizer.zero_grad()
        if self.parts.float8:
            self.parts.float8.forget_step()

    def _calibrate(self, tokens: Tensor) -> None:
        """Before the first fp8 step: the sizes of activations and gradients, from one sequence in 16 bit."""
        parts = self.parts
        with parts.float8.calibrating():
            loss = parts.model.loss(tokens[:1]) / len(tokens)
            parts.scaler.scale_loss(loss).backward()
        parts.optimizer.zero_grad()
