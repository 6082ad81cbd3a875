"""``loss.png`` and ``throughput.png`` of a run directory. Reads its files only; needs matplotlib, and no torch."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from oneb.files import atomic_writer
from oneb.inspect.rows import Row, Run, known, median, phase_rows, read_run
from oneb.units import format_count

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS_PLOT = "loss.png"
THROUGHPUT_PLOT = "throughput.png"

_DPI = 160
_INK, _MUTED, _GRID = "#1f2328", "#6b7280", "#e5e7eb"
# Okabe & Ito's palette (jfly.uni-koeln.de/color): told apart by the colour-blind, too.
_BLUE, _ORANGE, _RED = "#0072b2", "#d55e00", "#b91c1c"
_SMOOTHED_FROM_ROWS = 20
_CUT_FROM_ROWS = 100
_LABEL_CHARACTER = 0.0085  # width in axes; a phase narrower than its label goes unlabelled


def write_plots(run_dir: str | Path) -> list[Path]:
    """Draw what the run has rows for; returns the paths written, none for a run without rows.

    Without matplotlib: warns and draws nothing, since a run must not end over its plots.

    Raises:
        OnebError: ``run_dir`` is not a run directory.
    """
    run = read_run(run_dir)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        warnings.warn("no plots: matplotlib is not installed (`python3 -m pip install matplotlib`, then `oneb report`)")
        return []
    drawings: list[tuple[str, bool, Callable[[Run], Figure]]] = [
        (LOSS_PLOT, bool(known(run.train, "loss") or known(run.evals, "val_loss")), loss_figure),
        (THROUGHPUT_PLOT, bool(known(run.train, "tok_s")), throughput_figure),
    ]
    written = []
    for name, has_rows, draw in drawings:
        if has_rows:
            with atomic_writer(run.path / name) as file:
                draw(run).savefig(file, format="png", dpi=_DPI, facecolor="white")
            written.append(run.path / name)
    return written


def loss_figure(run: Run) -> Figure:
    """Training loss (each row, and smoothed) and validation loss over the tokens trained on."""
    import numpy as np

    figure, (ax,) = _figure(run, "", height=5.2, top=1.1, panels=1)
    tokens, loss = _columns(run.train, "tokens", "loss")
    many = len(loss) >= _SMOOTHED_FROM_ROWS
    finite = np.isfinite(loss)
    if finite.any():
        ax.plot(tokens, loss, color=_BLUE, linewidth=0.8, alpha=0.3 if many else 1.0,
                marker=None if many else "o", markersize=3, label=None if many else "training")
    if many:
        ax.plot(tokens, smooth(loss, len(loss) // 50), color=_BLUE, linewidth=1.8, label="training, smoothed")
    val_tokens, val_loss = _columns(run.evals, "tokens", "val_loss")
    if np.isfinite(val_loss).any():
        best = int(np.nanargmin(val_loss))
        ax.plot(val_tokens, val_loss, color=_ORANGE, linewidth=1.0, marker="o", markersize=4, markeredgecolor="white",
                markeredgewidth=0.6, label=f"validation (best {val_loss[best]:.4f} at {tick_text(val_tokens[best])})")
    if not finite.all():
        ax.plot(tokens[~finite], np.full((~finite).sum(), 0.015), "x", transform=ax.get_xaxis_transform(), color=_RED,
                markersize=5, label=f"not finite ({(~finite).sum()}x)", clip_on=False)
    ax.set_xlim(0, 1.02 * max(1, run.tokens))
    ax.margins(y=0.1)
    _mark_resumes(ax, run, "tokens")
    _mark_phases(ax, run, "tokens", lambda seq_len, rows: f"{seq_len:,} tokens")
    if len(loss) >= _CUT_FROM_ROWS:
        _cut_the_start_off(ax, loss[finite], val_loss[np.isfinite(val_loss)])
    ax.set_xlabel("tokens trained on")
    ax.set_ylabel("loss (nats a token)")
    ax.xaxis.set_major_formatter(lambda x, _: tick_text(x))
    ax.legend(loc="upper right", bbox_to_anchor=(1.0, 0.94), frameon=False, fontsize=9, labelcolor=_INK)
    _step_axis(ax, run.train)
    return figure


def throughput_figure(run: Run) -> Figure:
    """Tokens a second, and where the hardware's peak is known model-FLOP utilisation, over the steps."""
    import numpy as np

    has_mfu = bool(known(run.train, "mfu"))
    figure, axes = _figure(run, _speed_text(run), height=5.6 if has_mfu else 4.0, top=0.8,
                           panels=2 if has_mfu else 1)
    drawn = [("tok_s", "tokens a second", 1.0, _BLUE), ("mfu", "MFU (%)", 100.0, _ORANGE)]
    for ax, (name, label, scale, color) in zip(axes, drawn, strict=False):
        steps, values = _columns(run.train, "step", name)
        values = values * scale
        ax.plot(steps, values, color=color, linewidth=1.2,
                marker=None if len(steps) >= _SMOOTHED_FROM_ROWS else "o", markersize=3)
        ax.set_ylabel(label)
        # From zero: a speed that halves should look it. The room on top is for the labels.
        ax.set_ylim(0, 1.2 * np.nanmax(values) if np.isfinite(values).any() else None)
        _mark_resumes(ax, run, "step")
    axes[0].set_xlim(0, 1.02 * max(1, run.step))
    axes[0].yaxis.set_major_formatter(lambda x, _: tick_text(x))
    _mark_phases(axes[0], run, "step",
                 lambda seq_len, rows: f"{seq_len:,} tokens: {format_count(median(rows, 'tok_s') or 0)}/s")
    if has_mfu:
        _mark_phases(axes[1], run, "step", lambda seq_len, rows: f"{median(rows, 'mfu') or 0:.1%}")
    axes[-1].set_xlabel("optimizer step")
    _whole_ticks(axes[-1])
    return figure


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over ``window`` rows around each row, leaving NaN out; shorter at both ends.

    At the beginning the window stays symmetric: the loss falls so steeply there that a lopsided mean would lie below.
    """
    import numpy as np

    n, half = len(values), max(1, window // 2)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(n)
    first = np.maximum(at - half, 0)
    last = np.minimum(at + np.minimum(half, at), n - 1)
    found = counts[last + 1] - counts[first]
    return np.where(found > 0, (sums[last + 1] - sums[first]) / np.maximum(found, 1), np.nan)


def tick_text(count: float) -> str:
    """``format_count`` without trailing zeros: 2.00B -> 2B, 1.50B -> 1.5B."""
    return re.sub(r"\.0+(?=\D)|(?<=\.)(\d*[1-9])0+(?=\D)", r"\1", format_count(count))


# ---- pieces


def _figure(run: Run, note: str, *, height: float, top: float, panels: int) -> tuple[Figure, list[Axes]]:
    """An empty figure, ``height`` inches with ``top`` of them for the run's title and what else stands above the axes.

    No pyplot and no rcParams: nothing outlives the drawing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, height))
    axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    figure.subplots_adjust(left=0.085, right=0.97, bottom=0.52 / height, top=1 - top / height, hspace=0.12)
    figure.text(0.085, 1 - 0.34 / height, run.name, fontsize=13, fontweight="bold", color=_INK)
    figure.text(0.085, 1 - 0.58 / height, " · ".join(filter(None, [_subtitle(run), note])), fontsize=9, color=_MUTED)
    for ax in axes:
        dress(ax)
    return figure, axes


def dress(ax: Axes) -> None:
    """The look that all our plots share: a faint grid, two spines, quiet ticks."""
    ax.grid(color=_GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(colors=_MUTED, labelsize=9, length=3)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_MUTED)
    ax.xaxis.label.set_color(_INK)
    ax.yaxis.label.set_color(_INK)


def _subtitle(run: Run) -> str:
    meta = run.meta
    return " · ".join(filter(None, [
        meta.get("variant"),
        f"{format_count(meta['parameters'])} parameters" if "parameters" in meta else None,
        f"{format_count(run.tokens)} tokens" if run.tokens else None,
        meta.get("device"),
    ]))


def _speed_text(run: Run) -> str:
    memory = known(run.train, "memory_gib")
    waited, took = known(run.train, "data_ms"), known(run.train, "step_ms")
    return " · ".join(filter(None, [
        f"peak memory {max(memory):.1f} GiB" if memory else None,
        f"{sum(waited) / sum(took):.1%} waiting for data" if waited and sum(took) else None,
    ]))


def _columns(rows: list[Row], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Two columns; null becomes NaN."""
    import numpy as np

    return tuple(np.array([float("nan") if row.get(name) is None else row[name] for row in rows], dtype=float)
                 for name in (x, y))


def _mark_phases(ax: Axes, run: Run, x: str, label: Callable[[int, list[Row]], str]) -> None:
    """A dashed line wherever the sequence length changes, and each phase's label at the top."""
    phases = phase_rows(run.train)
    if not phases:
        return
    low, high = ax.get_xlim()
    starts = [low] + [phase.rows[0][x] for phase in phases[1:]]
    for start, end, phase in zip(starts, [*starts[1:], high], phases, strict=True):
        if start > low:
            ax.axvline(start, color=_MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        text = label(*phase)
        if end - start >= _LABEL_CHARACTER * len(text) * (high - low):
            ax.annotate(text, (start, 1.0), (6, -4), xycoords=ax.get_xaxis_transform(), textcoords="offset points",
                        va="top", fontsize=8.5, color=_MUTED, zorder=5,
                        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1})


def _mark_resumes(ax: Axes, run: Run, x: str) -> None:
    """A small triangle on the axis where the run was continued."""
    at = {row["step"]: row[x] for row in run.train}
    steps = [max((s for s in at if s <= meta["start_step"]), default=None) for meta in run.metas[1:]]
    places = [at[step] for step in steps if step is not None]
    if places:
        ax.plot(places, [0.0] * len(places), "^", transform=ax.get_xaxis_transform(), color=_INK, markersize=6,
                clip_on=False, label="resumed")


def _cut_the_start_off(ax: Axes, loss: np.ndarray, val_loss: np.ndarray) -> None:
    """Leave the first fall out of the frame where it would flatten everything else."""
    import numpy as np

    values = np.concatenate([loss, val_loss])
    low, high = values.min(), max(np.quantile(loss, 0.985), val_loss.max(initial=-np.inf))
    room = 0.05 * (high - low)
    if room > 0:
        ax.set_ylim(low - room, high + 2 * room)


def _step_axis(ax: Axes, train: list[Row]) -> None:
    """Steps on the upper edge; they are not proportional to tokens where the sequence length changes."""
    import numpy as np

    tokens, steps = _columns(train, "tokens", "step")
    if len(steps) == 0 or steps[-1] <= 0:
        return
    tokens, steps = np.concatenate([[0.0], tokens]), np.concatenate([[0.0], steps])
    if not (np.diff(tokens) > 0).all():
        return
    # Beyond the last row as it went on until then: the axis ends a little after it.
    ends = 2 * tokens[-1] - tokens[-2], 2 * steps[-1] - steps[-2]
    reach = 10 * len(steps)
    tokens = np.append(tokens, tokens[-1] + reach * (ends[0] - tokens[-1]))
    steps = np.append(steps, steps[-1] + reach * (ends[1] - steps[-1]))
    upper = ax.secondary_xaxis("top", functions=(
        lambda x: np.interp(x, tokens, steps), lambda x: np.interp(x, steps, tokens)))
    upper.tick_params(colors=_MUTED, labelsize=8, length=3)
    upper.spines["top"].set_visible(False)
    _whole_ticks(upper)
    upper.set_xlabel("optimizer step", fontsize=8.5, color=_MUTED)


def _whole_ticks(ax: Axes) -> None:
    """Steps are whole numbers."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    ax.xaxis.set_major_formatter(lambda x, _: tick_text(x))
