"""Lion against the paper's algorithm written down a second time, AdamW against torch's own."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import nn

from oneb.optim import build_optimizer

ONE = torch.tensor(1.0)


def lion_paper(p, m, g, lr, b1, b2, wd):
    """Algorithm 2 of arXiv 2302.06675 for one number, in fp64."""
    c = b1 * m + (1 - b1) * g
    sign = math.copysign(1.0, c) if c else 0.0
    return p - lr * (sign + wd * p), b2 * m + (1 - b2) * g


def lion_updated_twice(p, m, g, lr, b1, b2, wd):
    """The known wrong version: the interpolation overwrites the momentum, which then moves again."""
    m = b1 * m + (1 - b1) * g
    sign = math.copysign(1.0, m) if m else 0.0
    return p - lr * (sign + wd * p), b2 * m + (1 - b2) * g


def lion_difference(reference, steps=60, size=40):
    """Largest |difference| of weights and of momenta after some steps, (reference, ours)."""
    rng = random.Random(1)
    lr, b1, b2, wd = 1e-3, 0.95, 0.98, 0.5
    weights = [rng.gauss(0, 0.02) for _ in range(size)]
    momenta = [0.0] * size
    param = nn.Parameter(torch.tensor([weights]))
    optimizer = build_optimizer([("w", param)], kind="lion", betas=(b1, b2), weight_decay=wd, seed=0)
    for step in range(steps):
        grads = [rng.gauss(0, 1) for _ in range(size)]
        param.grad = torch.tensor([grads])
        optimizer.step(lr, step, ONE)
        pairs = [reference(p, m, g, lr, b1, b2, wd) for p, m, g in zip(weights, momenta, grads, strict=True)]
        weights, momenta = map(list, zip(*pairs, strict=True))
    ours = optimizer.state_dict()["state"]["w"]["exp_avg"]
    return (
        (param.detach().double() - torch.tensor([weights], dtype=torch.float64)).abs().max().item(),
        (ours.double() - torch.tensor([momenta], dtype=torch.float64)).abs().max().item(),
    )


def test_lion_follows_the_paper():
    weight_difference, momentum_difference = lion_difference(lion_paper)
    assert weight_difference < 1e-6  # a single wrong sign would show as 2e-3
    assert momentum_difference < 1e-6


def test_lion_with_momentum_updated_twice_would_be_noticed():
    weight_difference, momentum_difference = lion_difference(lion_updated_twice)
    assert weight_difference > 1e-3
    assert momentum_difference > 1e-2


def test_lion_where_direction_is_zero_only_decays():
    param = nn.Parameter(torch.tensor([[0.5, -0.25]]))
    optimizer = build_optimizer([("w", param)], kind="lion", betas=(0.9, 0.99), weight_decay=0.5, seed=0)
    param.grad = torch.zeros(1, 2)
    optimizer.step(0.1, 0, ONE)
    torch.testing.assert_close(param.detach(), torch.tensor([[0.475, -0.2375]]))


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_adamw_follows_torch(betas):
    torch.manual_seed(0)
    shapes = {"matrix": (13, 7), "bias": (7,), "scalar": ()}
    start = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    ours = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    theirs = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = build_optimizer(ours.items(), kind="adamw", betas=betas, eps=1e-8, weight_decay=0.1, seed=0)
    groups = [
        {"params": [theirs["matrix"]], "weight_decay": 0.1},
        {"params": [theirs["bias"], theirs["scalar"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=1e-8, foreach=False)
    clip = 0.37
    for step in range(50):
        lr = 1e-3 * (1 + math.sin(step))
        for name in shapes:
            ours[name].grad = torch.randn(shapes[name]) * 10.0 ** (step % 5 - 4)
            theirs[name].grad = ours[name].grad * clip
        for group in reference.param_groups:
            group["lr"] = lr
        optimizer.step(lr, step, torch.tensor(clip))
        reference.step()
        for name in shapes:
            torch.testing.assert_close(ours[name], theirs[name], rtol=2e-6, atol=2e-8)
