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

from .._errors import first_line
from ..engine.config import EngineConfig, SamplingParams
from ..engine.core import EngineCore
from ..engine.device import choose_device
from ..engine.kv_cache import cache_dtype
from ..engine.llm import LLM
from ..engine.metrics import summarize
from ..engine.runner import ModelRunner
from ..models import load_config
from .ablate_cost import Rates, WorkCounter, bound, linear_ms, measure_rates, weight_bytes
from .ablate_reasons import FIGURES, Machine, judge
from .ablate_rows import Plan, Row, make_rows, settings_of, why_not
from .drive import LoadResult, run_load
from .workloads import Conversation, Turn

Result = dict[str, Any]
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
        self.works = [self._workload(tokens, vocab, repeat) for repeat in range(options.repeats)]
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

    def _workload(self, tokens: list[int] | None, vocab: int, repeat: int) -> list[Conversation]:
        """The same lengths in every repeat, but other text: nothing of it may be cached already."""
        options = self.options
        lengths, words = random.Random(options.seed), random.Random(f"{options.seed}/{repeat}")
        longest = max(options.prompt_lens)
        source = tokens or words.choices(range(vocab), k=longest * 64)
        while len(source) < 4 * longest:
            source = source + source
        begin = 37 * repeat % longest
        made = []
        for length in self._lengths():
            common = length // 2
            at = words.randrange(longest, len(source) - longest)
            prompt = source[begin : begin + common] + source[at : at + length - common]
            output = lengths.randint(max(options.output_len // 4, 1), options.output_len)
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
        machine = Machine(
            self.device.type,
            os.cpu_count() or 1,
            torch.get_num_threads(),
            self.options.tensor_parallel,
        )
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
                figures = {"not_run": f"not run: {first_line(error)[:200]}"}
            result |= figures
            if "not_run" not in result:
                judge(result, before, machine)
                before = {"perplexity": before.get("perplexity"), **result}
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
            at_once = 1 if row.one_by_one else self.options.at_once
            params = SamplingParams(temperature=0.0, detokenize=False)
            self._warm_up(llm.core, at_once, params)
            runner, config = llm.core.runner, llm.config
            token_bytes = runner.block_bytes / config.block_size
            loads, counter, spent = [], None, 0.0
            spec = llm.stats()
            for repeated in self.works:
                work = self._chosen(row, repeated)
                count = WorkCounter(model, token_bytes, config.block_size)
                llm.core.on_plan = count
                again = run_load(
                    llm.core, work, [0.0] * len(work), max_concurrency=at_once, sampling=params
                )
                spent += again.duration
                if counter is None or again.duration < min(each.duration for each in loads):
                    counter = count
                loads.append(again)
                if spent > _ENOUGH:
                    break
            llm.core.on_plan = None
            assert counter is not None
            load = min(loads, key=lambda each: each.duration)
            parts = counter.parts(load.duration, self.rates)
            result = _figures(loads) | {
                "requests": len(load.records),
                "at_once": at_once,
                "steps": counter.steps,
                "tokens": counter.tokens,
                "tokens_out": sum(record.num_output_tokens for record in load.records),
                "prompt_pieces": counter.prompt_pieces,
                "prompt_steps": counter.prompt_steps,
                "mixed_steps": counter.mixed_steps,
                "largest_step": counter.largest_step,
                "weights_mb": round(weight_bytes(model) / 1e6, 3),
                "cache_mb": round(llm.stats().kv_blocks_peak * runner.block_bytes / 1e6, 3),
                "kv_waste": round(counter.waste, 4),
                "prefix_hits": round(_hits(load), 4),
                "bound": bound(parts),
                "parts_s": {name: round(seconds, 6) for name, seconds in parts.items()},
            }
            if config.tensor_parallel_size == 1:  # else a layer waits for the other processes
                sizes = sorted({at_once, max(counter.tokens // counter.steps, 1)})
                timed = {str(tokens): round(linear_ms(model, tokens), 4) for tokens in sizes}
                result["linear_ms"] = timed
            if row.rounds and self.text is not None:
                result["perplexity"] = self._perplexity(model, config)
            after = llm.stats()
            if drafts := after.num_draft_tokens - spec.num_draft_tokens:
                stood = after.num_accepted_tokens - spec.num_accepted_tokens
                result["drafts"] = drafts // len(loads)
                result["drafts_accepted"] = round(stood / drafts, 4)
            return result
        finally:
            llm.close()

    def _chosen(self, row: Row, work: list[Conversation]) -> list[Conversation]:
        return work[: len(self.options.prompt_lens)] if row.one_by_one else work

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
        first = self.works[0][0].turns[0].tokens
        short = [Conversation([Turn(first[31::-1], 4)]) for _ in range(min(at_once, 2))]
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
        work = self.works[0][: len(options.prompt_lens)]
        first = work[0].turns[0].tokens
        backend.run([Conversation([Turn(first[:32], 4)])], 1, lambda done: None)
        loads = [backend.run(work, 1, lambda done: None)]
        if loads[0].duration < _ENOUGH and options.repeats > 1:
            loads.append(backend.run(work, 1, lambda done: None))
        config = load_config(options.model)
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        longest = max(len(each.turns[0].tokens) + each.turns[0].max_tokens for each in work)
        result = _figures(loads) | {
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


def _figures(loads: Sequence[LoadResult]) -> Result:
    """Of the fastest run, and how far the runs of the row lie apart (largest / smallest)."""
    runs = []
    for load in sorted(loads, key=lambda each: each.duration):
        found = summarize(load.records, duration=load.duration)
        runs.append(
            {
                "ttft_ms": round(found["median_ttft_ms"], 3),
                "tpot_ms": round(found["median_tpot_ms"], 4),
                "itl_p99_ms": round(found["p99_itl_ms"], 3),
                "out_tok_s": round(found["output_throughput"], 2),
            }
        )
    figures: Result = runs[0] | {
        "seconds": round(min(load.duration for load in loads), 4),
        "runs": len(runs),
    }
    if len(runs) > 1:
        names = ("out_tok_s", *(key for key, _ in FIGURES))
        figures["spread"] = {
            key: round(max(run[key] for run in runs) / max(min(run[key] for run in runs), 1e-9), 3)
            for key in names
        }
    return figures


def _hits(load: LoadResult) -> float:
    work = load.engine
    return work.prefix_hit_tokens / work.prefix_query_tokens if work else 0.0
