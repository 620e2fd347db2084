"""/metrics: the engine's state and counters in Prometheus' text format, version 0.0.4."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from ..engine.metrics import EngineStats, RequestMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_PER_TOKEN = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5)


class Histogram:
    """Counts of values up to each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float | None) -> None:
        """Count a value; None is not one."""
        if value is not None:
            self.counts[bisect_left(self.bounds, value)] += 1
            self.total += value

    def lines(self, name: str, text: str) -> list[str]:
        """Cumulative, as the format wants it."""
        lines = [f"# HELP {name} {text}", f"# TYPE {name} histogram"]
        below = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            below += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {below}')
        return [*lines, f"{name}_sum {self.total:.9g}", f"{name}_count {below}"]


class Exposition:
    """Counters of one server."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, int], int] = {}
        self.finished: dict[str, int] = {}
        self.prompt_tokens = self.output_tokens = self.cached_tokens = 0
        self.ttft, self.tpot, self.e2el = (
            Histogram(_SECONDS),
            Histogram(_PER_TOKEN),
            Histogram(_SECONDS),
        )

    def answered(self, path: str, status: int) -> None:
        """Count an HTTP answer."""
        self.answers[path, status] = self.answers.get((path, status), 0) + 1

    def completed(self, reason: str, metrics: RequestMetrics) -> None:
        """Count a completion that has ended."""
        self.finished[reason] = self.finished.get(reason, 0) + 1
        self.prompt_tokens += metrics.num_prompt_tokens
        self.cached_tokens += metrics.num_cached_tokens
        self.output_tokens += metrics.num_output_tokens
        self.ttft.observe(metrics.ttft)
        self.tpot.observe(metrics.tpot)
        self.e2el.observe(metrics.e2el)

    def text(self, stats: EngineStats, num_requests: int) -> str:
        """The page."""
        gauges = (
            ("requests_open", "Requests that have not ended.", num_requests),
            ("requests_running", "Completions that run.", stats.running),
            ("requests_waiting", "Completions that wait.", stats.waiting),
            ("kv_cache_usage_ratio", "Share of KV blocks in use.", stats.kv_cache_usage),
            ("kv_cache_blocks", "Blocks of the KV cache.", stats.kv_blocks_total),
        )
        counters = (
            ("steps_total", "Steps of the engine.", stats.num_steps),
            ("preemptions_total", "Preempted requests.", stats.num_preemptions),
            ("prefix_query_tokens_total", "Prompt tokens looked up.", stats.prefix_query_tokens),
            ("prefix_hit_tokens_total", "Prompt tokens found cached.", stats.prefix_hit_tokens),
            ("swapped_total", "Preempted requests that were moved.", stats.num_swapped),
            # acceptance is accepted / draft, a check yields 1 + accepted / checks tokens
            ("draft_tokens_total", "Drafted tokens that were checked.", stats.num_draft_tokens),
            ("accepted_tokens_total", "Drafted tokens that stand.", stats.num_accepted_tokens),
            ("draft_checks_total", "Checks of a request's drafts.", stats.num_verifications),
            ("prompt_tokens_total", "Prompt tokens of ended completions.", self.prompt_tokens),
            ("generation_tokens_total", "Output tokens of ended completions.", self.output_tokens),
        )
        lines: list[str] = []
        for kind, rows in (("gauge", gauges), ("counter", counters)):
            for name, text, value in rows:
                lines += [*_head(name, text, kind), f"fastinfer_{name} {value:.9g}"]
        lines += _head("completions_total", "Ended completions by reason.", "counter")
        lines += [
            f'fastinfer_completions_total{{reason="{reason}"}} {count}'
            for reason, count in sorted(self.finished.items())
        ]
        lines += _head("http_responses_total", "HTTP answers by path and status.", "counter")
        lines += [
            f'fastinfer_http_responses_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self.answers.items())
        ]
        lines += self.ttft.lines("fastinfer_ttft_seconds", "Time to first token.")
        lines += self.tpot.lines("fastinfer_tpot_seconds", "Time per output token after the first.")
        lines += self.e2el.lines("fastinfer_e2e_seconds", "Arrival to last token.")
        return "\n".join(lines) + "\n"


def _head(name: str, text: str, kind: str) -> list[str]:
    return [f"# HELP fastinfer_{name} {text}", f"# TYPE fastinfer_{name} {kind}"]
