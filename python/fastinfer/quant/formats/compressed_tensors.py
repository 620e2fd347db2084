"""compressed-tensors checkpoints: pack-quantized (4 and 8 bits) and int-quantized.

pack-quantized

    weight_packed      int32 [N, ceil(K * bits / 32)]   codes packed along K, natural order
    weight_scale       float [N, G] (per tensor: one value)
    weight_shape       int64 [2]                        N, K
    weight_zero_point  int32 [ceil(N * bits / 32), G]   packed along N; older files int8 [N, G]
    weight_g_idx       int32 [K]                        group of each input channel (act-order)

Packed codes and packed zero points are the signed value + 2^(bits-1).

int-quantized

    weight             int8 [N, K]                      signed codes
    weight_scale       float [N, G] or [N, 1], [N], one value
    weight_zero_point  int8, as weight_scale

Reference: the compressed-tensors and llm-compressor projects.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..bits import unpack_words
from ..canonical import CanonicalWeight, Int8Weight, QuantError
from ..config import LinearScheme
from .common import FLOATS, ceil_div, num_groups, ordered, take

_SMALL_INTS = (torch.int8, torch.int16, torch.int32, torch.int64)


def tensor_names(prefix: str, scheme: LinearScheme) -> dict[str, bool]:
    """Name -> whether it must be there."""
    packed = scheme.style == "pack-quantized"
    return {
        f"{prefix}.weight_packed" if packed else f"{prefix}.weight": True,
        f"{prefix}.weight_scale": True,
        f"{prefix}.weight_zero_point": not scheme.symmetric,
        f"{prefix}.weight_g_idx": False,
        f"{prefix}.weight_shape": False,
    }


def read(
    prefix: str,
    tensors: Mapping[str, Tensor],
    scheme: LinearScheme,
    in_features: int,
    out_features: int,
) -> CanonicalWeight | Int8Weight | Tensor:
    """See `formats.read_linear`."""
    bits, k, n = scheme.bits, in_features, out_features
    middle = 1 << (bits - 1)
    _check_shape(prefix, tensors, n, k)
    if scheme.style == "pack-quantized":
        words = take(
            tensors,
            f"{prefix}.weight_packed",
            (n, ceil_div(k * bits, 32)),
            (torch.int32,),
            f"[out, in * {bits} / 32] for {k} -> {n} features",
        )
        codes = unpack_words(words, bits, 1, size=k)
    else:
        signed = take(tensors, f"{prefix}.weight", (n, k), (torch.int8,), "[out, in]")
        codes = _unsigned(f"{prefix}.weight", signed, bits)
    groups = num_groups(k, scheme.group_size)
    why = f"[out, groups] with group_size {scheme.group_size}"
    name = f"{prefix}.weight_scale"
    scales = _per_group(name, take(tensors, name, None, FLOATS), n, groups, why)
    zeros = _zeros(prefix, tensors, scheme, n, groups)
    if scheme.activations is not None:
        return Int8Weight(
            (codes.to(torch.int16) - middle).to(torch.int8), scales.reshape(n).float()
        )
    weight = CanonicalWeight(codes.contiguous(), scales, zeros, bits, scheme.group_size)
    index = f"{prefix}.weight_g_idx"
    return ordered(prefix, weight, tensors.get(index), index)


def _check_shape(prefix: str, tensors: Mapping[str, Tensor], n: int, k: int) -> None:
    name = f"{prefix}.weight_shape"
    if name not in tensors:
        return
    shape = take(tensors, name, (2,), (torch.int32, torch.int64))
    if shape.tolist() != [n, k]:
        raise QuantError(
            f"{name}: must hold [{n}, {k}], the layer's shape, got {shape.tolist()}; check that "
            "config.json belongs to these weights"
        )


def _per_group(name: str, tensor: Tensor, n: int, groups: int, why: str) -> Tensor:
    """[N, G] from the shapes in use: [N, G], [N] or one value."""
    if tuple(tensor.shape) == (n, groups):
        return tensor.contiguous()
    if groups == 1 and tensor.numel() == 1:
        return tensor.reshape(1, 1).expand(n, 1).contiguous()
    if groups == 1 and tuple(tensor.shape) == (n,):
        return tensor.reshape(n, 1).contiguous()
    raise QuantError(
        f"{name}: must be [{n}, {groups}] ({why}), got {list(tensor.shape)}; check that "
        "quantization_config belongs to these weights"
    )


def _zeros(
    prefix: str, tensors: Mapping[str, Tensor], scheme: LinearScheme, n: int, groups: int
) -> Tensor | None:
    """uint8 [N, G] or None. Packed zero points are int32; unpacked ones have a smaller dtype."""
    name, bits = f"{prefix}.weight_zero_point", scheme.bits
    middle = 1 << (bits - 1)
    if scheme.symmetric and name not in tensors:
        return None
    stored = take(tensors, name, None, _SMALL_INTS)
    packed_shape = (ceil_div(n * bits, 32), groups)
    if stored.dtype == torch.int32 and scheme.style == "pack-quantized":
        stored = take(
            tensors,
            name,
            packed_shape,
            (torch.int32,),
            f"[out * {bits} / 32, groups] with group_size {scheme.group_size}",
        )
        zeros = unpack_words(stored, bits, 0, size=n).contiguous()
    else:
        why = f"[out, groups] with group_size {scheme.group_size}"
        zeros = _unsigned(name, _per_group(name, stored, n, groups, why), bits)
    if scheme.symmetric:
        if bool((zeros != middle).any()):
            raise QuantError(
                f"{name}: must hold zeros only in a symmetric scheme, got others; check that "
                "quantization_config belongs to these weights"
            )
        return None
    return zeros


def _unsigned(name: str, signed: Tensor, bits: int) -> Tensor:
    """Signed codes as uint8 codes."""
    middle = 1 << (bits - 1)
    if bits < 8 and signed.numel() and (int(signed.min()), int(signed.max())) != (0, 0):
        low, high = int(signed.min()), int(signed.max())
        if low < -middle or high >= middle:
            raise QuantError(
                f"{name}: values must be in {-middle}..{middle - 1} ({bits} bits), got "
                f"{low}..{high}; check that quantization_config belongs to these weights"
            )
    return (signed.to(torch.int16) + middle).to(torch.uint8)
