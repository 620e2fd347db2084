"""Search for the engine settings with the most requests per second inside latency limits.

The settings are searched along one axis at a time, uphill from the defaults: neighbours on the
axis (every value, where they have no order) are tried until none is better, then the next axis,
round after round, until a whole round or the budget of trials ends without a gain. Goodput along an
axis has one hill in practice (a larger token budget trades time per token for time to first token),
which is what this relies on.

A trial offers the workload at several rates, the highest first, and keeps the best goodput: beyond
saturation queues grow and requests miss the limits, below it requests are missing. No tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Settings = dict[str, Any]
Figures = Mapping[str, Any]

_FRACTIONS = (0.95, 0.8, 0.65, 0.5, 0.35, 0.2)  # of the saturated request rate
_ALL_WITHIN = 0.99  # share of requests inside the limits from which slower arrivals gain nothing
_GAIN = 1.01  # a setting must be this much better to replace another: runs differ by less


@dataclass(slots=True)
class Trial:
    """One set of settings with the figures of its best rate; `error` where it could not run."""

    settings: Settings
    goodput: float = 0.0
    rate: float = math.inf
    figures: Figures = field(default_factory=dict)
    error: str | None = None

    @property
    def ttft(self) -> float:
        """90th percentile in milliseconds."""
        return float(self.figures.get("p90_ttft_ms", math.inf))

    @property
    def tpot(self) -> float:
        """90th percentile in milliseconds."""
        return float(self.figures.get("p90_tpot_ms", math.inf))

    @property
    def throughput(self) -> float:
        """Output tokens per second."""
        return float(self.figures.get("output_throughput", 0.0))

    def beats(self, other: Trial) -> bool:
        """More goodput; where neither has any, nearer to having some by throughput."""
        if self.goodput or other.goodput:
            return self.goodput > _GAIN * other.goodput
        return self.throughput > _GAIN * other.throughput


def best_rate(
    settings: Settings, offer: Callable[[float], Figures], limits: Mapping[str, float]
) -> Trial:
    """The rate with the most goodput.

    Args:
        settings: Of the engine under test.
        offer: Runs the workload at a rate (requests per second); returns the figures of
            `describe_load` with `goodput=limits`.
        limits: In milliseconds, as in `summarize`.
    """
    saturated = offer(math.inf)
    best = Trial(settings, saturated["request_goodput"], math.inf, saturated)
    capacity = saturated["request_throughput"]
    if not limits or within(saturated) >= _ALL_WITHIN:
        return best
    for fraction in _FRACTIONS:
        if best.goodput >= fraction * capacity:
            break  # fewer requests than are already served in time
        figures = offer(fraction * capacity)
        if figures["request_goodput"] > best.goodput:
            best = Trial(settings, figures["request_goodput"], fraction * capacity, figures)
        if within(figures) >= _ALL_WITHIN:
            break
    return best


def within(figures: Figures) -> float:
    """Share of the completed requests inside the limits."""
    rate = figures["request_throughput"]
    return float(figures["request_goodput"] / rate) if rate else 0.0


def climb(
    start: Settings,
    axes: Mapping[str, Sequence[Any]],
    measure: Callable[[Settings], Trial],
    *,
    max_trials: int,
    unordered: Collection[str] = (),
) -> Iterator[Trial]:
    """Every trial as it is done; the caller keeps what it needs.

    Args:
        start: A value for every axis.
        axes: Values of each setting in their order.
        measure: Runs a trial.
        max_trials: Most trials.
        unordered: Axes without neighbours: each of their values is tried.
    """
    done: dict[str, Trial] = {}

    def run(settings: Settings) -> Iterator[Trial]:
        key = json.dumps(settings, sort_keys=True)
        if key not in done and len(done) < max_trials:
            done[key] = measure(settings)
            yield done[key]

    yield from run(start)
    (best,) = done.values()
    improved = True
    while improved and len(done) < max_trials:
        improved = False
        for name, values in axes.items():
            each = name in unordered
            for way in range(len(values) if each else 2):
                at = values.index(best.settings[name])
                ordered = values[:at][::-1] if way else values[at + 1 :]
                for value in values[way : way + 1] if each else ordered:
                    settings = {**best.settings, name: value}
                    yield from run(settings)
                    trial = done.get(json.dumps(settings, sort_keys=True))
                    if trial is None or not trial.beats(best):
                        break
                    best, improved = trial, True


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Those that no other beats in goodput and both latencies at once, the best goodput first."""
    ran = [trial for trial in trials if trial.error is None]

    def dominated(trial: Trial) -> bool:
        return any(
            other.goodput >= trial.goodput
            and other.ttft <= trial.ttft
            and other.tpot <= trial.tpot
            and (other.goodput, -other.ttft, -other.tpot)
            != (trial.goodput, -trial.ttft, -trial.tpot)
            for other in ran
        )

    kept = [trial for trial in ran if not dominated(trial)]
    return sorted(kept, key=lambda trial: (-trial.goodput, -trial.throughput, trial.ttft))


def front_table(trials: Sequence[Trial], axes: Sequence[str]) -> str:
    """One line per trial."""
    titles = ("goodput/s", "rate", "out tok/s", "TTFT p90", "TPOT p90")
    lines = ["".join(f"{title:>11}" for title in titles) + "  settings"]
    for trial in trials:
        rate = "inf" if math.isinf(trial.rate) else f"{trial.rate:.2f}"
        cells = [f"{trial.goodput:.2f}", rate, f"{trial.throughput:,.0f}"]
        cells += [f"{trial.ttft:,.1f}", f"{trial.tpot:,.2f}"]
        told = ", ".join(f"{name}={trial.settings[name]}" for name in axes)
        lines.append("".join(f"{cell:>11}" for cell in cells) + "  " + told)
    return "\n".join(lines)


def plot_front(trials: Sequence[Trial], path: str | Path, limits: Mapping[str, float]) -> None:
    """Goodput against both latencies, every trial, the front marked, the limits as lines.

    Raises:
        ValueError: matplotlib is not installed.
    """
    from .report import LINES, legend_above, plain_numbers, require_matplotlib

    pyplot = require_matplotlib()
    ran = [trial for trial in trials if trial.error is None]
    best = front(trials)
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, name in zip(axes, ("ttft", "tpot"), strict=True):
        for chosen, (color, marker, _), size, label in (
            (ran, LINES[0], 10, "tried"),
            (best, LINES[1], 5, "front"),
        ):
            values, rates = [getattr(t, name) for t in chosen], [t.goodput for t in chosen]
            fill = "none" if label == "tried" else "full"
            style = {"color": color, "fillstyle": fill, "markersize": size, "label": label}
            axis.plot(values, rates, marker, **style)
        if name in limits:
            axis.axvline(limits[name], linestyle="--", color="gray", label="limit")
        axis.set_xlabel(f"{name.upper()}, 90th percentile, ms")
        axis.set_xscale("log")
        plain_numbers(axis.xaxis)
        axis.grid(alpha=0.3)
        legend_above(axis)
    axes[0].set_ylabel("requests per second within the limits")
    axes[0].set_ylim(0, 1.1 * max(trial.goodput for trial in ran) or 1)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
