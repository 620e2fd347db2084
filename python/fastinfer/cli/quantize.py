"""`fastinfer quantize`: make a quantised checkpoint, and say what it cost."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "quantize",
        help="make a quantised checkpoint",
        description="Quantise a checkpoint folder, layer by layer, into a new folder that "
        "fastinfer and, in the standard formats, vLLM and transformers read.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="unquantised checkpoint")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--method", default="rtn", choices=("rtn", "awq", "gptq", "smoothquant"), help="how"
    )
    parser.add_argument("--bits", type=int, choices=(4, 8), help="bits per weight (default: 4)")
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="input channels per scale, -1: all (128)"
    )
    symmetry = parser.add_mutually_exclusive_group()
    symmetry.add_argument(
        "--asymmetric", action="store_true", help="zero points (default for awq only)"
    )
    symmetry.add_argument("--symmetric", action="store_true", help="no zero points")
    parser.add_argument(
        "--format",
        choices=("gptq", "gptq_v2", "awq", "compressed-tensors", "native"),
        help="of the checkpoint (default: the method's own; rtn, smoothquant: compressed-tensors)",
    )
    parser.add_argument(
        "--skip",
        nargs="*",
        default=["lm_head"],
        metavar="NAME",
        help="layers to leave: names, parts of names, re:patterns (default: lm_head)",
    )
    gptq = parser.add_argument_group("gptq and smoothquant")
    gptq.add_argument(
        "--act-order", action="store_true", help="gptq: columns with large inputs first"
    )
    gptq.add_argument(
        "--no-static-groups",
        action="store_true",
        help="gptq --act-order: groups in the order of rounding, permuted at run time",
    )
    gptq.add_argument("--damp", type=float, metavar="X", help="gptq: damping (default: 0.01)")
    gptq.add_argument(
        "--alpha", type=float, default=0.5, metavar="X", help="smoothquant: 0 to 1 (default: 0.5)"
    )
    data = parser.add_argument_group("text")
    data.add_argument("--calib", metavar="FILE", help="calibration text (not for rtn)")
    data.add_argument(
        "--samples", type=int, default=128, metavar="N", help="pieces of it (default: 128)"
    )
    data.add_argument(
        "--seqlen", type=int, default=512, metavar="N", help="tokens per piece (default: 512)"
    )
    data.add_argument(
        "--eval", metavar="FILE", help="held-out text: measure perplexity before and after"
    )
    data.add_argument(
        "--eval-window", type=int, metavar="N", help="tokens the model sees at once (2048)"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue an interrupted run")
    again.add_argument("--overwrite", action="store_true", help="replace the checkpoint in --out")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ..quant import QuantizeOptions, quantize_checkpoint

    symmetric = False if args.asymmetric else True if args.symmetric else None
    options = QuantizeOptions(
        method=args.method,
        bits=args.bits,
        group_size=args.group_size,
        symmetric=symmetric,
        act_order=args.act_order,
        static_groups=not args.no_static_groups,
        format=args.format,
        skip=tuple(args.skip),
        samples=args.samples,
        seqlen=args.seqlen,
        damp=args.damp,
        alpha=args.alpha,
        eval_window=args.eval_window,
    )
    report = quantize_checkpoint(
        args.model,
        args.out,
        options,
        calib=args.calib,
        eval_text=args.eval,
        resume=args.resume,
        overwrite=args.overwrite,
        progress=not args.quiet,
    )
    if not args.quiet:
        print(render(report, args.out))
    return 0


def render(report: dict[str, Any], out: str) -> str:
    """The report as text: a line per layer, then sizes and perplexities."""
    rows = report["layers"]
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'layer':<{width}}  {'shape':>13}  weight error  output error  output MSE"]
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        cells = [_share(row["weight_error"]), _share(row["output_error"]), "-"]
        if row["output_mse"] is not None:
            cells[2] = f"{row['output_mse']:.3g}"
        lines.append(
            f"{row['name']:<{width}}  {shape:>13}  {cells[0]:>12}  {cells[1]:>12}  {cells[2]:>10}"
        )
    options, sizes = report["options"], report["bytes"]
    group = options["group_size"]
    groups = "one scale per channel" if group == -1 else f"groups of {group}"
    lines += [
        "",
        f"{options['method']}, {options['bits']} bits, {groups}, written as {options['format']} to "
        f"{out} in {report['seconds']:.1f} s",
        f"weights: {sizes['before'] / 1e6:.2f} MB -> {sizes['after'] / 1e6:.2f} MB",
    ]
    before, after = report["perplexity"]["before"], report["perplexity"]["after"]
    if before is not None and after is not None:
        lines.append(f"perplexity: {before:.4f} -> {after:.4f} ({after / before - 1:+.2%})")
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3f} %"
