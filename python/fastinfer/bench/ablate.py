"""Runs the rows of `fastinfer ablate` over one workload.

Clients in a closed loop: each asks again as soon as it has its answer, so that a time to first
token holds what the engine makes a request wait for and no queue of ours. Rows of one request at a
time run one request per prompt length, the others all of them. Prompts begin with the same text
(half of each), outputs have different lengths, from a quarter of --output-len up.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..engine.config import EngineConfig, SamplingParams
from ..engine.core import EngineCore
from ..engine.device import choose_device
from ..engine.kv_cache import cache_dtype
from ..engine.llm import LLM
from ..engine.metrics import summarize
from ..engine.runner import ModelRunner
from ..models import load_config
from .ablate_cost import Rates, WorkCounter, bound, measure_rates, weight_bytes
from .ablate_rows import Plan, Row, make_rows, settings_of, why_not
from .drive import LoadResult, run_load
from .workloads import Conversation, Turn

Result = dict[str, Any]
SLOWER = 1.05  # times from which on a row counts as worse than the one before
_ENOUGH = 3.0  # seconds of a row after which it is not run again
_BUDGET = 65536  # tokens: most that a step without chunking may have


@dataclass(slots=True, kw_only=True)
class Options:
    """What the command was asked for."""

    model: str
    device: str | None = None
    dtype: str = "auto"
    load_format: str = "auto"
    prompt_lens: Sequence[int]
    output_len: int
    requests: int
    at_once: int
    max_model_len: int | None = None
    chunk: int | None = None
    eval_text: str | None = None
    eval_tokens: int = 8192
    kv_cache_dtype: str | None = None
    speculative: str = "ngram"
    tensor_parallel: int = 1
    repeats: int = 1  # of each row, within `_ENOUGH` seconds; the fastest counts
    rows: Sequence[str] = field(default_factory=tuple)
    seed: int = 0


class Ablation:
    """The workload and the engines of one run of the command.

    Raises:
        ValueError: A number is out of range, or requests are longer than the model can run.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        for name in ("output_len", "requests", "at_once", "repeats"):
            if getattr(options, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"ablate: --{flag} must be at least 1")
        if not options.prompt_lens or min(options.prompt_lens) < 2:
            raise ValueError("ablate: --prompt-lens must be numbers of at least 2 tokens")
        self.device = choose_device(options.device)
        config = load_config(options.model)
        self.max_len = options.max_model_len or config.max_position
        longest = max(options.prompt_lens) + options.output_len
        if longest > self.max_len:
            raise ValueError(
                f"ablate: prompt and output must fit into {self.max_len} tokens, got {longest}; "
                "lower --prompt-lens or --output-len, or raise --max-model-len"
            )
        most = sorted(self._lengths(), reverse=True)[: options.at_once]
        self.plan = Plan(
            max_model_len=self.max_len,
            longest=longest,
            at_once=options.at_once,
            whole_budget=max(self.max_len, min(sum(most), _BUDGET)),
            chunk_budget=options.chunk or max(64, min(2048, sum(most) // 4)),
            kv_cache_dtype=options.kv_cache_dtype
            or ("fp8" if self.device.type == "cuda" else "int8"),
            speculative=options.speculative,
            tensor_parallel=options.tensor_parallel,
        )
        self.rows = make_rows(self.plan)
        unknown = set(options.rows) - {row.key for row in self.rows}
        if unknown:
            known = ", ".join(row.key for row in self.rows)
            raise ValueError(f"ablate: --rows must be of {known}, got {', '.join(unknown)}")
        self.text, tokens = self._read_text()
        vocab = config.vocab_size
        self.work = self._workload(tokens, vocab)
        self.rates: Rates | None = None
        self._model: Any = None
        self._made_with: tuple[Any, ...] = ()

    def _lengths(self) -> list[int]:
        lens = self.options.prompt_lens
        return [lens[i % len(lens)] for i in range(self.options.requests)]

    def _read_text(self) -> tuple[torch.Tensor | None, list[int] | None]:
        """Held-out tokens for perplexity, and text for prompts; none for random weights."""
        from ..quant.calibration import encode_text, read_text
        from ..text import load_tokenizer

        options = self.options
        beside = Path(options.model).resolve().parent / "heldout.txt"
        path = options.eval_text or (str(beside) if beside.is_file() else None)
        if options.load_format == "dummy" or path is None:
            return None, None
        ids = encode_text(load_tokenizer(options.model), read_text(path, "--eval"))
        scored = ids[: options.eval_tokens]
        rest = ids[options.eval_tokens :].tolist()
        longest = max(options.prompt_lens)
        return scored, rest if len(rest) > 4 * longest else ids.tolist()

    def _workload(self, tokens: list[int] | None, vocab: int) -> list[Conversation]:
        options = self.options
        rng = random.Random(options.seed)
        longest = max(options.prompt_lens)
        source = tokens or rng.choices(range(vocab), k=longest * 64)
        while len(source) < 4 * longest:
            source = source + source
        made = []
        for length in self._lengths():
            common = length // 2
            at = rng.randrange(longest, len(source) - longest)
            prompt = source[:common] + source[at : at + length - common]
            output = rng.randint(max(options.output_len // 4, 1), options.output_len)
            made.append(Conversation([Turn(prompt, output)]))
        return made

    def run(self, on_row: Callable[[str], None]) -> Iterator[Result]:
        """The result of one row after the other.

        Args:
            on_row: Is told the title of a row before it runs.
        """
        before: dict[str, Any] = {}
        chosen = self.options.rows
        settings = settings_of(self.rows)
        for row, engine in zip(self.rows, settings, strict=True):
            if chosen and row.key not in chosen:
                continue
            on_row(row.title)
            result: Result = {"op": "ablate", "row": row.key, "title": row.title}
            result |= {"peer": "transformers" if row.key == "transformers" else "fastinfer"}
            result |= {"change": row.change, "explanation": row.effect}
            try:
                cuda = self.device.type == "cuda"
                devices = torch.cuda.device_count() if cuda else (os.cpu_count() or 1)
                reason = why_not(row, self.plan, devices)
                figures = {"not_run": reason} if reason else self._measure(row, engine)
            except (ValueError, RuntimeError, ImportError, MemoryError) as error:
                figures = {"not_run": f"not run: {str(error).splitlines()[0][:200]}"}
            result |= figures
            if "not_run" not in result:
                _judge(result, before, row)
                before = result
            yield result

    def close(self) -> None:
        """Let go of the model."""
        self._model = None

    def _measure(self, row: Row, settings: dict[str, Any]) -> Result:
        if row.key == "transformers":
            return self._transformers()
        llm = self._engine(settings)
        try:
            model = llm.core.runner.model
            if self.rates is None:
                self.rates = measure_rates(self.device, model.dtype)
            work = self._chosen(row)
            at_once = 1 if row.one_by_one else self.options.at_once
            params = SamplingParams(temperature=0.0, detokenize=False)
            self._warm_up(llm.core, at_once, params)
            runner, config = llm.core.runner, llm.config
            token_bytes = runner.block_bytes / config.block_size
            load, counter, spent = None, None, 0.0
            for _ in range(self.options.repeats):
                count = WorkCounter(model, token_bytes, config.block_size)
                llm.core.on_plan = count
                again = run_load(
                    llm.core, work, [0.0] * len(work), max_concurrency=at_once, sampling=params
                )
                spent += again.duration
                if load is None or again.duration < load.duration:
                    load, counter = again, count
                if spent > _ENOUGH:
                    break
            llm.core.on_plan = None
            assert load is not None and counter is not None
            parts = counter.parts(load.duration, self.rates)
            result = _figures(load) | {
                "requests": len(work),
                "at_once": at_once,
                "steps": counter.steps,
                "weights_mb": round(weight_bytes(model) / 1e6, 3),
                "cache_mb": round(llm.stats().kv_blocks_peak * runner.block_bytes / 1e6, 3),
                "kv_waste": round(counter.waste, 4),
                "prefix_hits": round(_hits(load), 4),
                "bound": bound(parts),
                "parts_s": {name: round(seconds, 6) for name, seconds in parts.items()},
            }
            if row.rounds and self.text is not None:
                result["perplexity"] = self._perplexity(model, config)
            spec = llm.stats()
            if spec.num_draft_tokens:
                result["drafts_accepted"] = round(
                    spec.num_accepted_tokens / spec.num_draft_tokens, 4
                )
            return result
        finally:
            llm.close()

    def _chosen(self, row: Row) -> list[Conversation]:
        return self.work[: len(self.options.prompt_lens)] if row.one_by_one else self.work

    def _engine(self, settings: dict[str, Any]) -> LLM:
        options = self.options
        if settings.get("tensor_parallel_size", 1) > 1:  # its processes make their own models
            self._model = None
            return LLM(
                options.model,
                device=options.device,
                dtype=options.dtype,
                load_format=options.load_format,
                max_model_len=self.max_len,
                progress=False,
                **settings,
            )
        config = EngineConfig(
            model=options.model,
            device=str(self.device),
            dtype=options.dtype,
            load_format=options.load_format,
            max_model_len=self.max_len,
            progress=False,
            **settings,
        )
        made_with = (config.quantization,)
        if made_with != self._made_with:
            self._model = None  # before the next one needs memory
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        runner = ModelRunner(config, self.device, self._model)
        self._model, self._made_with = runner.model, made_with
        return LLM.from_runner(config, runner)

    def _warm_up(self, core: EngineCore, at_once: int, params: SamplingParams) -> None:
        """What happens only once is not part of the row."""
        first = self.work[0].turns[0].tokens
        short = [Conversation([Turn(first[:32], 4)]) for _ in range(min(at_once, 2))]
        run_load(core, short, [0.0] * len(short), sampling=params)

    def _perplexity(self, model: Any, config: EngineConfig) -> float:
        from ..quant.perplexity import perplexity

        assert self.text is not None
        kept = cache_dtype(config.kv_cache_dtype, model.dtype)
        return round(perplexity(model, self.text, window=512, cache_dtype=kept), 4)

    def _transformers(self) -> Result:
        from .backends import TransformersBackend

        if importlib.util.find_spec("transformers") is None:
            return {"not_run": "not run: transformers is not installed"}
        options = self.options
        backend = TransformersBackend(
            options.model, str(self.device), options.dtype, options.load_format
        )
        work = self.work[: len(options.prompt_lens)]
        first = work[0].turns[0].tokens
        backend.run([Conversation([Turn(first[:32], 4)])], 1, lambda done: None)
        load = backend.run(work, 1, lambda done: None)
        if load.duration < _ENOUGH and options.repeats > 1:
            load = min(load, backend.run(work, 1, lambda done: None), key=lambda x: x.duration)
        config = load_config(options.model)
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        longest = max(len(each.turns[0].tokens) + each.turns[0].max_tokens for each in work)
        result = _figures(load) | {
            "requests": len(work),
            "at_once": 1,
            "version": backend.version,
            "weights_mb": round(weight_bytes(backend.model) / 1e6, 3),
            "cache_mb": round(per_token * longest * backend.model.dtype.itemsize / 1e6, 3),
        }
        del backend
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return result


def _figures(load: LoadResult) -> Result:
    found = summarize(load.records, duration=load.duration)
    return {
        "ttft_ms": round(found["median_ttft_ms"], 3),
        "tpot_ms": round(found["median_tpot_ms"], 4),
        "itl_p99_ms": round(found["p99_itl_ms"], 3),
        "out_tok_s": round(found["output_throughput"], 2),
        "seconds": round(load.duration, 4),
    }


def _hits(load: LoadResult) -> float:
    work = load.engine
    return work.prefix_hit_tokens / work.prefix_query_tokens if work else 0.0


def _judge(result: Result, before: Result, row: Row) -> None:
    """Say what got worse against the row before, and why that is."""
    if not before:
        return
    result["speedup"] = round(result["out_tok_s"] / before["out_tok_s"], 3)
    worse = []
    if result["out_tok_s"] * SLOWER < before["out_tok_s"]:
        worse.append(f"throughput / {before['out_tok_s'] / result['out_tok_s']:.2f}")
    names = (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT"), ("itl_p99_ms", "longest gaps"))
    for key, name in names:
        if result[key] > SLOWER * before[key]:
            worse.append(f"{name} x {result[key] / before[key]:.2f}")
    if result.get("perplexity") and before.get("perplexity", 0) < result["perplexity"] / 1.0005:
        worse += [f"perplexity {result['perplexity']}"] if before.get("perplexity") else []
    if worse:
        result["worse"] = worse
        reason = row.price
        if result.get("bound") == "launch":
            reason = row.price_of_launches or reason
        result["why_worse"] = reason or "a difference between two runs of a busy machine"
