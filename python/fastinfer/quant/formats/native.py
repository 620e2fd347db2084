"""fastinfer's own format, which is also the `state_dict` of `QuantLinear` and `W8A8Linear`.

    qweight  int32 [ceil(K * bits / 32), N]   codes packed along K, natural order (as GPTQ)
    scales   float [G, N]
    qzeros   int32 [G, ceil(N * bits / 32)]   integer zero points as they are; absent if symmetric
    zeros    float [G, N]                     floating-point zeros instead of qzeros
    perm     int32 [K]                        packed column j multiplies input channel perm[j]

W8A8 layers:

    weight        int8 [N, K]
    weight_scale  fp32 [N]

`quantization_config`: quant_method "fastinfer", bits, group_size, symmetric, act_order, ignore and
activations (absent or "int8_token").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bits import pack_words, unpack_words
from ..canonical import CanonicalWeight, Int8Weight
from ..config import LinearScheme
from .common import FLOATS, INT32, Expected, ceil_div, num_groups, take


def tensor_names(prefix: str, scheme: LinearScheme) -> dict[str, bool]:
    """Name -> whether it must be there."""
    if scheme.activations is not None:
        return {f"{prefix}.weight": True, f"{prefix}.weight_scale": True}
    return {
        f"{prefix}.qweight": True,
        f"{prefix}.scales": True,
        f"{prefix}.qzeros": False,
        f"{prefix}.zeros": False,
        f"{prefix}.perm": False,
    }


def layout(prefix: str, scheme: LinearScheme, k: int, n: int) -> dict[str, Expected]:
    """What the tensors of a layer with K inputs and N outputs must be."""
    if scheme.activations is not None:
        return {
            f"{prefix}.weight": Expected((torch.int8,), (n, k), "[out, in]"),
            f"{prefix}.weight_scale": Expected((torch.float32,), (n,), "[out]"),
        }
    bits, groups = scheme.bits, num_groups(k, scheme.group_size)
    size = f"with group_size {scheme.group_size}"
    return {
        f"{prefix}.qweight": Expected(
            INT32,
            (ceil_div(k * bits, 32), n),
            f"[in * {bits} / 32, out] for {k} -> {n} features",
        ),
        f"{prefix}.scales": Expected(FLOATS, (groups, n), f"[groups, out] {size}"),
        f"{prefix}.qzeros": Expected(
            INT32, (groups, ceil_div(n * bits, 32)), f"[groups, out * {bits} / 32] {size}"
        ),
        f"{prefix}.zeros": Expected(FLOATS, (groups, n), f"[groups, out] {size}"),
        f"{prefix}.perm": Expected(INT32, (k,), "[in]"),
    }


def read(
    prefix: str,
    tensors: Mapping[str, Tensor],
    scheme: LinearScheme,
    in_features: int,
    out_features: int,
) -> CanonicalWeight | Int8Weight:
    """See `formats.read_linear`."""
    bits, k, n = scheme.bits, in_features, out_features
    expected = layout(prefix, scheme, k, n)

    def get(what: str) -> Tensor:
        return take(tensors, f"{prefix}.{what}", expected[f"{prefix}.{what}"])

    if scheme.activations is not None:
        return Int8Weight(get("weight"), get("weight_scale"))
    words, scales = get("qweight"), get("scales")
    zeros = None
    if f"{prefix}.qzeros" in tensors:
        zeros = unpack_words(get("qzeros"), bits, 1, size=n).t().contiguous()
    elif f"{prefix}.zeros" in tensors:
        zeros = get("zeros").t().contiguous()
    return CanonicalWeight(
        codes=unpack_words(words.t().contiguous(), bits, 1, size=k),
        scales=scales.t().contiguous(),
        zeros=zeros,
        bits=bits,
        group_size=scheme.group_size,
        perm=get("perm") if f"{prefix}.perm" in tensors else None,
    )


def write(prefix: str, weight: CanonicalWeight | Int8Weight) -> dict[str, Tensor]:
    """The tensors of one linear layer, bias included.

    Args:
        prefix: full name of the layer; "" gives bare names.
        weight: what to store.

    Returns:
        Name -> contiguous tensor.
    """
    dot = f"{prefix}." if prefix else ""
    tensors = {}
    if isinstance(weight, Int8Weight):
        tensors["weight"] = weight.codes.contiguous()
        tensors["weight_scale"] = weight.scales.float().contiguous()
    else:
        tensors["qweight"] = pack_words(weight.codes.t(), weight.bits, 0).contiguous()
        tensors["scales"] = weight.scales.t().contiguous()
        if weight.zeros is not None and weight.zeros.dtype == torch.uint8:
            tensors["qzeros"] = pack_words(weight.zeros.t(), weight.bits, 1).contiguous()
        elif weight.zeros is not None:
            tensors["zeros"] = weight.zeros.t().contiguous()
        if weight.perm is not None:
            tensors["perm"] = weight.perm.to(torch.int32).contiguous()
    if weight.bias is not None:
        tensors["bias"] = weight.bias.contiguous()
    return {dot + name: tensor for name, tensor in tensors.items()}


def write_config(
    scheme: LinearScheme, ignore: Sequence[str] = (), *, lm_head: bool = False
) -> dict[str, Any]:
    """`quantization_config`; arguments as in `gptq.write_config`."""
    head = [] if lm_head or "lm_head" in ignore else ["lm_head"]
    config: dict[str, Any] = {
        "quant_method": "fastinfer",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": bool(scheme.symmetric),
        "act_order": scheme.act_order,
        "ignore": [*ignore, *head],
    }
    if scheme.activations is not None:
        config["activations"] = scheme.activations
    return config
