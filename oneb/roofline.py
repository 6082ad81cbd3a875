"""Seconds and tokens a second of the training step, from what the hardware does at best. No torch.

Kernels follow each other, so their times add up:

    seconds a token = products / GEMM rate + attention
                      + bytes of (elementwise + loss + optimizer + gradient sums) / bandwidth
                      + kernels x time to start one / tokens a micro-batch

and a host that takes longer to launch the kernels than the device to run them sets the pace instead. Within attention,
products and exponentials can overlap: the slower of them counts. Two uses of it are kept apart:

* the **roofline** (:func:`predict`): every part at its ceiling, which the same process measured, or else the peaks of
  the GPU table. Physics would allow it, and no kernel reaches it;
* the **expected** speed (:func:`table_speed`): the table's peaks times the share of them that our kernels reached on
  an H200 (:class:`Efficiency`). It is what a plan shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from oneb.accounting import BYTES, HEAD_CHUNK_TOKENS, matmul_parameters, parameter_counts, qkv_widths
from oneb.config import NARROW_HEAD_DIM, Config, ModelConfig, compute_dtype
from oneb.gpus import Gpu
from oneb.memory import state_bytes

PHASES = ("forward", "dgrad", "wgrad")
# Special-function units: 16 results a clock and SM on compute capability 7.0 to 9.0 (CUDA C++ Programming Guide,
# table of arithmetic throughput).
EXPONENTIALS_PER_CLOCK = 16
# Tensor cores multiply heads in steps of 16.
_HEAD_MULTIPLE = 16
# Kernels a block for a micro-batch, forward and backward: 11 + 20 of the fused block, six small ones that make the
# query's scale, seven gradient sums; in fp8 two casts and eight transposes more, and half a dozen around the scales.
_KERNELS_PER_LAYER = {False: 44, True: 60}
# Of those, the ones that recomputation runs again: the forward pass, attention, the query's scale; in fp8 its casts.
_FORWARD_KERNELS_PER_LAYER = {False: 15, True: 18}
_KERNELS_PER_HEAD_CHUNK = 7
_OPTIMIZER_KERNELS_PER_LAYER = 7


@dataclass(frozen=True)
class Gemm:
    """One matrix product (m, k) x (k, n) of a micro-batch, of which there are ``count``.

    ``phase`` is forward, dgrad (the input's gradient) or wgrad (the weight's).
    """

    name: str
    phase: str
    m: int
    n: int
    k: int
    count: int
    eight_bit: bool

    @property
    def flops(self) -> int:
        """Multiplications and additions of all ``count``."""
        return 2 * self.m * self.n * self.k * self.count


@dataclass(frozen=True)
class Ceilings:
    """What the hardware reaches.

    Attributes:
        flops_per_s: by (name, phase) of a :class:`Gemm`.
        bytes_per_s: of a copy, read and written bytes together.
        kernel_s: seconds that a kernel takes with nothing to do, in a full queue.
        launch_s: seconds that the host takes to put a kernel into the queue.
        exponentials_per_s: None where it is not known; then only products bound attention.
        attention_flops_per_s: of attention's products; None = as the other 16-bit products.
        extra_keys: keys' worth of attention's time that a query costs beside its own keys.
        source: "measured", "GPU table" or "expected".
    """

    flops_per_s: dict[tuple[str, str], float]
    bytes_per_s: float
    kernel_s: float = 0.0
    launch_s: float = 0.0
    exponentials_per_s: float | None = None
    attention_flops_per_s: float | None = None
    extra_keys: float = 0.0
    source: str = "measured"

    def to_dict(self, found: list[Gemm]) -> dict[str, Any]:
        """Plain containers, with each product's shape beside its rate."""
        return {
            "source": self.source, "copy_tb_s": self.bytes_per_s / 1e12, "kernel_us": self.kernel_s * 1e6,
            "launch_us": self.launch_s * 1e6, "exponentials_per_s": self.exponentials_per_s,
            "gemm": [{"name": p.name, "phase": p.phase, "m": p.m, "n": p.n, "k": p.k, "count": p.count,
                      "fp8": p.eight_bit, "tflops": self.flops_per_s[p.name, p.phase] / 1e12} for p in found],
        }


@dataclass(frozen=True)
class Efficiency:
    """What our step reaches of a card's peaks, and what its host adds.

    The defaults are fitted to the fused blocks' rows of an H200 in bench/results (step_*.json, growth_*.json), each to
    the time of its own kernels first and then all to whole steps, of which they leave none more than 5% off. The card
    runs there at its 700 W, so that they hold its falling clock, too. On other cards the same shares are a guess: see
    :class:`oneb.gpus.Gpu`.

    Attributes:
        gemm: of the tensor cores' peak, by products in 16 bit and in fp8 alike. Measured: 690 to 765 TFLOP/s of 989;
            1390 to 1520 of 1979 without the output head, which stays in 16 bit.
        attention: of the 16-bit peak, by attention's products with wide heads, as the sequence grows. Measured: 407 to
            425 TFLOP/s (slopes from 2048 to 8192 tokens, bf16 and fp8 rows; cuDNN).
        exponentials: of the special-function units' peak, by our kernel for narrow heads, as the sequence grows.
        extra_keys: keys' worth of time that each query costs beside its own: tiles on the diagonal of which half is
            masked, values that are loaded, stored and summed once a query. Measured: 350 to 420, the intercepts of
            those slopes.
        bandwidth: of the memory's peak, by the kernels between products. A copy reaches 0.88 (4.24 TB/s), they 0.85 to
            0.95 of that; the rest pays for the small ones that no formula counts.
        kernel_s: a kernel with nothing to do, in a full queue.
        launch_s: the host's time for a kernel of the fused blocks, Python included (decoupled at 2048 tokens and a
            micro-batch of 1 and 2). It is the CPU's, not the GPU's: a slow one takes twice as long.
        host_exponent: p of (device**p + host**p)**(1/p), the seconds of both together. The queue runs empty at some
            places of a step sooner than at others, so it is more than the larger of the two. Same rows.
    """

    gemm: float = 0.70
    attention: float = 0.42
    exponentials: float = 0.50
    extra_keys: float = 420.0
    bandwidth: float = 0.78
    kernel_s: float = 1.75e-6
    launch_s: float = 36e-6
    host_exponent: float = 3.0


# Tokens a second at (tokens a sequence, sequences a micro-batch, micro-batches a step, recomputed layers).
Speed = Callable[[int, int, int, int], float]


def gemms(model: ModelConfig, micro_tokens: int, eight_bit: bool) -> list[Gemm]:
    """Every matrix product of a micro-batch of ``micro_tokens`` tokens; the head's are never 8 bits wide."""
    d, chunk = model.d_model, min(HEAD_CHUNK_TOKENS, micro_tokens)
    maps = [("qkv", d, sum(qkv_widths(model))), ("out", model.attn_dim, d), ("gate_up", d, 2 * model.d_ff),
            ("down", model.d_ff, d)]
    found = []
    for name, k, n in maps:
        eight = eight_bit and not any(size % 16 for size in (micro_tokens, n, k))
        found += _three(name, micro_tokens, n, k, model.n_layers, eight)
    return found + _three("head", chunk, model.padded_vocab_size, d, -(-micro_tokens // chunk), False)


def _three(name: str, m: int, n: int, k: int, count: int, eight_bit: bool) -> list[Gemm]:
    """The products of ``y = x w^T``, x (m, k) and w (n, k): y; dx = dy w; dw = dy^T x."""
    shapes = zip(PHASES, ((m, n, k), (m, k, n), (n, k, m)), strict=True)
    return [Gemm(name, phase, *shape, count, eight_bit) for phase, shape in shapes]


def table_ceilings(gpu: Gpu, found: list[Gemm], exponentials_per_s: float | None = None) -> Ceilings:
    """The GPU table's peaks as ceilings; 16-bit ones for fp8 products where the table has no other."""
    eight = gpu.flops_fp8 or gpu.flops_16bit
    rates = {(p.name, p.phase): eight if p.eight_bit else gpu.flops_16bit for p in found}
    return Ceilings(rates, gpu.bytes_per_s, exponentials_per_s=exponentials_per_s, source="GPU table")


def expected_ceilings(config: Config, gpu: Gpu, found: list[Gemm], efficiency: Efficiency) -> Ceilings:
    """What kernels really reach on ``gpu``, in the form of ceilings.

    Args:
        config: settled; says which attention kernel runs, and whether products are in fp32.
        found: a micro-batch's products.
    """
    share, peak = efficiency, gpu.flops_16bit
    if compute_dtype(config.train) == "fp32":
        peak = gpu.flops_fp32  # torch keeps fp32 products off the tensor cores unless it is told otherwise
    eight = gpu.flops_fp8 or peak
    rates = {(p.name, p.phase): share.gemm * (eight if p.eight_bit else peak) for p in found}
    return Ceilings(
        rates, share.bandwidth * gpu.bytes_per_s, share.kernel_s, share.launch_s,
        exponentials_per_s=gpu.exponentials_per_s * (share.exponentials if _is_narrow(config.model) else 1.0),
        attention_flops_per_s=share.attention * peak, extra_keys=share.extra_keys, source="expected",
    )


def table_speed(config: Config, gpu: Gpu, efficiency: Efficiency | None = None) -> Speed:
    """Expected tokens a second of whole steps (data, forward, backward, clip, optimizer) on a card of the table.

    The blocks are taken to be fused; compiled ones (``--no-fused``) are 5 to 15% slower (docs/PERFORMANCE.md).

    Args:
        config: settled (:func:`oneb.config.device_defaults`). Its batch and recomputation are not looked at; an
            optimizer that is left open counts as lion.
        gpu: calibrated if ``gpu.measured``, estimated otherwise.
        efficiency: shares of the peaks; None for those measured on an H200.
    """
    share = efficiency or Efficiency()
    eight_bit = config.train.precision == "fp8"

    def speed(seq_len: int, batch_size: int, grad_accum: int, recomputed_layers: int) -> float:
        found = gemms(config.model, batch_size * seq_len, eight_bit)
        parts = predict(config, seq_len, expected_ceilings(config, gpu, found, share), batch_size=batch_size,
                        grad_accum=grad_accum, recomputed_layers=recomputed_layers, eight_bit=eight_bit)
        both = (sum(parts["us_per_token"].values()), parts["host_us_per_token"])
        return 1e6 / sum(time**share.host_exponent for time in both) ** (1 / share.host_exponent)

    return speed


def gemm_seconds(found: list[Gemm], ceilings: Ceilings, recomputed: float = 0.0) -> float:
    """Seconds of a micro-batch's products; ``recomputed`` is the share of blocks that run their forward ones twice."""
    return sum(
        p.flops / ceilings.flops_per_s[p.name, p.phase]
        * (1 + recomputed if p.phase == "forward" and p.name != "head" else 1) for p in found
    )


def predict(config: Config, seq_len: int, ceilings: Ceilings, *, batch_size: int, grad_accum: int,
            recomputed_layers: int, eight_bit: bool) -> dict[str, Any]:
    """Seconds of one optimizer step's parts at the ``ceilings``.

    Args:
        config: settled. Batch and recomputation are the arguments, not the configuration's.
        seq_len: tokens a sequence.
        batch_size: sequences a micro-batch.
        grad_accum: micro-batches a step.
        recomputed_layers: blocks whose forward pass runs again in the backward pass.
        eight_bit: whether the blocks' products are in fp8.

    Returns:
        ``tok_s``; ``us_per_token`` by part; ``bound`` ("device" or "host"); ``launches`` a micro-batch; ``source``.
    """
    model, train = config.model, config.train
    micro_tokens, step_tokens = batch_size * seq_len, batch_size * seq_len * grad_accum
    found = gemms(model, micro_tokens, eight_bit)
    recomputed = recomputed_layers / model.n_layers
    bandwidth, value = ceilings.bytes_per_s, BYTES[compute_dtype(train)]
    launches = _launches(model, micro_tokens, grad_accum, recomputed_layers, eight_bit)
    between = elementwise_bytes(model, value, eight_bit, recomputed) + weight_cast_bytes(config) / micro_tokens
    seconds = {
        "gemm": gemm_seconds(found, ceilings, recomputed) / micro_tokens,
        "attention": _attention_seconds(model, seq_len, found, ceilings, value, recomputed),
        "elementwise": between / bandwidth,
        "fp8_casts": fp8_cast_bytes(config, step_tokens, value) / bandwidth if eight_bit else 0.0,
        "loss": loss_bytes(model, value, micro_tokens) / bandwidth,
        "optimizer": optimizer_bytes(config) / step_tokens / bandwidth,
        "grad_accumulation": accumulation_bytes(config, grad_accum) / step_tokens / bandwidth,
        "kernel_starts": launches * ceilings.kernel_s / micro_tokens,
    }
    device, host = sum(seconds.values()), launches * ceilings.launch_s / micro_tokens
    return {
        "tok_s": 1 / max(device, host), "bound": "device" if device >= host else "host",
        "us_per_token": {name: value * 1e6 for name, value in seconds.items()}, "host_us_per_token": host * 1e6,
        "launches": round(launches), "source": ceilings.source,
    }


def _attention_seconds(model: ModelConfig, seq_len: int, found: list[Gemm], ceilings: Ceilings, value: int,
                       recomputed: float) -> float:
    """Seconds a token of causal attention in all layers.

    A score costs an exponential forward and another backward (nothing keeps the T x T probabilities); products with
    it: QK and PV forward; QK again, dP, dV, dQ and dK backward (Dao 2023, arXiv 2307.08691). On average a query
    meets half of the keys. The tensor cores run at the rate of the 16-bit products. A null key beside wide heads adds
    its own passes.
    """
    wide = [p for p in found if not p.eight_bit]
    rate = ceilings.attention_flops_per_s or (
        sum(p.flops for p in wide) / sum(p.flops / ceilings.flops_per_s[p.name, p.phase] for p in wide))
    qk, v = (-(-width // _HEAD_MULTIPLE) * _HEAD_MULTIPLE for width in (model.qk_head_dim, model.v_head_dim))
    scores = model.n_layers * model.n_heads * (seq_len / 2 + ceilings.extra_keys)
    exponential = 1 / ceilings.exponentials_per_s if ceilings.exponentials_per_s else 0.0
    forward = max(2 * (qk + v) / rate, exponential)
    backward = max(2 * (3 * qk + 2 * v) / rate, exponential)
    terms = null_bytes(model, value, recomputed) / ceilings.bytes_per_s
    return scores * ((1 + recomputed) * forward + backward) + terms


def _is_narrow(model: ModelConfig) -> bool:
    """Whether attention is our kernel, for narrow heads; within documents it is so for wider ones, too, uncounted."""
    return max(model.qk_head_dim, model.v_head_dim) <= NARROW_HEAD_DIM


def null_bytes(model: ModelConfig, value: int, recomputed: float = 0.0) -> float:
    """Bytes a token of the null key's terms beside wide heads (:mod:`oneb.kernels.null_terms`).

    Forward: q read, the output read and written. Backward: q, the output and its gradient read, dq read and written.
    Narrow heads have the null key in attention's own pass.
    """
    if not model.null_attn or _is_narrow(model):
        return 0.0
    q, out = model.qk_head_dim, model.v_head_dim
    return model.n_layers * model.n_heads * value * ((1 + recomputed) * (q + 2 * out) + 3 * q + 2 * out)


def elementwise_bytes(model: ModelConfig, value: int, eight_bit: bool, recomputed: float = 0.0) -> float:
    """Bytes a token that the kernels between the products read and write, with values of ``value`` bytes.

    A block with d = d_model, F = d_ff, W = widths of queries (Q), keys and values:
    forward: norm 2d; rotary in place 2 (Q + K); residual and norm 4d (two read, two written); SwiGLU 3F; residual 3d.
    backward: SwiGLU 5F (reads 3F, writes 2F); two norms, 4d each; rotary 2W + Q (dq, dk, dv and q read, one buffer
    written). fp8 writes what a product reads (2d + F forward, 2F + W backward) in one byte. Outside of the blocks:
    embedding 2d and 3d, last norm 2d and 4d. ``recomputed``: the share of blocks whose forward pass runs twice.
    """
    d, f = model.d_model, model.d_ff
    q, k, v = qkv_widths(model)
    w = q + k + v
    q = q or k  # tied: queries are a copy of the keys
    forward = value * (9 * d + 2 * (q + k) + 3 * f)
    backward = value * (8 * d + 5 * f + 2 * w + q)
    if eight_bit:
        forward -= (value - 1) * (2 * d + f)
        backward -= (value - 1) * (2 * f + w)
    return model.n_layers * ((1 + recomputed) * forward + backward) + value * 11 * d


def weight_cast_bytes(config: Config) -> float:
    """Bytes a micro-batch to narrow fp32 weights for 16-bit products, and to widen their gradients again."""
    width, value = BYTES[config.train.param_dtype], BYTES[compute_dtype(config.train)]
    return 2 * matmul_parameters(config.model) * (width + value) if value < width else 0.0


def fp8_cast_bytes(config: Config, step_tokens: int, value: int) -> float:
    """Bytes a token of the fp8 casts and transposes that stand alone (:mod:`oneb.kernels.products`).

    With widths as in :func:`elementwise_bytes` and A = attn_dim: attention's output is cast (A); the gradients of both
    projections to the stream are cast and transposed at once (2d); the other operands of the weight gradients are
    transposed, a byte read and a byte written (inputs 2d + A + F, gradients W + 2F). Once a step, every weight is
    read for its maximum, read again and written twice.
    """
    model, train = config.model, config.train
    d, f, w = model.d_model, model.d_ff, sum(qkv_widths(model))
    layer = model.attn_dim * (value + 1) + 2 * d * (value + 2) + 2 * (2 * d + model.attn_dim + 3 * f + w)
    weights = d * w + model.attn_dim * d + 3 * d * f
    a_step = weights * 2 * (BYTES[train.param_dtype] + 1)
    return model.n_layers * (layer + a_step / step_tokens)


def loss_bytes(model: ModelConfig, value: int, micro_tokens: int) -> float:
    """Bytes a token of the loss head beside its products.

    Logits are read and their gradient written once (a second read comes from the cache); the weight's gradient of
    every chunk is added to an fp32 sum, which is scaled and rounded once a micro-batch.
    """
    vocabulary, d = model.padded_vocab_size, model.d_model
    chunk = min(HEAD_CHUNK_TOKENS, micro_tokens)
    summed = vocabulary * d * (value + 8) / chunk if micro_tokens > chunk else 0.0
    return 2 * vocabulary * value + summed + vocabulary * d * (4 + value) / micro_tokens + 2 * d * value


def optimizer_bytes(config: Config) -> float:
    """Bytes an optimizer step: gradients read for the norm and for the update, weights and state read, written."""
    kind = "lion" if config.optim.optimizer == "auto" else config.optim.optimizer
    return _stored(config.model) * 4 * BYTES[config.train.param_dtype] + 2 * state_bytes(config.model, kind)


def accumulation_bytes(config: Config, grad_accum: int) -> float:
    """Bytes an optimizer step to add the gradients of all micro-batches but the first to those before them."""
    return (grad_accum - 1) * _stored(config.model) * 3 * BYTES[config.train.param_dtype]


def _stored(model: ModelConfig) -> int:
    padding = (model.padded_vocab_size - model.vocab_size) * model.d_model
    return sum(parameter_counts(model).values()) + padding


def _launches(model: ModelConfig, micro_tokens: int, grad_accum: int, recomputed_layers: int, eight_bit: bool) -> float:
    return (model.n_layers * (_KERNELS_PER_LAYER[eight_bit] + _OPTIMIZER_KERNELS_PER_LAYER / grad_accum)
            + recomputed_layers * _FORWARD_KERNELS_PER_LAYER[eight_bit]
            + _KERNELS_PER_HEAD_CHUNK * -(-micro_tokens // HEAD_CHUNK_TOKENS))
