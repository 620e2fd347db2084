"""What a user decides: the engine's settings and the sampling settings of a request. No tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

GREEDY_BELOW = 1e-5  # temperatures under this are zero for all purposes: exp(x / T) overflows
MAX_LOGPROBS = 128
MAX_DRAFTS = 16  # per request and step
KV_CACHE_DTYPES = ("auto", "fp8", "int8")
BATCHING = ("continuous", "static")
QUANTIZATION = ("int8", "int4")
# What a mode sets where the user says nothing; a value given by the user always stands.
PRESETS: dict[str, dict[str, int]] = {
    "balanced": {"max_num_seqs": 256, "max_num_batched_tokens": 2048},
    "latency": {"max_num_seqs": 64, "max_num_batched_tokens": 2048},
    "throughput": {"max_num_seqs": 512, "max_num_batched_tokens": 16384},
}


def _integer(owner: str, name: str, value: Any, low: int, fix: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{owner}: {name} must be an integer >= {low}, got {value!r}{fix}")


def _number(owner: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{owner}: {name} must be a finite number, got {value!r}")
    return float(value)


def _choice(owner: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        listed = ", ".join(map(repr, allowed[:-1])) + f" or {allowed[-1]!r}"
        raise ValueError(f"{owner}: {name} must be {listed}, got {value!r}")


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen and when it ends. Names as in vLLM.

    Args:
        n: Independent completions of the prompt.
        presence_penalty: Subtracted once from the logit of every token generated so far, -2..2.
        frequency_penalty: Subtracted per earlier occurrence in the output, -2..2.
        repetition_penalty: Divides positive and multiplies negative logits of every token seen in
            prompt or output, > 0; 1 is off.
        temperature: 0 is greedy.
        top_p: Keep the most likely tokens whose probabilities add up to this, (0, 1].
        top_k: Keep this many tokens; 0 or -1 is off.
        min_p: Drop tokens less likely than this fraction of the most likely one, [0, 1].
        seed: Makes the request reproducible whatever else runs; None takes one from the engine.
            Completion i of n uses seed + i.
        stop: A string or strings that end the text.
        stop_token_ids: Token ids that end the request, besides the model's own.
        ignore_eos: Do not end at the model's end-of-sequence tokens.
        max_tokens: Most tokens to generate; None goes on to the model's limit.
        min_tokens: No end-of-sequence and no stop token before this many tokens.
        logprobs: Return the log-probability of each token and of this many most likely ones. They
            belong to the distribution the token was drawn from, after penalties and filters.
        detokenize: Produce text; without it stop strings cannot work.
        skip_special_tokens: Leave special tokens out of the text.
        include_stop_str_in_output: Keep the stop string (or stop token) in the text.

    Raises:
        ValueError: A value is out of its range.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        me = "SamplingParams"
        _integer(me, "n", self.n, 1)
        for name in ("presence_penalty", "frequency_penalty"):
            value = _number(me, name, getattr(self, name))
            if not -2.0 <= value <= 2.0:
                raise ValueError(f"{me}: {name} must be in [-2, 2], got {value}")
        if _number(me, "repetition_penalty", self.repetition_penalty) <= 0.0:
            raise ValueError(f"{me}: repetition_penalty must be > 0, got {self.repetition_penalty}")
        if _number(me, "temperature", self.temperature) < 0.0:
            raise ValueError(f"{me}: temperature must be >= 0, got {self.temperature}")
        if not 0.0 < _number(me, "top_p", self.top_p) <= 1.0:
            raise ValueError(f"{me}: top_p must be in (0, 1], got {self.top_p}; use 1 for off")
        _integer(me, "top_k", self.top_k, -1, "; use 0 or -1 for off")
        if not 0.0 <= _number(me, "min_p", self.min_p) <= 1.0:
            raise ValueError(f"{me}: min_p must be in [0, 1], got {self.min_p}")
        if self.seed is not None:
            _integer(me, "seed", self.seed, -(2**63))
            if self.seed >= 2**63:
                raise ValueError(f"{me}: seed must fit in 64 signed bits, got {self.seed}")
        if self.max_tokens is not None:
            _integer(me, "max_tokens", self.max_tokens, 1)
        _integer(me, "min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"{me}: min_tokens must not exceed max_tokens, got {self.min_tokens} and "
                f"{self.max_tokens}"
            )
        if self.logprobs is not None:
            _integer(me, "logprobs", self.logprobs, 0)
            if self.logprobs > MAX_LOGPROBS:
                raise ValueError(
                    f"{me}: logprobs must be at most {MAX_LOGPROBS}, got {self.logprobs}"
                )
        self._check_stops()

    def _check_stops(self) -> None:
        me = "SamplingParams"
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if isinstance(value, (int, float, bytes)):
                raise ValueError(f"{me}: {name} must be a list, got {value!r}")
        stops = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError(f"{me}: stop must hold non-empty strings, got {self.stop!r}")
        if stops and not self.detokenize:
            raise ValueError(f"{me}: stop needs the text, got detokenize=False; use stop_token_ids")
        self.stop = stops
        ids = list(self.stop_token_ids or [])
        for token in ids:
            _integer(me, "stop_token_ids", token, 0)
        self.stop_token_ids = ids

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the distribution."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    def copy(self) -> SamplingParams:
        """A checked copy, so that later changes to this object do not reach running requests."""
        return SamplingParams(**{field.name: getattr(self, field.name) for field in fields(self)})


@dataclass(slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine; `LLM` takes them as keyword arguments.

    Args:
        model: Checkpoint folder in Hugging Face layout.
        tokenizer: Another folder to take the tokenizer from; None is the model's own.
        dtype: "auto" (what the checkpoint says), "float32", "float16" or "bfloat16".
        device: "cpu", "cuda", "cuda:1", ...; None is CUDA where it is usable, else the CPU.
        load_format: "auto", or "dummy" for random weights (benchmarks).
        requantize: 4 or 8 bits for quantised weights that no kernel reads as they are stored
            (bitsandbytes nf4, ...); None dequantises them.
        max_model_len: Longest prompt + output in tokens; None is what the model was trained for.
        mode: "balanced", "latency" (time to first token first) or "throughput": the defaults of
            max_num_seqs and max_num_batched_tokens, see `PRESETS`.
        block_size: Tokens per block of the KV cache, any number.
        kv_cache_dtype: "auto" (the model's), or 8 bits: "fp8" (e4m3) or "int8", with a scale per
            token and head that is measured when it is written.
        num_blocks: Blocks of the KV cache; None derives them from the memory settings below.
        kv_cache_memory: Bytes for the KV cache; None takes a share of the memory that is free.
        gpu_memory_utilization: Share of the GPU's memory the engine may use in all.
        max_num_seqs: Most requests that run at once; None is the mode's.
        max_num_batched_tokens: Token budget of one step; longer prompts are cut into chunks. None
            is the mode's.
        swap_space: Bytes of host memory for the blocks of preempted requests; they are moved there
            and back where that is faster than computing them again. 0 always recomputes.
        long_prefill_token_threshold: Most tokens of one prompt per step; 0 is only the budget.
        enable_prefix_caching: Reuse the KV blocks of prompts that begin alike.
        batch_invariant: The tokens and log-probabilities of a request do not depend, to the last
            bit, on what else runs, on chunking, a cached prefix or preemption.
        async_scheduling: Launch a step before the tokens of the one before are on the host; None
            does so on CUDA. The tokens are the same.
        cuda_graphs: Replay decode steps as CUDA graphs; None does so on CUDA. On the CPU the same
            step runs without a graph.
        speculative: "ngram" proposes tokens from earlier text, a checkpoint folder is that of a
            draft model; several tokens are then checked in one step. The tokens are the same.
            None is off.
        num_speculative_tokens: Most drafts per request and step, 0..16.
        adaptive_speculation: Draft fewer tokens, or none, where the measured acceptance and the
            measured time of a step say that it is faster. False always drafts what it can.
        prompt_lookup_min, prompt_lookup_max: Shortest and longest ending that "ngram" looks for.
        tensor_parallel_size: GPUs (or processes, on the CPU) that share every layer.
        pipeline_parallel_size: Groups of those that have a part of the layers each.
        pipeline_stages: Layers of each stage. None: as many as make the slowest stage fastest, by
            the time that a layer and the two ends take, which is measured at the start.
        distributed_timeout: Seconds after which a rank that does not answer ends the run.
        seed: Where requests without a seed get theirs from.
        progress: Show a bar while the weights are read.
        quantization: "int8" (one scale per output channel) or "int4" (groups of up to 128 input
            channels): round the weights of a plain checkpoint to nearest while loading. None
            leaves them as they are stored.
        enable_chunked_prefill: Cut prompts to what is left of a step's budget. False runs each in
            one step, and needs max_num_batched_tokens of at least max_model_len.
        batching: "continuous" admits a request as soon as there is room; "static" only when the
            whole batch before it has ended.
        use_kv_cache: False computes every token again at each step, as a loop without a cache does.
        fused_attention: False writes the scores of all queries and keys to memory, as plain torch
            does.
        share_kv_heads: False stores the keys and values of a group once per query head, as a cache
            without grouped heads would.

    The last four exist to be compared with (`fastinfer ablate`); nothing is faster without them.
    A contiguous cache instead of a paged one is block_size=max_model_len: one block per request.

    Raises:
        ValueError: A value is out of its range.
    """

    model: str
    tokenizer: str | None = None
    dtype: str = "auto"
    device: str | None = None
    load_format: str = "auto"
    requantize: int | None = None
    mode: str = "balanced"
    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    num_blocks: int | None = None
    kv_cache_memory: int | None = None
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = None  # type: ignore[assignment]  # the mode's, filled in below
    max_num_batched_tokens: int = None  # type: ignore[assignment]
    swap_space: int = 0
    long_prefill_token_threshold: int = 0
    enable_prefix_caching: bool = True
    batch_invariant: bool = False
    async_scheduling: bool | None = None
    cuda_graphs: bool | None = None
    speculative: str | None = None
    num_speculative_tokens: int = 4
    adaptive_speculation: bool = True
    prompt_lookup_min: int = 1
    prompt_lookup_max: int = 8
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    pipeline_stages: list[int] | None = None
    distributed_timeout: float = 300.0
    seed: int = 0
    progress: bool = True
    quantization: str | None = None
    enable_chunked_prefill: bool = True
    batching: str = "continuous"
    use_kv_cache: bool = True
    fused_attention: bool = True
    share_kv_heads: bool = True

    def __post_init__(self) -> None:
        me = "LLM"
        _choice(me, "mode", self.mode, tuple(PRESETS))
        for name, value in PRESETS[self.mode].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            _integer(me, name, getattr(self, name), 1)
        for name in ("max_model_len", "num_blocks", "kv_cache_memory"):
            if getattr(self, name) is not None:
                _integer(me, name, getattr(self, name), 1)
        _integer(me, "long_prefill_token_threshold", self.long_prefill_token_threshold, 0)
        _integer(me, "swap_space", self.swap_space, 0)
        _integer(me, "seed", self.seed, 0)
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            _integer(me, name, getattr(self, name), 1)
        if self.pipeline_stages is not None:
            if isinstance(self.pipeline_stages, str) or not isinstance(
                self.pipeline_stages, Sequence
            ):
                raise ValueError(
                    f"{me}: pipeline_stages must list the layers of each stage, got "
                    f"{self.pipeline_stages!r}"
                )
            self.pipeline_stages = list(self.pipeline_stages)
            for count in self.pipeline_stages:
                _integer(me, "pipeline_stages", count, 1)
            if len(self.pipeline_stages) != self.pipeline_parallel_size:
                raise ValueError(
                    f"{me}: pipeline_stages must name the layers of each of the "
                    f"{self.pipeline_parallel_size} stages, got {self.pipeline_stages}"
                )
        if _number(me, "distributed_timeout", self.distributed_timeout) <= 0:
            raise ValueError(
                f"{me}: distributed_timeout must be > 0 seconds, got {self.distributed_timeout}"
            )
        if not 0.0 < _number(me, "gpu_memory_utilization", self.gpu_memory_utilization) <= 1.0:
            raise ValueError(
                f"{me}: gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}"
            )
        _choice(me, "load_format", self.load_format, ("auto", "dummy"))
        _choice(me, "dtype", self.dtype, ("auto", "float32", "float16", "bfloat16"))
        _choice(me, "kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        if self.requantize not in (None, 4, 8):
            raise ValueError(f"{me}: requantize must be None, 4 or 8, got {self.requantize!r}")
        self._check_speculation()
        _choice(me, "batching", self.batching, BATCHING)
        if self.quantization is not None:
            _choice(me, "quantization", self.quantization, QUANTIZATION)
        booleans: tuple[str, ...] = (
            "enable_prefix_caching",
            "batch_invariant",
            "adaptive_speculation",
        )
        booleans += ("enable_chunked_prefill", "use_kv_cache", "fused_attention", "share_kv_heads")
        for name in (*booleans, "async_scheduling", "cuda_graphs"):
            value = getattr(self, name)
            if value is None and name in ("async_scheduling", "cuda_graphs"):
                continue
            if not isinstance(value, bool):
                raise ValueError(f"{me}: {name} must be True or False, got {value!r}")
        kept = self.enable_prefix_caching or self.speculative is not None or self.swap_space
        if not self.use_kv_cache and kept:
            raise ValueError(
                f"{me}: use_kv_cache=False must go with enable_prefix_caching=False, "
                "speculative=None and swap_space=0: they keep keys and values"
            )

    def _check_speculation(self) -> None:
        me = "LLM"
        if self.speculative is not None and (
            not isinstance(self.speculative, str) or not self.speculative
        ):
            raise ValueError(
                f"{me}: speculative must be None, 'ngram' or a checkpoint folder, got "
                f"{self.speculative!r}"
            )
        _integer(me, "num_speculative_tokens", self.num_speculative_tokens, 0)
        if self.num_speculative_tokens > MAX_DRAFTS:
            raise ValueError(
                f"{me}: num_speculative_tokens must be at most {MAX_DRAFTS}, got "
                f"{self.num_speculative_tokens}"
            )
        _integer(me, "prompt_lookup_min", self.prompt_lookup_min, 1)
        _integer(me, "prompt_lookup_max", self.prompt_lookup_max, self.prompt_lookup_min)
