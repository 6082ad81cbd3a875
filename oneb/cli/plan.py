"""``oneb plan``: the same run on several GPUs and with several variants, side by side. No torch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneb.cli.budget import resolve_for, steps_for_budget
from oneb.cli.guard import reports_mistakes
from oneb.cli.machine import Machine, plan_for
from oneb.cli.options import OptionParser, add_config_options, argument
from oneb.cli.plan_text import columns, schedule_lines, stdout_is_plain, wrapped
from oneb.config import VARIANTS, ModelConfig
from oneb.errors import OnebError
from oneb.files import write_json
from oneb.gpus import GPUS, Gpu, get_gpu
from oneb.planner import Plan
from oneb.presets import resolve
from oneb.units import GIB, format_count, format_dollars, format_duration, format_gib

_EPILOG = """\
examples:
  oneb plan --data fineweb_1b.npy --target-tokens 10B
  oneb plan --gpus h100 a100-80 4090 --variants baseline decoupled --target-tokens 10B
  oneb plan --gpus h100 4090 --price h100=2.49 4090=0.35 --precision fp8 --json plans.json
Every option of run_1b_launch.py describes the run that is compared.
"""
_CHEAPEST, _FASTEST = "$", ">"


@dataclass(frozen=True)
class Entry:
    """One GPU and variant. ``plan`` is None, and ``why_not`` says why, where the card cannot do what was asked."""

    gpu: Gpu
    variant: str
    plan: Plan | None
    why_not: str = ""

    @property
    def works(self) -> bool:
        """Whether the run can be done there."""
        return self.plan is not None and self.plan.fits

    def order(self) -> tuple[bool, float, float]:
        """Sorts by dollars, then by time; what has no price after that, and what does not work last."""
        dollars = self.plan.dollars if self.works and self.plan.dollars is not None else math.inf
        return not self.works, dollars, self.plan.seconds if self.works else math.inf

    def reach(self) -> tuple[bool, int]:
        """Sorts by tokens, most first; what does not work last."""
        return not self.works, -self.plan.tokens if self.works else 0

    def described(self) -> str:
        """The card, the variant, and what the run takes there."""
        cost = "" if self.plan.dollars is None else f" for {format_dollars(self.plan.dollars)}"
        return f"{self.gpu.key}, {self.variant}: {format_duration(self.plan.seconds)}{cost}"


def build_parser() -> argparse.ArgumentParser:
    """The options of ``oneb plan``: its own, and all of a run."""
    parser = OptionParser(
        prog="oneb plan", usage="oneb plan [--gpus KEY …] [--variants NAME …] [options of a run]",
        description="Compare what a run takes on different GPUs: memory, time, money. Cheapest first.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        conflict_handler="resolve",  # --price is for several cards here
    )
    add_config_options(parser)
    add = parser.add_argument_group("comparison").add_argument
    add("--gpus", nargs="+", metavar="KEY", help="cards to compare (default: all of the table that have a price)")
    add("--variants", nargs="+", choices=VARIANTS, metavar="NAME", help="attention variants (default: the run's)")
    add("--price", nargs="+", type=argument(parse_price), default=[], dest="prices", metavar="[KEY=]X",
        help="dollars an hour of a card, or of all (default: the table's approximate prices)")
    add("--budget", type=float, metavar="DOLLARS", help="compare how far so much money goes, instead of the same steps")
    add("--json", type=Path, metavar="FILE", help="write the plans there, too")
    return parser


def parse_price(text: str) -> tuple[str | None, float]:
    """``"h100=2.49"`` -> ("h100", 2.49), by the table's key; ``"2.49"`` -> (None, 2.49), for all cards.

    Raises:
        OnebError: it is neither.
    """
    key, equals, number = text.rpartition("=")
    try:
        price = float(number)
    except ValueError:
        price = -1.0
    if not 0 <= price < math.inf or (equals and not key):
        raise OnebError(f"{text!r} is no price; write dollars an hour as h100=2.49, or 2.49 for all cards")
    return get_gpu(key).key if equals else None, price


@reports_mistakes
def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print; returns the exit code."""
    given = vars(build_parser().parse_args(argv))
    gpus, variants, file, budget = (given.pop(name) for name in ("gpus", "variants", "json", "budget"))
    prices = dict(given.pop("prices"))
    if variants and "variant" in given:
        raise OnebError(f"--variants {' '.join(variants)} and --variant {given['variant']} both say what to compare; "
                        "give one of them")
    if given.get("device") in ("cpu", "mps"):
        raise OnebError(f"oneb plan compares GPUs, and --device {given['device']} is none; leave it out")
    cards = list(dict.fromkeys(get_gpu(key) for key in gpus)) if gpus else [
        gpu for gpu in GPUS if gpu.price_per_hour is not None]
    entries = [
        _entry(gpu, variant, given, prices.get(gpu.key, prices.get(None)), budget)
        for variant in dict.fromkeys(variants or [given.get("variant", ModelConfig.variant)]) for gpu in cards
    ]
    entries.sort(key=Entry.order if budget is None else Entry.reach)
    stdout_is_plain()
    for line in report(entries, budget):
        print(line)
    if file:
        write_json(file, [{"gpu": entry.gpu.key, "variant": entry.variant, "why_not": entry.why_not or None,
                           "plan": entry.plan.to_dict() if entry.plan else None} for entry in entries])
        print(f"\nplans: {file}")
    return 0


def _entry(
    gpu: Gpu, variant: str, given: Mapping[str, Any], price: float | None, budget: float | None
) -> Entry:
    given = {**given, "variant": variant} | ({} if price is None else {"price": price})
    config = resolve_for(given, budget)
    if config.train.precision == "fp8" and gpu.flops_fp8 is None:
        return Entry(gpu, variant, None, "has no fp8")
    machine = Machine(gpu.key, gpu, gpu.usable_bytes, is_here=False)
    if budget is not None:
        try:
            config = resolve({**given, "steps": steps_for_budget(budget, config, machine, None)})
        except OnebError as error:
            return Entry(gpu, variant, None, str(error))
    plan = plan_for(config, machine)
    return Entry(gpu, variant, plan, "" if plan.fits else f"needs {format_gib(plan.peak_bytes)} of "
                 f"{format_gib(plan.budget_bytes)}")


# ---- what is printed


def report(entries: Sequence[Entry], budget: float | None = None) -> list[str]:
    """A table of what works, what does not, and how sure the figures are.

    Args:
        entries: in the order to show them.
    """
    working = [entry for entry in entries if entry.works]
    lines = _heading(working[0].plan, budget) if working else []
    several = len({entry.variant for entry in entries}) > 1
    best = {} if budget is not None or not working else _best(working)
    if working:
        head = ["", "gpu", *["variant"] * several, "batch", "redone", "peak GiB", "tok/s",
                "time", "cost" if budget is None else "tokens"]
        rows = [head]
        for entry in working:
            marks = "".join(mark for mark, found in best.items() if found is entry)
            rows.append([marks, *_row(entry, several, budget)])
        lines += ["", *columns(rows, 2 + several)]
        names = {_CHEAPEST: "cheapest", _FASTEST: "fastest"}
        lines += ["", *(f"{mark} {names[mark]}: {entry.described()}" for mark, entry in best.items())] if best else []
    not_working = [line for entry in entries if not entry.works for line in
                   wrapped("  ", f"{entry.gpu.key}{f', {entry.variant}' * several}: {entry.why_not}")]
    if not_working:
        lines += ["", "not possible:", *not_working]
    return lines + _footnotes(working)


def _heading(plan: Plan, budget: float | None) -> list[str]:
    if budget is not None:
        label = f"[plan] budget={format_dollars(budget)} | seq_schedule="
    else:
        label = f"[plan] steps={plan.steps} | planned_tokens≈{plan.tokens / 1e9:.4g}B | seq_schedule="
    return schedule_lines(label, plan.seq_schedule)


def _row(entry: Entry, several: bool, budget: float | None) -> list[str]:
    plan = entry.plan
    # The phase whose memory is the tightest.
    phase = max(plan.phases, key=lambda phase: phase.peak_bytes)
    estimate = "~" if plan.speed_source == "estimated" else ""
    # What the money buys, or what the run costs.
    result = "" if plan.dollars is None else format_dollars(plan.dollars) if budget is None else format_count(
        plan.tokens)
    about = "~" if result and plan.price_source else ""
    return [
        entry.gpu.key, *[entry.variant] * several, f"{phase.batch_size} x {phase.grad_accum}",
        f"{phase.recomputed_layers}/{plan.n_layers}", f"{plan.peak_bytes / GIB:.1f}/{plan.budget_bytes / GIB:.1f}",
        f"{estimate}{format_count(plan.tok_s)}", format_duration(plan.seconds), f"{about}{result}",
    ]


def _best(working: Sequence[Entry]) -> dict[str, Entry]:
    """The cheapest, if there is a price, and the fastest."""
    priced = [entry for entry in working if entry.plan.dollars is not None]
    cheapest = {_CHEAPEST: min(priced, key=lambda entry: entry.plan.dollars)} if priced else {}
    return cheapest | {_FASTEST: min(working, key=lambda entry: entry.plan.seconds)}


def _footnotes(working: Sequence[Entry]) -> list[str]:
    if not working:
        return []
    lines = ["", *wrapped("", "batch: micro-batch x accumulation, and redone: layers whose activations are recomputed, "
                          "where memory is tightest; peak GiB: of what the card gives.")]
    if any(entry.plan.speed_source == "estimated" for entry in working):
        lines += wrapped("", "~ before tok/s: estimated from the card's data sheet; only on "
                         f"{', '.join(gpu.key for gpu in GPUS if gpu.measured)} was it measured. A rehearsal "
                         "(--rehearse) shows the real one.")
    sources: dict[str, list[str]] = {}
    for entry in working:
        if entry.plan.price_source:
            cards = sources.setdefault(entry.plan.price_source, [])
            cards += [text for text in [f"{entry.gpu.key} ${entry.plan.price:.2f}"] if text not in cards]
    if sources:
        lines.append("~ in the last column: by an approximate price an hour (--price KEY=X for yours)")
        for source, cards in sources.items():
            lines += wrapped("  ", f"{source}: {', '.join(cards)}")
    return lines
