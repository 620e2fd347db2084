"""Whole models over several GPUs: tensor and pipeline parallel, random weights.

    python bench/bench_parallel_engine.py 8b 8b-tp2 --json bench/results/h200/parallel.json

Without cases: those of an 8B model that fit the GPUs there are; on a CPU a tiny one.

Rows have `op` "tpot" (one request, greedy: milliseconds per token), "load" (256 requests of 512
prompt and 128 new tokens at once: tokens per second), "pipeline" (64 requests that run all the
time: tokens per second, idle share of each stage, and both against steps of half the batch on a
stage alone). `tp` and `pp` are the sizes, `ratio` is against the row with `tp` = `pp` = 1 of the
same run. `all_reduce` says which one was used. Rows of other `op`s in the JSON file are kept.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_e2e import load_row, run_batch, write_config
from common import command_line, commit

from fastinfer import LLM, SamplingParams

OPS = ("tpot", "load", "pipeline")
# case -> (shape, 4-bit weights, tp, pp, what is measured)
CASES: dict[str, tuple[str, bool, int, int, tuple[str, ...]]] = {
    "8b": ("llama3-8b", False, 1, 1, ("tpot", "load")),
    "8b-tp2": ("llama3-8b", False, 2, 1, ("tpot", "load")),
    "8b-tp4": ("llama3-8b", False, 4, 1, ("tpot", "load")),
    "8b-pp2": ("llama3-8b", False, 1, 2, ("pipeline",)),
    "70b-int4": ("llama3-70b", True, 1, 1, ("tpot",)),
    "70b-tp2": ("llama3-70b", False, 2, 1, ("tpot",)),
    "tiny": ("tiny", False, 1, 1, ("tpot", "load")),
    "tiny-tp2": ("tiny", False, 2, 1, ("tpot", "load")),
    "tiny-pp2": ("tiny", False, 1, 2, ("pipeline",)),
}


def tpot(llm: LLM, prompt: int, new: int, iters: int) -> dict[str, Any]:
    """Of one request."""
    run_batch(llm, 1, prompt, 4, seed=0)
    first = [run_batch(llm, 1, prompt, 1, seed=i + 1).duration for i in range(iters)]
    whole = [run_batch(llm, 1, prompt, new, seed=i + 1).duration for i in range(iters)]
    ttft = statistics.median(first)
    return {
        "prompt": prompt,
        "new": new,
        "ttft_ms": round(ttft * 1e3, 3),
        "tpot_ms": round((statistics.median(whole) - ttft) / (new - 1) * 1e3, 4),
    }


def pipeline(llm: LLM, count: int, prompt: int, new: int) -> dict[str, Any]:
    """Requests that all decode: tokens per second, and how much the stages wait."""
    core = llm.core
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    core.add([(None, [i + 1] * prompt, params) for i in range(count)])
    while core.scheduler.waiting or any(r.num_output < 4 for r in core.scheduler.running):
        core.step()
    core.runner.pipeline_stats(reset=True)
    have = sum(r.num_output for r in core.scheduler.running)
    start = time.perf_counter()
    while all(r.num_output < new - 4 for r in core.scheduler.running):
        core.step()
    seconds = time.perf_counter() - start
    made = sum(r.num_output for r in core.scheduler.running) - have
    row: dict[str, Any] = {"requests": count, "out_tok_s": round(made / seconds, 1)}
    stages = core.runner.pipeline_stats()
    if stages:
        row["stage_ms"] = [round(stage["step_ms"], 4) for stage in stages]
        row["idle_share"] = [round(stage["idle_share"], 4) for stage in stages]
        # the slowest stage, never waiting
        bound = count / len(stages) / max(stage["step_ms"] for stage in stages) * 1e3
        row["of_bound"] = round(row["out_tok_s"] / bound, 4)
    core.abort_all()
    return row


def run_case(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    shape, int4, tp, pp, what = CASES[name]
    small = shape == "tiny"
    dtype = "bf16" if torch.cuda.is_available() else "fp32"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), shape, dtype, int4)
        start = time.perf_counter()
        llm = LLM(
            folder,
            load_format="dummy",
            max_num_seqs=8 if what == ("tpot",) else 64 if what == ("pipeline",) else 256,
            max_num_batched_tokens=512 if small or what == ("tpot",) else 8192,
            max_model_len=1024,
            num_blocks=2048 if small or what == ("tpot",) else None,
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            progress=False,
        )
        started = time.perf_counter() - start
        weights = "int4 g128" if int4 else dtype
        case = {
            "model": shape,
            "weights": weights,
            "tp": tp,
            "pp": pp,
            "start_s": round(started, 1),
        }
        with llm:
            if "tpot" in what:
                new, iters = (64, 2) if "70b" in shape else (128, 3)
                prompt = 64 if small else 512
                rows.append({"op": "tpot", **case, **tpot(llm, prompt, new, iters)})
                print(json.dumps(rows[-1]), flush=True)
            if "load" in what:
                count, lengths = (16, (64, 16)) if small else (256, (512, 128))
                load_row(llm, count, "random", lengths)
                rows.append({"op": "load", **case, **load_row(llm, count, "random", lengths)})
                print(json.dumps(rows[-1]), flush=True)
            if "pipeline" in what:
                count, new = (8, 24) if small else (64, 200)
                rows.append({"op": "pipeline", **case, **pipeline(llm, count, 64, new)})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []])
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where there is one"
    )
    parser.add_argument(
        "--seconds", type=float, help="taken for the sake of run_all; a case is one run"
    )
    parser.add_argument("--json", type=Path, help="write or update this file")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    gpus = torch.cuda.device_count()
    family = ("8b", "8b-tp2", "8b-pp2", "8b-tp4") if gpus else ("tiny", "tiny-tp2", "tiny-pp2")
    args.cases = args.cases or [
        name for name in family if not gpus or CASES[name][2] * CASES[name][3] <= gpus
    ]
    rows: list[dict[str, Any]] = []
    for name in args.cases:
        rows += run_case(name, args)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    for row in rows:
        key = "tpot_ms" if row["op"] == "tpot" else "out_tok_s"
        for one in rows:
            same = all(one[k] == row[k] for k in ("op", "model", "weights"))
            if same and one["tp"] == one["pp"] == 1 and one is not row:
                row["ratio"] = round(row[key] / one[key], 4)
        row |= {
            "peer": "fastinfer",
            "all_reduce": "nccl" if os.environ.get("FASTINFER_PEER_ALL_REDUCE") == "0" else "peer",
            "gpu": gpu,
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "command": command_line(["bench/bench_parallel_engine.py", *sys.argv[1:]]),
        }
        print(json.dumps(row), flush=True)
    if args.json is not None:
        document: dict[str, Any] = {"rows": []}
        if args.json.is_file():
            document = json.loads(args.json.read_text())
        key = ("op", "model", "weights", "tp", "pp")
        mine = {tuple(row.get(k) for k in key) for row in rows}
        kept = [r for r in document["rows"] if tuple(r.get(k) for k in key) not in mine]
        about = {
            "device": gpu,
            "torch": torch.__version__,
            **{name: rows[-1][name] for name in ("date", "commit", "command")},
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({**about, **document, "rows": [*kept, *rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
