"""AWQ checkpoints in the GEMM layout, 4 bits.

    qweight int32 [K, N / 8]   codes packed along N, interleaved 0 2 4 6 1 3 5 7
    qzeros  int32 [G, N / 8]   zero points, same order, as they are
    scales  float [G, N]

Reference: Lin et al., "AWQ", 2023; the AutoAWQ project.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bits import pack_words, unpack_words
from ..canonical import CanonicalWeight, QuantError, has_float_zeros
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


def write(prefix: str, weight: CanonicalWeight) -> dict[str, Tensor]:
    """The tensors of one linear layer, its bias included.

    Zero points are always written: readers of this layout expect them.

    Raises:
        QuantError: the layout cannot hold such a weight.
    """
    n, k = weight.codes.shape
    size = k if weight.group_size == -1 else weight.group_size
    if weight.bits != 4 or weight.perm is not None or has_float_zeros(weight):
        raise QuantError(
            f"{prefix}: weights must have 4 bits, integer zeros and no act-order to be written as "
            f"AWQ, got {weight.bits} bits; use another format"
        )
    if n % 8 or k % max(size, 1):
        raise QuantError(
            f"{prefix}: out_features must be a multiple of 8 and in_features one of group_size to "
            f"be written as AWQ, got {n}, {k} and {size}; use another group size or format"
        )
    zeros = weight.zeros
    if zeros is None:
        zeros = torch.full(weight.scales.shape, weight.middle, dtype=torch.uint8)
    tensors = {
        f"{prefix}.qweight": pack_words(weight.codes.t(), 4, 1, awq=True).contiguous(),
        f"{prefix}.qzeros": pack_words(zeros.t(), 4, 1, awq=True).contiguous(),
        f"{prefix}.scales": weight.scales.t().contiguous(),
    }
    if weight.bias is not None:
        tensors[f"{prefix}.bias"] = weight.bias.contiguous()
    return tensors


def write_config(
    scheme: LinearScheme, ignore: Sequence[str] = (), *, lm_head: bool = False
) -> dict[str, Any]:
    """`quantization_config`; arguments as in `gptq.write_config`.

    Raises:
        QuantError: the head is quantised, which no reader of this format expects.
    """
    if lm_head:
        raise QuantError("lm_head: must stay in floating point in AWQ checkpoints; skip it")
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": scheme.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [name for name in ignore if name != "lm_head"] or None,
    }
