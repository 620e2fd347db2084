"""Writes quantised layers in the format asked for, and complete checkpoint folders."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoint import INDEX, SINGLE
from .canonical import CanonicalWeight, Int8Weight, QuantError
from .config import LinearScheme
from .formats import awq, compressed_tensors, gptq, native

# Name on the command line -> (quant_method, style of the scheme).
FORMATS = {
    "gptq": ("gptq", "gptq"),
    "gptq_v2": ("gptq", "gptq_v2"),
    "awq": ("awq", "gemm"),
    "compressed-tensors": ("compressed-tensors", "pack-quantized"),
    "native": ("fastinfer", ""),
}
MAX_SHARD_BYTES = 4_000_000_000
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5", ".py")
_OWN_NAMES = ("config.json", INDEX, "quantize_config.json", "quant_config.json")
_MAX_COPIED_BYTES = 64_000_000


def check_format(
    name: str,
    layer: str,
    shape: tuple[int, int],
    *,
    bits: int,
    group_size: int,
    int8: bool,
    permuted: bool,
    common: int,
) -> None:
    """Refuse, before any work is done, what a format cannot hold.

    Args:
        name: one of FORMATS.
        layer: name of the layer.
        shape: N, K.
        bits: of the weights.
        group_size: as in `GridOptions`.
        int8: W8A8.
        permuted: act-order without static groups.
        common: what divides the input channels of all layers, to suggest a group size that fits.

    Raises:
        ValueError: with the reason and what to use instead.
    """
    n, k = shape
    size = k if group_size == -1 else group_size
    fitting = next((g for g in (128, 64, 32, 16, 8) if common % g == 0), -1)
    hint = f"use --group-size {fitting}"
    if int8 and name not in ("compressed-tensors", "native"):
        raise ValueError(
            f"quantize: format must be compressed-tensors or native for W8A8 weights, got {name!r}"
        )
    if name in ("awq", "compressed-tensors") and k % max(size, 1):
        raise ValueError(
            f"quantize: group_size must divide the {k} input channels of {layer} in the {name} "
            f"format, got {group_size}; {hint} or --format native"
        )
    if name == "awq" and (bits != 4 or n % 8 or permuted or layer == "lm_head"):
        raise ValueError(
            f"quantize: format awq needs 4 bits, out_features in multiples of 8, no act-order and "
            f"an lm_head in floating point, got {bits} bits and {n} for {layer}; use another "
            "--format"
        )
    if size % 8:
        raise ValueError(
            f"quantize: group_size must be -1 or a multiple of 8, got {group_size}; {hint}"
        )


def write_linear(name: str, prefix: str, weight: CanonicalWeight | Int8Weight) -> dict[str, Tensor]:
    """The tensors of one layer in the format `name` (one of FORMATS)."""
    if name == "compressed-tensors":
        return compressed_tensors.write(prefix, weight)
    if name == "native":
        return native.write(prefix, weight)
    if isinstance(weight, Int8Weight):
        raise QuantError(f"{prefix}: W8A8 weights cannot be written as {name}")
    if name == "awq":
        return awq.write(prefix, weight)
    return gptq.write(prefix, weight, style=name)


def format_config(
    name: str,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    permuted: bool = False,
    int8: bool = False,
    ignore: Sequence[str] = (),
    lm_head: bool = False,
) -> dict[str, Any]:
    """The `quantization_config` that goes with `write_linear`."""
    method, style = FORMATS[name]
    scheme = LinearScheme(
        method,
        bits,
        group_size,
        symmetric,
        act_order=permuted,
        style=style,
        activations="int8_token" if int8 else None,
    )
    module = {"gptq": gptq, "awq": awq, "fastinfer": native}.get(method, compressed_tensors)
    return module.write_config(scheme, ignore, lm_head=lm_head)


_DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_ITEM = {name: dtype.itemsize for dtype, name in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor to write, and where to get it."""

    name: str
    dtype: str
    shape: list[int]
    get: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _ITEM[self.dtype]


def save_atomically(tensors: Mapping[str, Tensor], file: Path) -> None:
    """A safetensors file that is either complete or not there."""
    _write(
        [
            _Entry(name, _DTYPES[t.dtype], list(t.shape), lambda t=t: t)
            for name, t in tensors.items()
        ],
        file,
    )


def _write(entries: Sequence[_Entry], file: Path) -> None:
    """A safetensors file; tensors are fetched one at a time."""
    # Large items first, so that every tensor is aligned.
    entries = sorted(entries, key=lambda entry: -_ITEM[entry.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unfinished = file.with_suffix(".partial")
    with open(unfinished, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            flat = entry.get().contiguous().reshape(-1)
            stream.write(flat.view(torch.uint8).numpy())
    os.replace(unfinished, file)


def write_json(content: Any, file: Path) -> None:
    """A JSON file that is either complete or not there."""
    unfinished = file.with_suffix(".partial")
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, file)


def write_checkpoint(
    source: Path,
    out: Path,
    files: Sequence[Path],
    quantization_config: Mapping[str, Any],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Assemble a Hugging Face checkpoint folder.

    Args:
        source: the original folder; tokenizer, generation_config and license files are copied.
        out: where to write.
        files: safetensors files with all tensors.
        quantization_config: goes into config.json, which is written last.
        max_shard_bytes: larger checkpoints are split, one tensor never.
    """
    shards = _assign(files, max_shard_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        total = len(shards)
        names = [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    weight_map, total_size = {}, 0
    for name, shard in zip(names, shards, strict=True):
        _write(shard, out / name)
        weight_map |= {entry.name: name for entry in shard}
        total_size += sum(entry.bytes for entry in shard)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(index, out / INDEX)
    for file in sorted(source.iterdir()):
        if (
            file.is_file()
            and not file.name.startswith(".")
            and file.suffix not in _WEIGHTS
            and file.name not in _OWN_NAMES
            and not file.name.endswith(".index.json")
            and not file.name.lower().startswith("readme")
            and file.stat().st_size <= _MAX_COPIED_BYTES
        ):
            shutil.copyfile(file, out / file.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = dict(quantization_config)
    if quantization_config["quant_method"] == "gptq":
        write_json(dict(quantization_config), out / "quantize_config.json")
    write_json(config, out / "config.json")


def _assign(files: Sequence[Path], limit: int) -> list[list[_Entry]]:
    """The tensors of all files, in order, in shards."""
    shards: list[list[_Entry]] = [[]]
    filled = 0
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                header = handle.get_slice(name)
                entry = _Entry(
                    name, header.get_dtype(), header.get_shape(), partial(_fetch, file, name)
                )
                if shards[-1] and filled + entry.bytes > limit:
                    shards.append([])
                    filled = 0
                shards[-1].append(entry)
                filled += entry.bytes
    return shards


def _fetch(file: Path, name: str) -> Tensor:
    """One tensor; the file is mapped no longer than the tensor lives."""
    with safe_open(file, framework="pt") as handle:
        return handle.get_tensor(name)
