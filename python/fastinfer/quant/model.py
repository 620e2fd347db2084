"""Quantise the linear layers of anybody's model in place, without calibration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastinfer import ops

from .canonical import CanonicalWeight, Int8Weight, QuantError
from .config import matches
from .layers import QuantLinear, W8A8Linear


@torch.no_grad()
def quantize_model(
    module: nn.Module,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    skip: Sequence[str] = ("lm_head",),
    activations: str | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Replace every `nn.Linear` of a module by a quantised one, rounding to nearest.

    Each layer is quantised and packed on the device its weight is on; codes and scales are the same
    bits on every device.

    Layers whose weight is shared with another module (a tied output head) and subclasses of
    `nn.Linear` stay as they are.

    Args:
        module: any model; it is changed in place.
        bits: 4 or 8.
        group_size: input channels per scale: a multiple of 8, or -1 for one scale per output
            channel. Ignored with `activations`.
        symmetric: False adds zero points.
        skip: names of layers to leave: full names, whole dotted parts of them, or "re:" patterns.
        activations: "int8_token": multiply in int8, activations quantised per token (needs
            bits=8).
        scale_dtype: of the scales: fp32, fp16 or bf16; codes are computed from the rounded scales.
            Ignored with `activations`, whose scales are fp32.

    Returns:
        The same module.

    Raises:
        ValueError: an option is wrong.
        QuantError: a weight is on the meta device, or holds NaN or infinity; the message names it.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        >>> quantize_model(model, bits=4, group_size=64)
    """
    if activations not in (None, "int8_token"):
        raise ValueError(
            f"quantize_model: activations must be None or 'int8_token', got {activations!r}"
        )
    if activations is not None and (bits != 8 or not symmetric):
        raise ValueError(
            "quantize_model: activations='int8_token' must go with bits=8 and symmetric=True, got "
            f"bits={bits} and symmetric={symmetric}"
        )
    if group_size != -1 and (group_size < 8 or group_size % 8):
        raise ValueError(
            f"quantize_model: group_size must be -1 or a positive multiple of 8, got {group_size}"
        )
    if scale_dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"quantize_model: scale_dtype must be float32, float16 or bfloat16, got {scale_dtype}"
        )
    if bits not in (4, 8):
        raise ValueError(f"quantize_model: bits must be 4 or 8, got {bits}")
    uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    for name, child in list(module.named_modules()):
        if type(child) is not nn.Linear or any(matches(pattern, name) for pattern in skip):
            continue
        if uses[id(child.weight)] > 1:
            continue
        parent, _, attribute = name.rpartition(".")
        if not attribute:
            raise ValueError(
                "quantize_model: module must contain linear layers, got a linear layer itself; "
                "use QuantLinear.from_canonical"
            )
        if child.weight.is_meta:
            raise QuantError(f"quantize_model: {name} must have memory, got the meta device")
        layer: QuantLinear | W8A8Linear
        bias = None if child.bias is None else child.bias.detach()
        if activations is None:
            weight = _nearest(name, child.weight, bits, group_size, symmetric, scale_dtype)
            weight.bias = bias
            layer = QuantLinear.from_canonical(weight)
        else:
            rows = _nearest_int8(name, child.weight)
            rows.bias = bias
            layer = W8A8Linear.from_canonical(rows)
        layer.train(child.training)
        setattr(module.get_submodule(parent), attribute, layer)
    return module


def _nearest(
    name: str,
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> CanonicalWeight:
    codes, scales, zeros = ops.quantize_weight(
        _plain(weight), bits, group_size, symmetric=symmetric, scale_dtype=scale_dtype
    )
    _check_finite(name, scales)
    return CanonicalWeight(codes, scales, zeros, bits, group_size)


def _nearest_int8(name: str, weight: Tensor) -> Int8Weight:
    codes, scales, _ = ops.quantize_per_token(_plain(weight))
    _check_finite(name, scales)
    return Int8Weight(codes, scales)


def _plain(weight: Tensor) -> Tensor:
    """As the quantisers take it."""
    weight = weight.detach()
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        weight = weight.float()
    return weight.contiguous()


def _check_finite(name: str, scales: Tensor) -> None:
    """A group that holds NaN or infinity has a scale of NaN."""
    if bool(scales.isnan().any()):
        raise QuantError(f"quantize_model: {name}: weights must be finite, got NaN or infinity")
