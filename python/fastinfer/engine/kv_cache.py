"""Memory of the KV cache: how many blocks, and the tensors they live in.

[2, layers, num_blocks, P, Hkv, D]     layers see views k, v [num_blocks, P, Hkv, D]
[2, layers, num_blocks, P, Hkv]        fp32 scales of 8-bit caches, one per token and head
block_bytes = 2 * layers * P * Hkv * (D * itemsize + 4 for the scale)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..models import LayerCache, ModelConfig
from .config import EngineConfig

# Without instructions a CPU engine takes at most this, and at most a quarter of what is available.
CPU_CACHE_BYTES = 4 << 30
EIGHT_BIT = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


def cache_config(model: Any) -> ModelConfig:
    """Of a decoder, with the key/value heads that its cache has."""
    return getattr(model, "cache_config", model.config)


def block_bytes(model: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers: keys, values and the scales of 8-bit caches."""
    per_head = model.head_dim * dtype.itemsize + (4 if dtype in EIGHT_BIT.values() else 0)
    return 2 * model.num_layers * model.num_kv_heads * per_head * block_size


def cache_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """What a `kv_cache_dtype` stands for."""
    return EIGHT_BIT.get(name, model_dtype)


def choose_num_blocks(
    config: EngineConfig,
    size: int,
    *,
    max_model_len: int,
    device: torch.device,
    measure_peak: Callable[[], int],
) -> int:
    """How many blocks the pool gets.

    Args:
        config: num_blocks wins, then kv_cache_memory, then what the device has to give.
        size: Bytes of a block, over all models that have their keys and values in it.
        max_model_len: Tokens; no more blocks than max_num_seqs requests of this length need.
        device: Where it lives.
        measure_peak: Runs a full step and returns the bytes it needs beyond what stays allocated.
            Only called on CUDA, when nothing was given.

    Raises:
        ValueError: The memory does not hold one block.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    if config.kv_cache_memory is not None:
        if config.kv_cache_memory < size:
            raise ValueError(
                f"LLM: kv_cache_memory must hold at least one block of {size} bytes, got "
                f"{config.kv_cache_memory}; raise it or lower block_size"
            )
        return config.kv_cache_memory // size
    if device.type == "cuda":
        peak = measure_peak()
        free, total = torch.cuda.mem_get_info(device)
        budget = int(total * config.gpu_memory_utilization) - (total - free) - peak
        hint = "raise gpu_memory_utilization or lower max_num_batched_tokens"
    else:
        budget = min(CPU_CACHE_BYTES, available_memory() // 4)
        hint = "give kv_cache_memory or num_blocks"
    useful = config.max_num_seqs * -(-max_model_len // config.block_size)
    blocks = min(budget // size, useful)
    if blocks < 1:
        raise ValueError(
            f"LLM: memory for the KV cache must hold one block of {size} bytes, got {budget} bytes "
            f"left on {device}; {hint}"
        )
    return blocks


def available_memory() -> int:
    """Bytes a new process could use without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def must_fit(what: str, device: torch.device, hint: str) -> Iterator[None]:
    """One sentence instead of the allocator's report when memory runs out inside.

    Raises:
        ValueError: It ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch's CPU allocator, and sizes beyond any memory, are plain RuntimeErrors
        text = str(error).lower()
        asked = ("alloc", "out of memory", "storage size", "overflow")
        if isinstance(error, RuntimeError) and not any(word in text for word in asked):
            raise
        raise ValueError(f"LLM: {what} must fit into the memory of {device}; {hint}") from error


def allocate_cache(
    model: ModelConfig,
    *,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    pinned: bool = False,
) -> tuple[Tensor, list[LayerCache]]:
    """The cache and each layer's views of it.

    Not cleared: the operators never read a slot that was not written.

    Raises:
        ValueError: The device does not have that much memory.
    """
    size = num_blocks * block_bytes(model, block_size, dtype)
    what = f"the KV cache of {size} bytes ({num_blocks} blocks)"
    shape = (2, model.num_layers, num_blocks, block_size, model.num_kv_heads, model.head_dim)
    scales = None
    with must_fit(what, device, "lower num_blocks or kv_cache_memory"):
        cache = torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)
        if dtype in EIGHT_BIT.values():
            scales = torch.empty(shape[:-1], dtype=torch.float32, device=device, pin_memory=pinned)
    layers = [LayerCache(k=k, v=v) for k, v in zip(*cache.unbind(0), strict=True)]
    if scales is not None:
        for layer, k_scale, v_scale in zip(layers, *scales.unbind(0), strict=True):
            layer.k_scale, layer.v_scale = k_scale, v_scale
    return cache, layers
