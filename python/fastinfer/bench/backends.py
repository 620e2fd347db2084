"""Other engines under the same workloads: transformers' `generate`, and vLLM where it is installed.

Both take token ids and fixed output lengths, greedy, and return the timelines that the engine here
returns, so that tables, JSON and `fastinfer bench compare` work on them.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ..engine.metrics import RequestMetrics
from . import BACKENDS
from .drive import LoadResult
from .workloads import Conversation

Show = Callable[[int], None]


class Backend(Protocol):
    """An engine that a workload can be given to."""

    version: str
    vocab_size: int
    max_model_len: int

    def run(self, work: Sequence[Conversation], at_once: int, show: Show) -> LoadResult:
        """Run a workload to its end, at most `at_once` requests together."""
        ...


def make_backend(
    name: str,
    model: str,
    *,
    device: str | None = None,
    dtype: str = "auto",
    load_format: str = "auto",
    max_num_seqs: int | None = None,
) -> Backend:
    """The engine of that name.

    Raises:
        ValueError: It is not installed, or the name is unknown.
    """
    if name not in BACKENDS[1:]:
        raise ValueError(f"bench: backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"bench: --backend {name} needs {name}; pip install {name}")
    if name == "vllm":
        return VllmBackend(model, dtype, load_format, max_num_seqs)
    return TransformersBackend(model, device, dtype, load_format)


def single_turns(work: Sequence[Conversation]) -> list[tuple[list[int], int]]:
    """(prompt, output tokens) of each conversation.

    Raises:
        ValueError: One has several turns.
    """
    if any(len(each.turns) > 1 for each in work):
        raise ValueError("bench: --backend runs workloads of one turn, got a conversation")
    return [(each.turns[0].tokens, each.turns[0].max_tokens) for each in work]


class TransformersBackend:
    """`generate` of a causal language model: padded batches, each run to its longest output."""

    def __init__(self, model: str, device: str | None, dtype: str, load_format: str) -> None:
        import transformers
        from transformers import AutoConfig, AutoModelForCausalLM

        self.version = transformers.__version__
        found = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(found)
        config = AutoConfig.from_pretrained(model)
        if load_format == "dummy":
            self.model = random_model(config, dtype, self.device)
        else:
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(self.device)
        self.model.eval()
        self.vocab_size = config.vocab_size
        self.max_model_len = config.max_position_embeddings

    @torch.inference_mode()
    def run(self, work: Sequence[Conversation], at_once: int, show: Show) -> LoadResult:
        records: list[RequestMetrics] = []
        asked = single_turns(work)
        start = time.perf_counter()
        for first in range(0, len(asked), at_once):
            records += self._batch(asked[first : first + at_once])
            show(len(records))
        return LoadResult(records, time.perf_counter() - start)

    def _batch(self, asked: list[tuple[list[int], int]]) -> list[RequestMetrics]:
        from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

        device, times = self.device, []

        class Clock(StoppingCriteria):  # called after every token
            def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.append(time.perf_counter())
                return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        width = max(len(prompt) for prompt, _ in asked)
        ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in asked], device=device)
        mask = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p, _ in asked], device=device
        )
        records = [
            RequestMetrics(arrival_time=time.perf_counter(), num_prompt_tokens=len(p))
            for p, _ in asked
        ]
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max(count for _, count in asked),
            pad_token_id=0,
            eos_token_id=None,
        )
        self.model.generation_config.eos_token_id = None  # it would be taken from here
        self.model.generate(
            ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([Clock()]),
        )
        for record, (_, count) in zip(records, asked, strict=True):
            for moment in times[:count]:
                record.record_tokens(1, moment)
        return records


def random_model(config: Any, dtype: str, device: torch.device) -> Any:
    """A model of small random weights, made where it lives."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    wanted = config.dtype if dtype == "auto" else getattr(torch, dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(wanted or torch.bfloat16)
    try:
        with torch.device(device), no_init_weights():
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02)
    return model


class VllmBackend:
    """vLLM's engine in this process, stepped by hand so that every token has a time."""

    def __init__(self, model: str, dtype: str, load_format: str, max_num_seqs: int | None) -> None:
        import vllm

        self.version = vllm.__version__
        options: dict[str, Any] = {} if max_num_seqs is None else {"max_num_seqs": max_num_seqs}
        self.llm = vllm.LLM(
            model,
            dtype=dtype,
            load_format=load_format,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            **options,
        )
        config = self.llm.llm_engine.model_config
        self.vocab_size, self.max_model_len = config.get_vocab_size(), config.max_model_len

    def run(self, work: Sequence[Conversation], at_once: int, show: Show) -> LoadResult:
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        waiting = list(enumerate(single_turns(work)))[::-1]
        records: dict[str, RequestMetrics] = {}
        have: dict[str, int] = {}
        running = 0
        start = time.perf_counter()
        while waiting or running:
            while waiting and running < at_once:
                index, (prompt, count) = waiting.pop()
                params = SamplingParams(
                    temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False
                )
                name = str(index)
                records[name] = RequestMetrics(
                    arrival_time=time.perf_counter(), num_prompt_tokens=len(prompt)
                )
                have[name] = 0
                engine.add_request(name, {"prompt_token_ids": prompt}, params)
                running += 1
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                count = len(output.outputs[0].token_ids)
                if count > have[output.request_id]:
                    records[output.request_id].record_tokens(count - have[output.request_id], now)
                    have[output.request_id] = count
                running -= output.finished
            show(len(records) - running)
        return LoadResult(list(records.values()), time.perf_counter() - start)
