"""The plan of a run, before any GPU is touched: what it trains on, what it needs, how long it takes, what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from oneb import accounting
from oneb import fit as fitting
from oneb.config import Config, TrainConfig, device_defaults
from oneb.fit import Fit
from oneb.gpus import Gpu
from oneb.memory import state_bytes
from oneb.roofline import table_speed
from oneb.schedules import Phases, format_seq_schedule, reached, tokens_before
from oneb.units import GIB

# Of a run's time, what is set aside for its start, evaluations and saves. Evaluations with the default options are
# 0.7% of the work (every 500 steps of 16K tokens, 160K tokens forward); the rest is a round guess, not a measurement.
ASIDE_SHARE = 0.02


@dataclass(frozen=True)
class Phase:
    """One phase of the sequence schedule, as far as the run gets into it.

    Attributes:
        seq_len: tokens a sequence.
        sequences: sequences a step.
        flops_per_token: as :func:`oneb.accounting.flops_per_token`.
        batch_size: sequences a micro-batch; None, like the next three, where no fit was made.
        grad_accum: micro-batches a step.
        recomputed_layers: layers whose activations are recomputed.
        memory_bytes: peak GPU memory by part.
        tok_s: tokens a second; None where the GPU is not known.
    """

    seq_len: int
    first_step: int
    steps: int
    sequences: int
    tokens_per_step: int
    tokens: int
    flops_per_token: float
    batch_size: int | None = None
    grad_accum: int | None = None
    recomputed_layers: int | None = None
    memory_bytes: dict[str, int] | None = None
    tok_s: float | None = None

    @property
    def seconds(self) -> float | None:
        """What its steps take; None without a speed."""
        return self.tokens / self.tok_s if self.tok_s else None

    @property
    def peak_bytes(self) -> int | None:
        """Peak GPU memory of the process."""
        return sum(self.memory_bytes.values()) if self.memory_bytes else None


@dataclass(frozen=True)
class Disk:
    """What the run's checkpoints take.

    Attributes:
        last_bytes: a ``last.pt`` or ``step*.pt``: weights, and the optimizer's state unless ``--no-save-optim``.
        best_bytes: ``best.pt``, weights only.
        step_files: how many ``step*.pt`` there will be at the end; ``last.pt`` is one file with the newest that is its
            like.
        total_bytes: all of them, and a ``last.pt`` more: a new one is whole before the old one goes.
    """

    last_bytes: int
    best_bytes: int
    step_files: int
    total_bytes: int


@dataclass(frozen=True)
class Plan:
    """What the dry run shows and ``plan.json`` keeps.

    Attributes:
        gpu: the table's key of the GPU that it is for.
        budget_bytes: GPU memory that the run may take.
        fits: whether every phase stays within it; None where that is not known.
        speed_source: "expected" (of a card that was measured), "estimated" (of another), "measured" (now, here).
        price: dollars an hour.
        price_source: whose price it is, if it is the GPU table's approximate one and not the user's.
    """

    name: str
    variant: str
    steps: int
    tokens: int
    seq_schedule: str
    phases: tuple[Phase, ...]
    parameters: int
    parameters_by_part: dict[str, int]
    n_layers: int
    kv_bytes_per_token: int
    optimizer: str
    disk: Disk
    gpu: str | None = None
    budget_bytes: int | None = None
    fits: bool | None = None
    speed_source: str | None = None
    price: float | None = None
    price_source: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float | None:
        """The whole run, with :data:`ASIDE_SHARE` set aside; None without a speed for every phase."""
        seconds = [phase.seconds for phase in self.phases]
        return None if None in seconds else sum(seconds) / (1 - ASIDE_SHARE)

    @property
    def dollars(self) -> float | None:
        """What that costs; None without a price or a speed."""
        return self.cost(self.seconds)

    @property
    def peak_bytes(self) -> int | None:
        """Peak GPU memory over all phases."""
        peaks = [phase.peak_bytes for phase in self.phases]
        return None if None in peaks else max(peaks)

    @property
    def tok_s(self) -> float | None:
        """Mean tokens a second of all steps."""
        seconds = [phase.seconds for phase in self.phases]
        return None if None in seconds else self.tokens / sum(seconds)

    def cost(self, seconds: float | None) -> float | None:
        """Dollars that ``seconds`` cost."""
        return None if seconds is None or self.price is None else seconds / 3600 * self.price

    def measured(self, tok_s: Mapping[int, float]) -> Plan:
        """The plan with speeds that were measured, by sequence length, in place of the expected ones."""
        phases = tuple(replace(phase, tok_s=tok_s.get(phase.seq_len, phase.tok_s)) for phase in self.phases)
        return replace(self, phases=phases, speed_source="measured")

    def after(self, step: int) -> Plan:
        """What is left of the plan after ``step`` steps: phases, steps, tokens, and with them time and money."""
        left = []
        for phase in self.phases:
            first = max(step, phase.first_step)
            if (steps := phase.first_step + phase.steps - first) > 0:
                left.append(replace(phase, first_step=first, steps=steps, tokens=steps * phase.tokens_per_step))
        return replace(self, phases=tuple(left), steps=max(0, self.steps - step),
                       tokens=sum(phase.tokens for phase in left))

    def to_dict(self) -> dict[str, Any]:
        """Plain containers for ``plan.json``."""
        values = asdict(self)
        for phase, found in zip(self.phases, values["phases"], strict=True):
            found |= {"peak_bytes": phase.peak_bytes, "seconds": phase.seconds, "dollars": self.cost(phase.seconds)}
        return values | {"peak_bytes": self.peak_bytes, "seconds": self.seconds, "dollars": self.dollars}


def make_plan(config: Config, *, gpu: Gpu | None = None, fit: Fit | None = None, price: float | None = None) -> Plan:
    """Work out the plan of a valid configuration (see :func:`oneb.presets.resolve`).

    Args:
        gpu: the GPU that it is for; without it there are no speeds.
        fit: what :func:`fit_to` chose for it; without it there are no micro-batches and no memory.
        price: dollars an hour; else ``--price``, else the GPU table's approximate one.
    """
    whole = settled(config, gpu)
    # Left open, and nothing measured against: the one that is tried first.
    open_choice = "lion" if config.optim.optimizer == "auto" else config.optim.optimizer
    whole = replace(whole, optim=replace(whole.optim, optimizer=fit.optimizer if fit else open_choice))
    parts = accounting.parameter_counts(config.model)
    train = config.train
    given = price if price is not None else config.run.price
    return Plan(
        name=config.name,
        variant=config.model.variant,
        steps=train.steps,
        tokens=tokens_before(train.phases, train.steps, train.sequences),
        seq_schedule=format_seq_schedule(train.phases),
        phases=_phases(whole, gpu, fit),
        parameters=sum(parts.values()),
        parameters_by_part=parts,
        n_layers=config.model.n_layers,
        kv_bytes_per_token=accounting.kv_bytes_per_token(config.model),
        optimizer=whole.optim.optimizer,
        disk=disk_use(whole),
        gpu=gpu.key if gpu else None,
        budget_bytes=fit.budget_bytes if fit else None,
        fits=fit.fits if fit and fit.budget_bytes is not None else None,
        speed_source=("expected" if gpu.measured else "estimated") if gpu and fit else None,
        price=given if given is not None or gpu is None else gpu.price_per_hour,
        price_source=gpu.price_source if given is None and gpu else None,
        notes=fit.notes if fit else (),
    )


def settled(config: Config, gpu: Gpu | None = None) -> Config:
    """``config`` with what the device decides filled in, as it will be on ``gpu`` or on ``--device``."""
    device = "cuda" if gpu or config.train.device == "auto" else config.train.device
    return replace(config, train=device_defaults(config.train, device, has_bf16=gpu is None or gpu.has_bf16))


def fit_to(config: Config, gpu: Gpu | None, budget_bytes: int | None) -> Fit:
    """Micro-batches, recomputation and optimizer for a GPU.

    Args:
        gpu: the table's entry; None for a card that is not in it, whose speed nobody knows.
        budget_bytes: what it has; ``--vram-limit-gib`` may allow less.
    """
    whole = settled(config, gpu)
    limit = config.train.vram_limit_gib
    if limit is not None:
        budget_bytes = min(int(limit * GIB), budget_bytes or int(limit * GIB))
    return fitting.fit(whole, budget_bytes, table_speed(whole, gpu) if gpu else None)


def _phases(config: Config, gpu: Gpu | None, fit: Fit | None) -> tuple[Phase, ...]:
    train = config.train
    starts: Phases = reached(train.phases, train.steps)
    ends = [start for start, _ in starts[1:]] + [train.steps]
    speed = table_speed(config, gpu) if gpu and fit else None
    phases = []
    for (start, seq_len), end in zip(starts, ends, strict=True):
        per_step = seq_len * train.sequences(seq_len)
        chosen: dict[str, Any] = {}
        if fit:
            found = fit.at(seq_len)
            chosen = {"batch_size": found.batch_size, "grad_accum": found.grad_accum,
                      "recomputed_layers": found.recomputed_layers, "memory_bytes": dict(found.memory)}
            if speed:
                chosen["tok_s"] = speed(seq_len, found.batch_size, found.grad_accum, found.recomputed_layers)
        phases.append(Phase(
            seq_len=seq_len, first_step=start, steps=end - start, sequences=train.sequences(seq_len),
            tokens_per_step=per_step, tokens=(end - start) * per_step,
            flops_per_token=accounting.flops_per_token(config.model, seq_len, config.data.doc_mask), **chosen,
        ))
    return tuple(phases)


def disk_use(config: Config) -> Disk:
    """What the checkpoints of a run with a settled configuration take (:mod:`oneb.checkpoints.checkpoint`)."""
    model, train, run = config.model, config.train, config.run
    padding = (model.padded_vocab_size - model.vocab_size) * model.d_model  # stored, and counted nowhere
    stored = sum(accounting.parameter_counts(model).values()) + padding
    weights = stored * accounting.BYTES[train.param_dtype]
    last = weights + (state_bytes(model, config.optim.optimizer) if run.save_optim else 0)
    saved = train.steps // run.save_every if run.save_every else 0
    files = min(saved, run.keep_last) if run.keep_last > 0 else saved
    # Once all are saved, last.pt is a file of its own unless the last step was one to save at. Where some are removed
    # it may be one at every save: --save-minutes made it, and the next step*.pt is whole before one goes.
    own_last = saved > files or not run.save_every or train.steps % run.save_every > 0
    return Disk(last, weights, files, (files + own_last + 1) * last + weights)


def seconds_before(phases: Phases, step: int, step_seconds: Callable[[int], float]) -> float:
    """What steps ``0 .. step - 1`` take, where one at ``seq_len`` tokens takes ``step_seconds(seq_len)``."""
    ends = [start for start, _ in phases[1:]] + [step]
    return sum(max(0, min(end, step) - start) * step_seconds(seq_len)
               for (start, seq_len), end in zip(phases, ends, strict=True))


def steps_for_seconds(phases: Phases, seconds: float, step_seconds: Callable[[int], float]) -> int:
    """The most steps whose :func:`seconds_before` is within ``seconds``; 0 where not even the first is."""
    steps = 0
    for (start, seq_len), (end, _) in zip(phases, (*phases[1:], (math.inf, 0)), strict=True):
        left = seconds - seconds_before(phases, start, step_seconds)
        if left < 0:
            break
        steps = min(end, start + int(left / step_seconds(seq_len)))
    # The division is rounded.
    while steps and seconds_before(phases, steps, step_seconds) > seconds:
        steps -= 1
    while seconds_before(phases, steps + 1, step_seconds) <= seconds:
        steps += 1
    return steps


def longest_seq_len(train: TrainConfig) -> int:
    """The longest sequence that the run reaches, in tokens."""
    return max(seq_len for _, seq_len in reached(train.phases, train.steps))


def mfu(config: Config, tokens_per_s: float, seq_len: int, gpu: Gpu | None) -> float | None:
    """Model-FLOP utilisation at a sequence length; None on hardware whose peak is not known.

    Of the 16-bit peak, for fp8 runs too: so their figure compares with those of 16-bit ones, and may pass 1.
    """
    flops = accounting.flops_per_token(config.model, seq_len, config.data.doc_mask)
    return gpu and tokens_per_s * flops / gpu.flops_16bit
