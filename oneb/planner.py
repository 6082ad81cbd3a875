"""The plan of a run, before any GPU is touched: what it will train on, how large it is, what it needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from oneb import accounting
from oneb.config import Config, TrainConfig, compute_dtype, device_defaults
from oneb.gpus import Gpu
from oneb.schedules import Phases, format_seq_schedule, reached, tokens_before
from oneb.units import format_count, format_gib


@dataclass(frozen=True)
class Phase:
    """One phase of the sequence schedule, as far as the run gets into it."""

    seq_len: int
    first_step: int
    steps: int
    tokens_per_step: int
    tokens: int
    flops_per_token: float


@dataclass(frozen=True)
class Plan:
    """What the dry run shows and ``plan.json`` keeps."""

    name: str
    batch_sequences: int
    steps: int
    tokens: int
    seq_schedule: str
    phases: tuple[Phase, ...]
    parameters: int
    parameters_by_part: dict[str, int]
    kv_bytes_per_token: int
    memory_bytes: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain containers for ``plan.json``."""
        return asdict(self)


def make_plan(config: Config) -> Plan:
    """Work out the plan of a valid configuration (see :func:`oneb.presets.resolve`)."""
    model, train = config.model, config.train
    phases = _phases(config)
    resolved = replace(config, train=device_defaults(train, "cuda" if train.device == "auto" else train.device))
    parts = accounting.parameter_counts(model)
    return Plan(
        name=config.name,
        batch_sequences=train.batch_sequences,
        steps=train.steps,
        tokens=tokens_before(train.phases, train.steps, train.batch_sequences),
        seq_schedule=format_seq_schedule(train.phases),
        phases=phases,
        parameters=sum(parts.values()),
        parameters_by_part=parts,
        kv_bytes_per_token=accounting.kv_bytes_per_token(model),
        memory_bytes=memory_estimate(resolved, grad_checkpoint=bool(train.grad_checkpoint)),
    )


def _phases(config: Config) -> tuple[Phase, ...]:
    train = config.train
    starts: Phases = reached(train.phases, train.steps)
    ends = [start for start, _ in starts[1:]] + [train.steps]
    return tuple(
        Phase(
            seq_len=seq_len,
            first_step=start,
            steps=end - start,
            tokens_per_step=seq_len * train.batch_sequences,
            tokens=(end - start) * seq_len * train.batch_sequences,
            flops_per_token=accounting.flops_per_token(config.model, seq_len),
        )
        for (start, seq_len), end in zip(starts, ends, strict=True)
    )


def plan_lines(plan: Plan, config: Config) -> list[str]:
    """The plan as the dry run prints it."""
    lines = [
        f"[plan] global_batch={plan.batch_sequences} | steps={plan.steps} | "
        f"planned_tokens≈{plan.tokens / 1e9:.4g}B",
        f"[plan] seq_schedule={plan.seq_schedule}",
    ]
    for phase in plan.phases:
        lines.append(
            f"         steps {phase.first_step:,}-{phase.first_step + phase.steps - 1:,}: {phase.seq_len} tokens a "
            f"sequence, {phase.tokens_per_step:,} a step, {format_count(phase.tokens)} in all, "
            f"{phase.flops_per_token / 1e9:.3g} GFLOP a token"
        )
    lines += [
        f"         not reached: {seq_len} tokens from step {start:,} (the run ends at step {plan.steps:,})"
        for start, seq_len in config.train.phases
        if start >= plan.steps
    ]
    parts = ", ".join(f"{name} {format_count(count)}" for name, count in plan.parameters_by_part.items())
    memory = ", ".join(f"{name} {format_gib(size)}" for name, size in plan.memory_bytes.items())
    lines += [
        f"[plan] parameters={format_count(plan.parameters)} ({parts})",
        f"[plan] kv_cache={plan.kv_bytes_per_token:,} bytes a token ({config.model.variant}, 16-bit)",
        f"[plan] memory≈{format_gib(sum(plan.memory_bytes.values()))} ({memory})",
    ]
    return lines


def warnings(config: Config) -> list[str]:
    """What a practitioner would ask about a plan that can work."""
    notes = []
    longest = longest_seq_len(config.train)
    if longest < config.model.max_seq_len:
        notes.append(f"--block is {config.model.max_seq_len}, and the run never trains past {longest} tokens: "
                     "longer contexts will not be learned")
    return notes


def memory_estimate(config: Config, *, grad_checkpoint: bool) -> dict[str, int]:
    """GPU memory by part, in bytes, at the longest phase that the run reaches.

    ``config.train`` must have its device defaults filled in (:func:`oneb.config.device_defaults`).
    """
    train = config.train
    return accounting.memory_parts(
        config.model,
        optimizer=config.optim.optimizer,
        param_dtype=train.param_dtype,
        compute_dtype=compute_dtype(train),
        micro_batch_tokens=train.batch_size * longest_seq_len(train),
        grad_checkpoint=grad_checkpoint,
        fused=bool(train.fused_blocks),
        fp8=train.precision == "fp8",
    )


def longest_seq_len(train: TrainConfig) -> int:
    """The longest sequence that the run reaches, in tokens."""
    return max(seq_len for _, seq_len in reached(train.phases, train.steps))


def mfu(config: Config, tokens_per_s: float, seq_len: int, gpu: Gpu | None) -> float | None:
    """Model-FLOP utilisation at a sequence length; None on hardware whose peak is not known.

    Of the 16-bit peak, for fp8 runs too: so their figure compares with those of 16-bit ones, and may pass 1.
    """
    return gpu and tokens_per_s * accounting.flops_per_token(config.model, seq_len) / gpu.flops_16bit
