"""transformers' own `generate` and `generate_batch`, with and without fastinfer inside.

A Llama with random weights (Llama-3-8B's shape on a GPU), built from its configuration. Peers:

    sdpa            what `generate` does by itself: a dynamic cache, nothing compiled
    sdpa compiled   a static cache; transformers compiles the step (CUDA graphs through inductor)
    fastinfer bf16  our attention, compiled like the above
    fastinfer int4  and linears in 4 bits, groups of 128
    continuous[...] `generate_batch`

Greedy, fixed lengths. `ttft_ms` is the time of a run with one new token, `tpot_ms` what the others
take on top, each; `compile_s` is the first run. Compiled peers run first with the same lengths, so
that no compilation is in the figures.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from common import Bench
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from fastinfer.integrations.transformers import enable
from fastinfer.quant import quantize_model

SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "max_position_embeddings": 1024,
    },
}
PEERS = ("sdpa", "sdpa compiled", "fastinfer bf16", "fastinfer int4")


def make_model(
    shape: str, layers: int | None, dtype: torch.dtype, device: str
) -> transformers.PreTrainedModel:
    """A model with random weights, made where it lives: nothing is copied or drawn on the CPU."""
    sizes = dict(SHAPES[shape])
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    config = transformers.LlamaConfig(
        **sizes, eos_token_id=None, bos_token_id=None, pad_token_id=0, tie_word_embeddings=False
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), transformers.initialization.no_init_weights():
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02)
    return model.eval()


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(device: str, run: Callable[[], Any]) -> float:
    sync(device)
    start = time.perf_counter()
    run()
    sync(device)
    return time.perf_counter() - start


def generate_row(
    model: transformers.PreTrainedModel,
    device: str,
    batch: int,
    prompt: int,
    new: int,
    iters: int,
    compiled: bool,
    profile: bool,
) -> dict[str, Any]:
    ids = torch.randint(1, model.config.vocab_size, (batch, prompt), device=device)
    mask = torch.ones_like(ids)
    options: dict[str, Any] = {"do_sample": False, "attention_mask": mask}
    if compiled:
        options["cache_implementation"] = "static"
        if device == "cpu":
            options["disable_compile"] = True

    def run(tokens: int) -> None:
        # The cache of a compiled run keeps its size, so the step is compiled once.
        out = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **options)
        assert out.shape[1] == prompt + tokens

    first_run = timed(device, lambda: run(new))
    timed(device, lambda: run(new))
    if profile and device == "cuda":
        show_profile(lambda: run(24))
    whole = statistics.median([timed(device, lambda: run(new)) for _ in range(iters)])
    ttft = statistics.median([timed(device, lambda: run(1)) for _ in range(iters)])
    return {
        "ttft_ms": round(ttft * 1e3, 3),
        "tpot_ms": round((whole - ttft) / (new - 1) * 1e3, 3),
        "total_s": round(whole, 3),
        "out_tok_s": round(batch * new / whole, 3),
        "compile_s": round(first_run - whole, 2),
    }


def show_profile(run: Callable[[], Any], rows: int = 25) -> None:
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    averages = trace.key_averages()
    for key in ("self_cuda_time_total", "self_cpu_time_total"):
        print(averages.table(sort_by=key, row_limit=rows, max_name_column_width=60), flush=True)


def batch_row(
    model: transformers.PreTrainedModel,
    device: str,
    attention: str,
    count: int,
    prompt: int,
    new: int,
    options: dict[str, Any],
    warm: int,
    profile: bool,
) -> dict[str, Any]:
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(count)

    def prompts(n: int) -> list[list[int]]:
        return torch.randint(1, model.config.vocab_size, (n, prompt), generator=generator).tolist()

    def run(n: int, tokens: int) -> None:
        config = GenerationConfig(
            max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        results = model.generate_batch(
            prompts(n),
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(**options),
            progress_bar=False,
        )
        made = [len(r.generated_tokens) for r in results.values() if r.error is None]
        assert made == [tokens] * n, (len(made), set(made))

    if warm:
        run(warm, 4)
    if profile and device == "cuda":
        show_profile(lambda: run(count, 16))
    whole = timed(device, lambda: run(count, new))
    return {
        "total_s": round(whole, 3),
        "out_tok_s": round(count * new / whole, 3),
        "tok_s": round(count * (prompt + new) / whole, 3),
    }


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, help="default: llama3-8b on a GPU, else tiny")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for trials")
    parser.add_argument("--iters", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--continuous", nargs="*", default=["fastinfer", "paged|sdpa"])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--profile", action="store_true")


def main() -> None:
    bench = Bench("transformers", __doc__ or "", add_flags)
    args = bench.args
    device = bench.device
    shape = args.shape or ("llama3-8b" if device == "cuda" else "tiny")
    prompt, new = (512, args.new) if shape != "tiny" else (64, 16)
    requests = args.requests if shape != "tiny" else 16
    enable()
    start = time.perf_counter()
    model = make_model(shape, args.layers, bench.dtype, device)
    sync(device)
    print(f"model in {time.perf_counter() - start:.1f} s, transformers {transformers.__version__}")

    def report(case: str, peer: str, measure: Callable[[], dict[str, Any]]) -> None:
        if not bench.wanted(f"{case} {peer}"):
            return
        begin = time.perf_counter()
        row = {"op": "e2e", "case": case, "peer": f"transformers {peer}", "shape": shape}
        row |= {"transformers": transformers.__version__, **measure()}
        if args.layers:
            row["layers"] = args.layers
        bench.rows.append(row)
        figures = " ".join(f"{k}={row[k]}" for k in row if k.endswith(("_ms", "_s")))
        print(f"{case:<28} {peer:<28} {figures}  ({time.perf_counter() - begin:.1f} s)", flush=True)
        if args.json:
            bench._write()

    for attention in args.continuous:
        options: dict[str, Any] = (
            {"max_memory_percent": 0.6} if device == "cuda" else {"num_blocks": 256}
        )
        report(
            f"HF generate_batch {requests} req {prompt}/{new}",
            f"continuous[{attention}]",
            lambda a=attention, o=options: batch_row(
                model,
                device,
                a,
                requests,
                prompt,
                new,
                o,
                0 if "sdpa" in a else 8,
                args.profile and "sdpa" not in a,
            ),
        )
        gc.collect()
    for peer in args.peers:  # in this order: the last one quantises
        if "int4" in peer:
            quantize_model(model, 4, 128, scale_dtype=bench.dtype)
        model.set_attn_implementation("sdpa" if "sdpa" in peer else "fastinfer")
        torch._dynamo.reset()
        model.__dict__.pop("_compiled_call", None)
        model.__dict__.pop("_cache", None)
        report(
            f"HF generate b1 prompt{prompt} new{new}",
            peer,
            lambda p=peer: generate_row(
                model, device, 1, prompt, new, args.iters, p != "sdpa", args.profile
            ),
        )
    bench.finish()


if __name__ == "__main__":
    main()
