"""Writes quantised layers in the format asked for, and complete checkpoint folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
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


def save_atomically(tensors: Mapping[str, Tensor], file: Path) -> None:
    """A safetensors file that is either complete or not there."""
    partial = file.with_suffix(".partial")
    save_file(dict(tensors), partial, metadata={"format": "pt"})
    os.replace(partial, file)


def write_json(content: Any, file: Path) -> None:
    """A JSON file that is either complete or not there."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, file)


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
        tensors = {}
        for file in dict.fromkeys(file for file, _ in shard):
            with safe_open(file, framework="pt") as handle:
                for owner, tensor in shard:
                    if owner == file:
                        tensors[tensor] = handle.get_tensor(tensor)
        save_atomically(tensors, out / name)
        weight_map |= dict.fromkeys(tensors, name)
        total_size += sum(t.numel() * t.element_size() for t in tensors.values())
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


def _assign(files: Sequence[Path], limit: int) -> list[list[tuple[Path, str]]]:
    """(file, tensor) pairs per shard, in order."""
    shards: list[list[tuple[Path, str]]] = [[]]
    filled = 0
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                size = _bytes(handle.get_slice(name))
                if shards[-1] and filled + size > limit:
                    shards.append([])
                    filled = 0
                shards[-1].append((file, name))
                filled += size
    return shards


_ITEM = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


def _bytes(header: Any) -> int:
    count = 1
    for extent in header.get_shape():
        count *= extent
    return count * _ITEM.get(header.get_dtype(), 1)
