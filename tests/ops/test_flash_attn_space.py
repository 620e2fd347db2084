"""flash-attn's public parameter space against float64: dense, packed and cached attention with
every option, drawn by seed. The reference here is written from flash-attn's documentation alone and
shares no code with `fastinfer.ops`.

On the CPU a sample (`make test`) or a large one (`make test-full`), on a GPU always the large one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastinfer import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from helpers import assert_close_to_reference, devices, randn

DIMS = [16, 32, 40, 64, 80, 96, 128, 160, 192, 224, 256]
HEADS = [(6, 6), (6, 3), (6, 1), (8, 2)]
LENGTHS = [(113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (1024, 1023)]
LENGTHS += [(1023, 1024), (1, 147), (3, 3), (217, 1), (64, 128), (65, 63)]
CACHED = [(1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (16, 2000), (1, 4000)]
PAGES = [1, 2, 3, 5, 8, 16, 17, 32, 64, 100, 128, 256]
SAMPLE, LARGE = 12, 150


def draws(op: str) -> list[Any]:
    """(device, seed) of every case of an operator."""
    cases = []
    for device in devices(op):
        for seed in range(LARGE):
            full = device == "cpu" and seed >= SAMPLE
            cases.append(pytest.param(device, seed, marks=[pytest.mark.full] if full else []))
    return cases


@dataclass
class Draw:
    """One point of the space."""

    device: str
    rng: random.Random
    dtype: torch.dtype = field(init=False)
    heads: int = field(init=False)
    heads_kv: int = field(init=False)
    dim: int = field(init=False)
    seed: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        half = [torch.float16, torch.bfloat16]
        self.dtype = self.rng.choice(half if self.device == "cuda" else [*half, torch.float32])
        self.heads, self.heads_kv = self.rng.choice(HEADS)
        self.dim = self.rng.choice(DIMS)
        self.seed = self.rng.randrange(10**6)

    def maybe(self, share: float = 0.5) -> bool:
        return self.rng.random() < share

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        self.seed += 1
        return randn(*shape, seed=self.seed, dtype=dtype or self.dtype, device=self.device)

    def lengths(self, pairs: list[tuple[int, int]]) -> tuple[int, int]:
        """On the CPU the long ones are rare."""
        short = [p for p in pairs if p[0] * p[1] <= 60_000]
        return self.rng.choice(pairs if self.device == "cuda" or self.maybe(0.1) else short)

    def masks(self, batch: int, len_k: int) -> dict[str, Any]:
        """causal, window, softcap, ALiBi, scale: options of every function."""
        options: dict[str, Any] = {"causal": self.maybe()}
        if self.maybe(0.4):
            sides = [self.rng.choice([-1, self.rng.randrange(len_k + 1)]) for _ in range(2)]
            options["window_size"] = tuple(sides)
        if self.maybe(0.3):
            options["softcap"] = self.rng.choice([2.0, 15.0, 50.0])
        if self.maybe(0.3):
            shape = (batch, self.heads) if self.maybe() else (self.heads,)
            options["alibi_slopes"] = self.normal(*shape, dtype=torch.float32).abs() * 0.3
        if self.maybe(0.2):
            options["softmax_scale"] = 0.07
        return options


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: int,
    dtype: torch.dtype,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    softmax_scale: float | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Sequence b: q [Sq, Hq, D], k and v [Sk, Hkv, D] -> out [Sq, Hq, D], lse [Hq, Sq]."""
    wide = torch.promote_types(dtype, torch.float32)
    repeat = q.shape[1] // k.shape[1]
    k, v = (t[first:].to(dtype).repeat_interleave(repeat, 1) for t in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("qhd,khd->hqk", q.to(dtype) * scale, k).to(wide)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    # Query i stands at key i + Sk - Sq.
    distance = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    distance = (distance - torch.arange(k.shape[0])).to(q.device)
    if alibi_slopes is not None:
        slopes = alibi_slopes if alibi_slopes.dim() == 1 else alibi_slopes[b]
        scores = scores - slopes[:, None, None].to(wide) * distance.abs()
    left, right = window_size
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal or right >= 0:
        hidden |= distance < (0 if causal else -right)
    if left >= 0:
        hidden |= distance > left
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(hidden.all(-1)[:, None], 0.0, scores.softmax(-1))
    return torch.einsum("hqk,khd->qhd", weights.to(dtype), v), lse


def compare(out: Tensor, lse: Tensor, parts: list[tuple[Tensor, ...]], options: dict) -> None:
    """parts: per sequence, (out, lse) of the function and the arguments of `attention`."""
    factor = 3.0 if options.get("softcap") else 2.0
    exact, plain = [], []
    for got_lse, b, q, k, v, first in parts:
        reference, want_lse = attention(q, k, v, b, torch.float64, **options, first=first)
        exact.append(reference)
        plain.append(attention(q, k, v, b, q.dtype, **options, first=first)[0])
        torch.testing.assert_close(got_lse.double(), want_lse, atol=2e-4, rtol=1e-5)
    assert_close_to_reference(out, torch.cat(exact), torch.cat(plain), factor=factor)


@pytest.mark.parametrize("device, seed", draws("flash_attn_fwd"))
def test_dense(device: str, seed: int) -> None:
    draw = Draw(device, random.Random(f"dense {seed}"))
    (len_q, len_k), batch = draw.lengths(LENGTHS), draw.rng.choice([1, 2])
    q = draw.normal(batch, len_q, draw.heads, draw.dim)
    k, v = (draw.normal(batch, len_k, draw.heads_kv, draw.dim) for _ in range(2))
    options = draw.masks(batch, len_k)
    out, lse, nothing = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    assert nothing is None
    parts = [(lse[b], b, q[b], k[b], v[b], 0) for b in range(batch)]
    compare(out.flatten(0, 1), lse, parts, options)


@pytest.mark.parametrize("device, seed", draws("flash_attn_varlen_fwd"))
def test_varlen(device: str, seed: int) -> None:
    draw = Draw(device, random.Random(f"varlen {seed}"))
    (len_q, len_k), batch = draw.lengths(LENGTHS), draw.rng.choice([1, 3, 4])
    queries = [draw.rng.randint(1, len_q) for _ in range(batch)]
    keys = [draw.rng.randint(1, len_k) for _ in range(batch)]
    if draw.maybe(0.3):
        keys[draw.rng.randrange(batch)] = 0
    q = draw.normal(sum(queries), draw.heads, draw.dim)
    options = draw.masks(batch, len_k)
    starts = [
        torch.tensor([0, *n], device=device).cumsum(0).to(torch.int32) for n in (queries, keys)
    ]
    rows = [[draw.normal(n, draw.heads_kv, draw.dim) for n in keys] for _ in range(2)]
    table = None
    if draw.maybe(0.4):
        page = draw.rng.choice(PAGES)
        table, caches = paged(draw, rows, max(keys, default=0) + 1, page)
    else:
        caches = [torch.cat(r) for r in rows]
    out, lse, _ = flash_attn_varlen_func(
        q,
        *caches,
        *starts,
        max(queries),
        max(keys),
        return_attn_probs=True,
        block_table=table,
        **options,
    )
    packed = q.split(queries)
    by_sequence = lse.split(queries, dim=1)
    parts = [(by_sequence[b], b, packed[b], rows[0][b], rows[1][b], 0) for b in range(batch)]
    compare(out, lse, parts, options)


def paged(
    draw: Draw, rows: list[list[Tensor]], capacity: int, page: int
) -> tuple[Tensor, list[Tensor]]:
    """Pages in random order holding these rows; everything else is NaN."""
    batch, columns = len(rows[0]), -(-capacity // page)
    count = batch * columns + 3
    ids = draw.rng.sample(range(count), batch * columns)
    table = torch.tensor(ids, dtype=torch.int32, device=draw.device).view(batch, columns)
    caches = []
    for held in rows:
        shape = (count, page, draw.heads_kv, draw.dim)
        cache = torch.full(shape, torch.nan, dtype=draw.dtype, device=draw.device)
        for b, one in enumerate(held):
            at = torch.arange(one.shape[0], device=draw.device)
            cache[table[b, at // page].long(), at % page] = one
        caches.append(cache)
    return table, caches


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x [S, H, D] in float64 from the tables in their dtype."""
    size = 2 * cos.shape[1]
    c, s = (t[positions].double()[:, None] for t in (cos, sin))
    turned, rest = x.double().split([size, x.shape[-1] - size], dim=-1)
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([a * c - b * s, b * c + a * s], dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat([a * c - b * s, b * c + a * s], dim=-1)
    return torch.cat([turned, rest], dim=-1)


@pytest.mark.parametrize("device, seed", draws("flash_attn_kvcache"))
def test_kvcache(device: str, seed: int) -> None:
    draw = Draw(device, random.Random(f"kvcache {seed}"))
    rng = draw.rng
    (len_q, capacity), batch = draw.lengths(CACHED), rng.choice([1, 2, 4])
    new = rng.choice([0, len_q, rng.randint(1, len_q)])
    lengths = [rng.randint(0, capacity - new) for _ in range(batch)]
    options = draw.masks(batch, capacity)
    q = draw.normal(batch, len_q, draw.heads, draw.dim)
    rows = [[draw.normal(n, draw.heads_kv, draw.dim) for n in lengths] for _ in range(2)]
    call: dict[str, Any] = {"num_splits": rng.choice([0, 1])}
    call["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32, device=device)

    place = list(range(batch))  # row of a dense cache
    page = rng.choice(PAGES) if draw.maybe() else None
    if page is not None:
        call["block_table"], caches = paged(draw, rows, capacity, page)
    else:
        spare = 2 if draw.maybe() else 0
        if spare:
            place = rng.sample(range(batch + spare), batch)
            index = torch.tensor(place, dtype=torch.int32, device=device)
            call["cache_batch_idx"] = index
        shape = (batch + spare, capacity, draw.heads_kv, draw.dim)
        caches = [torch.full(shape, torch.nan, dtype=draw.dtype, device=device) for _ in range(2)]
        for cache, held in zip(caches, rows, strict=True):
            for b, one in enumerate(held):
                cache[place[b], : lengths[b]] = one
    first = [0] * batch
    if draw.maybe(0.3):
        first = [rng.randint(0, n) for n in lengths]
        call["cache_leftpad"] = torch.tensor(first, dtype=torch.int32, device=device)

    added: list[Tensor | None] = [None, None]
    if new:
        added = [draw.normal(batch, new, draw.heads_kv, draw.dim) for _ in range(2)]
    turned_q, turned_k = q, added[0]
    if new and draw.maybe(0.6):
        interleaved, size = draw.maybe(), rng.choice([draw.dim, draw.dim // 2 // 8 * 8 or 8])
        angle = torch.rand(capacity + len_q, size // 2, device=device) * 6.28
        cos, sin = (t.to(draw.dtype) for t in (angle.cos(), angle.sin()))
        call |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
        moves = options["causal"] or options.get("window_size", (-1, -1)) != (-1, -1)
        turned_q, turned_k = q.clone(), added[0].clone()
        for b, n in enumerate(lengths):
            at = torch.full((len_q,), n, device=device)
            at = at + torch.arange(len_q, device=device) if moves else at
            turned_q[b] = rotate(q[b], cos, sin, at, interleaved)
            at = n + torch.arange(new, device=device)
            turned_k[b] = rotate(added[0][b], cos, sin, at, interleaved)

    out, lse = flash_attn_with_kvcache(
        q, *caches, *added, return_softmax_lse=True, **call, **options
    )
    parts = []
    for b, n in enumerate(lengths):
        k, v = rows[0][b], rows[1][b]
        if new:
            k, v = torch.cat([k, turned_k[b]]), torch.cat([v, added[1][b]])
            at = torch.arange(n, n + new, device=device)
            where = (place[b], at)
            if page is not None:
                where = (call["block_table"][b, at // page].long(), at % page)
            assert torch.equal(caches[1][where], added[1][b])
            tolerance = 0.0 if turned_k is added[0] else 1e-2
            torch.testing.assert_close(
                caches[0][where], turned_k[b], atol=tolerance, rtol=tolerance
            )
            k = torch.cat([rows[0][b], caches[0][where]])  # as stored: rounded once
        parts.append((lse[b], b, turned_q[b], k, v, first[b]))
    compare(out.flatten(0, 1), lse, parts, options)


def test_the_reference_itself() -> None:
    """Against torch's attention, where the two overlap."""
    q, k, v = (randn(9, 4, 16, seed=s, dtype=torch.float64) for s in range(3))
    for causal in (False, True):
        want = F.scaled_dot_product_attention(
            *(t.transpose(0, 1) for t in (q, k, v)), is_causal=causal
        )
        got, _ = attention(q, k, v, 0, torch.float64, causal=causal)
        torch.testing.assert_close(got, want.transpose(0, 1))
