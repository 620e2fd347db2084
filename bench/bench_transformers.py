"""transformers' own `generate` and `generate_batch`, with and without fastinfer inside.

A Llama with random weights (Llama-3-8B's shape on a GPU), built from its configuration. Peers:

    sdpa            what `generate` does by itself: a dynamic cache, nothing compiled
    sdpa compiled   a static cache; transformers compiles the step (CUDA graphs through inductor)
    fastinfer bf16  our attention, compiled like the above
    fastinfer int4  and linears in 4 bits, groups of 128
    continuous[...] `generate_batch`: one model and one process for all, the same prompts; each runs
                    to its end. `time_ratio`: its time over that of the first, `ratio_to`;
                    `same_first_tokens`: of how many requests the first token is that one's

Greedy, fixed lengths. `ttft_ms` is the time of a run with one new token, `tpot_ms` what the others
take on top, each; `first_run_s` is a run before those measured, with compilation, or with captured
graphs in the case of `generate_batch` (two requests with two tokens).
"""

from __future__ import annotations

import argparse
import gc
import operator
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from common import Bench
from shapes import SHAPES
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from fastinfer.bench.backends import random_model
from fastinfer.integrations.transformers import ATTENTION, enable
from fastinfer.quant import quantize_model

# What a transformers config needs beyond the sizes.
POSITIONS: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "tiny": {"max_position_embeddings": 1024},
}
PEERS = ("sdpa", "sdpa compiled", "fastinfer bf16", "fastinfer int4")


def make_model(
    shape: str, layers: int | None, dtype: torch.dtype, device: str
) -> transformers.PreTrainedModel:
    """A model with random weights, made where it lives: nothing is copied or drawn on the CPU."""
    sizes: dict[str, Any] = SHAPES[shape] | POSITIONS[shape]
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    config = transformers.LlamaConfig(
        **sizes, eos_token_id=None, bos_token_id=None, pad_token_id=0, tie_word_embeddings=False
    )
    start = time.perf_counter()
    model = random_model(config, str(dtype).removeprefix("torch."), torch.device(device))
    sync(device)
    print(f"model in {time.perf_counter() - start:.1f} s, transformers {transformers.__version__}")
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
    model: transformers.PreTrainedModel, peer: str, batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    prompt, new, device = args.prompt, args.new, model.device.type
    ids = torch.randint(1, model.config.vocab_size, (batch, prompt), device=device)
    options: dict[str, Any] = {"do_sample": False, "attention_mask": torch.ones_like(ids)}
    if peer != "sdpa":
        options["cache_implementation"] = "static"

    def run(tokens: int) -> None:
        out = model.generate(ids, max_new_tokens=tokens, **options)
        assert out.shape[1] == prompt + tokens

    if peer == "sdpa":
        first_run = timed(device, lambda: run(2))
    else:  # sets the length of the static cache, too
        first_run = timed(device, lambda: run(new))
    if args.iters == 0:
        return {"first_run_s": round(first_run, 2)}
    if peer != "sdpa":
        timed(device, lambda: run(new))
    whole = statistics.median([timed(device, lambda: run(new)) for _ in range(args.iters)])
    ttft = statistics.median([timed(device, lambda: run(1)) for _ in range(args.iters)])
    if args.profile and device == "cuda":
        show_profile(lambda: run(9), 8)
    return {
        "ttft_ms": round(ttft * 1e3, 3),
        "tpot_ms": round((whole - ttft) / (new - 1) * 1e3, 3),
        "total_s": round(whole, 3),
        "out_tok_s": round(batch * new / whole, 3),
        "first_run_s": round(first_run, 2),
    }


def show_profile(run: Callable[[], Any], steps: int, rows: int = 24) -> None:
    """GPU time by kernel: microseconds per step and launches."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times.setdefault(event.name, []).append(event.time_range.elapsed_us())
    total = sum(map(sum, times.values()))
    print(f"  GPU time {total / steps:.0f} us per step")
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1]))[:rows]:
        print(f"  {sum(each) / steps:9.1f} us {len(each):6d} x {name[:110]}", flush=True)


def batch_row(
    model: transformers.PreTrainedModel,
    attention: str,
    args: argparse.Namespace,
    first: dict[str, Any],
) -> dict[str, Any]:
    """`first` is what the first attention left for those after it; it fills it."""
    count, prompt, new, device = args.requests, args.prompt, args.new, model.device.type
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(count)
    options = {"max_memory_percent": args.memory} if device == "cuda" else {"num_blocks": 256}
    # The manager is made for the load, and kept: captured graphs and the like belong to a start.
    options |= {"max_requests_per_batch": count}
    if attention == ATTENTION:
        page = ContinuousBatchingConfig()
        page_size = getattr(page, "page_size", None) or page.block_size
        options["max_blocks_per_request"] = -(-(prompt + new) // page_size) + 1

    def run(n: int, tokens: int) -> list[int]:
        prompts = torch.randint(1, model.config.vocab_size, (n, prompt), generator=generator)
        results = model.generate_batch(
            prompts.tolist(),
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(**options),
            max_new_tokens=tokens,
            persistent_manager=True,
            progress_bar=args.progress,
        )
        made = {
            tuple(r.prompt_ids): r.generated_tokens for r in results.values() if r.error is None
        }
        lengths = [len(made.get(tuple(ids), ())) for ids in prompts.tolist()]
        assert lengths == [tokens] * n, (len(made), set(lengths))
        return [made[tuple(ids)][0] for ids in prompts.tolist()]

    first_run = timed(device, lambda: run(2, 2))
    if args.profile and device == "cuda":
        show_profile(lambda: run(count, 8), 8)
    tokens: list[int] = []
    whole = timed(device, lambda: tokens.extend(run(count, new)))
    model.destroy_cached_continuous_batching_manager()
    row: dict[str, Any] = {
        "total_s": round(whole, 3),
        "out_tok_s": round(count * new / whole, 3),
        "tok_s": round(count * (prompt + new) / whole, 3),
        "first_run_s": round(first_run, 2),
    }
    if first:
        row["time_ratio"] = round(whole / first["total_s"], 3)
        row["ratio_to"] = first["peer"]
        row["same_first_tokens"] = sum(map(operator.eq, tokens, first["tokens"]))
    else:
        first |= {"peer": f"transformers continuous[{attention}]", "total_s": whole}
        first["tokens"] = tokens
    return row


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, help="default: llama3-8b on a GPU, else tiny")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for trials")
    parser.add_argument("--iters", type=int, default=3, help="0: only the first run")
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--continuous", nargs="*", default=[ATTENTION, "paged|sdpa"])
    parser.add_argument("--requests", type=int, help="of generate_batch")
    parser.add_argument("--memory", type=float, default=0.6, help="of the GPU, for its cache")
    parser.add_argument("--prompt", type=int)
    parser.add_argument("--new", type=int)
    parser.add_argument("--progress", action="store_true", help="show the one of generate_batch")
    parser.add_argument("--profile", action="store_true", help="also print GPU time by kernel")


def main() -> None:
    bench = Bench("transformers", __doc__ or "", add_flags)
    args, device = bench.args, bench.device
    shape = args.shape or ("llama3-8b" if device == "cuda" else "tiny")
    small = shape == "tiny"
    args.prompt = args.prompt or (64 if small else 512)
    args.new = args.new or (16 if small else 128)
    args.requests = args.requests or (16 if small else 256)
    enable()

    def report(case: str, peer: str, measure: Callable[[], dict[str, Any]]) -> None:
        begin = time.perf_counter()
        row = {"op": "e2e", "case": case, "peer": f"transformers {peer}", "shape": shape}
        row |= {"transformers": transformers.__version__, **measure()}
        if args.layers:
            row["layers"] = args.layers
        bench.rows.append(row)
        told = ("_ms", "_s", "_ratio", "_tokens")
        figures = " ".join(f"{k}={row[k]}" for k in row if k.endswith(told))
        print(f"{case:<36} {peer:<24} {figures}  ({time.perf_counter() - begin:.1f} s)", flush=True)
        if args.json:
            bench._write()

    batch_case = f"HF generate_batch {args.requests} req {args.prompt}/{args.new}"
    names = [a for a in args.continuous if bench.wanted(f"{batch_case} continuous[{a}]")]
    if names:
        model = make_model(shape, args.layers, bench.dtype, device)
        first: dict[str, Any] = {}
        for attention in names:
            report(
                batch_case,
                f"continuous[{attention}]",
                lambda m=model, a=attention: batch_row(m, a, args, first),
            )
            gc.collect()
            torch.cuda.empty_cache()  # what is kept counts as taken when the next cache is sized
        del model
    case = f"HF generate b1 prompt{args.prompt} new{args.new}"
    for peer in args.peers:
        if not bench.wanted(f"{case} {peer}"):
            continue
        torch._dynamo.reset()
        gc.collect()
        model = make_model(shape, args.layers, bench.dtype, device)
        if "int4" in peer:
            quantize_model(model, 4, 128, scale_dtype=bench.dtype)
        model.set_attn_implementation("sdpa" if "sdpa" in peer else "fastinfer")
        report(case, peer, lambda m=model, p=peer: generate_row(m, p, 1, args))
        del model
    bench.finish()


if __name__ == "__main__":
    main()
