"""What layers call between two matrix products when these are cut over ranks.

A column-parallel layer needs nothing. A row-parallel one leaves a summand on each rank; the sum is
taken where the residual is added and normalised, in `reduce_add_norm`.
"""

from __future__ import annotations

from torch import Tensor

from fastinfer import ops

from .group import Communicator


def reduce_add_norm(
    group: Communicator, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """In place: residual += sum of x over the ranks, x = rms_norm(residual). Returns x.

    Args:
        group: whose ranks hold the summands.
        x: [T, hidden], this rank's summand.
        residual: [T, hidden], the same on all ranks before and after.
        weight: [hidden], of the norm.
        eps: of the norm.
    """
    peer = group.peer
    if peer is not None and peer.supports(x.nbytes):
        return peer.all_reduce_add_rms_norm_(x, residual, weight, eps)[0]
    group.all_reduce_(x)
    return ops.fused_add_rms_norm(x, residual, weight, eps)[0]
