"""`fastinfer ablate`: the techniques of LLM inference, switched on one at a time."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

# device -> (prompt lengths, output tokens, requests, at once)
DEFAULTS = {"cpu": ([32, 64, 128], 32, 24, 6), "cuda": ([256, 512, 1024], 128, 192, 64)}


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "ablate",
        help="every technique of inference, switched on one at a time",
        description="Run one workload many times: first with transformers' generate (if "
        "installed), then with the engine, naive at first, each row with one more technique. Says "
        "for each row what bounds it, and what it makes worse.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda where usable)")
    parser.add_argument("--dtype", default="auto", metavar="NAME", help="default: auto")
    parser.add_argument(
        "--load-format", default="auto", metavar="NAME", help="dummy: random weights, no perplexity"
    )
    work = parser.add_argument_group("workload (defaults for cpu; cuda)")
    told = {name: f"default: {a}; {b}" for name, a, b in _defaults()}
    work.add_argument("--prompt-lens", metavar="N[,N...]", help=told["prompt_lens"])
    work.add_argument("--output-len", type=int, metavar="N", help=told["output_len"])
    work.add_argument("--requests", type=int, metavar="N", help=told["requests"])
    work.add_argument(
        "--at-once", type=int, metavar="N", help=f"most requests together; {told['at_once']}"
    )
    work.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="runs of a row, the fastest counts (3)"
    )
    work.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--max-model-len", type=int, metavar="N", help="what an unpaged cache reserves per request"
    )
    engine.add_argument("--chunk", type=int, metavar="N", help="token budget of chunked prefill")
    engine.add_argument(
        "--kv-cache-dtype", metavar="NAME", help="of the 8-bit cache (default: int8; fp8 on cuda)"
    )
    engine.add_argument(
        "--speculative", default="ngram", metavar="DIR", help="ngram (default) or a draft model"
    )
    engine.add_argument("--tp", type=int, default=1, metavar="N", help="GPUs of the last row")
    engine.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="only these rows")
    text = parser.add_argument_group("perplexity")
    text.add_argument(
        "--eval", metavar="FILE", help="held-out text (default: heldout.txt beside the model)"
    )
    text.add_argument("--eval-tokens", type=int, default=8192, metavar="N", help="default: 8192")
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="write the results there")
    output.add_argument("--plot", metavar="FILE", help=".png or .svg; without either, both")
    parser.set_defaults(run=run)


def _defaults() -> list[tuple[str, Any, Any]]:
    names = ("prompt_lens", "output_len", "requests", "at_once")
    pairs = zip(names, DEFAULTS["cpu"], DEFAULTS["cuda"], strict=True)
    return [
        (name, *(",".join(map(str, x)) if isinstance(x, list) else x for x in (cpu, cuda)))
        for name, cpu, cuda in pairs
    ]


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from tqdm import tqdm

    from ..bench import ablate_report as report
    from ..bench.ablate import Ablation, Options
    from ..bench.provenance import device_name
    from ..bench.report import require_matplotlib
    from ..engine.device import choose_device

    for option in ("json", "plot"):
        given = getattr(args, option)
        if given and not Path(given).resolve().parent.is_dir():
            raise ValueError(f"ablate: --{option} must be in a folder that is there, got {given!r}")
    if args.plot:
        require_matplotlib()
    device = choose_device(args.device)
    lens, output_len, requests, at_once = DEFAULTS[device.type]
    try:
        lens = [int(part) for part in args.prompt_lens.split(",")] if args.prompt_lens else lens
    except ValueError:
        raise ValueError(
            f"ablate: --prompt-lens must be numbers separated by commas, got {args.prompt_lens!r}"
        ) from None
    ablation = Ablation(
        Options(
            model=args.model,
            device=str(device),
            dtype=args.dtype,
            load_format=args.load_format,
            prompt_lens=lens,
            output_len=output_len if args.output_len is None else args.output_len,
            requests=requests if args.requests is None else args.requests,
            at_once=at_once if args.at_once is None else args.at_once,
            max_model_len=args.max_model_len,
            chunk=args.chunk,
            eval_text=args.eval,
            eval_tokens=args.eval_tokens,
            kv_cache_dtype=args.kv_cache_dtype,
            speculative=args.speculative,
            tensor_parallel=args.tp,
            repeats=args.repeats,
            rows=args.rows,
            seed=args.seed,
        )
    )
    options = ablation.options
    folder = Path(args.model).resolve()
    name = "/".join(folder.parts[-2:]) if folder.name == "model" else folder.name
    if args.load_format == "dummy":
        name += " (random weights)"
    caption = (
        f"{name} on {device_name(device)}: {options.requests} requests of "
        f"{','.join(map(str, lens))} + up to {options.output_len} tokens, {options.at_once} at once"
    )
    print(caption)
    print(report.header())
    results = []
    total = len(options.rows) or len(ablation.rows)
    with tqdm(total=total, unit="row", disable=not sys.stderr.isatty()) as bar:
        for result in ablation.run(bar.set_description):
            results.append(result)
            tqdm.write(report.line(result), file=sys.stdout)
            sys.stdout.flush()
            bar.update()
            if args.json:
                _write(args.json, name, device, ablation, results)
    ablation.close()
    if told := report.notes(results):
        print("\nWorse than the row before:")
        print(told)
    if args.json:
        print(f"wrote {args.json}")
    if args.plot:
        print(f"wrote {', '.join(map(str, report.plot(results, Path(args.plot), caption)))}")
    return 0


def _write(
    path: str, model: str, device: Any, ablation: Any, results: list[dict[str, Any]]
) -> None:
    import torch

    from ..bench.provenance import command_line, commit, device_name

    rates, options = ablation.rates, ablation.options
    document = {
        "model": model,
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "command": command_line(),
        "workload": {
            "prompt_lens": list(options.prompt_lens),
            "output_len": options.output_len,
            "requests": options.requests,
            "at_once": options.at_once,
            "max_model_len": ablation.max_len,
            "repeats": options.repeats,
        },
        "ceilings": {"gbs": round(rates.bytes / 1e9, 1), "tflops": round(rates.flops / 1e12, 3)}
        if rates
        else {},
        "rows": results,
    }
    Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
