"""What the formats share: taking tensors with a check, group indices, one sentence per mistake."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..canonical import CanonicalWeight, QuantError
from ..notes import note

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INT32 = (torch.int32,)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def num_groups(in_features: int, group_size: int) -> int:
    return 1 if group_size == -1 else ceil_div(in_features, group_size)


@dataclass(frozen=True, slots=True)
class Expected:
    """What a tensor must be; `shape` None: any. `why` explains the shape in messages."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...] | None = None
    why: str = ""


def take(tensors: Mapping[str, Tensor], name: str, expected: Expected) -> Tensor:
    """The named tensor, after checking dtype and shape.

    Raises:
        QuantError: it is missing, or of another dtype or shape.
    """
    if name not in tensors:
        raise QuantError(
            f"{name}: must be in the checkpoint, got no such tensor; check that "
            "quantization_config belongs to these weights and that no shard is missing"
        )
    tensor, shape = tensors[name], expected.shape
    if tensor.dtype not in expected.dtypes or (shape is not None and tuple(tensor.shape) != shape):
        wanted = " or ".join(str(dtype) for dtype in expected.dtypes)
        size = "" if shape is None else f" {list(shape)}"
        raise QuantError(
            f"{name}: must be {wanted}{size}{f' ({expected.why})' if expected.why else ''}, got "
            f"{tensor.dtype} {list(tensor.shape)}; check that quantization_config belongs to these "
            "weights"
        )
    return tensor


def ordered(
    prefix: str,
    weight: CanonicalWeight,
    g_idx: Tensor | None,
    index_name: str,
) -> CanonicalWeight | Tensor:
    """Apply a group index to a weight whose columns are in original order.

    A trivial index (absent, empty, all equal, all -1, or 0..0 1..1 2..2) is dropped. Scattered
    groups of regular size are sorted into runs: `perm` remembers the order. Groups of irregular
    size have no kernel: the weight is dequantised, and a note says so.

    Args:
        prefix: name of the layer.
        weight: codes [N, K] in original column order.
        g_idx: integer [K], group of each column, or None.
        index_name: name of the index tensor, for messages.

    Raises:
        QuantError: the index has another length or points outside of the groups.
    """
    if g_idx is None or g_idx.numel() == 0:
        return weight
    k, groups = weight.in_features, weight.groups
    if g_idx.shape != (k,) or g_idx.dtype not in (torch.int32, torch.int64):
        raise QuantError(
            f"{index_name}: must be torch.int32 [{k}], one group number per input channel, got "
            f"{g_idx.dtype} {list(g_idx.shape)}; check that quantization_config belongs to these "
            "weights"
        )
    low, high = int(g_idx.min()), int(g_idx.max())
    if low == high and low in (-1, 0):
        return weight
    if low < 0 or high >= groups:
        raise QuantError(
            f"{index_name}: group numbers must be in 0..{groups - 1} (scales have {groups} "
            f"groups), got {low}..{high}; the file is damaged"
        )
    if low == high or groups == 1:
        return weight
    regular = torch.arange(k, device=g_idx.device) // weight.group_size
    if torch.equal(g_idx.long(), regular):
        return weight
    perm = torch.argsort(g_idx, stable=True)
    if torch.equal(g_idx[perm].long(), regular):
        weight.codes = weight.codes[:, perm].contiguous()
        weight.perm = perm.to(torch.int32)
        return weight
    note(prefix, "dequantised, because its groups of input channels are of irregular size")
    index = g_idx.long()
    codes, scales = weight.codes.float(), weight.scales.float()[:, index]
    if weight.zeros is None:
        return (codes - weight.middle) * scales
    return (codes - weight.zeros.float()[:, index]) * scales
