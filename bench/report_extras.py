"""Sections of the report that are not rows of an operator: the ablation, load tests of engines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

from fastinfer.bench import ablate_report
from fastinfer.bench.report import engine_of, read_results

_FIGURES = (
    ("output_throughput", "output tok/s", 1),
    ("total_token_throughput", "tok/s in and out", 1),
    ("request_throughput", "req/s", 2),
    ("median_ttft_ms", "TTFT p50 ms", 1),
    ("p99_ttft_ms", "TTFT p99 ms", 1),
    ("median_tpot_ms", "TPOT p50 ms", 2),
    ("p99_itl_ms", "ITL p99 ms", 1),
    ("avg_latency", "batch s", 3),
)
_ALL_TOKENS = "total_token_throughput"


def ablation(path: Path, pictures: Path, pyplot: Any) -> list[str]:
    """The section of a file of `fastinfer ablate`."""
    document = json.loads(path.read_text())
    rows, work = document["rows"], document["workload"]
    gpu, name = path.parent.name, path.stem
    pictures.mkdir(parents=True, exist_ok=True)
    lens = ",".join(map(str, work["prompt_lens"]))
    model = f"{document['model']} on " if "model" in document else ""
    caption = (
        f"{model}{document['device']}: {work['requests']} requests of {lens} + up to "
        f"{work['output_len']} tokens, {work['at_once']} at once"
    )
    ablate_report.plot(rows, pictures / f"{gpu}_{name}", caption)
    lines = ["", f"### One technique after the other (`{path.name}`)", "", caption + ".", ""]
    lines += [f"![{gpu}_{name}]({pictures.name}/{gpu}_{name}.png)", ""]
    lines += [*ablate_report.markdown(rows), ""]
    for row in rows:
        if row.get("worse"):
            lines.append(f"- * {row['title']}: {', '.join(row['worse'])}. {row['why_worse']}.")
    lines += [
        "",
        f"Run: `{path.name}`: {document['device']}, {document['date']}, commit "
        f"{document['commit']}, torch {document['torch']}: `{document['command']}`.",
    ]
    return lines


def load_tests(folder: Path) -> list[str]:
    """Results of `fastinfer bench` and of `vllm bench`, side by side.

    Tests of the same work (tokens in and out, request rate) are compared: the ratio is output
    throughput, or that of all tokens where a file has no other, our fastest / the other.
    """
    results = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        results += [(path.name, result) for result in read_results(path)]
    if not results:
        return []
    lines = ["", "### Load tests of engines", ""]
    lines.append(
        "| file | engine | " + " | ".join(title for _, title, _ in _FIGURES) + " | ratio |"
    )
    lines.append("|---" * (len(_FIGURES) + 3) + "|")
    ours: dict[tuple[Any, ...], dict[str, Any]] = {}  # the fastest of each work
    for _, result in results:
        if engine_of(result) == "fastinfer":
            best = ours.setdefault(_work(result), result)
            if result.get("output_throughput", 0) > best.get("output_throughput", 0):
                ours[_work(result)] = result
    for name, result in results:
        cells = [
            f"{result[key]:,.{digits}f}" if isinstance(result.get(key), (int, float)) else ""
            for key, _, digits in _FIGURES
        ]
        own, ratio, who = ours.get(_work(result)), "", engine_of(result)
        if own is not None and who != "fastinfer":
            rate = "output_throughput" if result.get("output_throughput") else _ALL_TOKENS
            if own.get(rate) and result.get(rate):
                ratio = f"{own[rate] / result[rate]:.2f}"
        if who == "fastinfer" and result.get("label"):
            who += f", {result['label']}"
        lines.append(f"| `{name}` | {who} | " + " | ".join(cells) + f" | {ratio} |")
    told = {result["command"] for _, result in results if result.get("command")}
    lines += ["", "Commands: " + "; ".join(f"`{command}`" for command in sorted(told)) + "."]
    return lines


def _work(result: dict[str, Any]) -> tuple[Any, ...]:
    """What a test had to do. vLLM's throughput file knows requests and the sum of tokens only."""
    total = result.get("total_num_tokens")
    if total is None and "total_input_tokens" in result:
        total = result["total_input_tokens"] + result.get("total_output_tokens", 0)
    rate = str(result.get("request_rate", "inf"))
    return str(total), str(result.get("completed")), rate, str(result.get("batch_size"))
