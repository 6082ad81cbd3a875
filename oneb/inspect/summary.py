"""``summary.md`` of a run directory: what was trained, how well, how fast, and how to go on. No torch."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable
from pathlib import Path

from oneb.config import RunConfig
from oneb.files import write_text
from oneb.inspect.plots import LOSS_PLOT, THROUGHPUT_PLOT
from oneb.inspect.rows import Row, Run, known, median, phase_rows, read_run
from oneb.units import format_count, format_dollars, format_duration

SUMMARY_FILE = "summary.md"
_LAST_ROWS = 20
_EVENTS_SHOWN = 20


def write_summary(run_dir: str | Path) -> Path:
    """Write ``summary.md`` from what the run has recorded so far; returns its path.

    Raises:
        OnebError: ``run_dir`` is not a run directory.
    """
    run = read_run(run_dir)
    sections = [section(run) for section in (_head, _result, _model, _speed, _setup, _curves, _commands, _events)]
    path = run.path / SUMMARY_FILE
    write_text(path, "\n\n".join(filter(None, sections)) + "\n")
    return path


def training_seconds(run: Run) -> float:
    """Seconds from the start of each process to its last train row, over all processes of the run.

    ``elapsed_s`` starts anew with each process, so it falls where the run was resumed.
    """
    elapsed = known(run.train, "elapsed_s")
    return sum(now for now, then in zip(elapsed, [*elapsed, 0.0][1:], strict=True) if then < now)


# ---- sections


def _head(run: Run) -> str:
    planned = run.meta.get("steps")
    ended = next((row for row in reversed(run.events) if row["event"] in ("finish", "stopped")), None)
    if planned and run.step >= planned:
        state = f"Finished: {planned:,} steps"
    elif ended and ended["event"] == "stopped" and ended["step"] >= run.step:
        state = f"Stopped at step {ended['step']:,} of {planned or 0:,}"
    else:
        state = f"At step {run.step:,} of {planned or 0:,}" if planned else "Not started"
    seconds = training_seconds(run)
    text = f"# {run.name}\n\n{state}, {format_count(run.tokens)} tokens, {format_duration(seconds)}"
    price = run.config.get("run", {}).get("price")
    if price is not None:
        text += f", {format_dollars(seconds / 3600 * price)} at ${price:.2f} an hour"
    return text + "."


def _result(run: Run) -> str:
    lines = ["| loss (nats a token) | final | best |", "|---|---|---|"]
    for title, rows, name in (("validation", run.evals, "val_loss"), ("training", run.train, "loss")):
        finite = [row for row in rows if row.get(name) is not None]
        if finite:
            best = min(finite, key=lambda row: row[name])
            final = f"{finite[-1][name]:.4f}"
            if title == "training" and len(finite) >= _LAST_ROWS:
                mean = statistics.fmean(known(finite[-_LAST_ROWS:], name))
                final = f"{mean:.4f} (mean of the last {_LAST_ROWS} rows)"
            lines.append(f"| {title} | {final} | {best[name]:.4f} (step {best['step']:,}, "
                         f"{format_count(best['tokens'])} tokens) |")
    return "\n".join(["## Result", "", *lines]) if len(lines) > 2 else "## Result\n\nNo loss has been recorded yet."


def _model(run: Run) -> str:
    meta = run.meta
    if not meta:
        return ""
    flops = ", ".join(f"{value / 1e9:.3g} G (at {length})" for length, value in meta["flops_per_token"].items())
    best = min(known(run.evals, "val_loss"), default=None)
    return "\n".join([
        "## Model",
        "",
        "| variant | parameters | FLOPs a token | KV cache a token | best validation loss |",
        "|---|---|---|---|---|",
        f"| {meta['variant']} | {meta['parameters']:,} | {flops} | "
        f"{meta['kv_bytes_per_token']:,} bytes | {'-' if best is None else f'{best:.4f}'} |",
        "",
        "The same shape is not the same size: a variant with fewer parameters also computes less for each token. "
        "Read a loss beside these figures.",
    ])


def _speed(run: Run) -> str:
    if not known(run.train, "tok_s"):
        return ""
    lines = ["| sequence length | tokens/s | MFU | step | waiting for data | peak memory |",
             "|---|---|---|---|---|---|"]
    lines += [_speed_row(f"{phase.seq_len:,}", phase.rows) for phase in phase_rows(run.train)]
    return "\n".join(["## Speed", "", *lines, "",
                      "Medians of the logged rows; evaluations, checkpoints and compilation are left out."])


def _speed_row(title: str, rows: list[Row]) -> str:
    memory = known(rows, "memory_gib")
    cells = [title, _median(rows, "tok_s", format_count), _median(rows, "mfu", "{:.1%}".format),
             _median(rows, "step_ms", "{:.0f} ms".format), _median(rows, "data_ms", "{:.1f} ms".format),
             f"{max(memory):.1f} GiB" if memory else "-"]
    return f"| {' | '.join(cells)} |"


def _median(rows: list[Row], name: str, text: Callable[[float], str]) -> str:
    value = median(rows, name)
    return "-" if value is None else text(value)


def _setup(run: Run) -> str:
    meta = run.meta
    if not meta:
        return ""
    passes = run.tokens / meta["train_tokens"] if meta["train_tokens"] else 0.0
    lines = [
        f"- Machine: {meta['device']}, torch {meta['torch']}, oneb {meta['oneb']}",
        f"- Arithmetic: weights {meta['param_dtype']}, {'fp8 products, ' if meta.get('precision') == 'fp8' else ''}"
        f"compute {meta['compute_dtype']}, "
        f"attention {meta['attention_backend']}",
        f"- Data: `{meta['data']}` (fingerprint `{meta['data_fingerprint']}`, {meta['encoding']}): "
        f"{format_count(meta['train_tokens'])} tokens to train on ({passes:.2f} passes so far), "
        f"{format_count(meta['val_tokens'])} to validate on",
    ]
    if meta.get("peak_flops") is None:
        lines.append("- MFU is not shown: the peak FLOP/s of this device are not known")
    if run.config:
        lines.append("- All options: [config.json](config.json); the plan: [plan.json](plan.json); "
                     "all rows: [train.jsonl](train.jsonl)")
    return "\n".join(["## Setup", "", *lines])


def _curves(run: Run) -> str:
    there = [name for name in (LOSS_PLOT, THROUGHPUT_PLOT) if (run.path / name).exists()]
    return "\n\n".join(["## Curves", *(f"![{name.removesuffix('.png')}]({name})" for name in there)]) if there else ""


def _commands(run: Run) -> str:
    blocks = []
    last, best = run.path / "last.pt", run.path / "best.pt"
    if last.exists() and run.config and run.step < run.meta.get("steps", 0):
        blocks.append("To continue, repeat the command that started the run, with `--ckpt` and `--resume`:\n\n"
                      f"```bash\n{_resume_command(run, last)}\n```\n\n"
                      "Give every other option of that command again.")
    sampled = best if best.exists() else last
    if sampled.exists():
        blocks.append("To sample from it:\n\n```bash\npython3 -m oneb sample --ckpt "
                      f"{shlex.quote(str(sampled))} --prompt 'Once upon a time'\n```")
    return "\n\n".join(["## Going on", *blocks]) if blocks else ""


def _resume_command(run: Run, checkpoint: Path) -> str:
    config = run.config
    words = ["python3", "run_1b_launch.py", "--device", config["train"]["device"], "--data", config["data"]["path"],
             "--tag", config["run"]["tag"], "--variant", config["model"]["variant"],
             "--seed", str(config["train"]["seed"]), "--ckpt", str(checkpoint), "--resume", "--run"]
    if config["run"]["root"] != RunConfig.root:
        words[2:2] = ["--run-root", config["run"]["root"]]
    return shlex.join(words)


def _events(run: Run) -> str:
    """Warnings, and what interrupted the run; a checkpoint or a first step is no news."""
    told = [row for row in run.events if row["event"] not in ("checkpoint", "first_step", "finish")]
    lines = [f"- step {row['step']:,}: {row['event']}: {row['message']}" for row in told[-_EVENTS_SHOWN:]]
    if len(told) > len(lines):
        lines.insert(0, f"- … {len(told) - len(lines)} earlier ones are in train.jsonl")
    skipped = max(known(run.train, "skipped"), default=0)
    if skipped:
        lines.append(f"- updates skipped because their gradient was not finite: {skipped}")
    lines += [f"- {note}" for note in run.notes]
    return "\n".join(["## Events and warnings", "", *(lines or ["None."])])
