"""Turns a `SchedulePlan` into the tensors of one model call.

T packed tokens of B sequences, prefill chunks and decodes mixed:

    input_ids, positions, slot_mapping [T]    slot = block * P + offset in the block
    cu_seqlens_q [B+1]; seq_lens [B]          keys visible after this step's write
    block_table [B, longest table]            short tables are padded with -1, never read
    logits_index [S]                          rows of the hidden states to sample from
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..models import AttentionMetadata
from .request import Request
from .scheduler import SchedulePlan


@dataclass(slots=True)
class StepBatch:
    """One step, on the model's device. `sampling` are the requests behind `logits_index`."""

    input_ids: Tensor  # int64 [T]
    meta: AttentionMetadata
    logits_index: Tensor  # int64 [S]
    sampling: list[Request]
    copies: list[tuple[int, int]]


def build_batch(plan: SchedulePlan, *, block_size: int, device: torch.device) -> StepBatch:
    """Lay out the chunks of a plan one after the other.

    Args:
        plan: At least one chunk, every block its tokens need already in the block tables.
        block_size: P, tokens per block.
        device: Where the model is.

    Returns:
        The batch; a chunk's tokens keep their order, chunks keep the plan's.
    """
    chunks = plan.chunks
    counts = np.array([chunk.count for chunk in chunks], dtype=np.int32)
    starts = np.array([chunk.start for chunk in chunks], dtype=np.int32)
    cu_seqlens = np.zeros(len(chunks) + 1, dtype=np.int32)
    np.cumsum(counts, out=cu_seqlens[1:])
    tables = np.full((len(chunks), max(len(c.request.block_table) for c in chunks)), -1, np.int32)
    ids: list[int] = []
    for row, chunk in enumerate(chunks):
        request = chunk.request
        tables[row, : len(request.block_table)] = request.block_table
        end = chunk.start + chunk.count - chunk.num_drafts
        ids += request.tokens[chunk.start : end]
        ids += request.draft_tokens[: chunk.num_drafts]
    rows = np.repeat(np.arange(len(chunks)), counts)
    positions = np.arange(plan.num_tokens) - np.repeat(cu_seqlens[:-1] - starts, counts)
    slots = tables[rows, positions // block_size].astype(np.int64) * block_size
    slots += positions % block_size
    sampled = [row for row, chunk in enumerate(chunks) if chunk.samples]

    def put(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(device, non_blocking=True)

    meta = AttentionMetadata(
        positions=put(positions.astype(np.int64)),
        slot_mapping=put(slots),
        cu_seqlens_q=put(cu_seqlens),
        seq_lens=put(starts + counts),
        block_table=put(tables),
        max_seqlen_q=int(counts.max()),
        max_seqlen_k=int((starts + counts).max()),
    )
    return StepBatch(
        input_ids=put(np.array(ids, dtype=np.int64)),
        meta=meta,
        logits_index=put(cu_seqlens[1:][sampled].astype(np.int64) - 1),
        sampling=[chunks[row].request for row in sampled],
        copies=plan.copies,
    )
