"""What stochastic rounding is for: bf16 weights must train like fp32 ones.

The weights are of a real run's size (0.02, where bf16 steps by 1.2e-4) and so is the learning rate, far
below that step. Each run computes in fp32 from its weights, so that rounding the weights is all that differs.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from oneb.optim import build_optimizer, clip_scale, grad_norm

WIDTH = 48
STEPS = 600


def problem() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Inputs (N, WIDTH), a teacher network's outputs (N, 8), and a student's first weights."""
    torch.manual_seed(0)
    inputs = torch.randn(256, WIDTH)
    teacher = torch.relu(inputs @ torch.randn(WIDTH, WIDTH) * 0.04) @ torch.randn(WIDTH, 8) * 0.04
    # Start on the bf16 grid: all three runs begin at the very same point.
    start = {name: (torch.randn(shape) * 0.02).bfloat16().float()
             for name, shape in (("up", (WIDTH, WIDTH)), ("down", (WIDTH, 8)))}
    return inputs, teacher, start


def loss_curve(kind: str, lr: float, dtype: torch.dtype, nearest: bool = False) -> torch.Tensor:
    """(STEPS,) losses; ``nearest`` rounds fp32 weights to the nearest bf16 after every step."""
    inputs, targets, start = problem()
    params = {name: nn.Parameter(value.to(dtype)) for name, value in start.items()}
    optimizer = build_optimizer(params.items(), kind=kind, betas=(0.9, 0.98), weight_decay=0.1, seed=0)
    losses = []
    for step in range(STEPS):
        hidden = torch.relu(inputs @ params["up"].float())
        loss = mse_loss(hidden @ params["down"].float(), targets)
        loss.backward()
        optimizer.step(lr, step, clip_scale(grad_norm(optimizer.params), 1.0))
        optimizer.zero_grad()
        if nearest:
            for param in params.values():
                param.data.copy_(param.data.bfloat16())
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize(("kind", "lr"), [("lion", 3e-5), ("adamw", 3e-5)])
def test_bf16_weights_train_like_fp32_ones_only_with_stochastic_rounding(kind, lr):
    exact = loss_curve(kind, lr, torch.float32)
    stochastic = loss_curve(kind, lr, torch.bfloat16)
    nearest = loss_curve(kind, lr, torch.float32, nearest=True)
    learned = exact[0] - exact[-1]
    assert learned > 0.3 * exact[0], "the problem must be one where training shows"
    assert (stochastic - exact).abs().max() < 0.01 * learned  # measured: 0.003
    assert nearest[-1] - exact[-1] > 0.5 * learned  # measured: 0.79 (Lion), 0.66 (AdamW)
