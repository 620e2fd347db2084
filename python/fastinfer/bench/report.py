"""Results of load tests: as JSON with the keys of vLLM's benchmarks, as tables, as a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engine.metrics import RequestMetrics, summarize
from .drive import LoadResult

Result = dict[str, Any]

_TIMES = ("ttft", "tpot", "itl", "e2el")
_RATES = (
    ("request_throughput", "requests/s"),
    ("request_goodput", "requests/s within the limits"),
    ("output_throughput", "output tokens/s"),
    ("total_token_throughput", "tokens/s in and out"),
    ("max_output_tokens_per_s", "peak output tokens/s"),
    ("max_concurrent_requests", "peak requests at once"),
)
# Of the latency and throughput benchmarks; smaller is better in those named here.
_OTHERS = (
    "avg_latency",
    "elapsed_time",
    "requests_per_second",
    "tokens_per_second",
)
# Of a plot: colour, marker and line, so that kinds differ in grey too.
LINES = (
    ("#1f4e9c", "o", "-"),
    ("#e07b00", "s", "--"),
    ("#2a8c3f", "^", "-."),
    ("#b3122a", "D", ":"),
    ("#7b4ea3", "v", (0, (5, 1, 1, 1, 1, 1))),
    ("#5a5a5a", "x", (0, (1, 1))),
)
_SMALLER = ("_ms", "latency", "elapsed_time", "duration")


def describe_load(
    load: LoadResult, *, goodput: dict[str, float] | None = None, detailed: bool = False
) -> Result:
    """The figures of a load test.

    Args:
        load: What was measured.
        goodput: Limits in milliseconds, see `summarize`.
        detailed: Also every request's lengths and times (seconds), under vLLM's names.
    """
    duration = load.duration if load.duration > 0 else None
    result: Result = dict(summarize(load.records, duration=duration, goodput=goodput))
    if (work := load.engine) is not None:
        asked = work.prefix_query_tokens
        result |= {
            "num_steps": work.num_steps,
            "num_preemptions": work.num_preemptions,
            "prefix_hit_rate": work.prefix_hit_tokens / asked if asked else 0.0,
            "kv_cache_peak_usage": work.kv_blocks_peak / work.kv_blocks_total,
        }
    if detailed:
        result |= per_request(load.records)
    return result


def per_request(records: Sequence[RequestMetrics]) -> Result:
    """Lists over the requests in order of arrival; times in seconds."""
    ordered = sorted(records, key=lambda record: record.arrival_time)
    return {
        "input_lens": [record.num_prompt_tokens for record in ordered],
        "output_lens": [record.num_output_tokens for record in ordered],
        "ttfts": [record.ttft for record in ordered],
        "itls": [record.itl for record in ordered],
        "tpots": [record.tpot for record in ordered],
        "e2els": [record.e2el for record in ordered],
        "cached_tokens": [record.num_cached_tokens for record in ordered],
    }


def table(result: Result) -> str:
    """The figures of one test as lines."""
    lines = []
    if "avg_latency" in result:
        lines.append(f"{'latency of a batch, mean':<28}{result['avg_latency']:>12.4f} s")
    completed = f"{result['completed']} of {result['completed'] + result['failed']}"
    lines.append(f"{'requests':<28}{completed:>12}")
    lines.append(f"{'tokens in':<28}{result['total_input_tokens']:>12,}")
    lines.append(f"{'tokens out':<28}{result['total_output_tokens']:>12,}")
    lines.append(f"{'duration':<28}{result['duration']:>12.2f} s")
    for key, label in _RATES:
        if key != "request_goodput" or result.get("goodput_limits"):
            lines.append(f"{label:<28}{result[key]:>12,.2f}")
    if "num_preemptions" in result:
        lines.append(f"{'preemptions':<28}{result['num_preemptions']:>12}")
        lines.append(f"{'prefix cache hits':<28}{result['prefix_hit_rate']:>12.1%}")
        lines.append(f"{'KV cache, peak':<28}{result['kv_cache_peak_usage']:>12.1%}")
    if "draft_acceptance_rate" in result:
        lines.append(f"{'drafts accepted':<28}{result['draft_acceptance_rate']:>12.1%}")
        lines.append(f"{'tokens per check':<28}{result['mean_accepted_length']:>12.2f}")
    for number, stage in enumerate(result.get("pipeline", [])):
        work = (
            f"{stage['layers']:.0f} layers, {stage['step_ms']:.2f} ms a step, "
            f"{stage['idle_share']:.1%} idle"
        )
        lines.append(f"{f'stage {number}':<28}{work}")
    lines.append("")
    stats = ("mean", "median", "p90", "p99")
    lines.append(f"{'ms':<8}" + "".join(f"{stat:>12}" for stat in stats))
    for name in _TIMES:
        values = "".join(f"{result[f'{stat}_{name}_ms']:>12.2f}" for stat in stats)
        lines.append(f"{name.upper():<8}{values}")
    return "\n".join(lines)


def sweep_table(results: Sequence[Result]) -> str:
    """One line per request rate."""
    head = ("rate", "req/s", "out tok/s", "TTFT p50", "p99", "TPOT p50", "p99", "goodput")
    keys = ("request_throughput", "output_throughput", "median_ttft_ms", "p99_ttft_ms")
    keys += ("median_tpot_ms", "p99_tpot_ms")
    lines = ["".join(f"{title:>11}" for title in head)]
    for result in results:
        cells = [f"{result['request_rate']}", *(f"{result[key]:,.2f}" for key in keys)]
        cells.append(f"{result['request_goodput']:,.2f}" if result["goodput_limits"] else "-")
        lines.append("".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def read_results(path: str | Path) -> list[Result]:
    """The tests in a JSON file of `fastinfer bench` or of vLLM's `bench`.

    Of vLLM: `bench serve --save-result` (one test), `--append-result` (a test per line), `bench
    latency --output-json`, `bench throughput --output-json` (its rates get the names that the
    others have too), and the list of a sweep.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It does not hold such results.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        try:
            data = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError:
            raise ValueError(f"bench: {path} must be a JSON file, got {error}") from None
    results = data if isinstance(data, list) else [data]
    if not results or not all(isinstance(r, dict) and _figures(r) for r in results):
        raise ValueError(
            f"bench: {path} must hold results of `fastinfer bench` or `vllm bench`, got none of "
            "their figures"
        )
    return [_named(result) for result in results]


def _named(result: Result) -> Result:
    """With the names of a load test too where vLLM's throughput benchmark has its own."""
    same = {
        "elapsed_time": "duration",
        "requests_per_second": "request_throughput",
        "tokens_per_second": "total_token_throughput",
        "num_requests": "completed",
    }
    more = {ours: result[theirs] for theirs, ours in same.items() if theirs in result}
    return {**more, **result}


def engine_of(result: Result) -> str:
    """Who was tested.

    Files of `vllm bench serve` call the kind of client their backend, whatever server answered:
    their label, if they have one, says more. Those of its other benchmarks say nothing.
    """
    if "endpoint_type" in result:
        return str(result.get("label") or f"vllm bench, {result.get('backend')}")
    return str(result.get("backend") or "vllm")


def _figures(result: Result) -> list[str]:
    names = [f"{stat}_{t}_ms" for t in _TIMES for stat in ("mean", "median", "p90", "p99")]
    wanted = [*(key for key, _ in _RATES), *_OTHERS, "duration", *names]
    return [key for key in wanted if isinstance(result.get(key), (int, float))]


def compare(first: Sequence[Result], second: Sequence[Result]) -> str:
    """The figures both have, side by side, with the ratio second / first.

    Args:
        first: Of `read_results`.
        second: Likewise; tests are paired by request rate, or else in order.

    Raises:
        ValueError: They have no figure in common.
    """
    lines = []
    for a, b in _pairs(first, second):
        keys = [key for key in _figures(a) if key in _figures(b)]
        if not keys:
            raise ValueError("bench: the two files must have figures in common, got none")
        if len(first) > 1:
            lines.append(f"request rate {a.get('request_rate')}")
        lines.append(f"{'':<26}{'A':>14}{'B':>14}{'B / A':>9}")
        for key in keys:
            if a[key] == b[key] == 0:
                continue
            lines.append(f"{key:<26}{a[key]:>14,.3f}{b[key]:>14,.3f}{_verdict(key, a, b)}")
        for key in ("total_input_tokens", "total_output_tokens", "completed"):
            if key in a and key in b and a[key] != b[key]:
                lines.append(f"not the same work: {key} is {a[key]} in A and {b[key]} in B")
        lines.append("")
    return "\n".join(lines).rstrip()


def _pairs(first: Sequence[Result], second: Sequence[Result]) -> list[tuple[Result, Result]]:
    rates = {str(result.get("request_rate")): result for result in second}
    if len(rates) == len(second) and len(first) > 1:
        found = [(a, rates.get(str(a.get("request_rate")))) for a in first]
        return [(a, b) for a, b in found if b is not None]
    return list(zip(first, second, strict=False))


def _verdict(key: str, a: Result, b: Result) -> str:
    if not a[key]:
        return f"{'-':>9}"
    ratio = b[key] / a[key]
    if abs(ratio - 1) < 0.005 or key == "max_concurrent_requests":
        return f"{ratio:>9.3f}"
    better = (ratio < 1) == any(part in key for part in _SMALLER)
    return f"{ratio:>9.3f}  {'better' if better else 'worse'}"


def require_matplotlib() -> Any:
    """matplotlib's pyplot, for files only.

    Raises:
        ValueError: It is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError(
            "bench: --plot needs matplotlib, which is not installed; pip install matplotlib"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    return pyplot


def plot_sweep(results: Sequence[Result], path: str | Path) -> None:
    """Latency against load: TTFT and TPOT, median and p99, over the output tokens per second.

    Raises:
        ValueError: matplotlib is not installed.
    """
    pyplot = require_matplotlib()
    ordered = sorted(results, key=lambda result: result["output_throughput"])
    load = [result["output_throughput"] for result in ordered]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, name in zip(axes, ("ttft", "tpot"), strict=True):
        for stat, (color, marker, line) in zip(("median", "p99"), LINES, strict=False):
            values = [result[f"{stat}_{name}_ms"] for result in ordered]
            axis.plot(load, values, color=color, marker=marker, linestyle=line, label=stat)
        axis.set_xlabel("output tokens per second")
        axis.set_ylabel(f"{name.upper()} in ms")
        axis.set_ylim(bottom=0)
        legend_above(axis)
        axis.grid(alpha=0.3)
    model = Path(str(ordered[0].get("model_id", ""))).parts[-2:]
    figure.suptitle(str(ordered[0].get("label") or "/".join(model)))
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def legend_above(axis: Any, title: str | None = None) -> None:
    """Above the axis, where it hides nothing."""
    axis.legend(
        title=title,
        fontsize=8,
        title_fontsize=8,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=3,
        columnspacing=1.0,
        handlelength=2.2,
        handletextpad=0.5,
        frameon=False,
    )


def plain_numbers(axis: Any, subs: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    """Numbers as one writes them on a logarithmic axis (`xaxis`, `yaxis`), not powers of ten."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure; the same one gives the same bytes, and a PNG few of them (64 colours)."""
    if path.suffix != ".png":
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        return
    from PIL import Image

    figure.savefig(path, dpi=130)
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(64)
    few.save(path, optimize=True)


def json_rate(rate: float) -> float | str:
    """An infinite rate as JSON can write it, and as vLLM does."""
    return "inf" if math.isinf(rate) else rate
