"""Plots of how speed grows and falls, from results of ``oneb bench``. Reads files only; needs matplotlib, no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneb.errors import OnebError
from oneb.files import atomic_writer
from oneb.inspect.plots import dress, tick_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LENGTH_PLOT = "growth_length.png"
BATCH_PLOT = "growth_batch.png"
ROOFLINE_PLOT = "roofline.png"

Row = dict[str, Any]

_DPI = 160
_INK, _MUTED = "#1f2328", "#6b7280"
# Okabe & Ito's palette (jfly.uni-koeln.de/color): told apart by the colour-blind, too. A colour means a variant.
_VARIANT_COLORS = {"baseline": "#0072b2", "decoupled": "#d55e00", "gqa": "#009e73", "gqa_kv2": "#cc79a7",
                   "bottleneck": "#8a6d00"}
_PRECISION_MARKERS = {"bf16": "o", "fp8": "s", "fp16": "^", "fp32": "D"}
# Parts of a token's time: key in a row's prediction or breakdown, name, colour.
_PARTS = (
    ("gemm", "products", "#0072b2"), ("attention", "attention", "#d55e00"), ("elementwise", "elementwise", "#009e73"),
    ("fp8_casts", "fp8 casts", "#56b4e9"), ("loss", "loss", "#cc79a7"), ("optimizer", "optimizer", "#8a6d00"),
    ("grad_accumulation", "gradient sums", "#f0b400"), ("kernel_starts", "kernel starts", "#9ca3af"),
    ("other", "other", "#4b5563"), ("idle", "idle", "#e5e7eb"), ("whole", "not profiled", "#c7d2da"),
)


def write_growth(results: Sequence[str | Path], folder: str | Path) -> list[Path]:
    """Draw what there are rows for.

    * ``growth_length.png``: tokens a second over the sequence length, from rows whose micro-batch was "auto";
    * ``growth_batch.png``: over the micro-batch, from rows that were given one, at the length with most of them;
    * ``roofline.png``: a token's time by part, predicted and measured, a pair of bars a variant.

    Args:
        results: files that ``oneb bench --out`` wrote; their rows are drawn together.
        folder: for the PNG files; made if it is not there.

    Returns:
        The paths written.

    Raises:
        OnebError: a file holds no results, or matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OnebError("the plots need matplotlib, which is not installed; `python3 -m pip install matplotlib`, "
                        "then `oneb bench --show RESULTS --plots FOLDER`") from None
    rows, where = _read(results)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    by_length = [row for row in rows if row["asked_batch_size"] == "auto"]
    by_batch = _of_most_common_length([row for row in rows if row["asked_batch_size"] != "auto"])
    drawings = [
        (LENGTH_PLOT, _varied(by_length, "seq_len"), lambda found: length_figure(found, where)),
        (BATCH_PLOT, _varied(by_batch, "batch_size"), lambda found: batch_figure(found, where)),
        (ROOFLINE_PLOT, _one_a_curve(rows), lambda found: roofline_figure(found, where)),
    ]
    written = []
    for name, found, draw in drawings:
        if found:
            with atomic_writer(folder / name) as file:
                draw(found).savefig(file, format="png", dpi=_DPI, facecolor="white")
            written.append(folder / name)
    return written


def _read(results: Sequence[str | Path]) -> tuple[list[Row], str]:
    """The rows that were measured, and what they were measured on."""
    rows, places = [], []
    for path in results:
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            rows += [row for row in record["rows"] if not row.get("error")]
        except (OSError, ValueError, KeyError, TypeError):
            raise OnebError(f"{path} holds no results of `oneb bench`; give a file that its --out wrote") from None
        places.append(" · ".join(filter(None, [
            record.get("gpu"), record.get("torch") and f"torch {record['torch']}",
            record.get("commit") and f"commit {record['commit']}"])))
    return rows, "; ".join(dict.fromkeys(places))


def _of_most_common_length(rows: list[Row]) -> list[Row]:
    lengths = [row["seq_len"] for row in rows]
    return [row for row in rows if row["seq_len"] == max(set(lengths), key=lambda n: (lengths.count(n), n))]


def _varied(rows: list[Row], x: str) -> list[Row]:
    """The rows of curves that have more than one point along ``x``."""
    places = {curve: {row[x] for row in rows if _curve(row) == curve} for curve in map(_curve, rows)}
    return [row for row in rows if len(places[_curve(row)]) > 1]


def _one_a_curve(rows: list[Row]) -> list[Row]:
    """A row for each variant and precision, at the length that most have; profiled ones first, then large batches."""
    found: dict[tuple, Row] = {}
    drawn = [row for row in rows if row.get("predicted") or row.get("breakdown")]
    for row in sorted(_of_most_common_length(drawn),
                      key=lambda row: (bool(row.get("breakdown")), row["asked_batch_size"] == "auto", row["tok_s"])):
        found[_curve(row)] = row
    order = {_curve(row): place for place, row in reversed(list(enumerate(rows)))}
    return sorted(found.values(), key=lambda row: order[_curve(row)])


def _curve(row: Row) -> tuple[str, bool, str]:
    return row["variant"], bool(row.get("null_attn")), row["precision"]


def _label(row: Row) -> str:
    return f"{row['variant']}{' + null' if row.get('null_attn') else ''}, {row['precision']}"


# ---- the figures

def length_figure(rows: list[Row], where: str) -> Figure:
    """Tokens a second over the sequence length."""
    tokens = {row["tokens_per_step"] for row in rows}
    note = f"{tick_text(max(tokens))} tokens a step · largest micro-batch that fits · {where}"
    figure, ax = _axes("Speed over sequence length", note)
    _curves(ax, rows, "seq_len")
    ax.set_xlabel("sequence length (tokens)")
    return figure


def batch_figure(rows: list[Row], where: str) -> Figure:
    """Tokens a second over the micro-batch."""
    note = f"{rows[0]['seq_len']:,} tokens a sequence, {tick_text(rows[0]['tokens_per_step'])} a step · {where}"
    figure, ax = _axes("Speed over micro-batch", note)
    _curves(ax, rows, "batch_size")
    ax.set_xlabel("micro-batch (sequences)")
    return figure


def roofline_figure(rows: list[Row], where: str) -> Figure:
    """A token's time by part: what the ceilings allow, and below it what was measured."""
    from matplotlib.patches import Patch

    bars: list[tuple[float, dict[str, float], str]] = []  # (place, parts by key in microseconds, name)
    place = 0.0
    for row in rows:
        if row.get("predicted"):
            bars.append((place, _predicted_parts(row), f"{_label(row)}  roofline"))
            place += 0.85
        bars.append((place, _measured_parts(row), "measured"))
        place += 1.35
    height = 1.75 + 0.42 * place
    figure, ax = _axes("Where a token's time goes", f"{rows[0]['seq_len']:,} tokens a sequence · {where}",
                       height=height, left=0.235, bottom=0.98)
    for place, parts, name in bars:
        left = 0.0
        for key, _, color in _PARTS:
            if width := max(0.0, parts.get(key, 0.0)):
                ax.barh(place, width, left=left, height=0.72, edgecolor="white", linewidth=0.6,
                        color=color if name == "measured" else _pale(color))
                left += width
        ax.annotate(f"{left:.1f} µs, {tick_text(1e6 / left)} tok/s", (left, place), (5, 0), va="center",
                    textcoords="offset points", fontsize=8.5, color=_INK)
    ax.set_yticks([place for place, *_ in bars], [name for *_, name in bars], fontsize=9, color=_INK)
    ax.set_ylim(place + 0.6, -0.6)
    ax.set_xlim(0, 1.24 * max(sum(parts.values()) for _, parts, _ in bars))
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("microseconds of one GPU a token")
    shown = [(title, color) for key, title, color in _PARTS if any(parts.get(key) for _, parts, _ in bars)]
    figure.legend([Patch(color=color) for _, color in shown], [title for title, _ in shown], loc="lower left",
                  bbox_to_anchor=(0.02, 0.06 / height), ncols=len(shown), frameon=False, fontsize=8, labelcolor=_INK,
                  handlelength=1.0, columnspacing=1.1, handletextpad=0.5)
    return figure


def _predicted_parts(row: Row) -> dict[str, float]:
    return row["predicted"]["us_per_token"]


def _measured_parts(row: Row) -> dict[str, float]:
    """The timed step's microseconds a token, split as the profiled steps were."""
    whole = 1e6 / row["tok_s"]
    breakdown = row.get("breakdown")
    if not breakdown:
        return {"whole": whole}
    total = sum(breakdown["share"].values())  # above 1 where kernels overlap
    return {key: whole * share / total for key, share in breakdown["share"].items()}


# ---- pieces

def _axes(
    title: str, note: str, *, height: float = 5.0, left: float = 0.085, bottom: float = 0.55
) -> tuple[Figure, Axes]:
    """An empty figure ``height`` inches high; no pyplot and no rcParams, so that nothing outlives the drawing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, height))
    ax = figure.subplots()
    figure.subplots_adjust(left=left, right=0.97, bottom=bottom / height, top=1 - 0.85 / height)
    figure.text(0.03, 1 - 0.34 / height, title, fontsize=13, fontweight="bold", color=_INK)
    figure.text(0.03, 1 - 0.6 / height, note, fontsize=9, color=_MUTED)
    dress(ax)
    return figure, ax


def _curves(ax: Axes, rows: list[Row], x: str) -> None:
    """A measured line a variant and precision, the predicted one dashed; base-2 axis, speeds from zero."""
    for curve in dict.fromkeys(map(_curve, rows)):
        points = sorted((row for row in rows if _curve(row) == curve), key=lambda row: row[x])
        color = _VARIANT_COLORS.get(curve[0], _INK)
        hollow = curve[2] != "bf16"
        ax.plot([row[x] for row in points], [row["tok_s"] for row in points], color=color, linewidth=1.8,
                marker=_PRECISION_MARKERS.get(curve[2], "o"), markersize=6, markeredgecolor=color,
                markerfacecolor="white" if hollow else color, label=_label(points[0]), zorder=3)
        known = [row for row in points if row.get("predicted")]
        ax.plot([row[x] for row in known], [row["predicted"]["tok_s"] for row in known], color=color, linewidth=1.2,
                linestyle=(0, (4, 3)), alpha=0.75)
    ax.plot([], [], color=_MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label="roofline, from measured ceilings"
            if _sources(rows) == {"measured"} else "roofline")
    ax.set_xscale("log", base=2)
    values = sorted({row[x] for row in rows})
    ax.set_xticks(values, [f"{value:,}" for value in values])
    ax.minorticks_off()
    tops = [row["tok_s"] for row in rows] + [row["predicted"]["tok_s"] for row in rows if row.get("predicted")]
    ax.set_ylim(0, 1.08 * max(tops))
    ax.yaxis.set_major_formatter(lambda value, _: tick_text(value))
    ax.set_ylabel("tokens a second")
    ax.legend(loc="lower left", frameon=False, fontsize=9, labelcolor=_INK, ncols=2)


def _pale(color: str) -> str:
    """Half way to white."""
    return "#" + "".join(f"{(int(color[i:i + 2], 16) + 255) // 2:02x}" for i in (1, 3, 5))


def _sources(rows: Iterable[Row]) -> set[str]:
    return {row["predicted"]["source"] for row in rows if row.get("predicted")}
