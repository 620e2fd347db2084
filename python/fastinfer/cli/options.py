"""Options that several commands share. Defaults stay with the classes they configure."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..engine import LLM, SamplingParams


def layer_counts(text: str) -> list[int]:
    """ "17,15" -> [17, 15]."""
    return [int(count) for count in text.split(",")]


_ENGINE: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "tokenizer": (str, "DIR", "folder to take the tokenizer from (default: the model's)"),
    "dtype": (str, "NAME", "auto, float32, float16 or bfloat16"),
    "device": (str, "NAME", "cpu, cuda, cuda:1, ... (default: cuda where usable)"),
    "load_format": (str, "NAME", "auto, or dummy for random weights"),
    "requantize": (int, "BITS", "4 or 8: for quantised weights without a kernel of their own"),
    "quantization": (str, "NAME", "int8 or int4: round the weights to nearest while loading"),
    "max_model_len": (int, "N", "longest prompt + output in tokens"),
    "block_size": (int, "N", "tokens per block of the KV cache"),
    "num_blocks": (int, "N", "blocks of the KV cache"),
    "kv_cache_memory": (int, "BYTES", "memory for the KV cache"),
    "gpu_memory_utilization": (float, "SHARE", "of the GPU's memory that the engine may use"),
    "kv_cache_dtype": (str, "NAME", "auto, fp8 or int8"),
    "mode": (str, "NAME", "balanced, latency or throughput: defaults of the next two"),
    "max_num_seqs": (int, "N", "most requests that run at once"),
    "max_num_batched_tokens": (int, "N", "token budget of one step"),
    "long_prefill_token_threshold": (int, "N", "most tokens of one prompt per step, 0: the budget"),
    "swap_space": (int, "BYTES", "host memory for the blocks of preempted requests"),
    "speculative": (str, "DIR", "ngram, or the folder of a draft model: several tokens per step"),
    "num_speculative_tokens": (int, "N", "most guessed tokens per request and step"),
    "tensor_parallel_size": (int, "N", "GPUs that share every layer (--tp)"),
    "pipeline_parallel_size": (int, "N", "groups of GPUs with a part of the layers each (--pp)"),
    "pipeline_stages": (
        layer_counts,
        "N,N",
        "layers of each stage (default: measured; --pp-layers)",
    ),
    "distributed_timeout": (float, "S", "seconds until a GPU that does not answer ends the run"),
}
_SHORT = {
    "tensor_parallel_size": "--tp",
    "pipeline_parallel_size": "--pp",
    "pipeline_stages": "--pp-layers",
}
_SAMPLING: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "max_tokens": (int, "N", "most tokens to generate"),
    "min_tokens": (int, "N", "no end before this many tokens"),
    "temperature": (float, "T", "0 is greedy"),
    "top_p": (float, "P", "nucleus sampling, 1 is off"),
    "top_k": (int, "K", "keep the K most likely tokens, 0 is off"),
    "min_p": (float, "P", "drop tokens below P times the most likely one, 0 is off"),
    "repetition_penalty": (float, "X", "1 is off"),
    "presence_penalty": (float, "X", "0 is off"),
    "frequency_penalty": (float, "X", "0 is off"),
    "seed": (int, "N", "makes the output reproducible"),
}


def _add(
    group: argparse._ArgumentGroup,
    table: dict[str, tuple[Callable[[str], Any], str, str]],
    **defaults: Any,
) -> None:
    for name, (kind, metavar, text) in table.items():
        if name in defaults:
            text += f" (default: {defaults[name]})"
        flags = ["--" + name.replace("_", "-"), *filter(None, [_SHORT.get(name)])]
        group.add_argument(
            *flags, type=kind, metavar=metavar, help=text, default=defaults.get(name)
        )


def add_engine_options(parser: argparse.ArgumentParser, *, model_required: bool = True) -> None:
    """--model and the settings of `LLM`."""
    group = parser.add_argument_group("engine")
    group.add_argument("--model", required=model_required, metavar="DIR", help="checkpoint folder")
    group.add_argument(
        "--config", metavar="FILE", help="settings that `fastinfer tune` wrote; options overrule"
    )
    _add(group, _ENGINE)
    group.add_argument(
        "--batch-invariant", action="store_true", help="tokens do not depend on what else runs"
    )
    group.add_argument(
        "--no-cuda-graphs", action="store_true", help="launch every kernel of a decode step"
    )
    group.add_argument(
        "--no-async-scheduling", action="store_true", help="read a step's tokens before the next"
    )
    group.add_argument(
        "--no-prefix-caching", action="store_true", help="do not reuse the KV of common prefixes"
    )


def add_sampling_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """The fields of `SamplingParams`; defaults of this command where they differ."""
    group = parser.add_argument_group("sampling")
    _add(group, _SAMPLING, **defaults)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end at this text; may be repeated"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on past end of sequence")


def make_llm(args: argparse.Namespace) -> LLM:
    """The engine that the options describe."""
    from ..engine import LLM

    return LLM(args.model, **engine_options(args))


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `LLM`: those of --config, overruled by what was given."""
    from ..engine.settings_file import read_settings

    options = read_settings(args.config) if args.config else {}
    options |= {name: getattr(args, name) for name in _ENGINE if getattr(args, name) is not None}
    switches = {
        "enable_prefix_caching": (args.no_prefix_caching, False),
        "batch_invariant": (args.batch_invariant, True),
        "cuda_graphs": (args.no_cuda_graphs, False),
        "async_scheduling": (args.no_async_scheduling, False),
    }
    return options | {name: value for name, (given, value) in switches.items() if given}


def make_sampling_params(args: argparse.Namespace, **more: Any) -> SamplingParams:
    """The sampling parameters that the options describe."""
    from ..engine import SamplingParams

    given = {name: getattr(args, name) for name in _SAMPLING if getattr(args, name) is not None}
    return SamplingParams(stop=args.stop, ignore_eos=args.ignore_eos, **given, **more)
