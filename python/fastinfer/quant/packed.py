"""Canonical weights <-> the packed form that a device's kernels read.

Packing is `fastinfer.ops.pack_weight`; this is the way back, for `state_dict` and for moving a
layer between devices. Weights are packed on the device they are packed for, and unpacked where
they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastinfer import ops

from .canonical import CanonicalWeight

_ROWS_AT_ONCE = 4096  # bounds the fp32 copy that unpacking makes; a multiple of all row blocks


def layout_of(device: torch.device) -> str:
    """Name of the layout that kernels on this device read."""
    return "cuda" if device.type == "cuda" else "cpu"


def pack(weight: CanonicalWeight, device: torch.device) -> ops.PackedWeight:
    """The arguments of `int4_linear` or `int8_linear` on `device`."""
    return ops.pack_weight(
        weight.codes.to(device),
        weight.scales.detach().to(device),
        None if weight.zeros is None else weight.zeros.detach().to(device),
        bits=weight.bits,
        group_size=weight.group_size,
        layout=layout_of(device),
    )


def unpack(
    packed: ops.PackedWeight,
    *,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    scale_dtype: torch.dtype,
    zero_dtype: torch.dtype | None,
) -> CanonicalWeight:
    """The weight that was packed, bit for bit, on the CPU, without `perm` and bias.

    Args:
        packed: from `pack`, either layout.
        bits: 4 or 8.
        group_size: -1 or a positive multiple of 8.
        out_features: N.
        in_features: K.
        scale_dtype: of the scales before packing (the CPU layout widens them to fp32).
        zero_dtype: of the zeros before packing.
    """
    qweight = packed.qweight
    middle = 1 << (bits - 1)
    rows_per_block = 16 if qweight.shape[-1] == 16 else 64
    codes = torch.empty((out_features, in_features), dtype=torch.uint8)
    for begin in range(0, out_features, _ROWS_AT_ONCE):
        end = min(begin + _ROWS_AT_ONCE, out_features)
        blocks = qweight[begin // rows_per_block : -(-end // rows_per_block)]
        # With scales of one the weight is the code minus the middle, exact in fp32.
        shape = (1, blocks.shape[0] * 16) if rows_per_block == 16 else (1, blocks.shape[0], 8, 8)
        signed = ops.dequantize_weight(
            blocks,
            torch.ones(shape, device=qweight.device),
            None,
            bits=bits,
            group_size=-1,
            out_features=end - begin,
            in_features=in_features,
        )
        codes[begin:end].copy_((signed + middle).to(torch.uint8))
    zeros = None
    if packed.zeros is not None:
        zeros = _per_row(packed.zeros, out_features).to(zero_dtype)
    scales = _per_row(packed.scales, out_features).to(scale_dtype)
    return CanonicalWeight(codes, scales, zeros, bits, group_size)


def _per_row(packed: Tensor, out_features: int) -> Tensor:
    """Packed scales or zeros as [N, G]."""
    packed = packed.cpu()
    if packed.dim() == 4:
        # [G, N/64, g8, 2j + h] holds row 64 b + 16 j + 8 h + g8.
        packed = packed.unflatten(3, (4, 2)).permute(0, 1, 3, 4, 2).flatten(1)
    return packed[:, :out_features].t().contiguous()
