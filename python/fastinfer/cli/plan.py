"""`fastinfer plan`: what a model needs in memory for a context and a batch, and what fits; how fast
it would be on one GPU or many.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plan_cluster import (
    add_cluster_options,
    predict_speed,
    speed_text,
    weight_format,
    weights_per_device,
)

if TYPE_CHECKING:
    import torch

    from ..models import CausalLM, ModelConfig
    from ..quant import QuantConfig

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}I": 1024**i for i, unit in enumerate("KMGT", start=1)}


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "plan",
        help="memory for weights and KV cache, and what fits",
        description="Say how much memory a model's weights and KV cache take for a context length "
        "and a batch, and what fits into a device; with --tp, --pp or --link also how fast it "
        "would be. Needs config.json only. The exit code is 1 when the batch does not fit.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument(
        "--context", type=int, metavar="N", help="prompt + output in tokens (default: the model's)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="requests (default: 1)")
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="of the device: 80GB, 24GiB, ... (default: this machine's GPU, or else its free RAM)",
    )
    parser.add_argument(
        "--utilization", type=float, default=0.9, metavar="X", help="share to use (default: 0.9)"
    )
    parser.add_argument("--dtype", default="auto", metavar="NAME", help="of the model")
    parser.add_argument(
        "--kv-cache-dtype", default="auto", metavar="NAME", help="auto, fp8 or int8"
    )
    parser.add_argument("--block-size", type=int, default=16, metavar="N", help="tokens per block")
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=2048, metavar="N", help="budget of a step"
    )
    parser.add_argument(
        "--speculative", metavar="DIR", help="folder of a draft model that runs beside it"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_cluster_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    report = plan_memory(
        args.model,
        context=args.context,
        batch=args.batch,
        memory=parse_size(args.memory) if args.memory else None,
        utilization=args.utilization,
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        block_size=args.block_size,
        max_num_batched_tokens=args.max_num_batched_tokens,
        tp=1 if args.tp is None else args.tp,
        pp=1 if args.pp is None else args.pp,
        speculative=args.speculative,
    )
    if (args.tp, args.pp, args.link) != (None, None, None):
        report["speed"] = predict_speed(report, args)
    print(json.dumps(report, indent=2) if args.json else as_text(report))
    return 0 if report["fits"] else 1


def parse_size(text: str) -> int:
    """Bytes of "80GB", "24GiB", "512M" or "1000"; GB is 10^9, GiB 2^30.

    Raises:
        ValueError: It is none of these.
    """
    match = re.fullmatch(r"([\d.]+)\s*([KMGT]?I?)B?", text.strip().upper())
    try:
        size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    except (ValueError, KeyError):
        size = 0
    if size < 1:
        raise ValueError(f"plan: --memory must be a size such as 80GB or 24GiB, got {text!r}")
    return size


def plan_memory(
    folder: str | Path,
    *,
    context: int | None = None,
    batch: int = 1,
    memory: int | None = None,
    utilization: float = 0.9,
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    block_size: int = 16,
    max_num_batched_tokens: int = 2048,
    tp: int = 1,
    pp: int = 1,
    speculative: str | Path | None = None,
) -> dict[str, Any]:
    """Everything the command prints of memory, in bytes and tokens. All of one device.

    Args:
        folder: Checkpoint folder; only config.json is read (and file headers for the dtype).
        context: Prompt + output of a request; None is the model's longest.
        batch: Requests at once.
        memory: Of the device; None is this machine's.
        utilization: Share of it that may be used.
        dtype: Of the model.
        kv_cache_dtype: As in `EngineConfig`.
        block_size: As in `EngineConfig`.
        max_num_batched_tokens: As in `EngineConfig`.
        tp: Devices that share a layer.
        pp: Stages that the layers are divided into.
        speculative: As in `EngineConfig`: a draft model has weights and, in every block of the
            cache, keys and values of its own.

    Raises:
        FileNotFoundError: There is no such folder or no config.json.
        ValueError: A number is out of range, or the model is not supported.
    """
    from ..distributed.stages import divide_layers
    from ..engine import EngineConfig
    from ..engine.kv_cache import block_bytes, cache_dtype
    from ..models import load_config
    from ..models.shard import check_divisible, weight_costs
    from ..quant import read_quant_config

    EngineConfig(  # checks the shared settings, with the engine's messages
        model=str(folder),
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        block_size=block_size,
        max_num_batched_tokens=max_num_batched_tokens,
        gpu_memory_utilization=utilization,
    )
    config = load_config(folder)
    model_dtype = _model_dtype(folder, config, dtype)
    context = config.max_position if context is None else context
    for name, value in (("--context", context), ("--batch", batch), ("--tp", tp), ("--pp", pp)):
        if value < 1:
            raise ValueError(f"plan: {name} must be at least 1, got {value}")
    check_divisible(config, tp, pp)
    weights = _weights(folder, config, model_dtype, context, tp, pp)
    kv_dtype = cache_dtype(kv_cache_dtype, model_dtype)
    # Of the device that holds most: heads are repeated where there are fewer than devices.
    heads = max(config.num_kv_heads // tp, 1)
    layers = max(divide_layers(weight_costs(config), pp))
    share = heads * layers / (config.num_kv_heads * config.num_layers)
    block, token = (int(block_bytes(config, size, kv_dtype) * share) for size in (block_size, 1))
    draft_weights = draft_block = 0
    if speculative is not None and speculative != "ngram":
        draft = load_config(speculative)
        draft_dtype = _model_dtype(speculative, draft, dtype if dtype != "auto" else model_dtype)
        draft_weights = _weights(speculative, draft, draft_dtype, context)
        draft_kv = cache_dtype(kv_cache_dtype, draft_dtype)
        draft_block = block_bytes(draft, block_size, draft_kv)
        weights, block = weights + draft_weights, block + draft_block
        token += block_bytes(draft, 1, draft_kv)
    per_request = -(-context // block_size) * block
    activations = activation_bytes(config, model_dtype.itemsize, max_num_batched_tokens, batch)
    where = "given"
    if memory is None:
        memory, where = _this_machine()
    room = int(memory * utilization) - weights - activations
    blocks = max(room // block, 0)
    return {
        "model": str(folder),
        "attention": _attention_kind(config),
        "dtype": str(model_dtype).removeprefix("torch."),
        "kv_cache_dtype": str(kv_dtype).removeprefix("torch."),
        "context": context,
        "batch": batch,
        "weight_bytes": weights,
        "tp": tp,
        "pp": pp,
        "weight_format": weight_format(read_quant_config(folder)),
        "draft_weight_bytes": draft_weights,  # of these
        "kv_bytes_per_token": token,
        "kv_bytes_per_request": per_request,
        "draft_kv_bytes_per_request": per_request // block * draft_block,  # of these
        "kv_bytes": per_request * batch,
        "activation_bytes": activations,
        "total_bytes": weights + per_request * batch + activations,
        "memory_bytes": memory,
        "memory_source": where,
        "utilization": utilization,
        "usable_bytes": int(memory * utilization),
        "fits": batch * per_request <= blocks * block,
        "max_batch": blocks * block // per_request,
        "max_context": min(blocks // batch * block_size, max(config.max_position, context)),
        "max_position": config.max_position,
        "kv_tokens": blocks * block_size,
    }


def _model_dtype(folder: str | Path, config: ModelConfig, dtype: Any) -> torch.dtype:
    from ..checkpoint import Checkpoint
    from ..models.loader import resolve_dtype

    has_weights = any(Path(folder).glob("*.safetensors"))
    return resolve_dtype(dtype, config, Checkpoint(Path(folder)) if has_weights else None)


def _weights(
    folder: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    context: int,
    tp: int = 1,
    pp: int = 1,
) -> int:
    import torch

    from ..models import CausalLM
    from ..quant import read_quant_config

    with torch.device("meta"):
        model = CausalLM(config, dtype=dtype, max_model_len=context)
    total = weight_bytes(model, config, read_quant_config(folder))
    return total if tp * pp == 1 else weights_per_device(total, model, config, tp, pp)


def weight_bytes(model: CausalLM, config: ModelConfig, quant: QuantConfig | None) -> int:
    """Bytes of the parameters and rotary tables; quantised layers as the GPU's kernels hold them.

    A packed weight takes bits / 8 bytes per element and a 16-bit scale (and, when asymmetric, a
    zero point of a byte) per group of a row; what no kernel reads is counted dequantised.
    """
    from ..models.layers import RowParts
    from ..models.weights import weight_targets
    from ..quant.layers import has_kernel

    total = sum(t.numel() * t.itemsize for t in [*model.parameters(), *model.buffers()])
    if quant is None:
        return total
    for tensor, target in weight_targets(config).items():
        layer = model.get_submodule(target.module)
        scheme = quant.for_module(tensor.removesuffix(".weight"))
        if target.param != "weight" or not isinstance(layer, RowParts) or scheme is None:
            continue
        codebook = scheme.method == "bitsandbytes" and scheme.style != "int8"
        if codebook or not (scheme.activations or has_kernel(scheme.group_size)):
            continue
        rows, columns = layer.part_shape("weight", target.parts)
        groups = 1 if scheme.group_size == -1 else -(-columns // scheme.group_size)
        packed = rows * columns * scheme.bits // 8
        scales = rows * 4 if scheme.activations else rows * groups * (2 if scheme.symmetric else 3)
        total += packed + scales - rows * columns * model.dtype.itemsize
    return total


def activation_bytes(config: ModelConfig, itemsize: int, tokens: int, batch: int) -> int:
    """An estimate of what a step of so many tokens holds beside weights and cache.

    Two hidden states and the widest moment of a layer (the feed-forward's gate, up and product, or
    q, k, v and the attention output); logits in fp32 for every request. The engine measures it.
    """
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    widest = max(3 * config.intermediate_size, attention)
    per_token = (2 * config.hidden_size + widest) * itemsize
    return tokens * per_token + batch * config.vocab_size * (4 + itemsize)


def _attention_kind(config: ModelConfig) -> str:
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if kv_heads == heads:
        return f"MHA, {heads} heads of {config.head_dim}"
    kind = "MQA" if kv_heads == 1 else "GQA"
    return f"{kind}, {heads} heads over {kv_heads} KV of {config.head_dim}"


def _this_machine() -> tuple[int, str]:
    import torch

    from ..engine.kv_cache import available_memory

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return properties.total_memory, properties.name
    return available_memory(), "free RAM of this machine"


def as_text(report: dict[str, Any]) -> str:
    """The report as lines."""
    size = _size
    kv = report["kv_cache_dtype"]
    context, batch = report["context"], report["batch"]
    draft, draft_kv = report["draft_weight_bytes"], report["draft_kv_bytes_per_request"] * batch
    of_draft = [
        f", {size(count)} of it the draft model's" if draft else "" for count in (draft, draft_kv)
    ]
    used = f"{report['utilization']:.0%} of {size(report['memory_bytes'])}"
    rows = [
        ("model", f"{report['model']} ({report['attention']}, {report['dtype']})"),
        ("weights", size(report["weight_bytes"]) + of_draft[0]),
        (
            "KV cache",
            f"{size(report['kv_bytes'])}: {batch} x {size(report['kv_bytes_per_request'])} for "
            f"{context} tokens, {size(report['kv_bytes_per_token'])} per token in {kv}"
            + of_draft[1],
        ),
        ("activations", f"about {size(report['activation_bytes'])}"),
        ("total", size(report["total_bytes"])),
        ("memory", f"{size(report['usable_bytes'])} ({used}, {report['memory_source']})"),
        ("fits", "yes" if report["fits"] else "no"),
        (
            "what fits",
            f"{report['max_batch']} requests of {context} tokens, or {batch} of "
            f"{report['max_context']}; {report['kv_tokens']} tokens in all",
        ),
    ]
    if report["tp"] * report["pp"] > 1:
        count = report["tp"] * report["pp"]
        rows.insert(
            1, ("devices", f"{count}: TP {report['tp']} x PP {report['pp']}; below: of one")
        )
    if "speed" in report:
        rows.append(("speed", speed_text(report["speed"])))
    if context > report["max_position"]:
        rows.append(("remark", f"the model was trained for {report['max_position']} tokens"))
    return "\n".join(f"{label:<13}{text}" for label, text in rows)


def _size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"
