"""How a run fits into a GPU: micro-batch, recomputation and optimizer for each length of its schedule.

The global batch is never touched: a micro-batch divides the sequences of a step, so its gradient is the same. Where the
user gave a number it is obeyed, and whether it fits is said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from oneb.config import FP8_MULTIPLE, Config
from oneb.errors import OnebError
from oneb.memory import step_memory
from oneb.presets import SIZES, resolve
from oneb.schedules import format_seq_schedule, reached
from oneb.units import GIB, format_gib

# (seq_len, batch_size, grad_accum, recomputed_layers) -> predicted tokens a second.
Speed: TypeAlias = Callable[[int, int, int, int], float]

# More tokens at once gain nothing measurable (bench/results/growth_decoupled_h200.json: 92.4k tokens/s at 8192, 95k at
# 65536), and larger cards would only hold more of them.
USEFUL_TOKENS = 32768
# Where nobody counts memory, that is on the CPU and mps: two cores are as fast with 4 sequences of nano's 256 tokens as
# with 16, and larger models would take tens of GiB of the machine's memory for nothing.
USEFUL_TOKENS_UNCOUNTED = 1024
_LEAST_LENGTH = 128  # tokens; nobody is told to train on shorter sequences
_WORTH_A_TIP = 1.1  # times as fast
_EIGHT_BIT = {"lion": "lion8bit", "adamw": "adamw8bit"}


@dataclass(frozen=True)
class PhaseFit:
    """One length of the schedule.

    Attributes:
        seq_len: tokens a sequence.
        batch_size: sequences a micro-batch.
        grad_accum: micro-batches a step.
        recomputed_layers: the first so many blocks run again in the backward pass.
        memory: bytes by part at the peak (:func:`oneb.memory.step_memory`).
    """

    seq_len: int
    batch_size: int
    grad_accum: int
    recomputed_layers: int
    memory: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """All that the process takes at the peak of a step, its CUDA context included."""
        return sum(self.memory.values())

    def described(self) -> str:
        """As a sentence's part: "micro-batch 4 x 4, 7 layers recomputed"."""
        layers = self.recomputed_layers
        recomputed = f", {layers} layer{'s' * (layers > 1)} recomputed" if layers else ""
        return f"micro-batch {self.batch_size} x {self.grad_accum}{recomputed}"


@dataclass(frozen=True)
class Fit:
    """What was chosen for a run.

    Attributes:
        phases: one for each length that the run reaches, in the schedule's order.
        optimizer: "lion", "adamw", "lion8bit" or "adamw8bit".
        budget_bytes: all the memory that the process may take; None where nobody counts.
        notes: sentences for the user: what was chosen instead of what was asked, and why.
        config: the settled configuration that this is for.
    """

    phases: tuple[PhaseFit, ...]
    optimizer: str
    budget_bytes: int | None
    notes: tuple[str, ...]
    config: Config = field(repr=False)

    @property
    def peak_bytes(self) -> int:
        """The largest of the phases' peaks."""
        return max(phase.peak_bytes for phase in self.phases)

    @property
    def fits(self) -> bool:
        """Whether every phase's peak is within the budget."""
        return self.budget_bytes is None or self.peak_bytes <= self.budget_bytes

    @property
    def is_hopeless(self) -> bool:
        """Whether not to try: nothing that was left open makes it fit, or not even weights and state do.

        Numbers that the user gave are tried, as the prediction may be a little too high.
        """
        if self.fits:
            return False
        fixed = ("weights", "optimizer", "workspace", "context")
        return not _explicit(self.config) or any(
            sum(phase.memory[part] for part in fixed) > self.budget_bytes for phase in self.phases)

    def at(self, seq_len: int) -> PhaseFit:
        """What was chosen for sequences of ``seq_len`` tokens."""
        return next(phase for phase in self.phases if phase.seq_len == seq_len)

    def divisions(self) -> list[dict[str, int]]:
        """How each length's step is divided, as plain containers: what a checkpoint keeps for :meth:`divided_as`."""
        names = ("seq_len", "batch_size", "grad_accum")
        return [{name: getattr(phase, name) for name in names} for phase in self.phases]

    def divided_as(self, earlier: Sequence[Mapping[str, int]]) -> Fit:
        """This with the micro-batches of an earlier part of the run, where they are left open and still fit.

        Sums then have the same order as before, and a resumed run can be the same in every bit.
        """
        before = {entry["seq_len"]: entry for entry in earlier}
        train, phases = self.config.train, []
        for phase in self.phases:
            entry = before.get(phase.seq_len)
            if entry and train.batch_size is None and (
                    entry["batch_size"] * entry["grad_accum"] == train.sequences(phase.seq_len)):
                as_before = _least_recomputed(self.config, phase.seq_len, entry["batch_size"], self.budget_bytes,
                                              self.optimizer)
                if self.budget_bytes is None or as_before.peak_bytes <= self.budget_bytes:
                    phase = as_before
            phases.append(phase)
        changed = dataclasses.replace(self, phases=tuple(phases))
        return self if changed.phases == self.phases else dataclasses.replace(
            changed, notes=tuple(_batch_notes(changed, None)))

    def smaller(self, seq_len: int) -> Fit:
        """This with less memory at ``seq_len``, after it ran out: half the micro-batch, or else more recomputation.

        Raises:
            OnebError: it is one sequence with all layers recomputed already.
        """
        phase = self.at(seq_len)
        half = [n for n in _divisors(self.config, seq_len) if n <= phase.batch_size // 2]
        n_layers = self.config.model.n_layers
        if half:
            batch_size, layers = half[-1], phase.recomputed_layers
        elif phase.recomputed_layers < n_layers:
            batch_size = phase.batch_size
            layers = min(n_layers, max(2 * phase.recomputed_layers, -(-n_layers // 4)))
        else:
            raise OnebError(f"out of memory at {seq_len} tokens a sequence with {phase.described()}, and there is "
                            f"nothing less; end other processes that take memory, or {self._advice()}")
        new = _phase(self.config, seq_len, batch_size, layers, self.optimizer)
        return dataclasses.replace(self, phases=tuple(new if old is phase else old for old in self.phases))

    def _advice(self) -> str:
        limit = self.config.train.vram_limit_gib
        limited = limit is not None and self.budget_bytes == int(limit * GIB)
        more = f"give more than --vram-limit-gib {limit:g}" if limited else "use a GPU with more memory"
        return " or ".join([*_advice(self.config, self.optimizer, self.budget_bytes), more])


def fit(config: Config, budget_bytes: int | None, speed: Speed | None = None) -> Fit:
    """Choose what the configuration leaves open, so that the run fits and is fast.

    Args:
        config: settled (:func:`oneb.config.device_defaults`).
        budget_bytes: all the memory that the process may take; None where nobody counts (then nothing is recomputed,
            and micro-batches stay small).
        speed: which of the choices that fit is best; without it, least recomputation, then the largest micro-batch.

    Returns:
        The choice. If nothing fits it is the one that needs least, and the notes say what would help.
    """
    asked = config.optim.optimizer
    chosen = _with_optimizer(config, budget_bytes, speed, "lion" if asked == "auto" else asked)
    notes = []
    if asked == "auto" and not chosen.fits:
        wide, chosen = chosen, _with_optimizer(config, budget_bytes, speed, "lion8bit")
        notes.append(f"lion8bit keeps the optimizer's state in 8 bits: with lion a step needs at least "
                     f"{format_gib(wide.peak_bytes)}, more than the {format_gib(budget_bytes)} there are; "
                     f"so it takes {format_gib(chosen.peak_bytes)}")
    notes += _batch_notes(chosen, speed) if chosen.fits else [_does_not_fit(chosen)]
    if asked == "auto" and chosen.optimizer == "lion" and chosen.fits and speed:
        notes += _eight_bit_tip(chosen, speed)
    return dataclasses.replace(chosen, notes=tuple(notes))


def _with_optimizer(config: Config, budget_bytes: int | None, speed: Speed | None, optimizer: str) -> Fit:
    phases = tuple(_best(config, seq_len, budget_bytes, speed, optimizer) for seq_len in _lengths(config))
    return Fit(phases, optimizer, budget_bytes, (), config)


def _lengths(config: Config) -> list[int]:
    """The distinct lengths that the run reaches."""
    return list(dict.fromkeys(seq_len for _, seq_len in reached(config.train.phases, config.train.steps)))


def _divisors(config: Config, seq_len: int) -> list[int]:
    """Micro-batches that divide a step, rising; with fp8 only those whose tokens its products can sum over."""
    sequences = config.train.sequences(seq_len)
    step = FP8_MULTIPLE if config.train.precision == "fp8" else 1
    return [n for n in range(1, sequences + 1) if sequences % n == 0 and n * seq_len % step == 0]


def _candidates(config: Config, seq_len: int, most_tokens: int = USEFUL_TOKENS) -> list[int]:
    """Micro-batches worth trying, rising: the one that was asked for, or the useful ones."""
    if config.train.batch_size is not None:
        return [config.train.batch_size]
    divisors = _divisors(config, seq_len) or [config.train.sequences(seq_len)]
    return [n for n in divisors if n * seq_len <= most_tokens] or divisors[:1]


def _phase(config: Config, seq_len: int, batch_size: int, layers: int, optimizer: str) -> PhaseFit:
    memory = step_memory(config, seq_len, batch_size, layers, optimizer=optimizer)
    return PhaseFit(seq_len, batch_size, config.train.sequences(seq_len) // batch_size, layers, memory)


def _least_recomputed(
    config: Config, seq_len: int, batch_size: int, budget_bytes: int | None, optimizer: str
) -> PhaseFit:
    """A micro-batch with as few recomputed layers as fit, or with all of them if none do."""
    n_layers = config.model.n_layers
    asked = config.train.recomputed_layers(n_layers)
    if asked is not None or budget_bytes is None:
        return _phase(config, seq_len, batch_size, asked or 0, optimizer)
    low, high = 0, n_layers  # memory falls as layers are recomputed
    while low < high:
        middle = (low + high) // 2
        if _phase(config, seq_len, batch_size, middle, optimizer).peak_bytes <= budget_bytes:
            high = middle
        else:
            low = middle + 1
    return _phase(config, seq_len, batch_size, low, optimizer)


def _best(
    config: Config, seq_len: int, budget_bytes: int | None, speed: Speed | None, optimizer: str
) -> PhaseFit:
    if budget_bytes is None:
        largest = _candidates(config, seq_len, USEFUL_TOKENS_UNCOUNTED)[-1]
        return _least_recomputed(config, seq_len, largest, None, optimizer)
    phases = [_least_recomputed(config, seq_len, n, budget_bytes, optimizer) for n in _candidates(config, seq_len)]
    fitting = [phase for phase in phases if phase.peak_bytes <= budget_bytes]
    if not fitting:
        return min(phases, key=lambda phase: phase.peak_bytes)
    return max(fitting, key=lambda phase: (_rank(phase, speed), phase.batch_size))


def _rank(phase: PhaseFit, speed: Speed | None) -> float:
    if speed is None:
        return -phase.recomputed_layers
    return speed(phase.seq_len, phase.batch_size, phase.grad_accum, phase.recomputed_layers)


# ---- what the user is told


def _batch_notes(chosen: Fit, speed: Speed | None) -> Iterator[str]:
    """What became of each phase's batch where it was left open; equal choices in one sentence."""
    train, n_layers = chosen.config.train, chosen.config.model.n_layers
    said: dict[str, list[int]] = {}
    for phase in chosen.phases:
        parts = []
        sequences = phase.batch_size * phase.grad_accum
        if train.batch_size is None and phase.batch_size > 1:
            parts.append(f"micro-batch {phase.batch_size} x {phase.grad_accum} instead of 1 x {sequences}: "
                         f"the same {sequences} sequences a step{_gain(chosen, phase, speed)}")
        if train.recomputed_layers(n_layers) is None and phase.recomputed_layers:
            some = f"{phase.recomputed_layers} of" if phase.recomputed_layers < n_layers else "all"
            parts.append(f"the activations of {some} {n_layers} layers are recomputed, or it would not fit")
        if parts:
            said.setdefault("; ".join(parts), []).append(phase.seq_len)
    for text, lengths in said.items():
        yield f"at {' and '.join(map(str, lengths))} tokens: {text}"


def _eight_bit_tip(chosen: Fit, speed: Speed) -> Iterator[str]:
    """Where lion fits only by much recomputation: what lion8bit would gain. It changes the run, so it is not taken."""
    other = _with_optimizer(chosen.config, chosen.budget_bytes, speed, "lion8bit")
    gains = [_rank(new, speed) / _rank(old, speed) for new, old in zip(other.phases, chosen.phases, strict=True)]
    if min(gains) >= _WORTH_A_TIP:
        yield (f"--optimizer lion8bit would leave room for less recomputation: about {min(gains):.1f} times as fast, "
               "with state in 8 bits")


def _gain(chosen: Fit, phase: PhaseFit, speed: Speed | None) -> str:
    """How much faster than one sequence at a time, in words; nothing where that is not known or not much."""
    if speed is None:
        return ""
    single = _least_recomputed(chosen.config, phase.seq_len, 1, chosen.budget_bytes, chosen.optimizer)
    gain = _rank(phase, speed) / _rank(single, speed)
    return f", about {gain:.1f} times as fast" if gain >= 1.05 else ""


def _does_not_fit(chosen: Fit) -> str:
    worst = max(chosen.phases, key=lambda phase: phase.peak_bytes)
    missing = chosen.peak_bytes - chosen.budget_bytes
    return (f"does not fit: {worst.seq_len} tokens with {worst.described()} and {chosen.optimizer} need "
            f"{format_gib(worst.peak_bytes)}, {format_gib(missing)} more than the "
            f"{format_gib(chosen.budget_bytes)} there are; {chosen._advice()}")


def _advice(config: Config, optimizer: str, budget_bytes: int | None) -> list[str]:
    """Changes of which each alone makes the run fit, as the flags to give."""
    if budget_bytes is None:
        return []
    train = config.train
    explicit = " and ".join(_explicit(config))
    relaxed = _with_train(config, batch_size=None, grad_accum=train.grad_accum * (train.batch_size or 1),
                          grad_checkpoint="all")

    def fits(other: Config, kind: str) -> bool:
        return all(_phase(other, seq_len, _candidates(other, seq_len)[0], other.model.n_layers, kind).peak_bytes
                   <= budget_bytes for seq_len in _lengths(other))

    if explicit and fits(relaxed, optimizer):
        return [f"leave {explicit} to auto"]
    found = []
    eight_bit = _EIGHT_BIT.get(optimizer, optimizer)
    if eight_bit != optimizer and fits(relaxed, eight_bit):
        found.append(f"give --optimizer {eight_bit}")
    if train.param_dtype == "fp32" and train.amp and fits(_with_train(relaxed, param_dtype=train.amp_dtype), optimizer):
        found.append(f"give --param-dtype {train.amp_dtype}")
    if not found:  # what changes the run itself comes last
        kind = "" if config.optim.optimizer in ("auto", eight_bit) else f" --optimizer {eight_bit}"
        changes = [_shorter(relaxed, lambda other: fits(other, eight_bit)),
                   _narrower(relaxed, lambda other: fits(other, eight_bit))]
        found = [change + kind for change in changes if change]
    return [f"leave {explicit} to auto, and {change}" if explicit else change for change in found]


def _explicit(config: Config) -> list[str]:
    """The flags of what was not left to :func:`fit`."""
    train = config.train
    return (["--batch-size"] * (train.batch_size is not None)
            + ["--grad-checkpoint"] * (train.grad_checkpoint != "auto"))


def _with_train(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def _shorter(config: Config, fits: Callable[[Config], bool]) -> str | None:
    """The longest length, halved until it fits, that the schedule could end at."""
    length = max(_lengths(config)) // 2
    while length >= _LEAST_LENGTH:
        phases = tuple((start, min(seq_len, length)) for start, seq_len in config.train.phases)
        # A length that stays the same begins no phase.
        phases = tuple(p for i, p in enumerate(phases) if i == 0 or p[1] != phases[i - 1][1])
        if fits(_with_train(config, phases=phases)):
            return f"train at most {length} tokens a sequence with --seq-schedule {format_seq_schedule(phases)}"
        length //= 2
    return None


def _narrower(config: Config, fits: Callable[[Config], bool]) -> str | None:
    """The largest size that would fit."""
    model = config.model
    own = {"variant": model.variant, "null_attn": model.null_attn, "tie_qk": model.tie_qk, "rope": model.rope,
           "learned_temp": model.learned_temp, "vocab_size": model.vocab_size, "max_seq_len": model.max_seq_len,
           "phases": format_seq_schedule(config.train.phases)}
    for size in reversed(SIZES):
        other = resolve({**own, "size": size}).model
        smaller = other.d_model * other.n_layers < model.d_model * model.n_layers
        if smaller and fits(dataclasses.replace(config, model=other)):
            return f"choose --size {size}"
    return None
