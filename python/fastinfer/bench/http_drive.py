"""Sends a workload to an OpenAI-compatible server and collects the timelines a client sees.

Prompts go as token ids to /v1/completions, streamed, with `ignore_eos` where the server knows it.
Conversations of several turns need the ids of the answers (`return_token_ids`, as in fastinfer and
vLLM).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

from ..engine.config import SamplingParams
from ..engine.metrics import RequestMetrics
from .drive import LoadResult, Progress
from .workloads import Conversation


class ServerLoad:
    """A load test of one server.

    Args:
        url: `http://host:port`, with or without `/v1`.
        model: Name of the model there; None asks the server for its first.
        api_key: For `Authorization: Bearer`; None sends none.
        timeout: Seconds until a request counts as failed.
    """

    def __init__(
        self, url: str, *, model: str | None, api_key: str | None = None, timeout: float = 600.0
    ) -> None:
        import httpx

        if not url.startswith(("http://", "https://")):
            raise ValueError(f"bench: --url must begin with http:// or https://, got {url!r}")
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._options: dict[str, Any] = {
            "headers": headers,
            "timeout": timeout,
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=None),
        }
        try:
            served = httpx.get(self._base + "/models", headers=headers, timeout=10).json()["data"]
        except (httpx.HTTPError, KeyError, ValueError) as error:
            raise ValueError(
                f"bench: {self._base}/models must answer with a list of models, got "
                f"{type(error).__name__}: {error}"
            ) from None
        names = [each["id"] for each in served]
        if model is not None and model not in names:
            raise ValueError(f"bench: the server has the models {names}, not {model!r}")
        self.model = model or names[0]
        self.gives_token_ids: bool | None = None  # not asked yet
        self.max_model_len: int | None = next(
            (each.get("max_model_len") for each in served if each["id"] == self.model), None
        )

    def run(
        self,
        conversations: Sequence[Conversation],
        arrivals: Sequence[float],
        *,
        max_concurrency: int | None = None,
        sampling: SamplingParams | None = None,
        progress: Progress | None = None,
    ) -> LoadResult:
        """Run a workload to its end; arguments as those of `run_load`.

        Requests that fail are counted as failed, and their conversations end.
        """
        return asyncio.run(self._run(conversations, arrivals, max_concurrency, sampling, progress))

    async def _run(
        self,
        conversations: Sequence[Conversation],
        arrivals: Sequence[float],
        max_concurrency: int | None,
        sampling: SamplingParams | None,
        progress: Progress | None,
    ) -> LoadResult:
        import httpx

        sampling = sampling or SamplingParams(temperature=0.0)
        records: list[RequestMetrics] = []
        places = asyncio.Semaphore(max_concurrency or len(conversations) or 1)
        async with httpx.AsyncClient(**self._options) as client:
            if self.gives_token_ids is None:
                await self._warm_up(client, sampling)
            if not self.gives_token_ids and any(len(each.turns) > 1 for each in conversations):
                raise ValueError(
                    "bench: conversations of several turns need a server that gives token ids "
                    "(return_token_ids), and this one does not"
                )
            start = time.perf_counter()

            async def one(conversation: Conversation, when: float) -> None:
                when = conversation.arrival if conversation.arrival is not None else when
                await asyncio.sleep(max(0.0, start + when - time.perf_counter()))
                async with places:
                    asked = start + when if max_concurrency is None else time.perf_counter()
                    past: list[int] = []
                    for turn in conversation.turns:
                        metrics = RequestMetrics(arrival_time=asked)
                        records.append(metrics)
                        prompt = past + turn.tokens
                        body = self._body(prompt, turn.max_tokens, sampling)
                        answer = await self._ask(client, body, metrics)
                        if metrics.failed:
                            return
                        past = prompt + answer
                        asked = metrics.last_token_time or time.perf_counter()

            total = sum(len(conversation.turns) for conversation in conversations)
            pairs = zip(conversations, arrivals, strict=True)
            tasks = [asyncio.ensure_future(one(*pair)) for pair in pairs]
            watcher = asyncio.ensure_future(_watch(records, start, total, progress))
            try:
                await asyncio.gather(*tasks)
            finally:
                watcher.cancel()
                for task in tasks:
                    task.cancel()
        end = max((record.last_token_time or start for record in records), default=start)
        return LoadResult(records=records, duration=end - start)

    async def _warm_up(self, client: Any, sampling: SamplingParams) -> None:
        """A short request; says whether the server gives token ids."""
        for self.gives_token_ids in (True, False):
            metrics = RequestMetrics(arrival_time=time.perf_counter())
            tokens = await self._ask(client, self._body([1, 2, 3], 2, sampling), metrics)
            if not metrics.failed:
                self.gives_token_ids = bool(tokens)
                return
        raise ValueError(
            f"bench: {self._base}/completions must complete a prompt of token ids, and did not"
        )

    def _body(self, prompt: list[int], max_tokens: int, sampling: SamplingParams) -> dict[str, Any]:
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.gives_token_ids:
            body["return_token_ids"] = True
        return body

    async def _ask(self, client: Any, body: dict[str, Any], metrics: RequestMetrics) -> list[int]:
        """One request; returns the ids of its answer if the server gives them."""
        import httpx

        metrics.num_prompt_tokens = len(body["prompt"])
        tokens: list[int] = []
        used: dict[str, Any] | None = None
        try:
            async with client.stream("POST", self._base + "/completions", json=body) as answer:
                if answer.status_code != 200:
                    metrics.failed = True
                    return []
                async for line in answer.aiter_lines():
                    if not line.startswith("data:") or line == "data: [DONE]":
                        continue
                    data = json.loads(line[5:])
                    if "error" in data:
                        metrics.failed = True
                        return []
                    used = data.get("usage") or used
                    for choice in data.get("choices", ()):
                        ids = choice.get("token_ids") or []
                        tokens += ids
                        if ids or choice.get("text"):
                            metrics.record_tokens(len(ids) or 1, time.perf_counter())
        except (httpx.HTTPError, ValueError):
            metrics.failed = True
            return []
        metrics.failed = not metrics.token_times
        _correct_counts(metrics, used)
        return tokens


def _correct_counts(metrics: RequestMetrics, used: dict[str, Any] | None) -> None:
    """A delivery without ids counted as one token; the last one takes what the usage has more."""
    if used is None or not metrics.token_counts:
        return
    metrics.token_counts[-1] += used["completion_tokens"] - metrics.num_output_tokens
    details = used.get("prompt_tokens_details") or {}
    metrics.num_cached_tokens = details.get("cached_tokens") or 0


async def _watch(
    records: list[RequestMetrics], start: float, total: int, progress: Progress | None
) -> None:
    if progress is None:
        return
    try:
        while True:
            await asyncio.sleep(0.25)
            tokens = sum(record.num_output_tokens for record in records)
            progress.show_sent(len(records), tokens, time.perf_counter() - start)
    finally:
        progress.clear()
