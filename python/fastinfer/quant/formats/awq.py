"""AWQ checkpoints in the GEMM layout, 4 bits.

    qweight int32 [K, N / 8]   codes packed along N, interleaved 0 2 4 6 1 3 5 7
    qzeros  int32 [G, N / 8]   zero points, same order, as they are
    scales  float [G, N]

Reference: Lin et al., "AWQ", 2023; the AutoAWQ project.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..bits import unpack_words
from ..canonical import CanonicalWeight, QuantError
from ..config import LinearScheme
from .common import FLOATS, num_groups, take


def tensor_names(prefix: str, scheme: LinearScheme) -> dict[str, bool]:
    """Name -> whether it must be there."""
    return {
        f"{prefix}.qweight": True,
        f"{prefix}.scales": True,
        f"{prefix}.qzeros": not scheme.symmetric,
    }


def read(
    prefix: str,
    tensors: Mapping[str, Tensor],
    scheme: LinearScheme,
    in_features: int,
    out_features: int,
) -> CanonicalWeight:
    """See `formats.read_linear`."""
    k, n = in_features, out_features
    groups = num_groups(k, scheme.group_size)
    if n % 8:
        raise QuantError(
            f"{prefix}: out_features must be a multiple of 8 in the AWQ layout, got {n}; use "
            "another format for this layer"
        )
    words = take(
        tensors,
        f"{prefix}.qweight",
        (k, n // 8),
        (torch.int32,),
        f"[in, out / 8] for {k} -> {n} features",
    )
    why = f"with group_size {scheme.group_size}"
    scales = take(tensors, f"{prefix}.scales", (groups, n), FLOATS, f"[groups, out] {why}")
    zeros = None
    if f"{prefix}.qzeros" in tensors or not scheme.symmetric:
        packed = take(
            tensors,
            f"{prefix}.qzeros",
            (groups, n // 8),
            (torch.int32,),
            f"[groups, out / 8] {why}",
        )
        zeros = unpack_words(packed, 4, 1, awq=True).t().contiguous()
    return CanonicalWeight(
        codes=unpack_words(words, 4, 1, awq=True).t().contiguous(),
        scales=scales.t().contiguous(),
        zeros=zeros,
        bits=4,
        group_size=scheme.group_size,
    )
