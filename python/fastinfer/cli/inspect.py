"""`fastinfer inspect`: what a checkpoint is, and whether and how it will run."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..models import ModelConfig
    from ..models.weights import TensorPlan
    from ..quant import LinearScheme


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "inspect",
        help="describe a checkpoint: family, format, sizes, how it will run",
        description="Describe a checkpoint folder without loading it: family, sizes, dtype, "
        "quantisation, files, KV cache per token, and whether and how it will run. The exit code "
        "is 1 when it will not.",
    )
    parser.add_argument("folder", metavar="DIR", help="checkpoint folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    report = inspect_checkpoint(args.folder)
    print(json.dumps(report, indent=2) if args.json else as_text(report))
    return 0 if report["runs"] else 1


def inspect_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Everything the command prints.

    Args:
        folder: checkpoint folder.

    Returns:
        JSON-like dictionary; `runs` says whether `LLM(folder)` will load it, `why_not` what is
        wrong, and what could not be found out because of that is None.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    from ..checkpoint import Checkpoint
    from ..quant import notes

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"inspect: DIR must be a checkpoint folder on this machine, got {str(folder)!r}"
        )
    report: dict[str, Any] = {
        "path": str(folder),
        "family": None,
        "sizes": None,
        "dtype": None,
        "quantization": None,
        "files": _files(folder),
        "kv_cache_bytes_per_token": None,
        "runs": False,
        "how": [],
        "remarks": [],
        "why_not": None,
    }
    report["total_bytes"] = sum(file["bytes"] for file in report["files"])
    with notes.collecting(say=False) as remarks:
        try:
            config = _describe_config(folder, report)
            _describe_quantization(folder, report)
            _describe_weights(config, Checkpoint(folder, who="inspect"), report)
            report["runs"] = True
        except (ValueError, OSError) as error:
            report["why_not"] = str(error)
    report["remarks"] = [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {text}"
        for text, names in remarks.items()
    ]
    return report


def _files(folder: Path) -> list[dict[str, Any]]:
    found = sorted(f for suffix in ("safetensors", "bin", "pt") for f in folder.glob(f"*.{suffix}"))
    return [{"name": file.name, "bytes": file.stat().st_size} for file in found]


def _describe_config(folder: Path, report: dict[str, Any]) -> ModelConfig:
    from ..models import load_config

    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = raw.get("architectures") or [raw.get("model_type")]
        names = [names] if isinstance(names, str) else names
        report["family"] = ", ".join(str(name) for name in names)
    except (OSError, ValueError, TypeError, AttributeError):
        pass  # load_config says what is wrong
    config = load_config(folder)
    report["family"] = config.architecture
    report["sizes"] = {
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocabulary": config.vocab_size,
        "max_position": config.max_position,
        "sliding_window": config.sliding_window,
        "tied_embeddings": config.tie_word_embeddings,
    }
    return config


def _describe_quantization(folder: Path, report: dict[str, Any]) -> None:
    from ..quant import read_quant_config

    quant = read_quant_config(folder)
    if quant is None:
        return
    report["quantization"] = {
        "format": quant.method,
        "ignored": list(quant.ignore),
        "schemes": [],
        "plain_linears": None,
    }


def _describe_weights(config: ModelConfig, checkpoint: Checkpoint, report: dict[str, Any]) -> None:
    """Plan the load from the headers, then read one layer of each scheme."""
    import torch

    from ..engine.kv_cache import block_bytes
    from ..models import CausalLM
    from ..models.layers import RowParts
    from ..models.loader import resolve_dtype
    from ..models.weights import plan_tensors
    from ..quant import read_quant_config

    dtype = resolve_dtype("auto", config, checkpoint)
    report["dtype"] = str(dtype).removeprefix("torch.")
    report["kv_cache_bytes_per_token"] = block_bytes(config, 1, dtype)
    with torch.device("meta"):
        model = CausalLM(config, dtype=dtype)
    infos = checkpoint.tensors
    plan = plan_tensors(
        model,
        config,
        {name: info.shape for name, info in infos.items()},
        {name: info.dtype for name, info in infos.items()},
        read_quant_config(report["path"]),
    )
    plain = sorted(
        name.removesuffix(".weight")
        for name, target in plan.plain.items()
        if target.param == "weight" and isinstance(model.get_submodule(target.module), RowParts)
    )
    if plain:
        report["how"].append(f"{_layers(len(plain))} in {report['dtype']}")
    if report["quantization"] is None:
        return
    report["quantization"]["plain_linears"] = plain
    for scheme, count in Counter(t.scheme for t in plan.quantized.values()).items():
        described, how = _describe_scheme(scheme, count, model, checkpoint, plan, report["dtype"])
        report["quantization"]["schemes"].append(described)
        report["how"].append(how)


def _describe_scheme(
    scheme: LinearScheme,
    count: int,
    model: Any,
    checkpoint: Checkpoint,
    plan: TensorPlan,
    dtype: str,
) -> tuple[dict[str, Any], str]:
    """What the first layer of this scheme turns out to be when read."""
    from ..quant import CanonicalWeight, Int8Weight
    from ..quant.formats import read_linear
    from ..quant.fused import runnable

    name, target = next((n, t) for n, t in plan.quantized.items() if t.scheme == scheme)
    rows, columns = model.get_submodule(target.module).part_shape("weight", target.parts)
    tensors = dict(checkpoint.read(set(target.tensors)))
    stored = read_linear(name, tensors, scheme, columns, rows)
    described = {
        "layers": count,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "style": scheme.style or scheme.method,
        "zeros": "symmetric" if scheme.style not in ("nf4", "fp4") else "none (a codebook)",
        "act_order": False,
        "activations": scheme.activations,
        "looked_at": name,
    }
    if isinstance(stored, CanonicalWeight):
        described["act_order"] = stored.perm is not None
        if stored.zeros is not None and stored.zeros.is_floating_point():
            described["zeros"] = "floating point"
        elif stored.zeros is not None:
            low, high = int(stored.zeros.min()), int(stored.zeros.max())
            described["zeros"] = f"asymmetric ({low}..{high})"
    runs = runnable(name, stored)
    if isinstance(runs, Int8Weight):
        how = f"{_layers(count)} as W8A8: int8 weights, activations int8 per token"
    elif isinstance(runs, CanonicalWeight):
        size = "per channel" if scheme.group_size == -1 else f"in groups of {scheme.group_size}"
        how = f"{_layers(count)} as W{runs.bits}A16 {size}: weights stay packed"
    else:
        how = f"{_layers(count)} dequantised to {dtype} while loading"
    return described, how


def as_text(report: dict[str, Any]) -> str:
    """The report as lines."""
    rows = [("checkpoint", report["path"]), ("family", report["family"] or "unknown")]
    sizes = report["sizes"]
    if sizes:
        rows.append(
            (
                "sizes",
                f"{sizes['layers']} layers, hidden {sizes['hidden']}, "
                f"intermediate {sizes['intermediate']}, {sizes['heads']} heads "
                f"({sizes['kv_heads']} KV) of {sizes['head_dim']}, "
                f"vocabulary {sizes['vocabulary']}{' (tied)' if sizes['tied_embeddings'] else ''}",
            )
        )
        window = sizes["sliding_window"]
        rows.append(
            (
                "context",
                f"{sizes['max_position']} tokens" + (f", window {window}" if window else ""),
            )
        )
    if report["dtype"]:
        rows.append(("dtype", report["dtype"]))
    rows += _quantization_rows(report["quantization"])
    shown = [f"{file['name']} {_size(file['bytes'])}" for file in report["files"][:4]]
    if len(report["files"]) > 4:
        shown.append(f"and {len(report['files']) - 4} more")
    rows.append(("files", ", ".join(shown) or "none"))
    rows.append(("total", _size(report["total_bytes"])))
    if report["kv_cache_bytes_per_token"]:
        rows.append(("KV cache", f"{_size(report['kv_cache_bytes_per_token'])} per token"))
    rows += [("remark", text) for text in report["remarks"]]
    if report["runs"]:
        rows.append(("runs", "yes: " + "; ".join(report["how"])))
    else:
        rows.append(("runs", f"no: {report['why_not']}"))
    return "\n".join(f"{label:<13}{text}" for label, text in rows)


def _quantization_rows(quant: dict[str, Any] | None) -> list[tuple[str, str]]:
    if quant is None:
        return [("quantised", "no")]
    rows = [("quantised", quant["format"])]
    for scheme in quant["schemes"]:
        groups = scheme["group_size"]
        parts = [
            _layers(scheme["layers"]),
            f"{scheme['bits']} bits",
            "one scale per channel" if groups == -1 else f"groups of {groups}",
            scheme["style"],
            f"zeros {scheme['zeros']}",
            "act-order" if scheme["act_order"] else "columns in order",
        ]
        if scheme["activations"]:
            parts.append("int8 activations")
        rows.append(("", ", ".join(parts)))
    if quant["plain_linears"]:
        names = quant["plain_linears"]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        rows.append(("", f"not quantised: {', '.join(names[:4])}{more}"))
    return rows


def _layers(count: int) -> str:
    return f"{count} linear layer{'' if count == 1 else 's'}"


def _size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"
