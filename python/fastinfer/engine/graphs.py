"""Decode steps over static buffers: captured once per bucket of rows, then replayed.

A step qualifies when every request in it runs exactly one token, is sampled from, and asks for
nothing but a token (no log-probabilities, penalties or minimum length). Embedding, layers, final
norm, LM head and sampling are one graph. Its inputs lie in one buffer, filled by one copy from the
host, at places that depend on the bucket only:

    input_ids, source, positions, slots, seeds, steps        int64 [rows]
    seq_lens, top_k; cu_seqlens                              int32 [rows]; [rows + 1]
    temperature, top_p, min_p                                fp32 [rows]
    tables                                                   int32 [rows, longest table]

Block tables follow; they are sent only when one of them has changed. Rows beyond the requests are
padding: sequence length 0, slot -1. In front of it all are the tokens that the latest step drew:
`source` is where a row's input token lies, counted in int64 from there: among those, if the host
does not know it yet, or among `input_ids`. On the CPU, where there are no graphs, the same function
over the same buffers is called instead; that is how it is tested.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _lib, ops
from ..models import AttentionMetadata, LayerCache
from .batch import RequestRows
from .request import Request
from .sampler import DrawnTokens
from .step_plan import SchedulePlan

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
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seeds", "steps")
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
        self, rows: int, begins: dict[str, int], size: int, own: np.ndarray, pinned: bool
    ) -> None:
        self.memory = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)
        self.tokens = torch.zeros(rows, dtype=torch.int64, pin_memory=pinned)
        self.done = torch.cuda.Event() if pinned else None
        self.bytes = self.memory.numpy()
        self.columns: dict[str, np.ndarray] = {}
        for name, kind in _COLUMNS.items():
            end = begins[name] + _length(name, rows) * kind().itemsize
            self.columns[name] = self.bytes[begins[name] : end].view(kind)
            self.columns[name][:] = _PADDING.get(name, 0)
        self.columns["cu_seqlens"][:] = np.arange(rows + 1)
        self.columns["source"][:] = self.own = own  # `source` of tokens that the host knows
        self.filled = 0  # rows that are not padding
        self.moves: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def pad(self, count: int) -> None:
        """Make padding of the rows from `count` on."""
        for name in _COLUMNS if count < self.filled else ():
            if name != "cu_seqlens":
                self.columns[name][count : self.filled] = _PADDING.get(name, 0)
        self.columns["source"][count : self.filled] = self.own[count : self.filled]
        self.filled = count


@dataclass(slots=True)
class _Bucket:
    """Where the columns of a bucket begin, its views of the device's buffer, and what runs it."""

    rows: int
    begins: dict[str, int]  # bytes
    size: int  # bytes of the columns; the tables follow
    inputs: dict[str, Tensor]
    drawn: Tensor  # the tokens of its rows
    staging: list[_Staging]
    replay: dict[bool, Callable[[], object]]  # greedy -> run the step


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
    ) -> None:
        self._model, self._layers = model, layers
        self._held, self._workspace = held, workspace
        self._max_len, self._block_size, self._device = max_len, block_size, device
        self._sizes = bucket_sizes(max_rows)
        max_blocks = -(-max_len // block_size)
        columns = sum(_column_bytes(name, max_rows) for name in _COLUMNS)
        size = -(-(columns + 4 * max_rows * max_blocks) // _ALIGN) * _ALIGN
        first = -(-8 * max_rows // _ALIGN) * _ALIGN
        self._whole = torch.zeros(first + size, dtype=torch.uint8, device=device)
        self.drawn = self._whole[: 8 * max_rows].view(torch.int64)
        self._buffer = self._whole[first:]
        self._tables = torch.zeros((max_rows, max_blocks), dtype=torch.int32, device=device)
        # what `_tables` holds: the requests' rows, and the version of their tables
        self._sent, self._sent_rows = -1, np.empty(0, dtype=np.int64)
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        # the largest first: smaller ones then find their memory in the pool
        self._buckets = {rows: self._make(rows) for rows in reversed(self._sizes)}

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
        for target, source in staging.moves.get(width) or self._moves(bucket, staging, width):
            target.copy_(source, non_blocking=True)
        bucket.replay[greedy]()
        staging.tokens.copy_(bucket.drawn, non_blocking=True)
        if staging.done is not None:
            staging.done.record(torch.cuda.current_stream(self._device))
        return DrawnTokens.in_buffer(staging.tokens[:count], staging.done)

    def _moves(self, bucket: _Bucket, staging: _Staging, width: int) -> list[tuple[Tensor, Tensor]]:
        """What to copy where for a step that sends the block tables up to this width."""
        size = bucket.size + 4 * bucket.rows * width
        moves = [(self._buffer[:size], staging.memory[:size])]
        if width:
            sent = self._buffer[bucket.size : size].view(torch.int32).view(bucket.rows, width)
            moves.append((self._tables[: bucket.rows, :width], sent))
        staging.moves[width] = moves
        return moves

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
        if self._sent == held.version and np.array_equal(rows, self._sent_rows):
            return greedy, 0
        self._sent, self._sent_rows = held.version, rows
        bucket_rows = len(columns["slots"])
        begin = len(staging.bytes) - 4 * bucket_rows * held.tables.shape[1]
        tables = staging.bytes[begin : begin + 4 * bucket_rows * width].view(np.int32)
        tables.reshape(-1, width)[:count] = held.tables[rows, :width]
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
        on_cuda = self._device.type == "cuda"
        whole = size + 4 * rows * self._tables.shape[1]
        staging = [_Staging(rows, begins, whole, own, on_cuda) for _ in range(2)]
        bucket = _Bucket(rows, begins, size, inputs, self.drawn[:rows], staging, {})
        for greedy in (True, False):
            bucket.replay[greedy] = self._capture(bucket, greedy)
        return bucket

    def _capture(self, bucket: _Bucket, greedy: bool) -> Callable[[], object]:
        def run() -> None:
            self._step(bucket, greedy)

        if self._device.type != "cuda":
            return run
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run()  # libraries make their handles and workspaces now
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            capture = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
            with capture, _lib.programmatic_launch(PROGRAMMATIC_LAUNCH):
                run()
        return graph.replay

    @torch.inference_mode()
    def _step(self, bucket: _Bucket, greedy: bool) -> None:
        inputs = bucket.inputs
        input_ids = self._whole.view(torch.int64).index_select(0, inputs["source"])
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
        hidden = self._model(input_ids, meta, self._layers)
        logits = self._model.compute_logits(hidden)
        names = ("temperature",) if greedy else _SAMPLING
        columns = {name: inputs[name] for name in names}
        ops.sample(logits, **columns, out=bucket.drawn)  # type: ignore[arg-type]

    def _plans(self, bucket: _Bucket) -> dict[tuple[int, int], Tensor] | None:
        config = self._model.config
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
