"""What a run's report says, section by section, as plain data: ``summary`` writes it as Markdown, ``report`` as HTML.

Texts here are what they say, whatever characters are in them: escaping belongs to who writes them down.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from oneb.config import RunConfig
from oneb.inspect.plots import LOSS_PLOT, THROUGHPUT_PLOT
from oneb.inspect.rows import Row, Run, is_number, known, median, phase_rows
from oneb.units import format_count, format_dollars, format_duration

_LAST_ROWS = 20
_EVENTS_SHOWN = 20


@dataclass(frozen=True)
class Mono:
    """Text as a computer wrote it, or would read it."""

    text: str


@dataclass(frozen=True)
class Link:
    """A file of the run directory, by its name."""

    name: str


Line = tuple[str | Mono | Link, ...]


@dataclass(frozen=True)
class Paragraph:
    line: Line


@dataclass(frozen=True)
class Table:
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Bullets:
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Command:
    text: str


@dataclass(frozen=True)
class Picture:
    """A PNG file of the run directory, by its name."""

    name: str


Block = Paragraph | Table | Bullets | Command | Picture


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Block, ...]


def sections(run: Run) -> list[Section]:
    """The report of a run; the first section's title is the run's name."""
    found = [_head(run), _result(run), _model(run), _speed(run), _setup(run), _curves(run), _commands(run),
             _events(run)]
    return [section for section in found if section is not None]


def training_seconds(run: Run) -> float:
    """Seconds from the start of each process to its last train row, over all processes of the run.

    ``elapsed_s`` starts anew with each process, so it falls where the run was resumed.
    """
    elapsed = known(run.train, "elapsed_s")
    return sum(now for now, then in zip(elapsed, [*elapsed, 0.0][1:], strict=True) if then < now)


def _paragraph(*parts: str | Mono | Link) -> Paragraph:
    return Paragraph(parts)


def _head(run: Run) -> Section:
    planned = run.meta.get("steps")
    ended = next((row for row in reversed(run.events) if row["event"] in ("finish", "stopped")), None)
    if planned and run.step >= planned:
        state = f"Finished: {planned:,} steps"
    elif ended and ended["event"] == "stopped" and ended["step"] >= run.step:
        state = f"Stopped at step {ended['step']:,} of {planned or 0:,}"
    else:
        state = f"At step {run.step:,} of {planned or 0:,}" if planned else "Not started"
    seconds = training_seconds(run)
    text = f"{state}, {format_count(run.tokens)} tokens, {format_duration(seconds)}"
    price = run.option("run", "price")
    if is_number(price):
        text += f", {format_dollars(seconds / 3600 * price)} at ${price:.2f} an hour"
    return Section(run.name, (_paragraph(f"{text}."),))


def _result(run: Run) -> Section:
    rows = []
    for title, found, name in (("validation", run.evals, "val_loss"), ("training", run.train, "loss")):
        there = [row for row in found if row.get(name) is not None]
        if there:
            best = min(there, key=lambda row: row[name])
            final = f"{there[-1][name]:.4f}"
            if title == "training" and len(there) >= _LAST_ROWS:
                mean = statistics.fmean(known(there[-_LAST_ROWS:], name))
                final = f"{mean:.4f} (mean of the last {_LAST_ROWS} rows)"
            rows.append((title, final, f"{best[name]:.4f} (step {best['step']:,}, "
                         f"{format_count(best['tokens'])} tokens)"))
    if not rows:
        return Section("Result", (_paragraph("No loss has been recorded yet."),))
    return Section("Result", (Table(("loss (nats a token)", "final", "best"), tuple(rows)),))


def _model(run: Run) -> Section | None:
    meta = run.meta
    if not meta:
        return None
    flops = ", ".join(f"{value / 1e9:.3g} G (at {length})" for length, value in meta["flops_per_token"].items())
    best = min(known(run.evals, "val_loss"), default=None)
    header = ("variant", "parameters", "FLOPs a token", "KV cache a token", "best validation loss")
    row = (meta["variant"], f"{meta['parameters']:,}", flops, f"{meta['kv_bytes_per_token']:,} bytes",
           "-" if best is None else f"{best:.4f}")
    return Section("Model", (
        Table(header, (row,)),
        _paragraph("The same shape is not the same size: a variant with fewer parameters also computes less for each "
                   "token. Read a loss beside these figures."),
    ))


def _speed(run: Run) -> Section | None:
    if not known(run.train, "tok_s"):
        return None
    header = ("sequence length", "tokens/s", "MFU", "step", "waiting for data", "peak memory")
    return Section("Speed", (
        Table(header, tuple(_speed_row(f"{phase.seq_len:,}", phase.rows) for phase in phase_rows(run.train))),
        _paragraph("Medians of the logged rows; evaluations, checkpoints and compilation are left out."),
    ))


def _speed_row(title: str, rows: list[Row]) -> tuple[str, ...]:
    memory = known(rows, "memory_gib")
    return (title, _median(rows, "tok_s", format_count), _median(rows, "mfu", "{:.1%}".format),
            _median(rows, "step_ms", "{:.0f} ms".format), _median(rows, "data_ms", "{:.1f} ms".format),
            f"{max(memory):.1f} GiB" if memory else "-")


def _median(rows: list[Row], name: str, text: Callable[[float], str]) -> str:
    value = median(rows, name)
    return "-" if value is None else text(value)


def _setup(run: Run) -> Section | None:
    meta = run.meta
    if not meta:
        return None
    passes = run.tokens / meta["train_tokens"] if meta["train_tokens"] else 0.0
    lines: list[Line] = [
        (f"Machine: {meta['device']}, torch {meta['torch']}, oneb {meta['oneb']}",),
        (f"Arithmetic: weights {meta['param_dtype']}, {'fp8 products, ' if meta.get('precision') == 'fp8' else ''}"
         f"compute {meta['compute_dtype']}, attention {meta['attention_backend']}",),
        ("Data: ", Mono(meta["data"]), " (fingerprint ", Mono(meta["data_fingerprint"]),
         f", {meta['encoding']}): {format_count(meta['train_tokens'])} tokens to train on "
         f"({passes:.2f} passes so far), {format_count(meta['val_tokens'])} to validate on"
         + (", attention within documents" if meta.get("doc_mask") else "")),
    ]
    if meta.get("peak_flops") is None:
        lines.append(("MFU is not shown: the peak FLOP/s of this device are not known",))
    if run.config:
        lines.append(("All options: ", Link("config.json"), "; the plan: ", Link("plan.json"), "; all rows: ",
                      Link("train.jsonl")))
    return Section("Setup", (Bullets(tuple(lines)),))


def _curves(run: Run) -> Section | None:
    there = tuple(Picture(name) for name in (LOSS_PLOT, THROUGHPUT_PLOT) if (run.path / name).exists())
    return Section("Curves", there) if there else None


def _commands(run: Run) -> Section | None:
    blocks: list[Block] = []
    last, best = run.path / "last.pt", run.path / "best.pt"
    resume = _resume_command(run, last) if last.exists() and run.step < (run.meta.get("steps") or 0) else None
    if resume:
        blocks += [_paragraph("To continue, repeat the command that started the run, with ", Mono("--ckpt"), " and ",
                              Mono("--resume"), ":"),
                   Command(resume), _paragraph("Give every other option of that command again.")]
    sampled = best if best.exists() else last
    if sampled.exists():
        blocks += [_paragraph("To sample from it:"), Command(
            f"python3 -m oneb sample --ckpt {shlex.quote(str(sampled))} --prompt 'Once upon a time'")]
    return Section("Going on", tuple(blocks)) if blocks else None


def _resume_command(run: Run, checkpoint: Path) -> str | None:
    options = {flag: run.option(section, name) for flag, section, name in (
        ("--device", "train", "device"), ("--data", "data", "path"), ("--tag", "run", "tag"),
        ("--variant", "model", "variant"), ("--seed", "train", "seed"))}
    if None in options.values():
        return None
    words = ["python3", "run_1b_launch.py"]
    root = run.option("run", "root")
    if root not in (None, RunConfig.root):
        words += ["--run-root", str(root)]
    for flag, value in options.items():
        words += [flag, str(value)]
    return shlex.join([*words, "--ckpt", str(checkpoint), "--resume", "--run"])


def _events(run: Run) -> Section:
    """Warnings, and what interrupted the run; a checkpoint or a first step is no news."""
    told = [row for row in run.events if row["event"] not in ("checkpoint", "first_step", "finish")]
    lines: list[Line] = [(f"step {row['step']:,}: {row['event']}: {row['message']}",) for row in told[-_EVENTS_SHOWN:]]
    if len(told) > len(lines):
        lines.insert(0, (f"… {len(told) - len(lines)} earlier ones are in train.jsonl",))
    skipped = max(known(run.train, "skipped"), default=0)
    if skipped:
        lines.append((f"updates skipped because their gradient was not finite: {skipped}",))
    lines += [(note,) for note in run.notes]
    block = Bullets(tuple(lines)) if lines else _paragraph("None.")
    return Section("Events and warnings", (block,))
