"""bitsandbytes checkpoints: int8 (LLM.int8) and the 4-bit codebooks nf4 and fp4.

int8: `weight` int8 [N, K] and `SCB` fp32 [N], the largest magnitude of each row, so the scale is
SCB / 127. It is read as an 8-bit weight-only layer, exactly; the outlier decomposition of the
activations that LLM.int8 adds is not needed with activations in full precision.

nf4 and fp4: `weight` uint8 [N * K / 2, 1] (or other bytes, see `bnb_4bit_quant_storage`), two codes
per byte, high half first, over the flattened matrix. Each block of `blocksize` values has a scale:

    weight.absmax                                    float [blocks], or uint8 when itself quantised
    weight.quant_map                                 fp32 [16], the codebook
    weight.nested_absmax, weight.nested_quant_map    scales of the scales, codebook [256]
    weight.quant_state.bitsandbytes__nf4 (or fp4)    uint8: JSON with shape, blocksize, ...

    w = quant_map[code] * absmax[block]
    absmax[i] = nested_quant_map[stored[i]] * nested_absmax[i // nested_blocksize] + nested_offset

No kernel reads these codebooks, so such layers are dequantised while loading.

Reference: Dettmers et al., "LLM.int8()", 2022, and "QLoRA", 2023; the bitsandbytes project.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..canonical import CanonicalWeight, QuantError
from ..config import LinearScheme
from ..notes import note
from .common import FLOATS, Expected, ceil_div, take

_BYTES = (torch.uint8, torch.int8, *FLOATS)


def tensor_names(prefix: str, scheme: LinearScheme) -> dict[str, bool]:
    """Name -> whether it must be there."""
    if scheme.style == "int8":
        return {f"{prefix}.weight": True, f"{prefix}.SCB": True, f"{prefix}.weight_format": False}
    return {
        f"{prefix}.weight": True,
        f"{prefix}.weight.absmax": True,
        f"{prefix}.weight.quant_map": True,
        f"{prefix}.weight.quant_state.bitsandbytes__{scheme.style}": True,
        f"{prefix}.weight.nested_absmax": False,
        f"{prefix}.weight.nested_quant_map": False,
    }


def layout(prefix: str, scheme: LinearScheme, k: int, n: int) -> dict[str, Expected]:
    """What the tensors of a layer with K inputs and N outputs must be, as far as headers tell."""
    if scheme.style == "int8":
        return {
            f"{prefix}.weight": Expected((torch.int8,), (n, k), "[out, in]"),
            f"{prefix}.SCB": Expected(FLOATS),
        }
    return {
        f"{prefix}.weight": Expected(_BYTES),
        f"{prefix}.weight.quant_map": Expected(FLOATS, (16,)),
        f"{prefix}.weight.nested_quant_map": Expected(FLOATS, (256,)),
    }


def read(
    prefix: str,
    tensors: Mapping[str, Tensor],
    scheme: LinearScheme,
    in_features: int,
    out_features: int,
) -> CanonicalWeight | Tensor:
    """See `formats.read_linear`."""
    expected = layout(prefix, scheme, in_features, out_features)
    if scheme.style == "int8":
        return _read_int8(prefix, tensors, expected, out_features)
    note(
        prefix,
        f"bitsandbytes {scheme.style} has no kernel of its own, so the weights are dequantised at "
        "load (full size in memory); requantize=4 or 8 quantises them again",
    )
    return _read_codebook(f"{prefix}.weight", tensors, scheme.style, in_features, out_features)


def _read_int8(
    prefix: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Expected], n: int
) -> CanonicalWeight:
    layout = tensors.get(f"{prefix}.weight_format")
    if layout is not None and layout.numel() == 1 and int(layout) != 0:
        raise QuantError(
            f"{prefix}.weight_format: must be 0 (row-major), got {int(layout)}, a layout of one "
            "GPU; save the model again with a newer bitsandbytes"
        )
    signed = take(tensors, f"{prefix}.weight", expected[f"{prefix}.weight"])
    largest = take(tensors, f"{prefix}.SCB", expected[f"{prefix}.SCB"])
    if largest.numel() != n:
        raise QuantError(
            f"{prefix}.SCB: must be [{n}], one value per output channel, got "
            f"{list(largest.shape)}; check that config.json belongs to these weights"
        )
    return CanonicalWeight(
        codes=(signed.to(torch.int16) + 128).to(torch.uint8),
        scales=(largest.float() / 127).reshape(n, 1),
        zeros=None,
        bits=8,
        group_size=-1,
    )


def _read_codebook(name: str, tensors: Mapping[str, Tensor], kind: str, k: int, n: int) -> Tensor:
    """The weight, fp32 [N, K]."""
    state = _state(f"{name}.quant_state.bitsandbytes__{kind}", tensors)
    if list(state.get("shape", ())) != [n, k]:
        raise QuantError(
            f"{name}: must have shape [{n}, {k}], got {state.get('shape')} in its quant_state; "
            "check that config.json belongs to these weights"
        )
    stored = take(tensors, name, Expected(_BYTES)).contiguous().view(torch.uint8).flatten()
    count = n * k
    if stored.numel() != ceil_div(count, 2):
        raise QuantError(
            f"{name}: must be {ceil_div(count, 2)} bytes (two codes each), got {stored.numel()}; "
            "the file is damaged"
        )
    codes = torch.stack([stored >> 4, stored & 15], dim=1).flatten()[:count]
    codebook = take(tensors, f"{name}.quant_map", Expected(FLOATS, (16,))).float()
    blocksize = int(state.get("blocksize", 64))
    blocks = ceil_div(count, blocksize)
    absmax = _absmax(name, tensors, state, blocks)
    values = codebook[codes.long()]
    padded = torch.nn.functional.pad(values, (0, blocks * blocksize - count))
    scaled = padded.view(blocks, blocksize) * absmax[:, None]
    weight = scaled.flatten()[:count].view(n, k)
    if not bool(torch.isfinite(weight).all()):
        raise QuantError(f"{name}: values must be finite, got NaN or infinity; the file is damaged")
    return weight


def _absmax(
    name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any], blocks: int
) -> Tensor:
    """fp32 [blocks]."""
    why = f"[blocks] with blocksize {state.get('blocksize', 64)}"
    stored = take(tensors, f"{name}.absmax", Expected((torch.uint8, *FLOATS), (blocks,), why))
    if stored.dtype != torch.uint8:
        return stored.float()
    size = int(state.get("nested_blocksize", 256))
    inner = take(tensors, f"{name}.nested_absmax", Expected(FLOATS, (ceil_div(blocks, size),)))
    codebook = take(tensors, f"{name}.nested_quant_map", Expected(FLOATS, (256,))).float()
    group = torch.arange(blocks, device=stored.device) // size
    return codebook[stored.long()] * inner.float()[group] + float(state.get("nested_offset", 0.0))


def _state(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    raw = bytes(take(tensors, name, Expected((torch.uint8,))).flatten().tolist())
    try:
        state = json.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise QuantError(f"{name}: must hold JSON, got {error}; the file is damaged") from error
    return dict(state)
