"""Everything that a run needs before its first step: device, data, model, optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from oneb import __version__, accounting
from oneb.config import BYTE_VOCAB_SIZE, GPT2_VOCAB_SIZE, Config, TrainConfig, compute_dtype, device_defaults
from oneb.data.order import BatchOrder, split_tokens
from oneb.data.tokens import Tokens, open_tokens
from oneb.errors import OnebError
from oneb.gpus import Gpu
from oneb.kernels.attention import choose_backend
from oneb.kernels.runtime import triton_available
from oneb.model.float8_state import Float8State
from oneb.model.fused import block_matrices
from oneb.model.transformer import DTYPES, Transformer, build_model
from oneb.optim import LossScaler, Optimizer, build_optimizer
from oneb.planner import memory_estimate
from oneb.schedules import reached
from oneb.train.compiles import compile_model
from oneb.train.device import Device, check_precision, open_device
from oneb.train.evaluate import EVAL_ITER_TOKENS, Validation
from oneb.units import format_gib

# What the trainer uses of torch came with these: in-place module compile, grouped-query SDPA, foreach norms by dtype.
_OLDEST_TORCH = (2, 6)

# From this 16-bit peak on (H100), micro-batches below so many tokens are bound by the host.
_FAST_FLOPS = 700e12
_BUSY_TOKENS = 8192


@dataclass
class Parts:
    """What the training loop works with; ``config`` has every device-dependent option filled in."""

    config: Config
    device: Device
    tokens: Tokens
    encoding: str | None
    order: BatchOrder
    validation: Validation
    model: Transformer
    optimizer: Optimizer
    scaler: LossScaler
    float8: Float8State | None
    backend: str
    notes: list[str]


def build(config: Config, say: Callable[[str], None]) -> Parts:
    """Open the device and the data, allocate the model.

    Args:
        say: told what is being waited for.

    Raises:
        OnebError: whatever of it is missing or does not fit together.
    """
    _check_torch()
    device = open_device(config.train.device)
    notes: list[str] = []
    check_precision(device, config.train.precision)
    config = _settle(config, device, notes)
    # Data first: its mistakes are cheaper to hear of than the model's.
    tokens = open_tokens(config.data.path, config.data.format, vocab_size=config.model.vocab_size, log=say)
    notes += tokens.warnings
    n_train, n_val = split_tokens(tokens.n_tokens)
    train = config.train
    order = BatchOrder(n_train, train.seed, train.phases, train.batch_sequences)
    validation = Validation(tokens, n_train, n_val, train.eval_iters * EVAL_ITER_TOKENS, train.batch_size)
    for _, seq_len in reached(train.phases, train.steps):
        validation.offsets(seq_len)  # a tail too short for a later phase is heard of now
    epochs = order.epoch(train.steps)
    if epochs > 1.0:
        notes.append(f"the run reads its {n_train:,} training tokens {epochs:.1f} times")
    dtype = DTYPES[compute_dtype(train)]
    head_dim = max(config.model.qk_head_dim, config.model.v_head_dim)
    backend = choose_backend(device.torch, dtype, head_dim, train.deterministic)
    if (backend == "flash" and head_dim <= 128 and not train.deterministic
            and torch.cuda.get_device_capability(device.torch)[0] >= 9):
        notes.append("cuDNN's attention does not run here (is another cuDNN on the library path?): FlashAttention 2 "
                     "instead, which is about 1.6x slower on this card")
    # Set either way: a process may train more than once. Filling fresh memory guards against bugs, and costs a pass.
    torch.use_deterministic_algorithms(train.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False
    model = build_model(config.model, device=device.torch, param_dtype=DTYPES[train.param_dtype],
                        compute_dtype=dtype, seed=train.seed, backend=backend)
    model.grad_checkpoint = bool(train.grad_checkpoint)
    float8 = Float8State([block_matrices(block) for block in model.blocks], dtype) if train.precision == "fp8" else None
    if train.fused_blocks:
        model.fuse(float8)
    if train.compile:
        compile_model(model, train.compile_mode, n_lengths=len(reached(train.phases, train.steps)))
    optim = config.optim
    optimizer = build_optimizer(model.named_parameters(), kind=optim.optimizer, betas=optim.betas, eps=optim.eps,
                                weight_decay=optim.weight_decay, seed=train.seed, fused=optim.fused)
    scaler = LossScaler(enabled=dtype == torch.float16, device=device.torch)
    encoding = tokens.encoding or {BYTE_VOCAB_SIZE: "bytes", GPT2_VOCAB_SIZE: "gpt2"}.get(config.model.vocab_size)
    return Parts(config, device, tokens, encoding, order, validation, model, optimizer, scaler, float8,
                 backend, notes)


def describe(parts: Parts, start_step: int) -> dict[str, Any]:
    """The ``meta`` row: what this run is, for everything that reads ``train.jsonl``."""
    config, model = parts.config, parts.config.model
    return {
        "name": config.name,
        "steps": config.train.steps,
        "start_step": start_step,
        "variant": model.variant,
        "parameters": sum(accounting.parameter_counts(model).values()),
        "matmul_parameters": accounting.matmul_parameters(model),
        "kv_bytes_per_token": accounting.kv_bytes_per_token(model),
        "flops_per_token": {
            str(seq_len): accounting.flops_per_token(model, seq_len) for _, seq_len in config.train.phases
        },
        "device": parts.device.name,
        "torch": torch.__version__,
        "oneb": __version__,
        "attention_backend": parts.backend,
        "deterministic": config.train.deterministic,
        "param_dtype": config.train.param_dtype,
        "compute_dtype": compute_dtype(config.train),
        "precision": config.train.precision,
        "grad_checkpoint": config.train.grad_checkpoint,
        "fused_blocks": config.train.fused_blocks,
        "compile": config.train.compile,
        "optimizer_fused": parts.optimizer.fused,
        "data": config.data.path,
        "data_fingerprint": parts.tokens.fingerprint,
        "train_tokens": parts.validation.n_train,
        "val_tokens": parts.validation.n_val,
        "encoding": parts.encoding,
        "peak_flops": parts.device.gpu.flops_16bit if parts.device.gpu else None,
    }


def _check_torch() -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _OLDEST_TORCH:
        wanted = ".".join(map(str, _OLDEST_TORCH))
        raise OnebError(f"PyTorch {torch.__version__} is installed, and training needs {wanted} or later; "
                        "upgrade it with the build for your CUDA version")


def _settle(config: Config, device: Device, notes: list[str]) -> Config:
    """Fill in what the device decides, and say where that is not what was asked for."""
    asked = config.train
    train = device_defaults(asked, device.torch.type, device.has_bf16, triton_available())
    if not device.has_bf16 and "bf16" in (asked.precision, asked.param_dtype, asked.amp_dtype):
        notes.append(f"{device.name} has no bf16 arithmetic: training in fp16 with loss scaling instead")
    if device.is_cuda and device.gpu is None:
        notes.append(f"the peak of {device.name} is not in our table (oneb/gpus.py): no MFU is shown")
    settled = dataclasses.replace(config, train=train)
    if train.grad_checkpoint is None:
        needed = sum(memory_estimate(settled, grad_checkpoint=False).values())
        recompute = device.free_bytes is not None and needed > 0.9 * device.free_bytes
        if recompute:
            notes.append(f"without recomputation a step would need about {format_gib(needed)} of the "
                         f"{format_gib(device.free_bytes)} that are free: activations are recomputed "
                         "(--no-grad-checkpoint insists)")
        settled = dataclasses.replace(settled, train=dataclasses.replace(train, grad_checkpoint=recompute))
    if device.gpu and (note := _small_micro_batch(train, device.gpu)):
        notes.append(note)
    return settled


def _small_micro_batch(train: TrainConfig, gpu: Gpu) -> str | None:
    """A fast GPU with little to do waits for its host, which queues about 600 kernels a micro-batch.

    One H200, 1b decoupled, 2048 tokens: 53k tokens/s at one sequence a micro-batch, 78k at 2, 92k at 4, 95k at 32.
    """
    tokens = train.batch_size * train.phases[0][1]
    factors = [n for n in range(2, train.grad_accum + 1) if train.grad_accum % n == 0 and n * tokens <= _BUSY_TOKENS]
    if gpu.flops_16bit < _FAST_FLOPS or not factors:
        return None
    return (f"micro-batches of {tokens} tokens leave {gpu.key} waiting for its host; with the memory for it, "
            f"--batch-size {train.batch_size * factors[-1]} --grad-accum {train.grad_accum // factors[-1]} is the "
            "same run, and faster")
