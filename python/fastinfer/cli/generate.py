"""`fastinfer generate`: complete prompts, then say how long it took and what the cache held."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING, Any

from .options import add_engine_options, add_sampling_options, make_llm, make_sampling_params

if TYPE_CHECKING:
    from ..engine import LLM, EngineStats, Logprob, RequestOutput, SamplingParams


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "generate",
        help="complete one or more prompts",
        description="Complete prompts. A single completion is printed as it is generated. Then "
        "come time to first token (TTFT), time per output token (TPOT), tokens per second and the "
        "use of the KV cache.",
    )
    source = parser.add_argument_group("prompts (at least one)")
    source.add_argument("--prompt", action="append", default=[], help="text; may be repeated")
    source.add_argument(
        "--prompt-file", metavar="FILE", help="one prompt per line; - reads standard input"
    )
    source.add_argument(
        "--token-ids",
        action="append",
        default=[],
        metavar="1,2,3",
        help="a prompt as token ids; may be repeated",
    )
    add_sampling_options(parser, max_tokens=128)
    parser.add_argument("--n", type=int, default=1, metavar="N", help="completions per prompt")
    parser.add_argument("--logprobs", type=int, metavar="K", help="log-probabilities (with --json)")
    parser.add_argument(
        "--echo", action="store_true", help="print the prompt before its completion"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--quiet", action="store_true", help="print the text only")
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    prompts = read_prompts(args)
    params = make_sampling_params(args, n=args.n, logprobs=args.logprobs)
    with make_llm(args) as llm:
        if args.json:
            outputs = llm.generate(prompts, params)
            print(json.dumps(to_json(outputs, llm), indent=2))
            return 0
        if len(prompts) == 1 and args.n == 1:
            if args.echo and isinstance(prompts[0], str):
                print(prompts[0], end="", flush=True)
            outputs = [print_stream(llm, prompts[0], params)]
        else:
            outputs = llm.generate(prompts, params)
            print_all(outputs)
        if not args.quiet:
            print("\n" + summary(outputs, llm))
    return 0


def read_prompts(args: argparse.Namespace) -> list[Any]:
    """Prompts in the order text, file, token ids.

    Raises:
        ValueError: There is none, or the ids are not numbers.
    """
    prompts: list[Any] = list(args.prompt)
    if args.prompt_file == "-":
        prompts += [line for line in sys.stdin.read().splitlines() if line.strip()]
    elif args.prompt_file:
        with open(args.prompt_file, encoding="utf-8") as lines:
            prompts += [line for line in lines.read().splitlines() if line.strip()]
    for ids in args.token_ids:
        try:
            prompts.append({"prompt_token_ids": [int(token) for token in ids.split(",")]})
        except ValueError:
            raise ValueError(
                f"--token-ids must be numbers separated by commas, got {ids!r}"
            ) from None
    if not prompts:
        raise ValueError("no prompt given; use --prompt, --prompt-file or --token-ids")
    return prompts


def print_stream(llm: LLM, prompt: Any, params: SamplingParams) -> RequestOutput:
    """Print a completion as it comes; returns the last output, with the timeline."""
    last: Any = None
    with llm.stream(prompt, params) as stream:
        for last in stream:
            for completion in last.outputs:
                new = completion.text if llm.tokenizer else _ids(completion.token_ids) + " "
                print(new, end="", flush=True)
    print(flush=True)
    return last


def print_all(outputs: list[RequestOutput]) -> None:
    """Print every prompt with its completions."""
    for output in outputs:
        shown = output.prompt if output.prompt is not None else _ids(output.prompt_token_ids)
        for completion in output.outputs:
            index = f" [{completion.index}]" if len(output.outputs) > 1 else ""
            print(f"--- {shown}{index}")
            print(completion.text or _ids(completion.token_ids))


def _ids(token_ids: list[int]) -> str:
    return " ".join(map(str, token_ids))


def _logprob(value: Logprob) -> dict[str, Any]:
    # JSON has no infinity: a token that could not have been drawn has no log-probability
    return {**asdict(value), "logprob": value.logprob if isfinite(value.logprob) else None}


def cache_use(stats: EngineStats) -> dict[str, float | int]:
    """Most blocks in use at once, of how many, in MB."""
    megabyte = stats.kv_block_bytes / 1e6
    return {
        "blocks_used": stats.kv_blocks_peak,
        "blocks_total": stats.kv_blocks_total,
        "used_mb": stats.kv_blocks_peak * megabyte,
        "total_mb": stats.kv_blocks_total * megabyte,
    }


def summary(outputs: list[RequestOutput], llm: LLM) -> str:
    """TTFT, TPOT, tokens/s and cache use, in one line each."""
    figures = llm.metrics()
    cache = cache_use(llm.stats())
    tokens = int(figures["total_output_tokens"])
    many = "mean " if figures["completed"] > 1 else ""
    decoded = any(o.metrics is not None and o.metrics.tpot is not None for o in outputs)
    # one token: no time per further token, and no stretch of time to count tokens over
    tpot = f"{figures['mean_tpot_ms']:.2f} ms" if decoded else "-"
    seconds = figures["duration"]
    rate = f"{tokens / seconds:.1f}" if seconds > 0 else "-"
    speculation = ""
    if "draft_acceptance_rate" in figures:
        speculation = (
            f"\nspeculation: {figures['draft_acceptance_rate']:.0%} of "
            f"{figures['total_draft_tokens']} drafts accepted, "
            f"{figures['mean_accepted_length']:.2f} tokens per check"
        )
    pipeline = "".join(
        f"\nstage {number}: {stage['layers']:.0f} layers, {stage['step_ms']:.2f} ms a step, "
        f"{stage['idle_share']:.0%} idle"
        for number, stage in enumerate(llm.pipeline_stats())
    )
    return (
        f"{many}TTFT {figures['mean_ttft_ms']:.1f} ms | {many}TPOT {tpot} | {rate} tokens/s | "
        f"{figures['total_input_tokens']} tokens in, {tokens} out\n"
        f"KV cache: {cache['blocks_used']} of {cache['blocks_total']} blocks used "
        f"({cache['used_mb']:.2f} of {cache['total_mb']:.1f} MB)"
        f"{speculation}{pipeline}"
    )


def to_json(outputs: list[RequestOutput], llm: LLM) -> dict[str, Any]:
    """Everything `generate` returned, as JSON types."""
    return {
        "outputs": [
            {
                "prompt": output.prompt,
                "prompt_token_ids": output.prompt_token_ids,
                "completions": [
                    {
                        "index": completion.index,
                        "text": completion.text,
                        "token_ids": completion.token_ids,
                        "cumulative_logprob": completion.cumulative_logprob,
                        "logprobs": None
                        if completion.logprobs is None
                        else [
                            {str(token): _logprob(value) for token, value in position.items()}
                            for position in completion.logprobs
                        ],
                        "finish_reason": completion.finish_reason,
                        "stop_reason": completion.stop_reason,
                        "metrics": completion.metrics.to_dict() if completion.metrics else None,
                    }
                    for completion in output.outputs
                ],
            }
            for output in outputs
        ],
        "metrics": llm.metrics(),
        "kv_cache": cache_use(llm.stats()),
    }
