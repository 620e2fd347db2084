"""The results of `fastinfer ablate` as a table and as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .ablate_cost import PARTS
from .report import LINES, legend_above, plain_numbers, require_matplotlib, save_figure

Result = dict[str, Any]

_COLUMNS = (
    ("at_once", "at once", "{}"),
    ("ttft_ms", "TTFT ms", "{:.1f}"),
    ("tpot_ms", "TPOT ms", "{:.2f}"),
    ("itl_p99_ms", "gap p99", "{:.1f}"),
    ("out_tok_s", "tok/s", "{:,.0f}"),
    ("speedup", "x before", "{:.2f}"),
    ("weights_mb", "weights MB", "{:,.1f}"),
    ("cache_mb", "cache MB", "{:,.2f}"),
    ("kv_waste", "unused", "{:.0%}"),
    ("perplexity", "ppl", "{:.4f}"),
    ("bound", "bound by", "{}"),
)
# Colour and hatch of a bar, dark to light, so that they differ in grey too.
_LOOKS = dict(
    zip(
        PARTS,
        (("#a3152a", ""), ("#4f7fc4", "//"), ("#8ccf98", ".."), ("#b79bd6", "xx"), ("#d5d5d5", "")),
        strict=True,
    )
)
_NOT_COUNTED = ("white", "\\\\")


def header() -> str:
    """The titles of the columns."""
    return f"{'':<24}" + "".join(f"{title:>11}" for _, title, _ in _COLUMNS)


def line(result: Result) -> str:
    """One row; what could not run says why, what got worse is marked with an asterisk."""
    title = result["title"] + (" *" if result.get("worse") else "")
    if "not_run" in result:
        return f"{title:<24}   {result['not_run']}"
    cells = [
        form.format(result[key]) if result.get(key) is not None else "" for key, _, form in _COLUMNS
    ]
    return f"{title:<24}" + "".join(f"{cell:>11}" for cell in cells)


def notes(results: Sequence[Result]) -> str:
    """What got worse, and why."""
    lines = []
    for result in results:
        if result.get("worse"):
            text = f"* {result['title']}: {', '.join(result['worse'])}. {result['why_worse']}."
            lines += textwrap.wrap(text, 110, subsequent_indent="  ")
    return "\n".join(lines)


def markdown(results: Sequence[Result]) -> list[str]:
    """The table for a page."""
    lines = ["| | " + " | ".join(title for _, title, _ in _COLUMNS) + " |"]
    lines.append("|---" * (len(_COLUMNS) + 1) + "|")
    for result in results:
        title = result["title"] + (" *" if result.get("worse") else "")
        if "not_run" in result:
            lines.append(f"| {title} | {result['not_run']} |" + " |" * (len(_COLUMNS) - 1))
            continue
        cells = [
            form.format(result[key]) if result.get(key) is not None else ""
            for key, _, form in _COLUMNS
        ]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def plot(results: Sequence[Result], path: Path, caption: str) -> list[Path]:
    """Throughput, latency and memory of every row that ran.

    Args:
        results: Of the rows, in order.
        path: .png or .svg; without either, both are written.
        caption: Over the picture.

    Returns:
        What was written.

    Raises:
        ValueError: matplotlib is not installed.
    """
    pyplot = require_matplotlib()
    from matplotlib import ticker

    ran = [result for result in results if "not_run" not in result]
    places = list(range(len(ran)))
    figure, axes = pyplot.subplots(
        1, 3, figsize=(13, 0.36 * len(ran) + 1.6), sharey=True, width_ratios=(1.25, 1, 1)
    )
    speed, times, memory = axes
    for bound in dict.fromkeys(result.get("bound", "") for result in ran):
        own = [i for i in places if ran[i].get("bound", "") == bound]
        speed.barh(
            own,
            [ran[i]["out_tok_s"] for i in own],
            label=bound or "not counted",
            **_bar(*_LOOKS.get(bound, _NOT_COUNTED)),
        )
    rates = [result["out_tok_s"] for result in ran]
    wide = max(rates) > 10 * min(rates)
    for i, rate in enumerate(rates):
        speed.annotate(
            f"{rate:,.0f}", (rate, i), (3, 0), textcoords="offset points", va="center", size=8
        )
    if wide:
        speed.set_xscale("log")
    speed.set_xlim(speed.get_xlim()[0] if wide else 0, max(rates) * (3 if wide else 1.25))
    speed.xaxis.set_major_formatter(ticker.FuncFormatter(lambda rate, _: f"{rate:,g}"))
    speed.xaxis.set_minor_formatter(ticker.NullFormatter())
    speed.set_xlabel("output tokens per second")
    legend_above(speed, "bound by")
    speed.set_yticks(
        places, [result["title"] + (" *" if result.get("worse") else "") for result in ran]
    )
    speed.set_ylim(len(ran) - 0.4, -0.6)  # the first row on top
    for (key, label), (color, marker, _), fill in zip(
        (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT"), ("itl_p99_ms", "gap, p99")),
        (LINES[0], LINES[1], LINES[5]),
        ("none", "full", "full"),
        strict=True,
    ):
        figures = [result[key] for result in ran]
        style = {"color": color, "fillstyle": fill, "label": label, "markersize": 6}
        times.plot(figures, places, marker, **style)
    times.set_xscale("log")
    times.set_xlabel("ms")
    plain_numbers(times.xaxis)
    times.minorticks_off()
    legend_above(times)
    weights = [result.get("weights_mb", 0.0) for result in ran]
    cache = [result.get("cache_mb", 0.0) for result in ran]
    wasted = [c * result.get("kv_waste", 0.0) for c, result in zip(cache, ran, strict=True)]
    unit, name = (1e3, "GB") if max(weights) > 2000 else (1, "MB")
    base = [0.0] * len(ran)
    for values, look, label in (
        (weights, _LOOKS["weights"], "weights"),
        ([c - w for c, w in zip(cache, wasted, strict=True)], _LOOKS["cache"], "cache, used"),
        (wasted, ("white", "xx"), "reserved, unused"),
    ):
        shown = [value / unit for value in values]
        memory.barh(places, shown, left=base, label=label, **_bar(*look))
        base = [b + value for b, value in zip(base, shown, strict=True)]
    memory.set_xlabel(name)
    legend_above(memory)
    for axis in axes:
        axis.grid(alpha=0.3, axis="x")
        axis.set_axisbelow(True)
    figure.suptitle(caption, fontsize=10)
    figure.tight_layout()
    files = (
        [path]
        if path.suffix in (".png", ".svg")
        else [path.with_name(path.name + end) for end in (".png", ".svg")]
    )
    for file in files:
        save_figure(figure, file)
    pyplot.close(figure)
    return files


def _bar(color: str, hatch: str) -> dict[str, Any]:
    return {"color": color, "hatch": hatch, "edgecolor": "#333333", "linewidth": 0.5}
