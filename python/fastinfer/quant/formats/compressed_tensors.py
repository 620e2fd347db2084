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

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bits import pack_words, unpack_words
from ..canonical import CanonicalWeight, Int8Weight, QuantError, has_float_zeros
from ..config import LinearScheme
from .common import FLOATS, INT32, Expected, ceil_div, num_groups, ordered, take

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


def layout(prefix: str, scheme: LinearScheme, k: int, n: int) -> dict[str, Expected]:
    """What the tensors of a layer with K inputs and N outputs must be."""
    bits, groups = scheme.bits, num_groups(k, scheme.group_size)
    # One scale per channel or tensor comes in several shapes.
    scales = None if groups == 1 else (n, groups)
    return {
        f"{prefix}.weight_packed": Expected(
            INT32,
            (n, ceil_div(k * bits, 32)),
            f"[out, in * {bits} / 32] for {k} -> {n} features",
        ),
        f"{prefix}.weight": Expected((torch.int8,), (n, k), "[out, in]"),
        f"{prefix}.weight_scale": Expected(
            FLOATS, scales, f"[out, groups] with group_size {scheme.group_size}"
        ),
        f"{prefix}.weight_shape": Expected((torch.int32, torch.int64), (2,)),
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
    expected = layout(prefix, scheme, k, n)
    _check_shape(f"{prefix}.weight_shape", tensors, expected, n, k)
    if scheme.style == "pack-quantized":
        words = take(tensors, f"{prefix}.weight_packed", expected[f"{prefix}.weight_packed"])
        codes = unpack_words(words, bits, 1, size=k)
    else:
        signed = take(tensors, f"{prefix}.weight", expected[f"{prefix}.weight"])
        codes = _unsigned(f"{prefix}.weight", signed, bits)
    groups = num_groups(k, scheme.group_size)
    why = f"[out, groups] with group_size {scheme.group_size}"
    name = f"{prefix}.weight_scale"
    scales = _per_group(name, take(tensors, name, expected[name]), n, groups, why)
    zeros = _zeros(prefix, tensors, scheme, n, groups)
    if scheme.activations is not None:
        return Int8Weight(
            (codes.to(torch.int16) - middle).to(torch.int8), scales.reshape(n).float()
        )
    weight = CanonicalWeight(codes.contiguous(), scales, zeros, bits, scheme.group_size)
    index = f"{prefix}.weight_g_idx"
    return ordered(prefix, weight, tensors.get(index), index)


def _check_shape(
    name: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Expected], n: int, k: int
) -> None:
    if name not in tensors:
        return
    shape = take(tensors, name, expected[name])
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
    stored = take(tensors, name, Expected(_SMALL_INTS))
    size = f"with group_size {scheme.group_size}"
    if stored.dtype == torch.int32 and scheme.style == "pack-quantized":
        shape = (ceil_div(n * bits, 32), groups)
        take(tensors, name, Expected(INT32, shape, f"[out * {bits} / 32, groups] {size}"))
        zeros = unpack_words(stored, bits, 0, size=n).contiguous()
    else:
        whole = _per_group(name, stored, n, groups, f"[out, groups] {size}")
        zeros = _unsigned(name, whole, bits)
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


def write(prefix: str, weight: CanonicalWeight | Int8Weight) -> dict[str, Tensor]:
    """The tensors of one linear layer, its bias included: pack-quantized, W8A8 int-quantized.

    Raises:
        QuantError: the zeros are floating point, or the last group is short.
    """
    dot = f"{prefix}."
    tensors = {}
    if isinstance(weight, Int8Weight):
        tensors["weight"] = weight.codes.contiguous()
        tensors["weight_scale"] = weight.scales[:, None].contiguous()
    else:
        n, k = weight.codes.shape
        size = k if weight.group_size == -1 else weight.group_size
        if has_float_zeros(weight) or k % max(size, 1):
            raise QuantError(
                f"{prefix}: zeros must be integers and in_features a multiple of group_size to be "
                f"written as compressed-tensors, got {k} and {size}; use another group size or the "
                "native format"
            )
        codes = weight.codes
        if weight.perm is not None:
            order = weight.perm.long()
            codes = torch.empty_like(codes)
            codes[:, order] = weight.codes
            group = torch.empty(k, dtype=torch.int32)
            group[order] = torch.arange(k, dtype=torch.int32) // size
            tensors["weight_g_idx"] = group
        tensors["weight_packed"] = pack_words(codes, weight.bits, 1).contiguous()
        tensors["weight_scale"] = weight.scales.contiguous()
        tensors["weight_shape"] = torch.tensor([n, k], dtype=torch.int64)
        if weight.zeros is not None:
            tensors["weight_zero_point"] = pack_words(weight.zeros, weight.bits, 0).contiguous()
    if weight.bias is not None:
        tensors["bias"] = weight.bias.contiguous()
    return {dot + name: tensor for name, tensor in tensors.items()}


def write_config(
    scheme: LinearScheme, ignore: Sequence[str] = (), *, lm_head: bool = False
) -> dict[str, Any]:
    """`quantization_config`; arguments as in `gptq.write_config`. All that is not quantised must be
    in `ignore`, the head included.
    """
    int8 = scheme.activations is not None
    style = "int-quantized" if int8 else "pack-quantized"
    per_channel = scheme.group_size == -1
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": bool(scheme.symmetric),
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else scheme.group_size,
        "actorder": "group" if scheme.act_order else None,
        "block_structure": None,
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    activations = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "actorder": None,
        "block_structure": None,
        "dynamic": True,
        "observer": None,
        "observer_kwargs": {},
    }
    head = [] if lm_head or "lm_head" in ignore else ["lm_head"]
    return {
        "quant_method": "compressed-tensors",
        "format": style,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations if int8 else None,
                "output_activations": None,
                "format": style,
            }
        },
        "ignore": [*ignore, *head],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
