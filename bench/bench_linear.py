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
# Of a 70B Llama.
LARGE_LAYERS = (
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
    """Words and scales as `pack_weight` lays them out for a GPU."""
    blocks, steps = -(-n // 64), -(-k // 64)
    words = torch.randint(
        -(2**31), 2**31, (blocks, steps, 128 * bits), dtype=torch.int32, device="cuda"
    )
    scales = torch.rand(-(-k // GROUP), blocks, 8, 8, device="cuda") * 0.02
    return [words, scales.to(dtype)]


def packed_call(
    bits: int,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    device: str,
    scale_dtype: torch.dtype | None = None,
    *,
    batch_invariant: bool = False,
) -> Call:
    """Scales of x's dtype on a GPU unless said, as other engines keep them; fp32 on the CPU."""
    x = randn(m, k, dtype=dtype, device=device)
    if device == "cuda":
        weight = random_packed(bits, n, k, scale_dtype or dtype)
    else:
        qweight, scales, _ = packed_weight(bits, n, k, device)
        weight = [qweight.clone(), scales.clone()]
    op = fastinfer.int4_linear if bits == 4 else fastinfer.int8_linear
    options = {"group_size": GROUP, "out_features": n, "batch_invariant": batch_invariant}
    return lambda: op(x, *weight, **options)


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
    for label, n, k in (*LAYERS, *LARGE_LAYERS):
        for m in (1, 2, 4, 8, 16, 32):
            keys = {"op": "gemm", "layer": label, "n": n, "k": k, "m": m}
            shape = (m, n, k, dtype, "cuda")
            flops, bits16 = 2 * m * n * k, n * k * dtype.itemsize
            int4 = {
                f"{OURS}_int4": lambda s=shape: packed_call(4, *s),
                f"{OURS}_int4_fp32_scales": lambda s=shape: packed_call(4, *s, torch.float32),
            }
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


@functools.lru_cache(1)
def int8_weight(n: int, k: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales, _ = fastinfer.quantize_per_token(torch.randn(n, k, device=device))
    return codes, scales


def w8a8(
    m: int, n: int, k: int, dtype: torch.dtype, device: str, *, quantise: bool = False
) -> Call:
    """The product alone, or with the activations quantised in front of it."""
    x = randn(m, k, dtype=dtype, device=device)
    q, scale, _ = fastinfer.quantize_per_token(x)
    weight, weight_scale = (t.clone() for t in int8_weight(n, k, device))

    def call() -> torch.Tensor:
        codes, s = fastinfer.quantize_per_token(x)[:2] if quantise else (q, scale)
        return fastinfer.w8a8_linear(codes, s, weight, weight_scale, out_dtype=dtype)

    return call


def int_mm(m: int, n: int, k: int, device: str) -> Call:
    """int32 sums only: no scales."""
    x, weight = int8_weight(m, k, device)[0].clone(), int8_weight(n, k, device)[0].clone()
    return lambda: torch._int_mm(x, weight.t())


W8A8_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def w8a8_cases(bench: Bench, layers: tuple[tuple[str, int, int], ...]) -> None:
    """On CUDA: against torch._int_mm, which starts at 17 tokens, and torch's GEMM at the dtype."""
    dtype, device = bench.dtype, bench.device
    for label, n, k in layers:
        for m in W8A8_TOKENS if device == "cuda" else (1, 4, 16):
            keys = {"op": "gemm", "layer": label, "n": n, "k": k, "m": m}
            shape = (m, n, k, dtype, device)
            peers = {f"{OURS}_w8a8": lambda s=shape: w8a8(*s)}
            if device == "cuda":
                peers[f"{OURS}_w8a8, quantised here"] = lambda s=shape: w8a8(*s, quantise=True)
                if m > 16:
                    peers["torch int_mm"] = lambda s=(m, n, k, device): int_mm(*s)
                peers["torch"] = lambda s=shape: dense(*s, ours=False)
            bench.case(keys, peers, moved_bytes=n * k, flops=2 * m * n * k)


def dense(m: int, n: int, k: int, dtype: torch.dtype, device: str, *, ours: bool) -> Call:
    x, weight = (randn(rows, k, dtype=dtype, device=device) for rows in (m, n))
    if ours:
        return lambda: fastinfer.linear(x, weight)
    return lambda: torch.nn.functional.linear(x, weight)


def many_tokens(bench: Bench) -> None:
    """Packed weights against cuBLAS in 16 bits, from 64 tokens to prefill (CUDA). Scales are of x's
    type, as other engines keep them; once more in fp32. In the order of M: behind a prefill the GPU
    is hot, and a row of 64 tokens took up to 1.3 times as long.
    """
    cublas = "cublas_bf16" if bench.dtype == torch.bfloat16 else "cublas_fp16"
    for m in (64, 128, 256, 512, 1024, 2048, 4096, 8192):
        for label, n, k in (*LAYERS, *LARGE_LAYERS):
            shape = (m, n, k, bench.dtype, bench.device)
            bench.case(
                {"op": "gemm", "layer": label, "n": n, "k": k, "m": m},
                {
                    f"{OURS}_int4": lambda s=shape: packed_call(4, *s),
                    f"{OURS}_int4_fp32_scales": lambda s=shape: packed_call(4, *s, torch.float32),
                    f"{OURS}_int8": lambda s=shape: packed_call(8, *s),
                    cublas: lambda s=shape: dense(*s, ours=False),
                },
                moved_bytes=n * k // 2,
                flops=2 * m * n * k,
            )


def batch_invariant(bench: Bench) -> None:
    """What rows cost whose bits do not depend on the batch: one split of K, 16 tokens at a time."""
    for label, n, k in LAYERS[1:3]:
        for m in (1, 8, 16, 64, 256):
            shape = (m, n, k, bench.dtype, bench.device)
            for bits in (4, 8):
                bench.case(
                    {"op": "gemm", "layer": label, "n": n, "k": k, "m": m},
                    {
                        f"{OURS}_int{bits}_batch_invariant": lambda bits=bits, s=shape: packed_call(
                            bits, *s, batch_invariant=True
                        )
                    },
                    moved_bytes=n * k * bits // 8,
                    flops=2 * m * n * k,
                )


def on_cpu(bench: Bench) -> None:
    """The first layer: exact, with int8 activations, and what torch has for the same weights."""
    dtype, (label, n, k) = bench.dtype, LAYERS[0]
    for m in (1, 4, 16):
        keys = {"op": "gemm", "layer": label, "n": n, "k": k, "m": m}
        shape = (m, n, k, dtype, "cpu")
        int4 = {f"{OURS}_int4": lambda s=shape: packed_call(4, *s)}
        int8 = {f"{OURS}_int8": lambda s=shape: packed_call(8, *s)}
        for bits, peers in ((4, int4), (8, int8)):
            peers[f"{OURS}_int{bits}_x8"] = lambda s=shape, bits=bits: with_int8_activations(
                packed_call(bits, *s)
            )
        int4["dequantise + matmul"] = lambda s=shape: dequantise_and_matmul(*s)
        if dtype == torch.bfloat16:
            int4["torch int4pack"] = lambda s=shape: int4pack_for_cpu(*s[:3])
        both = {
            OURS: lambda s=shape: dense(*s, ours=True),
            "torch": lambda s=shape: dense(*s, ours=False),
        }
        for peers, size in ((int4, n * k // 2), (int8, n * k), (both, n * k * dtype.itemsize)):
            bench.case(keys, peers, moved_bytes=size, flops=2 * m * n * k)


def main() -> None:
    bench = Bench("linear", __doc__)
    if bench.device == "cuda":
        few_tokens(bench)
        batch_invariant(bench)
        many_tokens(bench)
        w8a8_cases(bench, LAYERS)
    else:
        on_cpu(bench)
        w8a8_cases(bench, LAYERS[:1])
    bench.finish()


if __name__ == "__main__":
    main()
