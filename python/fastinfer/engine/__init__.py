"""The generation engine: continuous batching over a paged KV cache.

Names are resolved on first use, so that the parts without tensors (configuration, requests,
scheduler, metrics) can be imported and tested without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .async_llm import AsyncLLM, AsyncStream, EngineBusy, EngineStopped
    from .config import EngineConfig, SamplingParams
    from .llm import LLM, TextStream
    from .metrics import EngineStats, RequestMetrics, summarize
    from .outputs import CompletionOutput, Logprob, RequestOutput

_HOME = {
    "EngineConfig": "config",
    "SamplingParams": "config",
    "AsyncLLM": "async_llm",
    "AsyncStream": "async_llm",
    "EngineBusy": "async_llm",
    "EngineStopped": "async_llm",
    "LLM": "llm",
    "TextStream": "llm",
    "EngineStats": "metrics",
    "RequestMetrics": "metrics",
    "summarize": "metrics",
    "CompletionOutput": "outputs",
    "Logprob": "outputs",
    "RequestOutput": "outputs",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "AsyncStream",
    "CompletionOutput",
    "EngineBusy",
    "EngineConfig",
    "EngineStats",
    "EngineStopped",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "TextStream",
    "summarize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
