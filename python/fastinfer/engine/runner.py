"""Owns the model and the KV cache; runs one step and hands the tokens back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _lib, ops
from ..distributed.sampling import ShardedSample
from ..models import CausalLM, load_config, start_loading
from ..models.quantized import quantize_layers
from ..models.shard import WHOLE
from . import graphs
from .batch import RequestRows, StepBatch, build_batch
from .bursts import Bursts
from .config import EngineConfig, SamplingParams
from .draft_model import ModelDrafter, load_draft
from .drafting import Drafter, NGramDrafter
from .graphs import DecodeGraphs
from .kv_cache import (
    allocate_cache,
    block_bytes,
    cache_config,
    cache_dtype,
    choose_num_blocks,
    must_fit,
)
from .metrics import RequestMetrics
from .request import Request
from .sampler import DrawnTokens, sample_tokens
from .stage_cost import choose_part
from .static_step import make_workspace
from .step_plan import ScheduledChunk, SchedulePlan
from .swap import HostCache, SwapSpace
from .team import Stage, Team
from .verify_graphs import VerifyGraphs


class ModelRunner:
    """Executes step batches on one device.

    Args:
        config: Of the engine.
        device: Where to run.
        model: Stands in for the model of `config.model`; for tests.
        team: The other processes that run the model; None: there are none.

    Attributes:
        model: The decoder.
        max_model_len: Longest prompt + output, in tokens.
        num_blocks: Size of the KV cache.
        block_bytes: Bytes of a block over all layers.
    """

    def __init__(
        self,
        config: EngineConfig,
        device: torch.device,
        model: Any = None,
        team: Team | None = None,
    ) -> None:
        self.device = device
        self.block_size = config.block_size
        self._team = team
        self._planned_ms: float | None = None  # of a step of this stage
        if model is not None:
            self._set_up(config, model)
            return
        plan = f"`fastinfer plan --model {config.model}` says how much they are"
        weights = f"the weights of {config.model}"
        with must_fit(weights, device, plan):
            shard = WHOLE
            if team is not None:
                whole = load_config(config.model)
                workspace = make_workspace(whole, device)
                timed = f"the layers of {config.model} that are timed"
                hint = "lower max_num_seqs, or give pipeline_stages, which times none"
                with must_fit(timed, device, hint):
                    shard, self._planned_ms = choose_part(config, whole, team, device, workspace)
                del workspace
            loading = start_loading(
                config.model,
                dtype=config.dtype,
                device=device,
                load_format=config.load_format,
                progress=config.progress,
                max_model_len=config.max_model_len,
                requantize=config.requantize,
                shard=shard,
            )
        with loading:  # weights may go on arriving while memory is measured and steps captured
            if config.quantization is not None:
                with must_fit(weights, device, plan):
                    quantize_layers(loading.finish(), config.quantization, device)
            self._set_up(config, loading.model)
            if config.quantization is None:
                with must_fit(weights, device, plan):
                    loading.finish()

    def _set_up(self, config: EngineConfig, model: Any) -> None:
        """Everything but the values of the weights."""
        device = self.device
        if config.batch_invariant:
            model.set_batch_invariant(True)
        if isinstance(model, CausalLM):
            model.set_attention(fused=config.fused_attention, share_heads=config.share_kv_heads)
        self.model = model
        self._least("begun", 0)  # from here on ranks wait for each other
        cached = cache_config(model)
        self.vocab_size: int = model.config.vocab_size
        self._vocabulary = range(self.vocab_size)
        self._sample: Any = None
        groups = None if self._team is None else self._team.groups
        if groups is not None and groups.tensor is not None:
            self._sample = sample = ShardedSample(groups.tensor, self.vocab_size)
            self._vocabulary = range(sample.begin, sample.begin + sample.count)
        self._stage = None if groups is None or groups.stages == 1 else Stage(groups, model)
        self.max_model_len: int = config.max_model_len or model.max_model_len
        self.cache_dtype = cache_dtype(config.kv_cache_dtype, model.dtype)
        self.block_bytes = block_bytes(cached, config.block_size, self.cache_dtype)
        leads = self._team is None or self._team.groups.rank == 0
        draft = load_draft(config, model, device) if leads else None
        if draft is not None:
            draft_cache = cache_dtype(config.kv_cache_dtype, draft.dtype)
            self.block_bytes += block_bytes(draft.config, config.block_size, draft_cache)
        self._workspace = make_workspace(cached, device)
        # tokens of the latest step, where the model is
        self._drawn = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=device)
        self.num_blocks = self._least(
            "num_blocks",
            choose_num_blocks(
                config,
                self.block_bytes,
                max_model_len=self.max_model_len,
                device=device,
                measure_peak=lambda: self._measure_peak(config),
            ),
        )
        self.cache, self.layers = allocate_cache(
            cached,
            num_blocks=self.num_blocks,
            block_size=config.block_size,
            dtype=self.cache_dtype,
            device=device,
        )
        self._host: HostCache | None = None
        self.swap: SwapSpace | None = None
        own_bytes = block_bytes(cached, config.block_size, self.cache_dtype)
        count = self._least("swap", min(config.swap_space // own_bytes, self.num_blocks))
        if count:
            with must_fit(f"swap_space of {config.swap_space} bytes", device, "lower swap_space"):
                self._host = HostCache(cached, self.layers, count, config.block_size)
            self.swap = SwapSpace(count, own_bytes, self._host.measure_bandwidth())
        max_len = min(self.max_model_len, self.num_blocks * config.block_size)
        self.drafter: Drafter | None = None
        if config.speculative == "ngram":
            self.drafter = NGramDrafter(config.prompt_lookup_min, config.prompt_lookup_max)
        elif draft is not None:
            self.drafter = ModelDrafter(
                draft,
                config,
                num_blocks=self.num_blocks,
                max_len=max_len,
                dtype=draft_cache,
                device=device,
                vocab_size=self.vocab_size,
            )
        self._rows = RequestRows(config.max_num_seqs, -(-max_len // config.block_size))
        self._graphs: DecodeGraphs | None = None
        wanted = config.cuda_graphs
        if wanted or (wanted is None and device.type == "cuda"):
            with must_fit("the CUDA graphs", device, "lower max_num_seqs or cuda_graphs=False"):
                self._graphs = DecodeGraphs(
                    model,
                    self.layers,
                    self._rows,
                    workspace=self._workspace,
                    max_rows=config.max_num_seqs,
                    max_len=max_len,
                    block_size=config.block_size,
                    device=device,
                    sample=self._sample,
                    stage=self._stage,
                )
            self._drawn = self._graphs.drawn
        self._verify: VerifyGraphs | None = None
        self.bursts: Bursts | None = None
        speculates = config.speculative is not None and config.num_speculative_tokens > 0
        if self._graphs is not None and speculates:
            self._verify = VerifyGraphs(
                model,
                self.layers,
                self._rows,
                max_rows=config.max_num_seqs,
                max_drafts=config.num_speculative_tokens,
                max_len=max_len,
                block_size=config.block_size,
                device=device,
                sample=self._sample,
                stage=self._stage,
            )
            self._verify.prepare(rows=4 if device.type == "cuda" else 0)
            if self._team is None:
                self.bursts = self._make_bursts(config, max_len)

    def _make_bursts(self, config: EngineConfig, max_len: int) -> Bursts:
        assert self._verify is not None
        bursts = Bursts(
            self.model,
            self.layers,
            self._rows,
            drafter=self.drafter if isinstance(self.drafter, ModelDrafter) else None,
            ngram=(config.prompt_lookup_min, config.prompt_lookup_max),
            workspace=self._verify.workspace,
            max_rows=config.max_num_seqs,
            max_drafts=config.num_speculative_tokens,
            max_len=max_len,
            block_size=config.block_size,
            device=self.device,
        )
        if self.device.type == "cuda" and bursts.steps(self._verify.seconds()) > 1:
            bursts.prepare(rows=4)
        return bursts

    @property
    def failure(self) -> str | None:
        """Why no step can run any more; None while they can."""
        return None

    def pipeline_stats(self, *, reset: bool = False) -> list[dict[str, float]]:
        """Per stage of a pipeline its layers, steps, milliseconds of work per step and the share of
        the time that it was idle; see `StageClock`. Empty where there is one stage.

        Args:
            reset: Begin to measure anew.
        """
        if self._stage is None:
            return []
        report = {"layers": len(self.model.layers), **self._stage.clock.report()}
        if self._planned_ms is not None:
            report["planned_ms"] = self._planned_ms
        if reset:
            self._stage.clock.reset()
        return [report]

    def _least(self, what: str, value: int) -> int:
        """The smallest of all ranks' values; here everybody meets."""
        return value if self._team is None else self._team.least(what, value)

    def move_blocks(self, plan: SchedulePlan) -> None:
        """The moves between device and host of a plan that has nothing to run."""
        self._move_blocks(plan)

    def _move_blocks(self, plan: SchedulePlan) -> None:
        if plan.swap_out or plan.swap_in:
            assert self._host is not None
            self._host.move(plan.swap_out, plan.swap_in)

    @property
    def max_draft_rows(self) -> int | None:
        """Most requests of a step with drafts, where these run over static buffers."""
        return None if self._verify is None else self._verify.max_rows

    @torch.inference_mode()
    def step(self, plan: SchedulePlan) -> tuple[list[Request], DrawnTokens]:
        """Launch a plan.

        Returns:
            The requests it draws tokens for, if one of them wants more than a token or has
            penalties (else none), and the tokens to come.
        """
        self._move_blocks(plan)
        if plan.burst is not None:
            assert self.bursts is not None and not plan.copies
            return [], self.bursts.launch(plan)
        if self._graphs is not None and self._graphs.accepts(plan):
            if plan.copies:
                self._copy_blocks(torch.tensor(plan.copies).to(self.device))
            return [], self._graphs.launch(plan)
        if self._verify is not None and self._verify.accepts(plan):
            if plan.copies:
                self._copy_blocks(torch.tensor(plan.copies).to(self.device))
            return [], self._verify.launch(plan)
        batch = self.build(plan)
        special = any(not request.wants_only_tokens for request in batch.sampling)
        return batch.sampling if special else [], self.launch(batch)

    @torch.inference_mode()
    def launch(self, batch: StepBatch) -> DrawnTokens:
        """Run the model over a batch and draw the tokens of the requests that reached their end.

        Returns:
            Before a GPU has done the work; `DrawnTokens.result` waits for it.
        """
        if batch.copies is not None:
            self._copy_blocks(batch.copies)
        if batch.carry_to is not None:
            assert batch.carry_from is not None
            carried = self._drawn.index_select(0, batch.carry_from)
            batch.input_ids.index_copy_(0, batch.carry_to, carried)
        # The embedding, a kernel of torch's, stands between all that was written before this step
        # and the first kernel that may start early.
        stage, inputs = self._stage, batch.input_ids
        if stage is not None:
            inputs = stage.receive(inputs)
        with _lib.programmatic_launch(graphs.PROGRAMMATIC_LAUNCH):
            hidden = self.model(inputs, batch.meta, self.layers)
            if stage is not None and (not stage.is_last or not batch.sampling):
                stage.send(hidden)
                return DrawnTokens(None, batch.first_rows)
            if not batch.sampling:
                return DrawnTokens(None)
            logits = self.model.compute_logits(hidden.index_select(0, batch.logits_index))
        out = sample_tokens(
            logits,
            batch.sampling,
            batch.options,
            vocab_size=self.vocab_size,
            sample=self._sample,
        )
        if stage is not None:
            stage.send(hidden)
        drawn = DrawnTokens(out)
        drawn.first_rows = batch.first_rows
        if batch.first_rows is None:  # else the host has to see them before the next step
            self._drawn[: len(batch.sampling)].copy_(out.token_ids)
        return drawn

    def _copy_blocks(self, pairs: Tensor) -> None:
        sides = [(c.k, c.v, c.k_scale, c.v_scale) for c in self.layers]
        moved = [side for layer in sides for side in layer if side is not None]
        ops.copy_blocks(moved, [], pairs)

    def build(self, plan: SchedulePlan) -> StepBatch:
        """The tensors of a plan."""
        batch = build_batch(
            plan,
            self._rows,
            block_size=self.block_size,
            device=self.device,
            vocabulary=self._vocabulary,
        )
        batch.meta.workspace = self._workspace
        return batch

    def release(self) -> None:
        """Let go of the model and the cache."""
        self._graphs = self._verify = self.bursts = self.drafter = self._host = None
        del self.model, self.cache, self.layers

    def _measure_peak(self, config: EngineConfig) -> int:
        """Bytes that the largest step needs on top of what stays allocated (CUDA only)."""
        tokens = config.max_num_batched_tokens
        with must_fit(f"a step of {tokens} tokens", self.device, "lower max_num_batched_tokens"):
            batch = self._largest_step(config)
            self.launch(batch).result()
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.launch(batch).result()
            peak = torch.cuda.max_memory_allocated(self.device) - before
        del batch
        self.layers = []
        torch.cuda.empty_cache()
        return peak

    def _largest_step(self, config: EngineConfig) -> StepBatch:
        """Prompts that use up the budget, sampled from by as many requests as may run.

        Their cache becomes `self.layers`.
        """
        longest = max(min(config.max_num_batched_tokens, self.max_model_len - 1), 1)
        per_prompt = -(-longest // config.block_size)
        count = min(-(-config.max_num_batched_tokens // longest), config.max_num_seqs)
        plan = SchedulePlan()
        for row in range(count):
            tokens = min(longest, config.max_num_batched_tokens - plan.num_tokens)
            request = Request(
                request_id=f"profile {row}",
                tokens=[0] * tokens,
                sampling=SamplingParams(temperature=1.0, top_p=0.9),
                seed=0,
                max_total_tokens=tokens + 1,
                metrics=RequestMetrics(arrival_time=0.0),
                block_table=list(range(row * per_prompt, (row + 1) * per_prompt)),
                row=row,
            )
            plan.chunks.append(ScheduledChunk(request, 0, tokens, num_drafts=0, samples=True))
            plan.num_tokens += tokens
        _, self.layers = allocate_cache(
            cache_config(self.model),
            num_blocks=count * per_prompt,
            block_size=config.block_size,
            dtype=self.cache_dtype,
            device=self.device,
        )
        self._rows = RequestRows(count, per_prompt)
        batch = self.build(plan)
        drafts = config.num_speculative_tokens if config.speculative else 0
        sampled = min(config.max_num_seqs * (1 + drafts), plan.num_tokens)
        batch.logits_index = batch.logits_index[:1].expand(sampled).contiguous()
        batch.sampling = batch.sampling[:1] * sampled
        columns = batch.options.columns
        columns.update({name: c[:1].expand(sampled).contiguous() for name, c in columns.items()})
        return batch
