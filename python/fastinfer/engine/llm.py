"""`LLM`: a checkpoint folder in, text out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..read_ahead import read_ahead
from .config import EngineConfig, SamplingParams
from .core import EngineCore
from .device import choose_device
from .generation import Generation
from .metrics import EngineStats, summarize
from .outputs import RequestOutput
from .prompts import Prompt, find_tokenizer, parse_prompts
from .runner import ModelRunner

Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model ready to generate.

    Args:
        model: Checkpoint folder in Hugging Face layout.
        tokenizer: Another folder to take the tokenizer from. A folder without a tokenizer works
            with token ids.
        dtype: "auto" (what the checkpoint says), "float32", "float16", "bfloat16" or the torch
            dtype.
        device: "cpu", "cuda", "cuda:1", ...; None is CUDA where it is usable, else the CPU.
        load_format: "auto", or "dummy" for random weights (benchmarks).
        max_model_len: Longest prompt + output in tokens; None is what the model was trained for.
        block_size: Tokens per block of the KV cache.
        num_blocks: Blocks of the KV cache; None derives them from kv_cache_memory.
        kv_cache_memory: Bytes for the KV cache; None takes a share of the memory that is free.
        kv_cache_dtype: "auto" (the model's), "fp8" or "int8".
        mode: "balanced", "latency" or "throughput": defaults of the two settings below.
        max_num_seqs: Most requests that run at once.
        max_num_batched_tokens: Token budget of one step; longer prompts are cut into chunks.
        speculative: "ngram", or the folder of a draft model: check several guessed tokens per
            step. The tokens are the same as without.
        num_speculative_tokens: Most guesses per request and step.
        seed: Where requests without a seed get theirs from.
        enable_prefix_caching: Reuse the KV blocks of prompts that begin alike.
        batch_invariant: A request's tokens and log-probabilities do not depend, to the last bit,
            on what else runs, on chunking, a cached prefix or preemption. Costs speed on a GPU.
        tensor_parallel_size: GPUs that share every layer; on the CPU, processes. Under torchrun
            those are the processes it started, else they are started here. There, all but rank 0
            serve inside of this call and end with it (SystemExit).
        pipeline_parallel_size: Groups of those with a part of the layers each; how many layers is
            measured, or said by `pipeline_stages=[...]`.
        progress: Show a bar while the weights are read.
        **options: The remaining fields of `EngineConfig`.

    Raises:
        FileNotFoundError: The folder, or a file that it must hold, is not there.
        ValueError: A setting is out of range, or the model cannot be run.

    Example:
        >>> with LLM("path/to/checkpoint") as llm:
        ...     llm.generate("Once upon a time", SamplingParams(max_tokens=32))[0].text
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        load_format: str = "auto",
        max_model_len: int | None = None,
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_cache_memory: int | None = None,
        kv_cache_dtype: str = "auto",
        mode: str = "balanced",
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        speculative: str | os.PathLike[str] | None = None,
        num_speculative_tokens: int = 4,
        seed: int = 0,
        enable_prefix_caching: bool = True,
        batch_invariant: bool = False,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        progress: bool = True,
        **options: Any,
    ) -> None:
        config = EngineConfig(
            model=os.fspath(model),
            tokenizer=None if tokenizer is None else os.fspath(tokenizer),
            dtype=str(dtype).removeprefix("torch."),
            device=None if device is None else str(device),
            load_format=load_format,
            max_model_len=max_model_len,
            block_size=block_size,
            num_blocks=num_blocks,
            kv_cache_memory=kv_cache_memory,
            kv_cache_dtype=kv_cache_dtype,
            mode=mode,
            max_num_seqs=max_num_seqs,  # type: ignore[arg-type]
            max_num_batched_tokens=max_num_batched_tokens,  # type: ignore[arg-type]
            speculative=None if speculative is None else os.fspath(speculative),
            num_speculative_tokens=num_speculative_tokens,
            seed=seed,
            enable_prefix_caching=enable_prefix_caching,
            batch_invariant=batch_invariant,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            progress=progress,
            **options,
        )
        if config.load_format == "auto":
            read_ahead(config.model)
        device = choose_device(config.device)
        several = config.tensor_parallel_size * config.pipeline_parallel_size > 1
        if several:
            from .parallel import LeadRunner, serve_under_torchrun

            serve_under_torchrun(config, device)
        make = LeadRunner if several else ModelRunner
        runner = make(config, device)
        try:
            self._start(config, runner, find_tokenizer(config))
        except BaseException:
            runner.release()
            raise

    @classmethod
    def from_config(
        cls, model: str | os.PathLike[str], file: str | os.PathLike[str], **options: Any
    ) -> LLM:
        """An engine with the settings of a file that `fastinfer tune` wrote.

        Args:
            model: Checkpoint folder.
            file: JSON with the settings.
            **options: Of `LLM`; they come before those of the file.

        Raises:
            FileNotFoundError: There is no such file, or no such model.
            ValueError: The file holds no settings, or one that does not fit the model.
        """
        from .settings_file import read_settings

        return cls(model, **{**read_settings(file), **options})

    @classmethod
    def from_runner(cls, config: EngineConfig, runner: ModelRunner, tokenizer: Any = None) -> LLM:
        """An engine around a model built elsewhere: `ModelRunner(config, device, model)`."""
        llm = cls.__new__(cls)
        llm._start(config, runner, tokenizer)
        return llm

    def _start(self, config: EngineConfig, runner: ModelRunner, tokenizer: Any) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self._core: EngineCore | None = EngineCore(
            config,
            runner,
            eos_token_ids=runner.model.config.eos_token_ids,
            tokenizer=tokenizer,
        )

    @property
    def core(self) -> EngineCore:
        """The step loop, for programs that drive it themselves."""
        return self._engine

    @property
    def _engine(self) -> EngineCore:
        if self._core is None:
            raise RuntimeError("LLM: this object is closed; create a new one")
        return self._core

    def _prompts(
        self, prompts: Any, sampling_params: Any
    ) -> list[tuple[str | None, list[int], SamplingParams]]:
        return parse_prompts(prompts, sampling_params, self.tokenizer, self.config.model)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._engine.runner.device

    @property
    def max_model_len(self) -> int:
        """Longest prompt + output in tokens that fits both the model and the KV cache."""
        return self._engine.scheduler.max_total_tokens

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Complete one prompt or many; they share the engine's steps.

        Args:
            prompts: Text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}; or
                a list of these.
            sampling_params: One for all prompts or one per prompt; None is `SamplingParams()`.
            use_tqdm: Progress bar; None shows it for several prompts on a terminal.
            priority: One for all or one per prompt; lower is served first, equal ones as they came.

        Returns:
            One output per prompt, in their order.

        Raises:
            ValueError: A prompt could never run (too long, empty, ids outside the vocabulary), or
                the numbers of prompts and parameters differ. Nothing was started then.
            RuntimeError: A step failed. Requests of this call have ended, others go on.
        """
        core = self._engine
        generations = core.add(self._prompts(prompts, sampling_params), priority=priority)
        if use_tqdm is None:
            use_tqdm = len(generations) > 1 and sys.stderr.isatty()
        left, ended = generations, -1
        try:
            with tqdm(total=len(left), unit="prompt", disable=not use_tqdm) as bar:
                while left:
                    core.step()
                    if core.num_ended == ended:
                        continue
                    with core.lock:  # another thread's step may be in the middle of its results
                        ended, done = core.num_ended, len(left)
                        left = [generation for generation in left if not generation.finished]
                    bar.update(done - len(left))
        finally:
            core.abort(left)
        for generation in generations:
            _raise_failure(generation)
        return [generation.output() for generation in generations]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, through the model's chat template.

        Args:
            messages: A list of {"role": ..., "content": ...}, or a list of such lists.
            sampling_params: As in `generate`.
            use_tqdm: As in `generate`.
            **template_options: As in `chat_prompt`.

        Returns:
            One output per conversation.

        Raises:
            ValueError: As in `generate`; or there is no tokenizer or no chat template.
        """
        many = messages if messages and not isinstance(messages[0], Mapping) else [messages]
        prompts = [self.chat_prompt(each, **template_options) for each in many]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def chat_prompt(self, messages: Messages, **template_options: Any) -> dict[str, Any]:
        """The prompt that the chat template makes of a conversation, for `generate` or `stream`.

        Args:
            messages: A list of {"role": ..., "content": ...}.
            **template_options: Passed to `fastinfer.text.encode_chat`.
        """
        from ..text import encode_chat

        if self.tokenizer is None:
            raise ValueError("LLM: chat needs a tokenizer and this model folder has none")
        ids = encode_chat(self.tokenizer, messages, **template_options)
        return {"prompt_token_ids": ids}

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
    ) -> TextStream:
        """Complete one prompt, handing out what is new after every step.

        Args:
            prompt: As in `generate`, a single one.
            sampling_params: None is `SamplingParams()`.
            priority: As in `generate`.

        Returns:
            An iterator of `RequestOutput` whose `outputs` hold only new text and tokens; the last
            one has `finished` set and carries the finish reason. Leaving the loop early, closing
            or dropping the iterator ends the request.

        Raises:
            ValueError: The prompt could never run.
        """
        core = self._engine
        (generation,) = core.add(self._prompts([prompt], sampling_params), priority=priority)
        return TextStream(core, generation)

    def stats(self) -> EngineStats:
        """Running and waiting requests, use of the KV cache, preemptions, prefix hits."""
        return self._engine.stats()

    def metrics(self, *, goodput: dict[str, float] | None = None) -> dict[str, float | int]:
        """Aggregate latency and throughput of the latest finished requests; see `summarize`."""
        return summarize(list(self._engine.records), goodput=goodput)

    def pipeline_stats(self, *, reset: bool = False) -> list[dict[str, float]]:
        """What each stage of a pipeline did; empty without one.

        Args:
            reset: Begin to measure anew, after this.

        Returns:
            Per stage its `layers`, `steps`, `step_ms` of work per step, and `idle_share` of the
            time since its first step, waiting for requests included. `planned_ms` is what the
            division of the layers counted on, where it was measured.
        """
        core = self._engine
        with core.lock:
            return core.runner.pipeline_stats(reset=reset)

    def close(self) -> None:
        """End all requests and let go of model and cache. May be called twice."""
        core, self._core = self._core, None
        if core is None:
            return
        core.abort_all()
        core.drop_launched()
        on_cuda = core.runner.device.type == "cuda"
        core.runner.release()
        if on_cuda:
            torch.cuda.empty_cache()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class TextStream(Iterator[RequestOutput]):
    """Outputs of one request as they come; see `LLM.stream`."""

    def __init__(self, core: EngineCore, generation: Generation) -> None:
        self._core = core
        self._generation = generation

    def __next__(self) -> RequestOutput:
        try:
            while True:
                # another thread's step may bring the news; not while its results are taken in
                with self._core.lock:
                    if self._generation.has_news:
                        _raise_failure(self._generation)
                        return self._generation.output(delta=True)
                    if self._generation.finished:
                        raise StopIteration
                    self._core.step()
        except KeyboardInterrupt:
            self.close()
            raise

    def close(self) -> None:
        """End the request."""
        self._core.abort([self._generation])

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._generation.finished:
            self._core.abandon(self._generation)


def _raise_failure(generation: Generation) -> None:
    if generation.error is not None:
        raise RuntimeError(
            f"LLM: the request was ended because the step it was in failed: {generation.error}"
        ) from generation.error
