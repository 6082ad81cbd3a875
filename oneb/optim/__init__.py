"""Lion and AdamW with stochastic rounding, gradient clipping and loss scaling, all on the device."""

from __future__ import annotations

from oneb.optim.clip import clip_scale, grad_norm
from oneb.optim.loss_scale import LossScaler
from oneb.optim.optimizer import AdamW, AdamW8bit, Lion, Lion8bit, Optimizer, applies_decay, build_optimizer

__all__ = [
    "AdamW", "AdamW8bit", "Lion", "Lion8bit", "LossScaler", "Optimizer", "applies_decay", "build_optimizer",
    "clip_scale", "grad_norm",
]
