"""Gradient norm, clipping and loss scaling."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from oneb.errors import OnebError
from oneb.optim import LossScaler, clip_scale, grad_norm
from oneb.optim.loss_scale import INITIAL_SCALE, MAX_SCALE

GOOD, BAD, NAN = torch.tensor(1.0), torch.tensor(float("inf")), torch.tensor(float("nan"))


def params_with_grads(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in [(30, 20), (20,), ()]]
    for param in params:
        param.grad = (torch.randn(param.shape) * scale).to(dtype)
    params.append(nn.Parameter(torch.zeros(3, dtype=dtype)))  # one without a gradient
    return params


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_clipping_equals_torch(scale):
    ours, theirs = params_with_grads(scale), params_with_grads(scale)
    reference_norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    norm = grad_norm(ours)
    torch.testing.assert_close(norm, reference_norm)
    coefficient = clip_scale(norm, 1.0)
    for mine, reference in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(mine.grad * coefficient, reference.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_of_16_bit_gradients_is_accumulated_in_fp32(dtype):
    param = nn.Parameter(torch.zeros(300_000, dtype=dtype))
    param.grad = torch.full((300_000,), 2.0, dtype=dtype)
    norm = grad_norm([param])
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    torch.testing.assert_close(norm, torch.tensor(2.0 * 300_000**0.5))


def test_norm_over_mixed_dtypes_and_loss_scale():
    params = params_with_grads(100.0, torch.bfloat16) + params_with_grads(100.0)
    exact = sum(p.grad.double().square().sum() for p in params if p.grad is not None).sqrt()
    norm = grad_norm(params, torch.tensor(1 / 1024))
    torch.testing.assert_close(norm.double(), exact / 1024, rtol=1e-6, atol=0)


def test_norm_without_any_gradient_is_zero():
    assert grad_norm([nn.Parameter(torch.zeros(3))]).item() == 0


def test_scale_undoes_the_loss_scale_and_clips():
    inverse = torch.tensor(1 / 1024)
    assert clip_scale(torch.tensor(0.5), 1.0, inverse).item() == 1 / 1024
    assert clip_scale(torch.tensor(4.0), 1.0, inverse).item() == pytest.approx(0.25 / 1024, rel=1e-5)
    assert clip_scale(torch.tensor(4.0), 0.0, inverse).item() == 1 / 1024  # 0 = no clipping


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize("norm", [BAD, NAN])
def test_bad_norm_means_skip(norm, max_norm):
    assert clip_scale(norm, max_norm).isnan()


def test_one_bad_gradient_is_enough():
    for bad in (float("nan"), float("inf"), float("-inf")):
        params = params_with_grads()
        params[0].grad[3, 4] = bad
        assert not grad_norm(params).isfinite()


def test_scale_halves_on_overflow_and_doubles_after_good_steps():
    scaler = LossScaler(True, growth_interval_steps=3)
    assert scaler.scale.item() == INITIAL_SCALE
    for norm, factor in [(GOOD, 1), (GOOD, 1), (BAD, 0.5), (GOOD, 0.5), (GOOD, 0.5), (GOOD, 1), (NAN, 0.5)]:
        scaler.update(norm)
        assert scaler.scale.item() == INITIAL_SCALE * factor
    assert scaler.skipped_steps.item() == 2


def test_scale_stays_in_its_bounds():
    scaler = LossScaler(True, growth_interval_steps=1)
    for _ in range(20):
        scaler.update(GOOD)
    assert scaler.scale.item() == MAX_SCALE
    for _ in range(30):
        scaler.update(BAD)
    assert scaler.scale.item() == 1.0


def test_default_interval_is_2000_steps():
    scaler = LossScaler(True)
    scaler.good_steps.fill_(1998)
    scaler.update(GOOD)
    assert scaler.scale.item() == INITIAL_SCALE
    scaler.update(GOOD)
    assert scaler.scale.item() == 2 * INITIAL_SCALE
    assert scaler.good_steps.item() == 0


def test_scaled_loss_and_its_inverse():
    scaler = LossScaler(True)
    loss = torch.tensor(2.5)
    assert (scaler.scale_loss(loss) * scaler.inv_scale).item() == 2.5
    assert scaler.scale_loss(loss).item() == 2.5 * INITIAL_SCALE


def test_disabled_scaler_only_counts():
    scaler = LossScaler(False, growth_interval_steps=1)
    loss = torch.tensor(2.5)
    assert scaler.scale_loss(loss) is loss
    for norm in (GOOD, BAD, GOOD, NAN):
        scaler.update(norm)
    assert scaler.scale.item() == 1.0
    assert scaler.inv_scale.item() == 1.0
    assert scaler.skipped_steps.item() == 2


def test_state_goes_on_where_it_stopped():
    norms = [GOOD, GOOD, BAD, GOOD, GOOD, GOOD, GOOD, BAD, GOOD]
    whole, first, second = (LossScaler(True, growth_interval_steps=3) for _ in range(3))
    for norm in norms:
        whole.update(norm)
    for norm in norms[:5]:
        first.update(norm)
    saved = first.state_dict()
    first.update(BAD)  # a saved state is a copy
    second.load_state_dict(saved)
    for norm in norms[5:]:
        second.update(norm)
    assert second.state_dict() == whole.state_dict()


def test_state_moves_between_gpus_with_and_without_bf16():
    scaling, plain = LossScaler(True), LossScaler(False)
    for norm in (BAD, BAD):
        scaling.update(norm)
    plain.load_state_dict(scaling.state_dict())
    assert (plain.scale.item(), plain.skipped_steps.item()) == (1.0, 2)
    again = LossScaler(True)
    again.load_state_dict(plain.state_dict())
    assert (again.scale.item(), again.skipped_steps.item()) == (INITIAL_SCALE, 2)


def test_users_mistakes_are_explained():
    with pytest.raises(OnebError, match="at least 1 step"):
        LossScaler(True, growth_interval_steps=0)
    with pytest.raises(OnebError, match="resume from an older one"):
        LossScaler(True).load_state_dict({"scale": 1.0})
