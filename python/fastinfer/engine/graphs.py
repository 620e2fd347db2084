"""Decode steps over static buffers: captured once per bucket of rows, then replayed.

A step qualifies when every request in it runs exactly one token, is sampled from, and asks for
nothing but a token (no log-probabilities, penalties or minimum length). Embedding, layers, final
norm, LM head and sampling are one graph. Its inputs lie in one buffer, filled by one copy from the
host, at places that depend on the bucket only:

    input_ids, source, positions, slots, seeds, steps        int64 [rows]
    seq_lens, top_k; cu_seqlens                              int32 [rows]; [rows + 1]
    temperature, top_p, min_p                                fp32 [rows]

Block tables lie elsewhere; they are sent only when one of them has changed. Rows beyond the
requests are padding: sequence length 0, slot -1. In front of it all are the tokens that the latest
step drew: `source` is where a row's input token lies, counted in int64 from there: among those, if
the host does not know it yet, or among `input_ids`. On the CPU, where there are no graphs, the same
function over the same buffers is called instead; that is how it is tested.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _lib, ops
from ..models import AttentionMetadata, LayerCache
from .batch import RequestRows
from .kv_cache import cache_config
from .replay import StepReplay
from .request import Request
from .sampler import DrawnTokens
from .step_plan import SchedulePlan
from .team import Stage

_ALIGN = 16
_COLUMNS: dict[str, type] = {
    "input_ids": np.int64,
    "source": np.int64,
    "positions": np.int64,
    "slots": np.int64,
    "seeds": np.int64,
    "steps": np.int64,
    "seq_lens": np.int32,
    "top_k": np.int32,
    "cu_seqlens": np.int32,
    "temperature": np.float32,
    "top_p": np.float32,
    "min_p": np.float32,
}
# Columns of a request that the sampling operator takes; a step adds how far it has come.
OF_REQUEST = ("temperature", "top_k", "top_p", "min_p", "seeds")
SAMPLING = (*OF_REQUEST, "steps")
# From this many rows on, one launch per step divides the decode work for all layers; with fewer
# every launch of the decode kernel does it faster by itself.
PLANNED_ROWS = 33
# Whether the kernels of a step, captured or not, may start before the one in front has ended.
PROGRAMMATIC_LAUNCH = True
_PADDING = {"slots": -1, "top_p": 1.0}  # all else is 0


def bucket_sizes(limit: int) -> list[int]:
    """Rows of the graphs: 1, 2, 4, steps of 8 to 128, of 16 to 256, of 32 beyond, and the limit."""
    sizes = [1, 2, 4, *range(8, 129, 8), *range(144, 257, 16), *range(288, limit + 1, 32)]
    return sorted({size for size in sizes if size < limit} | {limit})


class _Staging:
    """What a step of a bucket sends to the device, in pinned memory, and the tokens it gets back.

    A bucket has two, in turn: one may still be on its way while the next step is prepared.
    """

    def __init__(
        self, rows: int, begins: dict[str, int], size: int, own: np.ndarray, blocks: int, pin: bool
    ) -> None:
        self.memory = torch.zeros(size, dtype=torch.uint8, pin_memory=pin)
        self.tables = torch.zeros(rows * blocks, dtype=torch.int32, pin_memory=pin)
        self.tokens = torch.zeros(rows, dtype=torch.int64, pin_memory=pin)
        self.done = torch.cuda.Event() if pin else None
        self.replay: StepReplay | None = None  # on CUDA
        self.bytes, self.blocks = self.memory.numpy(), self.tables.numpy()
        self.drawn = self.tokens.numpy()
        self.columns: dict[str, np.ndarray] = {}
        for name, kind in _COLUMNS.items():
            end = begins[name] + _length(name, rows) * kind().itemsize
            self.columns[name] = self.bytes[begins[name] : end].view(kind)
            self.columns[name][:] = _PADDING.get(name, 0)
        self.columns["cu_seqlens"][:] = np.arange(rows + 1)
        self.columns["source"][:] = self.own = own  # `source` of tokens that the host knows
        self.filled = 0  # rows that are not padding

    def pad(self, count: int) -> None:
        """Make padding of the rows from `count` on."""
        if count < self.filled:
            for name in _COLUMNS:
                if name != "cu_seqlens":
                    self.columns[name][count : self.filled] = _PADDING.get(name, 0)
            self.columns["source"][count : self.filled] = self.own[count : self.filled]
        self.filled = count


@dataclass(slots=True)
class _Bucket:
    """A bucket's views of the device's buffer, and what runs its steps."""

    rows: int
    columns: Tensor  # uint8, all inputs together
    inputs: dict[str, Tensor]
    drawn: Tensor  # the tokens of its rows
    hidden: Tensor  # of a pipeline's stage: what comes in, and then what goes out; else empty
    staging: list[_Staging]
    # by greedy: the captured step and its cudaGraphExec_t, or without a GPU what runs it
    graphs: dict[bool, torch.cuda.CUDAGraph] = field(default_factory=dict)
    handles: dict[bool, int] = field(default_factory=dict)
    replay: dict[bool, Callable[[], object]] = field(default_factory=dict)


class DecodeGraphs:
    """The graphs of one model over one cache.

    Args:
        model: The decoder.
        layers: Its cache.
        held: Of the running requests.
        workspace: Of the decode kernel; None lets every call have its own.
        max_rows: Most requests in a step.
        max_len: Most tokens of a sequence.
        block_size: P.
        device: Where everything is.
        sample: What stands in for the operator where the vocabulary is divided.
        stage: Of a pipeline, which the model is a part of; None: it is the whole.

    Attributes:
        drawn: int64 [max_rows], tokens of the latest step, read and written by the graphs; steps
            without a graph have to write theirs here too.
    """

    def __init__(
        self,
        model: Any,
        layers: list[LayerCache],
        held: RequestRows,
        *,
        workspace: Tensor | None,
        max_rows: int,
        max_len: int,
        block_size: int,
        device: torch.device,
        sample: Callable[..., Any] | None = None,
        stage: Stage | None = None,
    ) -> None:
        self._sample, self._stage = sample, stage
        self._model, self._layers = model, layers
        self._held, self._workspace = held, workspace
        self._max_len, self._block_size, self._device = max_len, block_size, device
        self._sizes = bucket_sizes(max_rows)
        max_blocks = -(-max_len // block_size)
        size = sum(_column_bytes(name, max_rows) for name in _COLUMNS)
        first = -(-8 * max_rows // _ALIGN) * _ALIGN
        self._whole = torch.zeros(first + size, dtype=torch.uint8, device=device)
        self.drawn = self._whole[: 8 * max_rows].view(torch.int64)
        self._buffer = self._whole[first:]
        self._tables = torch.zeros((max_rows, max_blocks), dtype=torch.int32, device=device)
        self._hidden = torch.empty(0) if stage is None else stage.buffer(max_rows)
        self._sent = (-1, b"")  # what `_tables` holds: version of the tables, the requests' rows
        self._pool: Any = None
        self._side: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
            self._side = torch.cuda.Stream(device)  # steps are tried and captured on it
        # the largest first: smaller ones then find their memory in the pool
        self._buckets = {rows: self._make(rows) for rows in reversed(self._sizes)}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()  # of what the trials needed

    def accepts(self, plan: SchedulePlan) -> bool:
        """Whether a step qualifies."""
        chunks = plan.chunks
        if not 0 < len(chunks) <= self._sizes[-1] or plan.num_tokens != len(chunks):
            return False
        return self._held.decodes.plain(chunks) or all(
            chunk.samples and not chunk.num_drafts and _wants_only_tokens_now(chunk.request)
            for chunk in chunks
        )

    def launch(self, plan: SchedulePlan) -> DrawnTokens:
        """Run a step that qualifies; its block copies must have been done."""
        count = len(plan.chunks)
        bucket = self._buckets[self._sizes[bisect_left(self._sizes, count)]]
        staging = bucket.staging[0]
        bucket.staging.reverse()
        if staging.done is not None:
            staging.done.synchronize()  # of the step before the last one
        greedy, width = self._fill(staging, plan)
        if self._stage is not None:
            self._stage.receive_into(bucket.hidden)
        if staging.replay is not None:
            staging.replay(bucket.handles[greedy], count, width)
        else:
            bucket.columns.copy_(staging.memory)
            sent = staging.tables[: count * width].view(count, width)
            self._tables[:count, :width] = sent
            bucket.replay[greedy]()
            staging.tokens.copy_(bucket.drawn)
        if self._stage is not None:
            self._stage.send(bucket.hidden)
        return DrawnTokens.in_buffer(staging.drawn[:count], staging.done)

    def _fill(self, staging: _Staging, plan: SchedulePlan) -> tuple[bool, int]:
        """Write the inputs of a step: whether all requests are greedy, and how much of the block
        tables has to be sent.
        """
        count, held, columns = len(plan.chunks), self._held, staging.columns
        rows, starts, ids = (np.empty(count, dtype=np.int64) for _ in range(3))
        width = held.pack(plan, rows, starts, ids)
        staging.pad(count)
        greedy = held.decodes.fill(
            rows,
            starts,
            ids,
            staging.own,
            held.drawn_at,
            held.tables,
            held.temperature,
            self._block_size,
            columns,
        )
        if not greedy:
            columns["steps"][:count] = starts + 1 - held.num_prompt[rows]
            for name in ("seeds", "top_p", "min_p", "top_k"):
                columns[name][:count] = getattr(held, name)[rows]
        sent = rows.tobytes()
        if self._sent == (held.version, sent):
            return greedy, 0
        self._sent = (held.version, sent)
        held.decodes.gather(held.tables, rows, width, staging.blocks)
        return greedy, width

    def _make(self, rows: int) -> _Bucket:
        begins, size = {}, 0
        for name in _COLUMNS:
            begins[name] = size
            size += _column_bytes(name, rows)
        inputs = {}
        for name, kind in _COLUMNS.items():
            count = _length(name, rows)
            piece = self._buffer[begins[name] : begins[name] + count * kind().itemsize]
            inputs[name] = piece.view(getattr(torch, kind.__name__))
            inputs[name].fill_(_PADDING.get(name, 0))  # nothing but padding while it is captured
        inputs["cu_seqlens"].copy_(torch.arange(rows + 1))
        own = np.arange(rows) + (self._buffer.storage_offset() + begins["input_ids"]) // 8
        inputs["source"].copy_(torch.from_numpy(own))
        on_cuda, blocks = self._device.type == "cuda", self._tables.shape[1]
        staging = [_Staging(rows, begins, size, own, blocks, on_cuda) for _ in range(2)]
        hidden, drawn = self._hidden[:rows], self.drawn[:rows]
        bucket = _Bucket(rows, self._buffer[:size], inputs, drawn, hidden, staging)
        if on_cuda:
            self._capture(bucket)
        else:
            for greedy in (True, False):
                bucket.replay[greedy] = partial(self._step, bucket, greedy)
        for one in staging:
            if one.done is not None:
                one.replay = StepReplay(
                    columns=bucket.columns,
                    host_columns=one.memory,
                    tables=self._tables,
                    host_tables=one.tables,
                    drawn=bucket.drawn,
                    tokens=one.tokens,
                    done=one.done,
                )
        return bucket

    def _capture(self, bucket: _Bucket) -> None:
        # Not `torch.cuda.graph`, which gives all unused memory back to the driver every time.
        # "thread_local": weights may be arriving through other threads meanwhile.
        side, current = self._side, torch.cuda.current_stream(self._device)
        assert side is not None
        side.wait_stream(current)
        with torch.cuda.device(self._device), torch.cuda.stream(side):
            logits = self._logits(bucket)  # libraries make their handles and workspaces now
            for greedy in (True, False):
                self._draw(bucket, logits, greedy)
            current.wait_stream(side)
            del logits
            for greedy in (True, False):
                bucket.graphs[greedy] = graph = torch.cuda.CUDAGraph()
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                try:
                    with _lib.programmatic_launch(PROGRAMMATIC_LAUNCH):
                        self._step(bucket, greedy)
                finally:
                    graph.capture_end()
                bucket.handles[greedy] = graph.raw_cuda_graph_exec()

    def _step(self, bucket: _Bucket, greedy: bool) -> None:
        self._draw(bucket, self._logits(bucket), greedy)

    @torch.inference_mode()
    def _draw(self, bucket: _Bucket, logits: Tensor | None, greedy: bool) -> None:
        if logits is None:
            return
        names = ("temperature",) if greedy else SAMPLING
        columns = {name: bucket.inputs[name] for name in names}
        draw = self._sample or ops.sample
        draw(logits, **columns, out=bucket.drawn)  # type: ignore[arg-type]

    @torch.inference_mode()
    def _logits(self, bucket: _Bucket) -> Tensor | None:
        inputs, stage = bucket.inputs, self._stage
        entering = bucket.hidden
        if stage is None or stage.is_first:
            entering = self._whole.view(torch.int64).index_select(0, inputs["source"])
        meta = AttentionMetadata(
            positions=inputs["positions"],
            slot_mapping=inputs["slots"],
            cu_seqlens_q=inputs["cu_seqlens"],
            seq_lens=inputs["seq_lens"],
            block_table=self._tables[: bucket.rows],
            max_seqlen_q=1,
            max_seqlen_k=self._max_len,  # a graph must hold for any length
            plans=self._plans(bucket),
            workspace=self._workspace,
        )
        hidden = self._model(entering, meta, self._layers)
        if stage is None or stage.is_last:
            return self._model.compute_logits(hidden)
        bucket.hidden.copy_(hidden)
        return None

    def _plans(self, bucket: _Bucket) -> dict[tuple[int, int], Tensor] | None:
        config = cache_config(self._model)
        if bucket.rows < PLANNED_ROWS:
            return None
        return {
            window: ops.plan_decode(
                bucket.inputs["seq_lens"],
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                window_size=window,
            )
            for window in {config.window_of(layer) for layer in range(config.num_layers)}
        }


def _length(name: str, rows: int) -> int:
    return rows + 1 if name == "cu_seqlens" else rows


def _column_bytes(name: str, rows: int) -> int:
    size = _length(name, rows) * _COLUMNS[name]().itemsize
    return -(-size // _ALIGN) * _ALIGN


def _wants_only_tokens_now(request: Request) -> bool:
    params = request.sampling
    return (
        params.logprobs is None
        and not params.has_penalties
        and request.sample_position >= params.min_tokens
    )
