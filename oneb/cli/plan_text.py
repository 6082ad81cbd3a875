"""A plan as the terminal shows it, within 80 columns."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Sequence

from oneb.config import Config
from oneb.memory import PARTS
from oneb.planner import ASIDE_SHARE, Phase, Plan
from oneb.sketch import sketch
from oneb.units import GIB, format_count, format_dollars, format_duration, format_gib

WIDTH = 80
_LABEL, _COLUMN = 28, 12
_PHASES_ABREAST = 3
_BLOCK_CHARACTERS = "▁▂▃▄▅▆▇█└┴─│"

Cell = Callable[[Phase], str]


def run_lines(plan: Plan, config: Config, *, plain: bool = False) -> list[str]:
    """What a run is: its size, its model, its learning rate.

    Args:
        plain: no characters beyond ASCII in the sketch of the learning rate.
    """
    sequences = " then ".join(str(count) for count in dict.fromkeys(phase.sequences for phase in plan.phases))
    parts = ", ".join(f"{name} {format_count(count)}" for name, count in plan.parameters_by_part.items())
    optim = config.optim
    lines = [
        f"[plan] global_batch={sequences} | steps={plan.steps} | planned_tokens≈{plan.tokens / 1e9:.4g}B",
        *schedule_lines("[plan] seq_schedule=", plan.seq_schedule),
        *wrapped("[plan] ", f"parameters={format_count(plan.parameters)} ({parts})"),
        f"[plan] kv_cache={plan.kv_bytes_per_token:,} bytes a token ({plan.variant}, 16-bit)",
        *wrapped("[plan] ", f"lr={optim.lr:g} ({plan.optimizer}, {optim.lr_schedule}"
                 + ("" if optim.lr_schedule == "constant" else f" to {optim.min_lr:g}")
                 + f", warm-up {optim.warmup_steps:,} steps)"),
    ]
    return [*lines, "", *(f"  {line}" for line in sketch(config, plain=plain)), ""]


def need_lines(plan: Plan) -> list[str]:
    """What a run needs, phase by phase and in all: steps, memory, time, money, disk; and what was chosen for it."""
    lines = [*_table(plan), *_disk_lines(plan), *money_lines(plan)]
    for note in plan.notes:
        lines += wrapped("[fit] ", note)
    return lines


def wrapped(label: str, text: str) -> list[str]:
    """``text`` after ``label``, in lines of 80 columns, the further ones indented under it; no text, no line."""
    if not text:
        return []
    return textwrap.wrap(label + text, WIDTH, subsequent_indent=" " * len(label), break_long_words=False,
                         break_on_hyphens=False)


def schedule_lines(label: str, schedule: str) -> list[str]:
    """``LENGTH@STEP,…`` after ``label``, over several lines where one has not the room."""
    if len(label + schedule) <= WIDTH:
        return [label + schedule]
    return wrapped(label, schedule.replace(",", ", "))


def can_draw(encoding: str | None) -> bool:
    """Whether a stream of this encoding takes the sketch's characters."""
    try:
        _BLOCK_CHARACTERS.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def stdout_is_plain() -> bool:
    """Make stdout take every character, if as a question mark; whether the sketch has to do with ASCII."""
    if can_draw(sys.stdout.encoding):
        return False
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    return True


def _table(plan: Plan) -> list[str]:
    """A column for each phase, several blocks of them if need be; the last has one for the whole run."""
    lines: list[str] = []
    phases = plan.phases
    for first in range(0, len(phases), _PHASES_ABREAST):
        some = phases[first:first + _PHASES_ABREAST]
        last = first + len(some) == len(phases)
        for label, cell, whole in _rows(plan):
            words = [cell(phase) for phase in some] + ([whole] if last and len(phases) > 1 else [])
            lines.append(f"  {label:<{_LABEL}}{''.join(f'{word:>{_COLUMN}}' for word in words)}".rstrip())
        lines.append("")
    return lines


def _rows(plan: Plan) -> list[tuple[str, Cell, str]]:
    """(label, what a phase says, what the whole run says)."""
    rows: list[tuple[str, Cell, str]] = [
        ("tokens a sequence", lambda p: f"{p.seq_len:,}", "whole run"),
        ("steps", lambda p: f"{p.steps:,}", f"{plan.steps:,}"),
        ("tokens", lambda p: format_count(p.tokens), format_count(plan.tokens)),
        ("tokens a step", lambda p: f"{p.tokens_per_step:,}", ""),
        ("GFLOP a token", lambda p: f"{p.flops_per_token / 1e9:.3g}", ""),
    ]
    if plan.phases[0].batch_size is not None:
        rows += [("micro-batch x accumulation", lambda p: f"{p.batch_size} x {p.grad_accum}", ""),
                 ("layers recomputed", lambda p: f"{p.recomputed_layers} of {plan.n_layers}", "")]
    if plan.seconds is not None:
        rows += [(f"tokens a second, {plan.speed_source}", lambda p: format_count(p.tok_s), format_count(plan.tok_s)),
                 ("time", lambda p: format_duration(p.seconds), format_duration(plan.seconds))]
    if plan.dollars is not None:
        rows.append(("cost", lambda p: format_dollars(plan.cost(p.seconds)), format_dollars(plan.dollars)))
    if plan.peak_bytes is not None:
        rows.append(("GPU memory, GiB:", lambda p: "", ""))
        rows += [(f"  {part}", lambda p, part=part: f"{p.memory_bytes[part] / GIB:.1f}", "") for part in PARTS]
        have = "" if plan.budget_bytes is None else f", of {plan.budget_bytes / GIB:.1f}"
        rows.append((f"  peak{have}", lambda p: f"{p.peak_bytes / GIB:.1f}", f"{plan.peak_bytes / GIB:.1f}"))
    return rows


def _disk_lines(plan: Plan) -> list[str]:
    """What the checkpoints take."""
    disk = plan.disk
    files = f", {disk.step_files} step*.pt of as much" if disk.step_files else ""
    return wrapped("[plan] ", f"disk≈{format_gib(disk.total_bytes)} (last.pt {format_gib(disk.last_bytes)}{files}, "
                   f"best.pt {format_gib(disk.best_bytes)}, and room to write the next last.pt)")


def money_lines(plan: Plan) -> list[str]:
    """Time and money of the whole plan; nothing where its speed is not known."""
    if plan.seconds is None:
        return []
    text = f"time≈{format_duration(plan.seconds)} ({plan.speed_source} speed)"
    if plan.dollars is not None:
        text += f" | cost≈{format_dollars(plan.dollars)} at {price_text(plan.price, plan.price_source)}"
    text += f"; {ASIDE_SHARE:.0%} of it for start, evaluations and saves"
    return wrapped("[plan] ", text)


def price_text(price: float, source: str | None) -> str:
    """A price an hour, and whose it is."""
    if source is None:
        return f"${price:.2f} an hour"
    return f"about ${price:.2f} an hour ({source}; --price X for yours)"


def columns(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Rows of cells in columns as wide as need be, the first ``left`` of them to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" if index < left else f"{cell:>{width}}"
                      for index, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]
