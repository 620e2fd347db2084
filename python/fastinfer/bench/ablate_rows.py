"""The rows of `fastinfer ablate`: one technique of LLM inference after the other.

Each row is the settings of the row before and what it changes; every change is a documented setting
of the engine (`EngineConfig`). What a row costs is not said here but found by measuring
(ablate_reasons.py). No tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class Row:
    """One row of the table.

    Attributes:
        key: Short name, for --rows and JSON.
        title: In tables and plots.
        change: Settings that differ from the row before.
        effect: What the change does, and what to look at.
        one_by_one: A request at a time; False: as many as may run.
        rounds: Whether tokens may differ, so that perplexity is measured again.
    """

    key: str
    title: str
    change: dict[str, Any] = field(default_factory=dict)
    effect: str
    one_by_one: bool = False
    rounds: bool = False


@dataclass(slots=True, kw_only=True)
class Plan:
    """Sizes that the rows are made for, in tokens unless said otherwise."""

    max_model_len: int
    longest: int  # prompt and output of the longest request
    at_once: int  # requests that run together from "static batching" on
    whole_budget: int  # of a step that cuts no prompt
    chunk_budget: int  # of a step with chunked prefill
    block_size: int = 16
    kv_cache_dtype: str = "int8"
    speculative: str = "ngram"
    tensor_parallel: int = 1


def make_rows(plan: Plan) -> list[Row]:
    """The rows in their order, the first is `transformers`."""
    blocks = plan.at_once * -(-plan.longest // plan.block_size)
    return [
        Row(
            key="transformers",
            title="transformers generate",
            one_by_one=True,
            effect="what most people start with: a cache that grows by copying, kernels launched "
            "one by one from Python, one request after the other",
        ),
        Row(
            key="naive",
            title="no KV cache",
            one_by_one=True,
            rounds=True,
            change={
                "use_kv_cache": False,
                "fused_attention": False,
                "share_kv_heads": False,
                "block_size": plan.max_model_len,
                "num_blocks": 1,
                "max_num_seqs": 1,
                "batching": "static",
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": plan.whole_budget,
                "enable_prefix_caching": False,
                "cuda_graphs": False,
                "async_scheduling": False,
            },
            effect="every token runs the whole text again: work grows with the square of its "
            "length (a step leaves its keys and values in memory, the next writes over them)",
        ),
        Row(
            key="kv_cache",
            title="KV cache",
            one_by_one=True,
            change={"use_kv_cache": True},
            effect="keys and values of earlier tokens are kept: a decode step runs one token",
        ),
        Row(
            key="flash",
            title="FlashAttention",
            one_by_one=True,
            rounds=True,
            change={"fused_attention": True},
            effect="scores stay on the chip instead of going through memory",
        ),
        Row(
            key="gqa",
            title="GQA cache layout",
            one_by_one=True,
            change={"share_kv_heads": True},
            effect="a group of query heads reads one copy of its keys and values: the cache "
            "shrinks by the size of a group",
        ),
        Row(
            key="paging",
            title="paged cache",
            one_by_one=True,
            change={"block_size": plan.block_size, "num_blocks": blocks},
            effect=f"blocks of {plan.block_size} tokens, taken when they are needed, instead of "
            f"max_model_len ({plan.max_model_len}) tokens reserved per request; look at the "
            "share of the cache that is reserved and unused",
        ),
        Row(
            key="static",
            title="static batching",
            change={"max_num_seqs": plan.at_once},
            effect=f"up to {plan.at_once} requests share the weights that a step reads",
        ),
        Row(
            key="continuous",
            title="continuous batching",
            change={"batching": "continuous"},
            effect="a place is taken again as soon as its request has ended",
        ),
        Row(
            key="chunked",
            title="chunked prefill",
            change={
                "enable_chunked_prefill": True,
                "max_num_batched_tokens": plan.chunk_budget,
            },
            effect=f"prompts are cut to what a step of {plan.chunk_budget} tokens has left; look "
            "at the 99th percentile of the gaps between tokens",
        ),
        Row(
            key="prefix",
            title="prefix reuse",
            change={"enable_prefix_caching": True},
            effect="full blocks of a prompt that another request has computed are shared; half of "
            "every prompt here is the same text",
        ),
        Row(
            key="int8",
            title="INT8 weights",
            rounds=True,
            change={"quantization": "int8"},
            effect="half the bytes of the linear layers (one scale per output channel)",
        ),
        Row(
            key="int4",
            title="INT4 weights",
            rounds=True,
            change={"quantization": "int4"},
            effect="a quarter of the bytes (groups of up to 128 channels), at some perplexity",
        ),
        Row(
            key="cache8",
            title=f"8-bit cache ({plan.kv_cache_dtype})",
            rounds=True,
            change={"kv_cache_dtype": plan.kv_cache_dtype},
            effect="half the bytes per cached token: room for twice the requests or context",
        ),
        Row(
            key="graphs",
            title="CUDA graphs",
            change={"cuda_graphs": True},
            effect="a decode step is replayed as one launch (on a CPU the same step runs over "
            "the same static buffers, without a graph: nothing to gain)",
        ),
        Row(
            key="overlap",
            title="overlapped scheduling",
            change={"async_scheduling": True},
            effect="the next step is launched before the host has seen this one's tokens",
        ),
        Row(
            key="speculation",
            title="speculation",
            change={"speculative": plan.speculative},
            effect="guessed tokens are checked several per step; the engine stops guessing where "
            "its measurements say that it does not pay",
        ),
        Row(
            key="tensor_parallel",
            title=f"tensor parallel ({plan.tensor_parallel})",
            change={"tensor_parallel_size": plan.tensor_parallel},
            effect="every GPU holds and reads its part of each layer; two sums per layer travel "
            "between them (weights and cache are those of one GPU)",
        ),
    ]


def settings_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What the engine is given for each row: its change on top of all before."""
    known: dict[str, Any] = {}
    made = []
    for row in rows:
        known = {**known, **row.change}
        made.append(known)
    return made


def why_not(row: Row, plan: Plan, devices: int) -> str | None:
    """Why a row cannot run on so many GPUs (on a CPU: processes); None: it can."""
    if row.key != "tensor_parallel":
        return None
    if plan.tensor_parallel < 2:
        return "not run: ask for GPUs (on a CPU, processes) with --tp N"
    if plan.tensor_parallel > devices:
        return f"not run: needs {plan.tensor_parallel} GPUs, there are {devices}"
    return None
