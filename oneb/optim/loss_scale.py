"""Dynamic loss scaling for fp16, and the count of skipped steps for every dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oneb.errors import OnebError

# 2**16, x2 after 2000 good steps, /2 on overflow: the procedure of Micikevicius et al. 2018
# (arXiv 1710.03740) with the values torch.amp.GradScaler took over from NVIDIA's Apex.
INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL_STEPS = 2000
# fp16 reaches down to 2**-24, so this scale saves gradients of 2**-48: more gains nothing.
MAX_SCALE = 2.0**24
MIN_SCALE = 1.0


class LossScaler:
    """Multiplies the loss so that small fp16 gradients survive; keeps all of its state on the device.

    A step: ``scaler.scale_loss(loss).backward()``; ``norm = grad_norm(params, scaler.inv_scale)``;
    ``optimizer.step(..., grad_scale=clip_scale(norm, max_norm, scaler.inv_scale))``;
    ``scaler.update(norm)``. A norm that is not finite makes the optimizer skip and the scale halve.

    With ``enabled=False`` (bf16, fp32) the scale stays 1 and only the skipped steps are counted, so
    the training loop has no second path.

    Attributes:
        scale: 0-dim fp32, a power of two.
        good_steps: 0-dim int64, steps since the scale last changed.
        skipped_steps: 0-dim int64, all steps so far whose norm was not finite.
    """

    def __init__(
        self, enabled: bool, device: torch.device | str = "cpu", *,
        growth_interval_steps: int = GROWTH_INTERVAL_STEPS,
    ) -> None:
        if growth_interval_steps < 1:
            raise OnebError(
                f"loss scale growth interval {growth_interval_steps}: wanted at least 1 step; "
                f"leave it at its default, {GROWTH_INTERVAL_STEPS}"
            )
        self.enabled = enabled
        self.growth_interval_steps = growth_interval_steps
        self.scale = torch.tensor(INITIAL_SCALE if enabled else 1.0, device=device)
        self.good_steps = torch.tensor(0, device=device)
        self.skipped_steps = torch.tensor(0, device=device)

    @property
    def inv_scale(self) -> Tensor:
        """1 / scale, exact: 0-dim fp32."""
        return self.scale.reciprocal()

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss to call ``backward`` on; any shape, same shape out."""
        return loss * self.scale if self.enabled else loss

    def update(self, norm: Tensor) -> None:
        """Take note of a step's gradient norm (0-dim), after the optimizer has stepped."""
        finite = torch.isfinite(norm)
        self.skipped_steps += ~finite
        if not self.enabled:
            return
        self.good_steps += 1
        grow = finite & (self.good_steps >= self.growth_interval_steps)
        # 2, 1 or 1/2, by arithmetic: torch.where would copy its constants from the host, and wait.
        self.scale.mul_(0.5 + 0.5 * finite + 1.0 * grow).clamp_(MIN_SCALE, MAX_SCALE)
        self.good_steps.mul_(finite & ~grow)

    def state_dict(self) -> dict[str, Any]:
        """``{"enabled": bool, "scale", "good_steps", "skipped_steps": 0-dim tensors}``, copied."""
        return {
            "enabled": self.enabled,
            "scale": self.scale.clone(),
            "good_steps": self.good_steps.clone(),
            "skipped_steps": self.skipped_steps.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``.

        A run may move between a GPU with bf16 and one without: the scale is taken over only if both
        sides scale, else this scaler keeps its own; the skipped steps are always taken over.

        Raises:
            OnebError: if the state has other keys than ``state_dict()`` gives.
        """
        wanted = set(self.state_dict())
        if set(state) != wanted:
            raise OnebError(
                f"loss scaler state with keys {sorted(state)}: wanted {sorted(wanted)}; "
                "the checkpoint is from another program or damaged, resume from an older one"
            )
        self.skipped_steps.copy_(state["skipped_steps"])
        if self.enabled and state["enabled"]:
            self.scale.copy_(state["scale"])
            self.good_steps.copy_(state["good_steps"])
