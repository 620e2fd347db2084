"""Every benchmark of this folder, one after the other, with progress; then `make report`.

    python bench/run_all.py                                   this machine's CPU, small sizes
    python bench/run_all.py --device cuda --out bench/results/h200
    python bench/run_all.py --only norm rotary                some of them
    python bench/run_all.py --resume                          those that have not ended well
    python bench/run_all.py --short                           a row or two of each

Each script writes `<out>/<name>.json` (names as in bench/results) and its table to
`<out>/logs/<name>.txt`. On a CPU the sizes are small and every row gets a few milliseconds, so that
the whole takes two minutes on two quiet cores and five on busy ones: it shows that everything runs,
and roughly how fast. A script that fails, takes too long or leaves no rows is reported with its
last line and does not stop the others; the exit code is then 1. `<out>/logs/state.json` says what
ended how; `--resume` runs what did not end well, or had another command line. `python
bench/report.py --results <out>/.. --output page.md` makes a page of them. `bench_parallel*.py`,
which need several GPUs, are run by themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shapes import write_config
from tqdm import tqdm

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Job:
    """A script and its arguments on a CPU, on a GPU, and with --short."""

    script: str
    cpu: str = ""
    cuda: str = ""
    short: str = ""


JOBS = {
    "norm": Job("bench_norm.py", "--filter 'm=1 ,m=64 '", short="--filter 'm=1 '"),
    "rotary": Job(
        "bench_rotary.py", "--filter 'tokens=1 ,tokens=64 '", short="--filter 'tokens=1 '"
    ),
    "activation": Job("bench_activation.py", "--filter 'm=1 ,m=64 '", short="--filter 'm=1 '"),
    "kvcopy": Job(
        "bench_kv_cache.py", "--filter 'T=64,copy_blocks 1 '", short="--filter 'copy_blocks 1 '"
    ),
    "sampling": Job(
        "bench_sampling.py",
        "--filter 'batch=1 '",
        short="--filter 'batch=1 vocab=128256 case=greedy'",
    ),
    "gemm": Job("bench_linear.py", "--filter 'm=1 '", short="--filter 'n=4096 k=4096 m=1 '"),
    "preparation": Job("bench_preparation.py", short="--filter plan_decode"),
    "decode": Job(
        "bench_paged_attention.py",
        "--rows small",
        "--rows all",
        "--rows small --filter 'batch=1 context=512 '",
    ),
    "prefill": Job(
        "bench_flash_attention.py",
        "--filter 'seqlen=512 '",
        "--rest 0.03",
        "--filter 'batch=1 seqlen=512 hq=32 hkv=8 d=128 causal=True'",
    ),
    "host": Job("bench_host.py"),
    "e2e": Job(
        "bench_e2e.py", "--iters 3", "--iters 1", "--shape tiny --iters 1 --weights 16 --filter b1"
    ),
    "serving": Job(
        "bench_serving.py",
        "--iters 1 --weights 16",
        "--iters 1 --weights 16",
        "--shape tiny --iters 1 --weights 16 --filter chat",
    ),
    "speculative": Job(
        "bench_speculative.py",
        "--iters 1 --drafts 4 --skip batch",
        "--iters 1",
        "--shape tiny --iters 1 --skip pair batch",
    ),
    "transformers": Job(
        "bench_transformers.py",
        "--iters 1 --peers sdpa",
        short="--shape tiny --iters 1 --peers sdpa --continuous",
    ),
}
# `fastinfer ablate`, a command of its own: of the bundled model, on a GPU also of random weights.
ABLATE = {
    "cpu": "--prompt-lens 16,32 --output-len 8 --requests 6 --at-once 3 --eval-tokens 1024",
    "cuda": "--prompt-lens 256,1024 --output-len 64 --requests 128 --repeats 2",
    "tiny": "--prompt-lens 64,128,256 --output-len 64 --requests 48 --at-once 16",
    "short": "--prompt-lens 16 --output-len 4 --requests 2 --at-once 2 --repeats 1 "
    "--eval-tokens 256 --rows kv_cache flash",
}
EVERYTHING = {"cpu": [*JOBS, "ablate"], "cuda": [*JOBS, "ablate", "ablate_tiny"]}
SECONDS = {"cpu": 0.004, "cuda": 0.02}  # per row
SHORT_SECONDS = 0.001


def command(name: str, device: str, seconds: float, out: Path, short: bool = False) -> list[str]:
    """The command line of a job."""
    target = ["--json", str(out / f"{name}.json")]
    if name.startswith("ablate"):
        model, sizes = HERE.parent / "examples" / "tiny" / "model", ABLATE["cpu"]
        if device == "cuda":
            sizes = ABLATE["tiny"]
            if name == "ablate":
                model, sizes = out / "logs" / "llama3-8b", f"{ABLATE['cuda']} --load-format dummy"
                write_config("tiny" if short else "llama3-8b", model)
        if short:
            sizes = ABLATE["short"] + (" --load-format dummy" if "dummy" in sizes else "")
        line = ["-m", "fastinfer", "ablate", "--model", str(model), "--device", device]
        return [sys.executable, *line, *sizes.split(), *target]
    job = JOBS[name]
    line = [sys.executable, str(HERE / job.script), "--device", device, "--seconds", str(seconds)]
    given = job.short if short else job.cpu if device == "cpu" else job.cuda
    return [*line, *shlex.split(given), *target]


def rows_of(path: Path) -> int:
    """How many rows a result file has; 0 where it is none."""
    try:
        return len(json.loads(path.read_text())["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def run(line: list[str], log: Path, limit: float, env: dict[str, str]) -> str:
    """Run a job: 'ok', 'too slow' or 'failed (code)'."""
    with log.open("w") as output:
        try:
            done = subprocess.run(
                line, stdout=output, stderr=subprocess.STDOUT, env=env, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return "too slow"
    return "ok" if done.returncode == 0 else f"failed ({done.returncode})"


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else ""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="default: build/bench/<device>")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--short", action="store_true", help="a row or two of each: do they run?")
    parser.add_argument("--resume", action="store_true", help="only what has not ended well yet")
    parser.add_argument("--seconds", type=float, help="per row (0.004 on a CPU, 0.02 on a GPU)")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds per script")
    args = parser.parse_args()
    known = EVERYTHING[args.device]
    args.only = args.only or known
    if unknown := set(args.only) - set(known):
        parser.error(f"--only must be of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    args.out = args.out or HERE.parent / "build" / "bench" / args.device
    args.seconds = args.seconds or (SHORT_SECONDS if args.short else SECONDS[args.device])
    return args


def main() -> int:
    args = parse()
    out: Path = args.out
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    state_file = logs / "state.json"
    state: dict[str, Any] = json.loads(state_file.read_text()) if state_file.is_file() else {}
    env = dict(os.environ)
    env["PYTHONPATH"] = f"{HERE.parent / 'python'}{os.pathsep}{env.get('PYTHONPATH', '')}"
    failed = []
    with tqdm(total=len(args.only), unit="bench", dynamic_ncols=True) as bar:
        for name in args.only:
            bar.set_description(name)
            line = command(name, args.device, args.seconds, out, args.short)
            result, log = out / f"{name}.json", logs / f"{name}.txt"
            before = state.get(name, {})
            done = before == {**before, "ended": "ok", "command": line} and rows_of(result) > 0
            if args.resume and done:
                tqdm.write(f"{name:<14} {'':>7}   done before  {result}")
                bar.update()
                continue
            result.unlink(missing_ok=True)  # of a run before
            start = time.perf_counter()
            ended = run(line, log, args.limit, env)
            took = time.perf_counter() - start
            rows = rows_of(result)
            if ended == "ok" and not rows:
                ended = "no rows"
            told = f"{rows:>4} rows  {result}" if ended == "ok" else f"{log}: {last_line(log)}"
            tqdm.write(f"{name:<14} {took:7.1f} s  {ended:<12} {told}")
            state[name] = {"ended": ended, "seconds": round(took, 1), "command": line, "rows": rows}
            state_file.write_text(json.dumps(state, indent=1) + "\n")
            if ended != "ok":
                failed.append(name)
            bar.update()
    if failed:
        print(f"not finished: {', '.join(failed)}; --resume runs them again", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
