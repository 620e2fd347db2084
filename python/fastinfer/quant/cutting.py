"""A rank's piece of a quantised weight.

Rows are cut anywhere. Columns are cut between groups where that is possible; a cut inside of a
group makes the groups of the piece smaller, with the same scale in several of them, which is exact.
The columns of an act-order weight are in group order: the piece is a run of that order, and the
input channels it multiplies may be anywhere; their numbers are returned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .canonical import CanonicalWeight, Int8Weight, concat, concat_int8
from .formats import Stored


def cut_rows(weight: Stored, rows: Sequence[tuple[int, int]]) -> Stored:
    """These ranges of output rows, one after the other."""
    if isinstance(weight, Tensor):
        return torch.cat([weight[begin:end] for begin, end in rows])
    if isinstance(weight, Int8Weight):
        return concat_int8([weight.rows(begin, end) for begin, end in rows])
    return concat([weight.rows(begin, end) for begin, end in rows])


def cut_columns(weight: Stored, begin: int, end: int) -> tuple[Stored, Tensor | None]:
    """The columns [begin, end), and the input channels they multiply, if not those very ones."""
    if isinstance(weight, Tensor):
        return weight[:, begin:end].contiguous(), None
    codes = weight.codes[:, begin:end].contiguous()
    if isinstance(weight, Int8Weight):
        return Int8Weight(codes, weight.scales, weight.bias), None
    size, groups = weight.group_size, torch.zeros(1, dtype=torch.int64)
    if size != -1:
        kept = math.gcd(size, begin, 0 if end == weight.in_features else end)
        groups = (begin + torch.arange(0, end - begin, kept)) // size
        size = kept
    groups = groups.to(codes.device)
    piece = CanonicalWeight(
        codes,
        weight.scales[:, groups],
        None if weight.zeros is None else weight.zeros[:, groups],
        weight.bits,
        size,
        None,
        weight.bias,
    )
    return piece, None if weight.perm is None else weight.perm[begin:end].long()
