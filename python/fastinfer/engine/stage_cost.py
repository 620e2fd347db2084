"""What layers and the two ends of a model cost on this device, before any weight is read.

A pipeline is as fast as its slowest stage, and steps of decoding are what it runs most. So that is
timed: a layer of each kind (its attention, its quantisation), the embedding, and what the last
stage does besides; parts of the model with random weights, cut over ranks like the real ones, their
collectives included. On CUDA as graphs, like the steps themselves.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _lib, ops
from ..checkpoint import Checkpoint
from ..distributed.sampling import ShardedSample
from ..distributed.stages import StageCosts, divide_layers
from ..models import AttentionMetadata, CausalLM, start_loading
from ..models.config import ModelConfig
from ..models.loader import resolve_dtype
from ..models.quantized import quantize_layers
from ..models.shard import Shard, check_stages, divide
from ..models.weights import weight_targets
from ..quant import notes
from ..quant.config import QuantConfig, read_quant_config
from .config import EngineConfig
from .graphs import PLANNED_ROWS, PROGRAMMATIC_LAUNCH
from .kv_cache import allocate_cache, block_bytes, cache_config, cache_dtype
from .team import Team

CONTEXT = 512  # tokens of a request
CPU_ROWS = 16  # most requests of a step that is timed on a CPU, which takes long
_CALLS = 8  # of what is timed, in a row
_SAMPLES = 5


def choose_part(
    config: EngineConfig,
    whole: ModelConfig,
    team: Team,
    device: torch.device,
    workspace: Tensor | None = None,
) -> tuple[Shard, float | None]:
    """Which part of the model a rank has: the layers that the user says, or those that make the
    slowest stage fastest; the same division on all ranks.

    Args:
        config, whole, team, device, workspace: As in `measure_costs`.

    Returns:
        The part, and the milliseconds of a step of its stage, where they were measured.

    Raises:
        ValueError: The model cannot be divided like that.
    """
    stages, planned = team.groups.stages, None
    counts = config.pipeline_stages or [whole.num_layers]
    if stages > 1 and config.pipeline_stages is None:
        check_stages(whole, stages)
        costs = measure_costs(config, whole, team, device, workspace)
        counts = divide_layers(costs, stages)
        planned = costs.of_stages(counts)[team.groups.stage] * 1e3
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return divide(whole, team.groups, counts), planned


def measure_costs(
    config: EngineConfig,
    whole: ModelConfig,
    team: Team,
    device: torch.device,
    workspace: Tensor | None = None,
) -> StageCosts:
    """Seconds of a decode step of as many requests as a stage gets; all ranks call this together
    and get the same numbers, the slowest rank's.

    Args:
        config: Of the engine.
        whole: Of the model.
        team: The processes.
        device: Of this one.
        workspace: Of the decode kernel.
    """

    def slowest(what: str, seconds: float) -> float:
        return -team.least(what, -round(seconds * 1e9)) / 1e9

    probe = _Probe(config, whole, team, device, workspace)
    kinds = layer_kinds(whole, read_quant_config(config.model))
    with notes.collecting(say=False):  # what is loaded afterwards says it
        of_kind = {
            kind: slowest("layer_ns", probe.layer(kinds.index(kind)))
            for kind in dict.fromkeys(kinds)
        }
        first, last = probe.ends()
    return StageCosts(
        tuple(of_kind[kind] for kind in kinds),
        slowest("first_ns", first),
        slowest("last_ns", last),
    )


def layer_kinds(config: ModelConfig, quant: QuantConfig | None) -> list[Hashable]:
    """Of each layer what its time depends on, besides the sizes that all share."""
    kinds: list[list[Hashable]] = [[kind] for kind in config.layer_types]
    for tensor, target in weight_targets(config).items() if quant is not None else ():
        if target.is_linear_weight and target.module.startswith("layers."):
            assert quant is not None
            scheme = quant.for_module(tensor.removesuffix(".weight"))
            kinds[int(target.module.split(".")[1])].append(scheme)
    return [tuple(kind) for kind in kinds]


class _Probe:
    """Times parts of a model; arguments as those of `measure_costs`."""

    def __init__(
        self,
        config: EngineConfig,
        whole: ModelConfig,
        team: Team,
        device: torch.device,
        workspace: Tensor | None,
    ) -> None:
        self._config, self._device = config, device
        self._tensor, self._workspace = team.groups.tensor, workspace
        stored = Checkpoint(Path(config.model)) if config.load_format == "auto" else None
        self._dtype = resolve_dtype(config.dtype, whole, stored)
        self._rows = -(-config.max_num_seqs // team.groups.stages)
        if device.type == "cpu":
            self._rows = min(self._rows, CPU_ROWS)
        length = min(config.max_model_len or whole.max_position, whole.max_position)
        self._context = max(min(CONTEXT, length), 1)
        self._rows = min(self._rows, self._most_rows(whole, team.groups.stages))
        self._hidden = whole.hidden_size
        self._vocabulary = whole.vocab_size

    def _most_rows(self, whole: ModelConfig, stages: int) -> int:
        """Requests whose keys and values in one layer take no more than those of the whole cache,
        where the user says how much that is; the same on all ranks.
        """
        config = self._config
        dtype = cache_dtype(config.kv_cache_dtype, self._dtype)
        blocks = -(-self._context // config.block_size)
        if config.num_blocks is not None:
            most = config.num_blocks * -(-whole.num_layers // stages)
        elif config.kv_cache_memory is not None:
            size = block_bytes(whole, config.block_size, dtype) // whole.num_layers
            most = config.kv_cache_memory // size
        else:
            return self._rows
        return max(most // blocks, 1)

    @torch.inference_mode()
    def layer(self, number: int) -> float:
        """Seconds of one layer."""
        parts = [self._part(first_layer=number, num_layers=1, is_first=False, is_last=False)]
        if self._device.type == "cuda":
            # as in a whole model, the weights must not be in the cache from the call before
            cache = torch.cuda.get_device_properties(self._device).L2_cache_size
            size = sum(t.nbytes for t in (*parts[0].parameters(), *parts[0].buffers()))
            for _ in range(min(2 * cache // max(size, 1), _CALLS - 1)):
                parts.append(
                    self._part(first_layer=number, num_layers=1, is_first=False, is_last=False)
                )
        blocks = -(-self._context // self._config.block_size)
        _, (kept,) = allocate_cache(
            cache_config(parts[0]),
            num_blocks=self._rows * blocks,
            block_size=self._config.block_size,
            dtype=cache_dtype(self._config.kv_cache_dtype, self._dtype),
            device=self._device,
        )
        for pool in (kept.k, kept.v, kept.k_scale, kept.v_scale):
            if pool is not None:
                pool.zero_()
        meta = self._step(parts[0], blocks)
        x, residual = self._states(), self._states()

        def call(i: int) -> None:
            part = parts[i % len(parts)]
            part.layers[0](x, residual, meta, kept, part.rotary[0])

        return self._seconds(call)

    @torch.inference_mode()
    def ends(self) -> tuple[float, float]:
        """Seconds of the embedding; of the final norm, the head and the draw of greedy tokens."""
        part = self._part(first_layer=0, num_layers=0, is_first=True, is_last=True)
        assert part.norm is not None and part.embed_tokens is not None
        ids = torch.zeros(self._rows, dtype=torch.int64, device=self._device)
        zeros = torch.zeros(self._rows, dtype=torch.float32, device=self._device)
        x, residual = self._states(), self._states()
        draw: Any = ops.sample
        if self._tensor is not None:
            draw = ShardedSample(self._tensor, self._vocabulary)
        embed, norm = part.embed_tokens, part.norm

        def last(_: int) -> None:
            logits = part.compute_logits(norm.add(x, residual))
            draw(logits, temperature=zeros, out=ids)

        return self._seconds(lambda _: embed(ids)), self._seconds(last)

    def _part(self, **which: Any) -> CausalLM:
        config, tensor = self._config, self._tensor
        shard = Shard(
            rank=0 if tensor is None else tensor.rank,
            ranks=1 if tensor is None else tensor.size,
            group=tensor,
            **which,
        )
        with start_loading(
            config.model,
            dtype=self._dtype,
            device=self._device,
            load_format="dummy",
            progress=False,
            max_model_len=self._context,
            requantize=config.requantize,
            shard=shard,
        ) as loading:
            model = loading.finish()
        if config.quantization is not None:
            quantize_layers(model, config.quantization, self._device)
        if config.batch_invariant:
            model.set_batch_invariant(True)
        model.set_attention(fused=config.fused_attention, share_heads=config.share_kv_heads)
        return model

    def _states(self) -> Tensor:
        return torch.ones(self._rows, self._hidden, dtype=self._dtype, device=self._device)

    def _step(self, model: CausalLM, blocks: int) -> AttentionMetadata:
        """A token for each request, at the end of `context` tokens."""
        rows, size, place = self._rows, self._config.block_size, self._device
        last = self._context - 1
        table = torch.arange(rows * blocks, dtype=torch.int32, device=place).view(rows, blocks)
        lengths = torch.full((rows,), self._context, dtype=torch.int32, device=place)
        plans, config = None, cache_config(model)
        if rows >= PLANNED_ROWS:
            window = config.window_of(0)
            heads = config.num_heads, config.num_kv_heads, config.head_dim
            plans = {window: ops.plan_decode(lengths, *heads, window_size=window)}
        return AttentionMetadata(
            positions=torch.full((rows,), last, dtype=torch.int64, device=place),
            slot_mapping=table[:, last // size].long() * size + last % size,
            cu_seqlens_q=torch.arange(rows + 1, dtype=torch.int32, device=place),
            seq_lens=lengths,
            block_table=table,
            max_seqlen_q=1,
            max_seqlen_k=self._context,
            plans=plans,
            workspace=self._workspace,
        )

    def _seconds(self, call: Callable[[int], object]) -> float:
        """Of one call. Every rank makes as many."""
        for i in range(_CALLS):
            call(i)
        run = self._captured(call)
        times = []
        for _ in range(_SAMPLES + 1):
            times.append(self._time(run))
        # other programs on a CPU make a call longer, never shorter
        pick = statistics.median if self._device.type == "cuda" else min
        return pick(times[1:]) / _CALLS

    def _time(self, run: Callable[[], object]) -> float:
        if self._device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def _captured(self, call: Callable[[int], object]) -> Callable[[], object]:
        def calls() -> None:
            for i in range(_CALLS):
                call(i)

        if self._device.type != "cuda" or self._config.cuda_graphs is False:
            return calls
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
            _lib.programmatic_launch(PROGRAMMATIC_LAUNCH),
        ):
            calls()
        return graph.replay
