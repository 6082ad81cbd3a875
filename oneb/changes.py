"""What a resumed run does otherwise than the run that it continues, and whether that changes its result.

No torch: the launcher asks before anything is started. The learning rate is compared as the function of the step that
it is, the batch by its sequences: other options that come to the same are no change.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneb.config import Config, TrainConfig, compute_dtype, sections
from oneb.schedules import LR_SCHEDULES, format_seq_schedule, lr_at, reached

Options = Mapping[str, Mapping[str, Any]]

# Where this process starts, and not what the run is.
_NOT_COMPARED = {"run.root", "run.tag", "run.if_exists", "run.ckpt", "run.resume", "run.allow_change"}
# Options, or sections of them, that change nothing about what is computed from a given step on.
_HARMLESS = {
    "run", "log", "data.path", "data.format", "data.data_root", "train.eval_every", "train.eval_iters",
    "train.grad_checkpoint", "train.vram_limit_gib", "train.spike_zscore", "train.max_rollbacks", "model.max_seq_len",
}
# The same in exact arithmetic.
_ROUNDING = {"train.device", "train.fused_blocks", "train.compile", "train.compile_mode", "train.deterministic",
             "optim.fused"}
_ARITHMETIC = ("precision", "param_dtype", "amp", "amp_dtype")
# Decided by the device where they are not given.
_OPEN = {"train.fused_blocks", "train.compile", *(f"train.{name}" for name in _ARITHMETIC)}
_LR = {"schedule": "optim.lr_schedule", "peak_lr": "optim.lr", "min_lr": "optim.min_lr",
       "warmup_steps": "optim.warmup_steps", "steps": "train.steps"}
_BATCH = ("train.batch_size", "train.grad_accum", "train.batch_tokens")
# Rates of longer runs are compared at about so many steps.
_COMPARED_STEPS = 4096
_LONGEST_TEXT, _LONGEST_SHOWN = 4096, 80
_MOST_PHASES = 10_000


@dataclass(frozen=True)
class Change:
    """One thing that is not as it was.

    Attributes:
        flag: the option, or what else it is that changed.
        saved, now: its value in the run that is continued and in this one, for people.
        matters: the result is another.
        rounds: the result is the same but for the order or the precision of sums, so not the same in every bit.
        possible: ``--allow-change`` can allow it.
    """

    flag: str
    saved: str
    now: str
    matters: bool
    rounds: bool = False
    possible: bool = True

    def __str__(self) -> str:
        return f"{self.flag}: {self.saved} -> {self.now}"


def changes(saved: Options, now: Config, step: int, *, has_bf16: bool | None = None) -> list[Change]:
    """The options in which a run differs from the one that it continues at ``step``, in the order of the help.

    The model's shape is compared elsewhere (:func:`oneb.config.model_differences`): weights fit or they do not.

    Args:
        saved: by section, from :func:`known_options`; what an earlier version did not save is not compared.
        has_bf16: whether the device can compute in bf16, if ``now`` has been settled for it; None before that.
    """
    before, after = _with_precision(saved), now.to_dict()
    alike = _HARMLESS | _ROUNDING | _same_options(before, after, step)
    found = []
    for section, cls in sections().items():
        for field in dataclasses.fields(cls):
            name = f"{section}.{field.name}"
            if not _is_compared(section, name) or field.name not in before.get(section, {}):
                continue
            old, new = _plain(before[section][field.name]), _plain(after[section][field.name])
            if old == new or new is None and name in _OPEN:
                continue
            half = name in _OPEN and {old, new} == {"bf16", "fp16"}
            if half and has_bf16 is None and new == "bf16":
                continue  # a GPU without bf16 makes it fp16 again, another one does not: known once it is settled
            forced = half and has_bf16 is False
            found.append(Change(
                field.metadata["flag"], shown(old), shown(new), matters=not (forced or {section, name} & alike),
                rounds=forced or name in _ROUNDING or name in _BATCH, possible=name != "optim.optimizer"))
    return found


def _is_compared(section: str, name: str) -> bool:
    return name not in _NOT_COMPARED and (section != "model" or name in _HARMLESS)


def as_before(config: Config, saved: Options) -> Config:
    """``config`` with the arithmetic of the run that it continues, where it asks for none of its own.

    What the device decides would otherwise be decided anew on another one.
    """
    before = {name: saved.get("train", {}).get(name) for name in _ARITHMETIC}
    for name, value in before.items():
        field = TrainConfig.__dataclass_fields__[name]
        asked = getattr(config.train, name)
        if value not in (field.metadata["choices"] or (True, False)) or asked not in (None, value):
            return config
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **before))


def refusal(found: Iterable[Change], checkpoint: Path, allow_change: bool) -> str:
    """Why ``checkpoint`` is not continued, all of it; empty if nothing speaks against it."""
    refused = [change for change in found if change.matters and not (allow_change and change.possible)]
    if not refused:
        return ""
    lines = "".join(f"\n  {change}" for change in refused)
    if all(change.possible for change in refused):
        advice = "Give the run's own options, or add --allow-change to continue with these"
    else:
        advice = ("Give the run's own options (its optimizer's state is of use to no other), or leave out --resume and "
                  f"give --ckpt {checkpoint} to start a new run from its weights")
    return f"{checkpoint} would be continued with options that change the result (saved -> now):{lines}\n{advice}"


def notes(found: Iterable[Change]) -> list[str]:
    """What is said of changes that were not refused: a sentence for each kind."""
    found = list(found)
    kinds = (
        ("--allow-change: the result is another than that of the run that is continued", lambda c: c.matters),
        ("from here on no longer bitwise what the run that is continued would have been: sums are rounded otherwise",
         lambda c: c.rounds and not c.matters),
        ("not as in the run that is continued, without effect on its result", lambda c: not c.rounds and not c.matters),
    )
    told = [(text, [str(change) for change in found if of_kind(change)]) for text, of_kind in kinds]
    return [f"{text} ({'; '.join(which)})" for text, which in told if which]


def known_options(values: Any) -> dict[str, dict[str, Any]]:
    """The options that a checkpoint or its sidecar says it was saved with, by section; whatever is in the file.

    Options that this version does not know are left out, but not those of the model, whose meaning they change.

    Raises:
        ValueError: it is no mapping of sections, or an option has a value that it cannot have.
    """
    if not isinstance(values, dict):
        raise ValueError("no options")
    found: dict[str, dict[str, Any]] = {}
    for section, cls in sections().items():
        options = values.get(section, {})
        if not isinstance(options, dict) or not all(isinstance(n, str) and n.isidentifier() for n in options):
            raise ValueError(f"section {section} is damaged")
        found[section] = {}
        for name, value in options.items():
            field = cls.__dataclass_fields__.get(name)
            if field is None:
                if section == "model":
                    found[section][name] = None
                continue
            if not any(_KINDS[kind](value) for kind in field.type.split(" | ")):
                raise ValueError(f"option {name} is damaged")
            found[section][name] = value
    return found


def shown(value: Any) -> str:
    """An option's value, for people: whatever characters it has."""
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "on" if value else "off"
    text = format_seq_schedule(value) if isinstance(value, tuple) else str(value)
    text = text if text.isprintable() and text else repr(text)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


# ---- what comes to the same


def _same_options(before: Options, after: Options, step: int) -> set[str]:
    """Options whose own values do not matter for what they are there for."""
    return (_without_effect_on_lr(before, after, step) | _without_effect_on_batches(before, after)
            | _without_effect_on_arithmetic(before["train"], after["train"]))


def _without_effect_on_lr(before: Options, after: Options, step: int) -> set[str]:
    """Of the options that make the learning rate, those that leave it as it was at every step from ``step`` on."""
    old, new = ({name: _get(options, option) for name, option in _LR.items()} for options in (before, after))
    if None in (*old.values(), *new.values()) or old["schedule"] not in LR_SCHEDULES:
        return set()

    def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
        a, b = (functools.partial(lr_at, **values) for values in (one, other))
        return all(a(at) == b(at) for at in _steps_to_compare(step, new["steps"], one, other))

    if same(old, new):
        return set(_LR.values())
    # Each by itself, so that the one at fault is named: min_lr follows lr, and means nothing to a constant rate.
    alike = {name for name in _LR if same(old, old | {name: new[name]}) and same(new, new | {name: old[name]})}
    return set() if len(alike) == len(_LR) else {_LR[name] for name in alike}


def _steps_to_compare(first: int, end: int, *rates: dict[str, Any]) -> Iterable[int]:
    """All of them, or of a long run evenly spread ones and those around which the rates bend."""
    if end - first <= _COMPARED_STEPS:
        return range(first, end)
    bends = {bend + near for rate in rates for bend in (rate["warmup_steps"], rate["steps"], rate["steps"] * 4 // 5)
             for near in range(-3, 4)}
    spread = range(first, end, (end - first) // _COMPARED_STEPS)
    return sorted({*spread, end - 1, *(at for at in bends if first <= at < end)})


def _without_effect_on_batches(before: Options, after: Options) -> set[str]:
    """How a step is divided is free, where each length has as many sequences as it had. And phases never reached."""
    old, new = (_train_config(options["train"]) for options in (before, after))
    if {"phases", "steps", "grad_accum"} - set(before["train"]):
        return set()
    found = set()
    lengths = {seq_len for train in (old, new) for _, seq_len in train.phases}
    if all(old.sequences(seq_len) == new.sequences(seq_len) for seq_len in lengths):
        found |= set(_BATCH)
    # The longest length is the stride of the data's order, reached or not.
    both = min(old.steps, new.steps)
    if _reads(old, both) == _reads(new, both):
        found.add("train.phases")
    return found


def _reads(train: TrainConfig, steps: int) -> tuple[Any, int]:
    return reached(train.phases, steps), max(seq_len for _, seq_len in train.phases)


def _without_effect_on_arithmetic(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """--amp, and its dtype, mean something to fp32 weights only."""
    if (after["param_dtype"] or before.get("param_dtype")) != "fp32":
        return {"train.amp", "train.amp_dtype"}
    amp = after["amp"] if after["amp"] is not None else before.get("amp")
    return set() if amp else {"train.amp_dtype"}


# ---- reading what was saved


def _with_precision(saved: Options) -> Options:
    """Saved before there was the option, all products were in one dtype."""
    train = saved.get("train", {})
    if "param_dtype" in train and "precision" not in train:
        train = {**train, "precision": compute_dtype(_train_config(train))}
    return {**saved, "train": train}


def _train_config(values: Mapping[str, Any]) -> TrainConfig:
    return TrainConfig(**{name: _plain(value) for name, value in values.items()})


def _get(options: Options, name: str) -> Any:
    section, _, field = name.partition(".")
    return options.get(section, {}).get(field)


def _plain(value: Any) -> Any:
    """Schedules come back from files as lists."""
    return tuple((start, seq_len) for start, seq_len in value) if isinstance(value, (list, tuple)) else value


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _is_phases(value: Any) -> bool:
    """As oneb.schedules writes them: (start, length) pairs, sorted, from step 0 on."""
    if not isinstance(value, (list, tuple)) or not 0 < len(value) <= _MOST_PHASES:
        return False
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_is_int, pair)) for pair in value):
        return False
    starts = [start for start, _ in value]
    return starts[0] == 0 and starts == sorted(set(starts)) and min(seq_len for _, seq_len in value) > 0


# By the names in the annotations of oneb.config.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "int": _is_int,
    "float": lambda value: type(value) is float or _is_int(value),
    "bool": lambda value: type(value) is bool,
    "str": lambda value: isinstance(value, str) and len(value) <= _LONGEST_TEXT,
    "None": lambda value: value is None,
    "Phases": _is_phases,
}
