"""Checkpoint formats: which tensors a quantised linear layer is stored in, and how to read them.

Each module has `tensor_names(prefix, scheme)`, `layout(prefix, scheme, in_features, out_features)`
and `read(prefix, tensors, scheme, in_features, out_features)`; formats that are also written have
`write` and `write_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ...checkpoint import Cut
from ..canonical import CanonicalWeight, Int8Weight
from ..config import LinearScheme
from . import awq, bitsandbytes, compressed_tensors, gptq, native
from .common import take

_FORMATS: dict[str, ModuleType] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "bitsandbytes": bitsandbytes,
    "fastinfer": native,
}

_DTYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

Stored = CanonicalWeight | Int8Weight | Tensor  # a Tensor is the dequantised weight [N, K]


def tensor_names(prefix: str, scheme: LinearScheme) -> dict[str, bool]:
    """Names of the tensors that hold the weight of one linear layer.

    Args:
        prefix: full checkpoint name of the layer, e.g. `model.layers.0.mlp.down_proj`.
        scheme: how it is stored.

    Returns:
        Name -> whether it must be there. The bias is not among them.
    """
    return _FORMATS[scheme.method].tensor_names(prefix, scheme)


def read_linear(
    prefix: str,
    tensors: Mapping[str, Tensor],
    scheme: LinearScheme,
    in_features: int,
    out_features: int,
) -> Stored:
    """Read one linear layer.

    Args:
        prefix: full checkpoint name of the layer.
        tensors: name -> tensor, at least those of `tensor_names`. A `<prefix>.bias` is passed on.
        scheme: how it is stored.
        in_features: K.
        out_features: N.

    Returns:
        A weight for `QuantLinear` or `W8A8Linear`, or, where no kernel reads the stored form, the
        dequantised weight, fp32 [N, K].

    Raises:
        QuantError: a tensor is missing, has another shape or dtype, or holds impossible values; the
            message names it.
    """
    reader = _FORMATS[scheme.method]
    stored = reader.read(prefix, tensors, scheme, in_features, out_features)
    if isinstance(stored, Tensor):
        return stored
    stored.bias = tensors.get(f"{prefix}.bias")
    return stored.validate(prefix)


@dataclass(frozen=True, slots=True)
class Codes:
    """The tensor that holds the codes of a layer, nearly all of its bytes: [N, K] in some packing.

    Attributes:
        name: of the tensor.
        rows_first: whether it is [N / per_row, K / per_column], or the transpose.
        per_row, per_column: output rows and input channels that share an element.
    """

    name: str
    rows_first: bool
    per_row: int = 1
    per_column: int = 1

    def part(self, rows: tuple[int, int], columns: tuple[int, int]) -> Cut:
        """What has to be read for these rows and columns of the weight."""
        n = (rows[0] // self.per_row, -(-rows[1] // self.per_row))
        k = (columns[0] // self.per_column, -(-columns[1] // self.per_column))
        return Cut((n,), k) if self.rows_first else Cut((k,), n)


def codes_of(prefix: str, scheme: LinearScheme) -> Codes | None:
    """Where the codes of a layer are; None: not in two dimensions."""
    words = 32 // scheme.bits
    if scheme.method == "awq":
        return Codes(f"{prefix}.qweight", rows_first=False, per_row=words)
    if scheme.style == "pack-quantized":
        return Codes(f"{prefix}.weight_packed", rows_first=True, per_column=words)
    if scheme.method == "gptq" or (scheme.method == "fastinfer" and scheme.activations is None):
        return Codes(f"{prefix}.qweight", rows_first=False, per_column=words)
    if scheme.method == "bitsandbytes" and scheme.style != "int8":
        return None
    return Codes(f"{prefix}.weight", rows_first=True)


def check_headers(
    prefix: str,
    scheme: LinearScheme,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    in_features: int,
    out_features: int,
) -> None:
    """Check shapes and dtypes of one layer's tensors without their data.

    Args:
        prefix: full checkpoint name of the layer.
        scheme: how it is stored.
        shapes: tensor name -> shape, for all tensors of the checkpoint.
        dtypes: tensor name -> dtype as safetensors spells it.
        in_features: K.
        out_features: N.

    Raises:
        QuantError: as `read_linear`.
    """
    expected = _FORMATS[scheme.method].layout(prefix, scheme, in_features, out_features)
    for name, must in tensor_names(prefix, scheme).items():
        if name in expected and (must or name in shapes):
            # Dtypes that no format uses get one that is never right.
            headers = {
                n: torch.empty(shapes[n], dtype=_DTYPES.get(dtypes[n], torch.bool), device="meta")
                for n in (name,)
                if n in shapes
            }
            take(headers, name, expected[name])


def is_plain(prefix: str, scheme: LinearScheme, dtypes: Mapping[str, str]) -> bool:
    """Whether a layer is stored in floating point although the configuration says otherwise.

    Published files leave modules out of their ignore lists; what is in the file counts.

    Args:
        prefix: full checkpoint name of the layer.
        scheme: what the configuration says.
        dtypes: tensor name -> dtype as safetensors spells it, for all tensors of the checkpoint.
    """
    weight = f"{prefix}.weight"
    others = [name for name, must in tensor_names(prefix, scheme).items() if must]
    return dtypes.get(weight) in ("F16", "BF16", "F32") and not any(
        name in dtypes for name in others if name != weight
    )
