"""The results table of the README, written from bench/results: between `<!-- results -->` and
`<!-- end -->`. `bench/report.py` fills it, so that new result files renew it; a test holds that the
README says what the files say. A `{}` of a line is the figure of the one row that its `Pick` finds.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
BLOCK = re.compile(r"(<!-- results -->\n).*?(<!-- end -->)", re.DOTALL)
GPU = "h200"
# A row that has one of these is another way of running the case, unless it is asked for.
VARIANTS = ("overlapped", "batch_invariant", "plan", "q_len", "prefix", "workspace", "window")
KERNELS = "docs/kernels/"


@dataclass(frozen=True)
class Pick:
    """One figure: a file, what its row has, which key, and how it is written."""

    file: str
    key: str
    form: str
    where: Row = field(default_factory=dict)
    per: float = 1.0

    def value(self, results: Path) -> tuple[str, str]:
        """The figure as text, and the commit that it was measured at.

        Raises:
            ValueError: Not exactly one row is meant.
        """
        path = results / f"{self.file}.json"
        document = json.loads(path.read_text())
        wanted = {"peer": "fastinfer", **self.where}
        found = [
            row
            for row in document["rows"]
            if all(row.get(key) == value for key, value in wanted.items())
            and not any(row.get(key) for key in VARIANTS if key not in wanted)
            and row.get(self.key) is not None
        ]
        if len(found) != 1:
            raise ValueError(f"{path} has {len(found)} rows with {wanted} and {self.key}, not one")
        return self.form.format(found[0][self.key] / self.per), found[0].get(
            "commit", document["commit"]
        )


def gpu(file: str, key: str, form: str, per: float = 1.0, **where: Any) -> Pick:
    return Pick(f"{GPU}/{file}", key, form, where, per)


def prefill(key: str = "tflops", **where: Any) -> Pick:
    return gpu("prefill", key, "{:.0f}", **({"causal": True, "d": 128} | where))


def square(**where: Any) -> Pick:
    return prefill(kind="dense", batch=1, seqlen=8192, **({"hq": 32, "hkv": 8} | where))


def decode(key: str, form: str, per: float = 1.0, **where: Any) -> Pick:
    shape = {"hq": 32, "hkv": 8, "d": 128, "page": 16, "kv": "bf16"}
    return gpu("decode", key, form, per, **shape, **where)


def gemm(peer: str, m: int, n: int = 28672, form: str = "{:.0f}") -> Pick:
    return gpu("gemm", "us", form, n=n, k=4096, m=m, peer=peer)


def share(file: str, case: str, **where: Any) -> Pick:
    return gpu(file, "of_bandwidth", "{:.0%}", case=case, **where)


def e2e(key: str, form: str, case: str, weights: str) -> Pick:
    return gpu("e2e", key, form, case=case, peer=f"fastinfer {weights}")


def link(kib: int, peer: str = "fastinfer one_shot") -> Pick:
    return gpu("parallel", "us", "{:.1f}", op="all_reduce_norm", gpus=2, kib=kib, peer=peer)


NCCL = "nccl, fused_add_rms_norm"
BF16, INT4 = "bf16", "int4 g128"
ONE, MANY = "b1 prompt512 new128", "256 req 512/128"
TWO = {"model": "llama3-8b", "weights": "bf16", "tp": 2, "pp": 1}

# (operator, case, result with a {} per pick, page, picks)
LINES: tuple[tuple[str, str, str, str, tuple[Pick, ...]], ...] = (
    (
        "`flash_attn_func`",
        "1 x 8192 causal, 32/8 heads, D 128; D 256, 16/8 heads",
        "{}; {} TFLOP/s (D 128: cuDNN {}, FlashAttention-2 {})",
        f"[prefill]({KERNELS}flash_attention.md)",
        (square(), square(d=256, hq=16), square(peer="sdpa_cudnn"), square(peer="sdpa_flash")),
    ),
    (
        "`flash_attn_varlen_func`",
        "2048 queries over 32,768 cached keys, pages of 16; 64",
        "{}; {} TFLOP/s",
        f"[prefill]({KERNELS}flash_attention.md)",
        tuple(prefill(kind="chunk", q=2048, context=32768, page=page) for page in (16, 64)),
    ),
    (
        "`flash_attn_with_kvcache`",
        "128 x 8192; mix of 128 lengths; 1 x 8192",
        "{} TB/s; {} TB/s; {} us",
        f"[decode]({KERNELS}paged_attention.md)",
        (
            decode("gbs", "{:.2f}", 1e3, batch=128, context=8192),
            decode("gbs", "{:.2f}", 1e3, batch=128, total_context=774198),
            decode("us", "{:.1f}", batch=1, context=8192),
        ),
    ),
    (
        "`int4_linear`",
        "28672 x 4096, M = 1; 16; 1024",
        "{}; {}; {} us (tinygemm {}; {}; cuBLAS bf16 at 1024: {})",
        f"[linear]({KERNELS}linear.md)",
        (
            gemm("fastinfer_int4", 1, form="{:.1f}"),
            gemm("fastinfer_int4", 16, form="{:.1f}"),
            gemm("fastinfer_int4", 1024),
            gemm("tinygemm_int4", 1, form="{:.1f}"),
            gemm("tinygemm_int4", 16),
            gemm("cublas_bf16", 1024),
        ),
    ),
    (
        "`int4_linear`",
        "4096 x 4096, M = 1",
        "{} us (tinygemm {}, cuBLAS bf16 {})",
        f"[linear]({KERNELS}linear.md)",
        tuple(
            gemm(peer, 1, 4096, "{:.1f}")
            for peer in ("fastinfer_int4", "tinygemm_int4", "cublas_bf16")
        ),
    ),
    (
        "`linear`, bf16",
        "4096 x 4096, M = 1; the four linears of an 8B layer in a row, programmatic launch",
        "{} us (cuBLAS {}); {} us",
        f"[linear]({KERNELS}linear.md)",
        (
            gemm("fastinfer", 1, 4096, "{:.1f}"),
            gemm("cublas_bf16", 1, 4096, "{:.1f}"),
            gpu("gemm", "us", "{:.1f}", layer="8B chain", bits=16, m=1, peer="fastinfer pdl"),
        ),
    ),
    (
        "`w8a8_linear`",
        "28672 x 4096, M = 1024; with quantisation",
        "{}; {} us (`torch._int_mm` {}, cuBLAS bf16 {})",
        f"[linear]({KERNELS}linear.md)",
        tuple(
            gemm(peer, 1024)
            for peer in (
                "fastinfer_w8a8",
                "fastinfer_w8a8, quantised here",
                "torch int_mm",
                "torch",
            )
        ),
    ),
    (
        "`rms_norm`, `fused_add_rms_norm`",
        "8192 x 4096",
        "{}, {} of copy bandwidth",
        f"[norm]({KERNELS}norm.md)",
        tuple(share("norm", case, m=8192, dim=4096) for case in ("rms_norm", "fused_add_rms_norm")),
    ),
    (
        "`silu_and_mul`; with int8 output",
        "8192 x 4096",
        "{}; {}",
        f"[activation]({KERNELS}activation.md)",
        tuple(share("activation", case, m=8192, inner=4096) for case in ("silu", "silu_quant")),
    ),
    (
        "`apply_rotary`; with cache write",
        "8192 tokens, 32/8 heads",
        "{}; {}",
        f"[rotary]({KERNELS}rotary.md)",
        tuple(
            share("rotary", case, tokens=8192, hq=32, hkv=8)
            for case in ("apply_rotary", "apply_rotary_and_cache")
        ),
    ),
    (
        "`copy_blocks`",
        "64 pairs x 32 layers x K,V of 32 KiB",
        "{} TB/s",
        f"[kv_cache]({KERNELS}kv_cache.md)",
        (
            gpu(
                *("kvcopy", "gbs", "{:.2f}", 1e3),
                case="copy_blocks 64 pairs x 32 layers x K,V",
            ),
        ),
    ),
    (
        "`reshape_and_cache`",
        "8192 tokens; 1 token",
        "{} TB/s; {} us",
        f"[kv_cache]({KERNELS}kv_cache.md)",
        (
            gpu("kvcopy", "gbs", "{:.2f}", 1e3, case="reshape_and_cache T=8192"),
            gpu("kvcopy", "us", "{:.1f}", case="reshape_and_cache T=1"),
        ),
    ),
    (
        "`sample` top-k + top-p; greedy",
        "64 x 128,256 bf16",
        "{} us; {} us",
        f"[sampling]({KERNELS}sampling.md)",
        tuple(
            gpu("sampling", "us", "{:.1f}", batch=64, case=case, dtype="bf16")
            for case in ("top-k + top-p", "greedy")
        ),
    ),
    (
        "engine on two GPUs, Llama-3-8B shape, bf16",
        "tensor parallel: batch 1; 256 requests 512/128",
        "{} ms per token; {} tokens/s",
        "[parallel](docs/parallel.md#measured)",
        (
            gpu("parallel", "tpot_ms", "{:.1f}", op="tpot", **TWO),
            gpu("parallel", "out_tok_s", "{:,.0f}", op="load", **TWO),
        ),
    ),
    (
        "all-reduce with residual and RMSNorm, 2 GPUs",
        "8; 64 KiB",
        "{}; {} us (NCCL and the norm {}; {})",
        f"[all_reduce]({KERNELS}all_reduce.md)",
        (link(8), link(64), link(8, NCCL), link(64, NCCL)),
    ),
    (
        "engine, Llama-3-8B shape",
        "batch 1, 512 + 128: bf16; int4",
        "{}; {} ms per token",
        "[engine](docs/engine.md#measured)",
        tuple(e2e("tpot_ms", "{:.1f}", ONE, weights) for weights in (BF16, INT4)),
    ),
    (
        "engine, Llama-3-8B shape",
        "256 requests 512/128: bf16; int4",
        "{}; {} tokens/s",
        "[engine](docs/engine.md#measured)",
        tuple(e2e("out_tok_s", "{:,.0f}", MANY, weights) for weights in (BF16, INT4)),
    ),
    (
        "`int4_linear` on a CPU, 2 threads",
        "M = 1, 4096 x 4096",
        "{} x torch's `_weight_int4pack_mm_for_cpu`",
        f"[linear]({KERNELS}linear.md)",
        (
            Pick(
                *("cpu/linear", "time_ratio", "{:.2f}"),
                {"n": 4096, "k": 4096, "m": 1, "peer": "torch int4pack"},
            ),
        ),
    ),
)


def table(results: Path) -> str:
    """The sentence in front, and the table."""
    body, commits = [], Counter()
    by_file: dict[str, set[str]] = {}
    for operator, case, form, page, picks in LINES:
        found = [pick.value(results) for pick in picks]
        for pick, (_, commit) in zip(picks, found, strict=True):
            if pick.file.startswith(GPU):
                by_file.setdefault(pick.file.split("/")[1], set()).add(commit)
                commits[commit] += 1
        told = form.format(*(text.replace("%", " %") for text, _ in found))
        body.append(f"| {operator} | {case} | {told} | {page} |")
    most = commits.most_common(1)[0][0]
    others = [
        f"{file}: {', '.join(sorted(used))}" for file, used in by_file.items() if used != {most}
    ]
    norm = json.loads((results / GPU / "norm.json").read_text())
    dates = {json.loads((results / GPU / f"{file}.json").read_text())["date"] for file in by_file}
    day = " to ".join(sorted({min(dates), max(dates)}))
    gemm = json.loads((results / GPU / "gemm.json").read_text())
    head = (
        f"{norm['device']} (copy {norm['ceilings']['gbs'] / 1e3:.1f} TB/s, bf16 matmul "
        f"{gemm['ceilings']['tflops']:.0f} TFLOP/s), {day}, torch {norm['torch']}, bf16, CUDA "
        f"graph, rotating buffers, commit {most}"
        f"{' (' + '; '.join(others) + ')' if others else ''}; rows in "
        f"[bench/results/{GPU}](bench/results/{GPU})."
    )
    lines = [head, "", "| operator | case | result | page |", "|---|---|---|---|", *body]
    return "\n".join(lines)


def fill(page: str, results: Path) -> str:
    """The page with its table as the results have it."""
    return BLOCK.sub(lambda match: f"{match[1]}{table(results)}\n{match[2]}", page)
