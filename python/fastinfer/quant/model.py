"""Quantise the linear layers of anybody's model in place, without calibration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from .canonical import QuantError
from .config import matches
from .layers import QuantLinear, W8A8Linear
from .rtn import GridOptions, rtn, rtn_int8


@torch.no_grad()
def quantize_model(
    module: nn.Module,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    skip: Sequence[str] = ("lm_head",),
    activations: str | None = None,
) -> nn.Module:
    """Replace every `nn.Linear` of a module by a quantised one, rounding to nearest.

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
    options = GridOptions(bits, group_size, symmetric, torch.float32)
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
        try:
            weight = rtn(child.weight, options) if activations is None else rtn_int8(child.weight)
        except QuantError as error:
            raise QuantError(f"quantize_model: {name}: {error}") from error
        weight.bias = None if child.bias is None else child.bias.detach()
        layer = QuantLinear if activations is None else W8A8Linear
        setattr(module.get_submodule(parent), attribute, layer.from_canonical(weight))
    return module
