"""A roofline of the training step: how fast it would be if every part ran at its ceiling. No torch.

Kernels follow each other, so their times add up:

    seconds a token = products / GEMM rate + attention
                      + bytes of (elementwise + loss + optimizer + gradient sums) / bandwidth
                      + kernels x time to start one / tokens a micro-batch

and a host that takes longer to launch the kernels than the device to run them sets the pace instead. Within attention,
products and exponentials can overlap: the slower of them counts. Rates are the ceilings that the same process
measured, or else the GPU table's peaks, of which real kernels reach less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oneb.accounting import BYTES, HEAD_CHUNK_TOKENS, parameter_counts, qkv_widths
from oneb.config import Config, ModelConfig, compute_dtype
from oneb.gpus import Gpu

PHASES = ("forward", "dgrad", "wgrad")
# Special-function units: 16 results a clock and SM on compute capability 7.0 to 9.0 (CUDA C++ Programming Guide,
# table of arithmetic throughput).
EXPONENTIALS_PER_CLOCK = 16
# Tensor cores multiply heads in steps of 16.
_HEAD_MULTIPLE = 16
# Kernels a block for a micro-batch, forward and backward: 11 + 20 of the fused block, six small ones that make the
# query's scale, seven gradient sums; in fp8 two casts and eight transposes more, and half a dozen around the scales.
_KERNELS_PER_LAYER = {False: 44, True: 60}
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
        source: "measured" or "GPU table".
    """

    flops_per_s: dict[tuple[str, str], float]
    bytes_per_s: float
    kernel_s: float = 0.0
    launch_s: float = 0.0
    exponentials_per_s: float | None = None
    source: str = "measured"

    def to_dict(self, found: list[Gemm]) -> dict[str, Any]:
        """Plain containers, with each product's shape beside its rate."""
        return {
            "source": self.source, "copy_tb_s": self.bytes_per_s / 1e12, "kernel_us": self.kernel_s * 1e6,
            "launch_us": self.launch_s * 1e6, "exponentials_per_s": self.exponentials_per_s,
            "gemm": [{"name": p.name, "phase": p.phase, "m": p.m, "n": p.n, "k": p.k, "count": p.count,
                      "fp8": p.eight_bit, "tflops": self.flops_per_s[p.name, p.phase] / 1e12} for p in found],
        }


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


def gemm_seconds(found: list[Gemm], ceilings: Ceilings, recompute: bool = False) -> float:
    """Seconds of a micro-batch's products at their ceilings; ``recompute`` runs the blocks' forward ones twice."""
    return sum(
        p.flops / ceilings.flops_per_s[p.name, p.phase]
        * (2 if recompute and p.phase == "forward" and p.name != "head" else 1) for p in found
    )


def predict(config: Config, seq_len: int, ceilings: Ceilings, *, eight_bit: bool) -> dict[str, Any]:
    """The roofline of one optimizer step.

    Args:
        config: with the device's defaults filled in.
        seq_len: tokens a sequence.

    Returns:
        ``tok_s``; ``us_per_token`` by part; ``bound`` ("device" or "host"); ``launches`` a micro-batch; ``source``.
    """
    model, train = config.model, config.train
    micro_tokens = train.batch_size * seq_len
    found = gemms(model, micro_tokens, eight_bit)
    recompute = bool(train.grad_checkpoint)
    bandwidth, value = ceilings.bytes_per_s, BYTES[compute_dtype(train)]
    launches = _launches(config, micro_tokens, eight_bit)
    seconds = {
        "gemm": gemm_seconds(found, ceilings, recompute) / micro_tokens,
        "attention": _attention_seconds(model, seq_len, found, ceilings, recompute),
        "elementwise": elementwise_bytes(model, value, eight_bit, recompute) / bandwidth,
        "fp8_casts": fp8_cast_bytes(config, seq_len, value) / bandwidth if eight_bit else 0.0,
        "loss": loss_bytes(model, value, micro_tokens) / bandwidth,
        "optimizer": optimizer_bytes(config) / (seq_len * train.batch_sequences) / bandwidth,
        "grad_accumulation": accumulation_bytes(config) / (seq_len * train.batch_sequences) / bandwidth,
        "kernel_starts": launches * ceilings.kernel_s / micro_tokens,
    }
    device, host = sum(seconds.values()), launches * ceilings.launch_s / micro_tokens
    return {
        "tok_s": 1 / max(device, host), "bound": "device" if device >= host else "host",
        "us_per_token": {name: value * 1e6 for name, value in seconds.items()}, "host_us_per_token": host * 1e6,
        "launches": round(launches), "source": ceilings.source,
    }


def _attention_seconds(model: ModelConfig, seq_len: int, found: list[Gemm], ceilings: Ceilings,
                       recompute: bool) -> float:
    """Seconds a token of causal attention in all layers.

    A score costs an exponential forward and another backward (nothing keeps the T x T probabilities); products with
    it: QK and PV forward; QK again, dP, dV, dQ and dK backward (Dao 2023, arXiv 2307.08691). On average a query
    meets half of the keys. The tensor cores run at the rate of the 16-bit products.
    """
    wide = [p for p in found if not p.eight_bit]
    rate = sum(p.flops for p in wide) / sum(p.flops / ceilings.flops_per_s[p.name, p.phase] for p in wide)
    qk, v = (-(-width // _HEAD_MULTIPLE) * _HEAD_MULTIPLE for width in (model.qk_head_dim, model.v_head_dim))
    scores = model.n_layers * model.n_heads * seq_len / 2
    exponential = 1 / ceilings.exponentials_per_s if ceilings.exponentials_per_s else 0.0
    forward = max(2 * (qk + v) / rate, exponential)
    backward = max(2 * (3 * qk + 2 * v) / rate, exponential)
    return scores * ((2 if recompute else 1) * forward + backward)


def elementwise_bytes(model: ModelConfig, value: int, eight_bit: bool, recompute: bool = False) -> float:
    """Bytes a token that the kernels between the products read and write, with values of ``value`` bytes.

    A block with d = d_model, F = d_ff, W = widths of queries (Q), keys and values:
    forward: norm 2d; rotary in place 2 (Q + K); residual and norm 4d (two read, two written); SwiGLU 3F; residual 3d.
    backward: SwiGLU 5F (reads 3F, writes 2F); two norms, 4d each; rotary 2W + Q (dq, dk, dv and q read, one buffer
    written). fp8 writes what a product reads (2d + F forward, 2F + W backward) in one byte. Outside of the blocks:
    embedding 2d and 3d, last norm 2d and 4d.
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
    return model.n_layers * ((2 if recompute else 1) * forward + backward) + value * 11 * d


def fp8_cast_bytes(config: Config, seq_len: int, value: int) -> float:
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
    return model.n_layers * (layer + a_step / (seq_len * train.batch_sequences))


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
    """Bytes an optimizer step: gradients read for the norm and for the update, weights and fp32 state read, written."""
    states = 1 if config.optim.optimizer == "lion" else 2
    return _stored(config.model) * (4 * BYTES[config.train.param_dtype] + 8 * states)


def accumulation_bytes(config: Config) -> float:
    """Bytes an optimizer step to add the gradients of all micro-batches but the first to those before them."""
    return (config.train.grad_accum - 1) * _stored(config.model) * 3 * BYTES[config.train.param_dtype]


def _stored(model: ModelConfig) -> int:
    padding = (model.padded_vocab_size - model.vocab_size) * model.d_model
    return sum(parameter_counts(model).values()) + padding


def _launches(config: Config, micro_tokens: int, eight_bit: bool) -> float:
    layers = config.model.n_layers
    return (layers * (_KERNELS_PER_LAYER[eight_bit] + _OPTIMIZER_KERNELS_PER_LAYER / config.train.grad_accum)
            + _KERNELS_PER_HEAD_CHUNK * -(-micro_tokens // HEAD_CHUNK_TOKENS))
