"""What a run is: frozen dataclasses, one for each concern, every field with its unit and its flag.

Names on the command line are the user's (``--layers``), names here are the field's (``n_layers``);
``option`` is the one place that maps them. ``None`` means "decided later": by ``presets.resolve``
where other options decide it, by the trainer where the device does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from oneb.errors import OnebError
from oneb.schedules import LR_SCHEDULES, Phases
from oneb.units import parse_count

VARIANTS = ("decoupled", "baseline", "gqa", "gqa_kv2", "bottleneck")
# Tokenizers that a vocabulary implies when the data has no sidecar to say.
DEMO_DATA = "demo"
BYTE_VOCAB_SIZE = 257
GPT2_VOCAB_SIZE = 50257
PRECISIONS = ("bf16", "fp8", "fp16", "fp32")
# cuBLASLt's fp8 products take widths, and the backward pass tokens, in multiples of this.
FP8_MULTIPLE = 16
# The widest heads that our own attention kernel (oneb.kernels.narrow_attention) takes from cuDNN's and others'.
NARROW_HEAD_DIM = 32
# The widest that it takes where attention stays within documents.
DOCUMENT_HEAD_DIM = 128
OPTIMIZERS = ("lion", "adamw", "lion8bit", "adamw8bit")
# One unit of --eval-iters. Fixed in tokens, so that runs with other batches see the same text.
EVAL_ITER_TOKENS = 16384
DATA_FORMATS = ("npy", "bin", "raw", "pt", "txt", "auto")


def option(
    flag: str, help: str, default: Any = None, *, type: Callable[[str], Any] = str,
    choices: tuple[str, ...] | None = None, bare: str | None = None, negated: str | None = None,
) -> Any:
    """A dataclass field that is also a command-line option ``flag``.

    Args:
        type: what argparse makes of its text.
        bare: what the flag means without a value.
        negated: what ``--no-…`` means, where the option is no switch.
    """
    return field(default=default, metadata={"flag": flag, "help": help, "type": type, "choices": choices,
                                            "bare": bare, "negated": negated})


def whole_or_auto(text: str) -> int | None:
    """A whole number, or ``auto`` for None.

    Raises:
        OnebError: it is neither.
    """
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise OnebError(f"{text!r} is neither a whole number nor auto") from None


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer. Widths named ``*_dim`` are summed over all query heads.

    One description covers every variant. Each head's query and key have a semantic part without position
    (``sem_dim``; decoupled only) and a geometric part with RoPE (``geo_dim``); its value has
    ``attn_dim / n_heads`` entries. Keys and values have ``n_kv_heads`` heads.
    """

    variant: str = option("--variant", "attention variant", "decoupled", choices=VARIANTS)
    vocab_size: int = option("--vocab-size", "tokens in the vocabulary", GPT2_VOCAB_SIZE, type=int)
    d_model: int = option("--d-model", "width of the residual stream", 2048, type=int)
    n_layers: int = option("--layers", "transformer blocks", 22, type=int)
    n_heads: int = option("--n-head", "query heads", 32, type=int)
    n_kv_heads: int = option("--kv-head", "key/value heads; gqa only (default n_heads/4, gqa_kv2: 2)", 32, type=int)
    d_ff: int = option("--d-ff", "hidden width of the SwiGLU feed-forward", 5632, type=int)
    max_seq_len: int = option("--block", "longest context, in tokens", 2048, type=int)
    sem_dim: int = option(
        "--sem-dim", "query/key width without RoPE; decoupled only (default d_model/16)", 128, type=int
    )
    geo_dim: int = option("--geo-dim", "query/key width with RoPE; decoupled only (default d_model/8)", 256, type=int)
    attn_dim: int = option(
        "--attn-dim", "attention width; bottleneck (default 3/16 d_model), decoupled (sem+geo)", 384, type=int
    )
    null_attn: bool = option("--null-attn", "let queries also attend to one learned null key/value", False, type=bool)
    tie_qk: bool = option("--tie-qk", "one projection for queries and keys", False, type=bool)
    rope: bool = option("--rope", "rotary position embedding on the geometric part", True, type=bool)
    learned_temp: bool = option("--learned-temp", "learned temperature exp(s) for each head's scores", True, type=bool)

    @property
    def sem_head_dim(self) -> int:
        """Query/key entries a head without position."""
        return self.sem_dim // self.n_heads

    @property
    def geo_head_dim(self) -> int:
        """Query/key entries a head with RoPE."""
        return self.geo_dim // self.n_heads

    @property
    def qk_head_dim(self) -> int:
        """Query/key entries a head."""
        return self.sem_head_dim + self.geo_head_dim

    @property
    def v_head_dim(self) -> int:
        """Value entries a head."""
        return self.attn_dim // self.n_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding as stored: a multiple of 128, so that the head's GEMM tiles are whole."""
        return -(-self.vocab_size // 128) * 128


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and the learning rate over the run."""

    optimizer: str = option("--optimizer", "optimizer; 8bit: its state in 8 bits; auto: lion, or lion8bit where lion's "
                            "state would not fit", "auto", choices=("auto", *OPTIMIZERS))
    lr: float = option("--lr", "peak learning rate", 2e-4, type=float)
    weight_decay: float | None = option(
        "--weight-decay", "decoupled weight decay (default lion 0.5, adamw 0.1)", type=float
    )
    warmup_steps: int | None = option(
        "--warmup-steps", "linear warm-up, in steps (default 2% of the run, at most 2000)", type=int
    )
    lr_schedule: str = option("--lr-schedule", "shape of the rate after warm-up", "cosine", choices=LR_SCHEDULES)
    min_lr: float | None = option("--min-lr", "rate at the last step (default lr/10)", type=float)
    grad_clip: float = option("--grad-clip", "largest global gradient norm; 0 = no clipping", 1.0, type=float)
    fused: bool = option("--opt-fused", "one-pass fused optimizer kernel (CUDA)", True, type=bool)

    @property
    def betas(self) -> tuple[float, float]:
        """Lion: Chen et al. 2023 (arXiv 2302.06675), section 4.1 for language models; AdamW: as GPT-3."""
        return (0.9, 0.95) if self.is_adamw else (0.95, 0.98)

    @property
    def is_adamw(self) -> bool:
        """Whether it is of AdamW's family, and not of Lion's."""
        return self.optimizer.startswith("adamw")

    @property
    def eps(self) -> float:
        """AdamW's epsilon (Brown et al. 2020, arXiv 2005.14165, appendix B); Lion has none."""
        return 1e-8


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from."""

    path: str = option("--data", "token file, folder or glob; or a name, such as fineweb-edu:1B: downloaded while "
                       "the run trains; 'demo' needs no file", "fineweb_1b.npy")
    format: str = option(
        "--data-format", "how tokens are stored", "npy", choices=DATA_FORMATS
    )
    data_root: str = option("--data-root", "folder for data that --data names", "data")
    doc_mask: bool = option("--doc-mask", "keep attention within documents, RoPE counting from each one's start; "
                            "training and evaluation alike", False, type=bool)


@dataclass(frozen=True)
class TrainConfig:
    """The steps: how many, how large, in what arithmetic, on what device."""

    steps: int = option("--steps", "optimizer steps", 20000, type=int)
    batch_size: int | None = option("--batch-size", "sequences a micro-batch; auto: of a step's --grad-accum "
                                    "sequences, as many at once as fit and pay (default auto)", type=whole_or_auto)
    grad_accum: int = option("--grad-accum", "micro-batches a step; with --batch-size auto, sequences a step", 16,
                             type=int)
    batch_tokens: int | None = option("--batch-tokens", "tokens a step, e.g. 512K, the same at every length of the "
                                      "schedule (default: --batch-size x --grad-accum sequences)", type=parse_count)
    phases: Phases = option("--seq-schedule", "training lengths as LENGTH@STEP,…", ((0, 1024), (10000, 2048)))
    eval_every: int = option("--eval-every", "steps between evaluations; 0 = only at the end", 500, type=int)
    eval_iters: int = option("--eval-iters", "size of an evaluation, in units of 16384 tokens", 10, type=int)
    seed: int = option("--seed", "seed of initialisation, data order and rounding", 1337, type=int)
    device: str = option("--device", "where to train; auto: cuda, then mps, then cpu", "cuda",
                         choices=("cuda", "mps", "cpu", "auto"))
    precision: str | None = option("--precision", "arithmetic of the matrix products, where --param-dtype, --amp and "
                                   "--amp-dtype leave it open; fp8: products of the blocks in fp8, the rest as bf16 "
                                   "(default bf16 on cuda, fp16 on a GPU without it, else fp32)", choices=PRECISIONS)
    param_dtype: str | None = option("--param-dtype", "weights; 16-bit ones are rounded stochastically "
                              "(default bf16 on cuda, else fp32)", choices=("bf16", "fp32", "fp16"))
    amp: bool | None = option("--amp", "compute in --amp-dtype where weights are fp32 (default: on cuda)", type=bool)
    amp_dtype: str | None = option("--amp-dtype", "arithmetic of mixed precision (default fp16 with fp16 weights, "
                            "else bf16)", choices=("bf16", "fp16"))
    grad_checkpoint: str = option("--grad-checkpoint", "layers whose activations are recomputed in the backward pass: "
                                  "none, all, a number of them, or auto: the fewest that fit", "auto",
                                  bare="all", negated="none")
    vram_limit_gib: float | None = option("--vram-limit-gib", "GPU memory that the run may take, all of it counted "
                                          "(default: what is free)", type=float)
    deterministic: bool = option("--deterministic", "bitwise repeatable on one kind of GPU, resumed or not; slower "
                                 "(attention whose sums have a fixed order)", False, type=bool)
    fused_blocks: bool | None = option("--fused", "run the blocks by the hand-fused kernels (default: on cuda)",
                                       type=bool)
    compile: bool | None = option("--compile", "torch.compile the blocks instead (default: on cuda with --no-fused)",
                                  type=bool)
    compile_mode: str = option("--compile-mode", "torch.compile mode", "default",
                               choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"))
    spike_zscore: float = option("--spike-zscore", "roll back where the loss stays so many robust standard deviations "
                                 "above its recent median; 0 = off", 10.0, type=float)
    max_rollbacks: int = option("--max-rollbacks", "times that the run may go back to its last good checkpoint, past "
                                "the data at which loss or gradients went wrong; then it stops", 3, type=int)

    def sequences(self, seq_len: int) -> int:
        """Sequences an optimizer step (the global batch) where sequences are ``seq_len`` tokens long."""
        if self.batch_tokens is not None:
            return self.batch_tokens // seq_len
        return (self.batch_size or 1) * self.grad_accum

    def recomputed_layers(self, n_layers: int) -> int | None:
        """Layers whose activations are recomputed, of ``n_layers``; None where ``--grad-checkpoint`` leaves it open."""
        named = {"auto": None, "none": 0, "all": n_layers}
        return named[self.grad_checkpoint] if self.grad_checkpoint in named else int(self.grad_checkpoint)


@dataclass(frozen=True)
class RunConfig:
    """Where a run writes, what it saves and how it continues."""

    root: str = option("--run-root", "folder that holds the runs", "runs")
    tag: str = option("--tag", "first part of the run's name", "oneb")
    if_exists: str = option("--if-exists", "what to do when the run directory is there already", "suffix",
                            choices=("suffix", "skip", "error", "resume"))
    save_every: int = option("--save-every", "steps between step*.pt checkpoints; 0 = only at the end", 0, type=int)
    save_minutes: float = option("--save-minutes", "minutes between saves of last.pt; 0 = off", 15.0, type=float)
    keep_last: int = option("--keep-last", "newest step*.pt that are kept; 0 = all", 0, type=int)
    save_to: str | None = option("--save-to", "second place for checkpoints, copied there in the background and "
                                 "read back: a folder (a mounted drive) or s3://bucket/folder")
    save_optim: bool = option("--save-optim", "optimizer state in last.pt and step*.pt, to resume", True, type=bool)
    ckpt: str | None = option("--ckpt", "checkpoint to start from (weights only, or all of it with --resume)")
    resume: bool = option("--resume", "continue --ckpt, or the run's newest checkpoint, exactly", False, type=bool)
    allow_change: bool = option("--allow-change", "let --resume continue with options that change the result", False,
                                type=bool)
    price: float | None = option("--price", "dollars an hour of the machine: plan and summary then show what the run "
                                 "costs", type=float)


@dataclass(frozen=True)
class LogConfig:
    """What a run tells, to whom and how often."""

    log_every: int = option("--log-every", "steps between log rows", 20, type=int)
    instrument: str = option("--instrument", "detail of analysis rows: off; basic: norms by part; "
                             "medium: by layer; full: also attention entropy", "basic",
                             choices=("off", "basic", "medium", "full"))
    analysis_every: int = option("--analysis-every", "steps between analysis rows; 0 = none", 0, type=int)
    live: str = option("--live", "display: a progress line (auto), plain lines, a rich dashboard", "auto",
                       choices=("auto", "off", "basic", "rich"))
    tensorboard: bool = option("--tensorboard", "log to TensorBoard, into the run directory", False, type=bool)
    wandb: bool = option("--wandb", "log to Weights & Biases", False, type=bool)
    wandb_project: str = option("--wandb-project", "W&B project", "oneb")
    wandb_entity: str | None = option("--wandb-entity", "W&B user or team")
    wandb_name: str | None = option("--wandb-name", "W&B run name (default: the run directory's)")
    wandb_group: str | None = option("--wandb-group", "W&B group")
    wandb_tags: str | None = option("--wandb-tags", "W&B tags, comma-separated")
    wandb_mode: str = option("--wandb-mode", "W&B mode", "online", choices=("online", "offline", "disabled"))
    wandb_id: str | None = option("--wandb-id", "W&B run id to continue (default: kept in the run directory)")


@dataclass(frozen=True)
class Config:
    """A whole run. ``config.json`` is this, as nested objects."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def name(self) -> str:
        """Name of the run directory, before any suffix."""
        return f"{self.run.tag}_{self.model.variant}_seed{self.train.seed}"

    def to_dict(self) -> dict[str, Any]:
        """Nested plain containers, as written to ``config.json`` and into checkpoints."""
        return dataclasses.asdict(self)


def sections() -> dict[str, type]:
    """Section name -> dataclass, in the order that the command line and the help show them."""
    return {"model": ModelConfig, "optim": OptimConfig, "data": DataConfig, "train": TrainConfig,
            "run": RunConfig, "log": LogConfig}


def model_from_dict(values: dict[str, Any]) -> ModelConfig:
    """The model section of a ``config.json`` or checkpoint.

    Raises:
        OnebError: its fields are not those of this version.
    """
    other = set(values) ^ {field.name for field in dataclasses.fields(ModelConfig)}
    if other:
        raise OnebError(f"the model was saved by another version of oneb: it and this one differ in the fields "
                        f"{', '.join(sorted(other))}; use the version that saved it")
    return ModelConfig(**values)


def model_differences(saved: ModelConfig, wanted: ModelConfig) -> list[str]:
    """Fields in which two models differ so that weights of one do not fit (or mean something else in) the other.

    ``max_seq_len`` is left out: RoPE has no weights, and extending the context is a thing people do.
    """
    return [
        f"{f.metadata['flag']} is {getattr(wanted, f.name)}, the checkpoint has {getattr(saved, f.name)}"
        for f in dataclasses.fields(ModelConfig)
        if f.name != "max_seq_len" and getattr(saved, f.name) != getattr(wanted, f.name)
    ]


def device_defaults(
    config: TrainConfig, device: str, has_bf16: bool = True, has_triton: bool = True
) -> TrainConfig:
    """Fill in what only the device decides: the precision and its parts, ``fused_blocks`` and ``compile``.

    A GPU without bf16 arithmetic (T4, V100) gets fp16 wherever bf16 was asked for or implied. Afterwards ``precision``
    says what the blocks' products are computed in. Without Triton neither kernels nor ``torch.compile`` work on a GPU.
    """
    half = "bf16" if has_bf16 else "fp16"
    fp8 = config.precision == "fp8"
    asked = "bf16" if fp8 else config.precision
    param_dtype = config.param_dtype or asked or (half if device == "cuda" else "fp32")
    if param_dtype == "bf16":
        param_dtype = half
    amp_dtype = config.amp_dtype or (asked if asked in ("bf16", "fp16") else "fp16" if param_dtype == "fp16" else half)
    if amp_dtype == "bf16":
        amp_dtype = half
    # On the CPU and mps, fp32 compute unless asked: 16-bit is slower there.
    amp = config.amp
    if amp is None:
        amp = asked != "fp32" if asked else device == "cuda" or config.amp_dtype is not None
    fused = config.fused_blocks
    if fused is None:  # fp8 products exist in the fused blocks only
        fused = fp8 or device == "cuda" and has_triton and not config.compile
    compiled = config.compile if config.compile is not None else device == "cuda" and has_triton and not fused
    settled = dataclasses.replace(config, param_dtype=param_dtype, amp_dtype=amp_dtype, amp=amp, fused_blocks=fused,
                                  compile=compiled)
    return dataclasses.replace(settled, precision="fp8" if fp8 else compute_dtype(settled))


def compute_dtype(config: TrainConfig) -> str:
    """Arithmetic of everything but fp8 products, once :func:`device_defaults` has run."""
    if config.param_dtype != "fp32":
        return config.param_dtype
    return config.amp_dtype if config.amp else "fp32"
