"""Decay groups, skipped steps, checkpoints and the mistakes build_optimizer explains."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from oneb.errors import OnebError
from oneb.optim import applies_decay, build_optimizer
from oneb.optim.optimizer import has_8bit_state

KINDS = ("lion", "adamw", "lion8bit", "adamw8bit")
BETAS = (0.9, 0.98)
ONE = torch.tensor(1.0)


class Parts(nn.Module):
    """One parameter of every sort that a model here has."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.project = nn.Linear(8, 8)
        self.wide = nn.Linear(65, 64, bias=False)  # enough for 8-bit state, in 16 blocks and a quarter
        self.norm = nn.LayerNorm(8)
        self.log_temperature = nn.Parameter(torch.zeros(4))
        self.null_key = nn.Parameter(torch.randn(4, 2) * 0.02)
        self.null_key.no_weight_decay = True
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.to(dtype)


def make(dtype: torch.dtype = torch.float32, kind: str = "lion", **changes):
    torch.manual_seed(0)
    model = Parts(dtype)
    settings = {"kind": kind, "betas": BETAS, "weight_decay": 0.1, "seed": 7} | changes
    return model, build_optimizer(model.named_parameters(), **settings)


def set_grads(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def run(model: nn.Module, optimizer, steps: range) -> None:
    for step in steps:
        set_grads(model, step)
        optimizer.step(1e-4, step, ONE)


def snapshot(model: nn.Module, optimizer) -> dict[str, torch.Tensor]:
    tensors = dict(model.state_dict())
    for name, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{name}.{key}": value for key, value in state.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_matrices_decay_and_nothing_else_does():
    model, optimizer = make()
    assert optimizer.decayed_names == ("embedding.weight", "project.weight", "wide.weight")
    assert not applies_decay(model.null_key)
    assert len(optimizer.params) == 8  # the tied head once, the frozen one not at all


@pytest.mark.parametrize("kind", KINDS)
def test_decay_acts_where_it_should(kind):
    """With a zero gradient and no momentum, decay is all there is."""
    model, optimizer = make(kind=kind)
    before = snapshot(model, optimizer)
    for param in optimizer.params:
        param.grad = torch.zeros_like(param)
    optimizer.step(0.1, 0, ONE)
    after = snapshot(model, optimizer)
    for name, param in model.named_parameters():
        factor = 0.99 if name in optimizer.decayed_names else 1.0
        torch.testing.assert_close(after[name], before[name] * factor, rtol=1e-6, atol=0, msg=name)
        assert param.requires_grad or factor == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
def test_bad_scale_changes_no_bit(kind, dtype, scale):
    model, optimizer = make(dtype, kind)
    run(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    set_grads(model, 2)
    model.project.weight.grad[0, 0] = float("nan")
    optimizer.step(1e-4, 2, torch.tensor(scale))
    assert_same(before, snapshot(model, optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_equals_continuing(kind, dtype):
    whole_model, whole = make(dtype, kind)
    run(whole_model, whole, range(8))

    model, optimizer = make(dtype, kind)
    run(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)

    fresh_model, fresh = make(dtype, kind)
    fresh_model.load_state_dict(checkpoint["model"])
    fresh.load_state_dict(checkpoint["optimizer"])
    assert fresh.n_updates == 5
    run(fresh_model, fresh, range(5, 8))
    assert_same(snapshot(fresh_model, fresh), snapshot(whole_model, whole))


def test_seed_and_step_pick_the_rounding():
    def weights(seed: int, first_step: int) -> torch.Tensor:
        model, optimizer = make(torch.bfloat16, seed=seed)
        for step in range(3):
            set_grads(model, step)
            optimizer.step(1e-5, first_step + step, ONE)
        return model.project.weight

    assert torch.equal(weights(1, 0), weights(1, 0))
    assert not torch.equal(weights(1, 0), weights(2, 0))
    assert not torch.equal(weights(1, 0), weights(1, 50))


def test_parameter_without_gradient_is_left_alone():
    model, optimizer = make()
    before = snapshot(model, optimizer)
    set_grads(model, 0)
    model.project.weight.grad = None
    optimizer.step(1e-3, 0, ONE)
    after = snapshot(model, optimizer)
    for name in ("project.weight", "project.weight.exp_avg"):
        assert torch.equal(before[name], after[name])
    assert not torch.equal(before["project.bias"], after["project.bias"])


def test_gradient_with_other_strides():
    model, optimizer = make()
    other_model, other = make()
    set_grads(model, 0)
    set_grads(other_model, 0)
    other_model.project.weight.grad = other_model.project.weight.grad.t().contiguous().t()
    optimizer.step(1e-3, 0, ONE)
    other.step(1e-3, 0, ONE)
    assert_same(snapshot(model, optimizer), snapshot(other_model, other))


def test_zero_grad():
    model, optimizer = make()
    set_grads(model, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(not param.grad.any() for param in optimizer.params)
    optimizer.zero_grad()
    assert all(param.grad is None for param in optimizer.params)


def test_state_is_fp32_whatever_the_weights_are():
    _, optimizer = make(torch.bfloat16, "adamw")
    for state in optimizer.state_dict()["state"].values():
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["lion8bit", "adamw8bit"])
def test_large_matrices_keep_8bit_state_and_the_rest_fp32(kind):
    model, optimizer = make(torch.bfloat16, kind)
    for name, state in optimizer.state_dict()["state"].items():
        if name == "wide.weight":
            assert state["exp_avg"].dtype == torch.int8
            assert all(state[key].shape == (17,) for key in state if key.endswith("_scale"))
        else:
            assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    model.wide.weight.no_weight_decay = True
    assert not has_8bit_state(model.wide.weight)


@pytest.mark.parametrize(("kind", "bytes_a_parameter"), [
    ("lion", 4.0), ("adamw", 8.0), ("lion8bit", 1 + 4 / 256), ("adamw8bit", 2 + 8 / 256),
])
def test_bytes_of_state(kind, bytes_a_parameter):
    weight = nn.Parameter(torch.randn(512, 384))
    state = build_optimizer([("w", weight)], kind=kind, betas=BETAS, weight_decay=0.1, seed=0).state_dict()["state"]
    assert sum(tensor.nbytes for tensor in state["w"].values()) == weight.numel() * bytes_a_parameter


def test_off_cuda_the_twin_is_used():
    _, optimizer = make(fused=True)
    assert not optimizer.fused


def drop_parameter(state):
    del state["state"]["norm.bias"]


def add_parameter(state):
    state["state"]["extra"] = {}


def change_shape(state):
    state["state"]["norm.bias"]["exp_avg"] = torch.zeros(3)


def change_dtype(state):
    state["state"]["norm.bias"]["exp_avg"] = torch.zeros(8, dtype=torch.bfloat16)


def change_kind(state):
    state["kind"] = "adamw"


def drop_count(state):
    del state["n_updates"]


def rename_state(state):
    state["state"]["norm.bias"] = {"momentum": torch.zeros(8)}


@pytest.mark.parametrize(("damage", "message"), [
    (drop_parameter, "missing parameter norm.bias"),
    (add_parameter, "unexpected parameter extra"),
    (change_shape, r"norm.bias.exp_avg is \(3,\) float32, wanted \(8,\) float32"),
    (change_dtype, r"norm.bias.exp_avg is \(8,\) bfloat16, wanted \(8,\) float32"),
    (change_kind, "it is adamw's, wanted lion's"),
    (drop_count, "it lacks n_updates"),
    (rename_state, r"norm.bias has \['momentum'\], wanted \['exp_avg'\]"),
])
def test_state_that_does_not_fit_is_refused_untouched(damage, message):
    model, optimizer = make()
    run(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    damage(state)
    _, fresh = make()
    with pytest.raises(OnebError, match=message):
        fresh.load_state_dict(state)
    assert fresh.n_updates == 0
    assert all(not t.any() for tensors in fresh.state_dict()["state"].values() for t in tensors.values())


def test_fp32_state_is_no_8bit_state():
    _, optimizer = make(kind="lion8bit")
    state = copy.deepcopy(optimizer.state_dict())
    state["state"]["wide.weight"] = {"exp_avg": torch.ones(64, 65)}
    with pytest.raises(OnebError, match=r"wide.weight has \['exp_avg'\], wanted \['exp_avg', 'exp_avg_scale'\]"):
        optimizer.load_state_dict(state)
    assert not optimizer.state_dict()["state"]["wide.weight"]["exp_avg"].any()


@pytest.mark.parametrize(("changes", "message"), [
    ({"kind": "sgd"}, "wanted lion, adamw, lion8bit, adamw8bit"),
    ({"betas": (0.9, 1.0)}, "from 0 to below 1"),
    ({"betas": (0.9,)}, "two numbers"),
    ({"weight_decay": -0.1}, "0 or more"),
    ({"weight_decay": float("nan")}, "0 or more"),
    ({"kind": "adamw", "eps": 0.0}, "positive"),
])
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(OnebError, match=message):
        make(**changes)


def test_parameters_that_cannot_work():
    settings = {"kind": "lion", "betas": BETAS, "weight_decay": 0.0, "seed": 0}
    with pytest.raises(OnebError, match="at least one"):
        build_optimizer([], **settings)
    with pytest.raises(OnebError, match="float64"):
        build_optimizer([("w", nn.Parameter(torch.zeros(2, dtype=torch.float64)))], **settings)
