"""Turns a `SchedulePlan` into the tensors of one model call.

T packed tokens of B sequences, prefill chunks and decodes mixed:

    input_ids, positions, slot_mapping [T]    slot = block * P + offset in the block
    cu_seqlens_q [B+1]; seq_lens [B]          keys visible after this step's write
    block_table [B, longest table]            short tables end in anything, never read
    logits_index [S]                          rows of the hidden states to sample from: one per
                                              request, and one more for each of its drafts

Everything travels to the device in one copy, out of one pinned buffer. A token that the step
before has drawn but that is not on the host yet has id 0 in `input_ids`; `carry_to` says where,
`carry_from` which of that step's tokens belongs there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .._host_loader import load_host
from ..models import AttentionMetadata
from .request import Request
from .sampler import SampleOptions, early_stops, sampling_columns
from .step_plan import ScheduledChunk, SchedulePlan

_ALIGN = 16  # bytes; every array of the buffer starts at a multiple


@dataclass(slots=True)
class StepBatch:
    """One step, on the model's device. `sampling` are the requests behind `logits_index`."""

    input_ids: Tensor  # int64 [T]
    meta: AttentionMetadata
    logits_index: Tensor  # int64 [S]
    sampling: list[Request]
    first_rows: list[int] | None  # where each request's rows begin, if some have drafts
    options: SampleOptions
    copies: Tensor | None  # int64 [n, 2], (source, destination) blocks
    carry_to: Tensor | None  # int64 [n], positions in input_ids
    carry_from: Tensor | None  # int64 [n], rows of the tokens drawn last


class RequestRows:
    """Arrays over the running requests, by `Request.row`: a step reads them and writes only news.

    Args:
        max_rows: Most running requests.
        max_blocks: Longest block table.

    Attributes:
        version: Grows whenever a block table changes.
        decodes: Of the host module: walks over the requests of a decode step.
    """

    def __init__(self, max_rows: int, max_blocks: int) -> None:
        self.version = 0
        self.decodes = load_host().DecodePacker(Request, ScheduledChunk)
        self.tables = np.zeros((max_rows, max_blocks), dtype=np.int32)
        self.drawn_at = np.zeros(max_rows, dtype=np.int64)  # row among the tokens drawn last
        self.num_prompt = np.zeros(max_rows, dtype=np.int64)
        self.seeds = np.zeros(max_rows, dtype=np.int64)
        self.temperature = np.zeros(max_rows, dtype=np.float32)
        self.top_p = np.ones(max_rows, dtype=np.float32)
        self.min_p = np.zeros(max_rows, dtype=np.float32)
        self.top_k = np.zeros(max_rows, dtype=np.int32)

    def update(self, plan: SchedulePlan) -> tuple[np.ndarray, int]:
        """Bring the rows of a plan's requests up to date.

        Returns:
            The row of each chunk's request, and the length of the longest block table.
        """
        rows, width = [], 0
        for chunk in plan.chunks:
            request = chunk.request
            rows.append(request.row)
            have = len(request.block_table)
            if have > width:
                width = have
            if have != request.blocks_sent:
                self._write(request, have)
        return np.array(rows), width

    def pack(
        self, plan: SchedulePlan, rows: np.ndarray, starts: np.ndarray, ids: np.ndarray
    ) -> int:
        """The same for a plan of one token each, which also says where and what that token is.

        Args:
            plan: Every chunk has one token.
            rows, starts, ids: int64, one number per chunk, written: the request's row, the position
                of the token, and the token, or -1 when it is still on the device only.

        Returns:
            The length of the longest block table.
        """
        news: list[Request] = []
        width, written = self.decodes.pack(plan.chunks, rows, starts, ids, self.tables, news)
        self.version += written
        for request in news:
            self._write(request, len(request.block_table))
        return width

    def _write(self, request: Request, have: int) -> None:
        self.version += 1
        row, sent = request.row, request.blocks_sent
        self.tables[row, sent:have] = request.block_table[sent:]
        request.blocks_sent = have
        if sent:
            return
        params = request.sampling
        self.num_prompt[row] = request.num_prompt
        self.seeds[row] = request.seed
        self.temperature[row] = 0.0 if params.greedy else params.temperature
        self.top_p[row], self.min_p[row] = params.top_p, params.min_p
        self.top_k[row] = min(max(params.top_k, 0), 2**31 - 1)


def build_batch(
    plan: SchedulePlan,
    held: RequestRows,
    *,
    block_size: int,
    device: torch.device,
    vocabulary: range,
) -> StepBatch:
    """Lay out the chunks of a plan one after the other.

    Args:
        plan: At least one chunk, every block its tokens need already in the block tables. Chunks of
            one token go through the decode kernel if they come first.
        held: Of the running requests; brought up to date.
        block_size: P, tokens per block.
        device: Where the model is.
        vocabulary: Tokens that this process has logits of.

    Returns:
        The batch; a chunk's tokens keep their order, chunks keep the plan's.
    """
    chunks = plan.chunks
    counts = np.array([chunk.count for chunk in chunks], dtype=np.int32)
    starts = np.array([chunk.start for chunk in chunks], dtype=np.int32)
    cu_seqlens = np.zeros(len(chunks) + 1, dtype=np.int32)
    np.cumsum(counts, out=cu_seqlens[1:])
    held_rows, width = held.update(plan)
    tables = held.tables[held_rows, :width]
    ids: list[int] = []
    carried: list[tuple[int, int]] = []
    for row, chunk in enumerate(chunks):
        request = chunk.request
        tables[row, : len(request.block_table)] = request.block_table
        end = chunk.start + chunk.count - chunk.num_drafts
        ids += request.tokens[chunk.start : end]
        if end > len(request.tokens):  # its last token is still on the device only
            carried.append((len(ids), int(held.drawn_at[request.row])))
            ids.append(0)
        ids += request.draft_tokens[: chunk.num_drafts]
    rows = np.repeat(np.arange(len(chunks)), counts)
    positions = np.arange(plan.num_tokens) - np.repeat(cu_seqlens[:-1] - starts, counts)
    slots = tables[rows, positions // block_size].astype(np.int64) * block_size
    slots += positions % block_size
    sampled = [row for row, chunk in enumerate(chunks) if chunk.samples]
    sampling = [chunks[row].request for row in sampled]
    logits_index = cu_seqlens[1:][sampled].astype(np.int64) - 1
    first_rows = ahead = None
    if any(chunk.num_drafts for chunk in chunks):
        each = [1 + chunks[row].num_drafts for row in sampled]
        first_rows = [0, *np.cumsum(each)[:-1].tolist()]
        ahead = [i for count in each for i in range(count)]
        pairs = zip(sampling, each, strict=True)
        sampling = [request for request, count in pairs for _ in range(count)]
        logits_index = np.repeat(logits_index + 1 - np.array(each), each) + np.array(ahead)
    held.drawn_at[held_rows[sampled]] = np.arange(len(sampled))
    arrays: dict[str, np.ndarray] = {
        "input_ids": np.array(ids, dtype=np.int64),
        "positions": positions.astype(np.int64),
        "slots": slots,
        "cu_seqlens": cu_seqlens,
        "seq_lens": starts + counts,
        "tables": tables,
        "logits_index": logits_index,
    }
    decodes = int(np.argmax(counts > 1)) if counts.max() > 1 else len(chunks)
    if 0 < decodes < len(chunks):
        arrays["cu_rest"] = cu_seqlens[decodes:] - np.int32(decodes)
    columns = sampling_columns(sampling, ahead)
    first_id = vocabulary.start
    stops = [(r, t - first_id) for r, t in early_stops(sampling, ahead) if t in vocabulary]
    for name, numbers in (("copies", plan.copies), ("carried", carried), ("stops", stops)):
        if numbers:
            arrays[name] = np.array(numbers, dtype=np.int64)
    put = upload({**arrays, **columns}, device)
    meta = AttentionMetadata(
        positions=put["positions"],
        slot_mapping=put["slots"],
        cu_seqlens_q=put["cu_seqlens"],
        seq_lens=put["seq_lens"],
        block_table=put["tables"],
        max_seqlen_q=int(counts.max()),
        max_seqlen_k=int((starts + counts).max()),
        num_decodes=decodes,
        cu_seqlens_rest=put.get("cu_rest"),
    )
    return StepBatch(
        input_ids=put["input_ids"],
        meta=meta,
        logits_index=put["logits_index"],
        sampling=sampling,
        first_rows=first_rows,
        options=SampleOptions({name: put[name] for name in columns}, put.get("stops"), ahead),
        copies=put.get("copies"),
        carry_to=put["carried"][:, 0] if carried else None,
        carry_from=put["carried"][:, 1] if carried else None,
    )


def upload(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """The arrays as tensors on the device, sent in one copy from one pinned buffer."""
    begins, size = {}, 0
    for name, array in arrays.items():
        begins[name] = size
        size += -(-array.nbytes // _ALIGN) * _ALIGN
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = buffer.numpy()
    for name, array in arrays.items():
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        host[begins[name] : begins[name] + array.nbytes] = flat
    moved = buffer.to(device, non_blocking=True)
    tensors = {}
    for name, array in arrays.items():
        piece = moved[begins[name] : begins[name] + array.nbytes]
        dtype = getattr(torch, array.dtype.name)
        tensors[name] = piece.view(dtype).view(array.shape)
    return tensors
