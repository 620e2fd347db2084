"""AWQ checkpoints in the GEMM layout, 4 bits.

    qweight int32 [K, N / 8]   codes packed along N, interleaved 0 2 4 6 1 3 5 7
    qzeros  int32 [G, N / 8]   zero points, same order, as they are
    scales  float [G, N]

Reference: Lin et al., "AWQ", 2023; the AutoAWQ project.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..bits import unpack_words
from ..canonical import CanonicalWeight, QuantError
from ..config import LinearScheme
from .common import FLOATS, INT32, Expected, num_groups, take


def tensor_names(prefix: str, scheme: LinearScheme) -> dict[str, bool]:
    """Name -> whether it must be there."""
    return {
        f"{prefix}.qweight": True,
        f"{prefix}.scales": True,
        f"{prefix}.qzeros": not scheme.symmetric,
    }


def layout(prefix: str, scheme: LinearScheme, k: int, n: int) -> dict[str, Expected]:
    """What the tensors of a layer with K inputs and N outputs must be."""
    if n % 8:
        raise QuantError(
            f"{prefix}: out_features must be a multiple of 8 in the AWQ layout, got {n}; use "
            "another format for this layer"
        )
    groups, size = num_groups(k, scheme.group_size), f"with group_size {scheme.group_size}"
    return {
        f"{prefix}.qweight": Expected(INT32, (k, n // 8), f"[in, out / 8] for {k} -> {n} features"),
        f"{prefix}.scales": Expected(FLOATS, (groups, n), f"[groups, out] {size}"),
        f"{prefix}.qzeros": Expected(INT32, (groups, n // 8), f"[groups, out / 8] {size}"),
    }


def read(
    prefix: str,
    tensors: Mapping[str, Tensor],
    scheme: LinearScheme,
    in_features: int,
    out_features: int,
) -> CanonicalWeight:
    """See `formats.read_linear`."""
    expected = layout(prefix, scheme, in_features, out_features)
    words = take(tensors, f"{prefix}.qweight", expected[f"{prefix}.qweight"])
    scales = take(tensors, f"{prefix}.scales", expected[f"{prefix}.scales"])
    zeros = None
    if f"{prefix}.qzeros" in tensors or not scheme.symmetric:
        packed = take(tensors, f"{prefix}.qzeros", expected[f"{prefix}.qzeros"])
        zeros = unpack_words(packed, 4, 1, awq=True).t().contiguous()
    return CanonicalWeight(
        codes=unpack_words(words, 4, 1, awq=True).t().contiguous(),
        scales=scales.t().contiguous(),
        zeros=zeros,
        bits=4,
        group_size=scheme.group_size,
    )
