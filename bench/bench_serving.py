"""What the HTTP server costs, and what prefix reuse gives a conversation.

`server 32 streams`: time per output token as a client in another process sees it, over that of the
same requests given to the engine directly. `chat 8 turns`: time to first token of the last turn
with the KV of the turns before in the cache, over that without reuse. Random weights; on a GPU the
shape is Llama-3-8B unless told otherwise, on a CPU a tiny one.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import uvicorn
from bench_e2e import write_config
from common import Bench
from shapes import SHAPES

from fastinfer import LLM
from fastinfer.bench.drive import run_load
from fastinfer.bench.workloads import make_workload
from fastinfer.engine import AsyncLLM
from fastinfer.engine.config import EngineConfig
from fastinfer.engine.runner import ModelRunner
from fastinfer.server.app import ServerSettings, create_app
from fastinfer.server.http import http_config

STREAMS = 32
OVERHEAD = {"bar": 0.08, "stretch": 0.03}  # asked of `overhead`
REUSE = {"bar": 0.3, "stretch": 0.15}  # asked of `ratio`


def make_llm(folder: str, bench: Bench, model: Any = None, **options: Any) -> LLM:
    config = EngineConfig(
        model=folder,
        device=bench.device,
        load_format="dummy",
        max_num_seqs=64,
        max_num_batched_tokens=8192,
        **options,
    )
    runner = ModelRunner(config, torch.device(bench.device), model)
    return LLM.from_runner(config, runner)


def offline_tpot(llm: LLM, prompt: int, new: int, seed: int) -> float:
    work = make_workload(
        "random",
        num_requests=STREAMS,
        vocab_size=1000,
        seed=seed,
        input_len=prompt,
        output_len=new,
    )
    load = run_load(llm.core, work, [0.0] * STREAMS)
    return statistics.mean(record.tpot or 0.0 for record in load.records)


def served_tpot(url: str, prompt: int, new: int, seed: int) -> float:
    command = [sys.executable, "-m", "fastinfer", "bench", "serve", "--url", url, "--json"]
    command += ["--num-prompts", str(STREAMS), "--input-len", str(prompt)]
    command += ["--output-len", str(new), "--seed-workload", str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"the client ended with {done.returncode}; its message is above")
    result = json.loads(done.stdout)
    assert result["total_output_tokens"] == STREAMS * new, result
    return result["mean_tpot_ms"] / 1e3


def server_row(llm: LLM, prompt: int, new: int, iters: int) -> dict[str, Any]:
    offline_tpot(llm, prompt, new, seed=90)
    direct = statistics.median(offline_tpot(llm, prompt, new, seed=i) for i in range(iters))
    engine = AsyncLLM(llm)
    app = create_app(engine, ServerSettings(model_name="bench"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(http_config(app, log_level="warning", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            served_tpot(url, prompt, new, seed=91)
            served = statistics.median(
                served_tpot(url, prompt, new, seed=100 + i) for i in range(iters)
            )
        finally:
            server.should_exit = True
            thread.join(30)
    return {
        "tpot_ms": round(served * 1e3, 3),
        "offline_tpot_ms": round(direct * 1e3, 3),
        "overhead": round(served / direct - 1, 4),
        **OVERHEAD,
    }


def last_turn_ttft(llm: LLM, turns: int, prompt: int, new: int, chats: int) -> float:
    """Median TTFT of the longest prompts: those of the last turn."""
    lengths = {"input_len": prompt, "output_len": new, "vocab_size": 1000}
    for seed in (1, 0):  # the first is a warm-up
        work = make_workload("chat", num_requests=chats, turns=turns, seed=seed, **lengths)
        load = run_load(llm.core, work, [0.0] * chats, max_concurrency=1)
    longest = max(record.num_prompt_tokens for record in load.records)
    return statistics.median(
        record.ttft or 0.0 for record in load.records if record.num_prompt_tokens == longest
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, help="default: llama3-8b on a GPU, else tiny")
    parser.add_argument("--iters", type=int, default=3)
    parser.add_argument("--weights", nargs="+", default=["16", "int4"], choices=["16", "int4"])


def main() -> None:
    bench = Bench("e2e", __doc__ or "", add_flags)
    args = bench.args
    shape = args.shape or ("llama3-8b" if bench.device == "cuda" else "tiny")
    tiny = shape == "tiny"
    prompt, new = (64, 16) if tiny else (512, 128)
    for weights in args.weights:
        peer = f"fastinfer {args.dtype}" if weights == "16" else "fastinfer int4 g128"
        with tempfile.TemporaryDirectory() as folder:
            write_config(Path(folder), shape, args.dtype, weights == "int4")
            llm = make_llm(folder, bench)
            model = llm.core.runner.model
            chat = (8, 32, 16, 4) if tiny else (8, 384, 64, 2)
            turns, streams = f"chat {chat[0]} turns", f"server {STREAMS} streams"
            ttft = {True: last_turn_ttft(llm, *chat)} if bench.wanted(turns) else {}
            if bench.wanted(streams):
                row = server_row(llm, prompt, new, args.iters)  # closes the engine
                report(bench, shape, streams, peer, row)
                print(
                    f"{streams} {peer}: TPOT {row['tpot_ms']:.3f} ms, "
                    f"engine alone {row['offline_tpot_ms']:.3f}, overhead {row['overhead']:.1%}"
                )
            else:
                llm.close()
            if ttft:
                with make_llm(folder, bench, model, enable_prefix_caching=False) as plain:
                    ttft[False] = last_turn_ttft(plain, *chat)
                row = {
                    "ttft_ms": round(ttft[True] * 1e3, 3),
                    "ttft_ms_no_reuse": round(ttft[False] * 1e3, 3),
                    "ratio": round(ttft[True] / ttft[False], 4),
                    **REUSE,
                }
                report(bench, shape, f"{turns}, last", peer, row)
                print(
                    f"{turns} {peer}: TTFT of the last {row['ttft_ms']:.2f} ms, "
                    f"without reuse {row['ttft_ms_no_reuse']:.2f}, ratio {row['ratio']:.3f}"
                )
            del model, llm
    bench.finish()


def report(bench: Bench, shape: str, case: str, peer: str, row: dict[str, Any]) -> None:
    bench.rows.append({"op": "e2e", "case": case, "peer": peer, "shape": shape, **row})
    bench.save()


if __name__ == "__main__":
    main()
