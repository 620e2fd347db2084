"""The plots of the report: ratios to peers, and rooflines.

Made to be read in print and in grey: every kind has a marker and a line of its own beside its
colour, legends stand outside of the axes and hide nothing, text is at least 8 points.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

from fastinfer.bench.report import LINES, plain_numbers, save_figure

if TYPE_CHECKING:
    from report import Row, Section

SIZE = (7.6, 3.6)  # inches; a page is 7 wide
ROOF = {"color": "black", "linewidth": 1.0, "zorder": 1}


def plot_ratios(section: Section, title: str, folder: Path, pyplot: Any) -> str | None:
    """Every row's ratio, sorted, one line per kind of ours."""
    figure, axis = pyplot.subplots(figsize=SIZE)
    drawn: list[float] = []
    looks = iter(LINES * 4)
    for kind in sorted({result.row["peer"] for result in section.results}):
        ratios = sorted(
            ratio
            for result in section.results
            if result.row["peer"] == kind
            and (ratio := result.ratio(result.elsewhere) or result.ratio(result.same_run))
        )
        if ratios:
            share = [(i + 0.5) / len(ratios) * 100 for i in range(len(ratios))]
            color, marker, line = next(looks)
            name = "shared prefix, against\nfastinfer without" if kind == "shared prefix" else kind
            axis.plot(
                share,
                ratios,
                color=color,
                marker=marker,
                linestyle=line,
                markersize=4 if len(ratios) > 30 else 5,
                markevery=max(1, len(ratios) // 16),
                linewidth=1.3,
                label=f"{name}\n({len(ratios)} row{'s' * (len(ratios) > 1)})",
            )
            drawn += ratios
    if not drawn:
        pyplot.close(figure)
        return None
    axis.axhline(1, **ROOF)
    axis.set_yscale("log")
    ticks = [0.1, 0.2, 0.35, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6, 10, 20, 50, 100, 200]
    low, high = min(drawn) / 1.1, max(drawn) * 1.1
    low, high = min(low, 0.7), max(high, 1.4)
    if high / low < 2.5:
        ticks = [0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.4, 1.6, 2]
    elif high / low > 40:
        ticks = [0.1, 0.5, 1, 2, 5, 10, 20, 50, 100, 200]
    shown = [tick for tick in ticks if low <= tick <= high]
    axis.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axis.set_ylim(low, high)
    axis.set_xlim(0, 100)
    axis.minorticks_off()
    axis.set_xlabel("percentile of the rows")
    axis.set_ylabel("speed relative to the best peer")
    finish(axis, f"{title}, {section.gpu.upper()}")
    return save(figure, folder / f"{section.gpu}_{section.op}_ratio", pyplot)


def plot_roofline(
    section: Section, title: str, folder: Path, ceilings: Row, pyplot: Any
) -> str | None:
    """Rate against arithmetic intensity (rows that have both), else against bytes.

    Rows of a shared prefix are left out: their bytes are counted once per request, and read once.
    """
    rows = [r.row for r in section.results if r.row.get("gbs") and r.row.get("us")]
    rows = [row for row in rows if not row.get("prefix")]
    if len(rows) < 4 or not ceilings.get("gbs"):
        return None
    figure, axis = pyplot.subplots(figsize=SIZE)
    flops = [row for row in rows if row.get("tflops")]
    if len(flops) > len(rows) / 2:
        draw_compute(axis, flops, ceilings)
    else:
        draw_bytes(axis, rows, ceilings)
    finish(axis, f"{title}, {section.gpu.upper()}")
    return save(figure, folder / f"{section.gpu}_{section.op}_roofline", pyplot)


def draw_compute(axis: Any, rows: Sequence[Row], ceilings: Row) -> None:
    """Operations per second over operations per byte, under the roof of this machine."""
    largest = max(max(row["tflops"] for row in rows), ceilings["tflops"])
    scale, unit = (1.0, "TFLOP/s") if largest >= 1 else (1e3, "GFLOP/s")
    lowest = math.inf
    for number, kind in enumerate(sorted({row["peer"] for row in rows})):
        own = [row for row in rows if row["peer"] == kind]
        color, marker, _ = LINES[number % len(LINES)]
        x = [row["tflops"] * 1e3 / row["gbs"] for row in own]
        y = [row["tflops"] * scale for row in own]
        axis.plot(x, y, marker, color=color, markersize=4.5, fillstyle="none", label=kind)
        lowest = min(lowest, *x)
    low, high = lowest / 2, axis.get_xlim()[1]
    knee = ceilings["tflops"] * 1e3 / ceilings["gbs"]
    roof = [low, knee, max(high, knee * 1.5)]
    axis.plot(
        roof,
        [scale * min(x * ceilings["gbs"] / 1e3, ceilings["tflops"]) for x in roof],
        label="roof: copy rate,\nbf16 matmul of torch",
        **ROOF,
    )
    axis.set_xscale("log")
    axis.set_yscale("log")
    plain_numbers(axis.xaxis, (1.0,))
    low, high = axis.get_ylim()
    plain_numbers(axis.yaxis, (1.0, 2.0, 5.0) if high / low < 200 else (1.0,))
    axis.set_xlabel("operations per byte")
    axis.set_ylabel(unit)


def draw_bytes(axis: Any, rows: Sequence[Row], ceilings: Row) -> None:
    """Bytes per second over bytes; kinds of cache apart where there are several."""
    scale, unit = (1e3, "TB/s") if ceilings["gbs"] >= 1e3 else (1.0, "GB/s")

    def kind_of(row: Row) -> str:
        if "swap" in str(row.get("case")):
            return "swap, device\nto host or back"
        return f"{row['kv']} cache" if row.get("kv") else str(row["peer"])

    for number, kind in enumerate(sorted({kind_of(row) for row in rows})):
        own = [row for row in rows if kind_of(row) == kind]
        color, marker, _ = LINES[number % len(LINES)]
        x = [row["gbs"] * row["us"] / 1e3 for row in own]  # MB
        y = [row["gbs"] / scale for row in own]
        axis.plot(x, y, marker, color=color, markersize=4.5, fillstyle="none", label=kind)
    axis.axhline(ceilings["gbs"] / scale, label="copy of torch", **ROOF)
    axis.set_xscale("log")
    plain_numbers(axis.xaxis, (1.0,))
    axis.set_xlabel("MB moved")
    axis.set_ylabel(unit)
    axis.set_ylim(bottom=0)


def finish(axis: Any, title: str) -> None:
    """Title, grid, and the legend beside the axes."""
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def save(figure: Any, stem: Path, pyplot: Any) -> str:
    stem.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    save_figure(figure, stem.with_suffix(".png"))
    save_figure(figure, stem.with_suffix(".svg"))
    pyplot.close(figure)
    return stem.name
