"""peer_all_reduce, peer_all_reduce_add_rms_norm: ranks that share this process, on one GPU or on
several, each on a stream of its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fastinfer
from fastinfer import _lib
from fastinfer.distributed.all_reduce import PeerAllReduce
from fastinfer.ops.all_reduce import (
    peer_all_reduce,
    peer_all_reduce_add_rms_norm,
    peer_all_reduce_add_rms_norm_reference,
    peer_all_reduce_reference,
    peer_argmax,
    peer_argmax_reference,
)
from helpers import FLOATS, assert_close_to_reference, assert_same, opcheck, randn, refuses

# A hardware queue per stream, where nothing has started CUDA yet: two ranks in one queue wait for
# each other in vain.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LIMIT_S = 20.0
MAX_BYTES = 1 << 20


@contextlib.contextmanager
def ranks(
    world: int, max_bytes: int = MAX_BYTES, timeout_s: float = LIMIT_S, first_device: bool = False
) -> Iterator[list[PeerAllReduce]]:
    """Ranks on as many devices as there are, or all on the first."""
    count = 1 if first_device else torch.cuda.device_count()
    reduces = PeerAllReduce.in_process(
        [rank % count for rank in range(world)], max_bytes, timeout_s=timeout_s
    )
    try:
        yield reduces
    finally:
        for each in reduces:
            each.close()


def on_all(reduces: list[PeerAllReduce], call: Callable[[int, PeerAllReduce], None]) -> None:
    """call(rank, its reduce) on a stream per rank, all under way together."""
    devices = {each.device for each in reduces}
    for device in devices:
        torch.cuda.synchronize(device)
    for rank, each in enumerate(reduces):
        with torch.cuda.stream(torch.cuda.Stream(each.device)):
            call(rank, each)
    for device in devices:
        torch.cuda.synchronize(device)
    for each in reduces:
        each.check()


def parts_of(world: int, *shape: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    return [randn(*shape, seed=seed + rank, dtype=dtype) for rank in range(world)]


@gpu
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("dtype", FLOATS)
def test_sum_is_that_of_the_reference(dtype: torch.dtype, world: int, algorithm: str) -> None:
    """Bit for bit, on every rank, call after call, for sizes that share slots."""
    with ranks(world) as reduces:
        for seed, shape in enumerate(
            [(1, 4096), (5, 333), (7,), (3, 1), (0, 8), (40, 1024), (1, 8), (9, 2048), (130, 257)]
        ):
            parts = parts_of(world, *shape, dtype=dtype, seed=10 * seed)
            xs = [part.to(each.device) for part, each in zip(parts, reduces, strict=True)]
            on_all(reduces, lambda rank, each, xs=xs: each.all_reduce_(xs[rank], algorithm))
            expected = peer_all_reduce_reference(parts)
            for x in xs:
                assert_same(x.cpu(), expected)


@gpu
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("dtype", FLOATS)
def test_add_norm_has_the_bits_of_two_steps(dtype: torch.dtype, world: int, algorithm: str) -> None:
    """Rows of one block (aligned, up to 16 KiB) and all others."""
    shapes = [(1, 4096), (3, 264), (2, 5, 64), (17, 128), (2, 33), (1, 16384), (40, 2048), (1, 8)]
    with ranks(world) as reduces:
        for seed, shape in enumerate(shapes):
            parts = parts_of(world, *shape, dtype=dtype, seed=10 * seed)
            before = randn(*shape, seed=1000 + seed, dtype=dtype)
            weight = randn(shape[-1], seed=2000 + seed, dtype=dtype)
            # Also loads the norm's code on every device, which may wait for what runs there.
            for device in {each.device for each in reduces}:
                two_steps = peer_all_reduce_reference(parts).to(device)
                fastinfer.fused_add_rms_norm(two_steps, before.to(device), weight.to(device), 1e-5)
            xs = [part.to(each.device) for part, each in zip(parts, reduces, strict=True)]
            residuals = [before.to(each.device) for each in reduces]
            weights = [weight.to(each.device) for each in reduces]
            on_all(
                reduces,
                lambda rank, each, xs=xs, residuals=residuals, weights=weights: (
                    each.all_reduce_add_rms_norm_(
                        xs[rank], residuals[rank], weights[rank], 1e-5, algorithm
                    )
                ),
            )
            want_x, want_residual = peer_all_reduce_add_rms_norm_reference(
                parts, before, weight, 1e-5
            )
            for x, residual in zip(xs, residuals, strict=True):
                assert_same(residual.cpu(), want_residual)
                assert_same(x.cpu(), two_steps.cpu())
                assert_close_to_reference(x.cpu().double(), want_x.double(), two_steps.cpu())


@gpu
def test_special_values_arrive() -> None:
    """The pattern of an empty slot is a NaN like any other; zeros keep their sign."""
    words = torch.tensor(
        [-1, 0x7FC00000, -(1 << 31), 0, 0x7F800000, -(1 << 23), 0x12345678, -65536],
        dtype=torch.int32,
    )
    for dtype in FLOATS:
        parts = [words.view(dtype).repeat(64), torch.full_like(words.view(dtype).repeat(64), -0.0)]
        for algorithm in ("one_shot", "two_shot"):
            with ranks(2) as reduces:
                xs = [part.to(each.device) for part, each in zip(parts, reduces, strict=True)]
                on_all(
                    reduces, lambda rank, each, xs=xs, a=algorithm: each.all_reduce_(xs[rank], a)
                )
                assert torch.equal(xs[0].cpu().view(torch.uint8), xs[1].cpu().view(torch.uint8)), (
                    "the ranks differ"
                )
                assert_same(xs[0].cpu(), peer_all_reduce_reference(parts))
                assert torch.equal(
                    xs[0].cpu().signbit() | xs[0].cpu().isnan(),
                    parts[0].signbit() | parts[0].isnan(),
                )


@gpu
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_strides(algorithm: str) -> None:
    """Columns of a wider tensor; what is beside them stays."""
    wide = [randn(6, 96, seed=rank, dtype=torch.bfloat16).cuda() for rank in range(2)]
    for first, last in ((0, 64), (8, 72), (3, 68)):
        with ranks(2, first_device=True) as reduces:
            xs = [each.clone() for each in wide]
            on_all(
                reduces,
                lambda rank, each, xs=xs, cut=slice(first, last): each.all_reduce_(
                    xs[rank][:, cut], algorithm
                ),
            )
            want = [each.clone() for each in wide]
            for each in want:
                each[:, first:last] = peer_all_reduce_reference([w[:, first:last] for w in wide])
            for x, each in zip(xs, want, strict=True):
                assert_same(x, each)


@gpu
@pytest.mark.parametrize("programmatic", [False, True])
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_graph_replays(algorithm: str, programmatic: bool) -> None:
    """A graph of several calls of different sizes per rank, replayed out of step with eager calls
    in between: counters live on the device.
    """
    shapes = [(1, 4096), (8, 4096), (3, 264), (2, 8192)]
    with ranks(2) as reduces:
        graphs, xs, outs, kept = [], [], [], []
        for rank, each in enumerate(reduces):
            device = each.device
            x = [
                randn(*s, seed=rank + 2 * i, dtype=torch.bfloat16).to(device)
                for i, s in enumerate(shapes)
            ]
            weights = [torch.ones(s[-1], dtype=torch.bfloat16, device=device) for s in shapes]
            out = [torch.empty_like(t) for t in x]
            rest = [torch.empty_like(t) for t in x]
            graph = torch.cuda.CUDAGraph()
            with (
                torch.cuda.device(device),
                _lib.programmatic_launch(programmatic),
                torch.cuda.graph(graph, stream=torch.cuda.Stream(device)),
            ):
                for _ in range(3):
                    for t, o, r, w in zip(x, out, rest, weights, strict=True):
                        # Kernels, not copies or memsets: ranks that share a device share its copy
                        # engine, where the second would queue behind what waits for it.
                        torch.mul(t, 1, out=o)
                        torch.mul(t, 0, out=r)
                        each.all_reduce_add_rms_norm_(o, r, w, 1e-6, algorithm)
                        each.all_reduce_(r, algorithm)
            graphs.append(graph)
            xs.append(x)
            outs.append([*out, *rest])
            kept.append(weights)  # graphs hold addresses: freed, they would be the next rank's out
        first: list[Tensor] = []
        for turn in range(40):
            on_all(reduces, lambda rank, each: graphs[rank].replay())
            for a, b in zip(*outs, strict=True):
                assert_same(a.cpu(), b.cpu())
            got = [t.cpu() for t in outs[0]]
            first = first or got
            for a, b in zip(got, first, strict=True):
                assert_same(a, b)
            if turn % 3 == 0:
                small = [
                    torch.full((5,), rank + 1.0, device=each.device)
                    for rank, each in enumerate(reduces)
                ]
                on_all(reduces, lambda rank, each, small=small: each.all_reduce_(small[rank]))
                assert small[0].tolist() == [3.0] * 5
        for i, shape in enumerate(shapes):
            sums = peer_all_reduce_reference([xs[0][i].cpu(), xs[1][i].cpu()])
            assert_same(first[len(shapes) + i], (2 * sums.float()).to(torch.bfloat16))
            assert first[i].shape == shape


@gpu
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_argmax_is_that_of_all_logits(dtype: torch.dtype, world: int) -> None:
    """Ties, NaN, infinities, a rank without logits, rows that are not packed, graphs."""
    vocabulary, piece = 100 * (world - 1), 100  # the last rank has nothing
    with ranks(world) as reduces:
        for seed, rows in enumerate([1, 2, 37, 300]):
            logits = randn(rows, vocabulary, seed=seed, dtype=dtype)
            logits[0, 3] = logits[0, vocabulary - 2] = 50
            logits[-1] = float("-inf")
            logits[-1, -1] = float("inf")
            if rows > 2:
                logits[1, :] = 0
                logits[2, :100] = float("nan")
            parts = [logits[:, r * piece : (r + 1) * piece] for r in range(world)]
            chosen = [
                part.float().nan_to_num(float("-inf")).argmax(1)
                if part.shape[1]
                else torch.zeros(rows, dtype=torch.int64)
                for part in parts
            ]
            begins = [min(r * piece, vocabulary) for r in range(world)]
            want = peer_argmax_reference(parts, chosen, begins)
            assert int(want[-1]) == vocabulary - 1 and (rows < 2 or int(want[0]) == 3)
            xs = [
                torch.nn.functional.pad(part, (0, 5)).to(each.device)[:, : part.shape[1]]
                for part, each in zip(parts, reduces, strict=True)
            ]
            ids = [c.to(each.device) for c, each in zip(chosen, reduces, strict=True)]
            outs = [torch.full_like(each, -7) for each in ids]
            for _ in range(3):  # both halves of the slots
                on_all(
                    reduces,
                    lambda rank, each, xs=xs, ids=ids, outs=outs, begins=begins: each.argmax(
                        xs[rank], ids[rank], begins[rank], outs[rank]
                    ),
                )
                for out in outs:
                    assert_same(out.cpu(), want)


@gpu
def test_a_silent_rank_is_noticed() -> None:
    with ranks(2, timeout_s=0.2) as (alone, _):
        x = torch.ones(4096, device=alone.device)
        alone.all_reduce_(x)
        torch.cuda.synchronize(alone.device)
        refuses(lambda: alone.all_reduce_(x), "rank 0", "0.2 s", "restart")
        refuses(alone.check, "PeerAllReduce")


@gpu
def test_one_rank_needs_nobody() -> None:
    (alone,) = PeerAllReduce.in_process(["cuda"])
    x, r, w = (randn(3, 64, seed=i, device="cuda") for i in range(3))
    want = fastinfer.fused_add_rms_norm(x.clone(), r.clone(), w[0])
    assert_same(alone.all_reduce_(x.clone()), x)
    for a, b in zip(alone.all_reduce_add_rms_norm_(x, r, w[0]), want, strict=True):
        assert_same(a, b)
    alone.close()


@gpu
def test_opcheck() -> None:
    """With a group of one, which is all that runs alone."""
    (alone,) = PeerAllReduce.in_process(["cuda"])
    alone._allocate()
    x, r = torch.randn(2, 2, 64, device="cuda").unbind()
    opcheck(torch.ops.fastinfer.peer_all_reduce.default, (x, alone._id, 1))
    ids, out = torch.zeros(2, 2, dtype=torch.int64, device="cuda").unbind()
    opcheck(torch.ops.fastinfer.peer_argmax.default, (x, ids, 0, alone._id, out))
    op = torch.ops.fastinfer.peer_all_reduce_add_rms_norm.default
    opcheck(op, (x, r.clone(), x[0].clone(), 1e-6, alone._id, 0))
    alone.close()


@gpu
def test_refusals_on_the_gpu() -> None:
    with ranks(2, max_bytes=4096, first_device=True) as (one, _):
        name, norm = "peer_all_reduce", "peer_all_reduce_add_rms_norm"
        x, group = torch.ones(4, 64, device="cuda"), one._id
        refuses(lambda: peer_all_reduce(x, 10**6), name, "group 1000000", "not connected")
        refuses(lambda: peer_all_reduce(x.repeat(5, 1), group), name, "max_bytes", "4096", "5120")
        refuses(lambda: peer_all_reduce(x.t(), group), name, "x", "last dimension")
        refuses(
            lambda: peer_all_reduce(torch.ones(4, 4, 8, device="cuda")[:, :2], group),
            name,
            "one row stride",
        )
        refuses(
            lambda: peer_all_reduce_add_rms_norm(x, x[:2].clone(), x[0], 1e-6, group),
            norm,
            "residual",
        )
        refuses(lambda: peer_all_reduce_add_rms_norm(x, x.cpu(), x[0], 1e-6, group), norm, "device")
        assert one.supports(4096) and not one.supports(4097)
        one.close()
        assert not one.supports(16)
        refuses(lambda: one.all_reduce_(x), "PeerAllReduce", "closed")


def test_refusals() -> None:
    name, norm = "peer_all_reduce", "peer_all_reduce_add_rms_norm"
    x = torch.ones(2, 16)
    refuses(lambda: peer_all_reduce(x, 0), name, "CUDA device", "torch.distributed.all_reduce")
    refuses(lambda: peer_all_reduce(x.double(), 0), name, "x", "float64")
    refuses(lambda: peer_all_reduce(torch.tensor(1.0), 0), name, "at least one dimension")
    ids = torch.zeros(2, dtype=torch.int64)
    for arguments, words in [
        ((x, ids, 0, 0, ids), ("CUDA device", "torch.distributed")),
        ((x[0], ids, 0, 0, ids), ("logits", "2")),
        ((x.double(), ids, 0, 0, ids), ("logits", "float64")),
        ((x, ids.int(), 0, 0, ids), ("ids", "int32")),
        ((x, ids, 0, 0, ids[:1]), ("out", "shape")),
        ((x, ids, 2**31, 0, ids), ("begin", "2^31")),
    ]:
        refuses(lambda arguments=arguments: peer_argmax(*arguments), "peer_argmax", *words)
    refuses(lambda: torch.ops.fastinfer.peer_all_reduce(x, 0, 3), name, "algorithm", "got 3")
    refuses(lambda: peer_all_reduce(x[:1].expand(2, 16), 0), name, "repeat memory")
    refuses(lambda: peer_all_reduce(None, 0), name, "x must be a tensor")
    refuses(lambda: peer_all_reduce(x.clone().requires_grad_(), 0), name, "grad")
    refuses(lambda: peer_all_reduce_add_rms_norm(x, x.clone(), x[0], 1e-6, 0), norm, "CUDA device")
    refuses(lambda: PeerAllReduce.in_process(["cpu", "cpu"]), "PeerAllReduce", "no CUDA device")
    refuses(lambda: PeerAllReduce.in_process(["cpu"], 0), "PeerAllReduce", "max_bytes")


def test_references() -> None:
    parts = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])]
    assert peer_all_reduce_reference(parts).tolist() == [4.0, 0.0]
    x, residual = peer_all_reduce_add_rms_norm_reference(
        parts, torch.tensor([0.0, 3.0]), torch.tensor([1.0, 2.0]), 0.0
    )
    assert residual.tolist() == [4.0, 3.0]
    torch.testing.assert_close(x, torch.tensor([4.0, 6.0]) / 12.5**0.5)
