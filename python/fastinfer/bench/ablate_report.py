"""The results of `fastinfer ablate` as a table and as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .ablate_cost import PARTS
from .report import require_matplotlib, save_figure

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
_TINTS = ("red", "blue", "green", "purple", "gray")
_COLORS = {name: f"tab:{tint}" for name, tint in zip(PARTS, _TINTS, strict=True)}


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
            color=_COLORS.get(bound, "tab:orange"),
            label=bound or "not counted",
        )
    for i, result in enumerate(ran):
        rate = result["out_tok_s"]
        speed.text(rate * 1.05, i, f"{rate:,.0f}", va="center", size=8)
    speed.set_xscale("log")
    low, high = speed.get_xlim()
    speed.set_xlim(low, high * 3)
    speed.set_xlabel("output tokens per second")
    _legend(speed, "bound by")
    speed.set_yticks(
        places, [result["title"] + (" *" if result.get("worse") else "") for result in ran]
    )
    speed.invert_yaxis()
    for key, marker, label in (
        ("ttft_ms", "o", "TTFT"),
        ("tpot_ms", "s", "TPOT"),
        ("itl_p99_ms", "x", "gap, p99"),
    ):
        times.plot([result[key] for result in ran], places, marker, label=label, markersize=5)
    times.set_xscale("log")
    times.set_xlabel("ms")
    times.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    times.xaxis.set_major_formatter(ticker.FuncFormatter(lambda ms, _: f"{ms:g}"))
    times.minorticks_off()
    _legend(times)
    weights = [result.get("weights_mb", 0.0) for result in ran]
    cache = [result.get("cache_mb", 0.0) for result in ran]
    wasted = [c * result.get("kv_waste", 0.0) for c, result in zip(cache, ran, strict=True)]
    unit, name = (1e3, "GB") if max(weights) > 2000 else (1, "MB")
    base = [0.0] * len(ran)
    for values, color, label in (
        (weights, "tab:blue", "weights"),
        ([c - w for c, w in zip(cache, wasted, strict=True)], "tab:green", "cache, used"),
        (wasted, "tab:red", "reserved, unused"),
    ):
        shown = [value / unit for value in values]
        memory.barh(places, shown, left=base, color=color, label=label)
        base = [b + value for b, value in zip(base, shown, strict=True)]
    memory.set_xlabel(name)
    _legend(memory)
    for axis in axes:
        axis.grid(alpha=0.3, axis="x")
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


def _legend(axis: Any, title: str | None = None) -> None:
    """Above the axis, where it hides nothing."""
    axis.legend(
        title=title,
        fontsize=8,
        title_fontsize=8,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=3,
        frameon=False,
    )
