"""Everything that a run needs before its first step: device, data, model, optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from oneb import __version__, accounting
from oneb.config import BYTE_VOCAB_SIZE, EVAL_ITER_TOKENS, GPT2_VOCAB_SIZE, Config, compute_dtype, device_defaults
from oneb.data.named import open_data
from oneb.data.order import BatchOrder
from oneb.data.tokenizer import BytesTokenizer, Gpt2Tokenizer
from oneb.data.tokens import Tokens
from oneb.errors import OnebError
from oneb.fit import Fit, fit
from oneb.kernels.attention import choose_backend
from oneb.kernels.runtime import triton_available
from oneb.model.float8_state import Float8State
from oneb.model.fused import block_matrices
from oneb.model.transformer import DTYPES, Transformer, build_model
from oneb.optim import LossScaler, Optimizer, build_optimizer
from oneb.roofline import table_speed
from oneb.schedules import reached
from oneb.train.compiles import compile_model
from oneb.train.device import Device, check_precision, open_device
from oneb.train.evaluate import Validation

# What the trainer uses of torch came with these: in-place module compile, grouped-query SDPA, foreach norms by dtype.
_OLDEST_TORCH = (2, 6)


@dataclass
class Parts:
    """What the training loop works with; ``config`` has every device-dependent option filled in."""

    config: Config
    device: Device
    fit: Fit
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
    config, fitted = _settle(config, device, notes)
    # Data first: its mistakes are cheaper to hear of than the model's.
    data = open_data(config.data, config.model.vocab_size, say)
    tokens, n_train, n_val = data.tokens, data.n_train, data.n_val
    notes += tokens.warnings
    train = config.train
    sequences = tuple(train.sequences(seq_len) for _, seq_len in train.phases)
    order = BatchOrder(n_train, train.seed, train.phases, sequences, groups=data.groups)
    validation = Validation(tokens, n_train, n_val, train.eval_iters * EVAL_ITER_TOKENS)
    for _, seq_len in reached(train.phases, train.steps):
        validation.offsets(seq_len)  # a tail too short for a later phase is heard of now
    epochs = order.epoch(train.steps)
    if epochs > 1.0:
        notes.append(f"the run reads its {n_train:,} training tokens {epochs:.1f} times")
    dtype = DTYPES[compute_dtype(train)]
    head_dim = max(config.model.qk_head_dim, config.model.v_head_dim)
    backend = choose_backend(device.torch, dtype, head_dim, train.deterministic, config.data.doc_mask)
    if (backend == "flash" and head_dim <= 128 and not train.deterministic
            and torch.cuda.get_device_capability(device.torch)[0] >= 9):
        notes.append("cuDNN's attention does not run here (is another cuDNN on the library path?): FlashAttention 2 "
                     "instead, which is about 1.6x slower on this card")
    if config.data.doc_mask and backend == "efficient":
        notes.append("attention within documents goes by a bias of all scores here, several times slower than our "
                     "kernel, which wants 16-bit arithmetic, Ampere or later, Triton and heads up to 128 wide")
    # Set either way: a process may train more than once. Filling fresh memory guards against bugs, and costs a pass.
    torch.use_deterministic_algorithms(train.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False
    model = build_model(config.model, device=device.torch, param_dtype=DTYPES[train.param_dtype],
                        compute_dtype=dtype, seed=train.seed, backend=backend)
    encoding = tokens.encoding or {BYTE_VOCAB_SIZE: "bytes", GPT2_VOCAB_SIZE: "gpt2"}.get(config.model.vocab_size)
    if config.data.doc_mask:
        model.document_opening = _end_of_text(tokens, encoding)
    float8 = Float8State([block_matrices(block) for block in model.blocks], dtype) if train.precision == "fp8" else None
    if train.fused_blocks:
        model.fuse(float8)
    if train.compile:
        compile_model(model, train.compile_mode, n_lengths=len(reached(train.phases, train.steps)))
    optim = config.optim
    optimizer = build_optimizer(model.named_parameters(), kind=optim.optimizer, betas=optim.betas, eps=optim.eps,
                                weight_decay=optim.weight_decay, seed=train.seed, fused=optim.fused)
    scaler = LossScaler(enabled=dtype == torch.float16, device=device.torch)
    return Parts(config, device, fitted, tokens, encoding, order, validation, model, optimizer, scaler, float8,
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
            str(seq_len): accounting.flops_per_token(model, seq_len, config.data.doc_mask)
            for _, seq_len in config.train.phases
        },
        "device": parts.device.name,
        "torch": torch.__version__,
        "oneb": __version__,
        "attention_backend": parts.backend,
        "deterministic": config.train.deterministic,
        "param_dtype": config.train.param_dtype,
        "compute_dtype": compute_dtype(config.train),
        "precision": config.train.precision,
        "fit": [{"seq_len": phase.seq_len, "batch_size": phase.batch_size, "grad_accum": phase.grad_accum,
                 "recomputed_layers": phase.recomputed_layers, "memory": phase.memory} for phase in parts.fit.phases],
        "optimizer": config.optim.optimizer,
        "fused_blocks": config.train.fused_blocks,
        "compile": config.train.compile,
        "optimizer_fused": parts.optimizer.fused,
        "data": config.data.path,
        "doc_mask": config.data.doc_mask,
        "data_fingerprint": parts.tokens.fingerprint,
        "train_tokens": parts.validation.n_train,
        "val_tokens": parts.validation.n_val,
        "encoding": parts.encoding,
        "peak_flops": parts.device.gpu.flops_16bit if parts.device.gpu else None,
    }


def _end_of_text(tokens: Tokens, encoding: str | None) -> int:
    """The id between documents. Raises OnebError where nothing says which."""
    known = {tokenizer.name: tokenizer.eot for tokenizer in (Gpt2Tokenizer, BytesTokenizer)}
    found = tokens.eot if tokens.eot is not None else known.get(encoding)
    if found is None:
        raise OnebError(f"--doc-mask needs the id that ends documents, and no .meta file beside {tokens.files[0]} "
                        "names it; wanted a line `eot: ID` in it, as prepare_fineweb.py writes. Make the data with "
                        "it, add the line, or leave out --doc-mask")
    return found


def _check_torch() -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _OLDEST_TORCH:
        wanted = ".".join(map(str, _OLDEST_TORCH))
        raise OnebError(f"PyTorch {torch.__version__} is installed, and training needs {wanted} or later; "
                        "upgrade it with the build for your CUDA version")


def _settle(config: Config, device: Device, notes: list[str]) -> tuple[Config, Fit]:
    """Fill in what the device decides, and say where that is not what was asked for."""
    asked = config.train
    train = device_defaults(asked, device.torch.type, device.has_bf16, triton_available())
    if not device.has_bf16 and "bf16" in (asked.precision, asked.param_dtype, asked.amp_dtype):
        notes.append(f"{device.name} has no bf16 arithmetic: training in fp16 with loss scaling instead")
    if device.is_cuda and device.gpu is None:
        notes.append(f"the peak of {device.name} is not in our table (oneb/gpus.py): no MFU is shown")
    settled = dataclasses.replace(config, train=train)
    speed = table_speed(settled, device.gpu) if device.gpu else None
    # What "auto" became decides what is counted.
    here = dataclasses.replace(settled, train=dataclasses.replace(train, device=device.torch.type))
    fitted = fit(here, device.limit_memory(train.vram_limit_gib), speed)
    if fitted.is_hopeless:
        raise OnebError(f"the run {fitted.notes[-1]}; what is given with --batch-size and --grad-checkpoint is tried "
                        "wherever at least weights and optimizer fit")
    return dataclasses.replace(settled, optim=dataclasses.replace(config.optim, optimizer=fitted.optimizer)), fitted
