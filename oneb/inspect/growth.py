"""Plots of how speed grows and falls, from results of ``oneb bench``. Needs matplotlib, and no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
# Okabe & Ito's palette (jfly.uni-koeln.de/color): told apart by the colour-blind, too. A colour means a variant. Curves
# come in the order of this and the next.
_VARIANT_COLORS = {"baseline": "#0072b2", "gqa": "#009e73", "gqa_kv2": "#cc79a7", "bottleneck": "#8a6d00",
                   "decoupled": "#d55e00"}
_PRECISION_MARKERS = {"bf16": "o", "fp8": "s", "fp16": "^", "fp32": "D"}
_EXPECTED_DASHES = (0, (4, 3))
# Parts of a token's time: key in a row's prediction or breakdown, name, colour.
_PARTS = (
    ("gemm", "products", "#0072b2"), ("attention", "attention", "#d55e00"), ("elementwise", "elementwise", "#009e73"),
    ("fp8_casts", "fp8 casts", "#56b4e9"), ("loss", "loss", "#cc79a7"), ("optimizer", "optimizer", "#8a6d00"),
    ("grad_accumulation", "gradient sums", "#f0b400"), ("kernel_starts", "kernel starts", "#9ca3af"),
    ("other", "other", "#4b5563"), ("idle", "idle", "#e5e7eb"), ("whole", "not profiled", "#c7d2da"),
)


def write_growth(records: Sequence[dict[str, Any]], folder: str | Path) -> list[Path]:
    """Draw what there are rows for, measured speeds with the expected ones (``expected_tok_s``) dashed beside them.

    * ``growth_length.png``: tokens a second over the sequence length, from rows whose micro-batch was "auto";
    * ``growth_batch.png``: over the micro-batch, from rows that were given one, at the length with most of them;
    * ``roofline.png``: a token's time by part, at the ceilings and measured, a pair of bars a variant and precision.

    Args:
        records: files that ``oneb bench --out`` wrote, as read; their rows are drawn together. Where two hold the same
            point of a curve, the first one's is drawn.
        folder: for the PNG files; made if it is not there.

    Returns:
        The paths written.

    Raises:
        OnebError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OnebError("the plots need matplotlib, which is not installed; `python3 -m pip install matplotlib`, "
                        "then `oneb bench --show RESULTS --plots FOLDER`") from None
    rows = [{**row, "measured_on": {key: record.get(key) for key in ("gpu", "torch", "commit")}}
            for record in records for row in record["rows"] if not row.get("error")]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    by_length = [row for row in rows if row["asked_batch_size"] == "auto"]
    by_batch = _of_most_common_length([row for row in rows if row["asked_batch_size"] != "auto"])
    drawings: list[tuple[str, list[Row], Callable[[list[Row], str], Figure]]] = [
        (LENGTH_PLOT, _varied(by_length, "seq_len"), length_figure),
        (BATCH_PLOT, _varied(by_batch, "batch_size"), batch_figure),
        (ROOFLINE_PLOT, _one_a_curve(rows), roofline_figure),
    ]
    written = []
    for name, found, draw in drawings:
        if found:
            with atomic_writer(folder / name) as file:
                draw(found, _where(found)).savefig(file, format="png", dpi=_DPI, facecolor="white")
            written.append(folder / name)
    return written


def _where(rows: list[Row]) -> str:
    """What the rows were measured on."""
    parts = []
    for key, title in (("gpu", ""), ("torch", "torch "), ("commit", "commit ")):
        values = [value for value in dict.fromkeys(row["measured_on"][key] for row in rows) if value]
        parts += [title + ", ".join(values)] if values else []
    return " · ".join(parts)


def _of_most_common_length(rows: list[Row]) -> list[Row]:
    lengths = [row["seq_len"] for row in rows]
    return [row for row in rows if row["seq_len"] == max(set(lengths), key=lambda n: (lengths.count(n), n))]


def _varied(rows: list[Row], x: str) -> list[Row]:
    """The rows of curves that have more than one point along ``x``, one a point."""
    curves: dict[tuple, dict[int, Row]] = {}
    for row in rows:
        curves.setdefault(_curve(row), {}).setdefault(row[x], row)
    found = [row for points in curves.values() if len(points) > 1 for row in points.values()]
    return sorted(found, key=lambda row: (_place(row), row[x]))


def _one_a_curve(rows: list[Row]) -> list[Row]:
    """A row for each variant and precision, at the length that most have; profiled ones first, then large batches."""
    found: dict[tuple, Row] = {}
    drawn = [row for row in rows if row.get("predicted") or row.get("breakdown")]
    for row in sorted(_of_most_common_length(drawn),
                      key=lambda row: (bool(row.get("breakdown")), row["asked_batch_size"] == "auto", row["tok_s"])):
        found[_curve(row)] = row
    return sorted(found.values(), key=_place)


def _curve(row: Row) -> tuple[str, bool, str]:
    return row["variant"], bool(row.get("null_attn")), row["precision"]


def _place(row: Row) -> tuple[int, bool, int]:
    """Where a row's curve stands among the others."""
    variant, null, precision = _curve(row)
    return [*_VARIANT_COLORS, variant].index(variant), null, [*_PRECISION_MARKERS, precision].index(precision)


def _label(row: Row) -> str:
    return f"{row['variant']}{' + null' if row.get('null_attn') else ''}, {row['precision']}"


# ---- the figures

def length_figure(rows: list[Row], where: str) -> Figure:
    """Tokens a second over the sequence length."""
    note = (f"{_span(row['tokens_per_step'] for row in rows)} tokens a step, "
            f"{_span(row['batch_size'] * row['seq_len'] for row in rows)} a micro-batch · {where}")
    figure, ax = _axes("Speed over sequence length", note)
    _curves(ax, rows, "seq_len")
    ax.set_xlabel("sequence length (tokens)")
    return figure


def batch_figure(rows: list[Row], where: str) -> Figure:
    """Tokens a second over the micro-batch."""
    note = (f"{rows[0]['seq_len']:,} tokens a sequence, {_span(row['tokens_per_step'] for row in rows)} a step"
            f" · {where}")
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
            bars.append((place, row["predicted"]["us_per_token"], f"{_label(row)}  roofline"))
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
                        color=color if name == "measured" else _half_way(color, 255))
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
    """A measured line a variant and precision, the expected one dashed; base-2 axis, speeds from zero."""
    for curve in dict.fromkeys(map(_curve, rows)):
        points = sorted((row for row in rows if _curve(row) == curve), key=lambda row: row[x])
        color = _VARIANT_COLORS.get(curve[0], _INK)
        hollow = curve[2] != "bf16"
        ax.plot([row[x] for row in points], [row["tok_s"] for row in points], color=color, linewidth=1.8,
                marker=_PRECISION_MARKERS.get(curve[2], "o"), markersize=6, markeredgecolor=color,
                markerfacecolor="white" if hollow else color, label=_label(points[0]), zorder=3)
        known = [row for row in points if row.get("expected_tok_s")]
        ax.plot([row[x] for row in known], [row["expected_tok_s"] for row in known], color=_half_way(color, 0),
                linewidth=1.2, linestyle=_EXPECTED_DASHES, zorder=4)
    if any(row.get("expected_tok_s") for row in rows):
        ax.plot([], [], color=_INK, linewidth=1.2, linestyle=_EXPECTED_DASHES, label="expected, as plans show it")
    ax.set_xscale("log", base=2)
    values = sorted({row[x] for row in rows})
    ax.set_xticks(values, [f"{value:,}" for value in values])
    ax.minorticks_off()
    ax.set_ylim(0, 1.08 * max(max(row["tok_s"], row.get("expected_tok_s") or 0) for row in rows))
    ax.yaxis.set_major_formatter(lambda value, _: tick_text(value))
    ax.set_ylabel("tokens a second")
    # Filled by columns: a variant's precisions stand below each other.
    ax.legend(loc="lower left", frameon=False, fontsize=9, labelcolor=_INK, ncols=3)


def _span(values: Iterable[int]) -> str:
    """"65.5K", or "32.8K to 65.5K" where they differ."""
    found = sorted(values)
    return " to ".join(dict.fromkeys([tick_text(found[0]), tick_text(found[-1])]))


def _half_way(color: str, to: int) -> str:
    """Half way to black (0) or white (255)."""
    return "#" + "".join(f"{(int(color[i:i + 2], 16) + to) // 2:02x}" for i in (1, 3, 5))

