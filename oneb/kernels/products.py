"""The three matrix products of a linear map y = x W^T: y, and backward dx = dy W and dW = dy^T x.

One interface, :class:`Product`, over 16-bit and fp8 arithmetic. It says in which form it wants x and dy (``x_cast``
and ``dy_cast``, for the kernel that makes them; ``prepare_x`` and ``prepare_dy`` where they exist in 16 bit already),
so that a block's forward and backward read the same for both.

Legend: N tokens, I and O input and output features; x (N, I), dy and y (N, O), weight (O, I).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from oneb.config import FP8_MULTIPLE
from oneb.errors import OnebError
from oneb.kernels.float8 import (
    Float8Cast,
    cast8,
    cast8_transposed,
    raise_amax,
    scaled_product,
    transpose8,
)

Prepared = Tensor | tuple[Tensor, Tensor]


class Product(Protocol):
    """What a block's forward and backward need of a linear map.

    Attributes:
        x_cast: how the kernel that produces x should store it; None = as it is, in 16 bit.
        dy_cast: the same of dy.
    """

    x_cast: Float8Cast | None
    dy_cast: Float8Cast | None

    def prepare_x(self, x: Tensor) -> Tensor:
        """x (N, I) that was produced without ``x_cast``, made what :meth:`forward` and :meth:`backward` take."""
        ...

    def prepare_dy(self, dy: Tensor) -> Prepared:
        """dy (N, O) that was produced without ``dy_cast``, made what :meth:`backward` takes."""
        ...

    def forward(self, x: Tensor) -> Tensor:
        """y (N, O) in 16 bit (fp32 for a :class:`Product16` of fp32)."""
        ...

    def backward(self, dy: Prepared, x: Tensor) -> tuple[Tensor, Tensor]:
        """dx (N, I) in y's dtype, and dweight (O, I) in the stored weight's dtype."""
        ...


class Product16:
    """Products in ``dtype``: bf16, fp16, or fp32.

    A weight stored in another dtype is cast when this is made, so make it anew after each update of the weight.
    """

    x_cast: Float8Cast | None = None
    dy_cast: Float8Cast | None = None

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self._stored_dtype = weight.dtype
        self._weight = weight.detach().to(dtype)

    def prepare_x(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def prepare_dy(self, dy: Tensor) -> Tensor:
        """dy itself."""
        return dy

    def forward(self, x: Tensor) -> Tensor:
        """See :class:`Product`."""
        return x @ self._weight.T

    def backward(self, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Product`."""
        return dy @ self._weight, (dy.T @ x).to(self._stored_dtype)


class RecordingProduct16(Product16):
    """A :class:`Product16` that raises the amax of each x and dy: calibration, before fp8 scales are known.

    Args:
        weight, dtype: as in :class:`Product16`.
        x_amax: 0-dim fp32, raised to max(x_amax, max |x|) by every forward.
        dy_amax: the same of dy, by every backward.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, x_amax: Tensor, dy_amax: Tensor) -> None:
        super().__init__(weight, dtype)
        self._x_amax, self._dy_amax = x_amax, dy_amax

    def forward(self, x: Tensor) -> Tensor:
        """See :class:`Product`."""
        raise_amax(self._x_amax, x)
        return super().forward(x)

    def backward(self, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Product`."""
        raise_amax(self._dy_amax, dy)
        return super().backward(dy, x)


class Product8:
    """fp8 operands, fp32 sums, 16-bit results (dweight in the stored weight's dtype).

    Holds no copy of the weight or the scales: overwriting the tensors given changes what it computes.

    Args:
        weight8: (O, I) e4m3, contiguous.
        weight8_t: its transpose (I, O), contiguous.
        weight_inverse_scale: 0-dim fp32; weight8 times this is the weight.
        x_cast: e4m3.
        x_inverse_scale: 0-dim fp32, 1 / x_cast.scale.
        dy_cast: e4m3.
        dy_inverse_scale: 0-dim fp32, 1 / dy_cast.scale.
        dtype: of y and dx.
        weight_dtype: of dweight.
    """

    def __init__(
        self, weight8: Tensor, weight8_t: Tensor, weight_inverse_scale: Tensor, *, x_cast: Float8Cast,
        x_inverse_scale: Tensor, dy_cast: Float8Cast, dy_inverse_scale: Tensor, dtype: torch.dtype,
        weight_dtype: torch.dtype,
    ) -> None:
        self.x_cast, self.dy_cast = x_cast, dy_cast
        self._weight8, self._weight8_t = weight8, weight8_t
        self._weight_inverse = weight_inverse_scale
        self._x_inverse, self._dy_inverse = x_inverse_scale, dy_inverse_scale
        self._dtype, self._weight_dtype = dtype, weight_dtype

    def prepare_x(self, x: Tensor) -> Tensor:
        """x in fp8."""
        return cast8(x, self.x_cast)

    def prepare_dy(self, dy: Tensor) -> tuple[Tensor, Tensor]:
        """dy in fp8, and its transpose: one pass makes both."""
        check_tokens(dy.shape[0])
        return cast8_transposed(dy, self.dy_cast)

    def forward(self, x: Tensor) -> Tensor:
        """See :class:`Product`."""
        return scaled_product(x, self._weight8, self._x_inverse, self._weight_inverse, self._dtype)

    def backward(self, dy: Prepared, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Product`; dy as fp8, alone or with its transpose.

        Raises:
            OnebError: N is no multiple of 16.
        """
        check_tokens(x.shape[0])
        dy8, dy8_t = dy if isinstance(dy, tuple) else (dy, transpose8(dy))
        dx = scaled_product(dy8, self._weight8_t, self._dy_inverse, self._weight_inverse, self._dtype)
        dweight = scaled_product(dy8_t, transpose8(x), self._dy_inverse, self._x_inverse, self._weight_dtype)
        return dx, dweight


def check_tokens(n: int) -> None:
    """Refuse a number of tokens that fp8 weight gradients cannot sum over.

    Raises:
        OnebError: it is no multiple of 16.
    """
    if n % FP8_MULTIPLE:
        raise OnebError(f"--precision fp8 needs the tokens of a micro-batch in a multiple of {FP8_MULTIPLE}, and this "
                        f"one has {n}; choose --batch-size and --train-seq-len (or --seq-schedule) whose product is "
                        "such a multiple")
