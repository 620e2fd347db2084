"""PeerAllReduce between processes: handles over the group, sums, refusal where there is nothing to
share, a rank that dies.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastinfer
from fastinfer.distributed import group as group_module
from fastinfer.distributed.all_reduce import PeerAllReduce
from fastinfer.distributed.group import Communicator
from fastinfer.distributed.tensor_parallel import reduce_add_norm
from fastinfer.ops.all_reduce import peer_all_reduce_reference

TIMEOUT_S = 20.0


def _start(rank: int, world: int, store: str, backend: str) -> torch.device:
    dist.init_process_group(
        backend, store=dist.FileStore(store, world), rank=rank, world_size=world
    )
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _part(rank: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randn(shape, generator=g).to(torch.bfloat16)


def _sums(rank: int, world: int, store: str, backend: str, replays: int = 50) -> None:
    device = _start(rank, world, store, backend)
    reduce = PeerAllReduce(None, device, 1 << 20, timeout_s=TIMEOUT_S)
    assert reduce.reason == "" and reduce.supports(1 << 20), reduce.reason
    for seed, shape in enumerate([(1, 4096), (8, 4096), (3, 33), (16, 8192)]):
        for algorithm in ("one_shot", "two_shot"):
            parts = [_part(r, shape, seed) for r in range(world)]
            want = peer_all_reduce_reference(parts)
            x = parts[rank].to(device)
            reduce.all_reduce_(x, algorithm)
            assert torch.equal(x.cpu(), want)
            weight, residual = torch.ones(shape[-1], dtype=x.dtype, device=device), x.clone()
            y, r = want.to(device), x.clone()
            fastinfer.fused_add_rms_norm(y, r, weight)
            z = parts[rank].to(device)
            reduce.all_reduce_add_rms_norm_(z, residual, weight, algorithm=algorithm)
            assert torch.equal(z, y) and torch.equal(residual, r)
    x = _part(rank, (4, 4096), 77).to(device)
    work = torch.empty_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work.copy_(x)
        for _ in range(3):
            reduce.all_reduce_(work)
    want = peer_all_reduce_reference([_part(r, (4, 4096), 77) for r in range(world)])
    for _ in range(2):
        want = (want.float() * world).to(want.dtype)
    for _ in range(replays):
        graph.replay()
    assert torch.equal(work.cpu(), want)
    reduce.check()
    del graph
    reduce.close()
    reduce.close()
    dist.destroy_process_group()


def _refused(rank: int, world: int, store: str, backend: str) -> None:
    _start(rank, world, store, backend)
    reduce = PeerAllReduce(None, "cpu", 1 << 20)
    assert not reduce.supports(16) and "no CUDA device" in reduce.reason
    with pytest.raises(RuntimeError, match=r"no CUDA device; use torch\.distributed"):
        reduce.all_reduce_(torch.ones(8))
    reduce.close()
    dist.destroy_process_group()


def _left_alone(rank: int, world: int, store: str, backend: str) -> None:
    device = _start(rank, world, store, backend)
    reduce = PeerAllReduce(None, device, 1 << 16, timeout_s=0.5)
    if rank == 0:
        x = torch.ones(64, device=device)
        reduce.all_reduce_(x)
        torch.cuda.synchronize()
        with pytest.raises(RuntimeError, match=r"rank 0 waited 0\.5 s"):
            reduce.check()
    dist.barrier()
    reduce.close()
    dist.destroy_process_group()


def _in_order(rank: int, world: int, store: str, backend: str) -> None:
    """Batch-invariant sums have the same bits whatever the size of the message: above what the peer
    kernel's memory holds, at it, far below it, and element by element.
    """
    device = _start(rank, world, store, backend)
    group = Communicator(dist.group.WORLD, device)
    group.batch_invariant = True
    most = group_module.MAX_PEER_BYTES
    if device.type == "cuda":
        group.peer = PeerAllReduce(None, device, most, timeout_s=TIMEOUT_S)
        assert group.peer.reason == ""
    else:  # smaller pieces, so that it takes less long
        group_module.MAX_PEER_BYTES = most = 1 << 18
    rows = most // 2 // 4096
    whole = [_part(r, (2 * rows + 3, 4096), 5) for r in range(world)]
    want = peer_all_reduce_reference(whole)
    got = group.all_reduce_(whole[rank].clone().to(device)).cpu()
    assert torch.equal(got, want)
    for begin, count in ((0, rows), (rows - 1, rows + 1), (7, 1), (2 * rows + 2, 1)):
        piece = whole[rank][begin : begin + count].clone().to(device)
        assert torch.equal(group.all_reduce_(piece).cpu(), want[begin : begin + count])
    residual, weight = torch.ones_like(got), torch.ones(4096, dtype=got.dtype)
    x = whole[rank].clone().to(device)
    kept = residual.clone().to(device)
    y = reduce_add_norm(group, x, kept, weight.to(device), 1e-6)
    for begin, count in ((0, 1), (rows, 2)):  # a row's bits, in a message that fits
        x = whole[rank][begin : begin + count].clone().to(device)
        few = residual[begin : begin + count].clone().to(device)
        z = reduce_add_norm(group, x, few, weight.to(device), 1e-6)
        assert torch.equal(z, y[begin : begin + count])
        assert torch.equal(few, kept[begin : begin + count])
    if group.peer is not None:
        group.peer.close()
    dist.destroy_process_group()


def _aborted(rank: int, world: int, store: str, backend: str) -> None:
    """A call whose peers never come ends when the host says so, long before its limit."""
    device = _start(rank, world, store, backend)
    reduce = PeerAllReduce(None, device, 1 << 16, timeout_s=100)
    if rank == 0:
        x = torch.ones(64, device=device)
        torch.cuda.synchronize()
        done = torch.cuda.Event()
        for _ in range(3):
            reduce.all_reduce_(x)
        done.record()
        time.sleep(0.5)
        assert not done.query()
        begin = time.monotonic()
        reduce.abort()
        torch.cuda.synchronize()
        assert time.monotonic() - begin < 2
        with pytest.raises(RuntimeError, match=r"rank 0 was told to wait for no other rank"):
            reduce.check()
    dist.barrier()
    reduce.close()
    dist.destroy_process_group()


def test_refused_on_the_cpu(tmp_path: Path) -> None:
    mp.spawn(_refused, (2, str(tmp_path / "store"), "gloo"), nprocs=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the ranks would use the GPU")
@pytest.mark.parametrize("world", [2, 3])
def test_ordered_sums_on_the_cpu(tmp_path: Path, world: int) -> None:
    mp.spawn(_in_order, (world, str(tmp_path / "store"), "gloo"), nprocs=world)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_ordered_sums_between_gpus(tmp_path: Path) -> None:
    mp.spawn(_in_order, (2, str(tmp_path / "store"), "nccl"), nprocs=2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_sums_between_processes(tmp_path: Path, backend: str) -> None:
    mp.spawn(_sums, (2, str(tmp_path / "store"), backend), nprocs=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_processes_that_share_a_device(tmp_path: Path) -> None:
    """Handles and mapping on a machine with one GPU: the ranks take turns on it, so each call waits
    for the other's turn.
    """
    mp.spawn(_sums, (2, str(tmp_path / "store"), "gloo", 2), nprocs=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_waits_end_when_the_host_says_so(tmp_path: Path) -> None:
    mp.spawn(_aborted, (2, str(tmp_path / "store"), "gloo"), nprocs=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_rank_that_is_left_alone(tmp_path: Path) -> None:
    mp.spawn(_left_alone, (2, str(tmp_path / "store"), "gloo"), nprocs=2)
