"""Steps that check drafts over static buffers: captured per (rows, tokens per row), then replayed.

A step qualifies when every request in it runs its last token and its drafts and wants nothing but
tokens. All rows of a bucket have Q tokens; a request with fewer has padding in front:

    row i:   -  -  last  x_1  x_2        seq_lens[i] = its length with the drafts
             slot -1   |  written        masks align the last query with the last key

so one call of the decode kernel serves requests with different numbers of drafts. A token is drawn
in every place; `first_rows` says where those of a request begin. On the CPU, where there are no
graphs, the same function runs over the same buffers; that is how it is tested.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..models import AttentionMetadata, LayerCache
from .batch import RequestRows
from .graphs import PLANNED_ROWS, PROGRAMMATIC_LAUNCH, SAMPLING
from .kv_cache import cache_config
from .sampler import DrawnTokens
from .static_step import Capturer, StaticBuffer, make_workspace, query_lengths, row_buckets
from .step_plan import SchedulePlan
from .team import Stage

MAX_ROWS = 128  # with more requests nothing is drafted: decoding is far from memory bound then
_FEW = 4  # requests


@dataclass(slots=True)
class _Bucket:
    rows: int
    length: int  # Q
    buffer: StaticBuffer
    cu_seqlens: Tensor  # kept here: a graph does not keep what it reads
    hidden: Tensor  # of a pipeline's stage: what comes in, and then what goes out; else empty
    drawn: Tensor  # int64 [rows * Q]
    tokens: Tensor  # the same on the host
    done: torch.cuda.Event | None
    columns: dict[str, np.ndarray]  # the host's, by row
    filled: int  # rows that are not padding
    replay: dict[bool, Callable[[], object]]  # greedy -> run the step


class VerifyGraphs:
    """The steps of one model over one cache.

    Args:
        model: The target.
        layers: Its cache.
        held: Of the running requests.
        max_rows: Most requests in a step.
        max_drafts: Most drafts of a request.
        max_len: Most tokens of a sequence.
        block_size: P.
        device: Where everything is.
        sample: What stands in for the operator where the vocabulary is divided.
        stage: Of a pipeline, which the model is a part of; None: it is the whole.

    Attributes:
        workspace: Of the decode kernel, for all steps of this stream.
    """

    def __init__(
        self,
        model: Any,
        layers: list[LayerCache],
        held: RequestRows,
        *,
        max_rows: int,
        max_drafts: int,
        max_len: int,
        block_size: int,
        device: torch.device,
        sample: Callable[..., Any] | None = None,
        stage: Stage | None = None,
    ) -> None:
        self._sample, self._stage = sample, stage
        self._model, self._layers, self._held = model, layers, held
        self._max_len, self._block_size, self._device = max_len, block_size, device
        self._rows = row_buckets(min(max_rows, MAX_ROWS))
        self._lengths = query_lengths(max_drafts)
        self._capturer = Capturer(device)
        self.workspace = make_workspace(model.config, device, several=True)
        self._buckets: dict[tuple[int, int], _Bucket] = {}

    @property
    def max_rows(self) -> int:
        """Most requests in a step."""
        return self._rows[-1]

    def accepts(self, plan: SchedulePlan) -> bool:
        """Whether a step qualifies."""
        chunks = plan.chunks
        if not len(chunks) < plan.num_tokens or len(chunks) > self._rows[-1]:
            return False
        for chunk in chunks:
            request = chunk.request
            if not chunk.samples or chunk.count != 1 + chunk.num_drafts:
                return False
            if chunk.count > self._lengths[-1]:
                return False
            if not request.wants_only_tokens and (
                request.sampling.logprobs is not None
                or request.sampling.has_penalties
                or request.sample_position < request.sampling.min_tokens
            ):
                return False
        return True

    def prepare(self, rows: int) -> None:
        """Capture the steps of few requests now rather than when they are needed."""
        for length in self._lengths:
            for size in self._rows:
                if size <= rows:
                    self._bucket(size, length)

    def seconds(self) -> float:
        """Of the smallest step, on a GPU."""
        replay = self._bucket(1, self._lengths[0]).replay[True]
        start = 0.0
        for _ in range(2):  # the first one is a warm-up
            torch.cuda.synchronize(self._device)
            start = time.perf_counter()
            replay()
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - start

    def launch(self, plan: SchedulePlan) -> DrawnTokens:
        """Run a step that qualifies; its block copies must have been done."""
        counts = np.array([chunk.count for chunk in plan.chunks])
        bucket = self._bucket(
            self._rows[bisect_left(self._rows, len(counts))],
            self._lengths[bisect_left(self._lengths, int(counts.max()))],
        )
        greedy = self._fill(bucket, plan, counts)
        if self._stage is not None:
            self._stage.receive_into(bucket.hidden)
        bucket.replay[greedy]()
        if self._stage is not None:
            self._stage.send(bucket.hidden)
        bucket.tokens.copy_(bucket.drawn, non_blocking=True)
        if bucket.done is not None:
            bucket.done.record(torch.cuda.current_stream(self._device))
        drawn = DrawnTokens.in_buffer(bucket.tokens.numpy(), bucket.done)
        firsts = np.arange(1, len(counts) + 1) * bucket.length - counts
        drawn.first_rows = firsts.tolist()
        return drawn

    def _fill(self, bucket: _Bucket, plan: SchedulePlan, counts: np.ndarray) -> bool:
        """Write and send the inputs of a step: whether all requests are greedy."""
        held, length, count = self._held, bucket.length, len(counts)
        columns = bucket.columns
        if count < bucket.filled:
            for name, padding in (("slots", -1), ("seq_lens", 0), ("temperature", 0)):
                columns[name][count : bucket.filled] = padding
        bucket.filled = count
        rows, width = held.update(plan)
        columns["tables"][:count, :width] = held.tables[rows, :width]
        if count <= _FEW and not held.temperature[rows].any():
            self._fill_few(bucket, plan)
            bucket.buffer.send(4 * count * columns["tables"].shape[1])
            return True
        starts = np.array([chunk.start for chunk in plan.chunks])
        place = np.arange(length) - (length - counts[:, None])  # -1 and below: padding
        real = place >= 0
        positions = np.where(real, starts[:, None] + place, 0)
        blocks = held.tables[rows[:, None], positions // self._block_size].astype(np.int64)
        slots = blocks * self._block_size + positions % self._block_size
        columns["positions"][:count] = positions
        columns["slots"][:count] = np.where(real, slots, -1)
        columns["seq_lens"][:count, 0] = starts + counts
        temperature = held.temperature[rows]
        columns["temperature"][:count] = np.where(real, temperature[:, None], 0)
        for row, chunk in enumerate(plan.chunks):
            tokens = chunk.request.tokens[-1:] + chunk.request.draft_tokens[: chunk.num_drafts]
            columns["input_ids"][row, length - chunk.count :] = tokens
        greedy = not temperature.any()
        if not greedy:
            first = starts + 1 - held.num_prompt[rows]
            columns["steps"][:count] = first[:, None] + np.maximum(place, 0)
            for name in ("seeds", "top_p", "min_p", "top_k"):
                columns[name][:count] = getattr(held, name)[rows][:, None]
        bucket.buffer.send(4 * count * columns["tables"].shape[1])
        return greedy

    def _fill_few(self, bucket: _Bucket, plan: SchedulePlan) -> None:
        """The columns of greedy requests one after the other: faster than whole arrays for few."""
        size, columns = self._block_size, bucket.columns
        for row, chunk in enumerate(plan.chunks):
            request, first = chunk.request, bucket.length - chunk.count
            table, places = request.block_table, range(chunk.start, chunk.start + chunk.count)
            slots = columns["slots"][row]
            slots[:first] = -1
            slots[first:] = [table[at // size] * size + at % size for at in places]
            columns["positions"][row, first:] = places
            columns["input_ids"][row, first:] = [request.tokens[-1], *request.draft_tokens][
                : chunk.count
            ]
            columns["seq_lens"][row, 0] = places.stop
            columns["temperature"][row] = 0

    def _bucket(self, rows: int, length: int) -> _Bucket:
        if (rows, length) not in self._buckets:
            self._buckets[rows, length] = self._make(rows, length)
        return self._buckets[rows, length]

    def _make(self, rows: int, length: int) -> _Bucket:
        n = rows * length
        buffer = StaticBuffer(
            {
                "input_ids": (np.int64, n, 0),
                "positions": (np.int64, n, 0),
                "slots": (np.int64, n, -1),
                "seeds": (np.int64, n, 0),
                "steps": (np.int64, n, 0),
                "top_k": (np.int32, n, 0),
                "temperature": (np.float32, n, 0),
                "top_p": (np.float32, n, 1),
                "min_p": (np.float32, n, 0),
                "seq_lens": (np.int32, rows, 0),
                "tables": (np.int32, rows * self._held.tables.shape[1], 0),
            },
            self._device,
        )
        on_cuda = self._device.type == "cuda"
        bucket = _Bucket(
            rows,
            length,
            buffer,
            torch.arange(0, n + 1, length, dtype=torch.int32, device=self._device),
            torch.empty(0) if self._stage is None else self._stage.buffer(n),
            torch.zeros(n, dtype=torch.int64, device=self._device),
            torch.zeros(n, dtype=torch.int64, pin_memory=on_cuda),
            torch.cuda.Event() if on_cuda else None,
            {name: column.reshape(rows, -1) for name, column in buffer.host.items()},
            0,
            {},
        )
        for greedy in (True, False):

            def run(greedy: bool = greedy) -> None:
                self._step(bucket, greedy)

            bucket.replay[greedy] = self._capturer.capture(run, programmatic=PROGRAMMATIC_LAUNCH)
        return bucket

    @torch.inference_mode()
    def _step(self, bucket: _Bucket, greedy: bool) -> None:
        inputs = bucket.buffer.device
        meta = AttentionMetadata(
            positions=inputs["positions"],
            slot_mapping=inputs["slots"],
            cu_seqlens_q=bucket.cu_seqlens,
            seq_lens=inputs["seq_lens"],
            block_table=inputs["tables"].view(bucket.rows, -1),
            max_seqlen_q=bucket.length,
            max_seqlen_k=self._max_len,  # a graph must hold for any length
            num_decodes=bucket.rows,
            decode_len=bucket.length,
            plans=self._plans(bucket),
            workspace=self.workspace,
        )
        stage = self._stage
        first = stage is None or stage.is_first
        hidden = self._model(inputs["input_ids"] if first else bucket.hidden, meta, self._layers)
        if stage is not None and not stage.is_last:
            bucket.hidden.copy_(hidden)
            return
        logits = self._model.compute_logits(hidden)
        names = ("temperature",) if greedy else SAMPLING
        columns = {name: inputs[name] for name in names}
        draw = self._sample or ops.sample
        draw(logits, **columns, out=bucket.drawn)  # type: ignore[arg-type]

    def _plans(self, bucket: _Bucket) -> dict[tuple[int, int], Tensor] | None:
        config = cache_config(self._model)
        if bucket.rows < PLANNED_ROWS:
            return None
        return {
            window: ops.plan_decode(
                bucket.buffer.device["seq_lens"],
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                q_len=bucket.length,
                window_size=window,
            )
            for window in {config.window_of(layer) for layer in range(config.num_layers)}
        }
