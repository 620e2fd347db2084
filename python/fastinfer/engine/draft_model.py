"""Drafts from a small model with the same vocabulary.

Its keys and values lie in a cache of its own under the target's block tables: token t of a request
is in the same block and slot of both. Per round and request

    computed    tokens whose K/V the draft model has; what was drafted last time counts as far as
                it is what the request now says
    catch up    tokens[computed : len - 1], in one call for all, only where more than one is missing
                (the prompt; steps without drafts). One missing token rides along below.
    draft       [tokens[-2], tokens[-1]] -> x_1,  x_1 -> x_2, ... k steps, one graph on CUDA

What the draft model knows of a block is remembered by the block's content hash, so a prefix that is
found in the cache is not run again. A mistake in any of this costs acceptance, never correctness.
The drafts are drawn with the request's parameters and random numbers: see drafting.py.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .._host_loader import load_host
from ..models import AttentionMetadata, load_model
from .batch import upload
from .config import EngineConfig
from .graphs import OF_REQUEST, PROGRAMMATIC_LAUNCH
from .kv_cache import allocate_cache, must_fit
from .request import Request
from .static_step import Capturer, StaticBuffer, make_workspace, row_buckets
from .verify_graphs import MAX_ROWS

PADDED_VOCABULARY = 1024  # vocabularies may differ by so much padding


def load_draft(config: EngineConfig, target: Any, device: torch.device) -> Any | None:
    """The draft model of a configuration; None where there is none to load.

    Raises:
        ValueError: Its vocabulary is not the target's.
    """
    folder = config.speculative
    if folder is None or folder == "ngram" or not config.num_speculative_tokens:
        return None
    with must_fit(f"the weights of {folder}", device, "use a smaller draft model"):
        model = load_model(
            folder,
            dtype=config.dtype if config.dtype != "auto" else target.dtype,
            device=device,
            load_format=config.load_format,
            progress=config.progress,
            max_model_len=None,
        )
    own, wanted = model.config.vocab_size, target.config.vocab_size
    if abs(own - wanted) > PADDED_VOCABULARY or _vocabulary(folder) != _vocabulary(config.model):
        raise ValueError(
            f"LLM: speculative must have the vocabulary of the model ({wanted} tokens), got "
            f"{folder} with {own}; choose a draft model of the same family"
        )
    if config.batch_invariant:
        model.set_batch_invariant(True)
    return model


def _vocabulary(folder: str) -> object:
    """The text of some tokens, as far as the folder says."""
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return [tokenizer.id_to_token(i) for i in range(0, tokenizer.get_vocab_size(), 7)]


@dataclass(slots=True)
class _State:
    """What the draft model has of a request."""

    computed: int  # tokens that are certain
    tail: list[int] = field(default_factory=list)  # drafts that were run after them
    marked: int = 0  # blocks whose content has been noted


@dataclass(slots=True)
class _Bucket:
    rows: int
    steps: int
    buffer: StaticBuffer
    drawn: Tensor  # int64 [steps, rows]
    tokens: Tensor  # the same on the host
    cu_seqlens: tuple[Tensor, Tensor]  # of the first step, and of the others
    replay: dict[bool, Callable[[], object]]


class ModelDrafter:
    """Runs a draft model.

    Args:
        model: The draft model.
        config: block_size, max_num_seqs, num_speculative_tokens, max_num_batched_tokens.
        num_blocks: Of the target's cache.
        max_len: Most tokens of a sequence.
        dtype: Of its cache.
        device: Where it runs.
        vocab_size: Of the target.
    """

    uses_blocks = True

    def __init__(
        self,
        model: Any,
        config: EngineConfig,
        *,
        num_blocks: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
        vocab_size: int,
    ) -> None:
        self._model, self._device = model, device
        # Padding of the other model's vocabulary may be asked about: any token will do.
        last = model.config.vocab_size - 1
        self._last_id = last if last < vocab_size - 1 else None
        self._block_size = config.block_size
        self._budget = config.max_num_batched_tokens
        self._max_len = min(max_len, model.max_model_len)
        self._width = -(-max_len // config.block_size)
        cache, self._layers = allocate_cache(
            model.config,
            num_blocks=num_blocks,
            block_size=config.block_size,
            dtype=dtype,
            device=device,
        )
        # A slot may be read that was never written: it must not be NaN.
        cache.view(torch.uint8).zero_()
        for layer in self._layers:
            for scale in (layer.k_scale, layer.v_scale):
                if scale is not None:
                    scale.zero_()
        self._workspace = make_workspace(model.config, device, several=True)
        self._caching = config.enable_prefix_caching
        self._extend_hashes = load_host().extend_block_hashes
        self._content: dict[int, bytes] = {}  # block -> hash of what the draft model has in it
        self._rows = row_buckets(min(config.max_num_seqs, MAX_ROWS))
        most = config.num_speculative_tokens
        self._steps = sorted({*(2**i for i in range(5) if 2**i < most), most})
        captured = config.cuda_graphs is not False and device.type == "cuda"
        self._capturer = Capturer(device) if captured else None
        self._buckets: dict[tuple[int, int], _Bucket] = {}

    @torch.inference_mode()
    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        """Draft for as many requests as the buffers hold and the budget for catching up allows."""
        drafts: list[list[int]] = [[] for _ in wanted]
        chosen: list[int] = []
        behind: list[tuple[Request, int, int]] = []
        budget = self._budget
        for i, (request, count) in enumerate(wanted):
            if len(chosen) == self._rows[-1]:
                break
            length = len(request.tokens)
            if length + count > self._max_len:
                continue
            state = self._sync(request)
            missing = length - 1 - state.computed
            if missing > 1:
                if missing > budget:
                    missing = budget
                    if not missing:
                        continue
                else:
                    chosen.append(i)
                behind.append((request, state.computed, missing))
                budget -= missing
            else:
                chosen.append(i)
        if behind:
            self._run_behind(behind)
        if chosen:
            rows = [wanted[i] for i in chosen]
            for i, tokens in zip(chosen, self._draft(rows), strict=True):
                drafts[i] = tokens
        return drafts

    def _sync(self, request: Request) -> _State:
        state = request.draft_state
        tokens = request.tokens
        if state is None:
            state = request.draft_state = _State(0)
            if self._caching:
                self._extend_hashes(tokens, self._block_size, request.block_hashes)
            for block, name in zip(request.block_table, request.block_hashes, strict=False):
                if self._content.get(block) != name:
                    break
                state.computed += self._block_size
            state.marked = state.computed // self._block_size
            state.computed = min(state.computed, len(tokens) - 1)
        for token in state.tail:
            if state.computed < len(tokens) - 1 and tokens[state.computed] == token:
                state.computed += 1
            else:
                break
        state.tail = []
        self._note_content(request)
        self.will_write([request])
        return state

    def will_write(self, requests: Sequence[Request]) -> None:
        """What is not certain of their blocks is about to be written: what those held for others is
        gone, even if the same content should come back into the same block."""
        for request in requests:
            state = request.draft_state
            for block in request.block_table[0 if state is None else state.marked :]:
                self._content.pop(block, None)

    def _note_content(self, request: Request) -> None:
        """Remember the full blocks that are certain."""
        state = request.draft_state
        full = min(state.computed // self._block_size, len(request.block_hashes))
        for i in range(state.marked, full):
            self._content[request.block_table[i]] = request.block_hashes[i]
        state.marked = max(state.marked, full)

    @torch.inference_mode()
    def catch_up(self, requests: Sequence[Request], most: int) -> bool:
        """Bring these up to the token before the last one, if a step's budget allows it for all.

        Args:
            requests: That run.
            most: Tokens each of them may get next.

        Returns:
            Whether they are there; if not, nothing was run, and the budget is left to `propose`.
        """
        behind: list[tuple[Request, int, int]] = []
        if not self.reaches(requests, most):
            return False
        for request in requests:
            state = self._sync(request)
            missing = len(request.tokens) - 1 - state.computed
            if missing > 1:
                behind.append((request, state.computed, missing))
        if sum(missing for _, _, missing in behind) > self._budget:
            return False
        if behind:
            self._run_behind(behind)
        return True

    def reaches(self, requests: Sequence[Request], most: int) -> bool:
        """Whether they may all get so many tokens more."""
        return all(len(request.tokens) + most <= self._max_len for request in requests)

    def took(self, request: Request) -> None:
        """A burst has added to a request's tokens; the last two will be run again."""
        if request.draft_state is not None:
            request.draft_state.computed = len(request.tokens) - 2

    def _run_behind(self, behind: Sequence[tuple[Request, int, int]]) -> None:
        """Run (request, from, how many) tokens that the target has run already."""
        starts = np.array([start for _, start, _ in behind], dtype=np.int32)
        counts = np.array([count for _, _, count in behind], dtype=np.int32)
        bounds = np.zeros(len(behind) + 1, dtype=np.int32)
        np.cumsum(counts, out=bounds[1:])
        tables = self._tables([request for request, _, _ in behind])
        rows = np.repeat(np.arange(len(behind)), counts)
        positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1] - starts, counts)
        ids = [t for request, at, count in behind for t in request.tokens[at : at + count]]
        put = upload(
            {
                "ids": np.array(ids, dtype=np.int64),
                "positions": positions.astype(np.int64),
                "slots": self._slots(tables, rows, positions),
                "bounds": bounds,
                "lens": starts + counts,
                "tables": tables,
            },
            self._device,
        )
        meta = AttentionMetadata(
            positions=put["positions"],
            slot_mapping=put["slots"],
            cu_seqlens_q=put["bounds"],
            seq_lens=put["lens"],
            block_table=put["tables"],
            max_seqlen_q=int(counts.max()),
            max_seqlen_k=int((starts + counts).max()),
            num_decodes=0,
        )
        self._model(self._known(put["ids"]), meta, self._layers)
        for request, _, count in behind:
            request.draft_state.computed += count
            self._note_content(request)

    def _tables(self, requests: Sequence[Request]) -> np.ndarray:
        tables = np.zeros((len(requests), self._width), dtype=np.int32)
        for row, request in enumerate(requests):
            tables[row, : len(request.block_table)] = request.block_table
        return tables

    def _slots(self, tables: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        size = self._block_size
        return tables[rows, positions // size].astype(np.int64) * size + positions % size

    def _draft(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        bucket = self._bucket(
            self._rows[bisect_left(self._rows, len(wanted))],
            self._steps[bisect_left(self._steps, max(count for _, count in wanted))],
        )
        greedy = self._fill(bucket, wanted)
        bucket.replay[greedy]()
        bucket.tokens.copy_(bucket.drawn)  # waits
        drawn = bucket.tokens.numpy()
        drafts = []
        for row, (request, count) in enumerate(wanted):
            tokens = drawn[:count, row].tolist()
            state = request.draft_state
            state.computed = len(request.tokens)
            state.tail = tokens[:-1]  # the last one was drawn, not run
            drafts.append(tokens)
        return drafts

    def _fill(self, bucket: _Bucket, wanted: Sequence[tuple[Request, int]]) -> bool:
        n, steps, host = len(wanted), bucket.steps, bucket.buffer.host
        requests = [request for request, _ in wanted]
        params = [request.sampling for request in requests]
        lengths = np.array([len(request.tokens) for request in requests])
        counts = np.array([count for _, count in wanted])
        late = lengths - 1 - np.array([r.draft_state.computed for r in requests])  # 0 or 1
        tables = self._tables(requests)
        # of each row: the token before the last one, the last one, and the drafts that are run
        places = lengths[:, None] - 2 + np.arange(steps + 1)
        live = places < (lengths + counts - 1)[:, None]
        live[:, 0] = late == 1
        positions = np.where(live, places, 0)
        slots = self._slots(tables, np.arange(n)[:, None], positions)
        host["positions"].reshape(bucket.rows, -1)[:n] = positions
        host["slots"].reshape(bucket.rows, -1)[:] = -1
        host["slots"].reshape(bucket.rows, -1)[:n] = np.where(live, slots, -1)
        ids = host["ids"].reshape(bucket.rows, 2)
        ids[:n] = [
            [r.tokens[-2] if k else 0, r.tokens[-1]] for r, k in zip(requests, late, strict=True)
        ]
        seen = host["seq_lens"].reshape(steps, bucket.rows)
        seen[:] = 0
        seen[:, :n] = lengths + np.minimum(np.arange(steps)[:, None], counts - 1)
        host["temperature"][:] = 0
        host["temperature"][:n] = [0.0 if p.greedy else p.temperature for p in params]
        greedy = not host["temperature"].any()
        if not greedy:
            host["steps"].reshape(steps, -1)[:, :n] = (
                np.array([r.num_output for r in requests]) + np.arange(steps)[:, None]
            )
            host["seeds"][:n] = [r.seed for r in requests]
            host["top_p"][:n] = [p.top_p for p in params]
            host["min_p"][:n] = [p.min_p for p in params]
            host["top_k"][:n] = [min(max(p.top_k, 0), 2**31 - 1) for p in params]
        host["tables"].reshape(bucket.rows, -1)[:n] = tables
        bucket.buffer.send(4 * n * self._width)
        return greedy

    def _bucket(self, rows: int, steps: int) -> _Bucket:
        if (rows, steps) in self._buckets:
            return self._buckets[rows, steps]
        buffer = StaticBuffer(
            {
                "ids": (np.int64, 2 * rows, 0),
                "positions": (np.int64, (steps + 1) * rows, 0),  # by row
                "slots": (np.int64, (steps + 1) * rows, -1),  # by row
                "steps": (np.int64, steps * rows, 0),  # by step
                "seq_lens": (np.int32, steps * rows, 0),  # by step
                "seeds": (np.int64, rows, 0),
                "top_k": (np.int32, rows, 0),
                "temperature": (np.float32, rows, 0),
                "top_p": (np.float32, rows, 1),
                "min_p": (np.float32, rows, 0),
                "tables": (np.int32, rows * self._width, 0),
            },
            self._device,
        )
        shape = (steps, rows)
        drawn = torch.zeros(shape, dtype=torch.int64, device=self._device)
        host = torch.zeros(shape, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        first, other = (
            torch.arange(0, each * rows + 1, each, dtype=torch.int32, device=self._device)
            for each in (2, 1)
        )
        bucket = _Bucket(rows, steps, buffer, drawn, host, (first, other), {})
        for greedy in (True, False):

            def run(greedy: bool = greedy) -> None:
                self._run(bucket, greedy)

            if self._capturer is None:
                bucket.replay[greedy] = run
            else:
                replay = self._capturer.capture(run, programmatic=PROGRAMMATIC_LAUNCH)
                bucket.replay[greedy] = replay
        self._buckets[rows, steps] = bucket
        return bucket

    @torch.inference_mode()
    def _run(self, bucket: _Bucket, greedy: bool) -> None:
        rows, inputs = bucket.rows, bucket.buffer.device
        positions = inputs["positions"].view(rows, -1)
        slots = inputs["slots"].view(rows, -1)
        steps = inputs["steps"].view(-1, rows)
        seen = inputs["seq_lens"].view(-1, rows)
        columns = {name: inputs[name] for name in (("temperature",) if greedy else OF_REQUEST)}
        ids = inputs["ids"]
        for i in range(bucket.steps):
            count = 1 if i else 2
            first = i + 1 if i else 0
            if not greedy:
                columns["steps"] = steps[i]
            logits = self.logits(
                ids,
                positions=positions[:, first : first + count].flatten(),
                slots=slots[:, first : first + count].flatten(),
                cu_seqlens=bucket.cu_seqlens[i > 0],
                seq_lens=seen[i],
                tables=inputs["tables"].view(rows, -1),
                each=count,
            )
            ops.sample(logits, **columns, out=bucket.drawn[i])  # type: ignore[arg-type]
            ids = bucket.drawn[i]

    def _known(self, ids: Tensor) -> Tensor:
        return ids if self._last_id is None else ids.clamp(max=self._last_id)

    def logits(
        self,
        ids: Tensor,
        *,
        positions: Tensor,
        slots: Tensor,
        cu_seqlens: Tensor,
        seq_lens: Tensor,
        tables: Tensor,
        each: int,
    ) -> Tensor:
        """Run `each` tokens of every row; [rows, V] after the last one."""
        meta = AttentionMetadata(
            positions=positions,
            slot_mapping=slots,
            cu_seqlens_q=cu_seqlens,
            seq_lens=seq_lens,
            block_table=tables,
            max_seqlen_q=each,
            max_seqlen_k=self._max_len,
            num_decodes=len(tables),
            decode_len=each,
            workspace=self._workspace,
        )
        hidden = self._model(self._known(ids), meta, self._layers)
        return self._model.compute_logits(hidden[each - 1 :: each])
