"""The fp8 side of a model's blocks: scales that follow the run, and 8-bit copies of the weights.

**Activations and gradients: delayed scaling.** Measuring a tensor before casting it would be a second pass over memory.
So a cast uses the scale that earlier steps decided on, clamps what lies beyond, and records the largest magnitude it
met; :meth:`Float8State.update` turns the records into the next step's scales. The idea is that of Transformer Engine's
``DelayedScaling`` recipe, which keeps a window of amaxes; here one decaying maximum a tensor does, in one number.

**Weights: current scaling.** They change once a step and are read many times, so they are measured then:
:meth:`Float8State.refresh_weights`.

Nothing here waits for the device. The output head is not part of it and stays in 16 bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from oneb.kernels.float8 import Float8Cast, cast8_transposed, power_of_two_scale
from oneb.kernels.products import Product, Product8, RecordingProduct16

# The linear maps of a block, in the order of their columns; their output gradients follow in the same order.
MAPS = ("qkv", "out", "gate_up", "down")
_TENSORS = 2 * len(MAPS)
# e4m3 for gradients too, as DeepSeek-V3 (arXiv 2412.19437) has it: e5m2's larger range is not needed where every tensor
# is scaled, and its coarser grid doubles the noise.
FORMAT = torch.float8_e4m3fn

# cuBLASLt reads a product's scales at addresses in multiples of 16 bytes only: as many fp32 from one to the next.
_SCALE_STRIDE = 4

# A spike's memory halves in 7 steps. Forgetting too soon clips the rare large batch, by a factor or two; remembering
# too long is worse: a spike of the first steps, a hundredfold, takes the smallest magnitudes from hundreds of them.
HISTORY_DECAY = 0.9
# A tensor may double within a step before it is clipped.
MARGIN_BITS = 1


class Float8State(nn.Module):
    """Scales and fp8 weights of all blocks; builds the products that use them.

    Buffers, each (n_layers, 8) fp32: columns 0-3 are the inputs of qkv, out, gate_up and down, 4-7 the gradients of
    their outputs.

    * ``scale``: what casts multiply by, powers of two; 1 until calibrated.
    * ``amax``: the largest magnitude since the last :meth:`update`; NaN or inf once one was met.
    * ``history``: the decaying maximum of the amaxes; 0 before the first update.

    ``calibrated`` says whether the scales have been found, by :meth:`calibrating` or from a checkpoint.

    They are all of its state: a checkpoint with them continues bit for bit. After loading one, call
    :meth:`refresh_weights`, as after every change of the weights.

    Products hold views of the buffers, so moving the module to another device or dtype would cut them off: build it
    where the weights are.
    """

    def __init__(self, weights: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> None:
        """Scales of 1, and the weights' fp8 copies.

        Args:
            weights: for each layer the stored matrices of qkv, out, gate_up and down, (O, I) each in a multiple of
                16; bf16, fp16 or fp32, on one device. They are referred to, not copied.
            dtype: torch.bfloat16 or torch.float16, of the products' results.
        """
        super().__init__()
        self._weights = [weight.detach() for layer in weights for weight in layer]
        self._dtype = dtype
        n_layers, device = len(weights), self._weights[0].device
        assert all(len(layer) == len(MAPS) for layer in weights)
        shape = (n_layers, _TENSORS)
        self.register_buffer("scale", torch.ones(shape, device=device))
        self.register_buffer("amax", torch.zeros(shape, device=device))
        self.register_buffer("history", torch.zeros(shape, device=device))
        self._inverse_scale = torch.ones((*shape, _SCALE_STRIDE), device=device)[..., 0]
        self._scratch_amax = torch.zeros(shape, device=device)
        self._largest = torch.tensor(torch.finfo(FORMAT).max, device=device)
        self._weight_scale = torch.ones(len(self._weights), device=device)
        self._weight_inverse = torch.ones((len(self._weights), _SCALE_STRIDE), device=device)[:, 0]
        self._weights8 = [
            tuple(torch.empty(shape, dtype=FORMAT, device=device) for shape in (w.shape, w.shape[::-1]))
            for w in self._weights
        ]
        self._training_products = [self._products8(layer, self.amax) for layer in range(n_layers)]
        self._frozen_products = [self._products8(layer, self._scratch_amax) for layer in range(n_layers)]
        self._calibrating = False
        self.calibrated = False
        self.refresh_weights()

    def products(self, layer: int) -> tuple[Product, ...]:
        """The layer's products in the order of ``MAPS``.

        Where gradients are off (evaluation), what the casts meet leaves no trace in the scales.
        """
        if self._calibrating:
            weights = self._weights[layer * len(MAPS):(layer + 1) * len(MAPS)]
            return tuple(
                RecordingProduct16(w, self._dtype, self.amax[layer, i], self.amax[layer, len(MAPS) + i])
                for i, w in enumerate(weights)
            )
        return (self._training_products if torch.is_grad_enabled() else self._frozen_products)[layer]

    @contextlib.contextmanager
    def calibrating(self) -> Iterator[None]:
        """Products in 16 bit that record; on leaving, the scales are set from what they met.

        For one forward and backward of a few sequences before the first step, with the loss scaled as in training;
        throw its gradients away. It leaves no history: the first step's own amaxes replace it.
        """
        self._calibrating = True
        try:
            yield
        finally:
            self._calibrating = False
        self._rescale(self._seen(), self.amax)
        self.amax.zero_()
        self.calibrated = True

    def step(self) -> None:
        """Once an optimizer step, after the weights have changed: new scales, and the weights' fp8 copies."""
        self.update()
        self.refresh_weights()

    def fault(self) -> Tensor:
        """0-dim fp32: 0, or NaN once a cast of this step met an infinity or a NaN, which clamping may have hidden."""
        return (0 * self.amax).sum()  # not 0 times the sum, which large finite ones might overflow

    @torch.no_grad()
    def update(self) -> None:
        """Once an optimizer step: the scales of the next one, from the amaxes of all its micro-batches.

        A tensor whose amax is 0 (it was not met) or not finite keeps its history and its scale.
        """
        seen = self._seen()
        raised = torch.maximum(self.amax, self.history * HISTORY_DECAY)
        self.history.copy_(torch.where(seen, raised, self.history))
        self._rescale(seen, self.history)
        self.amax.zero_()

    def forget_step(self) -> None:
        """Drop what the casts have met since the last :meth:`update`: the step under way begins anew."""
        self.amax.zero_()

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """The fp8 copies of the weights as they are now, each with the scale of its own largest magnitude."""
        amax = torch.stack(torch._foreach_norm(self._weights, torch.inf, dtype=torch.float32))
        usable = torch.isfinite(amax) & (amax > 0)
        scale = torch.where(usable, power_of_two_scale(amax, self._largest), 1.0)
        self._weight_scale.copy_(scale)
        torch.reciprocal(scale, out=self._weight_inverse)
        scratch = self._scratch_amax[0, 0]
        for weight, scale, out in zip(self._weights, self._weight_scale.unbind(), self._weights8, strict=True):
            cast8_transposed(weight, Float8Cast(FORMAT, scale, scratch), out=out)

    def _products8(self, layer: int, amax: Tensor) -> tuple[Product8, ...]:
        def cast(column: int) -> Float8Cast:
            return Float8Cast(FORMAT, self.scale[layer, column], amax[layer, column])

        products = []
        for x_column in range(len(MAPS)):
            dy_column, index = len(MAPS) + x_column, layer * len(MAPS) + x_column
            products.append(Product8(
                *self._weights8[index], self._weight_inverse[index],
                x_cast=cast(x_column), x_inverse_scale=self._inverse_scale[layer, x_column],
                dy_cast=cast(dy_column), dy_inverse_scale=self._inverse_scale[layer, dy_column],
                dtype=self._dtype, weight_dtype=self._weights[index].dtype,
            ))
        return tuple(products)

    def _seen(self) -> Tensor:
        return torch.isfinite(self.amax) & (self.amax > 0)

    @torch.no_grad()
    def _rescale(self, where: Tensor, amax: Tensor) -> None:
        scale = power_of_two_scale(amax, self._largest, MARGIN_BITS)
        self.scale.copy_(torch.where(where, scale, self.scale))
        torch.reciprocal(self.scale, out=self._inverse_scale)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.calibrated = True
        torch.reciprocal(self.scale, out=self._inverse_scale)
