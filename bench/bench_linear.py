"""Linear layers: 16/32-bit, int4 and int8 weights, int8 x int8, against torch."""

from __future__ import annotations

import torch
from common import OURS, Bench, Call, randn

import fastinfer

GROUP = 128
# (label, N, K): layers of an 8B Llama; the CPU runs the square one only.
LAYERS = (
    ("8B o", 4096, 4096),
    ("8B qkv", 6144, 4096),
    ("8B gate_up", 28672, 4096),
    ("8B down", 4096, 14336),
)


def packed_call(bits: int, m: int, n: int, k: int, dtype: torch.dtype, device: str) -> Call:
    x = randn(m, k, dtype=dtype, device=device)
    quantised = fastinfer.quantize_weight(torch.randn(n, k, device=device), bits, GROUP)
    packed = fastinfer.pack_weight(*quantised, bits=bits, group_size=GROUP)
    op = fastinfer.int4_linear if bits == 4 else fastinfer.int8_linear
    return lambda: op(
        x, packed.qweight, packed.scales, packed.zeros, group_size=GROUP, out_features=n
    )


def dequantise_and_matmul(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> Call:
    x = randn(m, k, dtype=dtype, device=device)
    quantised = fastinfer.quantize_weight(torch.randn(n, k, device=device), 4, GROUP)

    def call() -> torch.Tensor:
        grouped = quantised.codes.view(n, k // GROUP, GROUP).to(dtype) - 8
        return x @ (grouped * quantised.scales[..., None].to(dtype)).view(n, k).T

    return call


def int4pack_for_cpu(m: int, n: int, k: int) -> Call:
    x = randn(m, k, dtype=torch.bfloat16, device="cpu")
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales_and_zeros = torch.rand(k // GROUP, n, 2, dtype=torch.bfloat16)
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales_and_zeros)


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
    for label, n, k in LAYERS if device == "cuda" else LAYERS[:1]:
        for m in (1, 4, 16, 64, 256):
            keys = {"op": "gemm", "layer": label, "n": n, "k": k, "m": m}
            shape = (m, n, k, dtype, device)
            int4 = {
                f"{OURS}_int4": lambda s=shape: packed_call(4, *s),
                "dequantise + matmul": lambda s=shape: dequantise_and_matmul(*s),
            }
            if device == "cpu" and dtype == torch.bfloat16:
                int4["torch int4pack"] = lambda s=shape: int4pack_for_cpu(*s[:3])
            flops = 2 * m * n * k
            bench.case(keys, int4, moved_bytes=n * k // 2, flops=flops)
            bench.case(
                keys,
                {f"{OURS}_int8": lambda s=shape: packed_call(8, *s)},
                moved_bytes=n * k,
                flops=flops,
            )
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
