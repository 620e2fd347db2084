"""Bursts: several steps of speculation in a row that wait for nobody.

For a small model waiting for tokens, looking at them and preparing the next step take longer than
the step. In a burst all that happens on the device (rounds.py): a captured step drafts, checks,
notes which tokens stand and leaves behind what the next one starts from, so that the same graph is
replayed a few times and the host reads the tokens of all of them at once.

    n-gram:       check -> advance (accept, search, next rows)
    draft model:  k calls of it -> rows -> check -> advance (accept, its next inputs)

To the scheduler a burst of n steps is one step with up to n (k + 1) - 1 drafts per request; how
many tokens it yields is known afterwards, as ever. A request that ends within is noticed at the end
of it. The tokens are those of steps one at a time: drafting.py says why.

Where nothing else has come up, the next burst is launched behind one that still runs (`go_on`), and
the host looks at the tokens of the first meanwhile; it only says how far the requests may write.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..models import AttentionMetadata, LayerCache
from .batch import RequestRows
from .draft_model import ModelDrafter
from .graphs import OF_REQUEST, PROGRAMMATIC_LAUNCH
from .request import Request
from .rounds import ADVANCE, PREPARE, ROWS, Rounds
from .sampler import DrawnTokens, SampleResult
from .static_step import Capturer, StaticBuffer, query_lengths, row_buckets
from .step_plan import SchedulePlan

MAX_ROWS = 8  # requests; with more a step takes long enough to hide the host's work
MAX_STEPS = 8
_ALIGN = 4  # entries: the decode kernel copies block tables 16 bytes at a time
_ROUNDS = 2 * MAX_STEPS  # that the device keeps: those of a burst and of the one behind it
SECONDS = 2e-3  # a burst is about as long as that: nobody who arrives waits longer for his step


@dataclass(slots=True)
class _Bucket:
    rows: int
    drafts: int  # k
    buffer: StaticBuffer
    room: Tensor  # int32: capacity of the rows, then from `lead` on their block tables
    lead: int
    host_room: list[Tensor]  # in turn: one may still be on its way
    tensors: dict[str, Tensor]  # what stays on the device
    rounds: Rounds
    cu_seqlens: Tensor  # of the check
    draft_cu_seqlens: tuple[Tensor, Tensor]  # of the draft model's first call, and of the others
    tokens: list[Tensor]  # `out` on the host, in turn
    done: list[torch.cuda.Event | None]
    replay: dict[bool, Callable[[], object]]  # greedy -> run a step
    greedy: bool = True
    at: int = 0  # the round that comes next
    turn: int = 0


class Bursts:
    """The steps of one model over one cache.

    Args:
        model: The target.
        layers: Its cache.
        held: Of the running requests.
        drafter: A draft model; None looks for n-grams.
        ngram: Shortest and longest ending to look for.
        workspace: Of the decode kernel.
        max_rows: Most requests in a step.
        max_drafts: Most drafts of a request.
        max_len: Most tokens of a sequence.
        block_size: P.
        device: Where everything is.
    """

    def __init__(
        self,
        model: Any,
        layers: list[LayerCache],
        held: RequestRows,
        *,
        drafter: ModelDrafter | None,
        ngram: tuple[int, int],
        workspace: Tensor | None,
        max_rows: int,
        max_drafts: int,
        max_len: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self._model, self._layers, self._held = model, layers, held
        self._drafter, self._ngram, self._vocab_size = drafter, ngram, model.config.vocab_size
        self._max_len, self._block_size, self._device = max_len, block_size, device
        self._rows = row_buckets(min(max_rows, MAX_ROWS))
        self._drafts = [length - 1 for length in query_lengths(max_drafts)]
        self._capturer = Capturer(device)
        self._workspace = workspace
        self._buckets: dict[tuple[int, int], _Bucket] = {}
        # request -> [row of the history, how many of its tokens are there]
        self._known: dict[str, list[int]] = {}
        self._history: Tensor | None = None
        if drafter is None:
            shape = (self._rows[-1], max_len + 2)
            self._history = torch.zeros(shape, dtype=torch.int32, device=device)

    @property
    def max_rows(self) -> int:
        """Most requests in a burst."""
        return self._rows[-1]

    def prepare(self, rows: int) -> None:
        """Capture the bursts of few requests now rather than when they are needed."""
        for drafts in self._drafts:
            for size in self._rows:
                if size <= rows:
                    self._bucket(size, drafts)

    def steps(self, seconds: float) -> int:
        """How many there are where one takes so long; below 2 there is no burst."""
        return self.at_most(int(SECONDS / seconds))

    def at_most(self, steps: int) -> int:
        """So many, or what the device has room for the tokens of."""
        return min(steps, MAX_STEPS)

    def drafts(self, wanted: int) -> int:
        """How many there are per step where at least so many are wanted."""
        return self._drafts[bisect_left(self._drafts, min(wanted, self._drafts[-1]))]

    def ready(self, requests: Sequence[Request], most: int) -> bool:
        """Whether these may start a burst of at most so many tokens each."""
        if any(len(request.tokens) < 2 for request in requests):
            return False
        return self._drafter is None or self._drafter.catch_up(requests, most)

    def reaches(self, requests: Sequence[Request], most: int) -> bool:
        """Whether the draft model, if there is one, goes so many tokens further."""
        return self._drafter is None or self._drafter.reaches(requests, most)

    def launch(self, plan: SchedulePlan) -> DrawnTokens:
        """Run `plan.burst` = (steps, drafts per step); its block copies must have been done."""
        assert plan.burst is not None
        steps, drafts = plan.burst
        rows = self._rows[bisect_left(self._rows, len(plan.chunks))]
        bucket = self._bucket(rows, drafts)
        self._fill(bucket, plan)
        bucket.rounds(PREPARE)
        return self._replay(bucket, plan, steps)

    @torch.inference_mode()
    def go_on(self, plan: SchedulePlan, capacity: Sequence[int]) -> DrawnTokens:
        """Run the same requests, in the same order, behind the burst that was launched last.

        Args:
            plan: `burst` as before.
            capacity: Tokens of each request that its blocks hold, if it may use them.
        """
        assert plan.burst is not None
        steps, drafts = plan.burst
        bucket = self._buckets[self._rows[bisect_left(self._rows, len(plan.chunks))], drafts]
        self._send_room(bucket, plan, capacity)
        bucket.rounds(PREPARE)  # once more, for whom there was no room
        return self._replay(bucket, plan, steps)

    def _replay(self, bucket: _Bucket, plan: SchedulePlan, steps: int) -> DrawnTokens:
        for _ in range(steps):
            bucket.replay[bucket.greedy]()
        bucket.turn ^= 1
        tokens, done = bucket.tokens[bucket.turn], bucket.done[bucket.turn]
        tokens.copy_(bucket.tensors["out"], non_blocking=True)
        if done is not None:
            done.record(torch.cuda.current_stream(self._device))
        rounds = [(bucket.at + i) % _ROUNDS for i in range(steps)]
        bucket.at = (bucket.at + steps) % _ROUNDS
        return _BurstTokens(tokens, done, rounds, len(plan.chunks))

    def took(self, request: Request) -> None:
        """The tokens of a burst have been added to those of a request."""
        if self._drafter is not None:
            self._drafter.took(request)
        elif request.request_id in self._known:
            self._known[request.request_id][1] = len(request.tokens)

    def _send_room(self, bucket: _Bucket, plan: SchedulePlan, capacity: Sequence[int]) -> None:
        count, held = len(capacity), self._held
        rows, width = held.update(plan)
        if self._drafter is not None:
            self._drafter.will_write([chunk.request for chunk in plan.chunks])
        bucket.host_room.reverse()
        host = bucket.host_room[0].numpy()
        host[: bucket.lead] = -1
        host[:count] = capacity
        tables = host[bucket.lead :].reshape(bucket.rows, -1)
        tables[:count, :width] = held.tables[rows, :width]
        end = bucket.lead + count * tables.shape[1]
        bucket.room[:end].copy_(bucket.host_room[0][:end], non_blocking=True)

    def _fill(self, bucket: _Bucket, plan: SchedulePlan) -> None:
        """Write and send where a burst starts."""
        self._send_room(bucket, plan, [chunk.start + chunk.count for chunk in plan.chunks])
        held, host, count, k = self._held, bucket.buffer.host, len(plan.chunks), bucket.drafts
        requests = [chunk.request for chunk in plan.chunks]
        rows = np.array([request.row for request in requests])
        host["length"][:] = 0
        host["length"][:count] = [len(request.tokens) for request in requests]
        host["num_prompt"][:count] = held.num_prompt[rows]
        host["tail"][: 2 * count] = [token for r in requests for token in r.tokens[-2:]]
        if self._history is not None:
            host["history_row"][:count] = [self._remember(r, requests) for r in requests]
        host["temperature"][:] = 0
        host["temperature"][:count] = temperature = held.temperature[rows]
        greedy = not temperature.any()
        if not greedy:
            for name in ("seeds", "top_p", "min_p", "top_k"):
                host[name][:count] = getattr(held, name)[rows]
        for name in ("temperature",) if greedy else OF_REQUEST:
            host["each_" + name].reshape(bucket.rows, k + 1)[:] = host[name][:, None]
        bucket.buffer.send(4 * bucket.rows)
        bucket.greedy, bucket.at = greedy, 0

    def _remember(self, request: Request, running: Sequence[Request]) -> int:
        """The row of the history with this request's tokens."""
        known = self._known.get(request.request_id)
        assert self._history is not None
        if known is None:
            free = set(range(len(self._history))) - {row for row, _ in self._known.values()}
            if not free:
                others = {r.request_id for r in running}
                name = next(name for name in self._known if name not in others)
                free = {self._known.pop(name)[0]}
            known = self._known[request.request_id] = [free.pop(), 0]
        row, have = known
        if have < len(request.tokens):
            news = torch.tensor(request.tokens[have:], dtype=torch.int32)
            self._history[row, have : len(request.tokens)] = news.to(self._device)
            known[1] = len(request.tokens)
        return row

    def _bucket(self, rows: int, drafts: int) -> _Bucket:
        if (rows, drafts) not in self._buckets:
            self._buckets[rows, drafts] = self._make(rows, drafts)
        return self._buckets[rows, drafts]

    def _make(self, rows: int, k: int) -> _Bucket:
        n, device = rows * (k + 1), self._device
        columns: dict[str, tuple[type, int, float]] = {
            "tail": (np.int64, 2 * rows, 0),
            "seeds": (np.int64, rows, 0),
            "each_seeds": (np.int64, n, 0),
            "length": (np.int32, rows, 0),
            "num_prompt": (np.int32, rows, 0),
            "round": (np.int32, rows, 0),
        }
        for prefix, length in (("", rows), ("each_", n)):
            columns[prefix + "top_k"] = (np.int32, length, 0)
            columns[prefix + "temperature"] = (np.float32, length, 0)
            columns[prefix + "top_p"] = (np.float32, length, 1)
            columns[prefix + "min_p"] = (np.float32, length, 0)
        columns["history_row"] = (np.int32, rows, 0)
        buffer, on_cuda = StaticBuffer(columns, device), device.type == "cuda"
        lead = -(-rows // _ALIGN) * _ALIGN
        size = lead + rows * self._held.tables.shape[1]
        room = torch.zeros(size, dtype=torch.int32, device=device)
        room[:lead] = -1

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        tensors = {
            "count": zeros(rows, dtype=torch.int32),
            "input_ids": zeros(n),
            "positions": zeros(n),
            "slots": zeros(n).fill_(-1),
            "steps": zeros(n),
            "seq_lens": zeros(rows, dtype=torch.int32),
            "drawn": zeros(n),
            "out": zeros(_ROUNDS, rows, k + 3, dtype=torch.int32),
            "capacity": room[:rows],
            "tables": room[lead:],
        }
        if self._history is not None:
            tensors["history"] = self._history
        else:
            tensors["draft_positions"] = zeros((k + 1) * rows)
            tensors["draft_slots"] = zeros((k + 1) * rows).fill_(-1)
            tensors["draft_steps"] = zeros(k, rows)
            tensors["draft_seq_lens"] = zeros(k, rows, dtype=torch.int32)
            tensors["draft_drawn"] = zeros(k, rows)
        sent = ("length", "num_prompt", "round", "tail", "history_row")
        rounds = Rounds(
            {**tensors, **{name: buffer.device[name] for name in sent}},
            rows=rows,
            drafts=k,
            block_size=self._block_size,
            vocab_size=self._vocab_size,
            min_n=self._ngram[0],
            max_n=self._ngram[1],
            table_width=self._held.tables.shape[1],
            history_width=0 if self._history is None else self._history.shape[1],
            max_rounds=_ROUNDS,
        )

        def bounds(count: int) -> Tensor:
            return torch.arange(0, rows * count + 1, count, dtype=torch.int32, device=device)

        bucket = _Bucket(
            rows,
            k,
            buffer,
            room,
            lead,
            [torch.zeros(size, dtype=torch.int32, pin_memory=on_cuda) for _ in range(2)],
            tensors,
            rounds,
            bounds(k + 1),
            (bounds(2), bounds(1)),
            [torch.zeros_like(tensors["out"], device="cpu", pin_memory=on_cuda) for _ in range(2)],
            [torch.cuda.Event() if on_cuda else None for _ in range(2)],
            {},
        )
        for greedy in (True, False):

            def run(greedy: bool = greedy) -> None:
                self._step(bucket, greedy)

            bucket.replay[greedy] = self._capturer.capture(run, programmatic=PROGRAMMATIC_LAUNCH)
        return bucket

    @torch.inference_mode()
    def _step(self, bucket: _Bucket, greedy: bool) -> None:
        if self._drafter is not None:
            self._draft(bucket, self._drafter, greedy)
            bucket.rounds(ROWS)
        columns, tensors = bucket.buffer.device, bucket.tensors
        meta = AttentionMetadata(
            positions=tensors["positions"],
            slot_mapping=tensors["slots"],
            cu_seqlens_q=bucket.cu_seqlens,
            seq_lens=tensors["seq_lens"],
            block_table=tensors["tables"].view(bucket.rows, -1),
            max_seqlen_q=bucket.drafts + 1,
            max_seqlen_k=self._max_len,  # a graph must hold for any length
            num_decodes=bucket.rows,
            decode_len=bucket.drafts + 1,
            workspace=self._workspace,
        )
        hidden = self._model(tensors["input_ids"], meta, self._layers)
        logits = self._model.compute_logits(hidden)
        options: dict[str, Any] = {"temperature": columns["each_temperature"]}
        if not greedy:
            options = {name: columns["each_" + name] for name in OF_REQUEST}
            options["steps"] = tensors["steps"]
        ops.sample(logits, **options, out=tensors["drawn"])
        bucket.rounds(ADVANCE)

    def _draft(self, bucket: _Bucket, drafter: ModelDrafter, greedy: bool) -> None:
        columns, tensors, rows = bucket.buffer.device, bucket.tensors, bucket.rows
        options = {name: columns[name] for name in (("temperature",) if greedy else OF_REQUEST)}
        ids = columns["tail"]
        for i in range(bucket.drafts):
            first, last = (0, 2 * rows) if i == 0 else ((i + 1) * rows, (i + 2) * rows)
            logits = drafter.logits(
                ids,
                positions=tensors["draft_positions"][first:last],
                slots=tensors["draft_slots"][first:last],
                cu_seqlens=bucket.draft_cu_seqlens[i > 0],
                seq_lens=tensors["draft_seq_lens"][i],
                tables=tensors["tables"].view(rows, -1),
                each=1 if i else 2,
            )
            if not greedy:
                options["steps"] = tensors["draft_steps"][i]
            ids = tensors["draft_drawn"][i]
            ops.sample(logits, **options, out=ids)  # type: ignore[arg-type]


class _BurstTokens(DrawnTokens):
    """The tokens of a burst on their way to the host.

    Args:
        out: Where they come, see rounds.py.
        done: When they are there.
        rounds: Those of this burst.
        count: Requests.
    """

    def __init__(
        self, out: Tensor, done: torch.cuda.Event | None, rounds: list[int], count: int
    ) -> None:
        super().__init__(None)
        self.first_rows = []  # the next step needs these tokens
        self._ready, self._out, self._rounds, self._count = done, out, rounds, count

    def result(self) -> SampleResult:
        """Wait for the burst and read what stands of it."""
        self.wait()
        runs: list[list[int]] = []
        checks: list[list[tuple[int, int]]] = []
        out = self._out.numpy()[self._rounds]
        for row in range(self._count):
            runs.append([])
            checks.append([])
            for checked, yielded, *tokens in out[:, row].tolist():
                if yielded:
                    runs[-1] += tokens[:yielded]
                    checks[-1].append((checked, yielded - 1))
        return SampleResult([], runs=runs, checks=checks)
