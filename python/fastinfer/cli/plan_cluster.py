"""`fastinfer plan` on more than one GPU: what each holds, and how fast they are together."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..models import CausalLM, ModelConfig
    from ..quant import QuantConfig


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """--tp, --pp, --link and what the speed is asked for."""
    group = parser.add_argument_group(
        "cluster", "Speed is computed from times of single kernels and of one link (an H200's)."
    )
    group.add_argument("--tp", type=int, metavar="N", help="GPUs that share a layer (default: 1)")
    group.add_argument("--pp", type=int, metavar="N", help="pipeline stages (default: 1)")
    group.add_argument(
        "--link", metavar="NAME", help="nvlink, pcie or one-way GB/s of two GPUs (default: nvlink)"
    )
    group.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens (default: 512)")
    group.add_argument("--output", type=int, default=128, metavar="N", help="tokens (default: 128)")
    group.add_argument(
        "--requests", type=int, default=256, metavar="N", help="that arrive together (default: 256)"
    )
    group.add_argument(
        "--measurements", metavar="DIR", help="of another GPU: a folder such as bench/results/h200"
    )


def weights_per_device(total: int, model: CausalLM, config: ModelConfig, tp: int, pp: int) -> int:
    """Of the fullest device: layers are divided by both, embedding and head by `tp` alone."""
    from ..distributed.stages import divide_layers
    from ..models.shard import weight_costs

    table = config.vocab_size * config.hidden_size * model.dtype.itemsize
    ends = table * (1 if config.tie_word_embeddings else 2)
    most = max(divide_layers(weight_costs(config), pp))
    layers = most / config.num_layers * (total - ends)
    # The first stage has the embedding, the last one the head.
    return int((layers + (ends if pp == 1 else table)) / tp)


def weight_format(quant: QuantConfig | None) -> str:
    """Which of the linear kernels most layers use: bf16, int4, int8 or w8a8."""
    scheme = None if quant is None else quant.scheme
    if scheme is None:
        return "bf16"
    return "w8a8" if scheme.activations else f"int{scheme.bits}"


def predict_speed(report: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """TTFT and TPOT of a request alone, throughput of many, by `engine.parallel_cost`.

    Args:
        report: what `plan_memory` gave.
        args: of the command.

    Raises:
        ValueError: --link is none.
    """
    from ..engine.calibration_h200 import H200
    from ..engine.parallel_calibration import read_results
    from ..engine.parallel_cost import Cluster, Shape, parse_link, predict
    from ..models import load_config

    config = load_config(args.model)
    for name in ("prompt", "output", "requests"):
        if getattr(args, name) < 1:
            raise ValueError(f"plan: --{name} must be at least 1, got {getattr(args, name)}")
    calibration = read_results(args.measurements) if args.measurements else H200
    shape = Shape(
        config.hidden_size,
        config.intermediate_size,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.vocab_size,
        report["weight_format"],
        2 if report["kv_cache_dtype"] in ("bfloat16", "float16") else 1,
    )
    cluster = Cluster(report["tp"], report["pp"], parse_link(args.link or "nvlink"))
    fits = max(report["kv_tokens"] // (args.prompt + args.output), 1)
    numbers = predict(
        shape,
        calibration,
        cluster,
        prompt=args.prompt,
        output=args.output,
        requests=args.requests,
        max_batch=min(fits * report["pp"], 256),
        chunk=args.max_num_batched_tokens,
    )
    return {
        "gpu": calibration.name,
        "link": args.link or "nvlink",
        "prompt": args.prompt,
        "output": args.output,
        "requests": args.requests,
        **{name: round(value, 3) for name, value in numbers.items()},
    }


def speed_text(speed: dict[str, Any]) -> str:
    """What `predict_speed` gave, as a line."""
    return (
        f"TTFT {speed['ttft_ms']:.1f} ms, TPOT {speed['tpot_ms']:.2f} ms of a request of "
        f"{speed['prompt']}/{speed['output']} tokens; {speed['out_tok_s']:.0f} tokens/s of "
        f"{speed['requests']} (computed for {speed['gpu']} over {speed['link']})"
    )
