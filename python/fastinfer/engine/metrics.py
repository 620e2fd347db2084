"""When things happened, and what follows from it: TTFT, TPOT, ITL, end-to-end latency, throughput.

Definitions, on one monotonic clock in seconds, t0 = arrival, t1 = first token, tn = last token,
n = output tokens of a request:

    TTFT = t1 - t0 (queueing included)      E2EL = tn - t0
    TPOT = (E2EL - TTFT) / (n - 1), one value per request, none for n = 1
    ITL  = every gap between consecutive deliveries, pooled over all requests
    goodput = requests inside every given limit / wall time; a missing TPOT counts as 0

The keys of `summarize` are those of vLLM's serving benchmark, so that existing tools read them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

GOODPUT_KEYS = ("ttft", "tpot", "e2el")


@dataclass(slots=True)
class RequestMetrics:
    """Timeline of one request (or of one of its n completions), in seconds.

    `token_times` has one entry per delivery, `token_counts` how many tokens it brought (more than
    one only with speculation).
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    finished_time: float | None = None
    token_times: list[float] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens whose K/V was found in the prefix cache
    num_preemptions: int = 0
    num_draft_tokens: int = 0  # proposed and checked
    num_accepted_tokens: int = 0
    num_verifications: int = 0  # steps that checked drafts
    failed: bool = False

    def record_drafts(self, proposed: int, accepted: int) -> None:
        """Note a step that checked drafts."""
        self.num_draft_tokens += proposed
        self.num_accepted_tokens += accepted
        self.num_verifications += 1

    @property
    def accepted_length(self) -> float | None:
        """Tokens per step that checked drafts, its own one included."""
        steps = self.num_verifications
        return 1 + self.num_accepted_tokens / steps if steps else None

    def record_tokens(self, count: int, now: float) -> None:
        """Note a delivery of `count` tokens."""
        self.token_times.append(now)
        self.token_counts.append(count)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return sum(self.token_counts)

    @property
    def first_token_time(self) -> float | None:
        """When the first token was there."""
        return self.token_times[0] if self.token_times else None

    @property
    def last_token_time(self) -> float | None:
        """When the last token was there."""
        return self.token_times[-1] if self.token_times else None

    @property
    def time_in_queue(self) -> float | None:
        """From arrival to the first step that worked on the request."""
        started = self.first_scheduled_time
        return None if started is None else started - self.arrival_time

    @property
    def ttft(self) -> float | None:
        """Time to first token."""
        return self.token_times[0] - self.arrival_time if self.token_times else None

    @property
    def e2el(self) -> float | None:
        """End-to-end latency: arrival to last token."""
        return self.token_times[-1] - self.arrival_time if self.token_times else None

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None for a single token."""
        n = self.num_output_tokens
        return (self.token_times[-1] - self.token_times[0]) / (n - 1) if n > 1 else None

    @property
    def itl(self) -> list[float]:
        """Gaps between consecutive deliveries."""
        pairs = zip(self.token_times, self.token_times[1:], strict=False)
        return [after - before for before, after in pairs]

    def __str__(self) -> str:
        parts = [
            f"{name} {seconds * 1e3:.1f} ms"
            for name, seconds in (("TTFT", self.ttft), ("TPOT", self.tpot), ("E2EL", self.e2el))
            if seconds is not None
        ]
        tokens = f"{self.num_prompt_tokens} tokens in, {self.num_output_tokens} out"
        return ", ".join([*parts, tokens])

    def to_dict(self) -> dict[str, float | int | None]:
        """The figures of this request in milliseconds and tokens, for JSON."""

        def ms(seconds: float | None) -> float | None:
            return None if seconds is None else seconds * 1e3

        return {
            "ttft_ms": ms(self.ttft),
            "tpot_ms": ms(self.tpot),
            "e2el_ms": ms(self.e2el),
            "queue_ms": ms(self.time_in_queue),
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_output_tokens": self.num_output_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "num_preemptions": self.num_preemptions,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_tokens": self.num_accepted_tokens,
            "accepted_length": self.accepted_length,
        }


@dataclass(slots=True)
class EngineStats:
    """What the engine holds right now and has done so far."""

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    kv_blocks_peak: int  # most blocks in use at once since the engine started
    kv_block_bytes: int
    num_steps: int
    num_preemptions: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    num_draft_tokens: int = 0  # proposed and checked since the engine started
    num_accepted_tokens: int = 0
    num_verifications: int = 0
    num_swapped: int = 0  # preemptions that moved blocks to the host

    @property
    def kv_cache_usage(self) -> float:
        """Share of the blocks in use, 0..1."""
        return self.kv_blocks_used / self.kv_blocks_total


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100), linear between neighbours as numpy does; nan for no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _spread(values: Sequence[float], name: str) -> dict[str, float]:
    if not values:
        return {f"{stat}_{name}_ms": 0.0 for stat in ("mean", "median", "std", "p50", "p90", "p99")}
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    figures = {"mean": mean, "median": percentile(values, 50), "std": deviation}
    figures.update({f"p{q}": percentile(values, q) for q in (50, 90, 99)})
    return {f"{stat}_{name}_ms": value * 1e3 for stat, value in figures.items()}


def _peak_tokens_per_second(records: Iterable[RequestMetrics], start: float) -> float:
    buckets: Counter[int] = Counter()
    for record in records:
        for time, count in zip(record.token_times, record.token_counts, strict=True):
            buckets[int(time - start)] += count
    return float(max(buckets.values(), default=0))


def _peak_concurrency(records: Iterable[RequestMetrics]) -> int:
    edges = []
    for record in records:
        if record.token_times:
            edges += [(record.arrival_time, 1), (record.token_times[-1], -1)]
    running = peak = 0
    for _, change in sorted(edges):  # at equal times departures (-1) sort before arrivals
        running += change
        peak = max(peak, running)
    return peak


def summarize(
    records: Sequence[RequestMetrics],
    *,
    duration: float | None = None,
    goodput: dict[str, float] | None = None,
) -> dict[str, float | int]:
    """Aggregate figures of many requests.

    Args:
        records: One timeline per request. Failed ones count only as failed.
        duration: Wall time in seconds; None is from the first arrival to the last token.
        goodput: Limits in milliseconds, keys out of "ttft", "tpot", "e2el".

    Returns:
        completed, failed, duration (s), total_input_tokens, total_output_tokens,
        request_throughput, request_goodput (0 without limits), output_throughput,
        total_token_throughput (per second), {mean,median,std,p50,p90,p99}_{ttft,tpot,itl,e2el}_ms,
        max_output_tokens_per_s, max_concurrent_requests. Where drafts were checked also
        total_draft_tokens, total_accepted_tokens, draft_acceptance_rate and mean_accepted_length
        (tokens per check, its own one included).

    Raises:
        ValueError: A limit has an unknown name, or the duration is not positive.
    """
    limits = goodput or {}
    for name in limits:
        if name not in GOODPUT_KEYS:
            raise ValueError(f"summarize: goodput must name {', '.join(GOODPUT_KEYS)}, got {name}")
    if duration is not None and duration <= 0:
        raise ValueError(f"summarize: duration must be > 0 seconds, got {duration}")
    done = [record for record in records if not record.failed and record.token_times]
    start = min((record.arrival_time for record in done), default=0.0)
    if duration is None:
        duration = max((record.token_times[-1] for record in done), default=start) - start
    prompt_tokens = sum(record.num_prompt_tokens for record in done)
    output_tokens = sum(record.num_output_tokens for record in done)

    def per_second(count: float) -> float:
        return count / duration if duration > 0 else 0.0

    def meets_limits(record: RequestMetrics) -> bool:
        return all((getattr(record, key) or 0.0) * 1e3 <= limit for key, limit in limits.items())

    result: dict[str, float | int] = {
        "completed": len(done),
        "failed": len(records) - len(done),
        "duration": duration,
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": per_second(len(done)),
        "request_goodput": per_second(sum(map(meets_limits, done)) if limits else 0),
        "output_throughput": per_second(output_tokens),
        "total_token_throughput": per_second(prompt_tokens + output_tokens),
    }
    result.update(_spread([r.ttft for r in done if r.ttft is not None], "ttft"))
    result.update(_spread([r.tpot for r in done if r.tpot is not None], "tpot"))
    result.update(_spread([gap for r in done for gap in r.itl], "itl"))
    result.update(_spread([r.e2el for r in done if r.e2el is not None], "e2el"))
    result["max_output_tokens_per_s"] = _peak_tokens_per_second(done, start)
    result["max_concurrent_requests"] = _peak_concurrency(done)
    drafted = sum(record.num_draft_tokens for record in done)
    if drafted:
        accepted = sum(record.num_accepted_tokens for record in done)
        result["total_draft_tokens"], result["total_accepted_tokens"] = drafted, accepted
        result["draft_acceptance_rate"] = accepted / drafted
        result["mean_accepted_length"] = 1 + accepted / sum(r.num_verifications for r in done)
    return result
