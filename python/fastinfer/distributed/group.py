"""The collectives of a group of ranks, on torch.distributed: NCCL between GPUs, gloo on the CPU.

All-reduce between GPUs goes through the kernel of `all_reduce.py` where that takes the message, and
through NCCL elsewhere. Every collective but those of `Communicator.send` and `receive` runs on the
current stream and can be captured.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .all_reduce import PeerAllReduce

# its name since torch 2.13, and before
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
MAX_PEER_BYTES = 8 << 20  # of a message for which the peer kernel keeps memory


class Communicator:
    """A group of ranks and this process's place in it.

    Args:
        group: of torch.distributed.
        device: where the tensors are.

    Attributes:
        rank, size: place in the group, and how many there are.
        batch_invariant: sum in the order of ranks, whatever the size of the message.
        peer: the all-reduce over peer memory; None where it is not used.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        self.ranks: list[int] = dist.get_process_group_ranks(group)
        self.batch_invariant = False
        self.peer: PeerAllReduce | None = None

    def all_reduce_(self, x: Tensor) -> Tensor:
        """In place: the sum over all ranks, the same bits on each."""
        if self.peer is not None and self.peer.supports(x.nbytes):
            self.peer.all_reduce_(x)
        elif self.batch_invariant:
            self._sum_in_order_(x)
        else:
            dist.all_reduce(x, group=self.group)
        return x

    def _sum_in_order_(self, x: Tensor) -> None:
        """The bits of the peer kernel: fp32, in the order of ranks, rounded once; in pieces."""
        assert x.is_contiguous()
        for piece in x.view(-1).split(MAX_PEER_BYTES // x.itemsize):
            if self.peer is not None and self.peer.supports(piece.nbytes):
                self.peer.all_reduce_(piece)
                continue
            terms = self.all_gather(piece)
            total = terms[0].float()
            for term in terms[1:]:
                total += term
            piece.copy_(total)

    def all_gather(self, x: Tensor) -> Tensor:
        """[...], equal shapes -> [size, ...]."""
        out = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        _all_gather(out.view(-1), x.contiguous().view(-1), group=self.group)
        return out

    def exchange(self, x: Tensor) -> Tensor:
        """x [size, ...]: piece i goes to rank i -> [size, ...], piece i from rank i."""
        x = x.contiguous()
        out = torch.empty_like(x)
        # gloo moves bytes of every type only when told that they are bytes
        moved, sent = out.view(-1).view(torch.uint8), x.view(-1).view(torch.uint8)
        dist.all_to_all_single(moved, sent, group=self.group)
        return out

    def send(self, x: Tensor, to: int) -> None:
        """To the rank with that place in the group."""
        dist.send(x, self.ranks[to], group=self.group)

    def receive(self, x: Tensor, source: int) -> None:
        """Fill x from the rank with that place in the group."""
        dist.recv(x, self.ranks[source], group=self.group)


@dataclass(slots=True)
class ParallelGroups:
    """Where a process stands: `rank` = stage * tensor_parallel_size + place in its stage.

    Attributes:
        rank, size: among all processes.
        tensor: those that share this stage's layers; None when it is one.
        pipeline: those with the same place in each stage; None when there is one stage.
        device: of this process.
    """

    rank: int
    size: int
    tensor: Communicator | None
    pipeline: Communicator | None
    device: torch.device

    @property
    def stage(self) -> int:
        """Which layers this process has."""
        return 0 if self.pipeline is None else self.pipeline.rank

    @property
    def stages(self) -> int:
        """How many there are."""
        return 1 if self.pipeline is None else self.pipeline.size

    def check(self) -> None:
        """Raise RuntimeError if a sum over peer memory, as in a captured step, waited in vain: its
        results are void.
        """
        peer = None if self.tensor is None else self.tensor.peer
        if peer is not None and not peer.reason:
            peer.check()

    def abort(self) -> None:
        """A rank has gone: let no kernel wait for it. From any thread."""
        if self.tensor is not None and self.tensor.peer is not None:
            self.tensor.peer.abort()

    def close(self) -> None:
        """Give memory back; every rank calls this, when nothing runs any more."""
        if self.tensor is not None and self.tensor.peer is not None:
            self.tensor.peer.close()


def make_groups(
    tensor: int, pipeline: int, device: torch.device, *, timeout: float
) -> ParallelGroups:
    """Divide the ranks of the default group; every rank must call this.

    Args:
        tensor: ranks per stage.
        pipeline: stages.
        device: of this process.
        timeout: seconds to wait for another rank.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    assert size == tensor * pipeline
    mine: dict[str, Communicator | None] = {"tensor": None, "pipeline": None}
    kinds = {
        "tensor": [[s * tensor + t for t in range(tensor)] for s in range(pipeline)],
        "pipeline": [[s * tensor + t for s in range(pipeline)] for t in range(tensor)],
    }
    for name, all_ranks in kinds.items():
        for ranks in all_ranks:
            if len(ranks) < 2:
                continue
            group = dist.group.WORLD if len(ranks) == size else dist.new_group(ranks)
            if rank in ranks:
                mine[name] = Communicator(group, device)
    group = mine["tensor"]
    wanted = os.environ.get("FASTINFER_PEER_ALL_REDUCE", "1") != "0"
    if group is not None and device.type == "cuda" and wanted:
        group.peer = PeerAllReduce(group.group, device, MAX_PEER_BYTES, timeout_s=timeout)
    return ParallelGroups(rank, size, mine["tensor"], mine["pipeline"], device)
