"""A linear map's three products in both precisions, and the scales that fp8 ones live by."""

import functools

import pytest
import torch

from oneb.errors import OnebError
from oneb.kernels.products import Product8, Product16
from oneb.model.float8_state import FORMAT, HISTORY_DECAY, MAPS, MARGIN_BITS, Float8State
from oneb.train.device import Device, check_precision, open_device

WIDTHS = {"qkv": (96, 64), "out": (64, 32), "gate_up": (160, 64), "down": (64, 80)}  # (O, I)
N_LAYERS = 2
LARGEST = torch.tensor([448.0] * 8, dtype=torch.float64)


def weights(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[(torch.randn(WIDTHS[name], generator=generator) * 0.02).to(dtype) for name in MAPS]
            for _ in range(N_LAYERS)]


def batch(name: str, n: int = 48, seed: int = 0, dy_std: float = 1e-5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = WIDTHS[name]
    x = torch.randn(n, in_features, generator=generator).bfloat16()
    return x, (torch.randn(n, out_features, generator=generator) * dy_std).bfloat16()


def run(state: Float8State, seed: int = 0, dy_std: float = 1e-5) -> list[torch.Tensor]:
    """One forward and backward through every product of the state."""
    results = []
    for layer in range(N_LAYERS):
        for name, product in zip(MAPS, state.products(layer), strict=True):
            x, dy = batch(name, seed=100 * seed + layer, dy_std=dy_std)
            x = product.prepare_x(x)
            results += [product.forward(x), *product.backward(product.prepare_dy(dy), x)]
    return results


def calibrated(dtype: torch.dtype = torch.bfloat16) -> Float8State:
    state = Float8State(weights(dtype), torch.bfloat16)
    with state.calibrating():
        run(state)
    return state


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def exact_products(x, dy, weight) -> tuple[torch.Tensor, ...]:
    x, dy, weight = x.double(), dy.double(), weight.double()
    return x @ weight.T, dy @ weight, dy.T @ x


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_products_in_16_bit(stored):
    weight = weights(stored)[0][0]
    x, dy = batch("qkv")
    product = Product16(weight, torch.bfloat16)
    assert product.x_cast is product.dy_cast is None
    assert product.prepare_x(x) is x
    assert product.prepare_dy(dy) is dy
    results = product.forward(x), *product.backward(dy, x)
    assert [r.dtype for r in results] == [torch.bfloat16, torch.bfloat16, stored]
    for value, exact in zip(results, exact_products(x, dy, weight), strict=True):
        assert relative_error(value, exact) < 2.0**-7  # the weight's rounding and the result's


@pytest.mark.parametrize("n", [16, 48, 272])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MAPS)
def test_products_in_8_bit_are_as_close_as_their_formats_allow(name, stored, n):
    state = calibrated(stored)
    index = MAPS.index(name)
    x, dy = batch(name, n, seed=n)
    product = state.products(1)[index]
    assert product.x_cast.dtype == FORMAT
    assert product.dy_cast.dtype == FORMAT
    x8 = product.prepare_x(x)
    dy8, dy8_t = product.prepare_dy(dy)
    results = product.forward(x8), *product.backward((dy8, dy8_t), x8)
    assert [r.dtype for r in results] == [torch.bfloat16, torch.bfloat16, stored]
    for value, again in zip(results[1:], product.backward(dy8, x8), strict=True):
        assert torch.equal(value, again), "the transpose that is given and the one that is made differ"
    # Rounding to 3 (2) mantissa bits moves a value by 2.6% (5.1%) in the mean square; two operands add up.
    for value, exact, bound in zip(results, exact_products(x, dy, weights(stored)[1][index]), (0.045, 0.07, 0.07),
                                   strict=True):
        error = relative_error(value, exact)
        assert 0.01 < error < bound


def test_tokens_that_do_not_fit_are_refused_with_the_fix():
    product = calibrated().products(0)[0]
    x, dy = batch("qkv", 24)
    x8 = product.prepare_x(x)
    assert product.forward(x8).shape == (24, WIDTHS["qkv"][0])  # evaluation may have any number
    with pytest.raises(OnebError, match="24; choose --batch-size and --train-seq-len"):
        product.backward(product.prepare_dy(dy), x8)
    with pytest.raises(OnebError, match="24"):
        product.backward(torch.zeros(dy.shape, dtype=FORMAT), x8)


def test_calibration_sets_the_scales_and_computes_in_16_bit():
    state = Float8State(weights(), torch.bfloat16)
    assert (state.scale == 1).all()
    with state.calibrating():
        products = state.products(0)
        assert not any(product.x_cast or product.dy_cast for product in products)
        results = run(state)
    reference = [
        result for layer, matrices in enumerate(weights()) for name, matrix in zip(MAPS, matrices, strict=True)
        for x, dy in [batch(name, seed=layer)]
        for product in [Product16(matrix, torch.bfloat16)]
        for result in (product.forward(x), *product.backward(dy, x))
    ]
    assert all(map(torch.equal, results, reference))
    for layer in range(N_LAYERS):
        for index, name in enumerate(MAPS):
            x, dy = batch(name, seed=layer)
            for column, tensor in ((index, x), (index + 4, dy)):
                used = float(tensor.abs().max()) * float(state.scale[layer, column]) * 2**MARGIN_BITS / LARGEST[column]
                assert 0.5 < used <= 1
    assert (state.history == 0).all()
    assert (state.amax == 0).all()
    assert isinstance(state.products(0)[0], Product8)


def amaxes(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    binades = torch.randint(-30, 12, (N_LAYERS, 8), generator=generator)
    return torch.rand((N_LAYERS, 8), generator=generator) * 2.0**binades + 1e-20


def test_scales_follow_the_largest_magnitudes():
    state = Float8State(weights(), torch.bfloat16)
    highest = torch.zeros(N_LAYERS, 8, dtype=torch.float64)
    for step in range(60):
        amax = amaxes(step)
        state.amax.copy_(amax)
        state.update()
        assert (state.amax == 0).all()
        highest = torch.maximum(amax.double(), highest * HISTORY_DECAY)
        assert torch.allclose(state.history.double(), highest, rtol=1e-5, atol=0)
        scale = state.scale.double()
        assert (torch.frexp(state.scale).mantissa == 0.5).all()
        assert (state.history.double() * scale <= LARGEST / 2**MARGIN_BITS).all()
        assert (amax.double() * scale <= LARGEST).all()
        assert (state.history.double() * scale * 2 > LARGEST / 2**MARGIN_BITS).all()
        assert torch.equal(state._inverse_scale * state.scale, torch.ones(N_LAYERS, 8))


def test_history_forgets():
    state = Float8State(weights(), torch.bfloat16)
    state.amax.fill_(1000.0)
    state.update()
    before = state.scale.clone()
    for _ in range(7):  # 0.9 ** 7 = 0.48
        state.amax.fill_(1.0)
        state.update()
    assert torch.equal(state.scale, 2 * before)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_an_amax_that_says_nothing_keeps_the_scale(bad):
    state = Float8State(weights(), torch.bfloat16)
    state.amax.copy_(amaxes(0))
    state.update()
    scale, history = state.scale.clone(), state.history.clone()
    state.amax.copy_(amaxes(0) * 1e3)
    state.amax[1, 3] = bad
    state.update()
    kept = torch.zeros(N_LAYERS, 8, dtype=torch.bool)
    kept[1, 3] = True
    assert torch.equal(state.scale == scale, kept)
    assert torch.equal(state.history == history, kept)
    assert (state.amax == 0).all()


def test_all_micro_batches_of_a_step_count():
    state, micro_batches = calibrated(), ((1, 1e-5), (2, 3e-3), (3, 1e-6))
    for seed, std in micro_batches:
        run(state, seed, std)
    for layer in range(N_LAYERS):
        for index, name in enumerate(MAPS):
            pairs = [batch(name, seed=100 * seed + layer, dy_std=std) for seed, std in micro_batches]
            assert state.amax[layer, index] == max(x.abs().max() for x, _ in pairs)
            assert state.amax[layer, index + 4] == max(dy.abs().max() for _, dy in pairs)


def test_evaluation_uses_the_scales_and_leaves_no_trace():
    state, undisturbed = calibrated(), calibrated()
    run(state, 1)
    run(undisturbed, 1)
    amax = state.amax.clone()
    with torch.no_grad():
        evaluated = run(state, seed=2, dy_std=1.0)
    assert torch.equal(state.amax, amax)
    assert all(map(torch.equal, evaluated, run(undisturbed, seed=2, dy_std=1.0)))
    assert not torch.equal(undisturbed.amax, amax)


def test_a_wrong_scale_is_noticed():
    """The error bounds above would not hold without the scales: gradients of 1e-9 vanish in e5m2 as they are."""
    state = Float8State(weights(), torch.bfloat16)
    errors = []
    for _ in range(2):
        product = state.products(0)[0]
        x, dy = batch("qkv", dy_std=1e-9)
        x8 = product.prepare_x(x)
        dx, _ = product.backward(product.prepare_dy(dy), x8)
        errors.append(relative_error(dx, exact_products(x, dy, weights()[0][0])[1]))
        state.update()
    assert errors[0] == 1
    assert errors[1] < 0.07


@pytest.mark.parametrize("seed", [1, 2])
def test_a_resumed_state_goes_on_as_the_undisturbed_one(seed, tmp_path):
    def steps(state: Float8State, first: int, count: int) -> list[torch.Tensor]:
        results = []
        for step in range(first, first + count):
            results += run(state, seed + step, dy_std=10.0 ** -step)
            state.update()
            # The optimizer changes the weights.
            for weight in state._weights:
                weight.mul_(1 + 0.3 * step)
            state.refresh_weights()
        return results

    undisturbed = calibrated()
    steps(undisturbed, 0, 3)
    torch.save(undisturbed.state_dict(), tmp_path / "state.pt")
    stored = [weight.clone() for weight in undisturbed._weights]
    assert set(undisturbed.state_dict()) == {"scale", "amax", "history"}

    layers = [stored[:len(MAPS)], stored[len(MAPS):]]
    resumed = Float8State(layers, torch.bfloat16)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.refresh_weights()
    assert all(map(torch.equal, steps(resumed, 3, 3), steps(undisturbed, 3, 3)))
    assert all(map(torch.equal, resumed.state_dict().values(), undisturbed.state_dict().values()))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_weights_are_recast_from_what_they_are_now(stored):
    state = calibrated(stored)
    for index, weight in enumerate(state._weights):
        weight.mul_(10.0 ** (index - 4))
    state.refresh_weights()
    for weight, (w8, w8_t), scale in zip(state._weights, state._weights8, state._weight_scale, strict=True):
        assert torch.frexp(scale).mantissa == 0.5
        assert 224 < weight.abs().max().double() * scale <= 448
        assert relative_error(w8.double() / scale, weight.double()) < 0.035
        assert torch.equal(w8_t.view(torch.uint8), w8.view(torch.uint8).t())


def test_a_weight_without_a_usable_magnitude_is_cast_as_it_is():
    matrices = weights()
    matrices[0][0].zero_()
    matrices[1][2][3, 4] = float("nan")
    state = Float8State(matrices, torch.bfloat16)
    assert (state._weights8[0][0].float() == 0).all()
    assert state._weights8[6][0].float().isnan().sum() == 1


def test_fp8_needs_a_gpu_that_has_it_or_the_cpu_by_name():
    def device(kind, has_fp8):
        return Device(torch.device(kind), "a device", None, True, has_fp8)

    assert open_device("cpu").has_fp8
    check_precision(open_device("cpu"), "fp8")
    check_precision(device("cuda", True), "fp8")
    check_precision(device("cuda", False), "bf16")
    with pytest.raises(OnebError, match=r"8\.9 or later.*use --precision bf16"):
        check_precision(device("cuda", False), "fp8")
    if open_device("auto").torch.type == "cpu":
        with pytest.raises(OnebError, match="--device cpu imitates"):
            check_precision(open_device("auto"), "fp8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnGpu:
    def test_a_step_equals_the_twins_and_never_waits(self):
        results = {}
        for device in ("cpu", "cuda"):
            matrices = [[w.to(device) for w in layer] for layer in weights()]
            state = Float8State(matrices, torch.bfloat16)
            on = functools.partial(self._step, state, device)
            with state.calibrating():
                on(0)
            state.update()
            on(1)  # compiles
            mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.synchronize()
            data = self._data(device, 2)
            torch.cuda.set_sync_debug_mode("error")
            try:
                state.update()
                state.refresh_weights()
                outcome = self._step(state, device, 2, data)
                with torch.no_grad():
                    self._step(state, device, 2, data)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
            results[device] = [tensor.cpu() for tensor in (state.scale, state.amax, state.history)], outcome
        for one, other in zip(*(results[device][0] for device in results), strict=True):
            assert torch.equal(one, other)
        for one, other in zip(*(results[device][1] for device in results), strict=True):
            assert relative_error(other.cpu(), one.double()) < 0.01

    @staticmethod
    def _data(device, seed):
        return [[tuple(t.to(device) for t in batch(name, seed=100 * seed + layer)) for name in MAPS]
                for layer in range(N_LAYERS)]

    def _step(self, state, device, seed, data=None):
        data, results = data or self._data(device, seed), []
        for layer in range(N_LAYERS):
            for product, (x, dy) in zip(state.products(layer), data[layer], strict=True):
                x8 = product.prepare_x(x)
                results += [product.forward(x8), *product.backward(product.prepare_dy(dy), x8)]
        return results
