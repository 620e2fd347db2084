"""What got worse against the row before, and why: said from what was measured in both rows.

A row is worse where a figure is `SLOWER` times that of the row before, or perplexity is higher. The
reason is one sentence per cause, each with the figures that show it: tokens and steps as they were
counted from the plans, seconds of each part (ablate_cost.py), times of the linear layers alone,
drafts checked and accepted. Where runs of one and the same row differ as much as the two rows do,
that is said instead: there is no effect to explain. No tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]
SLOWER = 1.05  # times from which on a row counts as worse than the one before
WORSE_PERPLEXITY = 1.0005
FIGURES = (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT"), ("itl_p99_ms", "longest gaps"))
_COUNTED = ("compute", "weights", "cache", "scores")


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the rows ran."""

    device: str  # "cpu" or "cuda"
    cores: int = 1  # of the processor
    threads: int = 1  # that a process of its own computes with
    workers: int = 1  # of the last row: GPUs, or processes on a CPU


class _Row:
    """A row's figures in the form that sentences need."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.steps = max(result.get("steps", 0), 1)
        self.seconds = float(result.get("seconds", 0.0))
        self.parts: dict[str, float] = result.get("parts_s", {})

    def get(self, key: str, default: float = 0.0) -> float:
        return float(self.result.get(key) or default)

    @property
    def counted(self) -> bool:
        return bool(self.parts)

    @property
    def step_ms(self) -> float:
        return 1e3 * self.seconds / self.steps

    @property
    def rest_ms(self) -> float:
        """Of a step: what neither multiplication nor bytes account for."""
        return 1e3 * self.parts.get("launch", 0.0) / self.steps

    @property
    def tokens_per_step(self) -> float:
        return self.get("tokens") / self.steps

    @property
    def yield_per_step(self) -> float:
        return self.get("tokens_out") / self.steps

    def share(self, part: str) -> float:
        """Of the row's time."""
        return self.parts.get(part, 0.0) / max(sum(self.parts.values()), 1e-12)

    @property
    def cache_share(self) -> float:
        """Of the bytes that a step reads."""
        cache, weights = self.parts.get("cache", 0.0), self.parts.get("weights", 0.0)
        return cache / max(cache + weights, 1e-12)


def judge(result: Result, before: Result, machine: Machine) -> None:
    """Add to a result its `speedup` over the row before, and, if so, `worse` and `why_worse`."""
    if not before:
        return
    if before["out_tok_s"]:
        result["speedup"] = round(result["out_tok_s"] / before["out_tok_s"], 3)
    worse: dict[str, tuple[float, str]] = {}  # figure -> (times, how it is told)
    if 0 < result["out_tok_s"] * SLOWER < before["out_tok_s"]:
        ratio = before["out_tok_s"] / result["out_tok_s"]
        worse["out_tok_s"] = ratio, f"throughput / {ratio:.2f}"
    for key, name in FIGURES:
        # Outputs of one token have no time between tokens.
        if before[key] and result[key] > SLOWER * before[key]:
            worse[key] = result[key] / before[key], f"{name} x {result[key] / before[key]:.2f}"
    was, now = before.get("perplexity"), result.get("perplexity")
    if was and now and now > WORSE_PERPLEXITY * was:
        worse["perplexity"] = now / was, f"perplexity {was} -> {now}"
    if worse:
        result["worse"] = [told for _, told in worse.values()]
        result["why_worse"] = _why(result, before, {k: v[0] for k, v in worse.items()}, machine)


def _why(result: Result, before: Result, worse: dict[str, float], machine: Machine) -> str:
    now, was = _Row(result), _Row(before)
    told = [_bits(now, was)] if "perplexity" in worse else []
    times = {key: ratio for key, ratio in worse.items() if key != "perplexity"}
    real = {key: ratio for key, ratio in times.items() if ratio > _spread(now, was, key)}
    if real:
        told += REASONS[result["row"]](now, was, real, machine) or [_rest(now, was)]
    if len(real) < len(times):
        told.append(_noise(now, was, [key for key in times if key not in real]))
    return "; ".join(told)


def _spread(now: _Row, was: _Row, key: str) -> float:
    """How many times a figure differs between runs of one row; 1 where each ran once."""
    return max(float(row.result.get("spread", {}).get(key, 1.0)) for row in (now, was))


def _noise(now: _Row, was: _Row, keys: list[str]) -> str:
    names = {"out_tok_s": "throughput", **dict(FIGURES)}
    same = "the same steps and the same work: " if same_work(now.result, was.result) else ""
    told = [f"{names[key]} up to x {_spread(now, was, key):.2f}" for key in keys]
    return f"{same}runs of one and the same row differ as much here ({', '.join(told)})"


def same_work(result: Result, before: Result) -> bool:
    """Whether both rows ran the same steps, and counted the same multiplications and bytes."""
    mine, other = result.get("parts_s"), before.get("parts_s")
    if not mine or not other or result.get("steps") != before.get("steps"):
        return False
    return all(abs(mine[p] - other[p]) <= 0.01 * max(mine[p], other[p]) for p in _COUNTED)


# ---- the rows ------------------------------------------------------------------------------------


def _rest(now: _Row, was: _Row) -> str:
    """What a step takes on top of what was counted: the only place left for a difference."""
    if not (now.counted and was.counted):
        return "the other row was not counted, so nothing more is known"
    once = "" if "spread" in now.result else "; one run each, --repeats 3 tells noise from effect"
    if now.rest_ms < was.rest_ms:
        return (
            f"over the whole run a step takes no longer ({was.step_ms:.2f} -> {now.step_ms:.2f} "
            f"ms){once}"
        )
    return (
        "what neither multiplication nor bytes account for (launches, the host, kernels below "
        f"their rates) takes {was.rest_ms:.2f} -> {now.rest_ms:.2f} ms of a step{once}"
    )


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _bits(now: _Row, was: _Row) -> str:
    more = now.get("perplexity") / was.get("perplexity") - 1
    return f"fewer bits say less: {more:+.2%} perplexity on held-out text"


def _naive(now: _Row, was: _Row, worse: dict[str, float], machine: Machine) -> list[str]:
    out = max(now.get("tokens_out"), 1.0)
    return [
        f"{now.get('tokens') / out:.0f} tokens went through the model per token of output, where "
        "the row before keeps keys and values and runs one"
    ]


def _kv_cache(now: _Row, was: _Row, worse: dict[str, float], machine: Machine) -> list[str]:
    if set(worse) == {"ttft_ms"}:
        return ["a first token takes the same prefill in both rows", _rest(now, was)]
    return []


def _flash(now: _Row, was: _Row, worse: dict[str, float], machine: Machine) -> list[str]:
    saved = f"scores in memory were {was.share('scores'):.1%} of the time of the row before"
    return [f"{saved}: at these lengths there is that much to save", _rest(now, was)]


def _gqa(now: _Row, was: _Row, worse: dict[str, float], machine: Machine) -> list[str]:
    return [
        f"the cache was {was.cache_share:.1%} of the bytes of a step: smaller saves memory, and no "
        "time at these lengths",
        _rest(now, was),
    ]


def _paging(now: _Row, was: _Row, worse: dict[str, float], machine: Machine) -> list[str]:
    unused, left = was.get("kv_waste"), now.get("kv_waste")
    return [
        f"what it buys is memory ({unused:.0%} of the cache reserved and unused before, {left:.0%} "
        "now), which one request at a time has no use for",
        _rest(now, was),
    ]


def _static(now: _Row, was: _Row, worse: dict[str, float], machine: Machine) -> list[str]:
    told = []
    batches = -(-now.get("requests") // max(now.get("at_once"), 1.0))
    if "ttft_ms" in worse:
        told.append(
            "a batch starts together and a first token waits for the prompts of all "
            f"{now.get('at_once'):.0f}; who comes meanwhile waits for its end, "
            f"{_time(now.seconds / max(batches, 1))} on average"
        )
    if set(worse) - {"ttft_ms"}:
        told.append(
            f"a step carries {now.tokens_per_step:.0f} tokens on average instead of "
            f"{was.tokens_per_step:.0f} and takes {now.step_ms:.2f} ms instead of {was.step_ms:.2f}"
        )
    return told


def _continuous(now: _Row, was: _Row, worse: dict[str, float], machine: Machine) -> list[str]:
    told = []
    if now.get("mixed_steps") > was.get("mixed_steps"):
        told.append(
            f"{now.get('mixed_steps'):.0f} of {now.steps} steps run prompts beside requests that "
            f"decode ({was.get('mixed_steps'):.0f} of {was.steps} before), up to "
            f"{now.get('largest_step'):,.0f} tokens in one: those wait for it"
        )
    if "out_tok_s" in worse:
        told.append(_rest(now, was))
    return told


def _chunked(now: _Row, was: _Row, worse: dict[str, float], machine: Machine) -> list[str]:
    pieces = now.get("prompt_pieces") / max(now.get("requests"), 1.0)
    if pieces <= 1.0:
        return [
            f"no prompt was cut (the largest step had {now.get('largest_step'):,.0f} tokens): at "
            "these lengths there is nothing to gain",
            _rest(now, was),
        ]
    told = [f"a prompt runs in {pieces:.1f} pieces on average"]
    if "ttft_ms" in worse:
        read, again = was.parts.get("weights", 0.0), now.parts.get("weights", 0.0)
        told.append(
            f"its first token waits for the last of them, and {now.steps} steps instead of "
            f"{was.steps} read the weights ({_time(read)} -> {_time(again)})"
        )
    if "tpot_ms" in worse:
        told.append(
            f"{now.get('mixed_steps'):.0f} steps have a piece beside requests that decode "
            f"({was.get('mixed_steps'):.0f} before): everybody's tokens wait a little more often"
        )
    longest = (was.get("itl_p99_ms"), now.get("itl_p99_ms"))
    if longest[1] < longest[0]:
        told.append(f"what it buys are short gaps: {longest[0]:.1f} -> {longest[1]:.1f} ms")
    if not {"ttft_ms", "tpot_ms"} & set(worse):
        told.append(_rest(now, was))
    return told


def _prefix(now: _Row, was: _Row, worse: dict[str, float], machine: Machine) -> list[str]:
    hits = now.get("prefix_hits")
    if hits < 0.05:
        return [f"{hits:.0%} of the prompts' tokens were found: hashing was in vain"]
    spared = 1 - now.get("tokens") / max(was.get("tokens"), 1.0)
    return [f"{spared:.0%} of the tokens were not run again", _rest(now, was)]


def _weights(now: _Row, was: _Row, worse: dict[str, float], machine: Machine) -> list[str]:
    spared = was.parts.get("weights", 0.0) - now.parts.get("weights", 0.0)
    told = [
        f"reading weights was {was.share('weights'):.0%} of the time of the row before, and codes "
        f"save {_time(spared)} of {_time(was.seconds)}"
    ]
    # of a step's linear layers alone, for each number of tokens timed in both rows
    mine, other = now.result.get("linear_ms", {}), was.result.get("linear_ms", {})
    both = [tokens for tokens in mine if tokens in other]
    if not both:
        return [*told, _rest(now, was)]
    linear = ", ".join(f"{other[t]:.2f} -> {mine[t]:.2f} ms for {t} tokens" for t in both)
    if all(mine[t] <= 1.02 * other[t] for t in both):
        return [*told, f"the linear layers of a step are no slower ({linear})", _rest(now, was)]
    why = "codes become numbers again before they are multiplied"
    if machine.device == "cuda" and was.result.get("bound") == "launch":
        why = "a call costs the host more than that of a plain layer"
    return [*told, f"the linear layers of a step take {linear}: {why}"]


def _cache8(now: _Row, was: _Row, worse: dict[str, float], machine: Machine) -> list[str]:
    return [
        f"the cache was {was.share('cache'):.1%} of the time of the row before; writing measures "
        "a scale per token and head, reading converts",
        _rest(now, was),
    ]


def _graphs(now: _Row, was: _Row, worse: dict[str, float], machine: Machine) -> list[str]:
    if machine.device != "cuda":
        return [
            "a CPU has no graphs: the same steps run over static buffers, rows padded to the next "
            "size",
            _rest(now, was),
        ]
    told = []
    if was.result.get("bound") != "launch":
        told.append(
            f"launches and the host were {was.share('launch'):.0%} of the row before, which was "
            f"bound by {was.result.get('bound')}: there is no more than that to gain"
        )
    if prompts := now.get("prompt_steps"):
        told.append(
            f"{prompts:.0f} of {now.steps} steps have prompts in them and are launched kernel by "
            "kernel as before; a step that is replayed pads its rows to the next captured size"
        )
    return [*told, _rest(now, was)]


def _overlap(now: _Row, was: _Row, worse: dict[str, float], machine: Machine) -> list[str]:
    late = f"an ended request is noticed a step late ({was.steps} -> {now.steps} steps)"
    if machine.device != "cuda":
        return [f"on a CPU there is no device beside the host to overlap with; {late}"]
    told = []
    if "ttft_ms" in worse:
        told.append(
            f"a token is seen one step later, a first one too: a step takes {now.step_ms:.1f} ms"
        )
    if set(worse) - {"ttft_ms"} or not told:
        told.append(late)
    return told


def _speculation(now: _Row, was: _Row, worse: dict[str, float], machine: Machine) -> list[str]:
    drafts = now.get("drafts")
    if not drafts:
        return ["no draft was checked (the text repeats nothing)", _rest(now, was)]
    more = now.yield_per_step / max(was.yield_per_step, 1e-9)
    longer = now.step_ms / max(was.step_ms, 1e-9)
    told = [
        f"{now.get('drafts_accepted'):.0%} of {drafts:.0f} drafts stood: with "
        f"{now.get('at_once'):.0f} requests at once a step yields x {more:.2f} tokens and takes x "
        f"{longer:.2f} as long"
    ]
    if machine.device == "cuda":
        told.append("the host has to see a check's tokens before it can plan the next one")
    return told


def _tensor_parallel(now: _Row, was: _Row, worse: dict[str, float], machine: Machine) -> list[str]:
    read, reads = was.parts.get("weights", 0.0), now.parts.get("weights", 0.0)
    less = f"each reads weights for {_time(reads)} instead of {_time(read)}"
    sums = "two sums per layer, and telling the others what to run, come on top"
    if machine.device != "cuda":
        alone = f"{machine.threads} thread{'s' * (machine.threads != 1)}"
        return [
            f"{machine.workers} processes share {machine.cores} cores, where the row before was "
            f"one process with {alone}: {less}, but {sums}",
            _rest(now, was),
        ]
    return [f"{less}; {sums}", _rest(now, was)]


Reason = Callable[[_Row, _Row, dict[str, float], Machine], list[str]]
REASONS: dict[str, Reason] = {
    "naive": _naive,
    "kv_cache": _kv_cache,
    "flash": _flash,
    "gqa": _gqa,
    "paging": _paging,
    "static": _static,
    "continuous": _continuous,
    "chunked": _chunked,
    "prefix": _prefix,
    "int8": _weights,
    "int4": _weights,
    "cache8": _cache8,
    "graphs": _graphs,
    "overlap": _overlap,
    "speculation": _speculation,
    "tensor_parallel": _tensor_parallel,
}
