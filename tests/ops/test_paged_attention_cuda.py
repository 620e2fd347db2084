"""What only the CUDA kernels of paged attention have: head dimensions and row counts of every
instance, both decodings of e4m3, split work under graphs, batch invariance, workspaces, checks of
device data.
"""

from __future__ import annotations

import random

import pytest
import torch
from test_flash_attention import check, feature_sets
from test_paged_attention import Case

from fastinfer import _lib
from fastinfer.ops.paged_attention import (
    flash_attn_with_kvcache,
    flash_attn_with_kvcache_reference,
    plan_decode,
    plan_decode_reference,
)
from helpers import HALF, randn, refuses

pytestmark = pytest.mark.gpu
FP8 = torch.float8_e4m3fn
DIMS = (16, 40, 64, 72, 80, 96, 112, 128, 144, 192, 256)
HEADS = ((6, 6), (6, 1), (32, 8), (28, 4), (40, 8), (64, 4), (32, 1))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_heads_and_dims(heads, dim):
    rng = random.Random(repr((heads, dim)))
    for code in (None, rng.choice((FP8, torch.int8))):
        if code and dim % 16:
            continue
        lengths = [rng.choice((0, 1, 63, 64, 65, 700, 1023, 1024, 2100)) for _ in range(4)]
        case = Case(
            lengths, len_q=rng.choice((1, 1, 2, 4, 5, 16, 21)), heads=heads[0], heads_kv=heads[1],
            dim=dim, block_size=rng.choice((None, 1, 4, 16, 64, 100, 128)),
            dtype=rng.choice(HALF), cache_dtype=code,
            scales=rng.choice(("scalar", "head", "token")) if code else "none", device="cuda",
        )  # fmt: skip
        features = rng.choice(feature_sets(heads[0], len(lengths), seed=dim))
        case.verify(**features)


@pytest.mark.parametrize("code", [None, FP8, torch.int8], ids=str)
def test_portable_path_has_the_same_bits(code, monkeypatch):
    """Where there are no clusters: many items, an odd number of key heads."""
    case = Case(
        [0, 5, 700, 64], heads=18, heads_kv=9, dim=128, block_size=16, dtype=torch.bfloat16,
        cache_dtype=code, scales="token" if code else "none", device="cuda",
    )  # fmt: skip
    native = case.run(causal=True)
    monkeypatch.setenv("FASTINFER_FORCE_ARCH", "80")
    portable = case.run(causal=True)
    assert torch.equal(native[0], portable[0]) and torch.equal(native[1], portable[1])


def test_every_e4m3_code(monkeypatch):
    """One key per code, attended alone: the output is the code's value, NaN included."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(FP8)
    v = codes.view(256, 1, 1, 1).expand(256, 1, 1, 128).contiguous().cuda()
    q, one = torch.zeros(256, 1, 1, 128).half().cuda(), torch.ones((), device="cuda")
    k = torch.zeros_like(v)
    for arch in ("", "80"):
        monkeypatch.setenv("FASTINFER_FORCE_ARCH", arch)
        out = flash_attn_with_kvcache(q, k, v, cache_seqlens=1, k_scale=one, v_scale=one).cpu()
        expected = codes.to(torch.float16)[:, None, None, None].expand_as(out)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(), expected.nan_to_num())


def paged_step(batch: int, pages: int, heads_kv: int = 8, len_q: int = 1):
    k, v = (randn(batch * pages, 16, heads_kv, 128, seed=s).bfloat16().cuda() for s in (1, 2))
    order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(3))
    table = order.int().view(batch, pages).cuda()
    q = randn(batch, len_q, 32, 128, seed=4).bfloat16().cuda()
    return q, k, v, table


@pytest.mark.parametrize("invariant", [False, True])
def test_graph_follows_the_lengths(invariant):
    q, k, v, table = paged_step(6, 160, len_q=2)
    lengths = torch.tensor([2, 100, 2500, 700, 2, 64], dtype=torch.int32).cuda()
    workspace = torch.zeros(32 << 20, dtype=torch.uint8, device="cuda")
    out = torch.empty_like(q)
    plan = plan_decode(lengths, 32, 8, 128, q_len=2, batch_invariant=invariant)

    def step():
        plan_decode(lengths, 32, 8, 128, q_len=2, out=plan, batch_invariant=invariant)
        flash_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths, block_table=table, causal=True, plan=plan, out=out,
            workspace=workspace, batch_invariant=invariant,
        )  # fmt: skip

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for new in ([1] * 6, [2560, 0, 3, 2560, 64, 1], [0] * 6, [700, 1024, 1025, 2048, 2559, 2]):
        lengths.copy_(torch.tensor(new, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        args = (q, k, v)
        options = {"cache_seqlens": lengths, "block_table": table, "causal": True}
        assert torch.equal(
            out, flash_attn_with_kvcache(*args, **options, batch_invariant=invariant)
        )
        reference = flash_attn_with_kvcache_reference(*args, **options)[0]
        assert (out.double() - reference).abs().max() < 2e-2
    first = out.clone()
    for _ in range(1000):
        graph.replay()
        assert torch.equal(out, first)
    assert not workspace[: 64 << 10].any()


# 1 to 4 clusters per item, lengths that leave some without keys, some that are too long for them.
CLUSTERS = (
    ([700], 2, 8), ([64], 8, 4), ([0], 4, 4), ([1], 3, 8), ([2040], 8, 4), ([3000], 8, 4),
    ([5000], 8, 4), ([9000], 2, 4), ([1300, 900, 0], 8, 2), ([1500], 1, 32),
    ([300, 20], 4, 4), ([129, 0, 65, 1030], 8, 4), ([700, 130, 0, 1], 2, 16),
    ([513] * 8, 8, 4), ([2048, 1, 0, 63, 64, 65, 1024, 100], 8, 2), ([90] * 16, 8, 4),
    ([5, 900] * 16, 4, 1), ([4000, 10, 10], 8, 4), ([7000], 8, 4),
)  # fmt: skip


def check_bits(case: Case) -> None:
    """Right, and with a plan, in a graph, with programmatic launch, with a table that is somewhat
    wider: the same bits.
    """
    causal = {"causal": case.q.shape[1] > 1}
    expected = case.verify(**causal).cuda()
    args, kwargs, _, _ = case.copy()
    args = [None if t is None else t.cuda() for t in args]
    kwargs = {n: None if t is None else t.cuda() for n, t in kwargs.items()} | causal
    (len_q, heads, dim), heads_kv = args[0].shape[1:], args[1].shape[2]
    plan = plan_decode(kwargs["cache_seqlens"], heads, heads_kv, dim, q_len=len_q)
    assert torch.equal(flash_attn_with_kvcache(*args, **kwargs, plan=plan), expected)
    if kwargs["block_table"] is not None:
        table, block = kwargs["block_table"], args[1].shape[1]
        most = next(n for n in (2048, 6144, 8192, 1 << 17) if table.shape[1] * block <= n) // block
        table = torch.nn.functional.pad(table, (0, most - table.shape[1]), value=-1)
        wide = kwargs | {"block_table": table}
        assert torch.equal(flash_attn_with_kvcache(*args, **wide), expected)
    workspace = torch.zeros(32 << 20, dtype=torch.uint8, device="cuda")
    out = torch.empty_like(expected)
    graph = torch.cuda.CUDAGraph()
    with _lib.programmatic_launch(), torch.cuda.graph(graph):
        for _ in range(3):
            flash_attn_with_kvcache(*args, **kwargs, workspace=workspace, out=out)
    for _ in range(50):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)
    assert not workspace[: 64 << 10].any()


@pytest.mark.parametrize("code", [None, FP8, torch.int8], ids=str)
@pytest.mark.parametrize("lengths,heads_kv,group", CLUSTERS, ids=str)
def test_clusters(lengths, heads_kv, group, code):
    """Few items: their pieces meet in the shared memory of a cluster."""
    rng = random.Random(repr((lengths, code)))
    check_bits(Case(
        lengths, heads=heads_kv * group, heads_kv=heads_kv, dim=rng.choice((64, 80, 128)),
        block_size=rng.choice((None, 16, 64)), dtype=rng.choice(HALF), cache_dtype=code,
        scales=rng.choice(("head", "token")) if code else "none", device="cuda",
    ))  # fmt: skip


@pytest.mark.parametrize(
    "lengths,capacity",
    [([2500, 64, 0, 700] * 9, None), ([9000, 300, 64], 70000), ([2100, 1, 2048] * 11, None)],
    ids=str,
)
def test_large_ctas(lengths, capacity):
    """17 to 32 rows and much to do: CTAs of eight warps."""
    rng = random.Random(repr(lengths))
    check_bits(Case(
        lengths, capacity=capacity, heads=rng.choice((17, 24, 32)), heads_kv=1,
        dim=rng.choice((72, 128)), block_size=16, dtype=torch.bfloat16, device="cuda",
    ))  # fmt: skip


@pytest.mark.parametrize("len_q", [1, 5])
@pytest.mark.parametrize(
    "lengths", [[528] * 4, [528] * 16, [130, 700, 64, 900, 0], [2100] * 8, [1000] * 3], ids=str
)
def test_short_shares_end_with_their_item(lengths, len_q):
    """So that no CTA ends one item and begins another."""
    check_bits(Case(lengths, len_q=len_q, heads=32, heads_kv=8, dim=128, block_size=16,
                    dtype=torch.bfloat16, device="cuda"))  # fmt: skip


@pytest.mark.parametrize("code", [None, FP8], ids=str)
@pytest.mark.parametrize("block", [8, 16, 48, 100, 256])
def test_tables_that_do_not_fit_into_shared_memory(block, code):
    """32 columns at a time, where blocks are not short."""
    rng = random.Random(repr((block, code)))
    case = Case(
        [9000, 40, 0, 2500, 16400], len_q=rng.choice((1, 3)), heads=8, heads_kv=4, dim=128,
        block_size=block, dtype=torch.bfloat16, cache_dtype=code,
        scales=rng.choice(("head", "token")) if code else "none", device="cuda",
    )  # fmt: skip
    case.verify()
    case.verify(window_size=(rng.randrange(2000, 5000), 0))


@pytest.mark.parametrize("lengths", [[70000, 70, 0, 500], [4000, 30] * 20], ids=len)
def test_lengths_that_differ_where_shares_are_long(lengths):
    """Ends of items count as work then; a plan changes no bit."""
    case = Case(lengths, heads=16, heads_kv=8, dim=64, block_size=16, dtype=torch.bfloat16,
                device="cuda")  # fmt: skip
    args, kwargs, _, _ = case.copy()
    args = [None if t is None else t.cuda() for t in args]
    kwargs = {n: None if t is None else t.cuda() for n, t in kwargs.items()}
    out, lse = flash_attn_with_kvcache(*args, **kwargs, return_softmax_lse=True)
    reference = flash_attn_with_kvcache_reference(*args, **kwargs)
    baseline = flash_attn_with_kvcache_reference(*args, **kwargs, compute_dtype=args[0].dtype)
    check(out, lse, reference, baseline)
    plan = plan_decode(kwargs["cache_seqlens"], 16, 8, 64)
    assert torch.equal(flash_attn_with_kvcache(*args, **kwargs, plan=plan), out)


@pytest.mark.parametrize("code", [None, FP8], ids=str)
def test_batch_invariant(code):
    """Alone or in a batch, and with other queries of the same sequence in the call."""
    lengths = [5, 1024, 2100, 1500, 0]
    case = Case(
        lengths, len_q=4, heads=8, dim=64, block_size=16, dtype=torch.bfloat16, cache_dtype=code,
        scales="head" if code else "none", device="cuda",
    )  # fmt: skip
    _, kwargs, caches, _ = case.copy()
    k, v = (t.cuda() for t in caches)
    options = {n: None if t is None else t.cuda() for n, t in kwargs.items()}
    options |= {"causal": True, "batch_invariant": True}
    q = case.q.cuda()
    whole = flash_attn_with_kvcache(q, k, v, **options)
    for b in range(len(lengths)):
        rows = slice(b, b + 1)
        one = options | {n: options[n][rows] for n in ("cache_seqlens", "block_table")}
        assert torch.equal(flash_attn_with_kvcache(q[rows], k, v, **one), whole[rows])
        for i in range(4):  # query i sees what the last query of a shorter sequence sees
            if lengths[b] < 4:
                continue
            shorter = one | {"cache_seqlens": one["cache_seqlens"] - (3 - i)}
            alone = flash_attn_with_kvcache(q[rows, i : i + 1].contiguous(), k, v, **shorter)
            assert torch.equal(alone, whole[rows, i : i + 1])


def test_more_sequences_than_threads():
    lengths = torch.randint(0, 90, (3000,), generator=torch.Generator().manual_seed(0)).int()
    k, v = (randn(3000, 100, 2, 64, seed=s).half() for s in (1, 2))
    q = randn(3000, 1, 4, 64, seed=3).half()
    on = [t.cuda() for t in (q, k, v, lengths)]
    plan = plan_decode(on[3], 4, 2, 64, num_slots=264)
    assert torch.equal(plan.cpu(), plan_decode_reference(lengths, 2, num_slots=264))
    out = flash_attn_with_kvcache(*on[:3], cache_seqlens=on[3])
    assert torch.equal(out, flash_attn_with_kvcache(*on[:3], cache_seqlens=on[3], plan=plan))
    scores = (q.double().view(3000, 2, 2, 64) @ k.double().permute(0, 2, 3, 1)) / 8
    empty = torch.arange(100)[None] >= lengths[:, None]
    weights = torch.nan_to_num(scores.masked_fill(empty[:, None, None], -torch.inf).softmax(-1))
    reference = (weights @ v.double().transpose(1, 2)).view(3000, 1, 4, 64)
    assert (out.cpu().double() - reference).abs().max() < 2e-3


@pytest.mark.full
@pytest.mark.parametrize("code", [None, FP8], ids=str)
def test_cache_of_more_than_2_31_elements(code):
    blocks, used = 140000, 320
    dtype = code or torch.bfloat16
    nan = float("nan")
    k, v = (torch.full((blocks, 16, 8, 128), nan, device="cuda").to(dtype) for _ in "kv")
    lengths = torch.tensor([5000, 33], dtype=torch.int32).cuda()
    table = torch.full((2, 400), -1, dtype=torch.int32).cuda()
    table[0, :313] = torch.arange(blocks - 313, blocks)
    table[1, :3] = torch.tensor([0, blocks - used, 7])
    pages = table[table >= 0].long()
    for t in (k, v):
        rows = randn(316, 16, 8, 128, seed=1).to(dtype).cuda()
        t.view(torch.uint8)[pages] = rows.view(torch.uint8)
    q = randn(2, 1, 32, 128, seed=2).bfloat16().cuda()
    options = {"cache_seqlens": lengths, "block_table": table}
    if code:
        options |= dict.fromkeys(("k_scale", "v_scale"), torch.ones((), device="cuda"))
    out, lse = flash_attn_with_kvcache(q, k, v, **options, return_softmax_lse=True)
    # The reference, over the pages that are used.
    small = table.clone()
    small[table >= 0] = torch.arange(316, device="cuda", dtype=torch.int32)
    options["block_table"] = small
    k, v = (t.view(torch.uint8)[pages].view(dtype) for t in (k, v))
    reference = flash_attn_with_kvcache_reference(q, k, v, **options)
    baseline = flash_attn_with_kvcache_reference(q, k, v, **options, compute_dtype=q.dtype)
    check(out, lse, reference, baseline)


@pytest.mark.parametrize("scale", [1e4 / 40, 0.0])
def test_extreme_and_equal_logits(scale):
    case = Case([900, 33], len_q=3, heads=8, dim=128, dtype=torch.float16, device="cuda")
    case.verify(softmax_scale=scale)


def test_scales_of_every_magnitude():
    """V scales over nine decades and bf16 queries beyond the range of fp16."""
    k = (randn(2, 900, 4, 128, seed=1) * 3).to(FP8).cuda()
    spread = torch.logspace(-6, 3, 900)[None, torch.randperm(900), None]
    v_scale = (randn(2, 900, 4, seed=2).abs() * spread).cuda()
    q = randn(2, 3, 8, 128, seed=3).bfloat16().cuda() * 1e5
    options = {"k_scale": torch.full((), 1e-5, device="cuda"), "v_scale": v_scale}
    out, lse = flash_attn_with_kvcache(q, k, k, **options, return_softmax_lse=True)
    reference = flash_attn_with_kvcache_reference(q, k, k, **options)
    baseline = flash_attn_with_kvcache_reference(q, k, k, **options, compute_dtype=q.dtype)
    check(out, lse, reference, baseline)


def test_refused():
    q, k, v, table = paged_step(2, 4)
    lengths = torch.tensor([60, 3], dtype=torch.int32).cuda()
    options = {"cache_seqlens": lengths, "block_table": table}
    name = "flash_attn_with_kvcache"
    refuses(lambda: flash_attn_with_kvcache(q.float(), k.float(), v.float(), **options), name, "q",
            "float16 or torch.bfloat16 on CUDA")  # fmt: skip
    small = torch.zeros(100, device="cuda")
    refuses(lambda: flash_attn_with_kvcache(q, k, v, **options, workspace=small), name,
            "workspace", "bytes", "zeroed once")  # fmt: skip
    one = torch.ones((), device="cuda")
    narrow = [t[..., :72].to(FP8) for t in (k, v)]
    refuses(lambda: flash_attn_with_kvcache(q[..., :72], *narrow, **options, k_scale=one,
                                            v_scale=one), name, "multiple of 16")  # fmt: skip


def test_device_data_is_checked(monkeypatch):
    monkeypatch.setenv("FASTINFER_VALIDATE", "1")
    name = "flash_attn_with_kvcache"
    q, k, v, _ = paged_step(2, 4)
    new = randn(2, 1, 8, 128, seed=5).bfloat16().cuda()

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32).cuda()

    table, shared = ints(0, 1, 2, 9).view(2, 2), ints(1, 2, 1, 3).view(2, 2)
    good = {"cache_seqlens": ints(17, 16), "block_table": table}
    flash_attn_with_kvcache(q, k, v, **good)
    for changes, words in (
        ({"cache_seqlens": ints(17, 17)}, ("block_table[1, 1]", "got 9")),
        ({"cache_seqlens": ints(17, 33)}, ("cache_seqlens[1]", "got 33")),
        ({"cache_seqlens": ints(-1, 3)}, ("cache_seqlens[0]", "got -1")),
        ({"cache_leftpad": ints(0, 17)}, ("cache_leftpad[1]", "got 17")),
        ({"plan": plan_decode(ints(300, 16), 32, 8, 128)}, ("plan", "sequence 0")),
        ({"k": new, "v": new, "cache_seqlens": ints(3, 3), "block_table": shared},
         ("same cache slot 19",)),
    ):  # fmt: skip
        call = good | changes
        refuses(lambda call=call: flash_attn_with_kvcache(q, k, v, **call), name, *words)
