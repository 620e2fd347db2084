"""Linear layers: 16/32-bit, int4 and int8 weights, int8 x int8, against torch.

fastinfer_int4_x8 and fastinfer_int8_x8 (CPU): FASTINFER_CPU_INT8_ACTIVATIONS=1.
"""

from __future__ import annotations

import functools
import os

import torch
from common import OURS, Bench, Call, randn

import fastinfer
from fastinfer import _lib

GROUP = 128
# (label, N, K): layers of an 8B Llama; the CPU runs the square one only.
LAYERS = (
    ("8B o", 4096, 4096),
    ("8B qkv", 6144, 4096),
    ("8B gate_up", 28672, 4096),
    ("8B down", 4096, 14336),
)
# Decoding: also those of a 70B Llama.
DECODE_LAYERS = (
    *LAYERS,
    ("70B qkv", 10240, 8192),
    ("70B gate_up", 57344, 8192),
    ("70B down", 8192, 28672),
)


@functools.lru_cache(1)
def quantised_weight(bits: int, n: int, k: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales; made once per case, buffer sets are copies."""
    codes, scales, _ = fastinfer.quantize_weight(torch.randn(n, k, device=device), bits, GROUP)
    return codes, scales


@functools.lru_cache(1)
def packed_weight(bits: int, n: int, k: int, device: str) -> fastinfer.PackedWeight:
    codes, scales = quantised_weight(bits, n, k, device)
    return fastinfer.pack_weight(codes, scales, bits=bits, group_size=GROUP)


def random_packed(bits: int, n: int, k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Words and 16-bit scales as `pack_weight` lays them out for a GPU."""
    blocks, steps = -(-n // 64), -(-k // 64)
    words = torch.randint(
        -(2**31), 2**31, (blocks, steps, 128 * bits), dtype=torch.int32, device="cuda"
    )
    scales = torch.rand(-(-k // GROUP), blocks, 8, 8, device="cuda") * 0.02
    return [words, scales.to(dtype)]


def packed_call(bits: int, m: int, n: int, k: int, dtype: torch.dtype, device: str) -> Call:
    x = randn(m, k, dtype=dtype, device=device)
    if device == "cuda":
        weight = random_packed(bits, n, k, dtype)
    else:
        qweight, scales, _ = packed_weight(bits, n, k, device)
        weight = [qweight.clone(), scales.clone()]
    op = fastinfer.int4_linear if bits == 4 else fastinfer.int8_linear
    return lambda: op(x, *weight, group_size=GROUP, out_features=n)


def with_int8_activations(call: Call) -> Call:
    """The same call with the CPU's int8 activations; the switch itself costs about 2 us."""

    def switched() -> object:
        os.environ["FASTINFER_CPU_INT8_ACTIVATIONS"] = "1"
        try:
            return call()
        finally:
            del os.environ["FASTINFER_CPU_INT8_ACTIVATIONS"]

    return switched


def dequantise_and_matmul(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> Call:
    x = randn(m, k, dtype=dtype, device=device)
    codes, scales = (t.clone() for t in quantised_weight(4, n, k, device))

    def call() -> torch.Tensor:
        grouped = codes.view(n, k // GROUP, GROUP).to(dtype) - 8
        return x @ (grouped * scales[..., None].to(dtype)).view(n, k).T

    return call


@functools.lru_cache(1)
def int4pack_weight(n: int, k: int) -> torch.Tensor:
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)


def int4pack_for_cpu(m: int, n: int, k: int) -> Call:
    x = randn(m, k, dtype=torch.bfloat16, device="cpu")
    packed = int4pack_weight(n, k).clone()
    scales_and_zeros = torch.rand(k // GROUP, n, 2, dtype=torch.bfloat16)
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales_and_zeros)


@functools.lru_cache(1)
def tinygemm_weight(n: int, k: int) -> torch.Tensor:
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    return torch.ops.aten._convert_weight_to_int4pack(codes, 8)


def tinygemm(m: int, n: int, k: int) -> Call:
    x = randn(m, k, dtype=torch.bfloat16, device="cuda")
    packed = tinygemm_weight(n, k).clone()
    scales_and_zeros = torch.rand(k // GROUP, n, 2, dtype=torch.bfloat16, device="cuda")
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales_and_zeros)


def chain(bits: int, m: int, dtype: torch.dtype, *, programmatic: bool) -> Call:
    """The four linears of a layer of an 8B Llama, each reading what the one before wrote."""
    layers = [LAYERS[1], LAYERS[0], LAYERS[2], LAYERS[3]]
    buffers = [randn(m, 28672, dtype=dtype, device="cuda") for _ in range(5)]
    calls = []
    for i, (_, n, k) in enumerate(layers):
        x, out = buffers[i][:, :k], buffers[i + 1][:, :n]
        if bits == 16:
            weight = randn(n, k, dtype=dtype, device="cuda")
            calls.append(lambda x=x, w=weight, out=out: fastinfer.linear(x, w, out=out))
        else:
            op = fastinfer.int4_linear if bits == 4 else fastinfer.int8_linear
            packed = random_packed(bits, n, k, dtype)
            calls.append(
                lambda x=x, w=packed, out=out, n=n, op=op: op(
                    x, *w, group_size=GROUP, out_features=n, out=out
                )
            )

    def call() -> None:
        with _lib.programmatic_launch(programmatic):
            for linear in calls:
                linear()

    return call


def few_tokens(bench: Bench) -> None:
    """Decoding on a GPU: 4, 8 and 16-bit weights for up to 32 tokens, and a layer as a chain."""
    dtype = bench.dtype
    for label, n, k in DECODE_LAYERS:
        for m in (1, 2, 4, 8, 16, 32):
            keys = {"op": "gemm", "layer": label, "n": n, "k": k, "m": m}
            shape = (m, n, k, dtype, "cuda")
            flops, bits16 = 2 * m * n * k, n * k * dtype.itemsize
            int4 = {f"{OURS}_int4": lambda s=shape: packed_call(4, *s)}
            if dtype == torch.bfloat16:
                int4["tinygemm_int4"] = lambda s=shape: tinygemm(*s[:3])
            bench.case(keys, int4, moved_bytes=n * k * 33 // 64, flops=flops)
            int8 = {f"{OURS}_int8": lambda s=shape: packed_call(8, *s)}
            bench.case(keys, int8, moved_bytes=n * k * 65 // 64, flops=flops)
            peers = {
                OURS: lambda s=shape: dense(*s, ours=True),
                f"cublas_{bench.args.dtype}": lambda s=shape: dense(*s, ours=False),
            }
            bench.case(keys, peers, moved_bytes=bits16, flops=flops)
    elements = sum(n * k for _, n, k in LAYERS)
    for bits in (4, 8, 16):
        for m in (1, 8):
            keys = {"op": "gemm", "layer": "8B chain", "bits": bits, "m": m}
            peers = {
                f"{OURS} pdl": lambda b=bits, m=m: chain(b, m, dtype, programmatic=True),
                OURS: lambda b=bits, m=m: chain(b, m, dtype, programmatic=False),
            }
            bench.case(keys, peers, moved_bytes=elements * bits // 8)


def w8a8(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> Call:
    q, scale, _ = fastinfer.quantize_per_token(randn(m, k, dtype=dtype, device=device))
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    weight_scale = torch.rand(n, device=device)
    return lambda: fastinfer.w8a8_linear(q, scale, weight, weight_scale, out_dtype=dtype)


def dense(m: int, n: int, k: int, dtype: torch.dtype, device: str, *, ours: bool) -> Call:
    x, weight = (randn(rows, k, dtype=dtype, device=device) for rows in (m, n))
    if ours:
        return lambda: fastinfer.linear(x, weight)
    return lambda: torch.nn.functional.linear(x, weight)


def main() -> None:
    bench = Bench("linear", __doc__)
    dtype, device = bench.dtype, bench.device
    if device == "cuda":
        few_tokens(bench)
    for label, n, k in LAYERS if device == "cuda" else LAYERS[:1]:
        for m in (64, 256) if device == "cuda" else (1, 4, 16):
            keys = {"op": "gemm", "layer": label, "n": n, "k": k, "m": m}
            shape = (m, n, k, dtype, device)
            int4 = {f"{OURS}_int4": lambda s=shape: packed_call(4, *s)}
            int8 = {f"{OURS}_int8": lambda s=shape: packed_call(8, *s)}
            if device == "cpu":
                for bits, peers in ((4, int4), (8, int8)):
                    peers[f"{OURS}_int{bits}_x8"] = lambda s=shape, bits=bits: (
                        with_int8_activations(packed_call(bits, *s))
                    )
            int4["dequantise + matmul"] = lambda s=shape: dequantise_and_matmul(*s)
            if device == "cpu" and dtype == torch.bfloat16:
                int4["torch int4pack"] = lambda s=shape: int4pack_for_cpu(*s[:3])
            flops = 2 * m * n * k
            bench.case(keys, int4, moved_bytes=n * k // 2, flops=flops)
            bench.case(keys, int8, moved_bytes=n * k, flops=flops)
            bench.case(
                keys, {f"{OURS}_w8a8": lambda s=shape: w8a8(*s)}, moved_bytes=n * k, flops=flops
            )
            bench.case(
                keys,
                {
                    OURS: lambda s=shape: dense(*s, ours=True),
                    "torch": lambda s=shape: dense(*s, ours=False),
                },
                moved_bytes=n * k * dtype.itemsize,
                flops=flops,
            )
    bench.finish()


if __name__ == "__main__":
    main()
