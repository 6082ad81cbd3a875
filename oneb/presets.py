"""From what the user gave to a whole configuration: sizes, what a variant implies, what one option decides for others.

``resolve`` reports every fault at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from oneb.accounting import qkv_widths
from oneb.config import (
    BYTE_VOCAB_SIZE,
    DEMO_DATA,
    FP8_MULTIPLE,
    Config,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    sections,
)
from oneb.errors import ConfigErrors, OnebError
from oneb.schedules import Phases, parse_seq_schedule, steps_for_tokens

# d_model, layers, heads, d_ff, block. nano learns in minutes on two CPU cores.
SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "nano": (128, 4, 4, 384, 256),
    "tiny": (512, 6, 8, 2048, 2048),
    "small": (768, 12, 12, 3072, 2048),
    "medium": (1024, 24, 16, 4096, 2048),
    "large": (1536, 24, 16, 6144, 2048),
    "1b": (2048, 22, 32, 5632, 2048),
}
DEFAULT_SIZE = "1b"

# Widths that only some variants have; given for another, they are a mistake and not ignored.
_VARIANT_ONLY = {
    "n_kv_heads": ("gqa", "gqa_kv2"),
    "sem_dim": ("decoupled",),
    "geo_dim": ("decoupled",),
    "attn_dim": ("bottleneck", "decoupled"),
}
_SHAPE_FIELDS = ("d_model", "n_layers", "n_heads", "d_ff", "max_seq_len")


def resolve(given: Mapping[str, Any]) -> Config:
    """A whole configuration from the options that were given.

    Args:
        given: field name -> value, only what the user wrote; ``size``, ``train_seq_len`` (tokens),
            ``target_tokens`` (tokens) and ``phases`` (as text) besides the fields of :mod:`oneb.config`.

    Raises:
        ConfigErrors: every fault, each with its fix.
    """
    faults: list[str] = []
    model = _resolve_model(given, faults)
    train = _resolve_train(given, model, faults)
    values = {name: _from_given(cls, given) for name, cls in sections().items() if name not in ("model", "train")}
    values["optim"] = _resolve_optim(values["optim"], train.steps)
    config = Config(model=model, train=train, **values)
    faults += find_faults(config)
    if faults:
        raise ConfigErrors(faults)
    return config


def _from_given(cls: type, given: Mapping[str, Any], **derived: Any) -> Any:
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{**derived, **{name: value for name, value in given.items() if name in names}})


def _resolve_model(given: Mapping[str, Any], faults: list[str]) -> ModelConfig:
    size = given.get("size", DEFAULT_SIZE)
    if size not in SIZES:
        faults.append(f"--size {size!r} is not known; choose one of {', '.join(SIZES)}")
        size = DEFAULT_SIZE
    variant = given.get("variant", ModelConfig.variant)
    for name, variants in _VARIANT_ONLY.items():
        if name in given and variant not in variants:
            flag = ModelConfig.__dataclass_fields__[name].metadata["flag"]
            faults.append(f"{flag} {given[name]} has no meaning for --variant {variant}; "
                          f"leave it out, or choose --variant {' or '.join(variants)}")
    shape = dict(zip(_SHAPE_FIELDS, SIZES[size], strict=True))
    shape |= {name: given[name] for name in _SHAPE_FIELDS if name in given}
    derived = shape | _variant_widths(variant, shape["d_model"], max(1, shape["n_heads"]), given)
    if given.get("path") == DEMO_DATA:
        derived["vocab_size"] = BYTE_VOCAB_SIZE
    own = {name: value for name, value in given.items() if name not in _VARIANT_ONLY}
    return _from_given(ModelConfig, own, **derived)


def _variant_widths(variant: str, d_model: int, n_heads: int, given: Mapping[str, Any]) -> dict[str, int]:
    """A variant in widths: bottleneck and decoupled, van Dommelen 2025; gqa, Ainslie et al. 2023 (arXiv 2305.13245)."""
    if variant == "decoupled":
        sem = given.get("sem_dim", d_model // 16)
        geo = given.get("geo_dim", d_model // 8)
        return {"sem_dim": sem, "geo_dim": geo, "attn_dim": given.get("attn_dim", sem + geo), "n_kv_heads": n_heads}
    if variant == "bottleneck":
        width = given.get("attn_dim", d_model * 3 // 16)
        return {"sem_dim": 0, "geo_dim": width, "attn_dim": width, "n_kv_heads": n_heads}
    default_kv = {"gqa": max(1, n_heads // 4), "gqa_kv2": 2}.get(variant, n_heads)
    kv_heads = given.get("n_kv_heads", default_kv) if variant in _VARIANT_ONLY["n_kv_heads"] else n_heads
    return {"sem_dim": 0, "geo_dim": d_model, "attn_dim": d_model, "n_kv_heads": kv_heads}


def _resolve_train(given: Mapping[str, Any], model: ModelConfig, faults: list[str]) -> TrainConfig:
    try:
        phases = _resolve_phases(given, model.max_seq_len)
    except OnebError as error:
        faults.append(str(error))
        phases = ((0, model.max_seq_len),)
    train = _from_given(TrainConfig, {**given, "phases": phases})
    if "batch_tokens" in given and "grad_accum" in given:
        faults.append(f"--batch-tokens {given['batch_tokens']} and --grad-accum {given['grad_accum']} both set "
                      "the size of a step; give one of them")
    if "target_tokens" not in given:
        return train
    if "steps" in given:
        faults.append(f"--steps {given['steps']} and --target-tokens {given['target_tokens']} both set "
                      "the length of the run; give one of them")
        return train
    if min(seq_len * train.sequences(max(1, seq_len)) for _, seq_len in phases) < 1:
        return train  # reported as out of range; no number of such steps is enough
    return dataclasses.replace(train, steps=steps_for_tokens(phases, given["target_tokens"], train.sequences))


def _resolve_phases(given: Mapping[str, Any], block: int) -> Phases:
    """An explicit schedule wins; ``--train-seq-len`` fills what it leaves open; neither: 1024, then 2048."""
    train_seq_len = given.get("train_seq_len")
    if "phases" in given:
        phases = parse_seq_schedule(given["phases"])
        if phases[0][0] == 0:
            return phases
        if train_seq_len is None:
            raise OnebError(f"--seq-schedule {given['phases']!r} says nothing about steps 0 to {phases[0][0] - 1}; "
                            "start it with an entry like 1024@0, or give --train-seq-len")
        return ((0, train_seq_len), *phases)
    if train_seq_len is not None:
        return ((0, train_seq_len),)
    return tuple(p for p in TrainConfig.phases if p[1] <= block) or ((0, block),)


def _resolve_optim(optim: OptimConfig, steps: int) -> OptimConfig:
    """What the optimizer, the rate and the length of the run imply."""
    # Lion's sign update is larger for the same lr, and its papers pair a smaller lr with 3-10x the decay.
    decay = 0.1 if optim.is_adamw else 0.5
    # An lr that find_faults refuses must not bring a second fault with it.
    min_lr = optim.lr / 10 if 0 < optim.lr < math.inf else 0.0
    derived = {"weight_decay": decay, "warmup_steps": min(2000, -(-steps // 50)), "min_lr": min_lr}
    return dataclasses.replace(
        optim, **{name: value for name, value in derived.items() if getattr(optim, name) is None}
    )


def find_faults(config: Config) -> list[str]:
    """Everything about a configuration that cannot work, each with its fix."""
    faults = [*_range_faults(config)]
    faults += _model_faults(config.model)
    faults += _train_faults(config)
    faults += _precision_faults(config.train)
    if config.train.precision == "fp8":
        faults += _fp8_faults(config)
    return faults


def _range_faults(config: Config) -> list[str]:
    """Numbers outside the values that mean anything."""
    positive = "must be at least 1"
    not_negative = "must not be negative"
    checks: list[tuple[Any, tuple[str, ...], Callable[[Any], bool], str]] = [
        (config.model, ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "max_seq_len"),
         lambda v: v >= 1, positive),
        (config.train, ("steps", "grad_accum", "eval_iters"), lambda v: v >= 1, positive),
        (config.train, ("batch_size",), lambda v: v is None or v >= 1, positive),
        (config.train, ("vram_limit_gib",), lambda v: v is None or 0 < v < math.inf, "must be above 0, and a number"),
        (config.run, ("price",), lambda v: v is None or 0 <= v < math.inf, "must not be negative, and a number"),
        (config.train, ("eval_every", "max_rollbacks"), lambda v: v >= 0, not_negative),
        (config.train, ("spike_zscore",), lambda v: 0 <= v < math.inf, "must not be negative, and a number"),
        (config.train, ("seed",), lambda v: 0 <= v < 2**63, "must be between 0 and 2**63 - 1"),
        (config.run, ("save_every", "keep_last"), lambda v: v >= 0, not_negative),
        (config.run, ("save_minutes",), lambda v: 0 <= v < math.inf, "must not be negative, and a number"),
        (config.run, ("save_to",), lambda v: v is None or v.strip(), "is empty (a variable that is not set?); give a "
         "folder or s3://bucket/folder"),
        (config.log, ("log_every",), lambda v: v >= 1, positive),
        (config.log, ("analysis_every",), lambda v: v >= 0, not_negative),
        (config.optim, ("lr",), lambda v: 0 < v < math.inf, "must be above 0, and a number"),
        (config.optim, ("weight_decay", "warmup_steps", "min_lr", "grad_clip"), lambda v: 0 <= v < math.inf,
         "must not be negative, and a number"),
    ]
    faults = []
    for section, names, accepts, message in checks:
        for name in names:
            value = getattr(section, name)
            # NaN fails every comparison, so it is caught here as well.
            if not accepts(value):
                flag = type(section).__dataclass_fields__[name].metadata["flag"]
                faults.append(f"{flag} {value} {message}")
    return faults


def _model_faults(model: ModelConfig) -> list[str]:
    faults = []
    if min(model.n_heads, model.n_kv_heads) < 1:
        return faults  # reported as out of range; dividing by it would not help
    widths = {"--sem-dim": model.sem_dim, "--geo-dim": model.geo_dim, "--attn-dim": model.attn_dim}
    if model.variant == "bottleneck":
        widths = {"--attn-dim": model.attn_dim}
    elif model.variant != "decoupled":
        widths = {"--d-model": model.d_model}
    elif model.attn_dim == model.sem_dim + model.geo_dim:
        del widths["--attn-dim"]  # as good as the two it is the sum of
    for flag, width in widths.items():
        if width < model.n_heads or width % model.n_heads:
            below, above = width // model.n_heads * model.n_heads, -(-max(width, 1) // model.n_heads) * model.n_heads
            faults.append(f"{flag} {width} does not divide into {model.n_heads} heads; "
                          f"use {f'{below} or ' if below else ''}{above}, or another --n-head")
    if model.n_heads % model.n_kv_heads:
        divisors = [str(n) for n in range(1, model.n_heads + 1) if model.n_heads % n == 0]
        faults.append(f"--kv-head {model.n_kv_heads} does not divide --n-head {model.n_heads}; "
                      f"use one of {', '.join(divisors)}")
    if model.rope and not faults and model.geo_head_dim % 2:
        faults.append(f"RoPE rotates pairs, and each head has {model.geo_head_dim} positional dimensions "
                      f"({model.geo_dim} over {model.n_heads} heads), an odd number; "
                      "choose a width that gives an even number a head, or --no-rope")
    if model.tie_qk and model.n_kv_heads != model.n_heads:
        faults.append(f"--tie-qk needs as many key heads as query heads, and --variant {model.variant} has "
                      f"{model.n_kv_heads} for {model.n_heads}; leave --tie-qk out, or give --kv-head {model.n_heads}")
    return faults


def _train_faults(config: Config) -> list[str]:
    faults = []
    train, block = config.train, config.model.max_seq_len
    for start, seq_len in train.phases:
        if seq_len > block:
            faults.append(f"the sequence schedule asks for {seq_len} tokens at step {start}, more than "
                          f"--block {block}; give --block {seq_len}, or shorten that phase")
        elif seq_len < 1:
            faults.append(f"--train-seq-len {seq_len} must be at least 1")
    faults += _batch_faults(train) + _recompute_faults(train, config.model.n_layers)
    if config.optim.min_lr > config.optim.lr:
        faults.append(f"--min-lr {config.optim.min_lr:g} is above --lr {config.optim.lr:g}; the rate falls towards it")
    if config.optim.warmup_steps > train.steps:
        faults.append(f"--warmup-steps {config.optim.warmup_steps} is longer than the run of {train.steps} steps; "
                      f"use at most {train.steps}")
    if train.param_dtype == "bf16" and train.amp_dtype == "fp16" or \
            train.param_dtype == "fp16" and train.amp_dtype == "bf16":
        faults.append(f"--param-dtype {train.param_dtype} computes in {train.param_dtype}, and --amp-dtype asks for "
                      f"{train.amp_dtype}; leave --amp-dtype out, or keep weights in fp32")
    if train.amp is False and train.amp_dtype is not None:
        faults.append(f"--amp-dtype {train.amp_dtype} asks for mixed precision and --no-amp refuses it; leave one out")
    if train.fused_blocks and train.compile:
        faults.append("--fused runs the blocks by hand-written kernels, --compile by torch.compile; "
                      "leave one of them out")
    compiles = train.compile or train.compile is None and train.fused_blocks is False
    if train.compile_mode != "default" and not compiles:
        faults.append(f"--compile-mode {train.compile_mode} is torch.compile's, which nothing here asks for; "
                      "add --compile, or leave it out")
    tag = config.run.tag
    if not re.fullmatch(r"\w[\w.-]*", tag):
        faults.append(f"--tag {tag!r} becomes a folder's name; use letters, digits, '.', '_' and '-'")
    return faults


def _batch_faults(train: TrainConfig) -> list[str]:
    """A global batch in tokens that whole sequences, or whole micro-batches, do not make."""
    if train.batch_tokens is None:
        return []
    faults = []
    for seq_len in dict.fromkeys(seq_len for _, seq_len in train.phases if seq_len >= 1):
        sequences = train.sequences(seq_len)
        if sequences < 1:
            faults.append(f"--batch-tokens {train.batch_tokens} is less than one sequence of {seq_len} tokens; "
                          f"give at least {seq_len}")
        elif train.batch_size and train.batch_size >= 1 and sequences % train.batch_size:
            faults.append(f"--batch-tokens {train.batch_tokens} makes {sequences} sequences of {seq_len} tokens, which "
                          f"--batch-size {train.batch_size} does not divide; leave --batch-size out, or give "
                          f"--batch-tokens {-(-sequences // train.batch_size) * train.batch_size * seq_len}")
    return faults


def _recompute_faults(train: TrainConfig, n_layers: int) -> list[str]:
    asked = train.grad_checkpoint
    if asked in ("auto", "none", "all") or asked.isdecimal() and int(asked) <= n_layers:
        return []
    return [f"--grad-checkpoint {asked}: wanted none, all, auto or a number of layers from 0 to {n_layers}"]


def _precision_faults(train: TrainConfig) -> list[str]:
    """Options that ask for other arithmetic than ``--precision``."""
    if train.precision is None:
        return []
    arithmetic = "bf16" if train.precision == "fp8" else train.precision
    others = []
    if train.param_dtype not in (None, "fp32", arithmetic):
        others.append(f"--param-dtype {train.param_dtype}")
    if train.amp_dtype not in (None, arithmetic):
        others.append(f"--amp-dtype {train.amp_dtype}")
    if train.amp and arithmetic == "fp32":
        others.append("--amp")
    if train.amp is False and train.param_dtype == "fp32" and arithmetic != "fp32":
        others.append("--no-amp")
    around = " around its fp8 products" if train.precision == "fp8" else ""
    return [f"--precision {train.precision} computes in {arithmetic}{around}, and {other} does not; "
            f"leave {other} out, or give the --precision that is meant" for other in others]


def _fp8_faults(config: Config) -> list[str]:
    """What the fp8 products of the blocks cannot be built from."""
    faults, train, model = [], config.train, config.model
    instead = "or use --precision bf16"
    if train.device == "mps":
        faults.append(f"--precision fp8 needs an NVIDIA GPU, and --device mps is none; use --device cuda, {instead}")
    for flag in ["--no-fused"] * (train.fused_blocks is False) + ["--compile"] * bool(train.compile):
        faults.append(f"--precision fp8 is computed by the fused blocks, and {flag} turns them off; "
                      f"leave {flag} out, {instead}")
    for _, seq_len in train.phases:
        rows, of = train.batch_size, f"--batch-size {train.batch_size}"
        if rows is None:  # whatever it will be, it divides a step
            rows = train.sequences(max(1, seq_len))
            of = f"a step of {rows} sequences"
        if (tokens := rows * seq_len) % FP8_MULTIPLE:
            faults.append(f"--precision fp8 needs the tokens of a micro-batch in a multiple of {FP8_MULTIPLE}, and "
                          f"{of} of {seq_len} tokens each makes {tokens}; change one of them, {instead}")
    if min(model.n_heads, model.n_kv_heads) < 1:
        return faults  # reported as out of range
    step = math.lcm(FP8_MULTIPLE, model.n_heads)
    widths = {"--d-model": model.d_model, "--d-ff": model.d_ff}
    if model.variant in _VARIANT_ONLY["attn_dim"]:
        widths["--attn-dim"] = model.attn_dim
    wrong = [f"{flag} {width} (use {max(1, round(width / step)) * step})" for flag, width in widths.items()
             if width % FP8_MULTIPLE]
    if sum(qkv_widths(model)) % FP8_MULTIPLE:
        wrong.append(f"queries, keys and values, {' + '.join(map(str, qkv_widths(model)))} wide together")
    if wrong:
        faults.append(f"--precision fp8 needs widths in multiples of {FP8_MULTIPLE}: not {'; nor '.join(wrong)}. "
                      f"Change them, {instead}")
    return faults
