"""Every benchmark of this folder, one after the other, with progress; then the report.

    python bench/run_all.py                                   this machine's CPU, small sizes
    python bench/run_all.py --device cuda --out bench/results/h200
    python bench/run_all.py --only norm rotary                some of them

Each script writes `<out>/<name>.json` (names as in bench/results) and its table to
`<out>/<name>.txt`. On a CPU the sizes are small and every row gets a few milliseconds, so that the
whole takes minutes: it shows that everything runs, and roughly how fast. A script that fails or
takes too long is reported and does not stop the others; the exit code is then 1.
`bench_parallel*.py`, which need several GPUs, are run by themselves.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from shapes import write_config
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ONCE = ["--iters", "1"]
# result -> script, arguments on a CPU, arguments on a GPU
JOBS: dict[str, tuple[str, list[str], list[str]]] = {
    "norm": ("bench_norm.py", ["--filter", "m=1 ,m=64 "], []),
    "rotary": ("bench_rotary.py", ["--filter", "tokens=1 ,tokens=64 "], []),
    "activation": ("bench_activation.py", ["--filter", "m=1 ,m=64 "], []),
    "kvcopy": ("bench_kv_cache.py", ["--filter", "T=64,copy_blocks 1 "], []),
    "sampling": ("bench_sampling.py", ["--filter", "batch=1 "], []),
    "gemm": ("bench_linear.py", ["--filter", "m=1 "], []),
    "decode": ("bench_paged_attention.py", ["--rows", "small"], ["--rows", "all"]),
    "prefill": ("bench_flash_attention.py", [], ["--rest", "0.03"]),
    "host": ("bench_host.py", [], []),
    "e2e": ("bench_e2e.py", ONCE, ONCE),
    "serving": ("bench_serving.py", [*ONCE, "--weights", "16"], [*ONCE, "--weights", "16"]),
    "speculative": ("bench_speculative.py", [*ONCE, "--drafts", "4", "--skip", "batch"], ONCE),
    "transformers": ("bench_transformers.py", [*ONCE, "--peers", "sdpa"], []),
}
# `fastinfer ablate`, a command of its own: of the bundled model, on a GPU also of random weights.
ABLATE = "--prompt-lens 16,32 --output-len 8 --requests 6 --at-once 3 --device cpu"
ABLATE_TINY = "--prompt-lens 64,128,256 --output-len 64 --requests 48 --at-once 16 --device cuda"
ABLATE_8B = "--prompt-lens 256,1024 --output-len 64 --requests 128 --device cuda"
EVERYTHING = {"cpu": [*JOBS, "ablate"], "cuda": [*JOBS, "ablate", "ablate_tiny"]}


def command(name: str, device: str, seconds: float, out: Path) -> list[str]:
    """The command line of a job."""
    target = ["--json", str(out / f"{name}.json")]
    if name.startswith("ablate"):
        model, sizes = str(HERE.parent / "examples" / "tiny" / "model"), ABLATE_TINY
        if device == "cpu":
            sizes = ABLATE
        elif name == "ablate":
            model, sizes = str(out / "llama3-8b"), f"{ABLATE_8B} --load-format dummy"
            write_config("llama3-8b", Path(model))
        line = ["-m", "fastinfer", "ablate", "--model", model]
        return [sys.executable, *line, *sizes.split(), *target]
    script, on_cpu, on_gpu = JOBS[name]
    line = [sys.executable, str(HERE / script), "--device", device, "--seconds", str(seconds)]
    return [*line, *(on_cpu if device == "cpu" else on_gpu), *target]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="default: build/bench/<device>")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--seconds", type=float, help="per row (0.004 on a CPU, 0.02 on a GPU)")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds per script")
    args = parser.parse_args()
    known = EVERYTHING[args.device]
    chosen: list[str] = args.only or known
    if unknown := set(chosen) - set(known):
        parser.error(f"--only must be of {', '.join(known)}, got {', '.join(unknown)}")
    out: Path = args.out or HERE.parent / "build" / "bench" / args.device
    out.mkdir(parents=True, exist_ok=True)
    seconds = args.seconds or (0.004 if args.device == "cpu" else 0.02)
    env = dict(os.environ)
    env["PYTHONPATH"] = f"{HERE.parent / 'python'}{os.pathsep}{env.get('PYTHONPATH', '')}"
    failed = []
    with tqdm(total=len(chosen), unit="bench") as bar:
        for name in chosen:
            bar.set_description(name)
            start, said = time.perf_counter(), out / f"{name}.txt"
            with said.open("w") as log:
                try:
                    code = subprocess.run(
                        command(name, args.device, seconds, out),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=env,
                        timeout=args.limit,
                    ).returncode
                except subprocess.TimeoutExpired:
                    code = -1
            took = time.perf_counter() - start
            state = "ok" if code == 0 else "too slow" if code == -1 else f"failed ({code})"
            tqdm.write(f"{name:<14} {took:7.1f} s  {state:<12} {said}")
            if code:
                failed.append(name)
            bar.update()
    if failed:
        print(f"not finished: {', '.join(failed)}; their .txt say why", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
